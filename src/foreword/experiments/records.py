"""Results on disk, addressed by what they depend on: configuration, code and data.

    OUT/KEY/run.json       what is made, with what, each attempt and its error
    OUT/KEY/result.json    the result; it appears last and whole, and then the run is done
    OUT/KEY/lock           held while a process works in the folder; it ends with the process, however that ends

A result of other code or data has another key, so that no two kinds are ever taken for one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from foreword.errors import ForewordError, RunError, StorageError
from foreword.experiments.plan import Value
from foreword.experiments.versions import code_version, is_code, package_versions, resolve
from foreword.storage import remove_leftovers, storage_errors, write_atomic

if sys.platform != "win32":
    import fcntl

__all__ = ["Job", "Outcome", "Progress", "attempt", "bury", "key_of", "other_results", "read_record", "read_result",
           "state_of"]  # fmt: skip

Progress = Callable[[str, int, int], None]

RECORD, RESULT, LOCK = "run.json", "result.json", "lock"
_FORMAT = 1
_KEY_LENGTH = 20  # hexadecimal digits, 80 bits
_LOOKS, _LOOK_SECONDS = 5, 0.02  # somebody who asks whether a lock is held has it for a moment


@dataclass(frozen=True)
class Job:
    """One run to be made, in plain values, so that it can go to any process.

    `folder` is where its result belongs; `command` makes this run alone; `git` is the state of the checkout.
    """

    name: str
    config: dict[str, Value]
    perform: str
    code: str
    data: str
    folder: str
    command: str = ""
    git: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """The name of the folder."""
        return key_of(self.config, self.perform, self.code, self.data)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `done`, `failed`, or `busy` where another process makes the run; `again` may help."""

    status: str
    error: str = ""
    again: bool = False
    seconds: float = 0.0


def key_of(config: Mapping[str, Value], perform: str, code: str, data: str) -> str:
    """The name of a run's folder; the order of the configuration does not matter.

    >>> key_of({"a": 1, "b": 2}, "f", "", "") == key_of({"b": 2, "a": 1}, "f", "", "")
    True
    """
    text = json.dumps({"config": dict(config), "perform": perform, "code": code, "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


def attempt(job: Job, progress: Progress | None = None) -> Outcome:
    """Make one run in this process, unless it is there or another process is at it; an error is kept in its record.

    Raises `StorageError` when the record itself cannot be written, and what is no error of the run:
    `KeyboardInterrupt`.
    """
    folder = Path(job.folder)
    with _open(folder) as state:
        if state:
            return Outcome(state)
        for name in (RECORD, RESULT):
            remove_leftovers(folder / name)
        record = _Record(job)
        record.begin()
        try:
            text, device = _made(job, folder, progress)
        except (Exception, SystemExit) as error:
            told = f"{type(error).__name__}: {error}".strip()
            again = not isinstance(error, ForewordError)
            return record.end("failed", told, again, traceback="" if not again else traceback.format_exc())
        outcome = record.end("done", device=device)
        write_atomic(folder / RESULT, text)
        return outcome


def bury(job: Job, error: str) -> Outcome:
    """Note that the process that made a run is dead; `busy` if one is at it nevertheless."""
    with _open(Path(job.folder)) as state:
        if state:
            return Outcome(state)
        record = _Record(job)
        if record.values.get("status") != "running":  # it died before it began
            record.begin()
        return record.end("failed", error, again=True)


def state_of(folder: str | Path) -> str:
    """`done`, `running`, `failed`, or `missing`: never begun, or stopped in the middle."""
    folder = Path(folder)
    if (folder / RESULT).exists():
        return "done"
    if _is_held(folder / LOCK):
        return "running"
    return "failed" if read_record(folder).get("status") == "failed" else "missing"


def read_record(folder: str | Path) -> dict[str, Any]:
    """What is known of a run; empty if nothing is. Raises `RunError` for a damaged file."""
    return _read(Path(folder) / RECORD) or {}


def read_result(folder: str | Path) -> dict[str, Any] | None:
    """The result of a run that is done, else None. Raises `RunError` for a damaged file."""
    return _read(Path(folder) / RESULT)


def other_results(out: str | Path, code: str) -> int:
    """How many results in `out` come from other code than this, and are taken for none of its runs."""
    folders = [path.parent for path in Path(out).glob(f"*/{RESULT}")]
    return sum(read_record(folder).get("code") != code for folder in folders)


@dataclass
class _Record:
    """The file that says how a run goes; former attempts stay in it."""

    job: Job
    values: dict[str, Any] = field(default_factory=dict)
    began: float | None = None

    def __post_init__(self) -> None:
        self.path = Path(self.job.folder) / RECORD
        self.values = _read(self.path) or {}

    def begin(self) -> None:
        former = self.values.get("attempts", [])
        for each in former:
            if each["status"] == "running":
                each["status"] = "interrupted"
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        plain = {name: value for name, value in asdict(self.job).items() if name != "folder"}
        self.values = {
            "format": _FORMAT, "key": self.job.key, **plain, "versions": package_versions(),
            "machine": f"{platform.node()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            "status": "running",
            "attempts": [*former, {"started": started, "process": os.getpid(), "status": "running"}],
        }  # fmt: skip
        self.began = time.perf_counter()
        self._write()

    def end(self, status: str, error: str = "", again: bool = False, **more: str) -> Outcome:
        seconds = 0.0 if self.began is None else time.perf_counter() - self.began
        told = {name: text for name, text in {"error": error, **more}.items() if text}
        self.values["attempts"][-1].update(status=status, seconds=seconds, **told)
        self.values.update(status=status, seconds=seconds, device=more.get("device", ""))
        self._write()
        return Outcome(status, error, again, seconds)

    def _write(self) -> None:
        write_atomic(self.path, _json(self.values))


def _made(job: Job, folder: Path, progress: Progress | None) -> tuple[str, str]:
    """The result as JSON, and the device that it was made on."""
    here = code_version(job.perform)
    if here != job.code:
        raise RunError(f"code {here[:8]} in this process", f"code {job.code[:8]}, as planned", "start the study again")
    result = resolve(job.perform)(dict(job.config), folder, progress or (lambda *_: None))
    if not is_code(job.code, job.perform):
        raise RunError(
            "source files or packages changed during the run", f"code {job.code[:8]}", "start the study again"
        )
    return _json({"key": job.key, "name": job.name, "config": job.config, **result}), str(result.get("device", "cpu"))


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error})", "a file of a study", f"remove {path.parent}") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} holds no object", "a file of a study", f"remove {path.parent}")
    return values


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[str]:
    """Inside, this process may make the run if the yielded state is ""; else the run is `done`, or `busy` elsewhere."""
    with _held(folder / LOCK) as mine:
        yield "busy" if not mine else "done" if (folder / RESULT).exists() else ""


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Inside, this process has the lock, or the yielded value is False. Systems without `fcntl` have no locks."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    with file:
        mine = _take(file)
        for _ in range(_LOOKS):
            if mine:
                break
            time.sleep(_LOOK_SECONDS)
            mine = _take(file)
        if mine:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield mine


def _is_held(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), open(path, "r+", encoding="utf-8") as file:  # NFS locks no reader's
        return not _take(file)
    return False


def _take(file: IO[str]) -> bool:
    """Lock a file until it is closed, if nobody has it."""
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StorageError(
                f"{file.name} cannot be locked ({error.strerror})", "a file system with locks", "choose another --out"
            ) from None
    return True
