"""What a package index shows of this package; everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def for_an_index(readme: str) -> str:
    """The README without pictures and links of the repository, none of whose files an index has.

    A link becomes its text and the name of the file.
    """
    readme = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)([^)]*)\)", r"\1 (`\2`)", readme)


if __name__ == "__main__":
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(
        long_description=for_an_index(readme),
        long_description_content_type="text/markdown",
    )
