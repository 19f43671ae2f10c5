"""An exported sampler: the pipeline's videos, by jax alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from tiny_families import FAMILIES, make, pictures

import qvd_jax
from qvd_jax import exported
from qvd_jax.errors import InputError
from qvd_jax.exported import ExportedSampler
from qvd_jax.models.configs import ControlNetConfig

SMALL = {"frames": 3, "height": 8, "width": 12, "steps": 2}
PROMPTS = ["one", "two"]


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return qvd_jax.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def artifact(pipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "artifact"
    qvd_jax.export(pipe, out, ["cpu"], videos=2, **SMALL)
    return out


def small(name, **unet):
    """A pipeline of a family whose UNet has one level: what it is told is looked at, not how."""
    family = FAMILIES[name]
    one = {key: getattr(family.unet, key)[:1] for key in PER_LEVEL}
    return make(replace(family, unet=replace(family.unet, **one, **unet)))


PER_LEVEL = ("block_channels", "attention_levels", "num_heads", "down_eps", "up_eps")
PER_LEVEL += ("temporal_heads",)


ALONE = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from exported import ExportedSampler
tokens = np.load(sys.argv[2])
sampler = ExportedSampler(sys.argv[1])
np.save(sys.argv[3], sampler(tokens[:2], tokens[2:], seed=7, guidance_scale=3.0))
assert not {"qvd_jax", "flax", "orbax", "transformers"} & {n.split(".")[0] for n in sys.modules}
"""


def test_jax_alone_makes_the_pipelines_videos(pipe, artifact, tmp_path):
    np.save(tmp_path / "tokens.npy", pipe.token_ids([*PROMPTS, "", "blurry"]))
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    arguments = [str(artifact), str(tmp_path / "tokens.npy"), str(tmp_path / "videos.npy")]
    # What all processes that share a cache have to agree on.
    names = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    cache = {name.upper(): str(jax.config.values[name]) for name in names}
    subprocess.run(
        [sys.executable, "-P", str(script), *arguments], check=True, env=os.environ | cache
    )
    want = pipe(PROMPTS, ["", "blurry"], seed=7, guidance_scale=3.0, **SMALL)
    np.testing.assert_array_equal(np.load(tmp_path / "videos.npy"), want)


def test_embeddings_become_latents(pipe, artifact):
    embeds, negative = (np.asarray(pipe.encode_text(p)) for p in (PROMPTS, ["", ""]))
    sample = ExportedSampler(artifact)
    found = sample(embeds=embeds, negative_embeds=negative, output_type="latents")
    want = pipe(PROMPTS, output_type="latents", **SMALL)
    np.testing.assert_array_equal(found, want)


@pytest.mark.slow
def test_images_become_videos(tmp_path):
    """Stable Video Diffusion's kind; each image is encoded by itself, whatever their number."""
    pipe, images = small("svd"), pictures(2)
    qvd_jax.export(pipe, tmp_path / "out", ["cpu"], videos=2, **SMALL)
    sample = ExportedSampler(tmp_path / "out")
    told = {
        "guidance_scale": 2.5,
        "min_guidance_scale": 1.5,
        "fps": 9,
        "motion_bucket_id": 100,
        "noise_aug_strength": 0.1,
    }
    found = sample(images=images, seed=3, **told)
    np.testing.assert_array_equal(found, pipe(images, seed=3, **told, **SMALL))
    for message, options in (
        ("noise_aug_strength = -1: it must be 0 or more", {"noise_aug_strength": -1}),
        ("eta: the sampler's options are guidance_scale, min_guidance_scale, fps", {"eta": 1.0}),
        ("fps = nan: it must be finite", {"fps": float("nan")}),
    ):
        with pytest.raises(ValueError, match=message):
            sample(images=images, **options)
    with pytest.raises(ValueError, match="images of float64: uint8 is needed"):
        sample(images=images / 255)
    with pytest.raises(ValueError, match="tokens given: the sampler was exported for images"):
        sample([[1, 2]])


