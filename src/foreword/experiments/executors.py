"""Where runs are made: one loop over jobs, and backends that make them in this process, in others, or on a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TypeAlias

from foreword.experiments.records import Job, Outcome, Progress, attempt

__all__ = ["Backend", "InProcess", "Report", "execute"]

Report: TypeAlias = Callable[[Job, Outcome], None]


class Backend(ABC):
    """Something that makes runs, `slots` of them at a time."""

    slots: int = 1

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Begin a run; there is a free slot."""

    @abstractmethod
    def next(self) -> tuple[Job, Outcome]:
        """Wait for the end of one of the runs that were begun; a dead worker is the outcome `failed`."""

    def close(self) -> None:  # noqa: B027 - not every backend holds something
        """Stop what runs and give back what is held."""


class InProcess(Backend):
    """One run after the other in this process; `progress` gets (stage, done, total) within each."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._job: Job | None = None

    def submit(self, job: Job) -> None:
        self._job = job

    def next(self) -> tuple[Job, Outcome]:
        assert self._job is not None, "submit comes first"
        return self._job, attempt(self._job, self._progress)


def execute(jobs: Iterable[Job], backend: Backend, *, retries: int = 1, report: Report | None = None) -> Counter[str]:
    """Make all jobs and count how they ended; a failed one is tried `retries` times more, after the others.

    An error that only a person can mend is not tried again. `report` hears of every attempt. Whatever happens, also
    `KeyboardInterrupt`, the backend is closed; what is done is on disk, and what is not can be made later.

    >>> execute([], InProcess())
    Counter()
    """
    waiting = deque(jobs)
    tried: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    begun = 0
    try:
        while waiting or begun:
            while waiting and begun < backend.slots:
                backend.submit(waiting.popleft())
                begun += 1
            job, outcome = backend.next()
            begun -= 1
            tried[job.key] += 1
            if outcome.status == "failed" and outcome.again and tried[job.key] <= retries:
                waiting.append(job)
            else:
                counts[outcome.status] += 1
            if report is not None:
                report(job, outcome)
    finally:
        backend.close()
    return counts
