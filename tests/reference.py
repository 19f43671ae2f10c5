"""Writes the pages of `docs/reference` that come from the code: commands and policies.

    python tests/reference.py

`test_documents.py` holds the pages to the code.
"""

import argparse
import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import convert.__main__ as convert
from qvd_jax import benchmark, calibrate, evaluate, sample, train
from qvd_jax.__main__ import VERBS
from qvd_jax.quant.policy import METHODS, WIDTHS, LayerSpec, named_policy

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
COMMANDS = {
    "convert": convert,
    "qvd_jax.calibrate": calibrate,
    "qvd_jax.sample": sample,
    "qvd_jax.evaluate": evaluate,
    "qvd_jax.benchmark": benchmark,
    "qvd_jax.train": train,
}
_COMMANDS = """# Commands

Once the package is installed:

{verbs}
`python -m qvd_jax.VERB` is the same, in a clone also `python -m convert`. `--help` prints what
stands here, `--version` the version.

"""
_WRITTEN = "<!-- Written by `python tests/reference.py`. -->\n\n"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command, by module, and of every part of one that has parts."""
    found = {}
    for module, program in COMMANDS.items():
        found[module] = program._parser()
        for action in found[module]._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{module} {name}": part for name, part in action.choices.items()}
    return found


def commands() -> str:
    """Every option of every command."""
    sections = []
    for name, parser in parsers().items():
        actions = [action for action in parser._actions if action.dest not in ("help", "version")]
        text = parser.description or _help_of_part(name)
        level = "###" if " " in name else "##"
        rows = [(_call(action), _meaning(action)) for action in actions]
        sections.append(f"{level} {name}\n\n{inspect.cleandoc(text)}\n\n")
        sections[-1] += _table(("option", "meaning"), rows)
    verbs = _table(("command", "what"), [(f"`qvd {v}`", what) for v, (_, what) in VERBS.items()])
    return _WRITTEN + _COMMANDS.format(verbs=verbs) + "\n".join(sections)


def policies() -> str:
    """Every named policy and its rules."""
    rows = []
    for method in METHODS:
        by_pattern = {rule.pattern: rule.spec for rule in named_policy(f"{method}-w8a8").rules}
        ordinary, temporal = by_pattern["*"], by_pattern["*/time_emb_proj"]
        rows.append((f"`{method}`", _spec(ordinary), _spec(temporal)))
    widths = [(f"`{name}`", str(w), str(a)) for name, (w, a) in WIDTHS.items()]
    first = named_policy(f"{METHODS[0]}-w8a8")
    rules = [
        (f"`{rule.pattern}`", _spec(rule.spec), "" if rule.optional else "yes")
        for rule in first.rules
    ]
    configs = sorted((REFERENCE.parent.parent / "configs").glob("*.yaml"))
    written = [path.name for path in configs if "\nrules:" in path.read_text(encoding="utf-8")]
    return (
        _WRITTEN + "# Policies\n\nWhat they are good for is in "
        "[Choosing a policy](../concepts/policies.md), rules of your own in "
        "[Calibrate](../how-to/calibrate.md#rules-of-your-own).\n\n## Names\n\n"
        "METHOD-WIDTH, such as `qvd-plus-w4a8`:\n\n"
        + _table(("method", "ordinary layers", "temporal features"), rows)
        + "\n"
        + _table(("width", "bits of weights", "bits of inputs, 16 for float"), widths)
        + "\nWeights of 4 bits and fewer are clipped. With float inputs all methods are minmax.\n"
        + f"\n## Rules of {first.name}\n\nThe first that matches a layer's path decides. All named "
        "policies have these patterns, with the methods and widths of the table above; with float "
        "inputs temporal features are as all other layers.\n\n"
        + _table(("pattern", "how", "must match a layer"), rules)
        + "\n## Written out, to be changed\n\n"
        + "".join(f"- [`configs/{name}`](../../configs/{name})\n" for name in written)
    )


def pages() -> dict[Path, str]:
    """The text of each page."""
    return {REFERENCE / "commands.md": commands(), REFERENCE / "policies.md": policies()}


def _help_of_part(name: str) -> str:
    module, _, part = name.partition(" ")
    (group,) = (
        action
        for action in COMMANDS[module]._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    (text,) = (choice.help for choice in group._choices_actions if choice.dest == part)
    return text


def _call(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = "" if action.nargs == 0 or _is_switch(action) else f" {_value(action)}"
    return ", ".join(_code(option + value) for option in action.option_strings)


def _is_switch(action: argparse.Action) -> bool:
    return isinstance(action, argparse.BooleanOptionalAction)


def _value(action: argparse.Action) -> str:
    name = action.metavar or ("NAME" if action.choices else action.dest.upper())
    if isinstance(name, tuple):
        return " ".join(name)
    return f"{name} ..." if action.nargs == "+" else name


def _code(text: str) -> str:
    # A pipe would end a table's cell, and MkDocs shows what escapes it in code.
    return f"<code>{text.replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _meaning(action: argparse.Action) -> str:
    parts = isinstance(action, argparse._SubParsersAction)
    text = action.help or ""
    text = text % vars(action) if "%(" in text else text
    notes = ["required"] * (action.required and bool(action.option_strings))
    choices = ", ".join(map(str, action.choices or ()))
    words = [text.replace("*", r"\*").replace("|", r"\|"), *notes, choices]
    return choices if parts else "; ".join(word for word in words if word)


def _spec(spec: LayerSpec | None) -> str:
    return "float" if spec is None else str(spec)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def lines() -> Iterator[str]:
        titles = list(head)
        for cells in (titles, ["---"] * len(titles), *rows):
            yield f"| {' | '.join(cells)} |\n"

    return "".join(lines())


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
