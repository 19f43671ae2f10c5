"""Sets of videos measured, from arrays and from folders, with a network in I3D's place."""

import dataclasses
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from qvd_jax import evaluate
from qvd_jax.data import video_io
from qvd_jax.errors import InputError
from qvd_jax.evaluation import distances, features, sets, videos
from qvd_jax.evaluation.networks import Network
from qvd_jax.metrics import frechet, fvd, paired, temporal
from qvd_jax.metrics.fvd import PROTOCOLS
from qvd_jax.metrics.lpips import LPIPSConfig


class Means(nn.Module):
    """Features of a clip: the mean colors of its quarters."""

    @nn.compact
    def __call__(self, clips):
        halves = clips.reshape(len(clips), clips.shape[1], 2, 112, 2, 112, 3)
        found = halves.mean((1, 3, 5)).reshape(len(clips), -1)
        return 100 * found * self.param("scale", nn.initializers.ones, ()).reshape(1, 1)


I3D = Network(Means(), {"scale": jnp.ones(())}, "mean colors", "0")
FVD = sets.Measures(("fvd",), PROTOCOLS["cd-fvd"], I3D)


def noise(seed, count=6, frames=10, height=16, width=20):
    """Videos that differ in color, and a little in everything."""
    rng = np.random.default_rng(seed)
    plain = rng.integers(40, 216, (count, 1, 1, 1, 3))
    return (plain + rng.integers(-40, 40, (count, frames, height, width, 3))).astype(np.uint8)


def short(protocol="cd-fvd", **changes):
    return dataclasses.replace(FVD, protocol=dataclasses.replace(PROTOCOLS[protocol], **changes))


def write_frames(folder, shown):
    for number, video in enumerate(shown):
        (folder / str(number)).mkdir(parents=True)
        for frame, pixels in enumerate(video):
            Image.fromarray(pixels).save(folder / str(number) / f"{frame}.png")


def means(shown, protocol):
    clips = np.stack([fvd.prepare(video, protocol.resize) for video in shown])
    return np.asarray(I3D.module.apply({"params": I3D.params}, clips))


def test_fvd_is_the_distance_of_the_features_of_all_clips(tmp_path):
    measures = short(frames=10)
    a, b, real = noise(0), noise(1), noise(2, 9, height=24, width=24)
    found = sets.compare_videos({"a": a, "b": b}, measures, real=real, other_seeds=noise(3))
    of = {name: means(v, measures.protocol) for name, v in (("a", a), ("b", b), ("real", real))}

    def distance(first, second):
        return pytest.approx(frechet.frechet_distance(first, second, 0), rel=1e-4)

    first, second = found.models
    assert first.fvd.value == distance(of["a"], of["real"])
    assert first.fvd_reference is None
    assert second.fvd.value == distance(of["b"], of["real"])
    assert second.fvd_reference.value == distance(of["b"], of["a"])
    assert found.fvd_floor_real.value == distance(of["real"][1::2], of["real"][::2])
    other = means(noise(3), measures.protocol)
    assert found.fvd_floor_reference.value == distance(other, of["a"])
    shown = dataclasses.asdict(second.fvd)
    for name, value in (
        ("clips", 6),
        ("reference_clips", 9),
        ("frames", 10),
        ("size", "16x20 against 24x24"),
        ("protocol", "cd-fvd"),
        ("weights", "mean colors"),
    ):
        assert shown[name] == value
    assert "6 clips give a covariance of 12 features no full rank" in second.fvd.warning


