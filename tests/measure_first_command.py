"""Time of the README's first command on a fresh clone, from `git clone` to the videos.

    python tests/measure_first_command.py --out docs/results/first_command.json

A new virtual environment, an empty compilation cache; packages come from wherever pip finds them.
"""

import argparse
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from timed import write_record

ROOT = Path(__file__).parent.parent


def measure(work: Path) -> dict[str, object]:
    clone = work / "qvd_jax"
    steps = {"clone": f"git clone -q {ROOT} {clone}"}
    install, sample = re.search(
        r"^(python3 -m venv .*) && (\S+ -m qvd_jax.sample .*)$",
        (ROOT / "README.md").read_text(),
        re.M,
    ).groups()
    steps |= {"install": install, "sample": sample}
    seconds, printed = {}, ""
    for name, command in steps.items():
        started = time.perf_counter()
        printed = subprocess.run(
            ["bash", "-euc", command],
            cwd=clone if clone.is_dir() else work,
            env={**os.environ, "XDG_CACHE_HOME": str(work), "PYTHONPATH": ""},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        seconds[name] = round(time.perf_counter() - started, 1)
    print(printed)
    videos = {
        name: (clone / name).stat().st_size for name in ("video.mp4", "video.gif", "video.png")
    }
    return {"seconds": seconds, "together": round(sum(seconds.values()), 1), "bytes": videos}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = measure(Path(work))
    write_record(args.out, f"python tests/measure_first_command.py --out {args.out}", results)


if __name__ == "__main__":
    main()
