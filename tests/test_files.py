"""Files and folders: what is there is kept, and what cannot be read is named."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from bertling.files import UNFINISHED, BertlingError, atomic_file, atomic_folder, atomic_write, read_json, sweep


def test_a_folder_that_is_there_is_kept_without_force(tmp_path: Path) -> None:
    target = tmp_path / "data"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(BertlingError, match="data: exists already; give --force to replace it"), atomic_folder(target):
        pytest.fail("worked before it refused")
    with atomic_folder(target, force=True) as folder:
        (folder / "new").touch()
        assert (target / "old").exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [None, errno.ENOLCK])
def test_what_is_being_written_survives_other_writing_beside_it_even_without_locks(
    tmp_path: Path, error: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(error, "no locks here")

    leftover = tmp_path / f".c.0{UNFINISHED}"
    leftover.touch()
    if error is not None:
        monkeypatch.setattr(fcntl, "flock", refuse)
    with atomic_file(tmp_path / "a") as file, atomic_folder(tmp_path / "b") as folder:
        file.write_text("whole")
        (folder / "part").touch()
        atomic_write(tmp_path / "c", "beside them")
    assert leftover.exists() is (error is not None), "no one can tell whose it is"
    monkeypatch.undo()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_permissions_are_those_that_the_user_gives_to_all_files(
    tmp_path: Path, umask: int, file_mode: int, folder_mode: int
) -> None:
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "a", "x")
        with atomic_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == file_mode
    assert (tmp_path / "b").stat().st_mode & 0o777 == folder_mode


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", r"a\.json: this manifest must hold a JSON object, not list$"),
        ('{"rows": ', r"a\.json: this manifest is not valid JSON \(.*\); restore or remake it$"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(BertlingError, match=message):
        read_json(tmp_path / "a.json", "manifest")