def test_folders_give_the_figures_of_their_arrays(tmp_path):
    measures = dataclasses.replace(short(frames=10), metrics=sets.METRICS[:3] + sets.ALONE)
    shown = {name: noise(seed) for seed, name in enumerate("ab")}
    for name, frames in shown.items():
        write_frames(tmp_path / name, frames)
    of_folders = sets.compare_videos({n: tmp_path / n for n in shown}, measures)
    of_arrays = sets.compare_videos(shown, measures)
    assert of_folders.models == of_arrays.models
    b = of_arrays.models[1]
    assert b.psnr.value == pytest.approx(paired.psnr(*shown.values()).mean())
    assert b.ssim.value == pytest.approx(paired.ssim(*shown.values()).mean())
    assert b.flicker.value == pytest.approx(temporal.flicker(shown["b"]).mean())
    assert b.motion.value == pytest.approx(temporal.motion(shown["b"]).mean())
    assert of_arrays.models[0].psnr is None


def test_features_are_kept_by_content_and_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    protocol = short(frames=10).protocol
    shown = videos.open_videos(noise(0), "a")
    read = []

    def counting(number):
        if number == 4 and len(read) < 9:
            read.append("stop")
            raise KeyboardInterrupt
        read.append(number)
        return shown.read(number)

    counted = dataclasses.replace(shown, read=counting)
    with pytest.raises(KeyboardInterrupt):
        features.video_features(I3D, counted, protocol, tmp_path)
    assert read == [0, 1, 2, 3, "stop"]
    read[:] = 9 * ["earlier"]
    # In another order, under another name.
    turned = videos.open_videos(noise(0)[::-1].copy(), "b")
    found = features.video_features(I3D, counted, protocol, tmp_path)
    assert read[9:] == [4, 5]
    again = features.video_features(
        I3D, dataclasses.replace(turned, read=lambda number: 1 / 0), protocol, tmp_path
    )
    np.testing.assert_array_equal(again.values, found.values[::-1])
    plain = features.video_features(I3D, shown, protocol)
    np.testing.assert_allclose(found.values, plain.values, rtol=1e-5)
    # Other weights, another way of resizing, other code: nothing is taken from what is kept.
    unread = dataclasses.replace(turned, read=lambda number: 1 / 0)
    resized = dataclasses.replace(protocol, resize="crop")
    for network, how in ((dataclasses.replace(I3D, digest="1"), protocol), (I3D, resized)):
        with pytest.raises(ZeroDivisionError):
            features.video_features(network, unread, how, tmp_path)
    code = {features.code_digest(*features._CODE), features.code_digest(*features._CODE[:-1])}
    assert len(code) == 2
    monkeypatch.setattr(features, "code_digest", lambda *_: "of other code")
    with pytest.raises(ZeroDivisionError):
        features.video_features(I3D, unread, protocol, tmp_path)


DEVICES = 3


def of_several_devices(file):
    """Of a process that sees several, whose number the clips are no multiple of."""
    assert jax.local_device_count() == DEVICES
    # Of these no mean is near zero, where rounding is all.
    shown = videos.open_videos(noise(2, count=14), "a")
    np.save(file, features.video_features(I3D, shown, short(frames=10).protocol).values)


def test_features_are_the_same_on_several_devices(tmp_path):
    file = tmp_path / "features.npy"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    program = "import sys, test_evaluation_sets as t; t.of_several_devices(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, file], env=environment, check=True, timeout=100)
    shown = videos.open_videos(noise(2, count=14), "a")
    own = features.video_features(I3D, shown, short(frames=10).protocol)
    np.testing.assert_allclose(np.load(file), own.values, rtol=1e-5)


def test_sliding_clips_are_all_taken_and_left_out_with_their_video():
    measures = short("disco", frames=10)
    found = sets.compare_videos({"a": noise(0, frames=14), "b": noise(1, frames=14)}, measures)
    assert found.models[1].fvd_reference.clips == 6 * 4
    assert "clips overlap" in found.models[1].fvd_reference.warning


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_interval_of_fvd_covers_the_truth(seeds):
    """Of features drawn from two Gaussians of a known distance, as often as it says."""
    rng = np.random.default_rng(0)
    width, prompts = 4, 60
    covered = 0
    for _ in range(40):
        sets_of = []
        for shift in (0, 1):
            own = rng.normal(size=(prompts, width))
            again = [own + 0.1 * rng.normal(size=own.shape) for _ in range(seeds)]
            sets_of.append(np.concatenate(again) / np.sqrt(1.01) + shift)
        a, b = (features.Features(values, np.arange(len(values)), 16) for values in sets_of)
        found = distances.distance(
            a, b, PROTOCOLS["common-metrics"], size="", weights="", prompts=[prompts, prompts]
        )
        covered += found.unbiased_interval[0] <= width <= found.unbiased_interval[1]
    assert covered >= 33


