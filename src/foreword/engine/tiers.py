"""Prefixes in memory: on the device, below that in host memory, below that in the source, usually the disk.

Each tier has a budget in bytes; what was used least recently goes first. Loading is done by threads of its own, and
never twice at once for the same prefix.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from foreword.errors import EngineStopped
from foreword.prefix import Prefix, Sites
from foreword.threads import release_team

__all__ = ["BankStats", "PrefixBank", "PrefixSource", "Resident"]

_LOADERS = 2


class PrefixSource(Protocol):
    """Where prefixes come from, usually a `PrefixStore`."""

    def load(self, key: str) -> Prefix:
        """The prefix of a key; blocks. Raises `ForewordError` for one that is missing or damaged."""
        ...


class Resident(NamedTuple):
    """A prefix as rows take it: its sites on the device, its position offset, and whether gates read the prompt."""

    sites: Sites
    position_offset: int
    reads_prompt: bool

    @property
    def num_bytes(self) -> int:
        return sum(
            tensor.nbytes
            for tensors in self.sites.values()
            for tensor in (tensors.keys, tensors.values, tensors.log_mass, tensors.gate and tensors.gate.weight)
            if tensor is not None
        )


@dataclass
class BankStats:
    """Counts since the start; bytes and entries are those of now."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0
    entries: int = 0
    num_bytes: int = 0
    host_entries: int = 0
    host_bytes: int = 0


_V = TypeVar("_V")


class _Tier(Generic[_V]):
    """Values by key, the most recently used last, within a budget in bytes."""

    def __init__(self, budget: int) -> None:
        self.budget, self.num_bytes, self.evictions = budget, 0, 0
        self.entries: OrderedDict[str, tuple[_V, int]] = OrderedDict()

    def get(self, key: str) -> _V | None:
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key][0]

    def put(self, key: str, value: _V, num_bytes: int) -> None:
        """Keep a value, in place of the least recently used ones; one that is larger than the budget is not kept."""
        self.pop(key)
        if num_bytes > self.budget:
            return
        while self.num_bytes + num_bytes > self.budget:
            self.pop(next(iter(self.entries)))
            self.evictions += 1
        self.entries[key] = value, num_bytes
        self.num_bytes += num_bytes

    def pop(self, key: str) -> None:
        found = self.entries.pop(key, None)
        if found is not None:
            self.num_bytes -= found[1]


class PrefixBank:
    """Prefixes of a source, in memory as far as the budgets go.

    `prepare` checks a prefix against the base model and brings it to the device. `host_bytes` is the budget of the
    middle tier, 0 where the device is the host. `on_change` is called, in any thread, when a load has ended.
    """

    def __init__(
        self,
        source: PrefixSource,
        prepare: Callable[[Prefix], Resident],
        *,
        device_bytes: int,
        host_bytes: int = 0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._source, self._prepare, self._on_change = source, prepare, on_change
        self._device: _Tier[Resident] = _Tier(device_bytes)
        self._host: _Tier[Prefix] = _Tier(host_bytes)
        self._loading: dict[str, Future[Resident]] = {}
        self._stats = BankStats()
        self._closed = False
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_LOADERS, thread_name_prefix="foreword-load")

    def fetch(self, key: str) -> Future[Resident]:
        """The prefix of a key: at once where it is on the device, else when a loader has brought it there."""
        with self._lock:
            resident = self._device.get(key)
            if resident is not None:
                self._stats.hits += 1
                done: Future[Resident] = Future()
                done.set_result(resident)
                return done
            if key in self._loading:
                return self._loading[key]
            if self._closed:
                raise EngineStopped("the bank is closed", "a running engine", "try another server")
            self._stats.misses += 1
            future: Future[Resident] = Future()
            future.set_running_or_notify_cancel()  # many may wait for it: none of them can cancel it
            self._loading[key] = future
            self._pool.submit(self._load, key, future)
        return future

    def evict(self, key: str) -> None:
        """Forget a prefix in every tier; a load that is under way serves those who wait for it and is not kept."""
        with self._lock:
            self._device.pop(key)
            self._host.pop(key)
            self._loading.pop(key, None)

    def stats(self) -> BankStats:
        """What the tiers hold and have done."""
        with self._lock:
            found = BankStats(**vars(self._stats))
            found.evictions = self._device.evictions
            found.entries, found.num_bytes = len(self._device.entries), self._device.num_bytes
            found.host_entries, found.host_bytes = len(self._host.entries), self._host.num_bytes
        return found

    def close(self) -> None:
        """End the loaders; what has not been loaded fails."""
        with self._lock:
            self._closed = True
            waiting, self._loading = list(self._loading.values()), {}
        self._pool.shutdown(wait=False, cancel_futures=True)
        for future in waiting:
            with contextlib.suppress(InvalidStateError):  # it has just been loaded
                future.set_exception(EngineStopped("the bank is closed", "a running engine", "try another server"))

    def check(self) -> None:
        """Raise `AssertionError` unless bytes add up and stay in their budgets; for tests."""
        with self._lock:
            for tier in (self._device, self._host):
                assert tier.num_bytes == sum(num_bytes for _, num_bytes in tier.entries.values())
                assert tier.num_bytes <= tier.budget, f"{tier.num_bytes} bytes of {tier.budget}"

    def _load(self, key: str, future: Future[Resident]) -> None:
        try:
            with self._lock:
                prefix = self._host.get(key)
            loaded = self._source.load(key) if prefix is None else prefix
            with torch.no_grad():
                resident = self._prepare(loaded)
            with self._lock:
                if self._loading.get(key) is future:
                    del self._loading[key]
                    self._device.put(key, resident, resident.num_bytes)
                    if prefix is None:
                        self._host.put(key, loaded, loaded.num_bytes)
            with contextlib.suppress(InvalidStateError):  # the bank was closed in between
                future.set_result(resident)
        except BaseException as error:
            with self._lock:
                self._stats.failures += 1
                if self._loading.get(key) is future:
                    del self._loading[key]
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error)
        release_team()
        self._on_change()
