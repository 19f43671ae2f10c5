"""`python -m qvd_jax.evaluate`: models side by side, from checkpoints to a page."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import imageio.v3 as imageio
import numpy as np
import pytest

import qvd_jax
from qvd_jax import checkpoint, evaluate, report
from qvd_jax.cli import Inputs
from qvd_jax.data import moving_shapes
from qvd_jax.errors import InputError, NotFiniteError
from qvd_jax.metrics import frechet
from qvd_jax.pipelines.loading import save
from qvd_jax.pipelines.observation import CalibrationConfig
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
        if tag not in ("meta", "br", "img", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


@pytest.mark.slow
def test_models_side_by_side(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a red circle\n<b>a blue square\nx\n")
    out = tmp_path / "out"
    options = ["--reference", str(models[0]), "--candidate", *map(str, models[1:]), *SIZE]
    options += ["--prompts-file", str(tmp_path / "prompts.txt"), "--seeds", "2"]
    assert evaluate.main([*options, "--out", str(out)]) == 0
    assert "minmax-w4a8" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    exact, eight, four = results["models"]
    assert exact["policy"] == "float"
    assert "psnr" not in exact
    assert eight["psnr"] > four["psnr"]
    assert eight["ssim"] > four["ssim"]
    assert len(eight["latent_sqnr"]) == 2
    assert eight["latent_sqnr"][-1] > four["latent_sqnr"][-1]
    assert four["unet_bytes"] < eight["unet_bytes"] < exact["unet_bytes"]
    assert len(eight["layers"]) > 50

    page = (out / "report.html").read_text()
    assert {path.suffix for path in out.iterdir()} == {".json", ".md", ".html", ".png"}
    assert len(list(out.glob("*.png"))) == 3
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert tags.seen.count("table") == 3
    # Steps, layers, and three layers' ranges of each candidate.
    assert tags.seen.count("svg") == 2 + 2 * 3
    assert "src='http" not in page
    assert "&lt;b&gt;a blue" in page

    assert evaluate.main([*options, "--out", str(out)]) == 2
    assert "exists already; pass --overwrite" in capsys.readouterr().err


def test_held_out_cases_ask_for_what_their_scenes_are():
    cases = evaluate.held_out_cases(600, seed=1)
    assert len(set(map(tuple, cases.shapes.scenes[:499].tolist()))) == 499
    train = set(map(tuple, moving_shapes.scenes("train").tolist()))
    for text, scene in zip(cases.inputs.values, cases.shapes.scenes, strict=True):
        assert tuple(scene.tolist()) not in train
        wanted = moving_shapes.describe_scene(scene)
        assert all(word in text for word in (wanted.color, wanted.shape, wanted.background))


def test_shapes_are_counted_against_what_was_asked_for():
    """Rendered videos stand for a reference; for the candidate every other one is of another."""
    asked, other = np.split(moving_shapes.scenes("held_out")[:48], 2)
    scenes = np.where(np.arange(24)[:, None] % 2, other, asked)
    sampled = {
        name: evaluate.Sampled(
            moving_shapes.render(of, np.random.default_rng(seed)), np.zeros(1), np.ones(1), None
        )
        for seed, (name, of) in enumerate((("right", asked), ("half", scenes)))
    }
    entries = [{}, {}]
    classifier = frechet.load_classifier(checkpoint.ASSETS / "classifier")
    evaluate._measure_shapes(entries, sampled, evaluate.Shapes(asked, classifier), 0)
    right, half = entries
    assert right["accuracy"]["all four"]["hits"] == 24
    assert half["accuracy"]["all four"]["hits"] == 12
    assert half["accuracy_change"]["value"] == -0.5
    low, high = half["frechet_ratio"]["interval"]
    assert low < half["frechet_ratio"]["value"] < high
    assert right["frechet"] > 0
    assert right["frechet_real"] == half["frechet_real"] > 0


def test_markdown_names_what_each_model_has():
    entry = {
        "name": "a",
        "policy": "float",
        "unet_bytes": 2_000_000,
        "seconds_per_video": None,
        "flicker": 1.0,
        "layers": [],
    }
    accuracy = {"color": {"value": 0.975, "interval": [0.95, 0.99]}}
    results = {
        "prompts": 4,
        "seeds": 2,
        "steps": 25,
        "scheduler": "ddim",
        "guidance_scale": 3.0,
        "backend": "cpu",
        "versions": {"jax": "0.10"},
        "models": [{**entry, "accuracy": accuracy}, {**entry, "name": "b", "psnr": 31.26}],
    }
    lines = report.summary(results).splitlines()
    assert lines[0] == "4 prompts, 2 videos each, 25 steps of ddim, guidance 3, cpu; jax 0.10"
    assert lines[2].split(" | ")[-1] == "PSNR dB |"
    assert "97.5% (95.0% to 99.0%)" in lines[4]
    assert "31.3" in lines[5]


def test_a_page_shows_figures_above_intervals_and_large_videos_smaller():
    table = report._table([{"model": "<a>", "shape": "87.5% (52.9% to 97.8%)"}, {"model": "b"}])
    assert "<td>&lt;a&gt;</td>" in table
    assert "<td data-value='87.5'>87.5% <small>(52.9% to 97.8%)</small></td>" in table
    assert "<tr><td>b</td><td></td></tr>" in table
    videos = np.random.default_rng(0).integers(256, size=(4, 2, 16, 1024, 3), dtype=np.uint8)
    figure = report._figure("a", videos)
    data = base64.b64decode(re.search(r"base64,([^']*)", figure)[1])
    assert imageio.imread(data, extension=".gif").shape == (2, 16, 1024, 3)


def test_a_model_that_fails_among_others_is_named():
    def pipe(*_args, **_options):
        raise NotFiniteError("step 1 of 2 gave latents that are not finite")

    cases = evaluate.Cases(Inputs(["a"], ["a"]), None)
    with pytest.raises(InputError, match=r"^bad: step 1 of 2 gave"):
        evaluate.sample({"bad": pipe}, cases, {"steps": 2}, 1.0, [0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "{tmp}/none"], "none does not exist; the folder of a checkpoint"),
        (["--reference", "{tiny}", "--candidate", "{tmp}/none"], "none does not exist; the folder"),
        (["--reference", "{tiny}", "--prompts-file", "{tmp}/one.txt"], "at least 2 prompts"),
        (["--reference", "{tiny}"], "there are no prompts"),
        (["--reference", "shapes", "--videos", "2"], "at least 3 prompts or images, there are 2"),
        (["--reference", "shapes", "--condition", "a.png@0"], "has no SparseCtrl"),
        (
            ["--reference", "{tiny}", "--prompts-file", "{tmp}/two.txt", "--height", "8"],
            "comparing videos needs at least 3 of 11x11",
        ),
        (
            ["--reference", "{tiny}", "--prompts-file", "{tmp}/two.txt", "--frames", "2"],
            "2 frames of ",
        ),
    ],
)
def test_bad_input(tiny_checkpoint, tmp_path, capsys, arguments, message):
    (tmp_path / "one.txt").write_text("a\n")
    (tmp_path / "two.txt").write_text("a\nb\n")
    given = [a.format(tmp=tmp_path, tiny=tiny_checkpoint) for a in arguments]
    assert evaluate.main([*given, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_scales_of_other_steps_are_refused_before_sampling(tiny_checkpoint):
    pipe = qvd_jax.load(tiny_checkpoint)
    aware = replace(pipe, quantization=Quantization("own", {}, (901.0, 401.0)))
    size = {"steps": 3, "frames": 3, "height": 16, "width": 16}
    with pytest.raises(InputError, match="one for each of 2 other steps, of timesteps 901 to 401"):
        evaluate.check_comparable({"a": pipe, "b": aware}, size, None)


def test_files_are_named_like_their_models():
    assert evaluate._file_name("/runs/a/model") == "runs-a-model"
    assert evaluate._file_name("../runs/b/model") == "runs-b-model"
    assert evaluate._file_name("shapes") == "shapes"
