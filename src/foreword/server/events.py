"""Events on their way from the engine's thread to the event loop.

A step of the engine has an event for each running sequence. They are handed over together: the loop is woken once, not
once for each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from foreword.engine import Event

__all__ = ["Bridge", "Inbox"]


class Inbox:
    """What has come for one HTTP request since it last looked, by the number of its sequence.

    It waits there while the client reads slowly; a request has so many events at most as it asked for tokens.
    """

    def __init__(self) -> None:
        self._came: dict[int, list[Event]] = {}
        self._wake = asyncio.Event()

    def put(self, index: int, event: Event) -> None:
        """An event of a sequence; in the event loop's thread."""
        self._came.setdefault(index, []).append(event)
        self._wake.set()

    async def take(self) -> dict[int, list[Event]]:
        """Wait until something has come; all of it."""
        await self._wake.wait()
        self._wake.clear()
        came, self._came = self._came, {}
        return came


class Bridge:
    """From the engine's thread to the inboxes of a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: deque[tuple[Inbox, int, Event]] = deque()
        self._scheduled = False

    def listener(self, inbox: Inbox, index: int) -> Callable[[Event], None]:
        """What a sequence's events are to be told to, from whatever thread."""

        def listen(event: Event) -> None:
            self._pending.append((inbox, index, event))
            # The flag is cleared before the loop begins to empty the queue: either this event is still met, or it is
            # scheduled here.
            if not self._scheduled:
                self._scheduled = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    self._pending.clear()

        return listen

    def _deliver(self) -> None:
        self._scheduled = False
        while self._pending:
            inbox, index, event = self._pending.popleft()
            inbox.put(index, event)
