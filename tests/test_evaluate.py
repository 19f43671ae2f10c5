"""`python -m qvd_jax.evaluate`: models side by side, from checkpoints to results."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import qvd_jax
from qvd_jax import evaluate
from qvd_jax.data.video_io import read_video, write_video
from qvd_jax.errors import InputError, NotFiniteError
from qvd_jax.evaluation import Cases, networks, page, pairs
from qvd_jax.evaluation.batches import Batches
from qvd_jax.evaluation.networks import Network
from qvd_jax.pipelines.loading import save
from qvd_jax.pipelines.observation import CalibrationConfig
from qvd_jax.pipelines.pipeline import VideoDefaults
from qvd_jax.pipelines.quantization import quantize
from qvd_jax.quant.policy import Quantization

SIZE = ["--frames", "11", "--height", "16", "--width", "16", "--steps", "2"]


@pytest.fixture(scope="module")
def models(tiny_checkpoint, tmp_path_factory):
    """A float checkpoint, and two quantized from it with one policy that is quick to solve."""
    folder = tmp_path_factory.mktemp("models")
    pipe = qvd_jax.load(tiny_checkpoint)
    size = {"frames": 11, "height": 16, "width": 16}
    config = CalibrationConfig(steps=2, rows=16)
    for width in ("w8a8", "w4a8"):
        quantized, reports = quantize(pipe, f"minmax-{width}", ["a"], config, size)
        save(quantized, folder / width, reports=reports)
    return tiny_checkpoint, folder / "w8a8", folder / "w4a8"


class Tags(HTMLParser):
    """Counts tags and checks that they close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "br", "img", "path", "use", "rect", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


class Means(nn.Module):
    """The mean color of a clip and its square, in I3D's place."""

    def __call__(self, clips):
        mean = 100 * clips.mean((1, 2, 3))
        return jnp.concatenate([mean, mean**2], -1)


