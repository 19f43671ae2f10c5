"""`python -m qvd_jax.convert SOURCE --out DIR`: PyTorch checkpoint in, Orbax checkpoint out."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import tqdm

from qvd_jax import checkpoint, files
from qvd_jax.cli.command import command, given_options, make_parser
from qvd_jax.errors import InputError
from qvd_jax.pipelines.components import DTYPES

from . import model_index
from .animatediff import PRESETS
from .clip import open_clip
from .embeddings import parse_embedding
from .lora import parse_lora
from .metric_networks import open_metric_network
from .pipeline import BytesRead, open_source, write_checkpoint
from .to_diffusers import open_checkpoint, write_folder


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, converts, prints what was written."""
    parser = _parser()
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    started = time.perf_counter()
    if args.to_diffusers is not None:
        _write_back(args)
    elif args.source is None or args.out is None:
        parser.error("SOURCE and --out are required, or --to-diffusers DIR OUT")
    else:
        _convert(args)
    out = args.to_diffusers[1] if args.to_diffusers else args.out
    size = checkpoint.disk_bytes(out)
    print(f"{out}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")


def _convert(args: argparse.Namespace) -> None:
    checkpoint.check_replaceable(args.out, overwrite=args.overwrite)
    network = open_metric_network(args.source, args.lpips_heads) or open_clip(args.source)
    if network is not None:
        given = given_options(_parser(), args, "source", "out", "lpips_heads", "overwrite")
        if given:
            raise InputError(f"{network.description} is converted without {', '.join(given)}")
        _show(network.description, network.notes)
        network.write(args.out)
        return
    loras = [parse_lora(lora) for lora in args.lora]
    source = open_source(
        args.source,
        args.motion,
        loras=loras,
        embeddings=[parse_embedding(embedding) for embedding in args.embedding],
        controlnet=args.controlnet,
        preset=args.preset,
        unet=args.unet,
        vae=args.vae,
        appearance_encoder=args.appearance_encoder,
        config=args.config,
    )
    _show(source.description, source.notes)
    with _bar() as on_progress:
        write_checkpoint(
            source,
            args.out,
            dtype=DTYPES[args.dtype],
            overwrite=args.overwrite,
            on_progress=on_progress,
        )


def _write_back(args: argparse.Namespace) -> None:
    """Writes a checkpoint as a pipeline folder of diffusers."""
    given = given_options(_parser(), args, "to_diffusers", "dtype", "overwrite")
    if given:
        raise InputError(f"--to-diffusers writes a checkpoint as it is, without {', '.join(given)}")
    path, out = args.to_diffusers
    files.check_folder(out, model_index.NAME, overwrite=args.overwrite)
    pipeline = open_checkpoint(path)
    _show(pipeline.pipeline, pipeline.notes)
    with _bar() as on_progress:
        write_folder(
            pipeline,
            out,
            dtype=DTYPES[args.dtype],
            overwrite=args.overwrite,
            on_progress=on_progress,
        )


def _show(description: str, notes: Sequence[str]) -> None:
    print(description)
    for note in notes:
        print(f"note: {note}")


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[BytesRead], None]]:
    with tqdm.tqdm(unit="B", unit_scale=True, delay=0.5) as bar:

        def on_progress(progress: BytesRead) -> None:
            bar.total = progress.total
            bar.set_description(progress.component, refresh=False)
            bar.update(progress.done - bar.n)

        yield on_progress


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__package__, __doc__)
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="SOURCE",
        help="diffusers folder of any family; Stable Diffusion 1.5 with --motion, a folder or one "
        "file; an original file of Stable Video Diffusion; of the metrics a file of I3D or of "
        "LPIPS' network, or a folder of CLIP",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--to-diffusers",
        nargs=2,
        type=Path,
        metavar=("DIR", "OUT"),
        help="the way back: the checkpoint DIR, float or int8, as OUT, a pipeline folder of "
        "diffusers; instead of SOURCE and --out",
    )
    parser.add_argument(
        "--motion",
        type=Path,
        metavar="PATH",
        help="motion adapter folder, or original mm_*.ckpt, v3_sd15_mm.ckpt, "
        "temporal_attention.ckpt",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="LoRA to merge into UNet and text encoder, of any kind; may be given again",
    )
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:TOKEN]",
        help="textual inversion to add as a token of prompts; may be given again",
    )
    parser.add_argument(
        "--controlnet",
        type=Path,
        metavar="PATH",
        help="ControlNet or SparseCtrl for AnimateDiff: a folder, or original control_*.pth, "
        "v3_sd15_sparsectrl_*.ckpt; MagicAnimate's folder",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="scheduler, steps and guidance of motion modules distilled to few steps",
    )
    parser.add_argument(
        "--unet",
        type=Path,
        metavar="FILE",
        help="original text2video_pytorch_model.pth in place of the folder's UNet",
    )
    parser.add_argument(
        "--vae", type=Path, metavar="PATH", help="a VAE in place of the source's, folder or file"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help="diffusers folder that has the configs and the tokenizer of a SOURCE that is one file",
    )
    parser.add_argument(
        "--appearance-encoder", type=Path, metavar="DIR", help="MagicAnimate's folder of this name"
    )
    parser.add_argument(
        "--lpips-heads",
        type=Path,
        metavar="FILE",
        help="vgg.pth or alex.pth of the package lpips, for a SOURCE that is torchvision's network",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the written weights (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
