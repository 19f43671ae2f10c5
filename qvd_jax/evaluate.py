"""`python -m qvd_jax.evaluate --reference DIR [--candidate DIR ...] --out DIR`: side by side.

Every model samples the same prompts or images from the same noise. Without any the prompts are
held-out scenes of the moving shapes, and what they asked for is counted in the pixels.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qvd_jax import checkpoint
from qvd_jax.cli import (
    add_input_arguments,
    add_sampler_arguments,
    add_size_arguments,
    asked_scheduler,
    check_same_inputs,
    check_videos,
    command,
    command_line,
    make_parser,
    note_unknown_words,
    positive_int,
    read_control,
    read_inputs,
    restoring,
    seed_int,
)
from qvd_jax.cli_mesh import add_mesh_argument, asked_mesh
from qvd_jax.evaluation import Cases, compare, write_comparison
from qvd_jax.evaluation.page import PAGE
from qvd_jax.evaluation.pairs import BATCH
from qvd_jax.files import check_folder
from qvd_jax.meshes import replicated
from qvd_jax.pipelines.loading import load, load_layer_reports, read_configs
from qvd_jax.shapes.judge import asks_for_shapes, held_out_cases


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, samples, measures, writes the results, prints the table."""
    args = _parser().parse_args(argv)
    names = list(dict.fromkeys([args.reference, *args.candidate]))
    check_folder(args.out, PAGE, overwrite=args.overwrite)
    check_same_inputs(names)
    solver = args.scheduler or read_configs(args.reference).scheduler.solver
    asked = asked_scheduler(args) | {"solver": solver}
    want = check_videos(names, args, args.reference, **asked)
    cases = read_cases(args)
    cases.check(want)
    layers = {name: load_layer_reports(name) for name in names}

    mesh = asked_mesh(args, names, want, min(BATCH, len(cases.inputs)))
    with restoring(argv):
        models = {name: load(name, sharding=replicated()) for name in names}
    models = {name: pipe.with_scheduler(**asked) for name, pipe in models.items()}
    reference = models[names[0]]
    note_unknown_words(reference, cases.titles)
    comparison = compare(
        models, cases, want, seed=args.seed, seeds=args.seeds, layers=layers, mesh=mesh
    )
    line = command_line("qvd_jax.evaluate", argv)
    print(write_comparison(comparison, args.out, overwrite=args.overwrite, command=line))


def read_cases(args: argparse.Namespace) -> Cases:
    """What the command line gives, the first `--videos` of it; else held-out moving shapes.

    Raises:
      InputError: the reference is no model of moving shapes and nothing is given, or what is
        given does not fit it.
    """
    path = checkpoint.find(args.reference)
    options = read_control(args, path)
    asked = args.prompt or args.prompts_file or args.image
    if asked or not asks_for_shapes(read_configs(path).defaults.prompts):
        given = read_inputs(args, path)
        if len(given.values) > args.videos:
            print(f"the first {args.videos} of {len(given.values)}; --videos N takes more")
        return Cases(given.values[: args.videos], given.names[: args.videos], options)
    return held_out_cases(args.videos, args.seed)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("qvd_jax.evaluate", __doc__)
    parser.add_argument(
        "--reference", required=True, metavar="DIR|NAME", help="what the others are compared with"
    )
    parser.add_argument(
        "--candidate", nargs="+", default=[], metavar="DIR|NAME", help="other checkpoints"
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--videos",
        type=positive_int,
        default=128,
        metavar="N",
        help="prompts or images (%(default)s)",
    )
    parser.add_argument("--seeds", type=positive_int, default=1, metavar="K", help="of each prompt")
    parser.add_argument("--seed", type=seed_int, default=0, metavar="N", help="the first seed")
    add_sampler_arguments(parser, "the reference's")
    add_size_arguments(parser)
    add_mesh_argument(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results.json, report.html, sheets"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
