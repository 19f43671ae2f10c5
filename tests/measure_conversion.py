"""Peak memory and time of converting AnimateDiff v2 at its real size (1.31 G parameters).

python tests/measure_conversion.py --out docs/results/conversion_cpu.json [--dtype bfloat16]
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from qvd_jax.benchmark import environment


def measure(dtype: str, work: Path) -> dict[str, object]:
    """Makes a source in `dtype`, converts it to the same, and reads /usr/bin/time's report."""
    source, out = work / f"source-{dtype}", work / f"out-{dtype}"
    make = [sys.executable, str(Path(__file__).with_name("random_animatediff.py"))]
    subprocess.run([*make, str(source), "--size", "sd15", "--dtype", dtype], check=True)
    convert = ["-m", "convert", str(source), "--out", str(out), "--dtype", dtype]
    timed = subprocess.run(
        ["/usr/bin/time", "-v", sys.executable, *convert],
        check=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    peak = int(re.search(r"Maximum resident set size \(kbytes\): (\d+)", timed.stderr)[1]) * 1024
    clock = re.search(r"Elapsed \(wall clock\).*: (?:(\d+):)?(\d+):([\d.]+)", timed.stderr)
    hours, minutes, seconds = clock.groups()
    return {
        "dtype": dtype,
        "output_bytes": size,
        "peak_bytes": peak,
        "peak_over_output": round(peak / size, 3),
        "seconds": int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds),
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
    record = {"command": command, **environment(), "results": results}
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
