"""The documents show what was measured."""

import json
from pathlib import Path

import pytest
from tables import refresh

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_their_files(document):
    assert document.read_text() == refresh(document), (
        f"python tests/tables.py {document.relative_to(ROOT)}"
    )


def test_some_table_is_shown():
    assert any("<!-- table: " in document.read_text() for document in DOCUMENTS)


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"table": "| a |"}))
    document = tmp_path / "text.md"
    document.write_text("before\n<!-- table: a.json -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    assert refresh(document) == (
        "before\n<!-- table: a.json -->\n\n| a |\n\n<!-- end -->\nafter <!-- end -->\n"
    )
