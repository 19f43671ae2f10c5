"""The names of published models at full size are exactly ours, from shapes alone."""

import re

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNetMotionModel
from pytorch_sources import original_names
from transformers import CLIPTextConfig, CLIPTextModel

import qvd_jax
from convert import animatediff, companions, names, positions
from convert.tensors import LazyTensor, Tensors
from qvd_jax.errors import InputError
from qvd_jax.pipelines.components import ComponentConfigs


def meta_shapes(module: type, *arguments: object, **options: object) -> tuple[Tensors, object]:
    """A PyTorch module's tensors by name, without memory behind them, and its config."""
    with torch.device("meta"):
        built = module(*arguments, **options)

    def unreadable() -> np.ndarray:
        raise AssertionError("names and shapes alone must do")

    tensors = {
        name: LazyTensor(tuple(tensor.shape), unreadable)
        for name, tensor in built.state_dict().items()
    }
    return tensors, built.config


VIT_L = {"num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "quick_gelu"}
OPENCLIP_H = {"num_attention_heads": 16, "intermediate_size": 4096, "hidden_act": "gelu"}


@pytest.mark.parametrize(
    ("frames", "mid_block", "unet_total", "width", "depth", "text", "text_total"),
    [
        pytest.param(24, False, 1_276_658_564, 768, 12, VIT_L, 123_060_480, id="v1, ViT-L"),
        pytest.param(32, True, 1_312_730_244, 1024, 23, OPENCLIP_H, 340_387_840, id="v2, ViT-H"),
        pytest.param(32, False, 1_276_658_564, 768, 12, VIT_L, 123_060_480, id="v3, ViT-L"),
    ],
)
def test_names_of_published_models_are_exactly_ours_at_full_size(
    frames, mid_block, unet_total, width, depth, text, text_total
):
    tensors, config = {}, {}
    tensors["unet"], config["unet"] = meta_shapes(
        UNetMotionModel,
        cross_attention_dim=768,
        use_motion_mid_block=mid_block,
        motion_max_seq_length=frames,
    )
    tensors["vae"], config["vae"] = meta_shapes(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    tensors["text_encoder"], text_config = meta_shapes(
        CLIPTextModel, CLIPTextConfig(hidden_size=width, num_hidden_layers=depth, **text)
    )
    configs = ComponentConfigs(
        unet=animatediff.unet_config(
            tensors["unet"], config["unet"], None, original_norms=False, where="unet"
        )[0],
        vae=companions.vae_config(tensors["vae"], config["vae"], "vae")[0],
        text_encoder=companions.text_config(
            tensors["text_encoder"], text_config.to_dict(), "text_encoder"
        )[0],
    )
    version = "v2" if mid_block else "v1" if frames == 24 else "v3"
    assert configs.unet == qvd_jax.models.configs.animatediff(version)
    motion = {name for name in tensors["unet"] if ".motion_modules." in name}
    original = {old for name in motion for old in original_names(name)}
    original |= tensors["unet"].keys() - motion
    # mm_*.ckpt, and MagicAnimate's temporal_attention.ckpt, which has the whole UNet.
    for prefix in ("", "module."):
        renamed = {animatediff.rename_original(f"{prefix}{name}"): None for name in original}
        assert len(renamed) == len(original)
        own = positions.without(tensors["unet"])
        assert positions.without(renamed).keys() == own.keys()
    tensors["unet"] = positions.without(tensors["unet"])
    shapes = configs.param_shapes("float32")
    maps = {"unet": names.UNET, "vae": names.VAE, "text_encoder": names.CLIP_TEXT}
    totals = {"unet": unet_total, "vae": 83_653_863, "text_encoder": text_total}
    for name, total in totals.items():
        names.check_names(shapes[name], maps[name], tensors[name], name)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes[name])) == total

        kernels = [key for key in tensors[name] if re.search(r"(conv1|fc1)\.weight$", key)]
        lost, turned = kernels[0], kernels[-1]
        broken = {key: tensor for key, tensor in tensors[name].items() if key != lost}
        shape = (1, *tensors[name][turned].shape)
        broken |= {"odd.weight": LazyTensor((7,), None), turned: LazyTensor(shape, None)}
        with pytest.raises(InputError, match=rf"^{name} does not fit \(3 tensors; ") as error:
            names.check_names(shapes[name], maps[name], broken, name)
        lines = [line.split()[:2] for line in str(error.value).splitlines()[1:]]
        assert sorted(lines) == sorted([["-", lost], ["+", "odd.weight"], ["!", turned]])
