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
    r"(<!-- (table|figures): (\S+)((?: \| [^|\n]+)*) -->\n).*?(?=<!-- end -->)", re.DOTALL
)
_UNITS = {"": "{}".format, "s": "{:.0f} s".format, "GB": lambda value: f"{value / 1e9:.2f} GB"}


def refresh(document: Path) -> str:
    """The document's text with the figures its files hold now."""

    def replace(found: re.Match[str]) -> str:
        mark, kind, file, options = found.groups()
        record = json.loads((document.parent / file).read_text(encoding="utf-8"))
        parts = [part.strip() for part in options.split(" | ")[1:]]
        shown = figures(record, *parts) if kind == "figures" else table(record["table"], parts)
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


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else DOCUMENTS:
        path.write_text(refresh(path), encoding="utf-8")
