"""An engine in a thread of its own, for callers in other threads."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from foreword.base import BaseModel
from foreword.engine.engine import Engine, EngineOptions
from foreword.engine.request import Event, Finished, Request
from foreword.engine.tiers import BankStats, PrefixSource, Resident
from foreword.errors import EngineStopped
from foreword.frozen import frozen_training, packed_weights
from foreword.threads import release_team

__all__ = ["EngineRunner", "EngineStats", "Ticket"]

_LOG = logging.getLogger(__name__)

Listener = Callable[[Event], None]

_REST_SECONDS = 0.05


@dataclass(frozen=True)
class EngineStats:
    """What an engine has to do now, and what it has done since its start."""

    running: int
    waiting: int
    tokens_read: int
    tokens_written: int
    cache_bytes: int
    bank: BankStats


class Ticket:
    """A request that was handed in."""

    def __init__(self, request: Request, listener: Listener, wake: Callable[[], None]) -> None:
        self.request, self.listener, self.cancelled = request, listener, False
        self.since = time.monotonic()
        self.resident: Future[Resident] | None = None
        self._wake = wake

    def cancel(self) -> None:
        """End the request; its last event tells so, unless it has ended by itself."""
        self.cancelled = True
        self._wake()


class EngineRunner:
    """Steps an engine as long as there is work. All methods may be called from any thread.

    From `start` to `stop` the base model is the engine's: what another thread computes with it in between is wrong, and
    so may be what the engine writes.

    >>> import foreword as fw
    >>> base = fw.BaseModel.load("smollm2-135m")  # doctest: +SKIP
    >>> runner = EngineRunner(base, source)  # doctest: +SKIP
    >>> runner.start(); runner.submit(Request((1, 2), 8), print)  # doctest: +SKIP
    """

    def __init__(self, base: BaseModel, source: PrefixSource, options: EngineOptions | None = None) -> None:
        self._changed = threading.Condition()
        self._awake = False
        self.engine = Engine(base, source, options, on_change=self._wake)
        self._inbox: deque[Ticket] = deque()
        self._tickets: dict[int, Ticket] = {}
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="foreword-engine", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        release_team()  # of the caller, who has loaded the model and would now slow the engine's own
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether it takes no more requests."""
        return self._stop_at is not None

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Hand in a request. `listener` gets its events, in the engine's thread, `Finished` last and exactly once.

        Raises `ConfigError` for a request that can never run, `QueueFull`, and `EngineStopped`.
        """
        if self.stopping or not self._thread.is_alive():
            raise EngineStopped("the engine has stopped", "a running one", "try another server")
        self.engine.validate(request)
        ticket = Ticket(request, listener, self._wake)
        with self._changed:
            before = len(self.engine.waiting) + len(self._inbox)
            self.engine.check_room(len(self._inbox))
            if before < self.engine.options.max_running:  # its turn is near: load while the step goes on
                ticket.resident = self.engine.fetch(request.prefix)
            self._inbox.append(ticket)
        self._wake()
        if not self._thread.is_alive():  # it ended in between and will not look again
            self._end_tickets("shutdown")
        return ticket

    def preload(self, prefix: str) -> Future[Resident]:
        """Bring a prefix into memory."""
        return self.engine.bank.fetch(prefix)

    def evict(self, prefix: str) -> None:
        """Forget a prefix in every tier; sequences that run have a copy of their own."""
        self.engine.bank.evict(prefix)

    def stats(self) -> EngineStats:
        """What there is to do, and what was done."""
        engine = self.engine
        return EngineStats(
            len(engine.rows), len(engine.waiting) + len(self._inbox), engine.tokens_read, engine.tokens_written,
            engine.cache.num_bytes, engine.bank.stats(),
        )  # fmt: skip

    def stop(self, grace_seconds: float = 30.0) -> None:
        """Take no more requests, finish what is there within the grace, end the rest, and wait for the thread."""
        self._stop_at = time.monotonic() + grace_seconds
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._end_tickets("shutdown")
        self.engine.bank.close()

    def _wake(self) -> None:
        with self._changed:
            self._awake = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            with frozen_training(self.engine.base.model), packed_weights(self.engine.base.model):
                while self._stop_at is None or (self._has_work() and time.monotonic() < self._stop_at):
                    try:
                        self._take_in()
                        self._tell(self.engine.step())
                    except Exception as error:
                        _LOG.exception("the engine failed; everything it had is ended")
                        self._begin_anew(f"the engine failed ({type(error).__name__})")
                    self._rest()
                self._tell(self.engine.end_all("shutdown"))
        finally:
            self._end_tickets("shutdown" if self.stopping else "error")

    def _begin_anew(self, message: str) -> None:
        """End all that the engine has; where it cannot even do that, it forgets everything."""
        try:
            self._tell(self.engine.end_all("error", message))
        except Exception:
            _LOG.exception("the engine could not end what it had")
            self.engine.reset()
            while self._tickets:
                _tell(self._tickets.popitem()[1], Finished("error", message))

    def _has_work(self) -> bool:
        return bool(self._inbox) or self.engine.has_work

    def _take_in(self) -> None:
        """What has come in since the last step, and what was cancelled."""
        while self._inbox:
            ticket = self._inbox.popleft()
            try:
                number = self.engine.submit(ticket.request, ticket.resident, ticket.since)
            except Exception as error:
                _LOG.exception("a request could not be taken in")
                _tell(ticket, Finished("error", f"it could not be taken in ({type(error).__name__})"))
                continue
            self._tickets[number] = ticket
        for number, ticket in self._tickets.items():
            if ticket.cancelled:
                self.engine.cancel(number)

    def _rest(self) -> None:
        """Wait until there is something to do; for deadlines of what waits for its prefix, not too long."""
        with self._changed:
            if not self._awake and not self.engine.runnable and (self.engine.has_work or not self.stopping):
                self._changed.wait(_REST_SECONDS if self.engine.has_work else None)
            self._awake = False

    def _tell(self, events: list[tuple[int, Event]]) -> None:
        for number, event in events:
            ticket = self._tickets[number]
            if isinstance(event, Finished):
                del self._tickets[number]
            _tell(ticket, event)

    def _end_tickets(self, reason: str) -> None:
        """Tell those whose requests no step will see any more."""
        for source in (self._inbox.popleft, lambda: self._tickets.popitem()[1]):
            with contextlib.suppress(IndexError, KeyError):  # empty, or another thread was quicker
                while True:
                    _tell(source(), Finished(reason))


def _tell(ticket: Ticket, event: Event) -> None:
    try:
        ticket.listener(event)
    except Exception:
        _LOG.exception("a listener failed; its request is cancelled")
        ticket.cancel()
