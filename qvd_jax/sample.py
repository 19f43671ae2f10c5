"""`python -m qvd_jax.sample --checkpoint DIR --prompt TEXT`: prompts in, videos out."""

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from qvd_jax import checkpoint
from qvd_jax.cli import (
    add_size_arguments,
    command,
    enable_compilation_cache,
    positive_int,
    read_prompts,
)
from qvd_jax.data import video_io
from qvd_jax.diffusion.schedules import SOLVERS
from qvd_jax.errors import InputError
from qvd_jax.pipelines.text_to_video import DTYPES, load


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, samples, writes the files, prints where the time went."""
    args = _parser().parse_args(argv)
    prompts = [*args.prompt, *(read_prompts(args.prompts_file) if args.prompts_file else ())]
    # The checkpoint's own examples, for who asks for nothing.
    prompts = prompts or checkpoint.example_prompts(checkpoint.find(args.checkpoint))
    if not prompts:
        raise InputError("there are no prompts; pass --prompt TEXT or --prompts-file FILE")
    outputs = plan_outputs(
        args.out, prompts, contact_sheet=args.contact_sheet, overwrite=args.overwrite
    )
    print(f"compilation cache: {enable_compilation_cache()}")

    compile_seconds = _count_compile_seconds()
    started = time.perf_counter()
    pipe = load(args.checkpoint, dtype=DTYPES.get(args.dtype))
    if args.scheduler:
        pipe = replace(pipe, scheduler=replace(pipe.scheduler, solver=args.scheduler))
    seconds = {"load": time.perf_counter() - started}
    print(f"{pipe.description}; {pipe.scheduler.solver}; {jax.default_backend()}")
    for prompt in prompts:
        if unknown := pipe.unknown_words(prompt):
            print(f"note: the model does not know {', '.join(map(repr, unknown))} in {prompt!r}")

    started = time.perf_counter()
    steps = args.steps or pipe.defaults.steps
    loaded = compile_seconds()
    with tqdm.tqdm(total=steps, desc="sampling", unit="step") as bar:
        latents = pipe(
            prompts,
            args.negative_prompt,
            frames=args.frames,
            height=args.height,
            width=args.width,
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            seed=args.seed,
            output_type="latents",
            callback_on_step_end=lambda done, _: _set(bar, done),
        )
    sampled = compile_seconds()
    seconds["sampling"] = time.perf_counter() - started - (sampled - loaded)

    started = time.perf_counter()
    videos = pipe.decode(latents)
    seconds["decode"] = time.perf_counter() - started - (compile_seconds() - sampled)
    seconds["compile"] = compile_seconds() - loaded

    write(videos, outputs, args.fps or pipe.defaults.fps)
    order = ("load", "compile", "sampling", "decode")
    print("seconds: " + ", ".join(f"{name} {seconds[name]:.1f}" for name in order))


def _set(bar: tqdm.tqdm, done: int) -> None:
    bar.update(done - bar.n)


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
        if not out.exists():
            # The folder is made when there is something to put into it.
            video_io.check_writable(out, overwrite=overwrite)
            return Outputs(each, together, sheet if contact_sheet else None)
    outputs = Outputs(each, together, sheet if contact_sheet else None)
    for path in filter(None, (*each, *together, outputs.sheet)):
        video_io.check_writable(path, overwrite=overwrite)
    return outputs


def write(videos: np.ndarray, outputs: Outputs, fps: int) -> None:
    """Writes videos `[B, F, H, W, 3]` and prints the files' names."""
    for path, video in [
        *((path, video_io.tile(videos)) for path in outputs.together),
        *zip(outputs.each, videos, strict=bool(outputs.each)),
    ]:
        path.parent.mkdir(exist_ok=True)
        video_io.write_video(path, video, fps)
        print(path)
    if outputs.sheet:
        video_io.write_contact_sheet(outputs.sheet, videos)
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
    parser = argparse.ArgumentParser(prog="python -m qvd_jax.sample", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        default="shapes",
        metavar="DIR|NAME",
        help="a folder, or a model of the package (%(default)s)",
    )
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="one video each")
    parser.add_argument("--prompts-file", type=Path, metavar="F", help="one prompt a line")
    parser.add_argument("--negative-prompt", metavar="T", help="for all prompts")
    add_size_arguments(parser)
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="1 turns guidance off")
    parser.add_argument("--scheduler", choices=list(SOLVERS.values()))
    parser.add_argument("--fps", type=positive_int, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
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
