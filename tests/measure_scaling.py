"""Compiles one forward for slices of TPUs, which `docs/scaling.md` shows beside one chip.

python tests/measure_scaling.py [v5e v6e]

Takes minutes of a core for each program; a slice whose file is there is left out.
"""

import sys
from pathlib import Path

from qvd_jax import benchmark, meshes

RESULTS = Path(__file__).parent.parent / "docs" / "results"
GRIDS = {2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
MESHES = (
    # Throughput: as many videos as chips.
    *(f"data={chips}" for chips in (2, 8, 64)),
    # Latency of one video: guidance first, then frames, of which there are 16.
    "guidance=2",
    *(f"guidance=2,frame={frames}" for frames in (2, 4, 8, 16)),
    # Both, on more chips than one video divides over.
    "data=4,guidance=2,frame=8",
)


def main(*chips: str) -> None:
    for chip in chips or ("v5e", "v6e"):
        for mesh in MESHES:
            config = meshes.parse(mesh)
            out = RESULTS / f"compiled_{chip}_{mesh.replace('=', '').replace(',', '_')}.json"
            if out.exists():
                continue
            grid, rows = f"{chip}:{GRIDS[config.size]}", str(2 * config.data)
            size = ["--batch", rows, "--frames", "16", "--height", "512", "--width", "512"]
            what = ["--dtype", "bfloat16", "--policy", "qvd-w8a8", "--out", str(out)]
            code = benchmark.main(["compiled", "--chip", grid, "--mesh", mesh, *size, *what])
            assert code == 0, mesh


if __name__ == "__main__":
    main(*sys.argv[1:])
