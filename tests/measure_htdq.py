"""Compares HTDQ with the quantizers of temporal features that others use, on the shapes model.

    python tests/measure_htdq.py

makes `docs/results/htdq.json`. The inputs of all `time_emb_proj` are quantized by each, at 8, 6 and
4 bits, and nothing else is; the quantizers are judged by TDScore and by what becomes of the last
latents of held-out prompts, all in one program, whose layers are given what quantization adds to
their inputs. Logarithmic codes of 6 and 8 bits need numbers that int8 does not have: all of them
are computed with in float.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import traverse_util
from flax.core import FrozenDict

import qvd_jax
from qvd_jax import markdown
from qvd_jax.environment import environment
from qvd_jax.files import write_text
from qvd_jax.models.layers import Configured, Dense
from qvd_jax.models.norms import value_of
from qvd_jax.models.unet3d import UNet3D
from qvd_jax.quant import htdq
from qvd_jax.quant.statistics import observe
from qvd_jax.shapes.judge import held_out_cases

RESULTS = Path(__file__).parent.parent / "docs/results/htdq.json"
COMMAND = "python tests/measure_htdq.py"
MODEL = "shapes"
LAYER = "time_emb_proj"
BITS = (8, 6, 4)
VIDEOS = 16
THRESHOLDS = 64


class Shifted(Dense):
    """`Dense` whose input, where it is the temporal features, gets something added."""

    @nn.compact
    def __call__(self, x, residual=None):
        """As of `Dense`."""
        if self.path[-1] == LAYER:
            x = value_of(x)
            x = x + self.param("added", nn.initializers.zeros, x.shape, x.dtype)
        return super().__call__(x, residual)


def uniform(features: np.ndarray, bits: int) -> np.ndarray:
    """One range from the lowest to the highest value."""
    return htdq.uniform_candidates(features, bits)[-1](features)


def two_ranges(features: np.ndarray, bits: int) -> np.ndarray:
    """HTDQ as this package has it."""
    return htdq.search(features, bits)(features)


def logarithmic(features: np.ndarray, bits: int) -> np.ndarray:
    """Sign and power of two: sign(x) max|x| 2^-q, q from 0 to 2^(b-1) - 1 (PaddleSlim's QVD)."""
    largest = np.abs(features).max()
    exponents = -np.log2(np.maximum(np.abs(features), np.finfo(float).tiny) / largest)
    return np.sign(features) * largest * 2.0 ** -exponents.round().clip(0, 2 ** (bits - 1) - 1)


def mixed(features: np.ndarray, bits: int) -> np.ndarray:
    """Logarithmic below a threshold and uniform above it, b - 1 bits each (PaddleSlim's QVD).

    The threshold is that of least squared error.
    """
    size, half = np.abs(features), bits - 1

    def quantized(threshold: float) -> np.ndarray:
        low = np.where(size < threshold, features, 0)
        exponents = -np.log2(np.maximum(np.abs(low), np.finfo(float).tiny) / threshold)
        low = np.sign(low) * threshold * 2.0 ** -exponents.round().clip(0, 2 ** (half - 1) - 1)
        step = (features.max() - threshold) / (2**half - 1)
        high = threshold + step * ((features - threshold) / max(step, 1e-30)).round().clip(0)
        return np.where(size < threshold, low, high)

    thresholds = size.max() * np.geomspace(1e-3, 1, THRESHOLDS)
    return min(map(quantized, thresholds), key=lambda found: np.square(found - features).sum())


QUANTIZERS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "uniform": uniform,
    "two ranges (HTDQ here)": two_ranges,
    "logarithmic": logarithmic,
    "logarithmic and uniform": mixed,
}


def main() -> int:
    pipe = qvd_jax.load(MODEL, dtype="float32")
    unet, steps = pipe.unet, pipe.defaults.steps
    timesteps = jnp.asarray(pipe.schedule(steps).table.timestep)
    variables = {"params": pipe.params["unet"]}
    _, seen = observe(unet, variables, timesteps, method="temporal_features", places=None)
    paths = [path for path in seen if path.endswith(LAYER)]
    features = np.asarray(seen[paths[0]].rows[:, 0], np.float64)
    # All of them read the same.
    assert all((np.asarray(seen[path].rows[:, 0]) == features).all() for path in paths)

    layers = replace(unet.layers, dense_cls=Configured(Shifted, FrozenDict()))
    shifted = replace(pipe, unet=UNet3D(unet.config, layers))
    inputs = held_out_cases(VIDEOS, 0).inputs

    def latents(added: np.ndarray) -> np.ndarray:
        flat = traverse_util.flatten_dict(pipe.params["unet"], sep="/")
        flat |= {f"{path}/added": jnp.asarray(added, jnp.float32) for path in paths}
        params = {**pipe.params, "unet": traverse_util.unflatten_dict(flat, sep="/")}
        made = replace(shifted, params=params)(inputs, seed=1, output_type="latents")
        return np.asarray(made, np.float64)

    exact = latents(np.zeros_like(features))
    found = []
    for bits in BITS:
        for name, quantize in tqdm.tqdm(QUANTIZERS.items(), desc=f"{bits} bits"):
            quantized = quantize(features, bits)
            noise = np.square(latents(quantized - features) - exact).sum()
            codes = np.unique(quantized, return_inverse=True)[1].reshape(features.shape)
            found.append(
                {
                    "bits": bits,
                    "quantizer": name,
                    "td_score": htdq.td_score(features, quantized),
                    "merged": htdq.merged_steps(codes),
                    "features_sqnr": sqnr(features, quantized - features),
                    "latents_sqnr": float(10 * np.log10(np.square(exact).sum() / noise)),
                }
            )
    record = {
        "command": COMMAND,
        **environment(),
        "model": MODEL,
        "steps": steps,
        "videos": VIDEOS,
        "quantizers": found,
        "table": table(found),
    }
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    print(record["table"])
    return 0


def sqnr(signal: np.ndarray, noise: np.ndarray) -> float:
    return float(10 * np.log10(np.square(signal).sum() / np.square(noise).sum()))


def table(found: list[dict]) -> str:
    rows = [
        {
            "bits": str(one["bits"]),
            "quantizer": one["quantizer"],
            "TDScore": f"{one['td_score']:.4f}",
            "merged steps": f"{one['merged']:.0%}",
            "features SQNR dB": f"{one['features_sqnr']:.1f}",
            "latents SQNR dB": f"{one['latents_sqnr']:.1f}",
        }
        for one in found
    ]
    return markdown.table(rows)


if __name__ == "__main__":
    sys.exit(main())
