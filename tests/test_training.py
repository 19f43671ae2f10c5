"""The training loop and its tasks, a few steps of each at toy size."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from scipy.special import expit
from scipy.stats import norm

import qvd_jax
from qvd_jax.config import from_dict, read_yaml
from qvd_jax.errors import InputError
from qvd_jax.shapes import classifier, pixels
from qvd_jax.shapes.scenes import scenes_of
from qvd_jax.shapes.text_to_video_task import _group_means, clean_error, sample_timesteps
from qvd_jax.shapes.tokenizer import make_tokenizer
from qvd_jax.shapes.vae_task import load_vae
from qvd_jax.train import RunConfig, make_task
from qvd_jax.train import main as train_command
from qvd_jax.training import loop

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass(frozen=True)
class LineConfig:
    """Of `Line`."""

    slope: float = 2.0


class Line:
    """A task of one weight, whose noise enters the loss."""

    def __init__(self, slope=2.0):
        self.config = LineConfig(slope)
        self.stop_at = None
        self.batches = 0

    def init(self, key):
        return {"weight": jax.random.normal(key, (3,))}

    def batch(self, rng, size):
        self.batches += 1
        if self.batches == self.stop_at:
            raise KeyboardInterrupt
        x = rng.normal(size=(size, 3)).astype(np.float32)
        return {"x": x, "y": self.config.slope * x.sum(1)}

    def loss(self, params, batch, key):
        noise = 0.1 * jax.random.normal(key, batch["y"].shape)
        return jnp.square(batch["x"] @ params["weight"] - batch["y"] + noise).mean()

    def sheet(self, params):
        return np.zeros((1, 1, 2, 2, 3), np.uint8)


CONFIG = loop.LoopConfig(
    steps=12, batch_size=4, learning_rate=0.1, warmup_steps=2, checkpoint_every=3
)


def test_several_hosts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="training works on one host; the devices are those of 2"):
        loop.train(Line(), CONFIG, tmp_path)


def test_interrupted_training_ends_like_an_uninterrupted_one(tmp_path):
    whole = loop.train(Line(), CONFIG, tmp_path / "whole")
    task = Line()
    task.stop_at = 8
    with pytest.raises(KeyboardInterrupt):
        loop.train(task, CONFIG, tmp_path / "resumed")
    task.stop_at = None
    chex.assert_trees_all_equal(loop.train(task, CONFIG, tmp_path / "resumed"), whole)
    assert task.batches == 8 + 12 - 6  # six steps were saved


def test_a_run_is_adamw_with_warmup_cosine_clipping_and_a_moving_average(tmp_path):
    """The whole run once more, in NumPy."""
    config = replace(CONFIG, gradient_clip=0.5, weight_decay=0.1, decay_steps=20, ema_decay=0.6)
    task = Line()
    weight = np.float64(task.init(jax.random.key(0))["weight"])
    average, first, second = weight, np.zeros(3), np.zeros(3)
    for step in range(config.steps):
        data = task.batch(np.random.default_rng([0, step]), config.batch_size)
        key = jax.random.fold_in(jax.random.key(0), step)
        noise = 0.1 * np.asarray(jax.random.normal(key, data["y"].shape))
        error = data["x"] @ weight - data["y"] + noise
        gradient = 2 * error @ data["x"] / config.batch_size
        gradient *= min(1, 0.5 / np.linalg.norm(gradient))
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        update = first / (1 - 0.9 ** (step + 1))
        update /= np.sqrt(second / (1 - 0.99 ** (step + 1))) + 1e-8
        rising, falling = step / 2, (1 + np.cos(np.pi * (step - 2) / (20 - 2))) / 2
        weight = weight - 0.1 * (rising if step < 2 else falling) * (update + 0.1 * weight)
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    found = loop.train(task, config, tmp_path)["weight"]
    np.testing.assert_allclose(found, average, rtol=1e-4)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys):
    whole = loop.train(Line(), CONFIG, tmp_path)
    newest = tmp_path / "checkpoints" / "12"
    arrays = max(
        (f for f in (newest / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 0xFF
    arrays.write_bytes(bytes(data))
    task = Line()
    chex.assert_trees_all_equal(loop.train(task, CONFIG, tmp_path), whole)
    printed = capsys.readouterr().out
    assert f"{newest} is damaged, now damaged-12" in printed
    assert f"resuming from {tmp_path / 'checkpoints' / '9'}" in printed
    assert task.batches == 3
    # What was trained again is kept.
    task = Line()
    chex.assert_trees_all_equal(loop.train(task, CONFIG, tmp_path), whole)
    assert task.batches == 0


def test_a_partial_checkpoint_is_named(tmp_path, capsys):
    loop.train(Line(), CONFIG, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / "12" / "run" / "metadata").unlink()
    unfinished = folder / "15.orbax-checkpoint-tmp"
    (folder / "9").rename(unfinished)
    loop.train(Line(), CONFIG, tmp_path)
    printed = capsys.readouterr().out
    assert "12 is damaged, now damaged-12" in printed
    assert f"{unfinished} is of a save that was interrupted, and deleted" in printed
    assert {path.name for path in folder.iterdir()} == {"9", "12", "damaged-12"}


def test_the_result_is_the_line(tmp_path):
    config = replace(CONFIG, steps=300, ema_decay=0.9, checkpoint_every=300)
    weight = loop.train(Line(), config, tmp_path)["weight"]
    np.testing.assert_allclose(weight, 2.0, atol=0.1)


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    loop.train(Line(), CONFIG, tmp_path)
    with pytest.raises(InputError, match=r"another run \(task\.slope 2\.0 there, 3\.0 here\)"):
        loop.train(Line(slope=3.0), CONFIG, tmp_path)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    task = Line()
    batch = task.batch

    def poisoned(rng, size):
        data = batch(rng, size)
        return {**data, "y": data["y"] * np.nan} if task.batches == 8 else data

    task.batch = poisoned
    with pytest.raises(InputError, match=r"step 8: the loss is nan; .*checkpoints/6 holds"):
        loop.train(task, CONFIG, tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"3", "6"}


def test_a_full_disk_is_told_before_a_checkpoint_is_begun(tmp_path, monkeypatch):
    loop.train(Line(), CONFIG, tmp_path)
    (tmp_path / "checkpoints" / "12").rename(tmp_path / "12")
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(InputError, match=r"checkpoints: 0\.00 GB are needed, 0\.00 GB are free"):
        loop.train(Line(), CONFIG, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["9"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps = 0: at least 1"),
        ({"warmup_steps": 12}, "fewer than the 12 steps"),
        ({"decay_steps": 11}, "decay_steps = 11: at least the 12 steps"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0: it must be positive"),
        ({"gradient_clip": -1.0}, "gradient_clip = -1.0: it must be positive"),
        ({"ema_decay": 1.0}, r"ema_decay = 1.0: it must lie in \[0, 1\)"),
    ],
)
def test_loop_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_a_run_of_one_step_is_planned():
    assert loop._optimizer(
        loop.LoopConfig(steps=1, batch_size=1, learning_rate=0.1, warmup_steps=0)
    )


TINY_VAE = """
loop: {steps: 2, batch_size: 2, learning_rate: 1.0e-3, warmup_steps: 1}
vae: {model: {block_channels: [4, 4, 4, 4], layers_per_block: 1, norm_groups: 2}}
"""
TINY_CLASSIFIER = """
loop: {steps: 2, batch_size: 2, learning_rate: 1.0e-3, warmup_steps: 1}
classifier: {model: {conv_channels: [2, 2, 2, 2], frame_features: 4, features: 4}}
"""
TINY_UNET = """
loop: {{steps: 2, batch_size: 2, learning_rate: 1.0e-3, warmup_steps: 1, sheet_every: {sheet}}}
text_to_video:
  vae: {folder}/vae/model
  start: {start}
  timestep_density: [0.0, 1.0]
  mean_below_snr: 0.1
  bank_videos: 8
  unet:
    block_channels: [8, 8]
    layers_per_block: 1
    attention_levels: [true, true]
    num_heads: [2, 2]
    temporal_heads: [2, 2]
    context_dim: 8
    norm_groups: 2
    down_eps: [1.0e-5, 1.0e-5]
    up_eps: [1.0e-5, 1.0e-5]
    temporal_op: {op}
    max_frames: 16
  text_encoder:
    {{vocab_size: 59, hidden_size: 8, intermediate_size: 8, num_layers: 1, num_heads: 2,
     max_length: 20}}
  scheduler: {{beta_start: 0.0001, beta_end: 0.02}}
  defaults: {{frames: {frames}, height: 64, width: 64, steps: 2}}
