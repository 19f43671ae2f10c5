"""The commands at the head of every config, run as they stand, on tiny random weights."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
import random_families
import torch
from pytorch_sources import (
    make_sd15,
    original_motion,
    read_weights,
    rewrite,
    split_motion,
)
from random_animatediff import make_pipeline
from safetensors.torch import save_file

import convert.__main__ as convert
from qvd_jax import calibrate, evaluate, sample
from qvd_jax.benchmarks import unet
from qvd_jax.benchmarks.rounds import Variant
from qvd_jax.data.video_io import write_video

CONFIGS = Path(__file__).parent.parent / "configs"
_SVD = "stable-video-diffusion-img2vid"
SIZE = ["--frames", "3", "--height", "16", "--width", "24", "--steps", "2"]
PROGRAMS = {
    "convert": convert.main,
    "qvd_jax.calibrate": calibrate.main,
    "qvd_jax.sample": sample.main,
    "qvd_jax.evaluate": evaluate.main,
}


def make_animatediff(root: Path, version: str, motion_file: str) -> None:
    """Stable Diffusion 1.5 and motion modules, as two publishers have them."""
    make_pipeline(root / version, version)
    make_sd15(root / version, root / "stable-diffusion-v1-5")
    _, motion = split_motion(read_weights(root / version / "unet"))
    if motion_file.endswith("safetensors"):
        save_file(motion, root / motion_file)
    else:
        torch.save(original_motion(motion), root / motion_file)


def make_animatelcm(root: Path) -> None:
    make_animatediff(root, "v2", "AnimateLCM_sd15_t2v.ckpt")
    lora = {}
    for name, weight in read_weights(root / "v2" / "unet").items():
        if ".motion_modules." not in name and re.search(r"(proj_in|conv1|to_q)\.weight$", name):
            stem = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
            lora[f"{stem}.lora_down.weight"] = torch.randn(2, *weight.shape[1:])
            lora[f"{stem}.lora_up.weight"] = torch.randn(len(weight), 2, *(weight.ndim - 2) * [1])
            lora[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(lora, root / "AnimateLCM_sd15_t2v_lora.safetensors")


def make_sparsectrl(root: Path, kind: str) -> None:
    make_animatediff(root, "v3", "v3_sd15_mm.ckpt")
    random_families.make_sparsectrl(kind, root)
    (root / f"{kind}.ckpt").rename(root / f"v3_sd15_sparsectrl_{kind}.ckpt")
    lora = {}
    for name, weight in read_weights(root / "v3" / "unet").items():
        if found := re.search(
            r"(.*\.attentions\..*attn\d)\.(to_(?:q|k|v|out))(?:\.0)?\.weight$", name
        ):
            stem = f"{found[1]}.processor.{found[2]}_lora"
            # Larger ones make attention so steep that rounding float weights changes the video.
            lora[f"{stem}.up.weight"] = 0.1 * torch.randn(weight.shape[0], 2)
            lora[f"{stem}.down.weight"] = 0.1 * torch.randn(2, weight.shape[1])
    torch.save(lora, root / "v3_sd15_adapter.ckpt")


def make_original_modelscope(root: Path) -> None:
    folder = root / "text-to-video-ms-1.7b"
    pipe = random_families.make_modelscope(folder)
    shutil.rmtree(folder / "unet")
    weights = random_families.original_modelscope(pipe)
    torch.save(weights, root / "text2video_pytorch_model.pth")


def make_zeroscope(root: Path) -> None:
    """Pickles alone, as published."""
    folder = root / "zeroscope_v2_576w"
    random_families.make_modelscope(folder)
    for part in ("unet", "vae", "text_encoder"):
        rewrite(folder / part, "bin")


def make_original_svd(root: Path) -> None:
    pipe = random_families.make_svd(root / "folder")
    save_file(random_families.original_svd(pipe), root / "svd.safetensors")


def make_magicanimate(root: Path) -> None:
    random_families.make_magicanimate(root, 4)
    for found, published in {
        "sd15": "stable-diffusion-v1-5",
        "vae": "sd-vae-ft-mse",
        "temporal_attention.ckpt": "MagicAnimate/temporal_attention/temporal_attention.ckpt",
        "controlnet": "MagicAnimate/densepose_controlnet",
        "appearance_encoder": "MagicAnimate/appearance_encoder",
    }.items():
        (root / published).parent.mkdir(parents=True, exist_ok=True)
        (root / found).rename(root / published)


class Model(NamedTuple):
    """A model, whose commands are those of a config.

    Attributes:
      config: its name.
      make: writes the published files into a folder.
      instead: what in the commands is another file's name.
    """

    config: str
    make: Callable[[Path], object]
    instead: tuple[str, str] = ("", "")


MODELS = {
    "animatediff v1": Model(
        "animatediff",
        lambda root: make_animatediff(root, "v1", "mm_sd_v15.ckpt"),
        ("mm_sd_v15_v2.ckpt", "mm_sd_v15.ckpt"),
    ),
    "animatediff v2": Model(
        "animatediff", lambda root: make_animatediff(root, "v2", "mm_sd_v15_v2.ckpt")
    ),
    "animatediff v3": Model(
        "animatediff",
        lambda root: make_animatediff(root, "v3", "v3_sd15_mm.ckpt"),
        ("mm_sd_v15_v2.ckpt", "v3_sd15_mm.ckpt"),
    ),
    "animatelcm": Model("animatelcm", make_animatelcm),
    "lightning": Model(
        "lightning",
        lambda root: make_animatediff(
            root, "v2", "animatediff_lightning_4step_diffusers.safetensors"
        ),
    ),
    "sparsectrl rgb": Model("sparsectrl", lambda root: make_sparsectrl(root, "rgb")),
    "sparsectrl scribble": Model(
        "sparsectrl",
        lambda root: make_sparsectrl(root, "scribble"),
        ("sparsectrl_rgb.ckpt", "sparsectrl_scribble.ckpt"),
    ),
    "modelscope": Model(
        "modelscope", lambda root: random_families.make_modelscope(root / "text-to-video-ms-1.7b")
    ),
    "modelscope original": Model(
        "modelscope",
        make_original_modelscope,
        ("text-to-video-ms-1.7b", "text-to-video-ms-1.7b --unet text2video_pytorch_model.pth"),
    ),
    "zeroscope": Model("zeroscope", make_zeroscope),
    "svd": Model("svd", lambda root: random_families.make_svd(root / _SVD)),
    "svd original": Model("svd", make_original_svd, (_SVD, "svd.safetensors")),
    "magicanimate": Model("magicanimate", make_magicanimate),
}


AT_REAL_SIZE = {"animatediff_rotation", "animatediff_low_rank"}
"""Configs that benchmarks measure: models as small as those of tests lack a rotation's channels."""


