"""`python -m qvd_jax.benchmark unet --against diffusers`: speed, side by side in one run.

Every variant lives in a process of its own, so that no two share threads; they run in turn, round
after round, and the table gives medians.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from qvd_jax.cli import command, positive_int
from qvd_jax.data.video_io import check_writable
from qvd_jax.errors import InputError
from qvd_jax.models.unet3d import UNet3DConfig, animatediff
from qvd_jax.quant.policy import named_policy

SIZES = {
    "sd15": animatediff("v2"),
    "tiny": UNet3DConfig(
        block_channels=(32, 64),
        attention_levels=(True, False),
        num_heads=(4, 4),
        temporal_heads=(4, 4),
        context_dim=32,
        norm_groups=8,
        down_eps=(1e-5, 1e-5),
        up_eps=(1e-5, 1e-5),
        temporal_mid_block=True,
    ),
}
PEERS = {"diffusers": ("diffusers", "torch")}
WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Case:
    """One forward of the UNet.

    Attributes:
      size: name of an entry of `SIZES`.
      batch: B, guidance halves included.
      frames: F.
      height: H of the latents.
      width: W of the latents.
    """

    size: str
    batch: int
    frames: int
    height: int
    width: int

    @property
    def config(self) -> UNet3DConfig:
        """The UNet's config."""
        return SIZES[self.size]

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Latents `[B, F, H, W, C]` and text `[B, L, C]`, the same for every variant."""
        rng = np.random.default_rng(0)
        shape = (self.batch, self.frames, self.height, self.width, self.config.in_channels)
        text = (self.batch, 77, self.config.context_dim)
        return (
            rng.standard_normal(shape, dtype=np.float32),
            rng.standard_normal(text, dtype=np.float32),
        )


Forward = Callable[[], None]


@dataclass(frozen=True)
class Variant:
    """One of the things that are timed against each other.

    Attributes:
      framework: of `FORWARDS`.
      dtype: of parameters and computation.
      policy: quantization policy of ours; None is float.
    """

    framework: str
    dtype: str
    policy: str | None = None

    @property
    def title(self) -> str:
        """What the table calls it."""
        return f"{self.framework} {self.policy}" if self.policy else self.framework


def qvd_jax_forward(case: Case, variant: Variant) -> Forward:
    """Our UNet with random weights, jit-compiled; temporal and text features are included."""
    import jax
    import jax.numpy as jnp

    from qvd_jax.models.layers import FLOAT
    from qvd_jax.models.unet3d import UNet3D
    from qvd_jax.quant.layers import layer_set
    from qvd_jax.quant.observers import list_layers
    from qvd_jax.quant.policy import match, named_policy

    dtype = jnp.dtype(variant.dtype)
    latents, text = (jnp.asarray(x, dtype) for x in case.inputs())
    timestep = jnp.array([500.0])
    layers = replace(FLOAT, dtype=dtype, param_dtype=dtype)
    if variant.policy:
        found = list_layers(UNet3D(case.config), latents, timestep, text)
        layers = layer_set(match(named_policy(variant.policy), found), dtype)
    module = UNet3D(case.config, layers)
    shapes = jax.eval_shape(module.init, jax.random.key(0), latents, timestep, text)
    rng = np.random.default_rng(1)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            # What four bits hold; speed does not depend on the values.
            return jnp.asarray(rng.integers(-7, 8, leaf.shape, np.int8)).astype(leaf.dtype)
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    params = jax.tree.map(random, shapes)
    forward = jax.jit(module.apply)
    return lambda: jax.block_until_ready(forward(params, latents, timestep, text))


def diffusers_forward(case: Case, variant: Variant) -> Forward:
    """Diffusers' `UNetMotionModel` with random weights, eager."""
    import torch
    from diffusers import UNetMotionModel

    config = case.config
    torch_dtype = getattr(torch, variant.dtype)
    cross = ["CrossAttn" if attention else "" for attention in config.attention_levels]
    with torch.device("meta"):
        module = UNetMotionModel(
            block_out_channels=config.block_channels,
            down_block_types=tuple(f"{name}DownBlockMotion" for name in cross),
            up_block_types=tuple(f"{name}UpBlockMotion" for name in reversed(cross)),
            norm_num_groups=config.norm_groups,
            cross_attention_dim=config.context_dim,
            num_attention_heads=config.num_heads[0],
            motion_num_attention_heads=config.temporal_heads[0],
            motion_max_seq_length=config.max_frames,
            use_motion_mid_block=config.temporal_mid_block,
        ).to(torch_dtype)
    module = module.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.normal_(0, 0.02)
    latents, text = (torch.from_numpy(x).to(torch_dtype) for x in case.inputs())
    latents = latents.permute(0, 4, 1, 2, 3).contiguous()
    text = text.repeat_interleave(case.frames, 0)

    def forward() -> None:
        with torch.inference_mode():
            module(latents, 500, text)

    return forward