@pytest.mark.slow
def test_images_follow_a_motion(tmp_path):
    """MagicAnimate's kind: windows of 3 frames over a loop of 6, of which 4 are left."""
    pipe, images, motion = small("magicanimate"), pictures(1), pictures(4)
    size = SMALL | {"frames": 4, "steps": 1}
    qvd_jax.export(pipe, tmp_path / "out", ["cpu"], **size)
    sample = ExportedSampler(tmp_path / "out")
    found = sample(images=images, motion_video=motion, seed=3, output_type="latents")
    want = pipe(images, motion, seed=3, output_type="latents", **size)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    ("controlnet", "indices"),
    [
        # SparseCtrl, told of images' latents and of images; an ordinary ControlNet.
        pytest.param(
            ControlNetConfig(5, motion_attentions=1, ignores_latents=True),
            (0, 2),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ControlNetConfig(4, (4, 8), motion_attentions=1, ignores_latents=True),
            (1,),
            marks=pytest.mark.slow,
        ),
        (ControlNetConfig(3, (4, 8)), None),
    ],
    ids=["latents of frames", "frames", "all frames"],
)
def test_a_controlnet_is_told_of_frames(tmp_path, controlnet, indices):
    pipe = small("sparsectrl", controlnet=controlnet)
    size = SMALL | {"guidance_scale": 1.0}
    count = SMALL["frames"] if indices is None else len(indices)
    chosen = {} if indices is None else {"conditioning_frames": count}
    qvd_jax.export(pipe, tmp_path / "out", ["cpu"], **size, **chosen)
    sample = ExportedSampler(tmp_path / "out")
    told = {"conditioning_frames": pictures(count), "seed": 3}
    if indices is not None:
        told["controlnet_frame_indices"] = indices
    weighed = {"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.5}
    ids = pipe.token_ids(["one"])
    found = sample(ids, **told, **weighed, output_type="latents")
    want = pipe(["one"], **told, **weighed, **size, output_type="latents")
    np.testing.assert_array_equal(found, want)
    with pytest.raises(ValueError, match=r"control_guidance_end = 0: shares of the steps"):
        sample(ids, **told, control_guidance_end=0.0)
    if indices is not None:
        with pytest.raises(ValueError, match="different ones of 0 to 2 are needed"):
            sample(ids, **told | {"controlnet_frame_indices": [3] * count})


def test_what_was_not_exported_is_refused_with_what_was(pipe, artifact):
    sample = ExportedSampler(artifact)
    ids = pipe.token_ids(PROMPTS)
    wanted = "exported for tokens and negative_tokens, or embeds and negative_embeds"
    for message, arguments in (
        (r"tokens of shape \(1, 16\): the sampler was exported for \(2, 16\)", (ids[:1], ids[:1])),
        (f"tokens given: the sampler was {wanted}", (ids,)),
        (f"nothing given: the sampler was {wanted}", ()),
        ("negative_tokens: not all values are int32", (ids, np.full(ids.shape, 2**40))),
    ):
        with pytest.raises(ValueError, match=message):
            sample(*arguments)
    with pytest.raises(ValueError, match="guidance_scale = 1: the sampler was exported with"):
        sample(ids, ids, guidance_scale=1.0)
    with pytest.raises(ValueError, match="output_type = 'gif'"):
        sample(ids, ids, output_type="gif")
    for seed in (-1, 1.9, 2**32):
        with pytest.raises(ValueError, match=f"seed = {seed}: an integer from 0 to 4294967295"):
            sample(ids, ids, seed=seed)
    embeds = np.full((2, 16, 24), np.inf)
    with pytest.raises(ValueError, match="context: what the model is told is not finite"):
        sample(embeds=embeds, negative_embeds=embeds)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: (p / "weights.bin").write_bytes(b"0"), "weights.bin is damaged, or was edited"),
        (lambda p: (p / "sample-cpu.jaxexport").unlink(), "sample-cpu.jaxexport cannot be read"),
        (lambda p: (p / "index.json").write_text("{}"), "is no exported sampler: 'format_version'"),
        (lambda p: index(p, format_version=1), "has format version 1, this reads 3"),
        (lambda p: index(p, scaling_factor=0.5), "index.json is damaged, or was edited"),
        (lambda p: index(p, index_sha256="0"), "index.json is damaged, or was edited"),
        (lambda p: index(p, reads={}), "index.json is damaged, or was edited; export it anew"),
        (lambda p: index(p, sign=True, platforms=["tpu"]), "was exported for tpu; jax runs on cpu"),
    ],
)
def test_a_damaged_or_other_artifact_is_refused(artifact, tmp_path, edit, message):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in artifact.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    edit(copy)
    with pytest.raises(ValueError, match=message):
        ExportedSampler(copy)


def index(folder, *, sign=False, **changes):
    file = folder / exported.INDEX
    edited = json.loads(file.read_text()) | changes
    if sign:
        edited[exported.DIGEST] = exported.index_digest(edited)
    file.write_text(json.dumps(edited))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"platforms": ["gpu"]}, "platforms: 'gpu' is none of cpu, cuda, tpu$"),
        ({"platforms": "cpu"}, r"platforms = 'cpu': a list is needed, such as \['cpu'\]"),
        ({"platforms": []}, "at least one of cpu, cuda, tpu is needed"),
        ({"videos": 0}, "videos = 0: at least 1 is needed"),
        ({"height": 9}, "height = 9: it must be a positive multiple of"),
        ({"conditioning_frames": 2}, "conditioning_frames = 2: the model has no SparseCtrl"),
    ],
)
def test_a_wrong_export_is_refused_before_anything_is_traced(pipe, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        qvd_jax.export(pipe, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_more_conditioning_frames_than_frames_are_refused(tmp_path):
    pipe = small("sparsectrl")
    with pytest.raises(InputError, match=r"conditioning_frames = 4: 1 to 3, the frames of the"):
        qvd_jax.export(pipe, tmp_path / "out", **SMALL, conditioning_frames=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_are_lowered_here(tiny_checkpoint, tmp_path, platform, monkeypatch):
    """In bfloat16, as where jax finds cuDNN: its attention is no part of an artifact."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    pipe = qvd_jax.load(tiny_checkpoint, dtype=jnp.bfloat16)
    qvd_jax.export(pipe, tmp_path / "out", [platform], **SMALL)
    programs = sorted(file.name for file in (tmp_path / "out").glob("*.jaxexport"))
    stages = json.loads((tmp_path / "out" / exported.INDEX).read_text())["reads"]
    assert programs == sorted(f"{stage}-{platform}.jaxexport" for stage in stages)
    program = jax.export.deserialize(bytearray((tmp_path / "out" / programs[-1]).read_bytes()))
    assert program.platforms == (platform,)