@pytest.mark.parametrize(
    ("sources", "measures", "real", "message"),
    [
        ({"a": noise(0)}, FVD, None, "FVD is a distance between sets: name real videos"),
        ({"a": noise(0)}, FVD, noise(1, frames=16), "a: the protocol cd-fvd needs 16 frames, 6 of"),
        ({"a": noise(0)}, short(frames=8), noise(1), "I3D needs 9 frames, 8 are asked for"),
        ({"a": noise(0, count=1)}, short(frames=10), noise(1), "a has 1 video; a distance of"),
        ({"a": noise(0)}, short("common-metrics"), noise(1, frames=12), "a 10, real videos 12"),
        ({"a": noise(0), "b": noise(0, count=5)}, sets.PIXELS, None, "1 of a and b have no other"),
        ({"a": noise(0), "b": noise(0, height=18)}, sets.PIXELS, None, r"\(10, 18, 20\) in b"),
        (
            {"a": noise(0, height=8), "b": noise(1, height=8)},
            sets.PIXELS,
            None,
            "ssim needs 11x11 pixels, a has 8 on a",
        ),
        (
            {"a": noise(0)},
            sets.PIXELS,
            None,
            "^psnr, ssim compare videos with those of a: name others beside them, or other metrics",
        ),
        (
            {"a": noise(0, count=0)},
            sets.pixels(1),
            None,
            r"^a: an array \[0, 10, 16, 20, 3\] holds",
        ),
        ({"a": noise(0), "b": noise(0, frames=0)}, sets.PIXELS, None, r"^b: an array \[6, 0, 16"),
        ({"a": noise(0, frames=2)}, sets.pixels(1), None, "flicker needs 3 frames, 6 of 6 videos"),
        (
            {"a": noise(0).astype(float)},
            FVD,
            None,
            "videos are uint8 .*, not float64",
        ),
        ({"a": noise(0)}, sets.PIXELS, noise(1), "real videos are for the metric fvd, which is"),
        ({"a": noise(0)}, sets.Measures(("fid",)), None, "unknown metrics fid; fvd, psnr"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    sources, measures, real, message, monkeypatch
):
    monkeypatch.delattr(sets, "_measure")
    with pytest.raises(InputError, match=message):
        sets.compare_videos(sources, measures, real=real)


def test_pairs_have_one_video_of_each_name(tmp_path):
    (shown,) = noise(0, 1)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for file in ("v.gif", "v.mp4", "w.mp4"):
            video_io.write_video(tmp_path / folder / file, shown, 8)
    sources = {name: tmp_path / name for name in ("a", "b")}
    with pytest.raises(InputError, match=r"compare videos of one name: 1 names in a are .*: 'v'; "):
        sets.compare_videos(sources, sets.PIXELS)
    alone = sets.compare_videos(sources, sets.Measures(("flicker",)))
    assert alone.models[0].flicker.videos == 3
    (tmp_path / "a" / "v.gif").unlink()
    with pytest.raises(InputError, match="1 names in b are"):
        sets.compare_videos(sources, sets.PIXELS)
    (tmp_path / "b" / "v.mp4").unlink()
    # One format against another: those of the same name, though suffixes sort otherwise.
    found = sets.compare_videos(sources, sets.Measures(("psnr",)))
    assert found.models[1].psnr.videos == 2


def test_metrics_and_networks_come_together():
    with pytest.raises(ValueError, match="the metric fvd and its network come together"):
        sets.Measures(("fvd",))
    with pytest.raises(ValueError, match="the metric fvd and its network come together"):
        sets.Measures(("psnr",), i3d=I3D)


def test_other_protocols_are_named():
    with pytest.raises(InputError, match="protocol = 'stylegan': it must be one of stylegan-v"):
        sets.Measures.load(["psnr"], "stylegan")


def test_whole_videos_of_several_lengths_have_no_protocol(tmp_path):
    for frames in (10, 12):
        video_io.write_video(tmp_path / f"{frames}.gif", noise(0, 1, frames)[0], 8)
    with pytest.raises(InputError, match="common-metrics takes whole videos, which have 10 to 12"):
        sets.compare_videos({"a": tmp_path}, short("common-metrics"), real=noise(0))


def test_videos_made_elsewhere_are_measured_by_the_command(tmp_path, capsys):
    for seed, name in enumerate(("float", "int8")):
        write_frames(tmp_path / name, noise(seed, count=3))
    (tmp_path / "float" / "list.txt").write_text("x")
    out = tmp_path / "out"
    folders = [str(tmp_path / name) for name in ("float", "int8")]
    alone = ["--generated", folders[0], "--out", str(out)]
    assert evaluate.main([*alone, "--metrics", "psnr", "motion"]) == 2
    assert "error: psnr compare videos with those of " in capsys.readouterr().err
    assert evaluate.main(["--generated", *folders, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "files that are no videos are left out: 1 .txt" in printed
    results = json.loads((out / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == folders
    exact, other = results["models"]
    assert set(exact) == {"name", "flicker", "motion"}
    assert other["psnr"]["videos"] == 3
    assert other["motion"]["interval"][0] < other["motion"]["value"]
    assert "3 videos made elsewhere" in (out / "results.md").read_text()
    assert (out / "report.html").read_text().count("<figure>") == 3
    assert evaluate.main([*alone, "--overwrite"]) == 0
    (only,) = json.loads((out / "results.json").read_text())["models"]
    assert only == exact


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generated", "a", "--seeds", "2"], "as they are, without --seeds"),
        (["--generated", "none"], "none does not exist; a folder of videos is expected"),
        (["--reference", "shapes", "--protocol", "disco"], "--protocol are of the metric fvd"),
        (["--generated", "a", "--metrics", "psnr", "--lpips", "vgg"], "of the metric lpips"),
        (["--reference", "shapes", "--i3d", "none", "--metrics", "fvd"], "none does not exist"),
    ],
)
def test_arguments_that_do_not_fit_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([*arguments, "--out", "out"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_one_of_reference_and_generated_is_needed(capsys):
    for arguments in ([], ["--reference", "shapes", "--generated", "a"]):
        with pytest.raises(SystemExit):
            evaluate.main([*arguments, "--out", "out"])
        assert "one of --reference and --generated is required" in capsys.readouterr().err


class Apart(nn.Module):
    """A mean difference in LPIPS' place."""

    config: LPIPSConfig = LPIPSConfig()

    @nn.compact
    def __call__(self, first, second):
        return jnp.abs(first - second).mean((1, 2, 3))


def test_lpips_is_the_mean_over_frames_of_pixels_from_minus_one():
    network = Network(Apart(), {}, "differences", "")
    a, b = noise(0, 2, 3, 32, 32), noise(1, 2, 3, 32, 32)
    found = sets.compare_videos({"a": a, "b": b}, sets.Measures(("lpips",), lpips=network))
    expected = np.abs(a.astype(float) - b).mean() / 127.5
    assert found.models[1].lpips.value == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="lpips needs 31x31 pixels, a has 16 on a side"):
        sets.compare_videos(
            {"a": noise(0), "b": noise(1)}, sets.Measures(("lpips",), lpips=network)
        )
