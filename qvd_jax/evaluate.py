"""`python -m qvd_jax.evaluate --reference DIR [--candidate DIR ...] --out DIR`: side by side.

Every model samples the same prompts or images from the same noise. Without any the prompts are
held-out scenes of the moving shapes, and what they asked for is counted in the pixels.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qvd_jax import checkpoint, files
from qvd_jax.cli import (
    Inputs,
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
from qvd_jax.config import to_dict
from qvd_jax.diffusion.schedules import switch
from qvd_jax.errors import InputError
from qvd_jax.evaluation import Cases, compare, write_comparison
from qvd_jax.evaluation.batches import NONE_KEPT, Batches
from qvd_jax.evaluation.page import PAGE
from qvd_jax.evaluation.pairs import BATCH
from qvd_jax.hosts import Hosts
from qvd_jax.outputs import differences
from qvd_jax.pipelines.loading import devices_for, load, load_layer_reports, read_configs
from qvd_jax.pipelines.pipeline import VideoDefaults
from qvd_jax.runs import add_host_arguments, checkpoint_digests, described, given, joined
from qvd_jax.runs import compare as compare_hosts
from qvd_jax.shapes.judge import asks_for_shapes, held_out_cases


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, samples, measures, writes the results, prints the table."""
    args = _parser().parse_args(argv)
    with joined(args, "run the same again on all hosts, with --resume") as hosts:
        table = evaluate(args, hosts, restoring(argv), command_line("qvd_jax.evaluate", argv))
        if hosts.first:
            print(table)
    # Once all hosts are done: they may share the folder.
    if (folder := kept_by(args).folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def kept_by(args: argparse.Namespace) -> Batches:
    """Where what is sampled is kept, if it is."""
    return Batches(args.out.with_name(f"{args.out.name}.sampled")) if args.resume else NONE_KEPT


def evaluate(
    args: argparse.Namespace,
    hosts: Hosts,
    restoring: contextlib.AbstractContextManager[None],
    line: str,
) -> str:
    """Samples with the cases shared out over the hosts, of which the first writes the results.

    Args:
      args: the command line.
      hosts: which run it.
      restoring: the context to load checkpoints in.
      line: what runs the command again.

    Returns:
      The table, at the first host.
    """
    names = list(dict.fromkeys([args.reference, *args.candidate]))
    if hosts.first:
        files.check_folder(args.out, PAGE, overwrite=args.overwrite)
    check_same_inputs(names)
    solver = args.scheduler or read_configs(args.reference).scheduler.solver
    asked = asked_scheduler(args) | {"solver": solver}
    want = check_videos(names, args, args.reference, **asked)
    cases = read_cases(args)
    cases.check(want)
    layers = {name: load_layer_reports(name) for name in names}
    inputs = Inputs([*cases.inputs], cases.titles)
    kept = kept_by(args)
    if kept.folder is not None:
        go_on(kept.folder, args, names, want, inputs, cases)
    compare_hosts(hosts, args, names, inputs, cases.options)

    sharding = devices_for(min(BATCH, len(cases.inputs)))
    with restoring:
        models = {name: load(name, sharding=sharding) for name in names}
    models = {name: pipe.with_scheduler(**asked) for name, pipe in models.items()}
    reference = models[names[0]]
    note_unknown_words(reference, cases.titles)
    comparison = compare(
        models,
        cases,
        want,
        seed=args.seed,
        seeds=args.seeds,
        layers=layers,
        hosts=hosts,
        kept=kept,
    )
    if not hosts.first:
        return ""
    return write_comparison(comparison, args.out, overwrite=args.overwrite, command=line)


def go_on(
    folder: Path,
    args: argparse.Namespace,
    names: Sequence[str],
    want: VideoDefaults,
    inputs: Inputs,
    cases: Cases,
) -> None:
    """Makes the folder in which what is sampled is kept, or finds that of an earlier run.

    Args:
      folder: its place.
      args: the command line.
      names: of the checkpoints.
      want: steps, frames, size and guidance of all videos.
      inputs: the cases.
      cases: with their options.

    Raises:
      InputError: the folder is of another run; what differs is named.
    """
    scheduler = switch(read_configs(names[0]).scheduler, **asked_scheduler(args))
    record = {
        "checkpoints": checkpoint_digests(names),
        "inputs": {
            f"input {i + 1}": [name, *given(inputs, i)] for i, name in enumerate(inputs.names)
        },
        "options": described(cases.options),
        "scheduler": to_dict(scheduler),
        **{name: getattr(want, name) for name in ("steps", "frames", "height", "width")},
        "guidance scale": want.guidance_scale,
        "seed": args.seed,
        "seeds": args.seeds,
    }
    file = folder / "run.json"
    text = json.dumps(record, indent=1) + "\n"
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is no record of a run: {error}") from error
        if changed := differences(found, json.loads(text)):
            raise InputError(
                f"{folder}: this run is not the one that --resume is to go on with: "
                f"{'; '.join(changed)}; remove the folder, or name another --out"
            )
        return
    folder.mkdir(exist_ok=True)
    files.write_text(file, text)


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
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results.json, report.html, sheets"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what is sampled in OUT.sampled until all is, and go on with what is there",
    )
    add_host_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
