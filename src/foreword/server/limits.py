"""How much a tenant may ask at once: requests per minute, sequences that run, sequences that wait.

All of it belongs to the event loop's thread; nothing here is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol

from foreword.server.errors import ApiError, bad_request, overloaded, too_late

__all__ = ["Cancellable", "Limits", "Slots", "TenantState", "TokenBucket"]


class Limits(NamedTuple):
    """What a tenant may do; 0 is no limit.

    `requests_per_minute` counts HTTP requests, and allows as many at once after a quiet minute. `concurrent` and
    `queued` count sequences: one for each prompt and choice of a request.
    """

    requests_per_minute: int = 600
    concurrent: int = 32
    queued: int = 128


class Cancellable(Protocol):
    """What can be ended from outside, such as a ticket of the engine."""

    def cancel(self) -> None: ...


class TokenBucket:
    """Lets `per_minute` requests pass in a minute; 0 lets all pass. `clock` in seconds.

    >>> now = [0.0]
    >>> bucket = TokenBucket(2, lambda: now[0])
    >>> bucket.take(), bucket.take(), bucket.take()
    (0.0, 0.0, 30.0)
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._left, self._seen = float(per_minute), clock()

    def take(self) -> float:
        """0 if a request may pass, which is then counted; else after how many seconds one may."""
        if not self.per_minute:
            return 0.0
        now, rate = self._clock(), self.per_minute / 60
        self._left = min(float(self.per_minute), self._left + (now - self._seen) * rate)
        self._seen = now
        if self._left < 1:
            return (1 - self._left) / rate
        self._left -= 1
        return 0.0


class Slots:
    """At most `limit` sequences at once, first come, first served, and at most `queue` more that wait."""

    def __init__(self, limit: int, queue: int) -> None:
        self.limit, self.queue = limit, queue
        self.used = self.waiting = 0
        self._line: deque[tuple[asyncio.Future[None], int]] = deque()

    async def take(self, count: int, timeout_seconds: float = 3600.0) -> None:
        """Wait for `count` slots; `ApiError` 400 if there are never so many, 429 if too many wait, 504 at the end."""
        if self.limit and count > self.limit:
            raise bad_request(f"{count} sequences in one request; at most {self.limit} are allowed at once.", "n")
        if not self._line and self._fits(count):
            self.used += count
            return
        if self.queue and self.waiting + count > self.queue:
            raise overloaded("Too many of your requests wait already.", 1, "concurrency_limit_exceeded")
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._line.append((turn, count))
        self.waiting += count
        end = loop.call_later(timeout_seconds, _end, turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back(count)  # the turn came, and nobody is there any more
            else:
                self._leave(turn, count)
            raise
        finally:
            end.cancel()

    def give_back(self, count: int) -> None:
        """Free slots; who waits gets them."""
        self.used -= count
        self._next()

    def close(self, error: ApiError) -> None:
        """Send away all who wait."""
        while self._line:
            turn, count = self._line.popleft()
            self.waiting -= count
            if not turn.done():
                turn.set_exception(error)

    def _fits(self, count: int) -> bool:
        return not self.limit or self.used + count <= self.limit

    def _leave(self, turn: asyncio.Future[None], count: int) -> None:
        with contextlib.suppress(ValueError):  # it was sent away
            self._line.remove((turn, count))
            self.waiting -= count
        self._next()

    def _next(self) -> None:
        while self._line and self._fits(self._line[0][1]):
            turn, count = self._line.popleft()
            self.waiting -= count
            if not turn.done():
                self.used += count
                turn.set_result(None)


def _end(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_exception(too_late())


class TenantState:
    """What a tenant has running, and how much more it may ask.

    >>> state = TenantState(Limits(requests_per_minute=1))
    >>> state.count_request(), state.slots.used
    (None, 0)
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._closed: ApiError | None = None
        self.limits = limits
        self.bucket = TokenBucket(limits.requests_per_minute, clock)
        self.slots = Slots(limits.concurrent, limits.queued)
        self.tickets: set[Cancellable] = set()

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not (self.slots.used or self.slots.waiting)

    def change(self, limits: Limits) -> None:
        """Hold to other limits from now on; what runs goes on."""
        if limits == self.limits:
            return
        self.limits = limits
        self.bucket = TokenBucket(limits.requests_per_minute, self._clock)
        self.slots.limit, self.slots.queue = limits.concurrent, limits.queued

    def count_request(self) -> None:
        """Count one HTTP request; `ApiError` 429 if there are too many in a minute."""
        wait = self.bucket.take()
        if wait:
            message = f"You may send {self.limits.requests_per_minute} requests per minute."
            raise overloaded(message, wait, "rate_limit_exceeded")

    @contextlib.asynccontextmanager
    async def running(self, count: int, timeout_seconds: float = 3600.0) -> AsyncIterator[None]:
        """Inside, `count` sequences of the tenant may run; raises what `Slots.take` does."""
        if self._closed is not None:
            raise self._closed
        await self.slots.take(count, timeout_seconds)
        try:
            yield
        finally:
            self.slots.give_back(count)

    def close(self, error: ApiError) -> None:
        """End everything that runs or waits, and let nothing new begin."""
        self._closed = error
        self.slots.close(error)
        for ticket in list(self.tickets):
            ticket.cancel()
