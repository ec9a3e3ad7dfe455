"""Answering: a job's pieces as one JSON object or as a stream of events, and nothing where the client has left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Send

from foreword.server.completions import Job, Piece, generate
from foreword.server.errors import ApiError
from foreword.server.formats import Format, usage_of
from foreword.server.service import Caller, Service

__all__ = ["ClientLeft", "answer"]

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class ClientLeft(Exception):
    """The client has closed its connection: there is nobody to answer."""


async def answer(
    service: Service, request: Request, job: Job, form: Format, *, stream: bool, include_usage: bool
) -> Response:
    """Run a job and tell it. An error before the first piece is an error of HTTP, a later one is told in the stream."""
    caller: Caller = request.state.caller
    pieces = generate(service, caller.state, job)
    try:
        if not stream:
            return JSONResponse(await _unless_left(request, _whole(pieces, job, form)))
        first = await _unless_left(request, anext(pieces))
    except ApiError as error:
        await pieces.aclose()
        raise service.refuse(error, tenant=caller.tenant.name) from None
    events = _events(service, pieces, first, job, form, include_usage)
    return _EventStream(events, service.options.send_timeout_seconds)


async def _whole(pieces: AsyncGenerator[Piece, None], job: Job, form: Format) -> Any:
    """The answer, when all of it is there."""
    texts: list[list[Piece]] = [[] for _ in job.requests]
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            texts[piece.sequence].append(piece)
    joined = [
        Piece(
            index,
            "".join(piece.text for piece in parts),
            [shown for piece in parts for shown in piece.shown],
            sum(piece.generated for piece in parts),
            parts[-1].finish_reason,
        )
        for index, parts in enumerate(texts)
    ]
    return form.whole(joined, usage_of(job.prompt_tokens, sum(piece.generated for piece in joined)))


async def _events(
    service: Service,
    pieces: AsyncGenerator[Piece, None],
    first: Piece,
    job: Job,
    form: Format,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The lines of a stream."""
    generated = first.generated
    async with contextlib.aclosing(pieces):
        try:
            yield _lines(form.chunks(first))
            async for piece in pieces:
                generated += piece.generated
                yield _lines(form.chunks(piece))
            if include_usage:
                yield _lines([form.usage_chunk(usage_of(job.prompt_tokens, generated))])
        except ApiError as error:
            yield _lines([service.refuse(error).body])
        except Exception:
            _LOG.exception("a stream failed")
            yield _lines([ApiError(500, "The server had an error.", code="internal_error").body])
        yield _DONE


def _lines(chunks: list[Any]) -> bytes:
    return b"".join(b"data: %s\n\n" % _encode(chunk).encode() for chunk in chunks)


async def _unless_left(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What the work gives; it is cancelled, and `ClientLeft` raised, when the client leaves before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            result: _T = tasks[0].result()
            return result
        raise ClientLeft
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events. A client that takes nothing for a while is left; the generator is closed in any case."""

    def __init__(self, events: AsyncGenerator[bytes, None], send_timeout_seconds: float) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events, self._timeout = events, send_timeout_seconds

    async def stream_response(self, send: Send) -> None:
        task, loop, late = asyncio.current_task(), asyncio.get_running_loop(), False
        assert task is not None

        def leave() -> None:
            nonlocal late
            late = True
            task.cancel()

        async def send_in_time(message: Message) -> None:
            timer = loop.call_later(self._timeout, leave)
            try:
                await send(message)
            finally:
                timer.cancel()

        async with contextlib.aclosing(self._events):
            try:
                await super().stream_response(send_in_time)
            except asyncio.CancelledError:
                if not late:
                    raise
                _LOG.warning("a client took nothing for %g seconds and was left", self._timeout)
