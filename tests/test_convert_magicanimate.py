"""MagicAnimate against an oracle of diffusers' parts, put together as its paper has them."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    UNet2DConditionModel,
)
from parity import relative_error
from PIL import Image
from random_families import MagicAnimate, appearance_weights, make_magicanimate

import qvd_jax
from convert import names
from convert.__main__ import main as convert
from qvd_jax import calibrate, sample
from qvd_jax.data.video_io import write_video
from qvd_jax.models.appearance import AppearanceEncoder
from qvd_jax.models.configs import MAGIC_ANIMATE
from qvd_jax.models.controlnet import ControlNet
from qvd_jax.models.vae import VAEConfig
from qvd_jax.pipelines.components import ComponentConfigs

WINDOW = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, MagicAnimate]:
    """The folder of everything that is converted, and the networks."""
    root = tmp_path_factory.mktemp("magicanimate")
    return root, make_magicanimate(root, WINDOW)


def arguments(root: Path) -> list[str]:
    return [
        str(root / "sd15"),
        *("--motion", str(root / "temporal_attention.ckpt")),
        *("--controlnet", str(root / "controlnet")),
        *("--appearance-encoder", str(root / "appearance_encoder")),
        *("--vae", str(root / "vae")),
    ]


@pytest.fixture(scope="module")
def converted(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("qvd_jax") / "magicanimate"
    assert convert([*arguments(models[0]), "--out", str(out)]) == 0
    return out


def transformers(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The spatial transformers' blocks that write or read the reference, by name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if name.startswith(("mid_block.attentions.", "up_blocks."))
        and name.endswith(".transformer_blocks.0")
        and "motion_modules" not in name
    }


@contextmanager
def shown(models: MagicAnimate, halves: int) -> Iterator[dict[str, torch.Tensor]]:
    """Reference attention: gives the bank that the readers read.

    The appearance encoder writes the tokens it normalizes into the bank; of `halves` of a batch
    the UNet's last sees them.
    """
    bank: dict[str, torch.Tensor] = {}
    writers, readers = transformers(models.appearance), transformers(models.unet)
    assert writers.keys() == readers.keys()
    hooks = [
        block.norm1.register_forward_hook(
            lambda module, inputs, out, name=name: bank.__setitem__(name, out)
        )
        for name, block in writers.items()
    ]
    attends = {name: block.attn1.forward for name, block in readers.items()}

    def reader(name: str, attend: Any) -> Any:
        def read(hidden: torch.Tensor, **_: Any) -> torch.Tensor:
            alone = len(hidden) // halves * (halves - 1)
            seen = hidden[alone:]
            keys = torch.cat([seen, bank[name].repeat(len(seen), 1, 1)], dim=1)
            out = attend(seen, encoder_hidden_states=keys)
            return torch.cat([attend(hidden[:alone]), out]) if alone else out

        return read

    for name, block in readers.items():
        block.attn1.forward = reader(name, attends[name])
    yield bank
    for hook in hooks:
        hook.remove()
    for name, block in readers.items():
        block.attn1.forward = attends[name]


def residuals(
    models: MagicAnimate,
    latents: torch.Tensor,
    t: Any,
    text: torch.Tensor,
    poses: torch.Tensor,
    halves: int,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The ControlNet's, of the cond half alone, repeated for both."""
    frames = latents[0].transpose(0, 1)
    down, mid = models.controlnet(
        frames, t, text.repeat(len(frames), 1, 1), poses, return_dict=False
    )
    return [torch.cat([d] * halves) for d in down], torch.cat([mid] * halves)


