"""The same weights arrive the same, whatever files, names and versions they come in."""

import dataclasses
import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_animatediff
import torch
from diffusers import AnimateDiffPipeline
from hypothesis import given
from hypothesis import strategies as st
from pytorch_sources import (
    edit_json,
    make_sd15,
    original_motion,
    original_names,
    read_weights,
    rewrite,
    split_motion,
)
from safetensors.torch import save_file

import qvd_jax
from convert.__main__ import main as convert
from convert.lora import merge_loras, parse_lora
from convert.pipeline import open_source
from convert.tensors import LazyTensor
from qvd_jax import checkpoint
from qvd_jax.diffusion.schedules import ANIMATEDIFF
from qvd_jax.pipelines.text_to_video import TextToVideoPipeline

Tiny = tuple[Path, AnimateDiffPipeline]
COMPONENTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> TextToVideoPipeline:
    """The pipeline converted from whole safetensors files."""
    return qvd_jax.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def sd15(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as Stable Diffusion 1.5, with the motion modules in `../adapter`."""
    return make_sd15(tiny[0], tmp_path_factory.mktemp("sd15") / "sd15")


def run(source: Path, out: Path, *arguments: object) -> TextToVideoPipeline:
    """Converts by the command line, and loads."""
    assert convert([str(source), "--out", str(out), *map(str, arguments)]) == 0
    return qvd_jax.load(out)


def assert_same_params(pipe: TextToVideoPipeline, params: dict) -> None:
    found, expected = (jax.tree.map(np.asarray, tree) for tree in (pipe.params, params))
    chex.assert_trees_all_equal(found, expected, strict=True)


def flat(tree: dict) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(leaf)
        for name, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()
    }


def sorted_values(arrays: object) -> np.ndarray:
    return np.sort(np.concatenate([np.ravel(array) for array in arrays]))


def test_each_weight_of_the_source_arrives_once_in_flax_layout(tiny, reference):
    modules = {name: getattr(tiny[1], name).state_dict() for name in COMPONENTS}
    source = {
        name: {key: t.numpy() for key, t in tensors.items() if not key.endswith(".pe")}
        for name, tensors in modules.items()
    }
    found = {name: flat(tree) for name, tree in reference.params.items()}
    for name in COMPONENTS:
        np.testing.assert_array_equal(
            sorted_values(found[name].values()), sorted_values(source[name].values())
        )

    unet, vae, text = (source[name] for name in COMPONENTS)
    motion = "up_blocks.0.motion_modules.1.transformer_blocks.0"
    spatial = "mid_block.attentions.0.transformer_blocks.0"
    attention = "decoder.mid_block.attentions.0"
    layer = "encoder.layers.1.self_attn"

    def joined(tensors: dict, module: str, parts: tuple[str, ...], leaf: str) -> np.ndarray:
        return np.concatenate([tensors[f"{module}.{part}.{leaf}"].T for part in parts], axis=-1)

    qkv, proj = ("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj")
    expected = {
        "unet": {
            "conv_in/kernel": unet["conv_in.weight"].transpose(2, 3, 1, 0),
            "mid_block/blocks_0/attention/proj_in/kernel": unet[
                "mid_block.attentions.0.proj_in.weight"
            ][:, :, 0, 0].T,
            "up_blocks_0/blocks_1/motion_module/block/attn2/to_qkv/kernel": joined(
                unet, f"{motion}.attn2", qkv, "weight"
            ),
            "up_blocks_0/blocks_1/motion_module/block/norm3/scale": unet[f"{motion}.norm3.weight"],
            "mid_block/blocks_0/attention/block/attn1/to_qkv/kernel": joined(
                unet, f"{spatial}.attn1", qkv, "weight"
            ),
            "mid_block/blocks_0/attention/block/attn2/to_kv/kernel": joined(
                unet, f"{spatial}.attn2", qkv[1:], "weight"
            ),
            "mid_block/blocks_1/resnet/time_emb_proj/kernel": unet[
                "mid_block.resnets.1.time_emb_proj.weight"
            ].T,
        },
        "vae": {
            "decoder/mid_block/attention/attn/to_qkv/kernel": joined(vae, attention, qkv, "weight"),
            "decoder/mid_block/attention/attn/to_qkv/bias": joined(vae, attention, qkv, "bias"),
            "quant_conv/kernel": vae["quant_conv.weight"][:, :, 0, 0].T,
        },
        "text_encoder": {
            "encoder_1/self_attn/to_qkv/kernel": joined(text, layer, proj, "weight"),
            "encoder_1/self_attn/to_qkv/bias": joined(text, layer, proj, "bias"),
            "token_embedding/embedding": text["embeddings.token_embedding.weight"],
        },
    }
    for name, arrays in expected.items():
        for path, array in arrays.items():
            np.testing.assert_array_equal(found[name][path], array, err_msg=f"{name}/{path}")


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(("sharded", "bin", "fp16"), id="unet sharded"),
        pytest.param(("fp16", "fp16 sharded", "bin sharded"), id="unet fp16"),
        pytest.param(("bin", "old bin", "sharded"), id="unet bin"),
    ],
)
def test_weights_do_not_depend_on_their_files(tiny, reference, tmp_path, layouts):
    source = tmp_path / "source"
    shutil.copytree(tiny[0], source)
    expected = dict(reference.params)
    for name, layout in zip(COMPONENTS, layouts, strict=True):
        rewrite(source / name, layout)
        if "fp16" in layout:
            expected[name] = jax.tree.map(
                lambda x: np.asarray(x).astype(np.float16).astype(np.float32), expected[name]
            )
    assert_same_params(run(source, tmp_path / "out"), expected)


def test_stable_diffusion_with_an_adapter_folder_equals_the_animatediff_folder(
    sd15, reference, tmp_path, capsys
):
    pipe = run(sd15, tmp_path / "out", "--motion", sd15.parent / "adapter")
    assert_same_params(pipe, reference.params)
    assert (pipe.unet, pipe.vae, pipe.text_encoder) == (
        reference.unet,
        reference.vae,
        reference.text_encoder,
    )
    assert pipe.unet.config.temporal_norm_scope == "joint"
    assert pipe.unet.config.resnet_norm_scope == "frame"
    assert pipe.scheduler == ANIMATEDIFF
    assert pipe.defaults == reference.defaults
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "AnimateDiff v2, GroupNorm scopes of diffusers AnimateDiff"
    assert [line for line in printed if line.startswith("note: ")] == [
        "note: scheduler set to AnimateDiff's DDIMScheduler: motion modules were trained with "
        "linear betas, Stable Diffusion's are scaled; instead of the folder's beta_schedule = "
        "'scaled_linear', set_alpha_to_one = False"
    ]
    prompts = ["a red panda", "", "Surfing!"]
    assert pipe.tokenizer(prompts)["input_ids"] == reference.tokenizer(prompts)["input_ids"]


@pytest.mark.parametrize(
    ("preset", "solver", "steps", "guidance"),
    [("animatelcm", "lcm", 6, 2.0), ("lightning", "euler", 4, 1.0)],
)
def test_presets_set_scheduler_steps_and_guidance(tiny, tmp_path, preset, solver, steps, guidance):
    pipe = run(tiny[0], tmp_path / "out", "--preset", preset)
    assert pipe.scheduler.solver == solver
    assert pipe.scheduler.beta_schedule == "linear"
    assert (pipe.defaults.steps, pipe.defaults.guidance_scale) == (steps, guidance)


def edit_scheduler(source, target, **changes):
    shutil.copytree(source, target)
    file = target / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@pytest.mark.parametrize("preset", [None, "lightning"])
def test_a_replaced_scheduler_keeps_what_the_unet_was_trained_for(sd15, tmp_path, preset):
    folder = edit_scheduler(sd15, tmp_path / "source", **ZERO_SNR, _class_name="DDIMScheduler")
    source = open_source(folder, sd15.parent / "adapter", preset=preset)
    found = source.scheduler
    assert (found.prediction_type, found.rescale_betas_zero_snr) == ("v_prediction", True)
    assert (found.timestep_spacing, found.beta_schedule) == ("trailing", "linear")
    (note,) = (note for note in source.notes if note.startswith("scheduler"))
    assert "; keeps the folder's prediction_type = 'v_prediction', rescale_betas_zero_snr" in note
    assert "; instead of the folder's beta_schedule = 'scaled_linear'" in note


def test_an_unsupported_scheduler_of_a_whole_pipeline_keeps_its_betas(tiny, tmp_path):
    options = {"_class_name": "HeunDiscreteScheduler", "beta_schedule": "scaled_linear"}
    source = open_source(edit_scheduler(tiny[0], tmp_path / "source", **options))
    assert source.scheduler == replace(ANIMATEDIFF, beta_schedule="scaled_linear")
    assert source.notes[-1] == (
        "scheduler set to AnimateDiff's DDIMScheduler: HeunDiscreteScheduler is not supported; "
        "keeps the folder's beta_schedule = 'scaled_linear'"
    )


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "training output"])
def test_original_motion_checkpoint_gives_the_weights_of_the_adapter_with_its_own_norms(
    sd15, tiny, reference, tmp_path, wrapped
):
    motion = split_motion(read_weights(tiny[0] / "unet"))[1]
    original = original_motion(motion)
    modules = {name.partition(".temporal_transformer.")[0] for name in original}
    assert len(original) == 28 * len(modules)  # as in the published files
    content = {**original, "animatediff_config": {"unet_additional_kwargs": {"depth": 1}}}
    if wrapped:
        content = {
            "epoch": 3,
            "global_step": 1000,
            "state_dict": {f"module.{name}": tensor for name, tensor in original.items()},
        }
    torch.save(content, tmp_path / "mm.ckpt")
    source = tmp_path / "source"
    shutil.copytree(sd15, source)
    if not wrapped:
        # The text encoder's names as transformers 5 writes them.
        shutil.copytree(tiny[0] / "text_encoder", source / "text_encoder", dirs_exist_ok=True)
    pipe = run(source, tmp_path / "out", "--motion", tmp_path / "mm.ckpt")
    assert_same_params(pipe, reference.params)
    assert pipe.unet.config == dataclasses.replace(
        reference.unet.config,
        temporal_norm_scope="frame",
        resnet_norm_scope="frame",
        temporal_heads=(8, 8),  # the file does not say; 8 in all published ones
    )
    assert pipe.description == "AnimateDiff v2, GroupNorm scopes of original AnimateDiff"


def test_of_a_unet_that_animatediff_trained_the_motion_modules_are_taken(
    sd15, tiny, reference, tmp_path, capsys
):
    """The original code loads these names alone; the images are the other model's."""
    spatial, motion = split_motion(read_weights(tiny[0] / "unet"))
    content = {**original_motion(motion), **{name: 2 * spatial[name] for name in spatial}}
    state = {f"module.{name}": tensor for name, tensor in content.items()}
    torch.save({"epoch": 3, "global_step": 9, "state_dict": state}, tmp_path / "checkpoint.ckpt")
    pipe = run(sd15, tmp_path / "out", "--motion", tmp_path / "checkpoint.ckpt")
    assert_same_params(pipe, reference.params)
    said = capsys.readouterr()
    assert "the motion modules are read, not the" in said.out + said.err


def test_original_v1_converts_to_bfloat16_rounded_and_joins_frames_in_resnets_alone(tmp_path):
    folder = tmp_path / "v1"
    pipeline = random_animatediff.make_pipeline(folder, "v1", seed=1)
    source = make_sd15(folder, tmp_path / "sd15")
    _, motion = split_motion(read_weights(folder / "unet"))
    torch.save(original_motion(motion), tmp_path / "mm.ckpt")
    pipe = run(source, tmp_path / "out", "--motion", tmp_path / "mm.ckpt", "--dtype", "bfloat16")
    assert pipe.unet.config.resnet_norm_scope == "joint"
    assert pipe.unet.config.temporal_norm_scope == "frame"
    assert pipe.unet.config.max_frames == 24
    assert not pipe.unet.config.temporal_mid_block
    for name in COMPONENTS:
        leaves = jax.tree.leaves(pipe.params[name])
        chex.assert_type(leaves, jnp.bfloat16)
        state = getattr(pipeline, name).state_dict()
        np.testing.assert_array_equal(
            sorted_values(np.asarray(leaf, np.float32) for leaf in leaves),
            sorted_values(
                t.bfloat16().float() for key, t in state.items() if not key.endswith(".pe")
            ),
        )


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_version_and_norm_scopes_follow_from_the_weights(version, tmp_path):
    folder = tmp_path / "pipeline"
    random_animatediff.make_pipeline(folder, version)
    source = make_sd15(folder, tmp_path / "sd15")
    _, motion = split_motion(read_weights(folder / "unet"))
    torch.save(original_motion(motion), tmp_path / "mm.ckpt")
    found = {
        "folder": open_source(folder),
        "adapter": open_source(source, tmp_path / "adapter"),
        "original": open_source(source, tmp_path / "mm.ckpt"),
    }
    for layout, opened in found.items():
        config = opened.configs.unet
        assert config.max_frames == (24 if version == "v1" else 32)
        assert config.temporal_mid_block == (version == "v2")
        assert opened.description.startswith(f"AnimateDiff {version},")
        assert (config.temporal_norm_scope, config.resnet_norm_scope) == (
            ("joint", "frame")
            if layout != "original"
            else ("frame", "joint" if version == "v1" else "frame")
        )


def test_a_config_that_claims_a_mid_block_the_weights_lack_is_overruled(tmp_path, capsys):
    folder = tmp_path / "v3"
    random_animatediff.make_pipeline(folder, "v3")
    edit_json(folder / "unet" / "config.json", use_motion_mid_block=True)
    out = tmp_path / "out"
    assert convert([str(folder), "--out", str(out)]) == 0
    assert (
        "unet: config.json says use_motion_mid_block = True, but the weights have False; the "
        "weights decide\n"
    ) in capsys.readouterr().out
    unet = checkpoint.read_manifest(out).components["unet"]
    assert unet["temporal_mid_block"] is False


def our_place(name: str) -> tuple[str, int, int]:
    """Where an attention weight lies in our tree: path, and which part of how many."""
    stage, kind, block, attention, layer = re.fullmatch(
        r"((?:down|up)_blocks\.\d|mid_block)\.(attentions|motion_modules)\.(\d)"
        r"\.transformer_blocks\.0\.(attn\d)\.(to_q|to_k|to_v|to_out)(?:\.0)?\.weight",
        name,
    ).groups()
    fused, part, parts = layer, 0, 1
    if layer != "to_out" and (kind, attention) != ("attentions", "attn2"):
        fused, part, parts = "to_qkv", ("to_q", "to_k", "to_v").index(layer), 3
    elif layer in ("to_k", "to_v"):
        fused, part, parts = "to_kv", ("to_k", "to_v").index(layer), 2
    module = "attention" if kind == "attentions" else "motion_module"
    stage = stage.replace(".", "_")
    return f"{stage}/blocks_{block}/{module}/block/{attention}/{fused}/kernel", part, parts


def test_loras_add_scale_times_up_times_down_to_the_weights_they_name(
    tiny, reference, tmp_path, capsys
):
    unet = tiny[1].unet.state_dict()
    targets = [name for name in unet if re.search(r"attn\d\.to_(q|k|v|out\.0)\.weight$", name)]
    motion = [name for name in targets if ".motion_modules." in name]
    spatial = [name for name in targets if ".attentions." in name]
    modules = {name.partition(".transformer_blocks.")[0] for name in targets}
    assert len(targets) == len(modules) * 8  # q, k, v and out of two attentions
    assert len(targets) == len(motion) + len(spatial)
    generator = torch.Generator().manual_seed(0)

    def draw(chosen: list[str], rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            name: (
                torch.randn(unet[name].shape[0], rank, generator=generator),
                torch.randn(rank, unet[name].shape[1], generator=generator),
            )
            for name in chosen
        }

    def keys(pairs: dict, rename: object = lambda name: name) -> dict[str, torch.Tensor]:
        content = {}
        for name, (up, down) in pairs.items():
            stem = re.sub(r"\.(to_\w+)(\.0)?\.weight$", r".processor.\1_lora", rename(name))
            content |= {f"{stem}.up.weight": up, f"{stem}.down.weight": down}
        return content

    zoom, pan, domain = draw(motion, 4), draw(motion[::3], 2), draw(spatial, 3)
    original = keys(zoom, lambda name: original_names(name)[0])
    assert (
        "mid_block.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0"
        ".processor.to_q_lora.down.weight"
    ) in original
    assert (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight"
    ) in keys(domain)
    torch.save({"state_dict": original, "animatediff_config": {}}, tmp_path / "zoom.ckpt")
    # As diffusers publishes them.
    save_file(keys(pan, lambda name: f"unet.{name}"), tmp_path / "pan.safetensors")
    torch.save(keys(domain), tmp_path / "adapter.ckpt")

    pipe = run(
        *(tiny[0], tmp_path / "out", "--lora", f"{tmp_path / 'zoom.ckpt'}:0.5"),
        *("--lora", f"{tmp_path / 'pan.safetensors'}:-1.25", "--lora", tmp_path / "adapter.ckpt"),
    )

    printed = capsys.readouterr().out
    for name, scale in (("zoom.ckpt", "0.5"), ("pan.safetensors", "-1.25"), ("adapter.ckpt", "1")):
        assert f"note: merged {name} at scale {scale}\n" in printed
    expected = flat(reference.params["unet"])
    touched = set()
    for name in targets:
        weight = unet[name].double()
        for pairs, scale in ((zoom, 0.5), (pan, -1.25), (domain, 1.0)):
            if name in pairs:
                up, down = pairs[name]
                weight = weight + scale * up.double() @ down.double()
        path, part, parts = our_place(name)
        if path not in touched:
            expected[path] = np.full(expected[path].shape, np.nan)
            touched.add(path)
        width = expected[path].shape[1] // parts
        expected[path][:, part * width : (part + 1) * width] = weight.numpy().T
    found = flat(pipe.params["unet"])
    assert found.keys() == expected.keys()
    for path, array in found.items():
        if path in touched:
            np.testing.assert_allclose(array, expected[path], rtol=0, atol=2e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(array, expected[path], err_msg=path)
    for name in ("vae", "text_encoder"):
        chex.assert_trees_all_equal(pipe.params[name], reference.params[name])


def test_kohya_loras_add_alpha_over_rank_to_any_layer(tiny):
    """AnimateLCM's: also convolutions; the oracle applies the two layers one after the other."""
    generator = torch.Generator().manual_seed(0)
    module = tiny[1].unet.down_blocks[0]
    layers = {
        "resnets.0.conv1": module.resnets[0].conv1,
        "downsamplers.0.conv": module.downsamplers[0].conv,
        "resnets.0.time_emb_proj": module.resnets[0].time_emb_proj,
    }
    rank, alpha, content, expected = 3, 2.0, {}, {}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        taps = weight.shape[2:]
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), rank, *(1 for _ in taps), generator=generator)
        stem = f"lora_unet_down_blocks_0_{name.replace('.', '_')}"
        content |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        content[f"{stem}.alpha"] = torch.tensor(alpha)
        # The response to unit impulses is the weight of both layers together.
        if taps:
            flipped = down.flip(-1, -2).transpose(0, 1)
            both = torch.nn.functional.conv2d(flipped, up).flip(-1, -2).transpose(0, 1)
        else:
            both = torch.nn.functional.linear(down.T, up).T
        expected[f"down_blocks.0.{name}.weight"] = weight + 0.8 * alpha / rank * both
    tensors = {
        name: LazyTensor(tuple(tensor.shape), tensor.detach().numpy)
        for name, tensor in tiny[1].unet.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "AnimateLCM_sd15_t2v_lora.safetensors")
        save_file(content, path)
        merged = merge_loras({"unet": tensors}, [(path, 0.8)]).tensors["unet"]
        for name in tensors:
            found = merged[name].read()
            if name in expected:
                np.testing.assert_allclose(found, expected[name], atol=1e-5, err_msg=name)
            else:
                assert merged[name] is tensors[name]


PATHS = st.text("ab:./ -_0", min_size=1).map(lambda text: f"{text}.ckpt")


@given(PATHS, st.floats(allow_nan=False, allow_infinity=False))
def test_parse_lora_splits_the_scale_from_any_path_and_defaults_to_one(path, scale):
    assert parse_lora(f"{path}:{scale!r}") == (Path(path), scale)
    assert parse_lora(path) == (Path(path), 1.0)
