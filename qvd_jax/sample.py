"""`python -m qvd_jax.sample --checkpoint DIR --prompt TEXT`: prompts or images in, videos out."""

import argparse
import inspect
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qvd_jax import checkpoint, memory
from qvd_jax.cli import (
    add_input_arguments,
    add_sampler_arguments,
    add_size_arguments,
    asked_scheduler,
    check_same_inputs,
    check_videos,
    command,
    control_fps,
    make_parser,
    note_unknown_words,
    passed,
    positive_int,
    read_control,
    read_inputs,
    restoring,
    seed_int,
)
from qvd_jax.cli_mesh import add_mesh_argument, asked_mesh
from qvd_jax.config import to_dict
from qvd_jax.data import video_io
from qvd_jax.errors import InputError, naming
from qvd_jax.files import check_fillable, check_writable
from qvd_jax.meshes import replicated
from qvd_jax.pipelines.components import DTYPES
from qvd_jax.pipelines.loading import load
from qvd_jax.pipelines.pipeline import VideoPipeline
from qvd_jax.programs import enable_compilation_cache
from qvd_jax.progress import DECODER_COMPILATION, Part, Progress

_OPTIONS = (
    "negative_prompts",
    "frames",
    "height",
    "width",
    "steps",
    "guidance_scale",
    "min_guidance_scale",
    "fps",
    "motion_bucket_id",
    "noise_aug_strength",
)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, samples, writes the files, prints sizes and times."""
    args = _parser().parse_args(argv)
    names = [args.against, args.checkpoint] if args.against else [args.checkpoint]
    check_same_inputs(names)
    want = check_videos(names, args, args.checkpoint, **asked_scheduler(args))
    inputs = read_inputs(args, checkpoint.find(args.checkpoint))
    control = read_control(args, checkpoint.find(args.checkpoint))
    guidance = passed(args, "guidance_scale")
    mesh = asked_mesh(args, names, replace(want, **guidance), len(inputs.names))
    outputs = plan_outputs(
        args.out, inputs.names, contact_sheet=args.contact_sheet, overwrite=args.overwrite
    )
    followed = None if args.fps else control_fps(args)
    if followed:
        print(f"note: the result has the condition's {followed:g} frames a second; see --fps")
    print(f"compilation cache: {enable_compilation_cache() or 'none'}")

    with restoring(argv):
        loaded = [timed_load(name, args) for name in names]
    own, _ = loaded[-1]
    print(f"{own.description}; {own.scheduler.solver}; {jax.default_backend()}")
    negatives = [args.negative_prompts] if args.negative_prompts else []
    note_unknown_words(own, [*inputs.values, *negatives])
    options = {**call_options(own, args), **control, **inputs.options, "mesh": mesh}
    fps = args.fps or followed or own.defaults.fps
    compile_seconds = _count_compile_seconds()
    videos, rows = [], []
    for name, (pipe, seconds) in zip(names, loaded, strict=True):
        with naming(name):
            video, times = sample(pipe, inputs.values, options, args.seed, compile_seconds)
        videos.append(video)
        rows.append(cost(name, pipe, {"load": seconds, **times}))
    write(np.stack(videos), outputs, fps)
    print(cost_table(rows))


def timed_load(name: str, args: argparse.Namespace) -> tuple[VideoPipeline, float]:
    """A pipeline with the scheduler asked for, and the seconds it took to load."""
    started = time.perf_counter()
    pipe = load(name, dtype=DTYPES.get(args.dtype), sharding=replicated())
    return pipe.with_scheduler(**asked_scheduler(args)), time.perf_counter() - started


def call_options(pipe: VideoPipeline, args: argparse.Namespace) -> dict[str, Any]:
    """What the command line asks of a call of the pipeline, beside its inputs and the seed.

    What is not asked for is this pipeline's default, for the one shown against it too.

    Raises:
      InputError: the model does not take an option.
    """
    known = inspect.signature(pipe.__call__).parameters
    given = passed(args, *_OPTIONS)
    for name in given.keys() - known.keys() - {"fps"}:
        option = name.removesuffix("s").replace("_", "-")
        raise InputError(f"--{option} has no meaning for a model of the family {pipe.family!r}")
    values = {**to_dict(pipe.defaults), **given}
    return {name: values[name] for name in _OPTIONS if name in known and name in values}


def sample(
    pipe: VideoPipeline,
    inputs: Sequence[Any],
    options: dict[str, Any],
    seed: int,
    compile_seconds: Callable[[], float],
) -> tuple[np.ndarray, dict[str, float]]:
    """Videos uint8 `[B, F, H, W, 3]` of the inputs, and where the seconds went."""
    started, before = time.perf_counter(), compile_seconds()
    plan = [
        Part("sampling", "sampling", ticks=options["steps"]),
        Part("decoding", "decoding", compilation=DECODER_COMPILATION),
    ]
    with Progress(plan) as progress:
        latents = pipe(
            # Without prompts there are embeddings among the options.
            inputs or None,
            **options,
            seed=seed,
            output_type="latents",
            callback_on_step_end=lambda done, _: progress.advance(done),
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


def cost(name: str, pipe: VideoPipeline, seconds: dict[str, float]) -> dict[str, str]:
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


class Outputs(NamedTuple):
    """Files to write.

    Attributes:
      each: one video for each prompt.
      together: videos that show all prompts side by side.
      sheet: the contact sheet, if one is wanted.
    """

    each: tuple[Path, ...]
    together: tuple[Path, ...]
    sheet: Path | None


def plan_outputs(
    out: Path | None, prompts: Sequence[str], *, contact_sheet: bool, overwrite: bool
) -> Outputs:
    """Names the files to write and makes sure that they can be.

    Args:
      out: a .mp4 or .gif for all prompts together, or a folder for one file each; None is
        everything there is for all together: video.mp4, video.gif and the contact sheet.
      prompts: for the names in a folder.
      contact_sheet: whether a sheet goes beside the file, or into the folder.
      overwrite: whether files already there are replaced.

    Raises:
      InputError: the suffix is of no video format, a file exists, or its place is not writable.
    """
    each: tuple[Path, ...] = ()
    together: tuple[Path, ...] = ()
    if out is None:
        together = tuple(Path("video").with_suffix(suffix) for suffix in video_io.VIDEO_SUFFIXES)
        sheet, contact_sheet = Path("video.png"), True
    elif out.suffix in video_io.VIDEO_SUFFIXES and not out.is_dir():
        together, sheet = (out,), out.with_suffix(".png")
    elif out.suffix and not out.is_dir():
        raise InputError(
            f"{out}: a file ends in {' or '.join(video_io.VIDEO_SUFFIXES)}, a folder in neither"
        )
    else:
        slugs = (re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] for text in prompts)
        each = tuple(out / f"{i:03d}-{slug}.mp4" for i, slug in enumerate(slugs))
        sheet = out / "contact-sheet.png"
    outputs = Outputs(each, together, sheet if contact_sheet else None)
    files = [*each, *together, *([sheet] if contact_sheet else [])]
    if out is not None and each:
        # The folder is made when there is something to put into it.
        check_fillable(out, [path.name for path in files], overwrite=overwrite)
        return outputs
    for path in files:
        check_writable(path, overwrite=overwrite)
    return outputs


def write(videos: np.ndarray, outputs: Outputs, fps: float) -> None:
    """Writes the files and prints their names.

    Args:
      videos: uint8 `[M, B, F, H, W, 3]`, of M models; more than one are shown side by side.
      outputs: the files.
      fps: frames per second.
    """
    models, count = videos.shape[:2]
    together = videos.reshape(models * count, *videos.shape[2:])
    grid = video_io.tile(together, columns=count if models > 1 else None)
    pairs = [video_io.tile(videos[:, i], columns=models) for i in range(len(outputs.each))]
    for path, video in [
        *((path, grid) for path in outputs.together),
        *zip(outputs.each, pairs, strict=True),
    ]:
        path.parent.mkdir(exist_ok=True)
        video_io.write_video(path, video, fps)
        print(path)
    if outputs.sheet:
        # One model's row of frames under the other's, prompt by prompt.
        video_io.write_contact_sheet(outputs.sheet, videos.swapaxes(0, 1).reshape(together.shape))
        print(outputs.sheet)


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
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