FORWARDS = {"qvd_jax": qvd_jax_forward, "diffusers": diffusers_forward}


def measure(case: Case, variants: Sequence[Variant], rounds: int) -> list[dict[str, Any]]:
    """Times variants in turn.

    Args:
      case: the forward to time.
      variants: all of them are held in memory at once.
      rounds: how often each is timed.

    Returns:
      For each variant its seconds: median, least, most, and those of every round.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    try:
        for variant in variants:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, case, variant))
            worker.start()
            workers.append((worker, ours))
            _receive(ours, variant)
        seconds: list[list[float]] = [[] for _ in variants]
        total = (WARMUP_ROUNDS + rounds) * len(variants)
        with tqdm.tqdm(total=total, desc=f"unet {case.size}", unit="forward") as bar:
            for round_number in range(WARMUP_ROUNDS + rounds):
                for (_, connection), variant, spent in zip(workers, variants, seconds, strict=True):
                    connection.send("run")
                    elapsed = _receive(connection, variant)
                    if round_number >= WARMUP_ROUNDS:
                        spent.append(elapsed)
                    bar.update()
    finally:
        for worker, _ in workers:
            worker.kill()
            worker.join()
    return [
        {
            **asdict(variant),
            "median_s": statistics.median(spent),
            "min_s": min(spent),
            "max_s": max(spent),
            "rounds_s": spent,
        }
        for variant, spent in zip(variants, seconds, strict=True)
    ]


def _work(connection: Connection, case: Case, variant: Variant) -> None:
    forward = FORWARDS[variant.framework](case, variant)
    forward()
    connection.send(0.0)
    while connection.recv() == "run":
        started = time.perf_counter()
        forward()
        connection.send(time.perf_counter() - started)


def _receive(connection: Connection, variant: Variant) -> float:
    try:
        return float(connection.recv())
    except EOFError as error:
        raise InputError(f"{variant.title} ended early; its own message is above") from error


def environment() -> dict[str, Any]:
    """Hardware and versions a figure depends on."""
    packages = ("qvd_jax", "jax", "jaxlib", "flax", "numpy", "torch", "diffusers")
    found = {name: importlib.util.find_spec(name) is not None for name in packages}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name) for name, there in found.items() if there
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown; ratios are to our own float row of the same dtype."""
    ours = [r for r in results if r["framework"] == "qvd_jax" and not r["policy"]]
    base = {r["dtype"]: r["median_s"] for r in ours}
    rows = [
        "| what | dtype | median s | min-max s | time / our float |",
        "|---|---|---:|---:|---:|",
    ]
    for r in results:
        what = " ".join(filter(None, (r["framework"], r["policy"])))
        spread = f"{r['min_s']:.3f}-{r['max_s']:.3f}"
        ratio = r["median_s"] / base[r["dtype"]]
        rows.append(f"| {what} | {r['dtype']} | {r['median_s']:.3f} | {spread} | {ratio:.2f} |")
    return "\n".join(rows)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints the table, writes the JSON."""
    args = _parser().parse_args(argv)
    for peer in args.against:
        missing = [name for name in PEERS[peer] if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(
                f"--against {peer} needs {', '.join(missing)}: pip install {' '.join(PEERS[peer])}"
            )
    for policy in args.policy:
        named_policy(policy)
    if args.out:
        check_writable(args.out, overwrite=args.overwrite)
    case = Case(args.size, args.batch, args.frames, args.height // 8, args.width // 8)
    stride = 8 * case.config.stride
    if args.height % stride or args.width % stride:
        raise InputError(
            f"{args.height}x{args.width} pixels: both sides must be multiples of {stride}"
        )
    results = []
    for dtype in args.dtype:
        names = ("qvd_jax", *args.against)
        variants = [Variant(name, dtype) for name in names]
        variants += [Variant("qvd_jax", dtype, policy) for policy in args.policy]
        results += measure(case, variants, args.rounds)
    print(table(results))
    if args.out:
        record = {
            "command": f"python -m qvd_jax.benchmark {' '.join(argv or sys.argv[1:])}",
            "case": case.__dict__,
            **environment(),
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qvd_jax.benchmark", description=__doc__)
    parser.add_argument("what", choices=["unet"], help="one forward of the UNet")
    parser.add_argument("--against", nargs="+", choices=PEERS, default=[])
    parser.add_argument("--policy", nargs="+", default=[], metavar="P", help="ours, quantized")
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"],
    )
    for name, default in (("batch", 1), ("frames", 8), ("height", 128), ("width", 128)):
        parser.add_argument(f"--{name}", type=positive_int, default=default, metavar="N")
    parser.add_argument("--rounds", type=positive_int, default=9, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
