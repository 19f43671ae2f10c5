"""Imports point down: each package uses only what lies below it."""

import ast
import re
from pathlib import Path

import pytest

import qvd_jax

ROOT = Path(qvd_jax.__file__).parent
GROUND = {
    "accelerators",
    "axes",
    "config",
    "environment",
    "errors",
    "files",
    "hosts",
    "markdown",
    "meshes",
    "progress",
}
ALLOWED = {
    "accelerators": {"environment"},
    "axes": set(),
    "environment": set(),
    "errors": set(),
    "markdown": set(),
    "meshes": {"axes", "errors"},
    "progress": set(),
    "quiet": {"accelerators", "remarks"},
    "remarks": set(),
    "files": {"errors"},
    "hosts": {"accelerators", "errors"},
    "config": {"errors", "files"},
    "memory": {"axes", "errors"},
    "programs": {"errors", "files"},
    "exported": set(),
    "items": {"axes", "errors"},
    "checkpoint": GROUND | {"items", "memory"},
    "kernels": {"axes", "errors", "meshes"},
    "models": GROUND | {"kernels"},
    "diffusion": GROUND | {"programs"},
    "data": GROUND,
    "metrics": {"axes"},
    "quant": GROUND | {"kernels", "models"},
    "pipelines": GROUND
    | {"checkpoint", "data", "diffusion", "exported", "items", "kernels", "memory", "models"}
    | {"programs", "quant"},
    "lora": GROUND | {"kernels", "models", "pipelines", "quant"},
    "training": GROUND | {"checkpoint", "data", "items", "memory"},
    "evaluation": GROUND
    | {"checkpoint", "data", "items", "memory", "metrics", "models", "pipelines", "programs"}
    | {"quant"},
    # The small models' worlds may use all of these; none of them knows them.
    "shapes": GROUND
    | {"checkpoint", "data", "diffusion", "evaluation", "metrics", "models", "pipelines"}
    | {"training"},
    "arrows": GROUND
    | {"diffusion", "evaluation", "metrics", "models", "pipelines", "shapes", "training"},
    "cli": GROUND | {"checkpoint", "data", "diffusion", "memory", "pipelines", "quiet"},
    "outputs": GROUND | {"data"},
    "benchmarks": GROUND
    | {"checkpoint", "cli", "data", "kernels", "memory", "models", "pipelines", "quant"},
}
VERBS = {"calibrate", "sample", "evaluate", "benchmark", "train"}
OTHERS = {"assets", "convert"}


def imported(path: Path) -> set[str]:
    """The modules and packages of qvd_jax a file imports, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "qvd_jax":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("qvd_jax.")}
        assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("convert"))
    return found


def test_every_module_has_its_place():
    names = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__init__", "__main__", "__pycache__"} == set(ALLOWED) | VERBS | OTHERS


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_point_down(place):
    module = ROOT / f"{place}.py"
    for path in [module] if module.exists() else (ROOT / place).rglob("*.py"):
        assert imported(path) <= ALLOWED[place] | {place}, path


def test_convert_imports_itself_by_no_name():
    """It has two, of which the one in a clone may be that of a user's file."""
    for path in (ROOT.parent / "convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = {node.module or ""}
            else:
                continue
            assert not any(re.match(r"(qvd_jax\.)?convert\b", name) for name in found), path


def test_only_convert_knows_pytorch():
    """The benchmark's peers run PyTorch in processes of their own."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path.stem == "peers" or "import torch" not in text, path


def test_every_file_says_what_it_holds_and_none_is_long():
    for folder in (ROOT, ROOT.parent / "convert", Path(__file__).parent):
        for path in folder.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert ast.get_docstring(ast.parse(text)), path
            assert len(text.splitlines()) <= 500, path
