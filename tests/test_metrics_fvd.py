"""Protocols of FVD against their steps in PyTorch and Pillow."""

import importlib
import io
import math
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from pytorch_i3d import real_port
from scipy import linalg
from torch.nn import functional as F  # noqa: N812

from convert.__main__ import main as convert
from qvd_jax.evaluation import Measures, compare_videos
from qvd_jax.metrics import frechet, fvd
from qvd_jax.metrics.fvd import PROTOCOLS

SHAPES = {"smaller": (18, 40, 64), "larger": (18, 300, 244), "square": (16, 64, 64)}


def video(shape, seed=0, more=0):
    """Smooth, for FVD's figures to differ by the way of resizing and little else."""
    frames, height, width = SHAPES[shape]
    frames += more
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 5, 6, 7)))
    fine = F.interpolate(coarse, (frames, height, width), mode="trilinear")
    noise = rng.normal(0, 20, (frames, height, width, 3))
    return (fine[0].permute(1, 2, 3, 0).numpy() + noise).clip(0, 255).astype(np.uint8)


def squashed(clip):
    """StyleGAN-V within its TorchScript file, and cd-fvd's `preprocess_i3d`."""
    frames = torch.from_numpy(clip.copy()).float().permute(0, 3, 1, 2)
    frames = F.interpolate(frames, (224, 224), mode="bilinear", align_corners=False)
    return (2 * frames / 255 - 1).permute(0, 2, 3, 1).numpy()


def cropped(clip):
    """common_metrics' `preprocess_single`."""
    frames = torch.from_numpy(clip.copy()).float().permute(0, 3, 1, 2) / 255
    height, width = frames.shape[2:]
    scale = 224 / min(height, width)
    size = (224, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), 224)
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
    top, left = (frames.shape[2] - 224) // 2, (frames.shape[3] - 224) // 2
    frames = frames[:, :, top : top + 224, left : left + 224]
    return ((frames - 0.5) * 2).permute(0, 2, 3, 1).numpy()


def smoothed(clip):
    """DisCo's resizer: Pillow's bicubic, channel by channel, in floats."""

    def channel(values):
        image = Image.fromarray(values.astype(np.float32)).resize((224, 224), Image.BICUBIC)
        return np.asarray(image)

    frames = [np.stack([channel(frame[..., c]) for c in range(3)], -1) for frame in clip]
    return np.stack(frames) / 127.5 - 1


STEPS = {"stylegan-v": squashed, "cd-fvd": squashed, "common-metrics": cropped, "disco": smoothed}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_clips_are_resized_as_the_implementation_does(name, shape):
    clip = video(shape)[:3]
    found = fvd.prepare(clip, PROTOCOLS[name].resize)
    assert isinstance(found, np.ndarray), "an array of JAX is of a program for each size"
    assert found.dtype == np.float32
    # Less than a hundredth of a level of 256.
    np.testing.assert_allclose(found, STEPS[name](clip), atol=5e-5)


def test_random_clips_are_the_same_for_the_same_content():
    long = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
    starts = set()
    for content in range(60):
        (clip,) = fvd.clips_of(long, PROTOCOLS["cd-fvd"], bytes([content]))
        (again,) = fvd.clips_of(long, PROTOCOLS["stylegan-v"], bytes([content]))
        np.testing.assert_array_equal(clip, again)
        np.testing.assert_array_equal(np.diff(clip[:, 0, 0, 0]), 1)
        assert len(clip) == 16
        starts.add(int(clip[0, 0, 0, 0]))
    assert len(starts) > 15
    assert max(starts) <= 24


