"""Prompts from text files, of somebody's own and of the package."""

from pathlib import Path

from qvd_jax import files
from qvd_jax.errors import InputError

EXAMPLES = Path(__file__).parents[1] / "assets" / "prompts"


def read_prompts(path: Path) -> list[str]:
    """One prompt for each line that is not blank.

    Args:
      path: of a file, or the name of prompts of the package ("shapes").

    Raises:
      InputError: the file is missing, no UTF-8, or has no prompt.
    """
    own = EXAMPLES / f"{path}.txt"
    if own.parent == EXAMPLES and own.is_file() and not path.exists():
        path = own
    known = ", ".join(sorted(file.stem for file in EXAMPLES.iterdir()))
    files.check_readable(
        path, f"a text file with one prompt a line, or the name of the package's ({known}),"
    )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{path} has no prompts; one a line is expected")
    return prompts
