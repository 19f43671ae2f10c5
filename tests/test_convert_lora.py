"""LoRAs of every kind, against diffusers and peft, and LyCORIS against formulas in PyTorch."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet3DConditionModel, UNetSpatioTemporalConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from pytorch_sources import Weights, ldm_unet, original_names
from random_animatediff import make_text_encoder, make_unet2d, randomize
from random_families import make_modelscope_unet, make_svd_unet
from safetensors.torch import save_file
from torch.nn import functional

from convert import lora_names
from convert.lora import merge_loras
from convert.tensors import LazyTensor, Tensors

STRENGTH = 0.7


def lazy(weights: Weights) -> Tensors:
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.detach().clone().numpy)
        for name, tensor in weights.items()
    }


def assert_merged(
    components: dict[str, Weights], path: Path, expected: dict[str, Weights], **scale: float
) -> None:
    """The layers that are expected to change do so, the others are left as they were."""
    given = {name: lazy(weights) for name, weights in components.items()}
    merged = merge_loras(given, [(path, scale.get("strength", STRENGTH))]).tensors
    for component, tensors in given.items():
        assert merged[component].keys() == tensors.keys()
        for name in tensors:
            found = merged[component][name]
            if name not in expected.get(component, {}):
                assert found is tensors[name], name
                continue
            want = expected[component][name].detach().double().numpy()
            assert found.shape == want.shape
            bound = 2e-6 * np.abs(want).max()
            np.testing.assert_allclose(found.read(), want, rtol=0, atol=bound, err_msg=name)
            assert np.abs(want - tensors[name].read()).max() > 100 * bound, name


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    module = make_unet2d()
    randomize(module)
    return module


@pytest.fixture(scope="module")
def text() -> torch.nn.Module:
    torch.manual_seed(1)
    module = make_text_encoder()
    randomize(module)
    return module


EVERYWHERE = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj"]
PATTERNS = {
    "rank_pattern": {"attn2.to_q": 2, r".*mid_block.*conv1": 6},
    "alpha_pattern": {"to_out.0": 5, r"down_blocks\.0\..*\.to_v": 3},
}
CONFIGS = {
    "patterns": LoraConfig(r=4, lora_alpha=2, target_modules=EVERYWHERE, **PATTERNS),
    "rslora": LoraConfig(r=4, lora_alpha=2, target_modules=EVERYWHERE, use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=EVERYWHERE, use_dora=True),
    "bias of up": LoraConfig(r=4, target_modules=["to_out.0", "conv1"], lora_bias=True),
    "biases": LoraConfig(r=4, target_modules=["to_out.0", "conv1"], bias="lora_only"),
    "expression": LoraConfig(r=4, lora_alpha=2, target_modules=r".*attn\d\.to_(q|k)"),
    "loha": LoHaConfig(r=4, alpha=2, target_modules=EVERYWHERE),
    "loha tucker": LoHaConfig(r=4, alpha=2, target_modules=EVERYWHERE, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=4, alpha=2, target_modules=EVERYWHERE),
    "lokr both": LoKrConfig(r=2, alpha=1, target_modules=EVERYWHERE, decompose_both=True),
    "lokr tucker": LoKrConfig(r=2, alpha=3, target_modules=EVERYWHERE, use_effective_conv2d=True),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize(
    ("kind", "layout"), [(kind, ("diffusers", "peft")[i % 2]) for i, kind in enumerate(CONFIGS)]
)
def test_peft_s_adapters_are_merged_as_peft_merges_them(unet, tmp_path, kind, layout):
    torch.manual_seed(2)
    config, weights = CONFIGS[kind], unet.state_dict()
    module = make_unet2d()
    module.load_state_dict(weights)
    inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if re.search(r"lora_|hada_|lokr_", name) and "magnitude" not in name:
            parameter.data = 0.4 * torch.randn_like(parameter)
        elif "magnitude" in name or (kind == "biases" and re.search(r"base_layer\.bias$", name)):
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    saved = {k: t.contiguous() for k, t in get_peft_model_state_dict(module).items()}
    # peft sets trained biases whatever the strength is.
    strength = 1.0 if kind == "biases" else STRENGTH
    values = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    if layout == "diffusers":
        path = tmp_path / "pytorch_lora_weights.safetensors"
        header = json.dumps({f"unet.{key}": value for key, value in values.items()})
        named = {f"unet.{key}": tensor for key, tensor in saved.items()}
        save_file(named, path, {"format": "pt", "lora_adapter_metadata": header})
    else:
        path = tmp_path / "adapter_model.safetensors"
        save_file({f"base_model.model.{key}": t for key, t in saved.items()}, path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    expected = {}
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_scale("default", strength)
            layer.merge()
            expected[f"{name}.weight"] = layer.get_base_layer().weight
            if layer.get_base_layer().bias is not None and "bias" in kind:
                expected[f"{name}.bias"] = layer.get_base_layer().bias
    assert expected
    assert_merged({"unet": weights}, path, {"unet": expected}, strength=strength)


def products(weights: Weights, rank: int, seed: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Up, down and alpha of each matrix and kernel, by its module; kernels' ups have one tap."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, weight in weights.items():
        if weight.ndim > 1 and name.endswith(".weight") and "embedding.weight" not in name:
            taps = (1,) * (weight.ndim - 2)
            drawn[name.removesuffix(".weight")] = (
                0.3 * torch.randn(weight.shape[0], rank, *taps, generator=generator),
                0.3 * torch.randn(rank, *weight.shape[1:], generator=generator),
                1 + 4 * torch.rand((), generator=generator),
            )
    return drawn


def added(weights: Weights, drawn: dict, factor: Callable[[float], float]) -> Weights:
    """The weights with the products, whose kernels are those of two convolutions in a row."""
    expected = {}
    for module, (up, down, alpha) in drawn.items():
        up, down = up.double(), down.double()
        product = torch.tensordot(up.reshape(up.shape[:2]), down, dims=1)
        expected[f"{module}.weight"] = (
            weights[f"{module}.weight"].double() + STRENGTH * factor(alpha.item()) * product
        )
    return expected


def kohya(component: str, module: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[component]
    return prefix + module.replace(".", "_")


def old_diffusers(component: str, module: str) -> str:
    if component == "unet":
        module = re.sub(r"(attn\d)\.(to_\w+)(\.0)?$", r"\1.processor.\2_lora", module)
        return f"unet.{module}" if module.endswith("_lora") else f"unet.{module}.lora"
    module = re.sub(r"self_attn\.(\w+)_proj$", r"self_attn.to_\1_lora", module)
    tail = "" if module.endswith("_lora") else ".lora_linear_layer"
    return f"text_encoder.text_model.{module}{tail}"


def new_diffusers(component: str, module: str) -> str:
    if component == "unet":
        return f"unet.{module}.lora"
    return f"text_encoder.text_model.{module}.lora_linear_layer"


LAYOUTS = {
    "kohya": (lambda c, m: f"{kohya(c, m)}.lora_", ("up", "down"), True),
    "kohya of two towers": (
        lambda c, m: f"{kohya(c, m).replace('lora_te_', 'lora_te1_')}.lora_",
        ("up", "down"),
        True,
    ),
    "old diffusers": (lambda c, m: f"{old_diffusers(c, m)}.", ("up", "down"), False),
    "diffusers": (lambda c, m: f"{new_diffusers(c, m)}.", ("up", "down"), False),
    "peft by diffusers": (lambda c, m: f"{c}.{m}.lora_", ("B", "A"), False),
    "peft": (lambda c, m: f"base_model.model.{m}.lora_", ("B.default", "A.default"), False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_is_found_in_every_spelling(unet, text, tmp_path, layout):
    stem, (up_name, down_name), has_alpha = LAYOUTS[layout]
    components = {"unet": unet.state_dict(), "text_encoder": text.state_dict()}
    content, expected = {}, {}
    for seed, (component, weights) in enumerate(components.items()):
        drawn = products(weights, 3, seed)
        assert any("conv1" in module for module in drawn) == (component == "unet")
        for module, (up, down, alpha) in drawn.items():
            start = stem(component, module)
            content[f"{start}{up_name}.weight"], content[f"{start}{down_name}.weight"] = up, down
            if has_alpha:
                content[re.sub(r"\.lora_$", ".alpha", start)] = alpha
        expected[component] = added(weights, drawn, lambda a: a / 3 if has_alpha else 1.0)
    path = tmp_path / "lora.safetensors"
    save_file(content, path)
    assert_merged(components, path, expected)


def test_kohya_s_lora_of_unet_and_text_encoder_is_fused_as_diffusers_does(tiny, tmp_path):
    original = tiny[1].components
    copies = {name: copy.deepcopy(original[name]) for name in ("unet", "text_encoder")}
    pipe = type(tiny[1])(**{**original, **copies})
    components = {name: original[name].state_dict() for name in copies}
    content, changed = {}, {name: [] for name in components}
    for seed, (component, weights) in enumerate(components.items()):
        for module, (up, down, _) in products(weights, 4, seed).items():
            if re.search(r"\.attentions\..*(attn\d|net\.2)|self_attn|fc\d", module):
                stem = kohya(component, module)
                content |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
                # diffusers loses alphas that differ from most.
                content[f"{stem}.alpha"] = torch.tensor(2.0)
                changed[component].append(f"{module}.weight")
    path = tmp_path / "lora.safetensors"
    save_file(content, path, {"ss_network_dim": "4", "ss_network_module": "networks.lora"})
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    pipe.fuse_lora(components=[*copies], lora_scale=STRENGTH)
    pipe.unload_lora_weights()
    fused = {name: module.state_dict() for name, module in copies.items()}
    expected = {part: {name: fused[part][name] for name in changed[part]} for part in fused}
    assert_merged(components, path, expected)


@pytest.mark.parametrize("family", ["modelscope", "svd"])
def test_families_have_the_same_spellings_for_convolutions_over_frames_too(tmp_path, family):
    torch.manual_seed(0)
    module = make_svd_unet() if family == "svd" else make_modelscope_unet()
    randomize(module)
    weights = module.state_dict()
    drawn = dict([*products(weights, 2, 0).items()][::3])
    assert any(weights[f"{name}.weight"].ndim == 5 for name in drawn)
    content = {}
    for i, (name, (up, down, alpha)) in enumerate(drawn.items()):
        if i % 2:
            stem = kohya("unet", name)
            content |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
            content[f"{stem}.alpha"] = alpha
        else:
            content |= {f"unet.{name}.lora_B.weight": up, f"unet.{name}.lora_A.weight": down}
    save_file(content, tmp_path / "lora.safetensors")
    expected = added(weights, dict([*drawn.items()][1::2]), lambda alpha: alpha / 2)
    expected |= added(weights, dict([*drawn.items()][::2]), lambda alpha: 1.0)
    assert_merged({"unet": weights}, tmp_path / "lora.safetensors", {"unet": expected})


@pytest.mark.parametrize("module", [UNet3DConditionModel, UNetSpatioTemporalConditionModel])
def test_no_two_layers_at_full_size_are_one_with_underscores_for_dots(module):
    with torch.device("meta"):
        names = {name.rpartition(".")[0] for name in module().state_dict()}
    tensors = {f"{name}.weight": LazyTensor((), lambda: np.zeros(())) for name in names}
    layers = lora_names.layers_of({"unet": tensors})
    assert sorted(layers.modules["unet"].values()) == sorted(names)


@pytest.mark.parametrize("dotted", [True, False])
@pytest.mark.parametrize("family", ["sd15", "modelscope", "svd"])
def test_layers_are_found_by_the_original_latent_diffusion_code_s_names(family, dotted):
    """kohya's for Stable Diffusion XL, and what web interfaces write for ModelScope."""
    makers = {"sd15": make_unet2d, "modelscope": make_modelscope_unet, "svd": make_svd_unet}
    weights = makers[family]().state_dict()
    layers = lora_names.layers_of({"unet": lazy(weights)})
    modules = [name for name in weights if name.endswith(".weight")]
    names = ldm_unet({name: name for name in modules}, (True, False), 1)
    assert any(name.startswith("output_blocks.1.1.") for name in names)
    for original, name in names.items():
        layer = original.removesuffix(".weight")
        if dotted:
            layer = f"model.diffusion_model.{layer}"
        else:
            layer = f"lora_unet_{layer.replace('.', '_')}"
        found = lora_names.find_layer(layer, layers)
        assert found == ("unet", name.removesuffix(".weight")), original


