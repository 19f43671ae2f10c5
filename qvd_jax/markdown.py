"""Tables as Markdown."""

from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows by column title; cells a row lacks are empty, numbers stand to the right."""
    columns = list(dict.fromkeys(title for row in rows for title in row))
    lines = [
        columns,
        ["---", *(len(columns) - 1) * ["---:"]],
        *([row.get(title, "") for title in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
