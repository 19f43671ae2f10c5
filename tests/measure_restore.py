"""Time and peak memory of loading a checkpoint in a fresh process, beside what loading is made of.

    python tests/measure_restore.py shapes-w8a8 --out docs/results/restore_shapes_cpu.json
    python tests/measure_calibration.py --out calibration.json --keep runs/sd15
    python tests/measure_restore.py runs/sd15/int8 --out docs/results/restore_cpu.json

In turn, as often as `--rounds` says: a process that imports qvd_jax and loads the checkpoint; one
that imports jax, flax and Orbax and restores the same arrays by Orbax; one that reads the arrays'
files. All files were read before. In an environment that has torch nothing of it is imported.
"""

import argparse
import statistics
from pathlib import Path

from timed import timed_python, write_record

from qvd_jax import checkpoint

LOAD = """
import sys, time
import jax, qvd_jax
from qvd_jax.memory import buffers_freed_at_once
jax.local_devices()
started = time.perf_counter()
with buffers_freed_at_once():
    pipe = qvd_jax.load(sys.argv[1])
jax.block_until_ready(pipe.params)
print(time.perf_counter() - started)
"""

ORBAX = """
import pathlib, sys, time
import flax, jax
import orbax.checkpoint as ocp
device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
started = time.perf_counter()
with ocp.StandardCheckpointer() as checkpointer:
    for mark in sorted(pathlib.Path(sys.argv[1]).absolute().glob("*/_METADATA")):
        tree = checkpointer.metadata(mark.parent).item_metadata.tree
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree
        )
        jax.block_until_ready(checkpointer.restore(mark.parent, target))
print(time.perf_counter() - started)
"""

READ = """
import pathlib, sys, time
started = time.perf_counter()
for mark in pathlib.Path(sys.argv[1]).glob("*/_METADATA"):
    for file in mark.parent.rglob("*"):
        if file.is_file():
            file.read_bytes()
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--out", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    place = checkpoint.find(args.checkpoint)
    scripts = {"read": READ, "load": LOAD, "orbax": ORBAX}
    timed_python("-c", READ, str(place))
    taken = {name: [] for name in scripts}
    for _ in range(args.rounds):
        for name, script in scripts.items():
            taken[name].append(timed_python("-c", script, str(place)))
    seconds, processes = (
        {name: statistics.median(map(of, costs)) for name, costs in taken.items()}
        for of in (lambda cost: float(cost.printed), lambda cost: cost.seconds)
    )
    size = checkpoint.disk_bytes(place)
    peak = max(cost.peak_bytes for cost in taken["load"])
    results = {
        "bytes_on_disk": size,
        "seconds": seconds["load"],
        "orbax_seconds": seconds["orbax"],
        "read_seconds": seconds["read"],
        "seconds_over_reading": round(seconds["load"] / seconds["read"], 2),
        "process_seconds": processes["load"],
        "orbax_process_seconds": processes["orbax"],
        "process_over_orbax": round(processes["load"] / processes["orbax"], 2),
        "peak_bytes": peak,
        "peak_over_size": round(peak / size, 3),
    }
    command = f"python tests/measure_restore.py {args.checkpoint} --out {args.out}"
    write_record(Path(args.out), command, results)


if __name__ == "__main__":
    main()
