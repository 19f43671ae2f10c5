"""`python -m qvd_jax.benchmark unet --against diffusers`: speed and memory, side by side."""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qvd_jax import meshes
from qvd_jax.benchmarks import (
    chips,
    compiled,
    growth,
    parts,
    peers,
    products,
    profile,
    rounds,
    sampling,
    unet,
)
from qvd_jax.benchmarks.rounds import Variant, in_fresh_process
from qvd_jax.cli.command import command, command_line, make_parser, positive_int
from qvd_jax.cli.videos import add_size_arguments
from qvd_jax.environment import environment, version
from qvd_jax.errors import InputError
from qvd_jax.files import check_writable, write_bytes, write_text
from qvd_jax.meshes import MeshConfig
from qvd_jax.pipelines.components import DTYPES, latents_size
from qvd_jax.pipelines.loading import read_configs
from qvd_jax.quant.policy import read_policy

_VAE_STRIDE = 8
"""Of the published models, whose UNets are measured without a VAE."""

_OF_ANIMATEDIFF, _OF_SVD, _SMALL = (16, 512, 512), (25, 576, 1024), (8, 128, 128)
"""Frames, height and width of a video: of the published models, and what a CPU runs soon."""


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints the table, writes the JSON."""
    args = _parser().parse_args(argv)
    # Several processes share an accelerator, this one among them.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for path in (args.out, vars(args).get("plot")):
        if path:
            check_writable(path, overwrite=args.overwrite)
    case, results, shown = MEASUREMENTS[args.what](args)
    print(shown)
    if args.out:
        record = {
            "command": command_line("qvd_jax.benchmark", argv),
            "case": asdict(case),
            **environment(_modelled_device(args)),
            "results": results,
            "table": shown,
        }
        write_text(args.out, json.dumps(record, indent=2) + "\n")


Measured = tuple[unet.Case | sampling.SampleCase, list[dict[str, Any]], str]
"""The case, the results, and the table that shows them."""


def measure_products(args: argparse.Namespace) -> Measured:
    """Every formulation of every product."""
    case = _unet_case(args)
    in_fresh_process("the estimate", products.check_fits, case)
    results = products.time_formulations(case)
    return case, results, products.speeds_table(results)


def measure_unet(args: argparse.Namespace) -> Measured:
    """One forward of the UNet, beside the peers'."""
    against = {name: args.against[name] for name in installed([*args.against])}
    case, variants = _unet_variants(args, against)
    results = rounds.time_in_turn(
        {unet.OURS: unet.build, **peers.BUILDS}, case, variants, args.rounds
    )
    return case, results, rounds.times_table(results, variants[0])


def measure_profile(args: argparse.Namespace) -> Measured:
    """Where the time of one forward goes."""
    case, variants = _unet_variants(args)
    results = profile.profile_forwards(case, variants)
    return case, results, profile.shares_table(results)


def measure_compiled(args: argparse.Namespace) -> Measured:
    """What a chip's compiler makes of one forward and its parts."""
    case = _unet_case(args)
    mesh = MeshConfig() if args.mesh is None else meshes.parse(args.mesh)
    target = compiled.Target(chips.find(args.chip), mesh)
    names = list(dict.fromkeys(args.part))
    for name in names:
        parts.check(name, case.config)
    for policy in args.policy:
        read_policy(policy)
    variants = unet_variants(args.dtype, args.policy, {})
    results = compiled.compile_programs(case, target, names, variants)
    return case, results, compiled.programs_table(results)


def measure_sample(args: argparse.Namespace) -> Measured:
    """Whole videos: start-up and time."""
    case, variants = _sample_case(args)
    in_fresh_process("the estimate", sampling.check_fits, [case], [variants])
    starts = sampling.measure_start(case, variants)
    timed = rounds.time_in_turn({unet.OURS: sampling.build}, case, variants, args.rounds)
    results = [{**start, **spent} for start, spent in zip(starts, timed, strict=True)]
    shown = f"{sampling.start_table(starts)}\n\n{rounds.times_table(timed, variants[0])}"
    return case, results, shown


