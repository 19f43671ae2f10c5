"""Peak memory and time of converting AnimateDiff v2 at its real size (1.31 G parameters).

python tests/measure_conversion.py --out docs/results/conversion_cpu.json [--dtype bfloat16]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from timed import timed_python, write_record

from qvd_jax import checkpoint


def measure(dtype: str, work: Path) -> dict[str, object]:
    """Makes a source in `dtype`, converts it to the same, timed."""
    source, out = work / f"source-{dtype}", work / f"out-{dtype}"
    make = [sys.executable, str(Path(__file__).with_name("random_animatediff.py"))]
    subprocess.run([*make, str(source), "--size", "sd15", "--dtype", dtype], check=True)
    convert = ["-m", "convert", str(source), "--out", str(out), "--dtype", dtype]
    cost = timed_python(*convert)
    size = checkpoint.disk_bytes(out)
    return {
        "dtype": dtype,
        "output_bytes": size,
        "peak_bytes": cost.peak_bytes,
        "peak_over_output": round(cost.peak_bytes / size, 3),
        "seconds": cost.seconds,
    }


def main() -> None:
    """Measures each dtype in a fresh folder and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    results = []
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as work:
            results.append(measure(dtype, Path(work)))
    command = f"python tests/measure_conversion.py --out {args.out} --dtype {' '.join(args.dtype)}"
    write_record(args.out, command, results)


if __name__ == "__main__":
    main()
