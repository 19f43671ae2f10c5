"""Timing variants side by side: a process for each framework, round after round in turn."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import tqdm

from qvd_jax import markdown
from qvd_jax.errors import InputError

WARMUP_ROUNDS = 2

T = TypeVar("T")

Run = Callable[[], None]
"""Does what is timed, once."""


@dataclass(frozen=True)
class Variant:
    """One of the things that are timed against each other.

    Attributes:
      framework: those of one framework share a process, and the weights of one dtype.
      mode: how it runs: "float" or a policy of ours, "eager", "compiled" and so on.
      dtype: of parameters and computation.
    """

    framework: str
    mode: str
    dtype: str


Build = Callable[[Any, Variant], Run]
"""From a case and a variant to what is timed; called in the variant's process."""


def time_in_turn(
    builds: Mapping[str, Build], case: Any, variants: Sequence[Variant], rounds: int
) -> list[dict[str, Any]]:
    """Times variants in turn.

    Args:
      builds: by framework; functions of a module, for they are sent to other processes.
      case: what they are called with.
      variants: all of them are held in memory at once.
      rounds: how often each is timed, after `WARMUP_ROUNDS` that do not count.

    Returns:
      For each variant its seconds: median, least, most, and those of every round.

    Raises:
      InputError: a process ended early.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    total = (1 + WARMUP_ROUNDS + rounds) * len(variants)
    try:
        with tqdm.tqdm(total=total, desc="building", unit="run") as bar:
            for framework in dict.fromkeys(variant.framework for variant in variants):
                ours, theirs = context.Pipe()
                arguments = (theirs, builds[framework], case)
                worker = context.Process(target=_work, args=arguments, daemon=True)
                worker.start()
                # Else the death of the worker would go unnoticed.
                theirs.close()
                workers[framework] = worker, ours
            for count in range(1 + WARMUP_ROUNDS + rounds):
                for variant in variants:
                    bar.set_postfix_str(f"{variant.framework} {variant.mode} {variant.dtype}")
                    elapsed = _ask(workers[variant.framework][1], variant)
                    if count > WARMUP_ROUNDS:
                        seconds[variant].append(elapsed)
                    bar.update()
                bar.set_description("timing")
    finally:
        for worker, _ in workers.values():
            worker.kill()
            worker.join()
    return [
        {
            **asdict(variant),
            "median_s": statistics.median(spent),
            "min_s": min(spent),
            "max_s": max(spent),
            "rounds_s": spent,
        }
        for variant, spent in seconds.items()
    ]


def in_fresh_process(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns or raises, computed in a process that then ends.

    A TPU serves one process at a time: the one that starts the others must not have it.

    Raises:
      InputError: `what` ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise InputError(f"{what} ended early; was there too little memory?") from error


def _work(connection: Connection, build: Build, case: Any) -> None:
    built: dict[Variant, Run] = {}
    while True:
        variant = connection.recv()
        if variant not in built:
            built[variant] = build(case, variant)
        started = time.perf_counter()
        built[variant]()
        connection.send(time.perf_counter() - started)


def _ask(connection: Connection, variant: Variant) -> float:
    try:
        connection.send(variant)
        return float(connection.recv())
    except (EOFError, ConnectionError) as error:
        raise InputError(
            f"{variant.framework} {variant.mode} ended early: its own message is above, or there "
            f"was too little memory"
        ) from error


def times_table(results: Sequence[Mapping[str, Any]], against: Variant) -> str:
    """The results as Markdown, with the ratio of each time to that of `against`."""
    base = next(
        r["median_s"]
        for r in results
        if (r["framework"], r["mode"], r["dtype"])
        == (against.framework, against.mode, against.dtype)
    )
    ratio = f"time / {against.framework} {against.mode} {against.dtype}"
    return markdown.table(
        [
            {
                "what": f"{r['framework']} {r['mode']}",
                "dtype": r["dtype"],
                "median s": f"{r['median_s']:.3f}",
                "min to max s": f"{r['min_s']:.3f} to {r['max_s']:.3f}",
                ratio: f"{r['median_s'] / base:.2f}",
            }
            for r in results
        ]
    )
