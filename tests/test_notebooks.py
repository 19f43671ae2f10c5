"""The notebooks run as they stand, in a process of their own for each."""

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    code = re.sub(r"^( *)%cd (.*)$", r"\1os.chdir('\2')", code, flags=re.MULTILINE)
    command = re.compile(r"^!((?:.*\\\n)*.*)$", re.MULTILINE)
    return SHELL + command.sub(lambda found: f"shell({found[1]!r})", code)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_code_without_outputs(notebook):
    compile(program(notebook), notebook.name, "exec")
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs"), "clear the outputs before committing"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_install_for_their_device_beside_the_runtimes_torch_and_show_it(notebook):
    """Without an upgrade pip leaves what fits; jax comes with the accelerator's part of itself."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    cells = json.loads(notebook.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (line,) = re.findall(r"^%pip install -q (.*)$", code, re.MULTILINE)
    assert not re.search(r"-U|--upgrade|torch", line)
    choice = re.search(r"^extra = (.*)$", code, re.MULTILINE)
    for runtime in ("cuda", "tpu", ""):
        has = {"gpu": runtime == "cuda", "tpu": runtime == "tpu"}
        extra = eval(choice[1], has) if choice else ""
        asked = re.match(r"[\"']\.(?:\[([\w,]+)\])?[\"']", line.replace("{extra}", extra))
        named = set((asked[1] or "").split(",")) - {""}
        assert named <= extras.keys()
        assert runtime in {*named, ""} or notebook.stem == "tpu"
        for requirement in map(Requirement, itertools.chain(*(extras[name] for name in named))):
            assert requirement.name != "torch" or requirement.specifier.contains("2.8.0")
    assert "jax.devices()" in code


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_first_cell_that_is_run_again_stays_in_the_clone(notebook, tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    (clone / "notebooks").mkdir(parents=True)
    (clone / "pyproject.toml").touch()
    monkeypatch.chdir(clone / "notebooks")
    (first,) = re.findall(r"^if not Path.*\n    os\.chdir\(.*\)$", program(notebook), re.MULTILINE)
    for _ in range(2):
        exec(first, {"Path": Path, "os": os})
        assert Path.cwd() == clone


def test_notebooks_take_the_diffusers_of_the_tests():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (wanted,) = (found for found in extras["test"] if found.startswith("diffusers"))
    assert f"'{wanted}'" in (ROOT / "notebooks/convert-and-quantize.ipynb").read_text()


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
