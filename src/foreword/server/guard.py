"""What every request passes before a route sees it: room, the key, the rate, and the size of its body.

Every path needs a key but those listed here, also paths that do not exist. A refused request's body is not read.
"""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foreword.server.errors import ApiError
from foreword.server.service import Service

__all__ = ["Guard"]

_OPEN = frozenset({"/health", "/ready", "/version", "/metrics", "/openapi.json"})


class Guard:
    """ASGI middleware in front of everything.

    A tenant's request finds its `Caller` in `request.state.caller`.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        try:
            self._admit(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self._service.inflight += 1
        try:
            await self._app(scope, self._limited(receive), send)
        finally:
            self._service.inflight -= 1

    def _admit(self, scope: Scope) -> None:
        service, headers = self._service, Headers(scope=scope)
        service.check_room()
        key = _key(headers)
        client = (scope.get("client") or ("",))[0]
        if scope["path"] == "/admin" or scope["path"].startswith("/admin/"):
            service.check_admin(key, client)
        else:
            scope.setdefault("state", {})["caller"] = service.identify(key, client)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > service.options.max_body_bytes:
            raise service.refuse(_too_large(service.options.max_body_bytes))

    def _limited(self, receive: Receive) -> Receive:
        """Reads the body, but not more of it than is allowed, and not longer."""
        options, came = self._service.options, 0
        until = time.monotonic() + options.body_timeout_seconds
        whole = False

        async def limited() -> Message:
            nonlocal came, whole
            if whole:  # what comes now is the client's leaving, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except (asyncio.TimeoutError, TimeoutError):
                raise self._service.refuse(
                    ApiError(408, "The body of the request did not come in time.", code="body_timeout")
                ) from None
            came += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if came > options.max_body_bytes:
                raise self._service.refuse(_too_large(options.max_body_bytes))
            return message

        return limited


def _key(headers: Headers) -> str | None:
    """The bearer token of a request."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body has more than {limit} bytes.", code="request_too_large")
