"""Puts the figures of `docs/results/*.json` into the documents that show them.

    python tests/tables.py README.md docs/performance.md

A document says one of these lines, files relative to itself, and what follows to `<!-- end -->` is
replaced; `test_documents.py` holds the documents to it. Without names it is done to all of them.

    <!-- table: FILE.json -->
        The table the benchmark stored in the file.
    <!-- table: FILE.json | rows A; B | columns X; Y -->
        Of its rows those whose first cell is A or B, the first where several are; of its columns
        X and Y. Either may be left out. What is no table stays.
    <!-- figures: FILE.json | KEY.KEY | TITLE = NAME UNIT; TITLE = NAME -->
        A table of the figures found there, in one row or, of a list, in a row each. Units are GB
        and s; a name without one is shown as it is.
    <!-- scaling: ONE.json; SEVERAL.json; ... -->
        What the benchmark's `compiled` models of the same parts for one chip and for several, a row
        for each part, layers and file that has both: its time beside one chip's, each for a video,
        and the memory of its activations.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)

_SHOWN = re.compile(
    r"(<!-- (table|figures|scaling): ([^|\n]+?)((?: \| [^|\n]+)*) -->\n).*?(?=<!-- end -->)",
    re.DOTALL,
)
_UNITS = {"": "{}".format, "s": "{:.0f} s".format, "GB": lambda value: f"{value / 1e9:.2f} GB"}


def refresh(document: Path) -> str:
    """The document's text with the figures its files hold now."""

    def replace(found: re.Match[str]) -> str:
        mark, kind, files, options = found.groups()
        texts = ((document.parent / file).read_text("utf-8") for file in files.split("; "))
        first, *others = map(json.loads, texts)
        parts = [part.strip() for part in options.split(" | ")[1:]]
        match kind:
            case "scaling":
                shown = scaling(first, others)
            case "figures":
                shown = figures(first, *parts)
            case _:
                shown = table(first["table"], parts)
        return f"{mark}\n{shown.strip()}\n\n"

    return _SHOWN.sub(replace, document.read_text(encoding="utf-8"))


def table(text: str, options: Sequence[str]) -> str:
    """A stored table, or what the options take of it."""
    wanted = {name: names.split("; ") for name, _, names in (o.partition(" ") for o in options)}
    if not wanted:
        return text
    blocks = text.strip().split("\n\n")
    return "\n\n".join(_select(b, **wanted) if b.startswith("|") else b for b in blocks)


def _select(block: str, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> str:
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.split("\n")]
    head, rule, *body = lines
    if rows:
        by_name = {row[0]: row for row in reversed(body)}
        body = [by_name[name] for name in rows]
    places = [head.index(name) for name in columns] or range(len(head))
    return "\n".join(_line(row[place] for place in places) for row in (head, rule, *body))


def figures(record: Any, place: str, columns: str) -> str:
    """A table of what a record has at a place."""
    for key in place.split("."):
        record = record[key]
    rows = record if isinstance(record, list) else [record]
    asked = [column.partition(" = ") for column in columns.split("; ")]
    names = [named.partition(" ") for _, _, named in asked]
    lines = [
        _line(title for title, _, _ in asked),
        _line("---:" for _ in asked),
        *(_line(_UNITS[unit](row[name]) for name, _, unit in names) for row in rows),
    ]
    return "\n".join(lines)


def scaling(one: Any, several: Sequence[Any]) -> str:
    """A table of the parts of several chips, beside what one has of them."""
    head = ("part", "layers", "chips", "mesh", "ms", "of one chip's", "chip ms", "of one chip's")
    head += ("sent MB", "peak GB", "activations GB", "of one chip's")
    lines = [_line(head), _line(["---:"] * len(head))]
    # A video has two halves.
    videos = one["case"]["batch"] / 2
    alone = {
        _identity(result): (result["modelled_ms"] / videos, result["activations_bytes"])
        for result in one["results"]
    }
    for record in several:
        videos = record["case"]["batch"] / 2
        for result in record["results"]:
            if (key := _identity(result)) not in alone:
                continue
            spent, held = result["modelled_ms"] / videos, result["activations_bytes"]
            spent_alone, held_alone = alone[key]
            sent = sum(found["bytes"] for found in result["collectives"].values())
            cells = (
                result["part"],
                f"{result['mode']} {result['dtype']}",
                str(result["chips"]),
                result["mesh"],
                f"{spent:.2f}",
                f"{spent / spent_alone:.3f}",
                f"{result['chips'] * spent:.2f}",
                f"{result['chips'] * spent / spent_alone:.2f}",
                f"{sent / 1e6:.1f}",
                f"{result['peak_memory_bytes'] / 1e9:.2f}",
                f"{held / 1e9:.3f}",
                f"{held / held_alone:.2f}",
            )
            lines.append(_line(cells))
    return "\n".join(lines)


def _identity(result: Any) -> tuple[str, ...]:
    return result["part"], result["mode"], result["dtype"]


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else DOCUMENTS:
        path.write_text(refresh(path), encoding="utf-8")
