"""Puts the tables of `docs/results/*.json` into the documents that show them.

    python tests/tables.py README.md docs/performance.md

A document says `<!-- table: FILE.json -->`, relative to itself; what follows to `<!-- end -->` is
replaced by the table the benchmark stored in that file. `test_documents.py` holds them to it.
"""

import json
import re
import sys
from pathlib import Path

_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def refresh(document: Path) -> str:
    """The document's text with the tables its files hold now."""

    def replace(found: re.Match[str]) -> str:
        record = json.loads((document.parent / found[2]).read_text(encoding="utf-8"))
        return f"{found[1]}\n{record['table'].strip()}\n\n"

    return _TABLE.sub(replace, document.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(refresh(Path(name)), encoding="utf-8")
