"""Local worker processes that share the cores; one that dies costs the run that it was at, and is replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from foreword.errors import ConfigError
from foreword.experiments.executors import Backend
from foreword.experiments.records import Job, Outcome, Progress, attempt, bury

__all__ = ["LocalWorkers"]

_TELL_SECONDS = 0.5  # between two messages on how far a run is
_STOP_SECONDS = 5.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    job: Job | None = None


class LocalWorkers(Backend):
    """`count` processes with `threads` threads each (0: the cores divided among them).

    A process keeps what it has loaded for its next run. All of them end with this one, even if it is killed.
    """

    def __init__(self, count: int, threads: int = 0, progress: Progress | None = None) -> None:
        if count < 1:
            raise ConfigError(f"{count} workers", "at least 1", "correct it")
        self.slots = count
        self.threads = threads or max(1, _cores() // count)
        self._progress = progress
        self._workers: list[_Worker] = []

    def submit(self, job: Job) -> None:
        worker = next((each for each in self._workers if each.job is None), None)
        if worker is not None and not worker.process.is_alive():
            self._remove(worker)
            worker = None
        worker = worker or self._start()
        worker.job = job
        with contextlib.suppress(OSError):  # a dead worker is noticed when it is waited for
            worker.pipe.send(job)

    def next(self) -> tuple[Job, Outcome]:
        busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        while True:
            for pipe in connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                job = worker.job
                assert job is not None
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    return job, self._died(worker, job)
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, Outcome):
                    worker.job = None
                    return job, message
                if self._progress is not None:
                    stage, done, total = message
                    self._progress(f"{job.name}: {stage}", done, total)

    def close(self) -> None:
        for worker in self._workers:
            if worker.job is None:
                worker.pipe.close()  # it ends by itself, and gives back what it holds
            else:
                worker.process.terminate()
        for worker in list(self._workers):
            worker.process.join(_STOP_SECONDS)
            self._remove(worker)

    def _start(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_work, args=(theirs, self.threads), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the worker
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _died(self, worker: _Worker, job: Job) -> Outcome:
        worker.process.join(_STOP_SECONDS)
        code = worker.process.exitcode
        self._remove(worker)
        how = "" if code is None else f" ({signal.Signals(-code).name})" if code < 0 else f" (exit status {code})"
        return bury(job, f"the worker died{how}")

    def _remove(self, worker: _Worker) -> None:
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join()
        worker.process.close()
        worker.pipe.close()
        self._workers.remove(worker)


def _work(pipe: Connection, threads: int) -> None:
    """The life of a worker: one job after the other, until there is nobody to send any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in _THREADS:
        os.environ[name] = str(threads)  # before anything is imported that computes
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            job = pipe.recv()
            _set_threads(threads)
            try:
                answer: Any = attempt(job, _Teller(pipe))
            except Exception as error:  # the record could not be written: the study's problem, not the run's
                answer = error
            pipe.send(answer)


class _Teller:
    """Tells the parent how far a run is, now and then."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._told = pipe, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            with contextlib.suppress(OSError):  # the parent is gone, and so is this process in a moment
                self._pipe.send((stage, done, total))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _set_threads(threads: int) -> None:
    """Also where torch was imported before."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