@pytest.mark.parametrize("spelling", ["original", "kohya of the original", "diffusers"])
def test_motion_loras_are_found_by_the_original_code_s_names(tiny, tmp_path, spelling):
    weights = tiny[1].unet.state_dict()
    drawn = {
        name: parts
        for name, parts in products(weights, 2, 0).items()
        if re.search(r"motion_modules.*(attn\d\.to_|ff\.net)", name)
    }
    content = {}
    for name, (up, down, _) in drawn.items():
        original = original_names(f"{name}.weight")[0].removesuffix(".weight")
        stem = {
            "original": f"module.{original}.lora",
            "kohya of the original": f"lora_unet_{original.replace('.', '_')}.lora",
            "diffusers": f"unet.{name}.lora",
        }[spelling]
        tail = "_" if "kohya" in spelling else "."
        content |= {f"{stem}{tail}up.weight": up, f"{stem}{tail}down.weight": down}
    save_file(content, tmp_path / "lora.safetensors")
    expected = {"unet": added(weights, drawn, lambda alpha: 1.0)}
    assert_merged({"unet": weights}, tmp_path / "lora.safetensors", expected)


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "up_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def response(weight: torch.Tensor, layers: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The kernel of convolutions in a row, from their response to one impulse in each channel."""
    inputs, size = weight.shape[1], weight.shape[-1]
    impulses = torch.zeros(inputs, inputs, 2 * size - 1, 2 * size - 1)
    impulses[range(inputs), range(inputs), size - 1, size - 1] = 1
    return layers(impulses).flip(-1, -2).transpose(0, 1)


