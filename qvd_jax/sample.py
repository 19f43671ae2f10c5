"""`python -m qvd_jax.sample --checkpoint DIR --prompt TEXT`: prompts or images in, videos out."""

import argparse
import contextlib
import inspect
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qvd_jax import checkpoint, memory
from qvd_jax.cli.command import command, make_parser, passed, positive_int, restoring, seed_int
from qvd_jax.cli.control import control_fps, read_control
from qvd_jax.cli.hosts import (
    add_host_arguments,
    checkpoint_digests,
    compare,
    described,
    given,
    joined,
)
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
from qvd_jax.data import video_io
from qvd_jax.errors import InputError, naming
from qvd_jax.files import check_fillable, check_writable
from qvd_jax.hosts import Hosts
from qvd_jax.meshes import MeshConfig, replicated
from qvd_jax.outputs import Outputs, Record, find_finished, plan_outputs
from qvd_jax.pipelines.components import DTYPES
from qvd_jax.pipelines.loading import load, read_configs
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.programs import enable_compilation_cache
from qvd_jax.progress import DECODER_COMPILATION, Part, Progress

_GUIDANCE = ("guidance_scale", "min_guidance_scale")
_OPTIONS = (
    "negative_prompts",
    "frames",
    "height",
    "width",
    "steps",
    *_GUIDANCE,
    "fps",
    "motion_bucket_id",
    "noise_aug_strength",
)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, samples, writes the files, prints sizes and times."""
    args = _parser().parse_args(argv)
    with joined(args, "run the same again on all hosts, into a folder with --resume") as hosts:
        request = read_request(args)
        finished = check_outputs(args, request)
        compare(hosts, args, request.names, request.inputs, request.options)
        print(f"compilation cache: {enable_compilation_cache() or 'none'}")
        videos = hosts.share(range(len(request.inputs.names)))
        todo = [i for i in videos if request.outputs.of(i) not in finished]
        if len(todo) < len(videos):
            print(f"{len(videos) - len(todo)} of {len(videos)} videos are finished already")
        shown, rows = sample_all(args, request, todo, restoring(argv)) if todo else ({}, [])
        for path in filter(None, map(request.outputs.of, todo)):
            print(path)
        write_together(request, hosts, shown)
        if rows and hosts.first:
            print(cost_table(rows))


class Request(NamedTuple):
    """What the command line asks for.

    Attributes:
      names: of the checkpoints: the one to be shown against, if any, and the one to sample.
      inputs: one for each video.
      options: of the pipelines' calls, beside the inputs' own and the seed.
      fps: frames per second of the files.
      outputs: the files.
      mesh: how each batch divides over the devices; None leaves it to the pipeline.
      records: of the videos that get a file each.
    """

    names: list[str]
    inputs: Inputs
    options: dict[str, Any]
    fps: float
    outputs: Outputs
    mesh: MeshConfig | None
    records: dict[Path, Record]


def read_request(args: argparse.Namespace) -> Request:
    """What the command line asks for, checked before any checkpoint is loaded.

    Raises:
      InputError: something does not fit.
    """
    names = [args.against, args.checkpoint] if args.against else [args.checkpoint]
    check_same_inputs(names)
    want = check_videos(names, args, args.checkpoint, **asked_scheduler(args))
    place = checkpoint.find(args.checkpoint)
    inputs, control = read_inputs(args, place), read_control(args, place)
    options = {**call_options(args), **control}
    guidance = {name: options[name] for name in _GUIDANCE if name in options}
    mesh = asked_mesh(args, names, replace(want, **guidance))
    outputs = plan_outputs(args.out, inputs.names, contact_sheet=args.contact_sheet)
    followed = None if args.fps else control_fps(args)
    if followed:
        print(f"note: the result has the condition's {followed:g} frames a second; see --fps")
    fps = args.fps or followed or read_configs(place).defaults.fps
    request = Request(names, inputs, options, fps, outputs, mesh, {})
    return request._replace(records=make_records(args, request)) if outputs.each else request


def make_records(args: argparse.Namespace, request: Request) -> dict[Path, Record]:
    """The record of each video, by its file."""
    digests = checkpoint_digests(request.names)
    scheduler = switched(args.checkpoint, **asked_scheduler(args))
    settings = {
        **described(request.options),
        "scheduler": to_dict(scheduler),
        "dtype": args.dtype,
        "frames a second": request.fps,
        "against": digests.get(args.against),
    }
    return {
        path: Record(
            name,
            index,
            args.seed,
            digests[args.checkpoint],
            {**settings, "given": given(request.inputs, index)},
        )
        for index, (path, name) in enumerate(
            zip(request.outputs.each, request.inputs.names, strict=True)
        )
    }


def check_outputs(args: argparse.Namespace, request: Request) -> frozenset[Path]:
    """Makes sure that all files can be written; gives those that an earlier run has finished.

    Raises:
      InputError: a file exists, its place is not writable, or --resume has nothing to go on with.
    """
    outputs, finished, overwrite = request.outputs, frozenset[Path](), args.overwrite
    if args.resume:
        if not outputs.each:
            raise InputError("--resume goes on with a folder of videos; pass --out DIR")
        finished = find_finished(args.out, request.records)
        # What has no record was not finished, in a folder of this run.
        overwrite = any(Record.place(path).exists() for path in outputs.each)
        strange = next((path for path in outputs.each if path.exists()), None)
        if strange and not overwrite:
            raise InputError(
                f"{strange} exists, and {args.out} has no record of a run to go on with; pass "
                f"--overwrite instead of --resume to replace it"
            )
    files = [*outputs.each, *map(Record.place, outputs.each), *outputs.together]
    files += [outputs.sheet] if outputs.sheet else []
    if outputs.each:
        # The folder is made when there is something to put into it.
        check_fillable(args.out, [path.name for path in files], overwrite=overwrite)
        return finished
    for path in files:
        check_writable(path, overwrite=overwrite)
    return finished


def timed_load(name: str, args: argparse.Namespace) -> tuple[VideoPipeline, float]:
    """A pipeline that walks as --checkpoint is to, and the seconds it took to load."""
    started = time.perf_counter()
    pipe = load(name, dtype=DTYPES.get(args.dtype), sharding=replicated())
    seconds = time.perf_counter() - started
    scheduler = switched(args.checkpoint, **asked_scheduler(args))
    return pipe.walking_as(scheduler), seconds


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks of a call of the pipeline, beside its inputs and the seed.

    What is not asked for is this checkpoint's default, for the one shown against it too.

    Raises:
      InputError: the model does not take an option.
    """
    configs = read_configs(args.checkpoint)
    known = inspect.signature(configs.family.pipeline.__call__).parameters
    given = passed(args, *_OPTIONS)
    for name in given.keys() - known.keys() - {"fps"}:
        option = name.removesuffix("s").replace("_", "-")
        raise InputError(f"--{option} has no meaning for a model of {configs.family.title}")
    values = {**to_dict(configs.defaults), **given}
    return {name: values[name] for name in _OPTIONS if name in known and name in values}


