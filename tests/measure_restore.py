"""Time and peak memory of restoring a checkpoint in a fresh process, as the commands do.

    python tests/measure_calibration.py --out calibration.json --keep runs/sd15
    python tests/measure_restore.py runs/sd15/int8 --out docs/results/restore_cpu.json

In an environment that has torch, transformers imports it: 0.2 GB more.
"""

import argparse
from pathlib import Path

from timed import timed_python, write_record

from qvd_jax import checkpoint

RESTORE = """
import sys, time
import jax, qvd_jax
from qvd_jax.memory import buffers_freed_at_once
started = time.perf_counter()
with buffers_freed_at_once():
    pipe = qvd_jax.load(sys.argv[1])
jax.block_until_ready(pipe.params)
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    size = checkpoint.disk_bytes(args.checkpoint)
    restored = timed_python("-c", RESTORE, str(args.checkpoint))
    results = {
        "seconds": float(restored.printed),
        "bytes_on_disk": size,
        "peak_bytes": restored.peak_bytes,
        "peak_over_size": round(restored.peak_bytes / size, 3),
    }
    write_record(
        args.out, f"python tests/measure_restore.py {args.checkpoint} --out {args.out}", results
    )


if __name__ == "__main__":
    main()
