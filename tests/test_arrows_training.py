"""The task that trains an image-to-video model, at toy size."""

from dataclasses import replace
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import yaml
from scipy.stats import norm

import qvd_jax
from qvd_jax import checkpoint
from qvd_jax.arrows.image_to_video_task import sample_noise_levels
from qvd_jax.arrows.judge import COUNTED
from qvd_jax.config import from_dict, read_yaml
from qvd_jax.diffusion.solvers import make_schedule
from qvd_jax.errors import InputError
from qvd_jax.evaluate import main as evaluate_command
from qvd_jax.shapes.vae_task import load_vae
from qvd_jax.train import RunConfig, make_task
from qvd_jax.train import main as train_command

CONFIGS = Path(__file__).parent.parent / "configs"

VAE = """
loop: {steps: 2, batch_size: 1, learning_rate: 1.0e-3, warmup_steps: 1}
vae:
  scenes: arrows
  frames: 2
  model: {block_channels: [4, 4], layers_per_block: 1, norm_groups: 2, latent_channels: 2,
          temporal_decoder: true}
"""
VIDEO = """
loop: {{steps: 2, batch_size: 2, learning_rate: 1.0e-3, warmup_steps: 1, sheet_every: {sheet}}}
image_to_video:
  vae: {vae}
  start: {start}
  bank_videos: 8
  unet:
    in_channels: 4
    out_channels: 2
    block_channels: [8, 8]
    layers_per_block: 1
    attention_levels: [true, false]
    num_heads: [2, 2]
    temporal_heads: [2, 2]
    context_dim: 8
    norm_groups: 2
    down_eps: [1.0e-6, 1.0e-6]
    up_eps: [1.0e-6, 1.0e-6]
    temporal_op: spatio_temporal
    max_frames: null
    added_ids: 3
  image_encoder:
    {{image_size: 32, patch_size: 16, hidden_size: 8, intermediate_size: 8, num_layers: 1,
     num_heads: 2, projection_size: 8}}
  scheduler:
    {{solver: euler, prediction_type: v_prediction, use_karras_sigmas: true, sigma_min: 0.02,
     sigma_max: 80.0, timestep_type: continuous}}
  defaults: {{frames: 4, height: 64, width: 64, steps: 2, guidance_scale: 2.0, fps: 7}}
"""


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with an untrained VAE."""
    folder = tmp_path_factory.mktemp("vae") / "model"
    config = replace(parse(VAE).vae.model, scaling_factor=0.5)
    params = random_params(make_task(parse(VAE)))
    checkpoint.save_component(folder, "vae", config, params, "untrained")
    return folder


def parse(text):
    return from_dict(RunConfig, yaml.safe_load(text), "run.yaml")


def random_params(task):
    """Small random numbers in the place of parameters, whose initialization compiles long."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(task.init, jax.random.key(0)),
    )


def video_task(vae, **change):
    config = parse(VIDEO.format(vae=vae, start="null", sheet=9))
    return make_task(replace(config, image_to_video=replace(config.image_to_video, **change)))


class Stub:
    """In the UNet's place: keeps what it is given, and predicts what it was told to."""

    def __init__(self, prediction):
        self.prediction, self.given = prediction, ()

    def apply(self, variables, *inputs):
        self.given = inputs
        return self.prediction