def sample_all(
    args: argparse.Namespace,
    request: Request,
    todo: Sequence[int],
    restoring: contextlib.AbstractContextManager[None],
) -> tuple[dict[int, np.ndarray], list[dict[str, str]]]:
    """Samples videos batch by batch, and writes those that get a file each as they are made.

    Args:
      args: the command line.
      request: what it asks for.
      todo: indices of the videos.
      restoring: the context to load checkpoints in.

    Returns:
      What all are shown together by, as `kept`, and a row of the table of costs for each model.
    """
    names, outputs = request.names, request.outputs
    at_once = jax.local_device_count() if request.mesh is None else request.mesh.data
    together = at_once if outputs.each else len(todo)
    size = min(args.batch_size or together, len(todo))
    with restoring:
        loaded = [timed_load(name, args) for name in names]
    own, _ = loaded[-1]
    print(f"{own.description}; {own.scheduler.solver}; {jax.default_backend()}")
    negatives = [args.negative_prompts] if args.negative_prompts else []
    note_unknown_words(own, [*request.inputs.take(todo).values, *negatives])
    compile_seconds = _count_compile_seconds()
    shown: dict[int, np.ndarray] = {}
    spent = [{"load": seconds} for _, seconds in loaded]
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]
    with Progress(_plan(request, batches)) as progress:
        for batch in batches:
            videos = []
            for name, (pipe, _), times in zip(names, loaded, spent, strict=True):
                with naming(name):
                    made, seconds = sample(
                        pipe, request, batch, args.seed, compile_seconds, progress
                    )
                videos.append(made)
                for what, more in seconds.items():
                    times[what] = times.get(what, 0.0) + more
            for index, models in zip(batch, np.stack(videos, 1), strict=True):
                if path := outputs.of(index):
                    path.parent.mkdir(exist_ok=True)
                    grid = video_io.tile(models, columns=len(models))
                    video_io.write_video(path, grid, request.fps)
                    request.records[path].write(path)
                if outputs.shows_all:
                    shown[index] = outputs.kept(models)
    rows = [
        cost(name, pipe, times) for name, (pipe, _), times in zip(names, loaded, spent, strict=True)
    ]
    return shown, rows


def _plan(request: Request, batches: Sequence[Sequence[int]]) -> list[Part]:
    """Every step of every model over every batch, and the decoding behind it."""
    count, steps = len(request.inputs.names), request.options["steps"]
    parts = []
    for batch, name in itertools.product(batches, request.names):
        where = f"video {batch[0] + 1} of {count}: " if len(batches) > 1 else ""
        size, work = len(batch), len(batch)
        compilation = DECODER_COMPILATION
        parts += [
            Part(f"{where}sampling", "sampling", name, size, ticks=steps, work=work),
            Part(f"{where}decoding", "decoding", name, size, work=work, compilation=compilation),
        ]
    return parts


