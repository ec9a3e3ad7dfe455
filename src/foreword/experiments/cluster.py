"""Runs as tasks of Ray, on this machine or on a cluster; a worker that dies costs the run that it was at.

The folder of results has to be the same for all machines, and so has the code: a task refuses to run other code than
was planned. Source: https://docs.ray.io/en/latest/ray-core/api/core.html
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from foreword.errors import ConfigError
from foreword.experiments.executors import Backend
from foreword.experiments.records import Job, Outcome, attempt, bury
from foreword.optional import optional

__all__ = ["RayTasks"]

_OBJECT_STORE_BYTES = 100_000_000  # jobs and outcomes are small
_ANSWER_SECONDS = 5.0


class RayTasks(Backend):
    """Tasks with shares of processors and GPUs.

    `address` is `auto` (the cluster that this machine belongs to, else one that is started here for the time being),
    `local` (one that is started here) or the address of a cluster. `workers` are the processors of a cluster that is
    started here (0: as many as there are); `gpus` None: one for each run where the cluster has any. Raises
    `MissingPackage`, or `ConfigError` if nothing answers at the address.
    """

    def __init__(
        self, address: str = "auto", *, workers: int = 0, cpus: float = 1.0, gpus: float | None = None
    ) -> None:
        # Ray decides by its environment what it reports and whether it takes the network.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = ray = optional("ray", "ray")
        _connect(ray, address, workers)
        resources = ray.cluster_resources()
        share = (1.0 if resources.get("GPU") else 0.0) if gpus is None else gpus
        for what, wanted, there in (("CPU", cpus, resources.get("CPU", 0)), ("GPU", share, resources.get("GPU", 0))):
            if wanted > there:
                ray.shutdown()
                raise ConfigError(f"{wanted:g} {what} for each run", f"at most the cluster's {there:g}", "ask for less")
        self._attempt = ray.remote(num_cpus=cpus, num_gpus=share, max_retries=0)(attempt)
        self._running: dict[Any, Job] = {}
        by_gpus = resources.get("GPU", 0) / share if share else float("inf")
        # Twice as many as fit: the cluster always has a next one, and few are lost track of at Ctrl-C.
        self.slots = max(1, int(2 * min(resources.get("CPU", 1) / cpus if cpus else 1e6, by_gpus)))

    def submit(self, job: Job) -> None:
        self._running[self._attempt.remote(job)] = job

    def next(self) -> tuple[Job, Outcome]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        job = self._running.pop(ready[0])
        try:
            return job, self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError as error:  # the record could not be written
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            return job, bury(job, f"the worker died ({type(error).__name__})")

    def close(self) -> None:
        for task in self._running:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(task, force=True)
        self._running.clear()
        self._ray.shutdown()


def _connect(ray: Any, address: str, workers: int) -> None:
    """Join the cluster at an address, or start one here."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    here = {"num_cpus": workers or None, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    if address == "auto":
        try:
            ray.init(address="auto", **quiet)
            return
        except ConnectionError:
            address = "local"
    if address != "local":
        _check_answers(address)
    try:
        ray.init(address=address, **quiet, **(here if address == "local" else {}))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unusable(address, str(error).partition("\n")[0]) from None


def _check_answers(address: str) -> None:
    """Raise unless something listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise _unusable(address, "no address")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unusable(address, str(error)) from None


def _unusable(address: str, reason: str) -> ConfigError:
    return ConfigError(f"--ray {address} ({reason})", "auto, local or HOST:PORT of a cluster", "check it")