@pytest.mark.parametrize(("frames", "count"), [(16, 1), (17, 1), (20, 4)])
def test_disco_takes_every_place_but_the_last(frames, count):
    gray = np.arange(frames, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
    gray = gray.repeat(4, 1).repeat(4, 2)
    clips = fvd.clips_of(gray, PROTOCOLS["disco"])
    assert [int(clip[0, 0, 0, 0]) for clip in clips] == [*range(count)]
    assert {len(clip) for clip in clips} == {16}
    assert fvd.clip_count(frames, PROTOCOLS["disco"]) == count


def saved_as_gif(clip):
    """What a file shows that Pillow has written."""
    file = io.BytesIO()
    first, *others = map(Image.fromarray, clip)
    first.save(file, "GIF", save_all=True, append_images=others)
    shown = ImageSequence.Iterator(Image.open(file))
    return np.stack([np.asarray(frame.convert("RGB")) for frame in shown])


def test_disco_leaves_the_colors_that_a_gif_has():
    noise = np.random.default_rng(0).integers(0, 256, (16, 40, 40, 3)).astype(np.uint8)
    (clip,) = fvd.clips_of(noise, PROTOCOLS["disco"])
    assert 240 < len(np.unique(clip[0].reshape(-1, 3), axis=0)) <= 256
    np.testing.assert_array_equal(clip, saved_as_gif(noise))


def features(clip):
    """In the place of a network: means over places, and their squares."""
    pooled = torch.from_numpy(np.array(clip, np.float32)).permute(3, 0, 1, 2)
    pooled = F.adaptive_avg_pool3d(pooled, (2, 3, 3)).flatten()
    return torch.cat([pooled, pooled.square()]).numpy()


WINDOWS = ((0, 16), (1, 17), (2, 18))
"""Of a video of 19 frames: `for i in range(len(frames) - 16)`, which leaves the last one out."""


@pytest.mark.parametrize("name", PROTOCOLS)
def test_fvd_is_that_of_the_steps_of_the_implementation(name):
    """On the same arrays, frames and network."""
    protocol = PROTOCOLS[name]
    slides = name == "disco"
    numbers = (range(3), range(3, 7)) if slides else (range(8), range(8, 18))
    sets = [[video("square", seed, more=3 * slides) for seed in seeds] for seeds in numbers]
    ours, theirs = [], []
    for videos in sets:
        clips = [clip for one in videos for clip in fvd.clips_of(one, protocol)]
        ours.append(np.stack([features(fvd.prepare(clip, protocol.resize)) for clip in clips]))
        if slides:
            # A GIF of the 16 frames from each of the first three.
            windows = [one[first:end] for one in videos for first, end in WINDOWS]
            videos = [saved_as_gif(window) for window in windows]
        theirs.append(np.stack([features(STEPS[name](one)) for one in videos]))
    if name in ("stylegan-v", "cd-fvd"):
        # `FeatureStats.get_mean_cov`.
        means = [x.astype(np.float64).sum(0) / len(x) for x in theirs]
        covariances = [
            x.astype(np.float64).T @ x / len(x) - np.outer(m, m)
            for x, m in zip(theirs, means, strict=True)
        ]
    else:
        means = [x.mean(0) for x in theirs]
        covariances = [np.cov(x, rowvar=False) for x in theirs]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    expected = np.square(means[0] - means[1]).sum() + np.trace(sum(covariances) - 2 * root.real)
    found = frechet.frechet_distance(*ours, protocol.degrees_lost)
    assert found == pytest.approx(expected, rel=0.005)


@pytest.fixture
def cd_fvd(monkeypatch):
    """The package's module; what it reads files and runs VideoMAE with stands aside."""
    if importlib.util.find_spec("cdfvd") is None:
        pytest.skip("cd-fvd is not installed: pip install --no-deps cd-fvd")
    aside = ("einops", "requests", "torchvision", "torchvision.datasets.video_utils")
    for name in aside:
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    return importlib.import_module("cdfvd.fvd")


@pytest.mark.slow
def test_fvd_of_cd_fvd_is_that_of_its_package(cd_fvd, tmp_path):
    """By its own code from arrays to the number, from the same file of weights."""
    file = tmp_path / "i3d_pretrained_400.pt"
    torch.save(real_port(eps=1e-5).state_dict(), file)
    real, fake = (
        np.stack([video("square", seed) for seed in seeds]) for seeds in (range(6), range(6, 14))
    )
    theirs = cd_fvd.cdfvd("i3d", ckpt_path=str(file), device="cpu")
    with warnings.catch_warnings():
        # Of newer scipy, whose `sqrtm` is to lose an argument.
        warnings.simplefilter("ignore", DeprecationWarning)
        expected = theirs.compute_fvd(real, fake)
    assert convert([str(file), "--out", str(tmp_path / "i3d")]) == 0
    measures = Measures.load(["fvd"], "cd-fvd", i3d=tmp_path / "i3d", cache=tmp_path / "features")
    found = compare_videos({"fake": fake}, measures, real=real).models[0].fvd
    assert (found.clips, found.reference_clips, found.protocol) == (8, 6, "cd-fvd")
    assert found.value == pytest.approx(expected, rel=0.005)
