"""The documents show what was measured, name what exists, and their commands are real ones."""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from reference import pages, parsers
from tables import DOCUMENTS, refresh

import qvd_jax
from qvd_jax.__main__ import VERBS
from qvd_jax.calibrate import read_policy
from qvd_jax.config import from_dict
from qvd_jax.quant.policy import Policy

ROOT = Path(__file__).parent.parent
REFERENCE = pages()
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")
_OTHERS = re.compile(
    r"python3? -m (venv|pytest)\b|python -c |(mkdocs|grep|ruff|mkdir) |\. |mypy$|qvd --version$"
    r"|pip install (setuptools|--no-build-isolation) "
)


def named(document: Path) -> str:
    return str(document.relative_to(ROOT))


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(document: Path, language: str) -> list[str]:
    return [code for kind, code in _FENCED.findall(text_of(document)) if kind == language]


def prose(document: Path) -> str:
    return _FENCED.sub("", text_of(document))


def commands(document: Path) -> Iterator[str]:
    """Commands of shell blocks one by one, and those in the text that have options."""
    for block in blocks(document, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part for part in line.split(" && ") if part and part[0] != "#")
    for code in _INLINE.findall(prose(document)):
        if re.match(r"(python -m (convert|qvd_jax\.\w+)|qvd) .*--", code) and "..." not in code:
            yield code


def anchors(document: Path) -> set[str]:
    """What GitHub and MkDocs make of a document's headings, and what it names itself."""
    text = text_of(document)
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}
    own = set(re.findall(r'<a id="([^"]+)">', text))
    return slugs | own | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_tables_are_those_of_their_files(document):
    assert text_of(document) == refresh(document), f"python tests/tables.py {named(document)}"


@pytest.mark.parametrize("page", REFERENCE, ids=named)
def test_the_reference_is_that_of_the_code(page):
    assert text_of(page) == REFERENCE[page], "python tests/reference.py"


def test_every_public_name_is_in_the_reference():
    found = re.findall(r"^::: qvd_jax\.(\w+)$", text_of(ROOT / "docs/reference/api.md"), re.M)
    assert sorted(found) == sorted(qvd_jax.__all__)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document):
    for link in _LINK.findall(prose(document)):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_files_and_tests_that_are_named_exist(document):
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for code in _INLINE.findall(prose(document)):
        if re.fullmatch(r"(qvd_jax|convert|tests|configs|notebooks|docs)/[\w./*-]+", code):
            assert any(ROOT.glob(code)), code
        elif re.fullmatch(r"test_\w+", code):
            assert f"def {code}(" in tests, code


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_are_parsed_by_their_programs(document):
    known = parsers()
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for command in commands(document):
        program = command.replace(".venv/bin/", "")
        if found := re.match(r"pip install (?:-q |-e )*(?:'?\.(?:\[(.+)\])?'?)$", program):
            assert set((found[1] or "convert").split(",")) <= set(extras), command
        elif found := re.match(r"python (tests/\w+\.py)", program):
            assert (ROOT / found[1]).is_file(), command
        elif not _OTHERS.match(program):
            module, arguments = called(shlex.split(program))
            assert module in known, command
            complaint = io.StringIO()
            with contextlib.redirect_stderr(complaint), contextlib.suppress(SystemExit):
                check_values(known[module].parse_args(arguments))
            assert not complaint.getvalue(), f"{command}\n{complaint.getvalue()}"


def called(words: list[str]) -> tuple[str, list[str]]:
    """The module of a command, as the reference names it, and its arguments."""
    if words[0] == "qvd":
        module, arguments = VERBS[words[1]][0], words[2:]
    else:
        assert words[:2] == ["python", "-m"], words
        module, arguments = words[2], words[3:]
    return re.sub(r"^qvd_jax\.convert(\.__main__)?$", "convert", module), arguments


def check_values(arguments) -> None:
    """Files of the repository and policies exist; what a reader has cannot be looked for."""
    for given in vars(arguments).values():
        for value in given if isinstance(given, list) else [given]:
            if str(value).startswith("configs/"):
                assert (ROOT / value).is_file(), value
    policies = getattr(arguments, "policy", [])
    for policy in policies if isinstance(policies, list) else [policies]:
        read_policy(str(ROOT / policy) if "/" in policy else policy)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_examples_are_python_and_policies(document):
    for code in blocks(document, "python"):
        used = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
        of_package = [n.attr for n in used if getattr(n.value, "id", "") == "qvd_jax"]
        assert set(of_package) <= set(qvd_jax.__all__)
    for code in blocks(document, "yaml"):
        from_dict(Policy, yaml.safe_load(code), named(document))