def locon_tucker(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    up, mid, down = draw(weight.shape[0], 4, 1, 1), draw(4, 4, 3, 3), draw(4, weight.shape[1], 1, 1)
    kernel = response(
        weight,
        lambda x: functional.conv2d(functional.conv2d(functional.conv2d(x, down), mid), up),
    )
    return {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}, kernel


def loha(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    rows, columns = weight.shape[0], weight[0].numel()
    parts = {
        f"hada_w{i}_{side}": draw(*((rows, 4) if side == "a" else (4, columns)), seed=i)
        for i in (1, 2)
        for side in "ab"
    }
    halves = [
        sum(torch.outer(parts[f"hada_w{i}_a"][:, r], parts[f"hada_w{i}_b"][r]) for r in range(4))
        for i in (1, 2)
    ]
    return parts, (halves[0] * halves[1]).reshape(weight.shape)


def loha_tucker(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    parts, halves = {}, []
    for i in (1, 2):
        left, right = draw(4, weight.shape[0], seed=i), draw(4, weight.shape[1], seed=i)
        core = draw(4, 4, 3, 3, seed=i)
        parts |= {f"hada_w{i}_a": left, f"hada_w{i}_b": right, f"hada_t{i}": core}
        taps = [left.T @ core[:, :, y, x] @ right for y in range(3) for x in range(3)]
        halves.append(torch.stack(taps, -1).reshape(weight.shape))
    return parts, halves[0] * halves[1]


def lokr(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    rows, columns = weight.shape[0] // 8, weight.shape[1] // 4
    small, left = draw(8, 4), draw(rows, 4)
    right = draw(4, columns * weight[0, 0].numel())
    large = (left @ right).reshape(rows, columns, *weight.shape[2:])
    kernel = torch.kron(small.reshape(8, 4, *(1,) * (weight.ndim - 2)), large)
    return {"lokr_w1": small, "lokr_w2_a": left, "lokr_w2_b": right}, kernel


def whole_lokr(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """Without a product there is no rank: alpha says nothing."""
    small, large = draw(4, 4), draw(weight.shape[0] // 4, weight.shape[1] // 4)
    # Four is what alpha is divided by below.
    return {"lokr_w1": small, "lokr_w2": large}, 4 / 3 * torch.kron(small, large)


@pytest.mark.parametrize(
    ("layer", "make"),
    [
        (CONV, locon_tucker),
        (Q, loha),
        (CONV, loha),
        (CONV, loha_tucker),
        (OUT, lokr),
        (CONV, lokr),
        (Q, whole_lokr),
    ],
)
@pytest.mark.parametrize("magnitude", [None, "inputs", "outputs"])
def test_lycoris_s_products_follow_their_formulas_and_dora_s(
    unet, tmp_path, layer, make, magnitude
):
    weights = unet.state_dict()
    weight = weights[f"{layer}.weight"]
    parts, kernel = make(weight)
    delta = 3 / 4 * kernel
    expected = weight + STRENGTH * delta
    if magnitude is not None:
        # DoRA, Eq. 5, a column (or row) at a time.
        axis = 1 if magnitude == "inputs" else 0
        directed = (weight + delta).transpose(0, axis).contiguous()
        scale = 1 + draw(len(directed)).abs()
        for i, row in enumerate(directed):
            row *= scale[i] / math.sqrt((row.double() ** 2).sum())
        expected = weight + STRENGTH * (directed.transpose(0, axis) - weight)
        shape = [1] * weight.ndim
        shape[axis] = -1
        parts["dora_scale"] = scale.reshape(shape)
    content = {f"{kohya('unet', layer)}.{part}": t for part, t in parts.items()}
    content[f"{kohya('unet', layer)}.alpha"] = torch.tensor(3.0)
    save_file(content, tmp_path / "lora.safetensors")
    assert_merged(
        {"unet": weights}, tmp_path / "lora.safetensors", {"unet": {f"{layer}.weight": expected}}
    )


def test_full_differences_norms_and_ia3_are_added_without_an_alpha(unet, tmp_path):
    weights = unet.state_dict()
    changes = {
        (CONV, "diff", "weight"): draw(*weights[f"{CONV}.weight"].shape),
        (CONV, "diff_b", "bias"): draw(*weights[f"{CONV}.bias"].shape),
        (NORM, "w_norm", "weight"): draw(*weights[f"{NORM}.weight"].shape),
        (NORM, "b_norm", "bias"): draw(*weights[f"{NORM}.bias"].shape, seed=1),
    }
    content = {f"{kohya('unet', layer)}.{part}": t for (layer, part, _), t in changes.items()}
    expected = {
        f"{layer}.{leaf}": weights[f"{layer}.{leaf}"] + STRENGTH * t
        for (layer, _, leaf), t in changes.items()
    }
    inputs, outputs = draw(weights[f"{Q}.weight"].shape[1]), draw(weights[f"{OUT}.weight"].shape[0])
    for layer, factor, on_input in ((Q, inputs, 1), (OUT, outputs, 0)):
        stem = kohya("unet", layer)
        content |= {f"{stem}.weight": factor, f"{stem}.on_input": torch.tensor(on_input)}
    expected[f"{Q}.weight"] = weights[f"{Q}.weight"] @ torch.diag(1 + STRENGTH * inputs)
    expected[f"{OUT}.weight"] = torch.diag(1 + STRENGTH * outputs) @ weights[f"{OUT}.weight"]
    save_file(content, tmp_path / "lora.safetensors")
    assert_merged({"unet": weights}, tmp_path / "lora.safetensors", {"unet": expected})


def test_a_matrix_s_lora_fits_a_convolution_of_one_tap(unet, tmp_path):
    """Stable Diffusion's `proj_in` is one or the other, by `use_linear_projection`."""
    weights, layer = unet.state_dict(), "mid_block.attentions.0.proj_in"
    weight = weights[f"{layer}.weight"]
    assert weight.ndim == 4
    up, down = draw(64, 4), draw(4, 64)
    save_file(
        {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up},
        tmp_path / "lora.safetensors",
    )
    expected = weight + STRENGTH * (up @ down)[..., None, None]
    assert_merged(
        {"unet": weights}, tmp_path / "lora.safetensors", {"unet": {f"{layer}.weight": expected}}
    )


def test_alpha_of_kohya_s_header_counts_where_the_tensors_have_none(unet, tmp_path):
    weights = unet.state_dict()
    content, expected = {}, {}
    for layer, factor in ((Q, 2 / 4), (CONV, 3 / 4)):
        up = draw(weights[f"{layer}.weight"].shape[0], 4)
        down = draw(4, *weights[f"{layer}.weight"].shape[1:])
        stem = kohya("unet", layer)
        content |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        product = torch.tensordot(up, down, dims=1)
        expected[f"{layer}.weight"] = weights[f"{layer}.weight"] + STRENGTH * factor * product
    arguments = json.dumps({"conv_dim": "4", "conv_alpha": "3"})
    header = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_args": arguments}
    save_file(content, tmp_path / "lora.safetensors", header)
    assert_merged({"unet": weights}, tmp_path / "lora.safetensors", {"unet": expected})


def test_several_loras_are_summed_in_either_order_and_in_half_precision(unet, tmp_path):
    weights = unet.state_dict()
    halves = {name: tensor.half() for name, tensor in weights.items()}
    files, expected = [], halves[f"{Q}.weight"].double()
    for seed, scale in ((0, 0.5), (1, -1.25)):
        up, down = draw(32, 4, seed=seed).half(), draw(4, 32, seed=seed).half()
        path = tmp_path / f"{seed}.safetensors"
        save_file({f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}, path)
        files.append((path, scale))
        expected = expected + scale * up.double() @ down.double()
    for order in (files, files[::-1]):
        found = merge_loras({"unet": lazy(halves)}, order).tensors["unet"][f"{Q}.weight"].read()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