"""


def run(folder, name, text):
    (folder / f"{name}.yaml").write_text(text)
    assert train_command([str(folder / f"{name}.yaml"), "--out", str(folder / name)]) == 0
    return folder / name / "model"


@pytest.mark.slow
def test_a_trained_on_decoder_leaves_latents_as_they_are(tmp_path):
    first = run(tmp_path, "vae", TINY_VAE)
    text = TINY_VAE.replace("vae: {", f"vae: {{start: {first}, ")
    config, params = load_vae(run(tmp_path, "decoder", text))
    start_config, start = load_vae(first)
    assert config == start_config
    for name in ("encoder", "quant_conv"):
        chex.assert_trees_all_equal(params[name], start[name])
    changed = jax.tree.map(lambda a, b: (a != b).any(), params["decoder"], start["decoder"])
    assert all(jax.tree.leaves(changed))
    other = yaml.safe_load(text.replace("[4, 4, 4, 4]", "[4, 4, 4, 8]"))
    with pytest.raises(InputError, match="its VAE has another shape than the one to train"):
        make_task(from_dict(RunConfig, other, "other"))


@pytest.mark.slow
def test_every_task_trains_and_its_model_loads(tmp_path):
    model = run(tmp_path, "classifier", TINY_CLASSIFIER)
    config, params = classifier.load_classifier(model)
    videos = pixels.render(scenes_of("train")[:3], np.random.default_rng(0))
    assert classifier.video_features(config, params, videos).shape == (3, 4)

    vae, _ = load_vae(run(tmp_path, "vae", TINY_VAE))
    assert vae.scaling_factor != 0.18215

    image = run(
        tmp_path,
        "image",
        TINY_UNET.format(folder=tmp_path, start="null", op="null", frames=1, sheet=9),
    )
    video = run(
        tmp_path,
        "video",
        TINY_UNET.format(folder=tmp_path, start=image, op="motion_module", frames=16, sheet=2),
    )
    assert qvd_jax.load(video).defaults.frames == 16
    assert (tmp_path / "video" / "sheet-000002.png").is_file()

    text = TINY_UNET.format(folder=tmp_path, start=image, op="null", frames=1, sheet=9)
    bank = tmp_path / "vae" / "model" / "bank-8-0.npz"
    whole = bank.read_bytes()
    bank.write_bytes(whole[:-100])
    with pytest.raises(
        InputError, match=r"bank-8-0.npz is damaged: .*; without it it is made anew"
    ):
        make_task(from_dict(RunConfig, yaml.safe_load(text), "damaged"))
    bank.write_bytes(whole)
    deep = text.replace("[8, 8]", "[8, 8, 8]").replace("[2, 2]", "[2, 2, 2]")
    deep = deep.replace("[true, true]", "[true, true, true]").replace("-5]", "-5, 1.0e-5]")
    params = make_task(from_dict(RunConfig, yaml.safe_load(deep), "deep")).init(jax.random.key(1))
    trained = qvd_jax.load(image).params["unet"]
    chex.assert_trees_all_equal(params["unet"]["up_blocks_2"], trained["up_blocks_1"])
    chex.assert_trees_all_equal(params["unet"]["down_blocks_0"], trained["down_blocks_0"])
    shallow = text.replace(str(image), str(run(tmp_path, "deep", deep)))
    with pytest.raises(InputError, match=r"its UNet has 3 levels, the one to train has 2"):
        make_task(from_dict(RunConfig, yaml.safe_load(shallow), "shallow"))


@pytest.mark.parametrize("density", [None, (-0.4, 1.0), (3.0, 2.0)])
def test_timesteps_have_the_asked_for_density(density):
    count = 1000
    drawn = np.asarray(sample_timesteps(jax.random.key(0), count, 100_000, density)) / 100_000
    shares = np.arange(count + 1) / count
    with np.errstate(divide="ignore"):
        edges = shares if density is None else expit(norm.ppf(shares, *density))
    # Each of the equally likely parts holds one.
    assert (drawn >= edges[:-1] - 2e-5).all()
    assert (drawn <= edges[1:] + 2e-5).all()
    assert drawn.max() < 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_error_is_that_of_the_clean_latents_the_solvers_derive(prediction_type):
    rng = np.random.default_rng(0)
    clean, noise, predicted = rng.normal(size=(3, 4, 2, 3, 3, 2))
    alpha = np.array([0.999, 0.5, 0.01, 4e-5])
    share = alpha[:, None, None, None, None]
    noisy = np.sqrt(share) * clean + np.sqrt(1 - share) * noise
    if prediction_type == "epsilon":
        derived = (noisy - np.sqrt(1 - share) * predicted) / np.sqrt(share)
    else:
        derived = np.sqrt(share) * noisy - np.sqrt(1 - share) * predicted
    expected = np.square(derived - clean).mean((1, 2, 3, 4))
    error = clean_error(*map(jnp.float32, (predicted, clean, noise, alpha)), prediction_type)
    np.testing.assert_allclose(error, expected, rtol=1e-4)


def test_under_much_noise_the_target_is_the_mean_of_what_the_prompt_leaves_open():
    rng = np.random.default_rng(0)
    scenes = rng.integers(2, size=(40, 5))
    latents = rng.normal(size=(40, 2, 3, 3, 4)).astype(np.float16)
    groups, means = _group_means(scenes, latents)
    size, color, _, motion, background = scenes.T
    for i in range(40):
        alike = (size == size[i]) & (color == color[i])
        alike &= (motion == motion[i]) & (background == background[i])
        expected = latents[alike].astype(np.float64).mean(0)
        np.testing.assert_allclose(means[groups[i]], expected, rtol=1e-4, atol=1e-4)


def test_word_tokenizer_marks_unknown_words():
    tokenizer = make_tokenizer()
    ids = tokenizer("A RED hippo, up", padding="max_length", max_length=10)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|startoftext|>",
        "a",
        "red",
        "<|unknown|>",
        ",",
        "up",
        *["<|endoftext|>"] * 4,
    ]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("shapes_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = from_dict(RunConfig, read_yaml(path), str(path))
    assert path.read_text().startswith(f"# python -m qvd_jax.train configs/{path.name} --out ")
    if config.vae is not None:
        # What it starts from is a run of one's own.
        make_task(replace(config, vae=replace(config.vae, start=None)))
    elif config.classifier is not None:
        make_task(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop: [", "is no YAML"),
        (TINY_VAE + TINY_CLASSIFIER.split("\n", 2)[2], "exactly one of vae"),
        (TINY_VAE.replace("steps:", "step:"), "unknown key 'step'; did you mean 'steps'"),
        (
            TINY_UNET.format(folder="/nowhere", start="null", op="null", frames=1, sheet=9),
            "/nowhere/vae",
        ),
    ],
)
def test_bad_configs_end_with_one_message(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert train_command([str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
