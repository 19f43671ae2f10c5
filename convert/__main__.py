"""`python -m qvd_jax.convert SOURCE --out DIR`: PyTorch checkpoint in, Orbax checkpoint out."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import tqdm

from qvd_jax import checkpoint
from qvd_jax.cli import command, make_parser
from qvd_jax.pipelines.components import DTYPES

from .animatediff import PRESETS
from .embeddings import parse_embedding
from .lora import parse_lora
from .pipeline import BytesRead, open_source, write_checkpoint


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, converts, prints what was written."""
    args = _parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    started = time.perf_counter()
    checkpoint.check_replaceable(args.out, overwrite=args.overwrite)
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
    print(source.description)
    for note in source.notes:
        print(f"note: {note}")
    with tqdm.tqdm(unit="B", unit_scale=True, delay=0.5) as bar:

        def on_progress(progress: BytesRead) -> None:
            bar.total = progress.total
            bar.set_description(progress.component, refresh=False)
            bar.update(progress.done - bar.n)

        write_checkpoint(
            source,
            args.out,
            dtype=DTYPES[args.dtype],
            overwrite=args.overwrite,
            on_progress=on_progress,
        )
    size = checkpoint.disk_bytes(args.out)
    print(f"{args.out}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.1f} s")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__package__, __doc__)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="diffusers folder of any family; Stable Diffusion 1.5 with --motion, a folder or one "
        "file; an original file of Stable Video Diffusion",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
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
        "--dtype", choices=DTYPES, default="float32", help="of the written weights (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    return parser


if __name__ == "__main__":
    sys.exit(main())
