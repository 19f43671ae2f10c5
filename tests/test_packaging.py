"""What pip installs: which files, under which names, and that nobody's file is run instead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

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
    assert not any("__pycache__" in place for place in files)
    inside = {place for place in files if place.startswith("qvd_jax/convert/")}
    of_clone = (p for p in (ROOT / "convert").rglob("*") if p.is_file() and p.suffix != ".pyc")
    assert inside == {f"qvd_jax/{path.relative_to(ROOT)}" for path in of_clone}


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
