"""A server from its start to its end: uvicorn, signals, and what runs when it is told to stop.

The first SIGTERM or SIGINT lets no new request in (503 with Retry-After); those that run may end within the grace, the
rest is told that the server stopped. A second signal ends the process at once.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from foreword.errors import ConfigError, EngineStopped
from foreword.server.app import create_app
from foreword.server.service import Service

__all__ = ["Server", "listen"]

_LOG = logging.getLogger(__name__)
_KEEP_ALIVE_SECONDS = 60
_LAST_WORDS_SECONDS = 5.0  # for clients to read what the end of their requests was
_BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 is any that is free. Raises `ConfigError` where that cannot be had.

    >>> with listen("127.0.0.1", 0) as bound:
    ...     bound.getsockname()[1] > 0
    True
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{host}:{port} ({reason})", "an address that is free", "choose another --port") from None
    return bound


class Server(uvicorn.Server):
    """Serves a service whose runner was started. `serve_until_stopped` blocks; `stop` is for other threads."""

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            create_app(service), log_config=None, access_log=False, server_header=False, proxy_headers=False, ws="none",
            lifespan="on", backlog=_BACKLOG, timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(_LAST_WORDS_SECONDS),
        )  # fmt: skip
        super().__init__(config)
        self._service = service
        self._on_ready: Callable[[], None] = lambda: None
        self._stopping: threading.Thread | None = None

    def serve_until_stopped(self, bound: socket.socket, on_ready: Callable[[], None] = lambda: None) -> None:
        """Take requests on a bound socket until a signal or `stop`.

        `on_ready` is called when it listens. Raises `EngineStopped` where the engine ended by itself.
        """
        self._on_ready = on_ready
        try:
            self.run(sockets=[bound])
        finally:
            self._service.draining = True
            self._service.runner.stop(0.0)
            self._service.close()
            bound.close()
        if self._stopping is None and self.started:
            raise EngineStopped("the engine ended by itself", "a running one", "see the log, then start again")

    def stop(self) -> None:
        """Begin to end: what runs may finish within the grace."""
        if self._stopping is None:
            self._service.draining = True
            self._stopping = threading.Thread(target=self._finish, name="foreword-stop", daemon=True)
            self._stopping.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what `signal` calls
        """The first signal begins the end, the second is it."""
        if self._stopping is not None:
            os._exit(128 + sig)
        self.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        if self._stopping is None and not self._service.runner.alive:
            _LOG.error("the engine ended by itself")
            return True
        return await super().on_tick(counter)

    def _finish(self) -> None:
        _LOG.warning("stopping: up to %g seconds for what runs", self._service.options.grace_seconds)
        self._service.runner.stop(self._service.options.grace_seconds)
        self.should_exit = True
