"""The how-tos' commands run as written, with tiny random models in the published files' place."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from pytorch_sources import make_sd15, original_motion, read_weights, split_motion
from random_animatediff import make_pipeline, randomize
from random_families import (
    RGB,
    make_controlnet,
    make_magicanimate,
    make_modelscope,
    make_sparsectrl,
    make_svd,
    original_modelscope,
)
from safetensors.torch import save_file
from test_documents import commands

from qvd_jax.data.video_io import write_video

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SIDE = 16  # pixels of the stand-ins' videos, by their sample_size
PLACEHOLDER = re.compile(r" (?:[A-Z]+)(?: |$)")


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(*shape, SIDE, SIDE, 3), dtype=np.uint8)


def stable_diffusion(root: Path, version: str, motion: str) -> torch.nn.Module:
    """Stable Diffusion 1.5 in `root`, with a version's original motion modules; its UNet."""
    pipe = make_pipeline(root / "made", version)
    make_sd15(root / "made", root / "stable-diffusion-v1-5")
    modules = split_motion(read_weights(root / "made" / "unet"))[1]
    torch.save(original_motion(modules), root / motion)
    (root / "prompts.txt").write_text("a corgi on a beach\na red circle\n")
    return pipe.unet


def lora(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the queries of the spatial attention, in the names of AnimateDiff's domain adapter."""
    content = {}
    for name, weight in unet.state_dict().items():
        if re.search(r"\.attentions\..*attn\d\.to_q\.weight$", name):
            stem = name.replace(".to_q.weight", ".processor.to_q_lora")
            content[f"{stem}.up.weight"] = 0.1 * torch.randn(weight.shape[0], 2)
            content[f"{stem}.down.weight"] = 0.1 * torch.randn(2, weight.shape[1])
    return content


def animatediff(root: Path) -> None:
    unet = stable_diffusion(root, "v2", "mm_sd_v15_v2.ckpt")
    shutil.copy(root / "mm_sd_v15_v2.ckpt", root / "AnimateLCM_sd15_t2v.ckpt")
    save_file(lora(unet), root / "AnimateLCM_sd15_t2v_lora.safetensors")
    motion = split_motion(unet.state_dict())[1]
    content = {name: tensor.contiguous() for name, tensor in motion.items()}
    save_file(content, root / "animatediff_lightning_4step_diffusers.safetensors")


def sparsectrl(root: Path) -> None:
    unet = stable_diffusion(root, "v3", "v3_sd15_mm.ckpt")
    torch.save(lora(unet), root / "v3_sd15_adapter.ckpt")
    make_sparsectrl(RGB, root)
    (root / "rgb.ckpt").rename(root / "v3_sd15_sparsectrl_rgb.ckpt")
    imageio.imwrite(root / "first.png", pixels())
    make_pipeline(root / "v2", "v2")
    modules = split_motion(read_weights(root / "v2" / "unet"))[1]
    torch.save(original_motion(modules), root / "mm_sd_v15_v2.ckpt")
    controlnet = make_controlnet()
    randomize(controlnet)
    torch.save(controlnet.state_dict(), root / "control_v11p_sd15_openpose.pth")
    write_video(root / "poses.mp4", pixels(16), 8)


def modelscope(root: Path) -> None:
    pipe = make_modelscope(root / "text-to-video-ms-1.7b")
    torch.save(original_modelscope(pipe), root / "text2video_pytorch_model.pth")
    shutil.copytree(root / "text-to-video-ms-1.7b", root / "zeroscope_v2_576w")
    (root / "prompts.txt").write_text("a corgi on a beach\na red circle\n")


def svd(root: Path) -> None:
    make_svd(root / "stable-video-diffusion-img2vid")
    for name in ("bear", "deer", "fox", "hare", "corgi", "otter"):
        imageio.imwrite(root / f"{name}.png", pixels())


def magicanimate(root: Path) -> None:
    parts = root / "MagicAnimate"
    make_magicanimate(parts, window=16)
    (parts / "sd15").rename(root / "stable-diffusion-v1-5")
    (parts / "vae").rename(root / "sd-vae-ft-mse")
    (parts / "controlnet").rename(parts / "densepose_controlnet")
    (parts / "temporal_attention").mkdir()
    (parts / "temporal_attention.ckpt").rename(
        parts / "temporal_attention" / "temporal_attention.ckpt"
    )
    for name in ("dancer", "singer"):
        imageio.imwrite(root / f"{name}.png", pixels())
    write_video(root / "poses.mp4", pixels(16), 8)


@pytest.mark.parametrize("build", [animatediff, modelscope, svd, magicanimate, sparsectrl])
def test_commands_run_as_written(build: Callable[[Path], None], tmp_path):
    torch.manual_seed(0)
    build(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ran = 0
    for command in commands(ROOT / f"docs/how-to/{build.__name__}.md"):
        if PLACEHOLDER.search(command) or "python -m" not in command:
            continue
        words = shlex.split(command.replace("--height 320 --width 576", ""))
        sampled = words[2] != "convert" and ("svd" in command or "zeroscope" in command)
        # Of these the published size is not in the files, and too large for a test.
        if sampled:
            words += ["--height", str(SIDE), "--width", str(SIDE)]
        if words[2] == "convert" and "svd.safetensors" in words:
            continue  # A file of the published size alone says what it holds.
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 4
