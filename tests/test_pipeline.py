"""The whole pipeline: parity with diffusers' own, determinism, compilation, bad input."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from parity import relative_error

import qvd_jax
from qvd_jax import memory
from qvd_jax.diffusion import sampler
from qvd_jax.errors import InputError
from qvd_jax.memory import tree_bytes
from qvd_jax.pipelines import autoencoder

PROMPTS = ["a red circle", "a blue square moving left"]
SMALL = {"frames": 3, "height": 8, "width": 12, "steps": 2}


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return qvd_jax.load(tiny_checkpoint)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def test_latents_and_pixels_equal_diffusers_pipeline(pipe, tiny):
    """From a folder diffusers saved, same noise, 5 steps, guidance, negative prompts."""
    latents = noise(2, 5, 8, 12, 4)
    negatives = ["bad", "much worse"]
    expected = tiny[1](
        PROMPTS,
        negative_prompt=negatives,
        num_frames=5,
        height=16,
        width=24,
        num_inference_steps=5,
        guidance_scale=4.0,
        latents=torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
        output_type="latent",
    ).frames.permute(0, 2, 3, 4, 1)
    options = {"frames": 5, "height": 16, "width": 24, "steps": 5, "guidance_scale": 4.0}
    found = pipe(PROMPTS, negatives, **options, latents=latents, output_type="latents")
    assert found.dtype == np.float32
    assert relative_error(found, expected) <= 1e-3

    with torch.no_grad():
        pixels = tiny[1].decode_latents(expected.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    expected_video = (pixels / 2 + 0.5).clamp(0, 1).numpy() * 255
    video = pipe(PROMPTS, negatives, **options, latents=latents)
    assert video.dtype == np.uint8
    assert np.abs(video - expected_video).max() <= 1


def test_one_seed_gives_one_video_at_any_batch_size(pipe):
    together = pipe([*PROMPTS, PROMPTS[0]], seed=7, **SMALL)
    alone = pipe(PROMPTS[:1], seed=7, **SMALL)
    np.testing.assert_array_equal(together[:1], alone)
    assert (together[2] != together[0]).any(), "videos of one prompt differ by their index"
    third = pipe(PROMPTS[:1], seed=7, indices=[2], **SMALL)
    np.testing.assert_array_equal(together[2:], third)
    for indices in ([0, 1], [-1]):
        with pytest.raises(InputError, match=r"indices = .*: 1 of 0 to 2147483647 are needed"):
            pipe(PROMPTS[:1], indices=indices, **SMALL)
    assert (pipe(PROMPTS[:1], seed=8, **SMALL) != alone).any()


def test_sampling_survives_save_and_load(pipe, tmp_path):
    qvd_jax.save(pipe, tmp_path / "copy")
    again = qvd_jax.load(tmp_path / "copy")
    np.testing.assert_array_equal(again("one", **SMALL), pipe("one", **SMALL))


def test_one_shape_compiles_once(pipe):
    options = {**SMALL, "output_type": "latents"}
    pipe("one", guidance_scale=5.0, **options)
    compiled = len(sampler.sample_steps.known)
    pipe("two", "other", guidance_scale=3.0, seed=5, **options)
    pipe("three", latents=noise(1, 3, 4, 6, 4), **options)
    assert len(sampler.sample_steps.known) == compiled


def test_the_callback_sees_every_step_and_changes_nothing(pipe):
    seen: list[int] = []
    stepwise = pipe(
        "one",
        callback_on_step_end=lambda done, _: seen.append(done),
        output_type="latents",
        **SMALL,
    )
    whole = pipe("one", output_type="latents", **SMALL)
    assert seen == [1, 2]
    assert relative_error(stepwise, whole) <= 1e-6


def test_no_guidance_ignores_the_negative_prompt(pipe):
    options = {**SMALL, "guidance_scale": 1.0}
    np.testing.assert_array_equal(pipe("one", "a", **options), pipe("one", "b", **options))


def test_bfloat16_stays_near_float32(pipe, tiny_checkpoint):
    half = qvd_jax.load(tiny_checkpoint, dtype="bfloat16")
    options = {**SMALL, "guidance_scale": 1.0, "output_type": "latents"}
    assert relative_error(half("one", **options), pipe("one", **options)) <= 0.1


def test_decoding_in_chunks_equals_decoding_at_once(pipe, monkeypatch):
    latents = noise(2, 5, 4, 6, 4)
    whole = pipe.decode(latents)
    # As if a quarter of the memory held two and a half frames.
    needed = tree_bytes(pipe.params["vae"]) + memory.total_bytes() // 10
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: needed)
    decode, seen = autoencoder.decode_frames, []

    def spy(vae, params, part, *place):
        seen.append(part.shape[1])
        return decode(vae, params, part, *place)

    monkeypatch.setattr(autoencoder, "decode_frames", spy)
    np.testing.assert_array_equal(pipe.decode(latents), whole)
    assert seen == [2, 2, 2] * 2


def test_frames_beyond_the_positions_run_in_windows(pipe, caplog):
    """That hardly overlap, which is said, and not of windows that do."""
    short = replace(pipe, unet=replace_config(pipe, max_frames=4))
    video = short("one", frames=7, height=8, width=12, steps=1)
    assert video.shape == (1, 7, 8, 12, 3)
    assert "7 frames run in windows of 4, of which neighbors share one frame" in caplog.text
    caplog.clear()
    pipe._note_windows(pipe.window(100) * 3, replace(pipe.defaults, frames=100))
    assert not caplog.text


def replace_config(pipe, **changes):
    return pipe.unet.clone(config=replace(pipe.unet.config, **changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "there are no prompts"),
        ({"prompts": 3}, "prompts = 3: a text, or several, are needed"),
        ({"prompts": ["a", None]}, r"prompts\[1\] is no text, but of type NoneType"),
        ({"prompts": np.array([1.0, 2.0])}, r"prompts\[0\] is no text, but of type float64"),
        ({"negative_prompts": [7]}, r"negative_prompts\[0\] is no text, but of type int"),
        ({"controlnet_frame_indices": 0}, "controlnet_frame_indices = 0: a list of frames"),
        ({"controlnet_frame_indices": [0.5]}, r"indices\[0\] = 0.5: an integer is needed"),
        ({"controlnet_frame_indices": [0]}, "^controlnet_frame_indices given, but the model has"),
        ({"controlnet_conditioning_scale": 0.5}, "^controlnet_conditioning_scale given, but"),
        ({"indices": [0, 0.7]}, r"indices\[1\] = 0.7: an integer is needed"),
        ({"indices": [0, 2**31]}, r"indices = \[0, 2147483648\]: 2 of 0 to 2147483647"),
        ({"indices": [0]}, r"indices = \[0\]: 2 of 0 to"),
        ({"mesh": "data=4"}, "mesh = 'data=4': a MeshConfig is needed; qvd_jax.meshes.parse"),
        ({"frames": 0}, "frames = 0: at least one"),
        ({"height": 9}, r"height = 9: it must be a positive multiple of 2,.*such as 8 or 10"),
        ({"width": 0}, "width = 0: it must be a positive multiple"),
        ({"steps": 0}, "steps = 0: ddim takes 1 to 1000"),
        ({"steps": 1001}, "steps = 1001: ddim takes 1 to 1000"),
        ({"negative_prompts": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ({"latents": np.zeros((2, 3, 4, 5, 4))}, r"latents of shape .*\(2, 3, 4, 6, 4\) is needed"),
        ({"guidance_scale": float("nan")}, "guidance_scale = nan: it must be finite"),
        ({"frames": 2.5}, "frames = 2.5: an integer is needed"),
        ({"steps": True}, "steps = True: an integer is needed"),
        ({"guidance_scale": "7"}, "guidance_scale = '7': a number is needed"),
        ({"seed": -1}, "seed = -1: 0 to 4294967295 is needed"),
        ({"seed": 2**32}, "seed = 4294967296: 0 to 4294967295 is needed"),
        ({"seed": 2**64}, "seed = 18446744073709551616: 0 to"),
        ({"seed": 0.5}, "seed = 0.5: an integer is needed"),
        ({"output_type": "pil"}, "output_type = 'pil': it must be one of video, latents"),
    ],
)
def test_bad_arguments_are_named_before_any_work(pipe, arguments, message):
    broken = replace(pipe, params={})
    with pytest.raises(InputError, match=message):
        broken(**{"prompts": PROMPTS, **SMALL, **arguments})


def test_a_text_that_is_not_finite_is_named_before_the_first_step(pipe):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, pipe.params["text_encoder"])
    with pytest.raises(InputError, match="context: what the encoders gave the UNet is not finite"):
        replace(pipe, params={"text_encoder": broken})("one", **SMALL)


def test_a_step_that_is_not_finite_is_named(pipe):
    latents = np.full((1, 3, 4, 6, 4), np.inf, np.float32)
    with pytest.raises(InputError, match=r"step 1 of 2 \(timestep 501\) gave .* not finite"):
        pipe("one", latents=latents, **SMALL)
