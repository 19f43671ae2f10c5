"""Float parity of the VAEs and of CLIP's towers with PyTorch, on shared random weights."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from diffusers import AutoencoderKLTemporalDecoder
from parity import (
    BATCH,
    FRAMES,
    TOLERANCE,
    from_torch,
    params_of,
    relative_error,
    tensors_of,
    to_torch,
    video,
)
from random_animatediff import randomize
from transformers import CLIPTextConfig as TorchCLIPConfig
from transformers import CLIPTextModel, CLIPVisionModelWithProjection
from transformers import CLIPVisionConfig as TorchCLIPVisionConfig

from convert import names
from convert.companions import rename_text, text_config, vae_config, vision_config
from qvd_jax.models.clip import OPENCLIP_H, CLIPTextConfig, CLIPTextEncoder, CLIPVisionEncoder
from qvd_jax.models.vae import AutoencoderKL

pytestmark = pytest.mark.usefixtures("torch_seeded")


@pytest.mark.parametrize("size", [(16, 24), (8, 40)])
def test_vae_encodes_and_decodes(size):
    vae = TorchVAE(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=8,
    )
    randomize(vae)
    tensors = tensors_of(vae)
    module = AutoencoderKL(vae_config(tensors, vae.config, "vae")[0])
    pixels = video(BATCH, FRAMES, *size, 3)
    variables = params_of(names.VAE, tensors, module, pixels)
    posterior = vae.encode(to_torch(pixels)).latent_dist
    mean, log_variance = jax.jit(lambda v, x: module.apply(v, x, method="encode"))(
        variables, pixels
    )
    assert relative_error(mean, from_torch(posterior.mean)) <= TOLERANCE
    assert relative_error(log_variance, from_torch(posterior.logvar)) <= TOLERANCE
    latents = video(BATCH, FRAMES, size[0] // 4, size[1] // 4, 4)
    decoded = jax.jit(lambda v, x: module.apply(v, x, method="decode"))(variables, latents)
    assert relative_error(decoded, from_torch(vae.decode(to_torch(latents)).sample)) <= TOLERANCE


def test_temporal_vae_decodes():
    """SVD's decoder: blended resnets, other epsilons, a convolution over the frames at the end."""
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=2,
    ).eval()
    randomize(vae)
    tensors = tensors_of(vae)
    module = AutoencoderKL(vae_config(tensors, vae.config, "vae")[0])
    pixels, latents = video(1, 1, 8, 12, 3), video(BATCH, FRAMES, 4, 6, 4)
    variables = params_of(names.VAE, tensors, module, pixels)
    mean, _ = module.apply(variables, pixels, method="encode")
    posterior = vae.encode(to_torch(pixels)).latent_dist
    assert relative_error(mean, from_torch(posterior.mode(), 1)) <= TOLERANCE
    decoded = jax.jit(lambda v, x: module.apply(v, x, method="decode"))(variables, latents)
    expected = vae.decode(to_torch(latents), num_frames=FRAMES).sample
    assert relative_error(decoded, from_torch(expected)) <= TOLERANCE


def test_clip_vision():
    tower = CLIPVisionModelWithProjection(
        TorchCLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=16,
            image_size=28,
            patch_size=14,
            projection_dim=24,
            hidden_act="gelu",
        )
    ).eval()
    randomize(tower)
    tensors = tensors_of(tower)
    module = CLIPVisionEncoder(vision_config(tensors, tower.config.to_dict(), "tower")[0])
    pixels = video(BATCH, 28, 28, 3)
    variables = params_of(names.CLIP_VISION, tensors, module, pixels)
    expected = tower(torch.from_numpy(pixels).permute(0, 3, 1, 2)).image_embeds
    assert relative_error(module.apply(variables, pixels), expected) <= TOLERANCE


@pytest.mark.parametrize("published", [CLIPTextConfig(), OPENCLIP_H], ids=["vit-l", "openclip-h"])
def test_clip_text(published):
    """At the published activation, depth and number of heads, with narrow layers."""
    text = CLIPTextModel(
        TorchCLIPConfig(
            vocab_size=100,
            hidden_size=4 * published.num_heads,
            intermediate_size=96,
            num_hidden_layers=published.num_layers,
            num_attention_heads=published.num_heads,
            max_position_embeddings=77,
            hidden_act=published.activation,
            eos_token_id=99,
            bos_token_id=98,
        )
    ).eval()
    randomize(text)
    tensors = rename_text(tensors_of(text))
    config, _ = text_config(tensors, text.config.to_dict(), "text_encoder")
    assert (config.num_layers, config.activation) == (published.num_layers, published.activation)
    module = CLIPTextEncoder(config)
    ids = np.random.default_rng(0).integers(0, 100, (3, 77))
    variables = params_of(names.CLIP_TEXT, tensors, module, ids)
    expected = text(torch.from_numpy(ids)).last_hidden_state
    found = jax.jit(module.apply)(variables, ids)
    assert relative_error(found, expected) <= TOLERANCE