def test_training_shows_what_the_pipeline_shows_and_asks_for_what_the_solver_makes_clean(vae):
    """Of scalings, timesteps, ids, image and embedding; some images are left out in both places."""
    task = video_task(vae, image_dropout=0.5, image_noise=(-20.0, 0.0), noise_level=(0.0, 1.5))
    params = random_params(task)
    pipe = task.pipeline(params)
    batch = task.batch(np.random.default_rng(0), 6)

    @jax.jit
    def loss(prediction):
        stub = task._modules["unet"] = Stub(prediction)
        return task.loss(params, batch, jax.random.key(3)), stub.given

    task._modules = dict(task._modules)
    clean = batch["latents"].astype(np.float32)
    _, (latents, timesteps, context, ids) = jax.tree.map(np.asarray, loss(clean))
    noisy, image = np.split(latents, 2, axis=-1)
    prediction = np.empty_like(clean)
    for i, timestep in enumerate(timesteps):
        sigma = float(np.exp(4 * timestep))
        level = replace(task.config.scheduler, sigma_min=sigma, sigma_max=sigma)
        row = make_schedule(level, 1).table
        np.testing.assert_allclose(row.timestep, timestep, rtol=1e-5, atol=1e-6)
        prediction[i] = (clean[i] - row.x0_x / row.model_in * noisy[i]) / row.x0_p
    assert float(loss(prediction)[0]) < 1e-5
    assert len(np.unique(timesteps)) == 6

    kept = np.array([x.any() for x in image])
    np.testing.assert_array_equal(kept, [x.any() for x in context])
    assert 0 < kept.sum() < 6
    want = replace(task.config.defaults, guidance_scale=1.0, noise_aug_strength=0.0)
    shown = pipe.conditions([*batch["images"]], want, seed=0)
    np.testing.assert_allclose(image[kept, :1], shown.image[kept], atol=1e-4)
    np.testing.assert_allclose(context[kept], shown.context[kept], atol=1e-5)
    np.testing.assert_allclose(ids[:, 0], shown.added_ids[0, 0])
    np.testing.assert_array_equal(ids[:, 1], batch["buckets"])
    np.testing.assert_allclose(ids[:, 2], np.exp(-20), rtol=1e-3)
    # The image begins the video: its latents are the first frame's.
    scaled = image[kept, 0] * pipe.vae.config.scaling_factor
    np.testing.assert_allclose(batch["latents"][kept, 0], scaled, atol=2e-2)


def test_noise_levels_are_one_in_each_equally_likely_part():
    drawn = np.asarray(sample_noise_levels(jax.random.key(0), 500, 0.7, 1.6), np.float64)
    with np.errstate(divide="ignore"):
        edges = np.exp(norm.ppf(np.arange(501) / 500, 0.7, 1.6))
    assert (drawn >= edges[:-1] * 0.999).all()
    assert (drawn <= edges[1:] * 1.001).all()
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("timestep_type: continuous", "timestep_type: discrete", "'continuous' are needed"),
        ("context_dim: 8", "context_dim: 4", "image_encoder.projection_size = 8 is needed"),
        ("added_ids: 3", "added_ids: 2", "added_ids = 2: 3 are needed"),
        ("in_channels: 4", "in_channels: 5", r"in_channels = 5: 4 are needed, twice the"),
        ("height: 64", "height: 32", "defaults: 32x64; scenes are square"),
    ],
)
def test_configs_that_do_not_fit_are_refused(vae, old, new, message):
    text = VIDEO.format(vae=vae, start="null", sheet=9)
    assert old in text
    with pytest.raises(InputError, match=message):
        make_task(parse(text.replace(old, new)))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("arrows_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = from_dict(RunConfig, read_yaml(path), str(path))
    assert path.read_text().startswith(f"# python -m qvd_jax.train configs/{path.name} --out ")
    if config.vae is not None:
        make_task(config)


@pytest.mark.slow
def test_a_model_is_trained_goes_on_and_is_judged(tmp_path):
    def run(name, text):
        (tmp_path / f"{name}.yaml").write_text(text)
        assert train_command([str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / name)]) == 0
        return tmp_path / name / "model"

    encoder = run("vae", VAE)
    assert load_vae(encoder)[0].temporal_decoder
    first = run("first", VIDEO.format(vae=encoder, start="null", sheet=2))
    assert (tmp_path / "first" / "sheet-000002.png").is_file()
    text = VIDEO.format(vae=encoder, start=first, sheet=9)
    params = make_task(parse(text)).init(jax.random.key(5))
    for name, tree in params.items():
        chex.assert_trees_all_equal(tree, qvd_jax.load(first).params[name])

    judged = ["--reference", str(first), "--scenes", "arrows", "--videos", "2"]
    assert evaluate_command([*judged, "--out", str(tmp_path / "results")]) == 0
    results = yaml.safe_load((tmp_path / "results" / "results.json").read_text())
    assert set(results["models"][0]["accuracy"]) == set(COUNTED)
