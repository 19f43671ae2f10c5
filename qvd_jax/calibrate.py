"""`python -m qvd_jax.calibrate --checkpoint DIR --out DIR`: a float checkpoint becomes int8."""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from qvd_jax import checkpoint, evaluation, memory
from qvd_jax.cli.command import command, make_parser, passed, positive_int, restoring, seed_int
from qvd_jax.cli.control import read_control
from qvd_jax.cli.hosts import add_host_arguments, compare, joined
from qvd_jax.cli.inputs import add_input_arguments, note_unknown_words, read_inputs
from qvd_jax.cli.mesh import add_mesh_argument, asked_mesh
from qvd_jax.cli.videos import (
    add_sampler_arguments,
    add_size_arguments,
    asked_scheduler,
    check_videos,
)
from qvd_jax.errors import InputError
from qvd_jax.evaluation.page import PAGE
from qvd_jax.files import check_apart, check_folder, check_spared, write_folder
from qvd_jax.hosts import Hosts
from qvd_jax.pipelines.loading import load, read_configs, save
from qvd_jax.pipelines.observation import CalibrationConfig, collect
from qvd_jax.pipelines.quantization import Plan, make_plan, solve
from qvd_jax.pipelines.sensitivity import BEFORE_LAYERS, probed_inputs, with_widths
from qvd_jax.pipelines.widths import (
    Target,
    check_budget,
    choose_widths,
    held_bytes,
    unet_sizes,
)
from qvd_jax.progress import Part, Progress
from qvd_jax.quant.policy import (
    METHODS,
    WIDTHS,
    Quantization,
    match_table,
    read_policy,
)
from qvd_jax.quant.scri import CLIP_CANDIDATES, RANGE_CANDIDATES, SEARCH_ROUNDS
from qvd_jax.quant.solve import SEARCHED_ROWS

