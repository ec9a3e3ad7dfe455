"""Writing to disk, whole or not at all: files and folders that appear by one rename, and locks between processes.

A reader sees the old content or the new, also when the writer is killed or the machine stops: everything is
flushed before the rename. A refusal of the disk is a `StorageError` that says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from foreword.errors import StorageError

__all__ = [
    "atomic_folder", "file_sha256", "locked", "remove_leftovers", "storage_errors", "sync_folder", "write_atomic",
]  # fmt: skip

_CHUNK_BYTES = 1 << 20
_ACTIONS = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that you may write to",
}


@contextlib.contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Raise the `OSError`s of the block as `StorageError` about writing `path`.

    >>> with storage_errors("out/e2e"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    foreword.errors.StorageError: cannot write out/e2e (No space left on device); expected a writable place \
with enough space; free some space or choose another place
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        action = _ACTIONS.get(error.errno or 0, "choose another place")
        raise StorageError(f"cannot write {path} ({reason})", "a writable place with enough space", action) from error


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file, text as UTF-8, whole or not at all; folders above it are made.

    Raises `StorageError`; the file that was there before is then unchanged.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> write_atomic(path, "hello")
    >>> path.read_text()
    'hello'
    """
    path = Path(path)
    temporary = _sibling(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Fill the folder that is yielded; when the block ends well, it becomes `path`.

    `path` must not exist or be empty. When the block raises, nothing stays behind. Raises `StorageError`, also
    for an `OSError` of the block itself.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "run"
    >>> with atomic_folder(target) as folder:
    ...     _ = (folder / "a.txt").write_text("a")
    >>> [file.name for file in target.iterdir()]
    ['a.txt']
    """
    path = Path(path)
    temporary = _sibling(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in files:
                    _sync(Path(folder, name))
                sync_folder(Path(folder))
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the lock of a folder that exists, or of a file that is made for it; others wait for it.

    The lock ends with the process that holds it. Systems without `fcntl` (Windows) have none. Raises `OSError`.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = Path(path)
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(path: str | Path) -> None:
    """Remove what killed writers of `path` left beside it. Call it only while nobody else can be writing `path`."""
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, where the system can: a rename lasts only from then on."""
    if os.name == "posix":
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path) -> Path:
    """A new name beside `path`: the same file system, so that a rename is atomic; hidden."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