@pytest.mark.slow
def test_models_side_by_side(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red circle\n<b>a blue square\nx\n")
    out = tmp_path / "out"
    options = ["--reference", str(models[0]), "--candidate", *map(str, models[1:]), *SIZE]
    options += ["--prompts-file", str(tmp_path / "prompts.txt"), "--seeds", "2"]
    (tmp_path / "real").mkdir()
    network = Network(Means(), {}, "mean colors", "0")
    monkeypatch.setattr(networks, "load_i3d", lambda folder: network)
    write_video(tmp_path / "real" / "0.mp4", np.zeros((11, 8, 8, 3), np.uint8), 8)
    write_video(tmp_path / "real" / "1.mp4", np.full((13, 8, 8, 3), 90, np.uint8), 8)
    options += ["--metrics", "fvd", "psnr", "ssim", "--real", str(tmp_path / "real"), "--floor"]
    options += ["--protocol", "cd-fvd", "--clip-frames", "11", "--features", str(tmp_path / "kept")]
    options += ["--vbench", str(tmp_path / "vbench")]
    assert evaluate.main([*options, "--out", str(out)]) == 0
    assert "minmax-w4a8" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    exact, eight, four = results["models"]
    assert exact["policy"] == "float"
    assert "psnr" not in exact
    assert eight["psnr"]["value"] > four["psnr"]["value"]
    assert eight["ssim"]["value"] > four["ssim"]["value"]
    assert len(eight["latent_sqnr"]) == 2
    assert 0 < eight["fvd_reference"]["value"] < four["fvd_reference"]["value"]
    for name in ("fvd_reference", "fvd"):
        assert eight[name]["protocol"] == "cd-fvd"
        assert eight[name]["clips"] == 6
    assert exact["fvd_floor_reference"]["reference_clips"] == 6
    assert "fvd_floor_real" not in exact
    names = ["a red circle-0.mp4", "a red circle-1.mp4", "<b>a blue square-0.mp4", "x-1.mp4"]
    for name in names:
        video = tmp_path / "vbench" / page.file_name(str(models[1])) / name
        assert read_video(video).shape == (11, 16, 16, 3)
    assert eight["latent_sqnr"][-1] > four["latent_sqnr"][-1]
    assert four["unet_bytes"] < eight["unet_bytes"] < exact["unet_bytes"]
    assert len(eight["layers"]) > 50

    text = (out / "report.html").read_text()
    assert {path.suffix for path in out.iterdir()} == {".json", ".md", ".html", ".png"}
    assert len(list(out.glob("*.png"))) == 3
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    # Differences, each model's own, and the layers of each candidate.
    assert tags.seen.count("table") == 2 + 2
    # Steps, layers, and three layers' ranges of each candidate.
    assert tags.seen.count("svg") == 2 + 2 * 3
    assert "src='http" not in text
    assert "&lt;b&gt;a blue" in text

    assert evaluate.main([*options, "--out", str(out)]) == 2
    assert "exists already; pass --overwrite" in capsys.readouterr().err


def test_a_model_that_fails_among_others_is_named():
    def pipe(*_args, **_options):
        raise NotFiniteError("step 1 of 2 gave latents that are not finite")

    with pytest.raises(InputError, match=r"^bad: step 1 of 2 gave"):
        pairs.sample({"bad": pipe}, Cases(["a"]), VideoDefaults(steps=2))


class Fake:
    """Stands for a pipeline; its videos depend on the seed."""

    def __init__(self, gain):
        self.gain, self.calls = gain, 0

    def __call__(self, inputs, *, seed, steps, callback_on_step_end, **_):
        self.calls += 1
        latents = np.random.default_rng(seed).normal(size=(len(inputs), 2, 3, 3, 1)) * self.gain
        for step in range(steps):
            callback_on_step_end(step + 1, latents * (step + 1))
        return latents

    def decode(self, latents):
        return (latents * 50).astype(np.uint8)


def test_an_interrupted_evaluation_goes_on_with_what_it_kept(tmp_path):
    cases, want = Cases([str(number) for number in range(20)]), VideoDefaults(steps=2)
    whole = pairs.sample({"a": Fake(1), "b": Fake(1.1)}, cases, want, (0, 1))
    kept = Batches(tmp_path)
    first = {"a": Fake(1), "b": Fake(1.1)}
    pairs.sample(first, cases, want, (0, 1), kept=kept)
    folder = tmp_path / "cases"
    assert sorted(path.name for path in folder.iterdir()) == [f"0000{i}.npz" for i in range(4)]
    (folder / "00002.npz").unlink()
    again = {"a": Fake(1), "b": Fake(1.1)}
    found = pairs.sample(again, cases, want, (0, 1), kept=kept)
    assert [pipe.calls for pipe in (*first.values(), *again.values())] == [4, 4, 1, 1]
    for name, one in found.items():
        np.testing.assert_array_equal(one.videos, whole[name].videos)
        np.testing.assert_array_equal(one.noise, whole[name].noise)
        np.testing.assert_array_equal(one.signal, whole[name].signal)
    assert found["b"].noise.shape == (40, 2)
    # Latents of "b" are 1.1 times those of "a", whose error is 0.
    np.testing.assert_allclose(found["b"].noise / found["b"].signal, 0.01)
    np.testing.assert_array_equal(found["a"].noise, 0)


def test_one_video_has_most_of_the_error_of_all_and_not_of_the_median():
    signal = np.full((6, 2), 100.0)
    noise = np.array([3 * [1], [1, 1, 901]]).reshape(-1, 1) * np.ones(2)
    found = pairs.latent_figures(signal, noise, 3)
    np.testing.assert_allclose(found["latent_sqnr"], 2 * [10 * np.log10(600 / 906)])
    assert found["latent_sqnr_median"] == pytest.approx(20)
    # Without one prompt's two videos.
    left_out = np.log([400 / 904, 400 / 904, 400 / 4])
    spread = 10 / np.log(10) * stats.t.ppf(0.975, 2) * np.sqrt(2 * left_out.var())
    low, high = found["latent_sqnr_interval"]
    assert high - low == pytest.approx(2 * spread)
    equal = pairs.latent_figures(signal, 0 * noise, 3)
    assert equal["latent_sqnr"] == [200, 200]
    assert equal["latent_sqnr_interval"] == [200, 200]


def test_an_evaluation_goes_on_only_with_the_same_settings(
    tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load", interrupt)
    folder = tmp_path / "made"
    folder.mkdir()
    tiny, *others = str(tiny_checkpoint), str(tmp_path / "w8"), str(tmp_path / "w4")
    for other in others:
        shutil.copytree(tiny_checkpoint, other)
    arguments = ["--reference", tiny, "--candidate", *others, *SIZE]
    arguments += ["--prompt", "a", "b", "--resume", "--out", str(folder / "out")]
    assert evaluate.main(arguments) == 130
    assert evaluate.main(arguments) == 130
    assert [path.name for path in folder.iterdir()] == ["out.sampled"]
    for changed, message in {
        ("--candidate", *reversed(others)): f'candidate 1 was ["{others[0]}", "',
        ("--reference", others[0], "--candidate", tiny, others[1]): f'the reference was ["{tiny}"',
        ("--candidate", others[0]): f'candidate 2 was ["{others[1]}", "',
        ("--steps", "3"): "out.sampled: this run is not the one that --resume is to go on with: "
        "steps was 2, is 3; remove the folder, or name another --out",
        ("--prompt", "a", "c"): 'input 2 was ["b"], is ["c"]',
    }.items():
        assert evaluate.main([*arguments, *changed]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "{tmp}/none"], "none does not exist; the folder of a checkpoint"),
        (["--reference", "{tiny}", "--candidate", "{tmp}/none"], "none does not exist; the folder"),
        (["--reference", "{tiny}", "--prompts-file", "{tmp}/one.txt"], "at least 2 prompts"),
        (["--reference", "{tiny}"], "there are no prompts"),
        (["--reference", "shapes", "--videos", "2"], "at least 3 prompts or images, there are 2"),
        (["--reference", "shapes", "--condition", "a.png@0"], "follows no --condition"),
        (
            [
                *("--reference", "{tiny}", "--candidate", "shapes"),
                *("--prompts-file", "{tmp}/two.txt", "--height", "8"),
            ],
            "ssim needs 11x11 pixels, ",
        ),
        (
            ["--reference", "{tiny}", "--prompts-file", "{tmp}/two.txt", "--frames", "2"],
            "flicker needs 3 frames, 2 of 2 videos have fewer",
        ),
        (
            ["--reference", "shapes", "--out", "{old}", "--vbench", "{old}/vb", "--overwrite"],
            "--out {old} and --vbench {old}/vb: name folders apart",
        ),
        (
            ["--reference", "shapes", "--out", "{tmp}/out", "--vbench", "{tmp}/out"],
            "--out {tmp}/out and --vbench {tmp}/out: name folders apart",
        ),
        (
            ["--reference", "shapes", "--out", "{old}", "--features", "{old}/kept", "--overwrite"],
            "--out {old} and --features {old}/kept: name folders apart",
        ),
        (
            ["--generated", "{old}/vb/a", "--out", "{old}", "--overwrite"],
            "--out {old} would replace {old}/vb/a; name another folder",
        ),
        (
            [*("--reference", "shapes", "--metrics", "fvd"), "--features", "{tmp}/one.txt"],
            "one.txt cannot be made: {tmp}/one.txt is a file; name another folder",
        ),
        (["--reference", "shapes", "--features", "{tmp}/kept"], "--features are of the metric fvd"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    tiny_checkpoint, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.delattr(evaluate, "load")
    (tmp_path / "one.txt").write_text("a\n")
    (tmp_path / "two.txt").write_text("a\nb\n")
    # Of an earlier run, with videos in it.
    old = tmp_path / "old"
    (old / "vb" / "a").mkdir(parents=True)
    for name in ("report.html", "vb/prompts.json"):
        (old / name).write_text("")
    places = {"tmp": tmp_path, "tiny": tiny_checkpoint, "old": old}
    given = [argument.format(**places) for argument in arguments]
    assert evaluate.main(["--out", str(tmp_path / "out"), *given]) == 2
    assert message.format(**places) in capsys.readouterr().err.splitlines()[-1]
    assert (old / "report.html").exists()
    assert not (tmp_path / "out").exists()


def test_all_models_walk_the_references_steps(tiny_checkpoint, monkeypatch):
    pipe = qvd_jax.load(tiny_checkpoint)
    other = pipe.with_scheduler("dpmsolver++", karras=True, timestep_spacing="trailing")
    other = replace(other, scheduler=replace(other.scheduler, beta_end=0.02))
    walked = []

    def sampled(models, *_, **__):
        walked.extend(model.scheduler for model in models.values())
        raise InterruptedError

    monkeypatch.setattr(pairs, "sample", sampled)
    want = VideoDefaults(steps=3, frames=3, height=16, width=16)
    with pytest.raises(InterruptedError):
        pairs.compare({"a": pipe, "b": other}, Cases(["a", "b"]), want)
    assert walked == [pipe.scheduler, replace(pipe.scheduler, beta_end=0.02)]


def test_scales_of_other_steps_are_refused_before_sampling(tiny_checkpoint):
    pipe = qvd_jax.load(tiny_checkpoint)
    aware = replace(pipe, quantization=Quantization("own", {}, (901.0, 401.0)))
    want = VideoDefaults(steps=3, frames=3, height=16, width=16)
    with pytest.raises(InputError, match="one for each of 2 other steps, of timesteps 901 to 401"):
        pairs.check_comparable({"a": pipe, "b": aware}, Cases(["a", "b"]), want)


def test_files_are_named_like_their_models():
    assert page.file_name("/runs/a/model") == "runs-a-model"
    assert page.file_name("../runs/b/model") == "runs-b-model"
    assert page.file_name("shapes") == "shapes"
