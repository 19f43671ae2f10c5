"""What formulations of int8 convolutions and of attention move through an H200's memory.

    python tests/measure_cuda.py --target h200.txtpb --out docs/results/formulations_h200.json

compiles them with CUDA's own compiler on a machine without a GPU (jax-cuda12-plugin and the wheels
of nvcc, nvrtc, nvjitlink and cuDNN): nothing is run. The target is XLA's description of the GPU, a
`GpuTargetConfigProto`. Bytes are those each kernel of the optimized program reads and writes, once
each, as if no cache held them between kernels; temporaries are the compiler's. A convolution
stands between what makes its codes of bfloat16 and what makes bfloat16 of its sums.
"""

import argparse
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qvd_jax import markdown
from qvd_jax.environment import environment, version
from qvd_jax.kernels import attention_cuda, int8
from qvd_jax.kernels.patches import taps

ONE = ((1, 1), (1, 1))
CONVS = {
    "64x64x320": ((32, 64, 64, 320), (3, 3), (1, 1), ONE),
    "32x32x640": ((32, 32, 32, 640), (3, 3), (1, 1), ONE),
    "16x16x1280": ((32, 16, 16, 1280), (3, 3), (1, 1), ONE),
    "8x8x1280": ((32, 8, 8, 1280), (3, 3), (1, 1), ONE),
    "64x64x320, stride 2": ((32, 64, 64, 320), (3, 3), (2, 2), ONE),
    "32x32x640, upsampled": ((32, 64, 64, 640), (3, 3), (1, 1), ONE),
    "16x64x64x320, over time": (
        (2, 16, 4096, 1, 320),
        (3, 1, 1),
        (1,) * 3,
        ((1, 1), *[(0, 0)] * 2),
    ),
}
"""Inputs `[B, *spatial, C]`, kernel, strides and padding: 16 frames of 512x512, guidance."""

ATTENTIONS = {
    "32 x 4096, 4096 keys, 8 of 40": (32, 4096, 4096, 8, 40),
    "32 x 1024, 1024 keys, 8 of 80": (32, 1024, 1024, 8, 80),
    "2 x 65536, 77 keys, 8 of 40": (2, 65536, 77, 8, 40),
    "8192 x 16, 16 keys, 8 of 40": (8192, 16, 16, 8, 40),
    "16 x 4096, 4096 keys, 1 of 512": (16, 4096, 4096, 1, 512),
}
"""Sequences, queries, keys, heads and their width, of bfloat16."""

FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
SLICES = {"slice", "dynamic-slice"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    target = args.target.read_text(encoding="utf-8")
    topology = get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=target
    )
    sharding = NamedSharding(Mesh(np.array(topology.devices), ("chip",)), PartitionSpec())
    cases = {name: conv_formulations(*conv) for name, conv in CONVS.items()}
    cases |= {name: attention_formulations(*shape) for name, shape in ATTENTIONS.items()}
    rows, results = [], []
    for case, formulations in cases.items():
        row = {"shape": case}
        for name, (function, arguments) in formulations.items():
            found = compiled(function, arguments, sharding)
            results.append({"shape": case, "formulation": name, **found})
            both = (found[key] / 1e9 for key in ("bytes_moved", "temporary_bytes"))
            row[name] = "{:.2f}, {:.2f}".format(*both)
        rows.append(row)
    convolutions, attentions = rows[: len(CONVS)], rows[len(CONVS) :]
    record = {
        "command": "python tests/measure_cuda.py --target h200.txtpb --out " + str(args.out),
        **environment(),
        "compiled for, not run on": topology.devices[0].device_kind,
        "jax-cuda12-plugin": version("jax-cuda12-plugin"),
        "nvidia-cudnn-cu12": version("nvidia-cudnn-cu12"),
        "results": results,
        "table": f"{markdown.table(convolutions)}\n\n{markdown.table(attentions)}",
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(record["table"])


def conv_formulations(inputs, kernel, strides, padding) -> dict[str, Any]:
    channels = inputs[-1]
    per_channel = jax.ShapeDtypeStruct((channels,), jnp.float32)
    arguments = (
        jax.ShapeDtypeStruct(inputs, jnp.bfloat16),
        jax.ShapeDtypeStruct((channels, *kernel, channels), jnp.int8),
        jax.ShapeDtypeStruct((channels,), jnp.int32),
        *[per_channel] * 4,
    )

    def surrounded(convolve: Callable[..., Any]) -> Callable[..., Any]:
        def run(x, weights, sums, in_scale, in_offset, scale, bias):
            codes = jnp.clip(x.astype(jnp.float32) * in_scale + in_offset, -127, 127)
            product = convolve(jnp.round(codes).astype(jnp.int8), weights, sums)
            return (product.astype(jnp.float32) * scale + bias).astype(jnp.bfloat16)

        return run

    def ours(codes, weights, sums, name):
        return int8.conv(codes, weights, sums, strides, padding, name)

    def by_taps(codes, weights, sums):
        each = weights.reshape(channels, -1, channels)
        seen = enumerate(taps(codes, kernel, strides, padding))
        products = (int8.dot(tap, each[:, i], sums, "signed") for i, tap in seen)
        return functools.reduce(jnp.add, products)

    def library(codes, weights, sums):
        return int8.xla_conv(codes, weights, strides, padding).astype(jnp.float32)

    found = {
        "patches": functools.partial(ours, name="signed patches"),
        "rows": functools.partial(ours, name="signed rows"),
        "a product for each tap": by_taps,
        "cuDNN to float32": library,
    }
    return {name: (surrounded(convolve), arguments) for name, convolve in found.items()}


def attention_formulations(batch, queries, keys, heads, width) -> dict[str, Any]:
    arguments = [
        jax.ShapeDtypeStruct((batch, length, heads, width), jnp.bfloat16)
        for length in (queries, keys, keys)
    ]

    def blocks_of(size: int) -> Callable[..., Any]:
        def run(*inputs):
            attention_cuda._BLOCK_BYTES = size
            return attention_cuda.attention_in_blocks(*inputs)

        return run

    found = {f"blocks of {size // 2**20} MiB": blocks_of(size) for size in (2**26, 2**28, 2**30)}
    if attention_cuda.can_use_cudnn(*arguments):
        found = {"cuDNN": attention_cuda.attention, **found}
    if keys % 256 == 0:
        found["scan over 256 keys"] = scan_over_keys
    return {name: (function, arguments) for name, function in found.items()}


def scan_over_keys(q, k, v):
    """With running maxima and sums: Milakov & Gimelshein, arXiv 1805.02867, algorithm 3."""
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    q = jnp.swapaxes(q, 1, 2) * (1 / math.sqrt(q.shape[-1]))
    blocks = [
        jnp.moveaxis(x.reshape(*x.shape[:2], -1, 256, x.shape[-1]), 2, 0) for x in heads_first
    ]

    def step(carried, block):
        largest, total, out = carried
        k, v = block
        logits = jnp.einsum("bhld,bhmd->bhlm", q, k, preferred_element_type=jnp.float32)
        larger = jnp.maximum(largest, logits.max(-1, keepdims=True))
        weights, kept = jnp.exp(logits - larger), jnp.exp(largest - larger)
        more = jnp.einsum(
            "bhlm,bhmd->bhld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (larger, total * kept + weights.sum(-1, keepdims=True), out * kept + more), None

    column = jnp.zeros((*q.shape[:3], 1))
    initial = (column - jnp.inf, column, jnp.zeros(q.shape))
    (_, total, out), _ = lax.scan(step, initial, blocks)
    return jnp.swapaxes(out / total, 1, 2).astype(q.dtype)


def compiled(function, arguments, sharding) -> dict[str, int]:
    lowered = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*arguments)
    # Autotuning would need the GPU.
    program = lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
    return {
        "bytes_moved": bytes_moved(program.as_text()),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def bytes_moved(text: str) -> int:
    """What all kernels of an optimized program read and write; of a slice, its own size."""
    computations, lines, entry = {}, {}, ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$", line):
            name, shape, opcode, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])
            lines[name] = (array_bytes(shape), opcode, operands, rest)

    def read_of(fused, name):
        total = 0
        for user, (size, opcode, operands, _) in fused.items():
            if name in operands:
                if opcode == "bitcast":
                    total += read_of(fused, user)
                elif opcode in SLICES:
                    total += size
                elif opcode != "dynamic-update-slice" or operands[0] != name:
                    return fused[name][0]
        return min(total, fused[name][0])

    def total(computation):
        lines, moved = computations[computation], 0
        for written, opcode, operands, rest in lines.values():
            called = re.search(r"(?:body|calls|to_apply)=%?([\w.\-]+)", rest)
            if opcode == "while":
                moved += int(re.search(r'known_trip_count":\{"n":"(\d+)', rest)[1]) * total(
                    called[1]
                )
            elif opcode == "call":
                moved += total(called[1])
            elif opcode == "fusion":
                fused = computations[called[1]]
                updates = [
                    fused[names[1]][0]
                    for _, kind, names, _ in fused.values()
                    if kind == "dynamic-update-slice"
                ]
                parameters = [name for name, line in fused.items() if line[1] == "parameter"]
                moved += sum(read_of(fused, name) for name in parameters)
                moved += min([written, *updates])
            elif opcode not in FREE:
                moved += written + sum(lines[name][0] for name in operands if name in lines)
        return moved

    return total(entry)


def array_bytes(shape: str) -> int:
    bits = 0
    for element, sizes in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", shape):
        width = re.search(r"\d+", element)
        bits += (int(width[0]) if width else 8) * math.prod(
            map(int, filter(None, sizes.split(",")))
        )
    return bits // 8


if __name__ == "__main__":
    main()