def measure_memory(args: argparse.Namespace) -> Measured:
    """Peak memory of loading and sampling."""
    case, variants = _sample_case(args)
    case = replace(case, steps=max(sampling.MEMORY_STEPS))
    in_fresh_process("the estimate", sampling.check_fits, [case], [[v] for v in variants])
    results = sampling.measure_peaks(case, variants)
    return case, results, sampling.memory_table(results)


def measure_growth(args: argparse.Namespace) -> Measured:
    """Time and peak memory as frames, size and videos grow."""
    case, variants = _sample_case(args)
    grown = list(dict.fromkeys(grown for _, _, grown in growth.cases(case)))
    in_fresh_process("the estimate", sampling.check_fits, grown, [[v] for v in variants])
    results = growth.measure_costs(case, variants)
    picture = growth.plot(results)
    write_bytes(args.plot, picture)
    return case, results, growth.costs_table(results)


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "products": measure_products,
    "unet": measure_unet,
    "profile": measure_profile,
    "compiled": measure_compiled,
    "sample": measure_sample,
    "memory": measure_memory,
    "growth": measure_growth,
}


def _modelled_device(args: argparse.Namespace) -> str | None:
    return f"{args.chip}, compiled for, not run" if args.what == "compiled" else None


def _unet_case(args: argparse.Namespace) -> unet.Case:
    usual = _SMALL
    if args.what == "compiled":
        usual = _OF_SVD if args.size == "svd" else _OF_ANIMATEDIFF
    given = args.frames, args.height, args.width
    frames, height, width = (asked or size for asked, size in zip(given, usual, strict=True))
    case = unet.Case(args.size, args.batch, frames, *latents_size(height, width, _VAE_STRIDE))
    limit = case.config.max_frames or frames
    if frames > limit:
        raise InputError(f"--frames {frames}: the UNet takes at most {limit} at once")
    return case


