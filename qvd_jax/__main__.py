"""`qvd VERB ...`: every command under one name."""

import argparse
import importlib
import sys

import qvd_jax

VERBS = {
    "convert": ("qvd_jax.convert.__main__", "a PyTorch checkpoint becomes an Orbax checkpoint"),
    "calibrate": ("qvd_jax.calibrate", "a float checkpoint becomes int8"),
    "sample": ("qvd_jax.sample", "prompts or images in, videos out"),
    "evaluate": ("qvd_jax.evaluate", "how far checkpoints are apart, side by side"),
    "benchmark": ("qvd_jax.benchmark", "speed and memory, side by side"),
    "train": ("qvd_jax.train", "makes the small model the package ships"),
}
"""The module of each command, imported only when it is called, and what it does."""


def main() -> int:
    """Runs the command that the process's first argument names; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="qvd",
        description="Post-training quantization of video diffusion models.",
        epilog="`qvd VERB --help` lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"qvd_jax {qvd_jax.__version__}")
    verbs = parser.add_subparsers(title="commands", dest="verb", metavar="VERB", required=True)
    for verb, (_, what) in VERBS.items():
        verbs.add_parser(verb, help=what, add_help=False)
    # What follows the verb is the command's own.
    verb = parser.parse_args(sys.argv[1:2]).verb
    sys.argv = [f"qvd {verb}", *sys.argv[2:]]
    return importlib.import_module(VERBS[verb][0]).main()


if __name__ == "__main__":
    sys.exit(main())
