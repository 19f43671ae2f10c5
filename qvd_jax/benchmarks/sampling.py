"""Whole videos from checkpoints: start-up without and with a cache, time, peak memory."""

import itertools
import math
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import tqdm

from qvd_jax import markdown, memory
from qvd_jax.benchmarks.rounds import Run, Variant, in_fresh_process
from qvd_jax.data import video_io
from qvd_jax.memory import buffers_freed_at_once, tree_bytes
from qvd_jax.pipelines.components import DTYPES
from qvd_jax.pipelines.families import Takes
from qvd_jax.pipelines.loading import load, read_configs
from qvd_jax.pipelines.pipeline import VideoPipeline

T = TypeVar("T")

PARTS = ("import", "load", "trace", "compile", "sample", "decode", "write")
"""What a process does until its first videos are written."""

MEMORY_STEPS = (2, 8)
"""Numbers of steps whose peak memory is measured."""

_REPEATS = 5

# Where a checkpoint brings none; the time does not depend on it.
_PROMPT = "a corgi on a beach"


@dataclass(frozen=True)
class SampleCase:
    """One call of a pipeline.

    Attributes:
      videos: B.
      steps: S.
      frames: F.
      height: H in pixels.
      width: W in pixels.
    """

    videos: int
    steps: int
    frames: int
    height: int
    width: int


def build(case: SampleCase, variant: Variant) -> Run:
    """Sampling and decoding with the checkpoint that is the variant's mode."""
    pipe, sample = _open(case, variant)

    def run() -> None:
        pipe.decode(sample())

    return run


def _open(
    case: SampleCase, variant: Variant
) -> tuple[VideoPipeline[Any], Callable[[], np.ndarray]]:
    """The pipeline, and what samples latents with it."""
    with buffers_freed_at_once():
        pipe = load(variant.mode, dtype=DTYPES[variant.dtype])
    configs = read_configs(variant.mode)
    inputs, options = make_inputs(case, configs.takes, configs.defaults.prompts)

    def sample() -> np.ndarray:
        return pipe(
            inputs,
            **options,
            steps=case.steps,
            frames=case.frames,
            height=case.height,
            width=case.width,
            output_type="latents",
        )

    return pipe, sample


def make_inputs(
    case: SampleCase, takes: Takes, prompts: Sequence[str]
) -> tuple[list[Any], dict[str, Any]]:
    """What a pipeline is called with: some of its prompts, or noise as images and motion."""
    rng = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        return rng.integers(256, size=(count, case.height, case.width, 3), dtype=np.uint8)

    options: dict[str, Any] = {}
    if takes.control == "motion":
        options["motion_video"] = images(case.frames)
    if takes.control == "video":
        options["conditioning_frames"] = images(case.frames)
    if takes.control == "images":
        options |= {"conditioning_frames": images(1), "controlnet_frame_indices": [0]}
    if takes.inputs == "images":
        return list(images(case.videos)), options
    return list(itertools.islice(itertools.cycle(prompts or [_PROMPT]), case.videos)), options


def check_fits(cases: Sequence[SampleCase], groups: Sequence[Sequence[Variant]]) -> None:
    """Refuses cases that memory cannot hold.

    Args:
      cases: each is sampled with every group.
      groups: of variants that are held at once.

    Raises:
      InputError: memory is too small for one, or a checkpoint is none.
    """
    for case, group in itertools.product(cases, groups):
        modes = ", ".join(dict.fromkeys(variant.mode for variant in group))
        what = f"sampling {case.frames} frames of {case.height}x{case.width} with {modes}"
        memory.check_fits(needed_bytes(case, group), what)