def _unet_variants(
    args: argparse.Namespace, against: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> tuple[unet.Case, list[Variant]]:
    """The case, and what is measured of it: ours, then the peers'."""
    case = _unet_case(args)
    peers.check(against, case)
    for policy in args.policy:
        read_policy(policy)
    variants = unet_variants(args.dtype, args.policy, against)
    in_fresh_process("the estimate", unet.check_fits, case, variants)
    return case, variants


def _sample_case(args: argparse.Namespace) -> tuple[sampling.SampleCase, list[Variant]]:
    configs = read_configs(args.checkpoint[0])
    defaults = configs.defaults
    case = sampling.SampleCase(
        videos=vars(args).get("batch", 1),
        steps=vars(args).get("steps") or defaults.steps,
        frames=args.frames or defaults.frames,
        height=args.height or defaults.height,
        width=args.width or defaults.width,
    )
    configs.components.latents_shape(case.frames, case.height, case.width)
    variants = itertools.product([unet.OURS], args.checkpoint, args.dtype)
    return case, list(dict.fromkeys(itertools.starmap(Variant, variants)))


def installed(names: Sequence[str]) -> list[str]:
    """Those of the peers whose packages are there; of the others it prints what would install them.

    Raises:
      InputError: none of several is there.
    """
    found = []
    for name in names:
        missing = [pkg for pkg in peers.REQUIRED[name] if version(pkg) is None]
        if missing:
            print(f"{name} is left out: pip install {' '.join(missing)}", file=sys.stderr)
        else:
            found.append(name)
    if names and not found:
        raise InputError(f"none of {', '.join(names)} is installed")
    return found


def unet_variants(
    dtypes: Sequence[str], policies: Sequence[str], against: Mapping[str, Sequence[str]]
) -> list[Variant]:
    """Ours, and the given modes of the peers, in every dtype."""
    modes = {unet.OURS: (unet.FLOAT_MODE, *policies), **against}
    return list(
        dict.fromkeys(
            Variant(framework, mode, dtype)
            for framework, names in modes.items()
            for mode in names
            for dtype in dtypes
        )
    )


def _peers(text: str) -> dict[str, tuple[str, ...]]:
    """Modes by peer, from "torchao,diffusers:eager"; without a mode it is all of them."""
    found: dict[str, tuple[str, ...]] = {}
    for entry in text.split(","):
        name, _, mode = entry.partition(":")
        if name not in peers.BUILDS:
            known = ", ".join(peers.BUILDS)
            raise argparse.ArgumentTypeError(f"{name!r} is no peer; {known} are")
        if mode and mode not in peers.MODES[name]:
            known = ", ".join(map(repr, peers.MODES[name]))
            raise argparse.ArgumentTypeError(f"{mode!r} is no mode of {name}, but {known}")
        found[name] = (*found.get(name, ()), *([mode] if mode else peers.MODES[name]))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("qvd_jax.benchmark", __doc__)
    what = parser.add_subparsers(dest="what", required=True)
    parsers = {
        "products": what.add_parser("products", help="every formulation of every product by shape"),
        "unet": what.add_parser("unet", help="one forward of the UNet, beside the peers'"),
        "profile": what.add_parser("profile", help="where the time of one forward goes"),
        "compiled": what.add_parser("compiled", help="what a chip's compiler models, without one"),
        "sample": what.add_parser("sample", help="whole videos: start-up and time"),
        "memory": what.add_parser("memory", help="peak memory of loading and sampling"),
        "growth": what.add_parser("growth", help="cost by frames, size and number of videos"),
    }
    for name, one in parsers.items():
        of_unet = name in ("products", "unet", "profile", "compiled")
        counted = "videos, guidance halves counted" if of_unet else "videos"
        if name != "growth":
            batch = 2 if name == "compiled" else 1
            one.add_argument("--batch", type=positive_int, default=batch, metavar="B", help=counted)
        add_size_arguments(one)
        if of_unet:
            one.add_argument(
                "--size", choices=unet.SIZES, default="sd15", help="the UNet (%(default)s)"
            )
        else:
            one.add_argument(
                "--checkpoint", nargs="+", default=["shapes"], metavar="DIR|NAME", help="(shapes)"
            )
        if name != "products":
            taken = ["bfloat16"] if name == "compiled" else list(DTYPES)
            one.add_argument(
                "--dtype", nargs="+", choices=DTYPES, default=taken, help=f"({' and '.join(taken)})"
            )
        if name == "compiled":
            one.add_argument(
                "--chip",
                required=True,
                metavar="C[:NxN]",
                help=f"{', '.join(chips.CHIPS)}, or several such as v5e:2x4",
            )
            one.add_argument(
                "--mesh", metavar="data=N,guidance=N,frame=N", help="how several share the work"
            )
            one.add_argument(
                "--part",
                nargs="+",
                default=[parts.UNET],
                metavar="P",
                help=f"{parts.UNET}, {parts.VAE}, or LEVEL.KIND such as 0.spatial (%(default)s)",
            )
        if name == "unet":
            one.add_argument(
                "--against",
                type=_peers,
                default={},
                metavar="PEER[:MODE],...",
                help=f"{', '.join(peers.BUILDS)}, timed in turn with ours",
            )
        if name in ("unet", "profile", "compiled"):
            one.add_argument(
                "--policy",
                nargs="+",
                default=[],
                metavar="P",
                help="ours, quantized: names or files of policies",
            )
        if name == "growth":
            one.add_argument(
                "--plot", type=Path, required=True, metavar="FILE.png", help="the curves"
            )
        if name in ("sample", "growth"):
            one.add_argument(
                "--steps", type=positive_int, metavar="N", help="(the first checkpoint's)"
            )
        if name in ("unet", "sample"):
            one.add_argument(
                "--rounds", type=positive_int, default=9, metavar="N", help="(%(default)s)"
            )
        one.add_argument("--out", type=Path, metavar="FILE.json", help="the figures and the table")
        one.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