@pytest.fixture
def programs_unloaded() -> Iterator[None]:
    """Afterwards: those of a test map 10,000 pieces of memory, and Linux gives a process 65,530."""
    yield
    jax.clear_caches()


def test_every_config_of_a_policy_is_run():
    policies = {file.stem for file in CONFIGS.glob("*.yaml") if "\nrules:" in file.read_text()}
    assert {model.config for model in MODELS.values()} == policies - AT_REAL_SIZE


@pytest.mark.parametrize("config", sorted(AT_REAL_SIZE))
def test_options_of_policies_fit_the_real_model(config):
    case = unet.Case("sd15", 2, 2, 8, 8)
    unet.layers(case, Variant(unet.OURS, str(CONFIGS / f"{config}.yaml"), "bfloat16"))


@pytest.mark.slow
@pytest.mark.usefixtures("programs_unloaded")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_goes_from_its_published_files_to_its_evaluation(name, tmp_path, monkeypatch):
    config, make, (found, instead) = MODELS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(CONFIGS)
    make(tmp_path)
    (tmp_path / "prompts.txt").write_text("a corgi on a beach\na fox in the snow\n")
    rng = np.random.default_rng(0)
    for picture in ["bear", "corgi", "dancer", "deer", "first", "fox", "hare", "otter", "singer"]:
        image = rng.integers(256, size=(16, 24, 3), dtype=np.uint8)
        imageio.imwrite(f"{picture}.png", image)
    poses = np.kron(rng.integers(256, size=(3, 2, 3, 3), dtype=np.uint8), np.ones((1, 8, 8, 1)))
    write_video(Path("poses.mp4"), poses.astype(np.uint8), 8)

    lines = re.findall(r"^# python -m (.+)$", (CONFIGS / f"{config}.yaml").read_text(), re.M)
    assert found in lines[0]
    for line in lines:
        program, *arguments = shlex.split(line.replace(found, instead) if found else line)
        assert PROGRAMS[program]([*arguments, *([] if program == "convert" else SIZE)]) == 0, line

    reference, candidate = json.loads(Path(f"{config}-results/results.json").read_text())["models"]
    assert reference["policy"] == "float"
    assert candidate["unet_bytes"] < 0.5 * reference["unet_bytes"]
    assert candidate["latent_sqnr"][-1] > 20
    assert Path(f"{config}-results/report.html").is_file()