def sample(
    pipe: VideoPipeline,
    request: Request,
    batch: Sequence[int],
    seed: int,
    compile_seconds: Callable[[], float],
    progress: Progress,
) -> tuple[np.ndarray, dict[str, float]]:
    """Videos uint8 `[B, F, H, W, 3]` of some indices, and where the seconds went."""
    started, before = time.perf_counter(), compile_seconds()
    inputs = request.inputs.take(batch)
    options: dict[str, Any] = {**request.options, **inputs.options}
    latents = pipe(
        # Without prompts there are embeddings among the options.
        inputs.values or None,
        **options,
        seed=seed,
        indices=batch,
        mesh=request.mesh,
        output_type="latents",
        callback_on_step_end=lambda *_: progress.advance(),
    )
    sampled, compiled = time.perf_counter(), compile_seconds()
    videos = pipe.decode(latents)
    progress.advance()
    seconds = {
        "compile": compile_seconds() - before,
        "sampling": sampled - started - (compiled - before),
        "decode": time.perf_counter() - sampled - (compile_seconds() - compiled),
    }
    return videos, seconds


def cost(name: str, pipe: VideoPipeline, seconds: Mapping[str, float]) -> dict[str, str]:
    """What a model takes, by column of the table."""
    on_disk = checkpoint.disk_bytes(checkpoint.find(name) / "unet")
    in_memory = memory.tree_bytes(pipe.params["unet"])
    return {
        "": name,
        "UNet on disk": f"{on_disk / 1e6:.1f} MB",
        "in memory": f"{in_memory / 1e6:.1f} MB",
        **{what: f"{value:.1f} s" for what, value in seconds.items()},
    }


def cost_table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of `cost` as aligned text."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def write_together(request: Request, hosts: Hosts, shown: Mapping[int, np.ndarray]) -> None:
    """Writes what shows all videos together, at the first host, and prints the names.

    Args:
      request: what is asked for.
      hosts: whose videos these are.
      shown: what `Outputs.kept` kept of the videos of this host that were sampled; of those that
        were finished before their files are read.
    """
    outputs, count = request.outputs, len(request.inputs.names)
    if not outputs.shows_all:
        return
    own = [[shown[i] if i in shown else _read_back(request, i)] for i in hosts.share(range(count))]
    gathered = hosts.gather("shown", own, count)
    if not hosts.first:
        return
    videos = np.stack([models for (models,) in gathered])
    models = videos.shape[1]
    grid = video_io.tile(np.concatenate(videos.swapaxes(0, 1)), count if models > 1 else None)
    for path in outputs.together:
        video_io.write_video(path, grid, request.fps)
        print(path)
    if outputs.sheet:
        # One model's row of frames under the other's, prompt by prompt.
        video_io.write_contact_sheet(outputs.sheet, np.concatenate(videos))
        print(outputs.sheet)


def _read_back(request: Request, index: int) -> np.ndarray:
    """What is kept of a finished video, from its file."""
    height, width, models = *(request.options[s] for s in ("height", "width")), len(request.names)
    # A file's sides are even.
    grid = video_io.read_video(request.outputs.each[index])[:, :height, : models * width]
    side_by_side = grid.reshape(len(grid), height, models, width, 3)
    return request.outputs.kept(np.moveaxis(side_by_side, 2, 0))


def _count_compile_seconds() -> Callable[[], float]:
    """Starts counting what JAX spends on tracing, lowering and compiling; gives the sum so far."""
    spent = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            spent[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: spent[0]


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("qvd_jax.sample", __doc__)
    parser.add_argument(
        "--checkpoint",
        default="shapes-w8a8",
        metavar="DIR|NAME",
        help="a folder, or a model of the package (%(default)s)",
    )
    parser.add_argument(
        "--against",
        metavar="DIR|NAME",
        help="another checkpoint to sample from the same noise, shown above or left of this one",
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--prompt-embeds",
        type=Path,
        metavar="F.npy|.safetensors",
        help="text embeddings (videos, tokens, width) in the prompts' place",
    )
    parser.add_argument(
        "--negative-prompt-embeds",
        type=Path,
        metavar="F.npy|.safetensors",
        help="the same in the negative prompt's place",
    )
    parser.add_argument(
        "--negative-prompt", dest="negative_prompts", metavar="T", help="for all prompts"
    )
    add_sampler_arguments(parser, "the checkpoint's own")
    add_size_arguments(parser)
    add_mesh_argument(parser)
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="1 turns guidance off")
    parser.add_argument(
        "--min-guidance-scale", type=float, metavar="G", help="of the first frame, from images"
    )
    parser.add_argument(
        "--motion-bucket-id", type=int, metavar="N", help="how much motion, from images"
    )
    parser.add_argument(
        "--noise-aug-strength", type=float, metavar="X", help="noise on the image, from images"
    )
    parser.add_argument(
        "--fps", type=positive_int, metavar="N", help="of the file; Stable Video Diffusion is told"
    )
    parser.add_argument("--seed", type=seed_int, default=0, metavar="N")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH.mp4|.gif|DIR",
        help="a file shows all prompts side by side, a folder gets one file each (default: "
        "video.mp4, video.gif and the contact sheet video.png)",
    )
    parser.add_argument(
        "--contact-sheet", action="store_true", help="write a PNG of chosen frames as well"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace existing files")
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with a folder where an earlier run of the same settings stopped",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="videos sampled at once (one file of all: all; a folder: one for each device)",
    )
    add_host_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
