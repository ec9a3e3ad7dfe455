"""The run folder: what was trained, with what, how it went, and where to take it up again.

    config.json         options, versions, command, base model, data and their hashes, device
    metrics.jsonl       one line per optimizer step and per measurement on the dev rows
    state.safetensors   everything that the next step depends on; a run resumes from here
    prefix/             the best prefix when the state was saved last, loadable at any time
    summary.json        status, best dev loss and score, wall time, tokens per second, peak memory
    evaluation.json     scores on the test rows and what was written or predicted for each, once evaluated
    lock                held while a process works in the folder

Every file appears by a rename, whole or not at all; lines after the state are cut off when a run resumes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from foreword.errors import RunError
from foreword.prefix import Prefix
from foreword.storage import remove_leftovers, storage_errors, write_atomic

if sys.platform != "win32":
    import fcntl
    import resource

__all__ = ["EVALUATION", "SUMMARY", "RunFolder", "State", "find_prefix", "is_run", "peak_memory_bytes", "provenance"]

CONFIG, METRICS, STATE, PREFIX, SUMMARY, LOCK, EVALUATION = (
    "config.json", "metrics.jsonl", "state.safetensors", "prefix", "summary.json", "lock", "evaluation.json",
)  # fmt: skip
_FORMAT = 1


@dataclass
class State:
    """All that a run's next step depends on: named tensors, and plain values for JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class RunFolder:
    """A run folder that this process holds the lock of; a context manager.

    `identity` says what decides the result (options, base model, data); a folder with another identity is
    refused with a `RunError` that lists what differs, unless `overwrite` clears it. Then either `summary()`
    tells that the run is finished, or `begin()` opens it for work.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self._identity = json.loads(json.dumps(identity))
        self._metrics: IO[bytes] | None = None
        with storage_errors(self.path):
            _check_foreign(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] | None = _acquire(self.path / LOCK)
        try:
            if overwrite:
                self._clear()
            for name in (CONFIG, STATE, SUMMARY, PREFIX):
                remove_leftovers(self.path / name)
            known = _read_json(self.path / CONFIG)
            if known is not None:
                _check_same(self.path, known.get("identity", {}), self._identity)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def prefix(self) -> Path:
        """Where the best prefix is."""
        return self.path / PREFIX

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, None while it is not finished."""
        summary = _read_json(self.path / SUMMARY)
        return summary if summary is not None and summary.get("status") == "finished" else None

    def begin(self, record: Mapping[str, Any]) -> State | None:
        """Open the folder for work; the state to go on from, None for a new run, whose `record` is then kept.

        Metrics that were written after the state are cut off.
        """
        if not (self.path / CONFIG).exists():
            self._write_json(CONFIG, {"format": _FORMAT, "identity": self._identity, **record})
        state = _read_state(self.path / STATE)
        size = 0 if state is None else state.values["metrics_bytes"]
        path = self.path / METRICS
        with storage_errors(path):
            self._metrics = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the folder is held
            if self._metrics.seek(0, os.SEEK_END) < size:
                raise RunError(f"{path} is shorter than when the run stopped", "all lines", "choose another --out")
            self._metrics.truncate(size)
            self._metrics.seek(0, os.SEEK_END)
        return state

    def log(self, **values: Any) -> None:
        """Append a line to the metrics."""
        assert self._metrics is not None, "begin comes first"
        line = json.dumps(values).encode() + b"\n"
        with storage_errors(self.path / METRICS):
            if self._metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_state(self, state: State) -> None:
        """Keep a state; the one before stays until the new one is whole."""
        assert self._metrics is not None, "begin comes first"
        with storage_errors(self.path / METRICS):
            os.fsync(self._metrics.fileno())
        values = {**state.values, "format": _FORMAT, "metrics_bytes": self._metrics.tell()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        write_atomic(self.path / STATE, save(tensors, {"state": json.dumps(values)}))

    def save_prefix(self, prefix: Prefix) -> None:
        """Keep the best prefix."""
        prefix.save(self.prefix)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as finished and remove what is of no more use: the state, and scores of earlier prefixes."""
        self._forget_evaluations()
        self._write_json(SUMMARY, {"status": "finished", **summary})
        (self.path / STATE).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock; a folder in which nothing was begun disappears."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._lock is not None:
            if not (self.path / CONFIG).exists():  # nothing was begun: leave nothing behind
                with contextlib.suppress(OSError):
                    (self.path / LOCK).unlink()
                    self.path.rmdir()
            self._lock.close()
            self._lock = None

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        write_atomic(self.path / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def _clear(self) -> None:
        """Remove a former run, its configuration last, so that a half-cleared folder is still known as a run."""
        with storage_errors(self.path):
            shutil.rmtree(self.prefix, ignore_errors=True)
            self._forget_evaluations()
            for name in (SUMMARY, STATE, METRICS, CONFIG):
                (self.path / name).unlink(missing_ok=True)

    def _forget_evaluations(self) -> None:
        """Remove the scores of all splits."""
        for file in self.path.glob("evaluation*.json"):
            file.unlink(missing_ok=True)


def find_prefix(path: str | Path) -> Path:
    """The prefix folder that `path` is, or the best prefix of the run folder that it is.

    Raises `RunError` for a run without a prefix yet and for runs of several seeds; any other path is returned for the
    loader to judge.
    """
    path = Path(path)
    seeds = sorted(folder.name for folder in path.glob("seed*") if is_run(folder))
    if seeds and not is_run(path):
        raise RunError(
            f"{path} holds runs of {len(seeds)} seeds", f"one of them, such as {path / seeds[0]}", "name that one"
        )
    if is_run(path):
        if not (path / PREFIX).is_dir():
            raise RunError(f"run {path} has no prefix yet", "a measured dev loss", "let the run go on")
        return path / PREFIX
    return path


def is_run(path: Path) -> bool:
    """Whether a folder is that of a single run."""
    return (path / CONFIG).is_file() and (path / METRICS).exists()


def provenance(device: object) -> dict[str, Any]:
    """Versions, command, git commit (None outside a repository), machine and start, as a run records them."""
    packages = ("foreword", "torch", "transformers", "accelerate", "safetensors")
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "versions": versions,
        "command": sys.argv,
        "git_commit": _git_commit(),
        "device": str(device),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: the GPU's for a GPU, else the process's; 0 if not known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _git_commit() -> str | None:
    """The commit of the folder that the run was started in."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
        return found.stdout.strip()
    return None


def _check_foreign(path: Path) -> None:
    """Refuse a folder that holds something else than a run."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file", "a run folder or an unused name", "choose another --out")
    if path.is_dir() and not (path / LOCK).exists() and any(path.iterdir()):
        raise RunError(f"{path} is not empty and no run folder", "an unused name", "choose another --out")


def _acquire(path: Path) -> IO[str]:
    """Hold the lock file until it is closed; `RunError` with the holder's pid if another process has it."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by the caller, which releases the lock
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                raise RunError(
                    f"process {holder} is working in {path.parent}", "one process per run folder",
                    "wait for it or choose another --out",
                ) from None  # fmt: skip
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    break
            file.close()  # its holder removed it in the meantime
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            break
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error})", "a file of a run", "choose another --out") from None
    if not isinstance(values, dict):
        raise RunError(f"{path} holds no object", "a file of a run", "choose another --out")
    return values


def _read_state(path: Path) -> State | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error})", "the state of a run", "start again with --overwrite") from None
    if values.get("format") != _FORMAT:
        raise RunError(
            f"{path} has format {values.get('format')}", f"format {_FORMAT}", "use the version that wrote it"
        )
    return State(tensors, values)


def _check_same(path: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    before, now = dict(_flat(known)), dict(_flat(wanted))
    different = [
        f"{name} {_short(before.get(name))} (now {_short(now.get(name))})"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if different:
        raise RunError(
            f"{path} holds another run: {', '.join(different)}", "the same options, base model and data",
            "choose another --out, or --overwrite it",
        )  # fmt: skip


def _short(value: Any) -> str:
    """A value for a message; of a hash its beginning."""
    if isinstance(value, str):
        value = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", value)
    return repr(value)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value
