"""A conversion replaces nothing unasked, and leaves nothing half-written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orbax.checkpoint as ocp
import pytest
import random_animatediff
from refusals import assert_one_line_error

from convert.__main__ import main as convert
from qvd_jax import checkpoint, items


def test_existing_output_is_not_replaced_unless_asked(source, parent, tiny_checkpoint, run):
    shutil.copytree(tiny_checkpoint, parent / "out")
    assert_one_line_error(run(source), f"{parent}/out exists already; pass --overwrite")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "holds other files and no manifest.json; name another folder"),
        ("file", "is a file; name a folder"),
    ],
)
def test_overwrite_replaces_nothing_but_a_checkpoint(source, parent, run, kind, message):
    if kind == "folder":
        (parent / "out").mkdir()
        (parent / "out" / "thesis.tex").write_text("years of work")
    else:
        (parent / "out").write_text("years of work")
    assert_one_line_error(run(source, "--overwrite"), f"{parent}/out {message}")


def test_overwrite_replaces_a_whole_checkpoint(tmp_path, parent, tiny_checkpoint):
    out = shutil.copytree(tiny_checkpoint, parent / "out")
    (out / "stale").touch()
    random_animatediff.make_pipeline(tmp_path / "v3", "v3")
    assert convert([str(tmp_path / "v3"), "--out", str(out), "--overwrite"]) == 0
    assert [path.name for path in parent.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {
        path.name for path in tiny_checkpoint.iterdir()
    }
    assert checkpoint.read_manifest(out).description.startswith("AnimateDiff v3,")


def test_output_in_a_missing_folder_is_refused(source, parent, run):
    assert_one_line_error(
        run(source, out=parent / "lost" / "out"),
        f"{parent}/lost/out: the folder {parent}/lost does not exist; make it first",
    )


def test_lack_of_space_is_seen_before_anything_is_written(source, parent, run, monkeypatch):
    free = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(items, "save_params", None)
    outcome = run(source)
    assert_one_line_error(outcome, f"{parent}: 0.01 GB are needed, 0.00 GB are free")


@pytest.fixture
def fail_at_vae(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the writing of the second component raise."""
    save = items.save_params

    def set_failure(error: BaseException) -> None:
        def failing(folder: Path, name: str, params: Any) -> None:
            if name == "vae":
                assert (folder / "unet").is_dir()
                raise error
            save(folder, name, params)

        monkeypatch.setattr(items, "save_params", failing)

    return set_failure


def test_failure_half_way_keeps_the_checkpoint_that_was_to_be_replaced(
    source, parent, tiny_checkpoint, run, fail_at_vae
):
    shutil.copytree(tiny_checkpoint, parent / "out")
    fail_at_vae(OSError(28, "No space left on device"))
    assert_one_line_error(run(source, "--overwrite"), "[Errno 28] No space left on device")


def test_interrupt_half_way_ends_with_130_and_leaves_nothing(source, run, fail_at_vae):
    fail_at_vae(KeyboardInterrupt())
    outcome = run(source)
    assert outcome.code == 130
    assert outcome.message == "interrupted; nothing half-written is left"


def test_a_full_disk_is_an_error_and_leaves_nothing(source, run, monkeypatch):
    # TensorStore reports it like this, by no OSError.
    refusal = ValueError(
        'RESOURCE_EXHAUSTED: Error writing local file "/x/unet/_sharding": Failed writing: '
        "Failed to write 18657 bytes to file 11: No space left on device [os_error_code='28']"
    )

    def full(self: object, path: Path, **options: object) -> None:
        path.mkdir()
        raise refusal

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    assert_one_line_error(run(source), "No space left on device")
