"""What pip installs: which files, names and commands, and that nobody's file is run instead."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import convert.__main__ as convert
import qvd_jax
from qvd_jax import checkpoint
from qvd_jax.__main__ import VERBS

ROOT = Path(__file__).parent.parent


def installed_files() -> dict[str, Path]:
    """The files of a wheel by their place in it."""
    found = WheelBuilder(str(ROOT)).recurse_included_files()
    return {file.distribution_path: Path(file.path) for file in found}


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    """The files of a wheel as pip lays them out."""
    for place, path in installed_files().items():
        (tmp_path / "site" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / place).symlink_to(path)
    return tmp_path / "site"


def test_a_wheel_has_the_package_alone_and_the_converter_inside():
    files = installed_files()
    assert {Path(place).parts[0] for place in files} == {"qvd_jax"}
    assert "qvd_jax/py.typed" in files
    assert not any("__pycache__" in place for place in files)
    inside = {place for place in files if place.startswith("qvd_jax/convert/")}
    of_clone = (p for p in (ROOT / "convert").rglob("*") if p.is_file() and p.suffix != ".pyc")
    assert inside == {f"qvd_jax/{path.relative_to(ROOT)}" for path in of_clone}


def test_the_version_is_that_of_the_package():
    builder = WheelBuilder(str(ROOT))
    assert builder.metadata.version == qvd_jax.__version__
    assert checkpoint.package_versions()["qvd_jax"] == qvd_jax.__version__


def test_packages_whose_internals_are_used_are_bounded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {found.name: found.specifier for found in map(Requirement, project["dependencies"])}
    for name in ("flax", "jax", "orbax-checkpoint", "transformers"):
        assert any(bound.operator == "<" for bound in bounds[name]), name
        assert bounds[name].contains(version(name)), name


def test_an_sdist_has_what_the_tests_read():
    found = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    first = {Path(place).parts[0] for place in found}
    assert first >= {".ci", "configs", "convert", "docs", "notebooks", "qvd_jax", "tests"}
    assert first >= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml"}


def test_a_users_own_convert_is_not_run(installation, tmp_path):
    (tmp_path / "convert.py").write_text("raise SystemExit('the wrong one')")
    done = subprocess.run(
        [sys.executable, "-m", "qvd_jax.convert", "nothing", "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installation)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nothing is no folder; a diffusers pipeline folder is expected\n"


def qvd(*arguments: str) -> int:
    """Runs what pip makes of the project's one script, as with these arguments."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    ((name, target),) = scripts.items()
    sys.argv = [name, *arguments]
    return EntryPoint(name, target, "console_scripts").load()()


@pytest.fixture
def own_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.usefixtures("own_argv")
@pytest.mark.parametrize("verb", VERBS)
def test_every_command_is_a_verb_and_tells_its_version(verb, capfd):
    with pytest.raises(SystemExit, match="0"):
        qvd(verb, "--version")
    assert capfd.readouterr().out == f"qvd_jax {qvd_jax.__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        qvd(verb, "--no-such-option")
    assert capfd.readouterr().err.startswith(f"usage: qvd {verb} ")


def test_a_module_of_a_command_says_how_it_is_run(capsys):
    with pytest.raises(SystemExit, match="2"):
        convert.main(["--no-such-option"])
    assert capsys.readouterr().err.startswith("usage: python -m convert ")


@pytest.mark.usefixtures("own_argv")
def test_a_verb_that_is_none_is_named_with_those_that_are(capsys):
    with pytest.raises(SystemExit, match="2"):
        qvd("smaple")
    message = capsys.readouterr().err
    assert re.search(r"invalid choice: 'smaple' \(choose from '?convert'?, .*train'?\)", message)


def test_help_waits_for_no_framework():
    program = (
        "import sys\nimport qvd_jax.__main__\nsys.argv = ['qvd', '--help']\n"
        "try:\n    qvd_jax.__main__.main()\nfinally:\n"
        "    print({'jax', 'flax', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "commands:" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(qvd_jax.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen.keys() == set(qvd_jax.__all__)
    for name, module in seen.items():
        # Else the import of a module would put it in the place of what it defines.
        assert module != f"qvd_jax.{name}"
        assert getattr(qvd_jax, name) is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = qvd_jax.lode
