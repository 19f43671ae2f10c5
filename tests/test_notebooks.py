"""The notebooks run as they stand, in a process of their own for each."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHELL = """
import os, shlex, subprocess, sys, types
def shell(line):
    line = line.format(**globals()).replace("\\\\\\n", " ")
    line = line.replace("python ", shlex.quote(sys.executable) + " ")
    subprocess.run(line, shell=True, check=True)
# What shows a picture in a notebook; Jupyter is not needed to run the rest.
display = types.ModuleType("IPython.display")
display.Image = lambda path: open(path, "rb").close()
sys.modules |= {"IPython": types.ModuleType("IPython"), "IPython.display": display}
"""


def program(notebook: Path) -> str:
    """The code cells as a script; commands go through the shell, installations are left out."""
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = re.sub(r"^%pip .*$", "", code, flags=re.MULTILINE)
    code = re.sub(r"^%cd (.*)$", r"os.chdir('\1')", code, flags=re.MULTILINE)
    command = re.compile(r"^!((?:.*\\\n)*.*)$", re.MULTILINE)
    return SHELL + command.sub(lambda found: f"shell({found[1]!r})", code)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_code_without_outputs(notebook):
    compile(program(notebook), notebook.name, "exec")
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs"), "clear the outputs before committing"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "notebooks").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program(notebook)],
        cwd=tmp_path / "notebooks",
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