# The search of one layer's ranges compiles about as long as so many layers of the network.
_SOLVER_LAYERS = 14


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, calibrates, writes the checkpoint, prints its size."""
    args = _parser().parse_args(argv)
    with joined(args, "run the same again on all hosts") as hosts:
        if hosts.first:
            check_outputs(args)
        calibrate(args, hosts, restoring(argv))


def check_outputs(args: argparse.Namespace) -> None:
    """Makes sure that the checkpoint and the report can be written.

    Raises:
      InputError: something is there already, or a place is not writable.
    """
    checkpoint.check_replaceable(args.out, overwrite=args.overwrite)
    outputs = {"--out": args.out}
    if args.report:
        check_folder(args.report, PAGE, overwrite=args.overwrite)
        outputs["--report"] = args.report
    check_apart(outputs)
    for name, folder in outputs.items():
        check_spared(name, folder, [checkpoint.find(args.checkpoint)])


def calibrate(
    args: argparse.Namespace, hosts: Hosts, restoring: contextlib.AbstractContextManager[None]
) -> None:
    """Calibrates with the inputs shared out over the hosts, of which the first writes the results.

    Args:
      args: the command line.
      hosts: which run it.
      restoring: the context to load the checkpoint in.
    """
    policy, target = read_policy(args.policy), asked_target(args, hosts)
    source = checkpoint.find(args.checkpoint)
    if read_configs(source).quantization is not None:
        raise InputError(f"{source} is quantized already; calibrate needs a float checkpoint")
    want = check_videos([args.checkpoint], args, args.checkpoint, **asked_scheduler(args))
    inputs, control = read_inputs(args, source), read_control(args, source)
    mesh = asked_mesh(args, [args.checkpoint], want)
    compare(hosts, args, [args.checkpoint], inputs, control)
    with restoring:
        pipe = load(source).with_scheduler(**asked_scheduler(args))
    note_unknown_words(pipe, inputs.names)
    options = {**passed(args, "frames", "height", "width"), **control}
    config = CalibrationConfig(args.steps, args.samples, args.seed, args.step_aware)
    plan = make_plan(pipe, policy, config, options)
    print(match_table(policy, list(plan.layers.values())))
    if plan.propagates and hosts.count > 1:
        raise InputError(
            f"policy {policy.name!r} solves layers on what they see behind quantized ones "
            f"(propagate), which one host alone can sample; run it on one"
        )
    widths: list[int] = []
    largest = plan.specs
    if target is not None:
        sizes = unet_sizes(pipe, plan, config)
        check_budget(target, plan, sizes)
        widths = sizes.widths
        largest = with_widths(plan, dict.fromkeys(plan.specs, widths[-1])).specs
    planned = Quantization(policy.name, largest)
    expected = pipe.configs.param_shapes(pipe.vae.layers.dtype, planned)
    if hosts.first:
        checkpoint.check_space(args.out.parent, memory.tree_bytes(expected))

    started = time.perf_counter()
    steps, count = args.steps or pipe.defaults.steps, len(hosts.share(inputs.values))
    parts = parts_of(plan, steps, count, args.samples, widths)
    ticks = {
        "sampling": steps,
        "observing": steps * count,
        "rounding": len(widths) * len(plan.specs),
        "measuring": (BEFORE_LAYERS + len(plan.specs)) * bool(widths),
        "layers": len(plan.specs),
        "sampling again": steps,
        "observing again": steps * count,
        "layers again": len(plan.specs),
    }
    done_before = dict(zip(ticks, itertools.accumulate(ticks.values(), initial=0), strict=False))
    with Progress(parts if hosts.first else parts[:2]) as progress:

        def report(what: str, done: int, _: int) -> None:
            progress.advance(done_before[what] + done)

        observed = collect(pipe, plan.layers, inputs.values, config, options, report, hosts, mesh)
        if not hosts.first:
            return
        given = inputs.values, config, options, report, mesh
        if target is None:
            chosen = plan
        else:
            chosen, table = choose_widths(pipe, plan, observed, target, *given)
            progress.print(table)
        quantized, reports = solve(pipe, chosen, observed, *given)
    assert quantized.quantization is not None
    if unseen := plan.specs.keys() - quantized.quantization.specs.keys():
        print(f"no data reached {', '.join(sorted(unseen))}: what is named stays float")
    with contextlib.ExitStack() as both:
        if args.report:
            folder = write_folder(args.report, PAGE, overwrite=args.overwrite)
            evaluation.write_calibration(both.enter_context(folder), chosen.policy, reports)
        save(quantized, args.out, overwrite=args.overwrite, reports=reports)
    if args.report:
        print(args.report / PAGE)
    print(f"{args.out}: {time.perf_counter() - started:.0f} s")
    if target is not None:
        print(f"{args.out / checkpoint.POLICY}: --policy takes it, and makes the same again")
    float32 = 4 * sum(leaf.size for leaf in jax.tree.leaves(pipe.params["unet"]))
    for name, place, model in (("float", source, pipe), (chosen.policy, args.out, quantized)):
        held = held_bytes(model.params)
        print(
            f"UNet, {name}: {checkpoint.disk_bytes(place / 'unet') / 1e6:.1f} MB on disk, "
            f"{held / 1e6:.1f} MB in memory, {held / float32:.3f} of float32's"
        )


def asked_target(args: argparse.Namespace, hosts: Hosts) -> Target | None:
    """What the bits of weights are chosen for by --budget or --keep; None where they are given.

    Raises:
      InputError: both are asked for, a number is none of those possible, or there are several
        hosts.
    """
    if args.budget is None and args.keep is None:
        return None
    if hosts.count > 1:
        raise InputError(
            "--budget and --keep: one host alone can measure what the layers cost; run it on one, "
            "and calibrate on all by the policy file that it writes"
        )
    return Target(args.budget, args.keep)


def parts_of(
    plan: Plan, steps: int, inputs: int, rows: int, widths: Sequence[int] = ()
) -> list[Part]:
    """The parts of a calibration; a forward of one video is the unit of their work.

    Args:
      plan: which layers there are, and which are quantized.
      steps: S.
      inputs: videos that are sampled.
      rows: sampled of each layer's input.
      widths: bits of weights to choose from.
    """
    forward = sum(layer.flops for layer in plan.layers.values())
    count = len(plan.specs)

    def solving(bits: int | None) -> Iterator[Part]:
        for number, (path, spec) in enumerate(plan.specs.items(), 1):
            layer = plan.layers[path]
            product = 2 * min(rows, SEARCHED_ROWS) * layer.parameters / forward
            # The search of its ranges tries about so many candidates.
            candidates = SEARCH_ROUNDS * (RANGE_CANDIDATES + len(CLIP_CANDIDATES))
            label = f"layer {number} of {count}"
            size: Hashable = layer.kernel, spec
            if bits is not None:
                label = f"{bits} bits, {label}"
                size = layer.kernel, replace(spec, weight_bits=bits)
            work, compilation = candidates * product, _SOLVER_LAYERS / len(plan.layers)
            yield Part(label, "solving", size=size, work=work, compilation=compilation)

    def measuring(network: str, ticks: int) -> Part:
        work = steps * len(probed_inputs(inputs))
        return Part("measuring", "forward", "measuring", size=network, ticks=ticks, work=work)

    parts = [
        Part("sampling", "forward", "sampling", ticks=steps, work=inputs),
        Part("observing", "forward", "observing", ticks=steps * inputs),
    ]
    if widths:
        parts += itertools.chain.from_iterable(map(solving, widths))
        parts += [measuring("float", 1), measuring("quantized", 1), measuring("float", count)]
    parts += solving(None)
    return parts + parts[:2] + [*solving(None)] if plan.propagates else parts


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("qvd_jax.calibrate", __doc__)
    parser.add_argument(
        "--checkpoint",
        default="shapes",
        metavar="DIR|NAME",
        help="a float one: a folder, or a model of the package (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the quantized checkpoint"
    )
    parser.add_argument(
        "--policy",
        default="qvd-w8a8",
        metavar="NAME|FILE.yaml",
        help=f"METHOD-WIDTH, of {', '.join(METHODS)} and {', '.join(WIDTHS)}, such as "
        f"minmax-w4a8; or rules of your own (%(default)s)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SHARE",
        help="choose the bits of each layer's weights, by what they cost the final latents, so "
        "that the quantized UNet holds at most this share of its bytes in float32, such as 0.17, "
        "with scales, biases and what the policy keeps float; OUT/policy.yaml has the choice",
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="DB",
        help="choose them so that the UNet holds as little as keeps the final latents this near "
        "to float's: signal to quantization noise in decibels, such as 25",
    )
    add_input_arguments(parser)
    add_sampler_arguments(parser, "the checkpoint's own")
    add_size_arguments(parser)
    add_mesh_argument(parser)
    parser.add_argument(
        "--samples",
        type=positive_int,
        default=CalibrationConfig.rows,
        metavar="R",
        help="rows of each layer's input (%(default)s)",
    )
    parser.add_argument(
        "--step-aware", action="store_true", help="an input scale for each of the sampler's steps"
    )
    parser.add_argument(
        "--seed", type=seed_int, default=0, metavar="N", help="of the noise and the sampled rows"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="writes DIR/report.html, pictures"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    add_host_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