def needed_bytes(case: SampleCase, variants: Sequence[Variant]) -> int:
    """Estimate of what variants need that are held at once and run in turn.

    That is their checkpoints, and the UNet's values for all videos.

    Raises:
      InputError: a checkpoint is none.
    """
    weights, working = 0, 0
    for variant in variants:
        read = read_configs(variant.mode)
        configs, quantization = read.components, read.quantization
        stride = configs.vae.stride
        frames = min(case.frames, configs.unet.max_frames or case.frames)  # more run in windows
        shapes = configs.unet_shapes(frames, case.height // stride, case.width // stride, 1)
        unet = configs.modules(DTYPES[variant.dtype], quantization)["unet"]
        params = configs.param_shapes(DTYPES[variant.dtype], quantization)
        variables = {"params": params["unet"]}
        once = memory.peak_bytes(unet.apply, variables, *shapes) - tree_bytes(variables)
        # On the CPU the UNet sees one video after the other.
        together = 1 if jax.default_backend() == "cpu" else case.videos
        weights += tree_bytes(params)
        working = max(working, (1 + read.defaults.guided) * together * once)
    return weights + working


def measure_start(case: SampleCase, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Seconds from a fresh process to its first videos, with an empty cache and with a full one.

    Returns:
      For each variant `cold_s` and `warm_s`, in which the videos were written, the parts of these
      (`cold_import_s`, and so on: see `_first_videos`), and `second_s` of sampling and decoding the
      same videos again in the same process.
    """
    results = []
    with tqdm.tqdm(total=2 * len(variants), desc="starting", unit="process") as bar:
        for variant in variants:
            spent: dict[str, float] = {}
            with tempfile.TemporaryDirectory() as cache:
                for start in ("cold", "warm"):
                    parts = in_fresh_process(
                        f"starting {variant.mode}", _first_videos, case, variant, cache, time.time()
                    )
                    spent["second_s"] = parts.pop("second")
                    spent[f"{start}_s"] = math.fsum(parts.values())
                    spent |= {f"{start}_{part}_s": seconds for part, seconds in parts.items()}
                    bar.update()
            results.append({**asdict(variant), **spent})
    return results


def measure_peaks(case: SampleCase, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Peak memory of fresh processes: that load, and that sample few or more steps.

    Returns:
      For each variant `load_bytes` and `sample_N_bytes`, N the number of steps.
    """
    results = []
    with tqdm.tqdm(total=3 * len(variants), desc="memory", unit="process") as bar:
        for variant in variants:
            peaks = {
                "load_bytes": in_fresh_process(f"loading {variant.mode}", _load_only, case, variant)
            }
            bar.update()
            for steps in MEMORY_STEPS:
                peak = in_fresh_process(
                    f"sampling with {variant.mode}", _sample_once, case, variant, steps
                )
                peaks[f"sample_{steps}_bytes"] = peak
                bar.update()
            results.append({**asdict(variant), **peaks})
    return results


def measure_cost(case: SampleCase, variant: Variant) -> dict[str, float]:
    """Median seconds and peak memory of sampling in a fresh process that has done it before."""
    seconds, peak = in_fresh_process(f"sampling with {variant.mode}", _sample_again, case, variant)
    return {"seconds": seconds, "peak_bytes": peak}


def start_table(results: Sequence[dict[str, Any]]) -> str:
    """Results of `measure_start` as Markdown: a line for each start, and what it is made of."""
    rows = []
    for r, start in itertools.product(results, ("cold", "warm")):
        row = {"checkpoint": r["mode"], "dtype": r["dtype"], "cache": start}
        for name, title in {"": "together", **{f"{part}_": part for part in PARTS}}.items():
            row[title] = f"{r[f'{start}_{name}s']:.1f} s"
        rows.append({**row, "again": f"{r['second_s']:.1f} s"})
    return markdown.table(rows)


def memory_table(results: Sequence[dict[str, Any]]) -> str:
    """Results of `measure_peaks` as Markdown."""
    rows = []
    for r in results:
        row = {"checkpoint": r["mode"], "dtype": r["dtype"]}
        for name, value in r.items():
            if name.endswith("_bytes"):
                row[name.removesuffix("_bytes").replace("_", " ")] = f"{value / 1e9:.2f} GB"
        rows.append(row)
    return markdown.table(rows)


def _first_videos(
    case: SampleCase, variant: Variant, cache: str, started: float
) -> dict[str, float]:
    """Seconds by what a process does until its first videos are written, and `second`.

    What jax says of its own work is told apart: `trace` is tracing and lowering, or reading what
    was kept of these; `compile` is XLA, or reading what was kept. `load`, `sample` and `decode`
    are the rest of each.
    """
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Seconds at which jax began and ended with something.
    tracing: list[tuple[float, float]] = []
    compiling: list[tuple[float, float]] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        kind, interval = event.rpartition("/")[2], (time.time() - duration_secs, time.time())
        if kind in ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration"):
            tracing.append(interval)
        elif kind == "backend_compile_duration":
            compiling.append(interval)

    jax.monitoring.register_event_duration_secs_listener(note)
    spent = {"import": time.time() - started, "trace": 0.0, "compile": 0.0}

    def run(part: str, function: Callable[..., T], *arguments: Any) -> T:
        begun = time.time()
        result = function(*arguments)
        traced, compiled = _covered(tracing), _covered(compiling)
        spent["trace"] += traced
        spent["compile"] += compiled
        spent[part] = time.time() - begun - traced - compiled
        tracing.clear()
        compiling.clear()
        return result

    pipe, sample = run("load", _open, case, variant)
    videos = run("decode", pipe.decode, run("sample", sample))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "videos.mp4"
        run("write", video_io.write_video, file, np.concatenate(videos), pipe.defaults.fps)
    begun = time.time()
    pipe.decode(sample())
    return {**spent, "second": time.time() - begun}


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """How much time intervals cover, which may lie within one another."""
    total, end = 0.0, 0.0
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _load_only(case: SampleCase, variant: Variant) -> int:
    build(case, variant)
    return _held_at_most()


def _sample_once(case: SampleCase, variant: Variant, steps: int) -> int:
    build(replace(case, steps=steps), variant)()
    return _held_at_most()


def _sample_again(case: SampleCase, variant: Variant) -> tuple[float, int]:
    run = build(case, variant)
    run()
    spent = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        run()
        spent.append(time.perf_counter() - started)
    return statistics.median(spent), _held_at_most()


def _held_at_most() -> int:
    """The most this process has held: on an accelerator there, else of ordinary memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says begins, on Linux, with what the parent has held.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