def predict(
    models: MagicAnimate,
    latents: torch.Tensor,
    t: Any,
    text: torch.Tensor,
    poses: torch.Tensor,
    halves: int,
) -> torch.Tensor:
    """The UNet's prediction `[halves, C, F, h, w]` of `[1, C, F, h, w]`; the bank is filled."""
    down, mid = residuals(models, latents, t, text, poses, halves)
    return models.unet(
        torch.cat([latents] * halves),
        t,
        text.repeat(halves * latents.shape[2], 1, 1),
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample


@torch.no_grad()
def oracle(
    models: MagicAnimate,
    image: np.ndarray,
    motion: np.ndarray,
    noise: np.ndarray,
    windows: list[list[int]],
    guidance: float,
) -> torch.Tensor:
    """Latents `[1, C, F, h, w]` after 4 steps."""
    halves = 2 if guidance > 1 else 1
    tokenizer, text_encoder = models.pipe.tokenizer, models.pipe.text_encoder
    ids = tokenizer("", padding="max_length", max_length=16, return_tensors="pt").input_ids
    text = text_encoder(ids)[0]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    reference = models.vae.encode(pixels).latent_dist.mean * 0.18215
    poses = torch.from_numpy(motion).permute(0, 3, 1, 2) / 255
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(4)
    latents = torch.from_numpy(noise).permute(0, 4, 1, 2, 3)
    with shown(models, halves):
        for t in scheduler.timesteps:
            models.appearance(reference, t, text)
            total, views = torch.zeros(halves, *latents.shape[1:]), torch.zeros(latents.shape[2])
            for window in windows:
                seen = latents[:, :, window]
                total[:, :, window] += predict(models, seen, t, text, poses[window], halves)
                views[window] += 1
            prediction = total / views[:, None, None]
            if halves == 2:
                prediction = prediction[:1] + guidance * (prediction[1:] - prediction[:1])
            latents = scheduler.step(prediction, t, latents).prev_sample
    return latents


def test_the_unet_and_its_parts_equal_the_oracle(models, converted):
    """What is banked, the residuals and the prediction, in float32, to 1e-4 of their scale."""
    networks, pipe, halves = models[1], qvd_jax.load(converted), 2
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    latents, reference = draw(1, WINDOW, 8, 12, 4), draw(1, 1, 8, 12, 4)
    text, poses = draw(1, 7, 24), draw(1, WINDOW, 16, 24, 3)
    told, t = torch.from_numpy(text), 500
    frames, motion, image = (
        torch.from_numpy(x[0]).permute(0, 3, 1, 2) for x in (latents, poses, reference)
    )
    with shown(networks, halves) as bank, torch.no_grad():
        networks.appearance(image, t, told)
        video = frames.transpose(0, 1)[None]
        down, mid = residuals(networks, video, t, told, motion, halves)
        expected = predict(networks, video, t, told, motion, halves)

    latents, text = (np.repeat(x, halves, axis=0) for x in (latents, text))
    forward = functools.partial(
        pipe.unet.apply,
        capture_intermediates=lambda module, method: (
            isinstance(module, AppearanceEncoder | ControlNet) and method == "__call__"
        ),
        mutable=["intermediates"],
    )
    found, seen = jax.jit(forward)(
        {"params": pipe.params["unet"]}, latents, np.float32([t]), text, None, poses, reference
    )
    ((tokens,), (added,)) = (
        seen["intermediates"][name]["__call__"] for name in ("appearance_encoder", "controlnet")
    )
    written = [leaf[0] for leaf in jax.tree.leaves((tokens.mid, tokens.up))]
    assert len(written) == len(bank)
    # Both run from the middle up.
    for one, banked in zip(written, bank.values(), strict=True):
        assert relative_error(one, banked) <= 1e-4
    for one, residual in zip((*added.down, added.mid), (*down, mid), strict=True):
        assert relative_error(one[0], residual[:WINDOW].permute(0, 2, 3, 1)) <= 1e-4
    assert relative_error(found, expected.permute(0, 2, 3, 4, 1)) <= 1e-4


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(*shape, 18, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("frames", "windows", "guidance"),
    [
        pytest.param(4, [[0, 1, 2, 3]], 3.0, id="one window", marks=pytest.mark.slow),
        pytest.param(
            3, [[0, 1, 2, 3]], 1.0, id="no guidance and a frame more", marks=pytest.mark.slow
        ),
        pytest.param(
            6,
            [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 0, 1]],
            3.0,
            id="a loop of windows and two frames more",
        ),
    ],
)
def test_latents_equal_the_oracle(models, converted, frames, windows, guidance):
    """One image, same noise, 4 steps; the last pose is held until the windows are whole."""
    pipe = qvd_jax.load(converted)
    assert pipe.family == "magicanimate"
    assert pipe.defaults.frames == 16
    pipe = replace(pipe, defaults=replace(pipe.defaults, frames=WINDOW))
    sampled = 1 + max(map(max, windows))
    image, motion = pixels(0), pixels(1, frames + 1)
    noise = np.random.default_rng(0).standard_normal((1, sampled, 9, 12, 4), dtype=np.float32)
    held = np.concatenate([motion[:frames], *[motion[frames - 1 : frames]] * (sampled - frames)])
    expected = oracle(models[1], image, held, noise, windows, guidance)[:, :, :frames]
    found = pipe(
        Image.fromarray(image),
        [Image.fromarray(pose) for pose in motion],
        frames=frames,
        height=18,
        width=24,
        steps=4,
        guidance_scale=guidance,
        latents=noise,
        output_type="latents",
    )
    assert relative_error(found, expected.permute(0, 2, 3, 4, 1)) <= 1e-3


def test_noise_repeats_window_by_window(converted):
    pipe = qvd_jax.load(converted)
    noise = np.asarray(pipe.initial_noise(0, 2, (40, 2, 2, 4)))
    np.testing.assert_array_equal(noise[:, 16:32], noise[:, :16])
    np.testing.assert_array_equal(noise[:, 32:], noise[:, :8])
    assert np.unique(noise[:, :16]).size == noise[:, :16].size