def test_the_lines_that_install_the_metrics_are_of_the_extras_versions():
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    line = f"pip install --no-build-isolation {' '.join(extras['metrics'])}"
    assert line in commands(ROOT / "docs/install.md")


def test_some_of_everything_is_checked():
    """Else a pattern that finds nothing would hold everything."""
    assert any("<!-- table: " in text_of(document) for document in DOCUMENTS)
    assert any("<!-- figures: " in text_of(document) for document in DOCUMENTS)
    assert sum(len(list(commands(document))) for document in DOCUMENTS) > 50
    assert sum(len(_LINK.findall(prose(document))) for document in DOCUMENTS) > 100


def test_a_package_index_shows_the_readme_without_broken_links():
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= 200
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"][
        "hooks"
    ]
    shown = readme
    for change in hooks["fancy-pypi-readme"]["substitutions"]:
        shown = re.sub(change["pattern"], change["replacement"], shown)
    assert "Hardware status (`docs/hardware.md`)" in shown
    assert "[arXiv 2407.11585](https://" in shown
    assert not re.search(r"\]\((?!https://)", shown)


def test_only_what_stands_between_the_marks_is_replaced(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"table": "| a |"}))
    document = tmp_path / "text.md"
    document.write_text("before\n<!-- table: a.json -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    assert refresh(document) == (
        "before\n<!-- table: a.json -->\n\n| a |\n\n<!-- end -->\nafter <!-- end -->\n"
    )


def test_rows_columns_and_figures_are_chosen(tmp_path):
    rows = "| x | 1 |  |\n| y | 2 | 3 |\n| x | 4 |  |"
    table = f"how\n\n| a | b, c | d |\n| --- | ---: | ---: |\n{rows}"
    found = {"runs": [{"seconds": 1.6, "peak_bytes": 2.5e9}, {"seconds": 2, "peak_bytes": 1e9}]}
    (tmp_path / "a.json").write_text(json.dumps({"table": table, "found": found}))
    document = tmp_path / "text.md"
    document.write_text(
        "<!-- table: a.json | rows y; x | columns b, c; a -->\n<!-- end -->\n"
        "<!-- figures: a.json | found.runs | time = seconds s; peak = peak_bytes GB -->\n"
        "<!-- end -->\n"
    )
    chosen = "how\n\n| b, c | a |\n| ---: | --- |\n| 2 | y |\n| 1 | x |"
    figures = "| time | peak |\n| ---: | ---: |\n| 2 s | 2.50 GB |\n| 2 s | 1.00 GB |"
    assert re.sub(r"<!--.*?-->\n", "", refresh(document)) == f"\n{chosen}\n\n\n{figures}\n\n"
    document.write_text("<!-- table: a.json | rows z -->\n<!-- end -->\n")
    with pytest.raises(KeyError, match="z"):
        refresh(document)


def test_what_several_chips_take_stands_beside_what_one_takes(tmp_path):
    def record(file, batch, **result):
        known = {"part": "unet", "mode": "float", "dtype": "bfloat16", "peak_memory_bytes": 2e9}
        known["activations_bytes"] = 4e8 if batch == 2 else 1e8
        told = {"case": {"batch": batch}, "results": [known | result]}
        (tmp_path / file).write_text(json.dumps(told))

    record("one.json", 2, modelled_ms=80)
    sent = {"all-to-all": {"count": 2, "bytes": 3e6}, "all-reduce": {"count": 1, "bytes": 5e5}}
    record("four.json", 4, modelled_ms=50, chips=4, mesh="frame=4", collectives=sent)
    document = tmp_path / "text.md"
    document.write_text("<!-- scaling: one.json; four.json -->\n<!-- end -->\n")
    # Of four halves, two videos': 25 ms each, a hundred of four chips.
    times = "25.00 | 0.312 | 100.00 | 1.25"
    expected = f"| unet | float bfloat16 | 4 | frame=4 | {times} | 3.5 | 2.00 | 0.100 | 0.25 |"
    assert refresh(document).splitlines()[-3] == expected


@pytest.mark.slow
def test_getting_started_runs_as_written(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in commands(ROOT / "docs/getting-started.md"):
        if command.startswith("python "):
            arguments = shlex.split(command)[1:]
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=1200,
            )
            assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
