"""From a job to pieces of text: the one generator behind streams and whole answers, completions and chats.

Each sequence of a job is a request to the engine. Its tokens become text here: whole characters, cut at a stop string,
of which no part is ever shown.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from foreword.engine import Event, Finished, Request, Ticket, Token
from foreword.errors import ConfigError, EngineStopped, QueueFull
from foreword.server.errors import ApiError, bad_request, overloaded, too_late, unavailable, unknown_model
from foreword.server.events import Inbox
from foreword.server.limits import TenantState
from foreword.server.text import Codec, StopStrings

if TYPE_CHECKING:
    from foreword.server.service import Service

__all__ = ["Job", "Piece", "Shown", "generate"]

_LOG = logging.getLogger(__name__)
_LATE_SECONDS = 5.0  # how much later than the engine the server gives up itself


@dataclass(frozen=True)
class Job:
    """What one HTTP request asks for: a request to the engine for each sequence, and where their texts end."""

    requests: Sequence[Request]
    stop: Sequence[str]
    prompt_tokens: int
    model: str


class Shown(NamedTuple):
    """A token whose text is shown, and where in the text of its sequence that begins, in characters."""

    offset: int
    token: Token


class Piece(NamedTuple):
    """What is new of a sequence: text, its tokens, how many were generated, and why it ended if it did."""

    sequence: int
    text: str
    shown: list[Shown]
    generated: int
    finish_reason: str | None


class Output:
    """One sequence's text as it grows; `failed` is why it came to no good end, if it did.

    Tokens are shown with the first character of theirs that is; those behind a stop string are not shown.
    """

    def __init__(self, codec: Codec, stop: Sequence[str], model: str = "") -> None:
        self._model = model
        self._detokenizer, self._stop = codec.detokenizer(), StopStrings(stop)
        self._decoded = self._length = 0
        self._waiting: deque[Shown] = deque()
        self.failed: ApiError | None = None

    def feed(self, index: int, events: Sequence[Event]) -> Piece:
        """What these events add."""
        text, generated, reason = "", 0, None
        for event in events:
            if isinstance(event, Finished):
                if event.reason not in ("stop", "length"):
                    self.failed = _failure(event, self._model)
                    break
                text += self._stop.push(self._detokenizer.flush()) + self._stop.flush()
                reason = "stop" if self._stop.stopped else event.reason
                break
            generated += 1
            self._waiting.append(Shown(self._decoded, event))
            piece = self._detokenizer.push(event.id)
            self._decoded += len(piece)
            text += self._stop.push(piece)
            if self._stop.stopped:
                reason = "stop"
                break
        self._length += len(text)
        return Piece(index, text, self._take_shown(ended=reason is not None), generated, reason)

    def _take_shown(self, ended: bool) -> list[Shown]:
        shown = []
        # A token without text of its own, at the end of all, belongs to the answer unless that was cut.
        while self._waiting and (self._waiting[0].offset < self._length or (ended and not self._stop.stopped)):
            shown.append(self._waiting.popleft())
        return shown


class _Clock:
    """When the sequences of a job had their tokens, for the metrics."""

    def __init__(self, service: Service, sequences: int) -> None:
        self._metrics, self.began = service.metrics, time.monotonic()
        self._last: list[float | None] = [None] * sequences

    def note(self, piece: Piece) -> None:
        now, last = time.monotonic(), self._last[piece.sequence]
        if piece.generated:
            if last is None:
                self._metrics.first_token(now - self.began)
            self._metrics.tokens(piece.generated, None if last is None else (now - last) / piece.generated)
            self._last[piece.sequence] = now
        if piece.finish_reason is not None:
            self.end(piece.finish_reason)

    def end(self, reason: str) -> None:
        self._metrics.finished(reason, time.monotonic() - self.began)


async def generate(service: Service, tenant: TenantState, job: Job) -> AsyncGenerator[Piece, None]:
    """The pieces of all sequences of a job, as they come; close it to end the job.

    Raises `ApiError`: 400 for what can never run, 404 where the prefix was removed meanwhile, 429 where too much waits,
    503 while the server stops, 504 at the deadline, 500 for what went wrong.
    """
    clock, timeout = _Clock(service, len(job.requests)), service.options.request_timeout_seconds
    async with tenant.running(len(job.requests), timeout):
        left = max(timeout - (time.monotonic() - clock.began), 0.001)
        inbox, tickets = Inbox(), dict[int, Ticket]()
        late = asyncio.get_running_loop().call_later(left + _LATE_SECONDS, _give_up, inbox, len(job.requests))
        reason = "cancelled"
        try:
            for index, request in enumerate(job.requests):
                tickets[index] = _submit(service, replace(request, deadline_seconds=left), inbox, index)
                tenant.tickets.add(tickets[index])
            service.metrics.taken(job.prompt_tokens)
            outputs = [Output(service.codec, job.stop, job.model) for _ in job.requests]
            while tickets:
                for index, events in (await inbox.take()).items():
                    if index not in tickets:  # it had ended at a stop string
                        continue
                    piece = outputs[index].feed(index, events)
                    clock.note(piece)
                    if piece.finish_reason is not None:
                        _drop(tenant, tickets.pop(index))
                    failed = outputs[index].failed
                    if failed is None or piece.generated:
                        yield piece
                    if failed is not None:
                        raise failed
        except ApiError as error:
            reason = error.code or "error"
            raise
        finally:
            late.cancel()
            for ticket in tickets.values():
                _drop(tenant, ticket)
                clock.end(reason)


def _submit(service: Service, request: Request, inbox: Inbox, index: int) -> Ticket:
    try:
        return service.runner.submit(request, service.bridge.listener(inbox, index))
    except QueueFull as error:
        raise overloaded("The server has too much to do.", error.retry_after_seconds, "queue_full") from None
    except EngineStopped:
        raise unavailable("The server is stopping.", "stopping") from None
    except ConfigError as error:
        raise bad_request(f"The request cannot run: {error}.") from None


def _drop(tenant: TenantState, ticket: Ticket) -> None:
    """Forget a ticket; the engine ends what has not ended by itself."""
    tenant.tickets.discard(ticket)
    ticket.cancel()


def _give_up(inbox: Inbox, sequences: int) -> None:
    for index in range(sequences):
        inbox.put(index, Finished("deadline"))


def _failure(event: Finished, model: str) -> ApiError:
    """The answer to a request that came to no good end; the engine's own words stay in the log."""
    if event.reason == "deadline":
        return too_late()
    if event.reason == "shutdown":
        return unavailable("The server stopped before the answer was complete.", "shutdown")
    if event.reason == "gone":  # it was there when the request came, and was removed while that waited
        return unknown_model(model)
    if event.reason == "cancelled":
        return unavailable("The request was ended by the operator of the server.", "cancelled")
    _LOG.warning("a request failed: %s", event.message)
    message = "The request failed: its prefix cannot be used, or the model failed."
    return ApiError(500, message, code="generation_failed")
