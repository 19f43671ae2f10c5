"""The table and the page of an evaluation, from figures that were not measured."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from qvd_jax.evaluation import page, plots, tables
from qvd_jax.quant.solve import LayerReport

OWN = {"policy": "float", "unet_bytes": 2_000_000, "seconds_per_video": None}
OWN["flicker"] = {"value": 1.0, "interval": [0.5, 1.5], "videos": 8}
ACCURACY = {"color": {"value": 0.975, "interval": [0.95, 0.99]}}
RESULTS = {
    "command": "python -m qvd_jax.evaluate --out a",
    "prompts": 4,
    "inputs": "images",
    "seeds": 2,
    "frames": 16,
    "height": 320,
    "width": 576,
    "steps": 25,
    "scheduler": "ddim",
    "guidance_scale": 3.0,
    "backend": "cpu",
    "versions": {"jax": "0.10"},
    "notes": ["real videos: 1 file is no video"],
    "models": [
        {"name": "<a>", **OWN, "accuracy": ACCURACY},
        {
            "name": "b",
            **OWN,
            "psnr": {"value": 31.26, "interval": None},
            "latent_sqnr": [30.0, 17.04],
            "latent_sqnr_interval": [16.0, 18.0],
            "latent_sqnr_median": 21.46,
        },
    ],
}


@pytest.fixture(scope="module")
def text():
    """A page of two models of which one gets darker as the other gets lighter."""
    brightness = np.uint8([0, 80, 160])[None, :, None, None, None]
    darker = np.broadcast_to(brightness, (2, 3, 16, 1024, 3))
    reports = [LayerReport(f"layer {sqnr}", "minmax", sqnr) for sqnr in (30.0, 10.0, 20.0)]
    videos = {"<a>": darker, "b": 255 - darker}
    return page.comparison_page(RESULTS, {"<a>": [], "b": reports}, videos, ["<p>", "q"])


def test_markdown_names_what_each_model_has():
    lines = tables.summary(RESULTS).splitlines()
    assert lines[0] == (
        "4 images, 2 videos each, 16 frames of 320x576, 25 steps of ddim, guidance 3, cpu; jax 0.10"
    )
    assert lines[2:5:2] == ["In brackets: intervals of 95%", "real videos: 1 file is no video"]
    assert lines[6].startswith(
        "| model | policy | PSNR dB | last latents SQNR dB | median latents SQNR dB | UNet MB |"
    )
    assert "97.5% (95.0% to 99.0%)" in lines[8]
    assert "| 31.3 | 17.0 (16.0 to 18.0) | 21.5 |" in lines[9]


def test_the_differences_come_first_and_figures_stand_above_intervals(text):
    assert text.index("PSNR dB") < text.index("<figure>") < text.index("UNet MB")
    assert "<td data-value='97.5'>97.5% <small>(95.0% to 99.0%)</small></td><td></td>" in text
    assert "<h2>Differences from &lt;a&gt;</h2>" in text
    assert "<p>" not in re.findall("<figcaption>(.*?)</figcaption>", text)[0]


def test_every_metric_says_of_how_many_it_is(text):
    """But those that are of no videos."""
    for metric in (*tables.DIFFERENCES, *tables.OWN):
        said = metric.meaning.format(videos="N videos", prompts="N prompts", inputs="given")
        assert ("N " in said) == (metric.title not in ("UNet MB", "s per video")), metric.title
    assert "A mean over 8 videos" in text


def test_points_that_another_beats_are_not_on_the_front():
    costs, values = [1.0, 2.0, 2.0, 3.0, 0.5, 4.0], [10.0, 20.0, 15.0, 20.0, 5.0, 30.0]
    assert plots.pareto(costs, values) == [True, True, False, False, True, True]


def test_what_quality_costs_is_drawn_of_several_models():
    models = [
        RESULTS["models"][0],
        {**RESULTS["models"][1], "name": "small", "unet_bytes": 1e6, "seconds_per_video": 2.0},
        {**RESULTS["models"][1], "name": "large", "unet_bytes": 3e6, "latent_sqnr": [9.0]},
    ]
    drawn = page.comparison_page({**RESULTS, "models": models}, {}, {}, [])
    assert drawn.count("What quality costs") == 1
    text = drawn[drawn.index("What quality costs") :]
    # Names are written in both panels where a model has both costs.
    assert text.count("<!-- small -->") == 2
    assert text.count("<!-- large -->") == 1
    one = page.comparison_page(RESULTS, {}, {}, [])
    assert "What quality costs" not in one


def test_distances_stand_beside_all_that_they_depend_on():
    fvd = {"value": 12.34, "interval": [10.0, 14.0], "unbiased": 8.0, "unbiased_interval": None}
    fvd |= {"clips": 8, "reference_clips": 9, "frames": 16, "size": "64x64", "protocol": "disco"}
    fvd |= {"weights": "a file", "warning": "clips overlap"}
    exact, other = RESULTS["models"]
    paired = fvd | {"reference_clips": 8}
    models = [exact | {"fvd": fvd, "fvd_floor_real": fvd}]
    models += [other | {"fvd": fvd, "fvd_reference": paired}]
    text = tables.summary(RESULTS | {"models": models})
    shared = "16 frames, videos of 64x64, weights of a file"
    assert text.splitlines()[2:7:2] == [
        f"FVD to the reference's by the protocol disco: 8 clips against 8, {shared}",
        f"FVD by the protocol disco: 8 clips against 9, {shared}",
        "clips overlap",
    ]
    assert text.count("12.3 (10.0 to 14.0)") == 4
    assert "| 8.0 |" in text


def test_no_two_metrics_have_one_title():
    titles = [metric.title for metric in (*tables.DIFFERENCES, *tables.OWN)]
    assert len(titles) == len({*titles})


def test_the_worst_layers_come_first(text):
    assert re.findall(r"layer (\d+)", text[text.index("<details") :]) == ["10", "20", "30"]


def test_videos_of_one_case_run_in_one_clip_in_step(text):
    clips = re.findall("data:image/webp;base64,([^']*)", text)
    assert len(clips) == 2
    with Image.open(io.BytesIO(base64.b64decode(clips[0]))) as clip:
        assert clip.n_frames == 3
        # Two of 1024 pixels, each a quarter as large, and a line.
        assert clip.size == (514, 4)
        for number, brightness in enumerate((0, 80, 160)):
            clip.seek(number)
            pixels = np.asarray(clip.convert("RGB")).astype(int)
            np.testing.assert_allclose(pixels[:, 8:248], brightness, atol=4)
            np.testing.assert_allclose(pixels[:, 266:506], 255 - brightness, atol=4)
