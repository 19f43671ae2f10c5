"""Files and folders appear whole or not at all."""

from pathlib import Path

import numpy as np
import pytest

from qvd_jax import files
from qvd_jax.errors import InputError


def write(path, *, overwrite=False):
    with files.write_folder(path, "mark.txt", overwrite=overwrite) as folder:
        (folder / "mark.txt").write_text("new")
        assert not (path / "mark.txt").exists() or (path / "mark.txt").read_text() == "old"


def test_a_folder_appears_whole_and_replaces_its_kind(tmp_path):
    place = tmp_path / "results"
    write(place)
    (place / "mark.txt").write_text("old")
    (place / "more.txt").write_text("old")
    write(place, overwrite=True)
    assert [file.read_text() for file in place.iterdir()] == ["new"]
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"results", "empty"}
    assert place.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (OSError("disk full"), InputError, "^{tmp}/results could not be written: disk full"),
        (InputError("{folder}/a.png is bad"), InputError, "^{tmp}/results/a.png is bad"),
    ],
)
def test_what_fails_leaves_what_was_there(tmp_path, error, expected, message):
    place = tmp_path / "results"
    write(place)

    def fail():
        with files.write_folder(place, "mark.txt", overwrite=True) as folder:
            (folder / "half.txt").write_text("half")
            raise type(error)(str(error).format(folder=folder))

    with pytest.raises(expected, match=message.format(tmp=tmp_path)):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert [path.name for path in place.iterdir()] == ["mark.txt"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_replaced_keeps_its_name(tmp_path, monkeypatch, failing, error):
    """Whichever of the two renames fails."""
    place, renamed, rename = tmp_path / "results", [], Path.rename
    write(place)
    (place / "mark.txt").write_text("old")

    def fail_once(path, target):
        renamed.append(path)
        if len(renamed) == failing:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises((InputError, KeyboardInterrupt), match=r"results could not be written|^$"):
        write(place, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert (place / "mark.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "overwrite", "message"),
    [
        ("mine", True, "mine holds other files and no mark.txt; name another folder"),
        ("mine/notes.txt", True, "notes.txt is a file; name a folder"),
        ("none/results", False, "the folder .*none does not exist; make it first"),
        ("earlier", False, "earlier exists already; pass --overwrite"),
    ],
)
def test_folders_of_another_kind_are_not_replaced(tmp_path, name, overwrite, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    write(tmp_path / "earlier")
    with pytest.raises(InputError, match=message):
        write(tmp_path / name, overwrite=overwrite)


def test_folders_that_lie_in_each_other_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, link = Path("a"), Path("link")
    a.mkdir()
    link.symlink_to(a)
    files.check_apart({"--out": a, "--vbench": Path("ab"), "--report": Path("b/a")})
    for one, other in ((a, a), (Path("b"), Path("b/c/d")), (Path("a/b"), tmp_path), (link, a)):
        with pytest.raises(InputError, match=f"^--out {one} and --vbench {other}: name folders"):
            files.check_apart({"--out": one, "--vbench": other})
    files.check_spared("--out", Path("a/b"), [a])
    with pytest.raises(InputError, match=r"^--out a would replace link/b; name another folder$"):
        files.check_spared("--out", a, [Path("b"), link / "b"])


def test_a_folder_in_which_nothing_can_be_kept_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    files.check_keepable(tmp_path)
    files.check_keepable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(InputError, match=r"file/a/b cannot be made: .*file is a file"):
        files.check_keepable(tmp_path / "file" / "a" / "b")
    # Of root, whom nothing is forbidden.
    monkeypatch.setattr(files.os, "access", lambda place, _: place != tmp_path)
    with pytest.raises(InputError, match=f"a/b: no permission to write in {tmp_path}$"):
        files.check_keepable(tmp_path / "a" / "b")


@pytest.mark.parametrize("data", [b"", b"PK", b"\x93NUMPY", None])
def test_damaged_arrays_are_named(tmp_path, data):
    file = tmp_path / "a.npz"
    np.savez(file, x=np.arange(3))
    np.testing.assert_array_equal(files.read_arrays(file)["x"], np.arange(3))
    if data is None:
        np.savez(file, x=np.array([{}], dtype=object))
    else:
        file.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.npz is damaged: "):
        files.read_arrays(file)
