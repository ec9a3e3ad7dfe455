"""Who is next: requests of several tenants wait in one bounded queue, and each tenant gets its share.

Start-time fair queueing over tokens (Goyal, Vin and Cheng 1996): every tenant has a counter of the tokens that it was
given; the least one is next. Who had nothing waiting begins where the last one stood who was next, so that nobody saves
up.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

_T = TypeVar("_T")


class FairQueue(Generic[_T]):
    """Items of tenants, in order of arrival within each, and fair between them.

    >>> queue = FairQueue()
    >>> for tenant, item in [("a", "a1"), ("a", "a2"), ("b", "b1")]:
    ...     queue.push(tenant, item)
    >>> order = []
    >>> while (taken := queue.pop(lambda item: True)) is not None:
    ...     order += [taken[1]]
    ...     _ = queue.charge(taken[0], 10)
    >>> order
    ['a1', 'b1', 'a2']
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[_T]] = OrderedDict()
        self._served: dict[str, float] = {}
        self._running: dict[str, int] = {}
        self._now = 0.0  # the counter of who was last given a turn
        self._count = 0  # kept apart, so that other threads may ask

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[_T]:
        """All that waits, tenants by turns, those with the least service first."""
        queues = [iter(self._waiting[tenant]) for tenant in self._order()]
        while queues:
            left = []
            for queue in queues:
                for item in queue:
                    yield item
                    left.append(queue)
                    break
            queues = left

    def count(self, tenant: str) -> int:
        """How many items of a tenant wait."""
        return len(self._waiting.get(tenant, ()))

    def push(self, tenant: str, item: _T) -> None:
        """Let an item wait behind those of its tenant."""
        if tenant not in self._waiting:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._now)
        self._waiting.setdefault(tenant, deque()).append(item)
        self._count += 1

    def pop(self, ready: Callable[[_T], bool]) -> tuple[str, _T] | None:
        """Take the first item that is ready, of the tenant with the least service; None if none is."""
        for tenant in self._order():
            for item in self._waiting[tenant]:
                if ready(item):
                    self._now = max(self._now, self._served[tenant])
                    self._running[tenant] = self._running.get(tenant, 0) + 1
                    self.remove(tenant, item)
                    return tenant, item
        return None

    def remove(self, tenant: str, item: _T) -> None:
        """Let an item wait no longer."""
        self._waiting[tenant].remove(item)
        self._count -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
        self._forget(tenant)

    def charge(self, tenant: str, tokens: float) -> None:
        """Count tokens of a tenant; negative ones give back what was charged too much."""
        if tenant in self._served:
            self._served[tenant] += tokens

    def end(self, tenant: str) -> None:
        """One of a tenant's items that were taken has ended."""
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._forget(tenant)

    def _order(self) -> list[str]:
        return sorted(self._waiting, key=lambda tenant: self._served[tenant])

    def _forget(self, tenant: str) -> None:
        """Drop the counter of a tenant that has nothing here: memory is bounded by who is here."""
        if tenant not in self._waiting and tenant not in self._running:
            self._served.pop(tenant, None)