def test_names_are_those_of_the_real_model():
    """A bijection at full size, from shapes alone."""
    with torch.device("meta"):
        appearance = UNet2DConditionModel(cross_attention_dim=768)
        controlnet = ControlNetModel(cross_attention_dim=768)
    expected = {
        f"appearance_encoder.{name}": tensor
        for name, tensor in appearance_weights(appearance.state_dict(), 3, 2).items()
    }
    assert len(appearance.state_dict()) - len(expected) == 24
    expected |= {f"controlnet.{name}": t for name, t in controlnet.state_dict().items()}
    shapes = ComponentConfigs(MAGIC_ANIMATE, VAEConfig()).param_shapes("float32")["unet"]
    found: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        parts = names.UNET("/".join(key.key for key in path))
        found |= dict.fromkeys(parts, leaf.size // len(parts))
    own = {name for name in found if not name.startswith(("appearance_encoder.", "controlnet."))}
    assert found.keys() - own == expected.keys()
    # As many parameters as the published files have.
    assert sum(found[name] for name in own) == 1_276_658_564
    for part, parameters in (("appearance_encoder.", 857_066_560), ("controlnet.", 361_279_120)):
        assert sum(n for name, n in found.items() if name.startswith(part)) == parameters


@pytest.mark.slow
def test_calibrate_and_sample_a_motion(converted, tmp_path, monkeypatch, capsys):
    imageio.imwrite(tmp_path / "dancer.png", pixels(0))
    (tmp_path / "poses").mkdir()
    for number, pose in enumerate(pixels(1, 3)):
        imageio.imwrite(tmp_path / "poses" / f"{number}.png", pose)
    options = ["--image", str(tmp_path / "dancer.png"), "--motion-video", str(tmp_path / "poses")]
    options += ["--frames", "2", "--height", "18", "--width", "24", "--steps", "2"]
    int8 = tmp_path / "int8"
    assert calibrate.main(["--checkpoint", str(converted), "--out", str(int8), *options]) == 0
    assert "appearance_encoder/" in capsys.readouterr().out
    out = tmp_path / "out"
    assert sample.main(["--checkpoint", str(int8), *options, "--out", str(out)]) == 0
    video = imageio.imread(out / "000-dancer.mp4", plugin="FFMPEG")
    assert video.shape == (2, 18, 24, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "animates images; pass --motion-video FILE"),
        ({"--motion-video": "{tmp}/none.mp4"}, "none.mp4 does not exist; a video"),
        ({"--motion-video": "{tmp}/text.mp4"}, "text.mp4 cannot be read as a video"),
        ({"--motion-video": "{tmp}/empty"}, "empty holds no still images"),
        ({"--motion-video": "{tmp}/mixed"}, "1.png has [8, 24] pixels, 0.png beside it [16, 24]"),
        ({"--motion-video": "{tmp}/poses", "--frames": "4"}, "has 3 frames, 4 are asked for"),
        ({"--motion-video": "{tmp}/poses", "--height": "8"}, "dancer.png has 18x24 pixels"),
        ({"--motion-video": "{tmp}/poses.mp4"}, "the motion video has 16x32 pixels"),
        ({"--motion-video": "{tmp}/poses", "--prompt": "a"}, "makes videos from images"),
        ({"--motion-video": "{tmp}/poses", "--condition": "a@0"}, "follows no --condition"),
    ],
)
def test_bad_motions_are_one_line(converted, tmp_path, capsys, changes, message):
    imageio.imwrite(tmp_path / "dancer.png", pixels(0))
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "poses.mp4", np.zeros((2, 16, 32, 3), np.uint8), 8)
    for folder in ("empty", "poses", "mixed"):
        (tmp_path / folder).mkdir()
    for number, pose in enumerate(pixels(1, 3)):
        imageio.imwrite(tmp_path / "poses" / f"{number}.png", pose)
        imageio.imwrite(tmp_path / "mixed" / f"{number}.png", pose[: 8 if number else 16])
    options = {"--image": "{tmp}/dancer.png", "--frames": "2", "--height": "18", "--width": "24"}
    given = [text.format(tmp=tmp_path) for pair in {**options, **changes}.items() for text in pair]
    out = tmp_path / "out"
    assert sample.main(["--checkpoint", str(converted), *given, "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("left_out", "changed", "message"),
    [
        ("--controlnet", {}, "is MagicAnimate, which needs --controlnet"),
        ("", {"--appearance-encoder": "{root}/none"}, "none is no folder; --appearance-encoder"),
        ("", {"--appearance-encoder": "{root}/sd15/unet"}, "is no appearance encoder"),
        ("", {"--controlnet": "{root}/vae"}, "vae is a VAE: it has no controlnet_down_blocks"),
        ("", {"--vae": "{root}/sd15/unet"}, "AutoencoderKL is expected"),
    ],
)
def test_bad_parts_end_with_one_message(models, tmp_path, capsys, left_out, changed, message):
    source, *rest = arguments(models[0])
    pairs = dict(zip(rest[::2], rest[1::2], strict=True)) | changed
    given = [
        part for option, value in pairs.items() if option != left_out for part in (option, value)
    ]
    given = [text.format(root=models[0]) for text in given]
    assert convert([source, *given, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
