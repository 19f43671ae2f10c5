"""Where the time of one forward goes, by kind of work."""

import collections
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import tqdm
from jax.profiler import ProfileData

from qvd_jax import markdown
from qvd_jax.benchmarks import unet
from qvd_jax.benchmarks.rounds import Variant
from qvd_jax.kernels import attention, floating, int8
from qvd_jax.quant.products import QUANTIZING

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', re.M)
PATCHES = "gathering patches"
# The first that matches the name of an operation decides. Names are of the module and, last, the
# primitive; what XLA fused bears the name of the fusion's last operation.
KINDS = {
    # With the choice by platform inside it: modules bear the same name.
    "attention": rf"/{attention.SCOPE}/cond/",
    "int8 products": rf"/{int8.SCOPE}/.*(dot|dot_general|conv_general_dilated|pallas_call)$",
    "float products": (rf"/(dot_general|conv_general_dilated)$|/{floating.SCOPE}/.*pallas_call$"),
    PATCHES: r"/(slice|pad|concatenate)$",
    # The shift to unsigned codes, for products of the CPU, is part of them.
    "quantizing": rf"/{QUANTIZING}/|/xor$",
    "norms": r"/(\w*norm\w*)/",
}
OTHER = "all else"


def profile_forwards(case: unet.Case, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Profiles one forward of each of our variants.

    Returns:
      For each variant `seconds` by kind of work: of each operation from its start to its end, on
      however many threads it runs.
    """
    return [
        {**asdict(variant), "seconds": _profile(case, variant)}
        for variant in tqdm.tqdm(variants, desc="profiling", unit="variant")
    ]


def _profile(case: unet.Case, variant: Variant) -> dict[str, float]:
    forward = unet.build(case, variant)
    names = dict(_INSTRUCTION.findall(forward.compiled.as_text() or ""))
    forward()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            forward()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = ProfileData.from_file(str(path)).planes
        spent: collections.Counter[str] = collections.Counter()
        for plane in planes:
            for line in plane.lines:
                for event in line.events:
                    name = dict(event.stats).get("hlo_op")
                    if name is not None and not _is_container(name):
                        spent[kind(names.get(name, ""))] += event.duration_ns / 1e9
    return {name: spent[name] for name in (*KINDS, OTHER)}


def _is_container(instruction: str) -> bool:
    """Whether an instruction's time is that of instructions inside it."""
    return re.match(r"(while|call|conditional)\b", instruction) is not None


def kind(operation: str) -> str:
    """The kind of work of an operation, by its name in the compiled program."""
    return next((name for name, pattern in KINDS.items() if re.search(pattern, operation)), OTHER)


def shares_table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown: seconds, and the share of the variant's whole."""
    rows = [{"work": name} for name in (*KINDS, OTHER, "together")]
    for r in results:
        title, whole = f"{r['mode']} {r['dtype']}, s", sum(r["seconds"].values())
        for row in rows:
            spent = r["seconds"].get(row["work"], whole)
            row[title] = f"{spent:.3f} ({spent / whole:.0%})"
    return markdown.table(rows)
