"""Files and folders appear whole or not at all, and a refusal of the disk is a `StorageError`."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foreword.errors import StorageError
from foreword.storage import atomic_folder, locked, remove_leftovers, storage_errors, write_atomic


def full_disk(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_atomic_replaces_and_makes_folders(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "note.txt"
    write_atomic(file, "first")
    write_atomic(file, b"second \xff")
    assert file.read_bytes() == b"second \xff"
    assert os.listdir(file.parent) == ["note.txt"]
    write_atomic(file, "é")
    assert file.read_bytes() == "é".encode()


def test_write_atomic_on_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "note.txt"
    write_atomic(file, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"note.txt \(No space left on device\); expected .*; free some space"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_write_atomic_onto_a_folder_and_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "folder", "new")
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "file" / "below", "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("existing", [False, True])
def test_atomic_folder(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "new" / "run"
    if existing:
        target.mkdir(parents=True)
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("a")
        assert existing == target.exists()
    assert (target / "sub" / "a").read_text() == "a"
    assert os.listdir(target.parent) == ["run"]


def test_atomic_folder_leaves_nothing_when_the_block_raises(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_atomic_folder_does_not_replace(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    with pytest.raises(StorageError), atomic_folder(tmp_path / "run") as folder:
        (folder / "a").write_text("a")
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["mine"]


def test_atomic_folder_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="free some space"), atomic_folder(tmp_path / "run"):
        full_disk()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_place_that_may_not_be_written(code: int) -> None:
    with pytest.raises(StorageError, match="choose a place that you may write to") as info, storage_errors("out"):
        raise OSError(code, os.strerror(code))
    assert "\n" not in str(info.value)


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from foreword.storage import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "a").write_text("a")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    target = tmp_path / "run"
    assert subprocess.run([sys.executable, "-c", script, str(target)], check=False).returncode == -9
    (tmp_path / ".run.0.tmp").write_text("a file")
    (tmp_path / ".other.0.tmp").write_text("another's")
    assert not target.exists() and len(os.listdir(tmp_path)) == 3
    remove_leftovers(target)
    assert os.listdir(tmp_path) == [".other.0.tmp"]


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from foreword.storage import locked
with locked(sys.argv[1] + "/lock"):
    free = Path(sys.argv[1], "inside")
    free.touch(exist_ok=False)
    time.sleep(0.1)
    free.unlink()
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    with locked(tmp_path):
        assert os.listdir(tmp_path) == ["lock"]
