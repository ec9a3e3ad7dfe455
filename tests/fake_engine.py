"""A stand-in for the engine's runner: the same interface, tokens by script, from its own thread. And a live server.

Each step gives every sequence its next token. `hold()` lets nothing happen until `release()`; `full` lets nobody in.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from foreword.base import BaseModel
from foreword.engine import BankStats, EngineStats, Finished, Request, Token
from foreword.errors import ConfigError, EngineStopped, QueueFull, StoreError
from foreword.server.audit import FILE, Audit
from foreword.server.run import Server, listen
from foreword.server.service import ServerOptions, Service
from foreword.server.tenants import AdminKey, TenantStore
from foreword.store import PrefixStore

__all__ = ["ADMIN_KEY", "FakeRunner", "FakeTicket", "Live", "counted", "live", "spoken"]

ADMIN_KEY = "the admin key of the tests"

Script = Callable[[Request], Sequence[int | Finished]]


def counted(request: Request) -> list[int]:
    """As many tokens as are asked for: the prompt's, over and over."""
    return [request.prompt[k % len(request.prompt)] for k in range(request.max_new_tokens)]


def spoken(ids: Sequence[int]) -> Script:
    """Always the same tokens, then the end."""
    return lambda request: list(ids)[: request.max_new_tokens]


class FakeTicket:
    """A request on its way."""

    def __init__(self, request: Request, listener: Callable, script: Sequence[int | Finished]) -> None:
        self.request, self.listener = request, listener
        self.left = deque(script)
        self.written = 0
        self.cancelled = False
        self.deadline = None if request.deadline_seconds is None else time.monotonic() + request.deadline_seconds

    def cancel(self) -> None:
        self.cancelled = True


class FakeRunner:
    """The interface of `foreword.engine.EngineRunner`; `requests` are all that were submitted."""

    def __init__(
        self, script: Script = counted, *, max_tokens: int = 64, step_seconds: float = 0.0, most: int = 1000
    ) -> None:
        self.script, self.step_seconds, self.most = script, step_seconds, most
        self.engine = SimpleNamespace(max_tokens=max_tokens)
        self.requests: list[Request] = []
        self.evicted: list[str] = []
        self.loaded: list[str] = []
        self.active: list[FakeTicket] = []
        self.ended: list[tuple[Request, str]] = []
        self.full = False
        self.missing: set[str] = set()  # prefixes that cannot be loaded
        self.most_running = 0
        self._lock = threading.RLock()
        self._going = threading.Event()
        self._going.set()
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    # The interface

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request, listener: Callable) -> FakeTicket:
        if self._stop_at is not None or not self.alive:
            raise EngineStopped("the engine has stopped")
        if len(request.prompt) + request.max_new_tokens > self.engine.max_tokens:
            raise ConfigError("too long")
        with self._lock:
            if self.full or len(self.active) >= self.most:
                raise QueueFull(len(self.active), 7.0)
            ticket = FakeTicket(request, listener, self.script(request))
            self.requests.append(request)
            self.active.append(ticket)
            self.most_running = max(self.most_running, len(self.active))
        return ticket

    def preload(self, prefix: str) -> Future:
        done: Future = Future()
        if prefix in self.missing:
            done.set_exception(StoreError("it is damaged"))
        else:
            self.loaded.append(prefix)
            done.set_result(None)
        return done

    def evict(self, prefix: str) -> None:
        self.evicted.append(prefix)

    def stats(self) -> EngineStats:
        return EngineStats(len(self.active), 0, 1, 2, 3, BankStats(hits=4, misses=5))

    def stop(self, grace_seconds: float = 30.0) -> None:
        self._stop_at = time.monotonic() + grace_seconds
        self._going.set() if grace_seconds == 0 else None
        if self._thread.ident is not None:
            self._thread.join()

    # For tests

    def hold(self) -> None:
        self._going.clear()

    def release(self) -> None:
        self._going.set()

    def die(self) -> None:
        """End the thread as a crash would, with what runs told of it."""
        self._stop_at = 0.0
        self._thread.join()
        self._stop_at = None

    def wait_idle(self, seconds: float = 60.0) -> bool:
        until = time.monotonic() + seconds
        while self.active and time.monotonic() < until:
            time.sleep(0.005)
        return not self.active

    def _run(self) -> None:
        while self._stop_at is None or (self.active and time.monotonic() < self._stop_at):
            self._going.wait(0.01)
            with self._lock:
                tickets = list(self.active)
            for ticket in tickets:
                self._step(ticket, going=self._going.is_set())
            time.sleep(self.step_seconds if tickets else 0.001)
        for ticket in list(self.active):
            self._end(ticket, Finished("shutdown"))

    def _step(self, ticket: FakeTicket, going: bool) -> None:
        request = ticket.request
        if ticket.cancelled:
            self._end(ticket, Finished("cancelled"))
        elif ticket.deadline is not None and time.monotonic() > ticket.deadline:
            self._end(ticket, Finished("deadline"))
        elif not going:
            return
        elif request.prefix in self.missing:
            self._end(ticket, Finished("error", "a secret reason"))
        elif not ticket.left:
            self._end(ticket, Finished("length" if ticket.written >= request.max_new_tokens else "stop"))
        else:
            self._write(ticket, ticket.left.popleft())

    def _write(self, ticket: FakeTicket, event: int | Finished) -> None:
        if isinstance(event, Finished):
            self._end(ticket, event)
        elif event in ticket.request.stop_tokens:
            self._end(ticket, Finished("stop"))
        else:
            ticket.written += 1
            wanted = ticket.request.sampling.logprobs
            others = () if not wanted else tuple((3 + k, -1.0 - k) for k in range(wanted))
            ticket.listener(Token(event, None if wanted is None else -0.5, others))

    def _end(self, ticket: FakeTicket, event: Finished) -> None:
        with self._lock:
            self.active.remove(ticket)
            self.ended.append((ticket.request, event.reason))
        ticket.listener(event)


@dataclass
class Live:
    """A server that listens, in a thread of this process."""

    url: str
    service: Service
    server: Server
    runner: Any

    def ask(self, method: str, path: str, *, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {**({"Authorization": f"Bearer {key}"} if key else {}), **options.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=120, trust_env=False, **options)

    def complete(self, key: str | None = None, **body: Any) -> httpx.Response:
        return self.ask(
            "POST", "/v1/completions", key=key, json={"model": self.service.name, "prompt": "A prefix", **body}
        )

    def admin(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.ask(method, f"/admin{path}", key=ADMIN_KEY, **options)

    def audit(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.service.store.root / FILE).read_text().splitlines()]


@contextlib.contextmanager
def live(base: BaseModel, runner: Any, folder: Path, **options: Any) -> Iterator[Live]:
    """A server over a store in `folder`, at a free port; `options` are those of `ServerOptions`."""
    store = PrefixStore(folder)
    runner = runner or FakeRunner()
    runner.start()
    service = Service(
        base, runner, store, TenantStore(folder), Audit(folder / FILE),
        ServerOptions(**{"needs_keys": False, "grace_seconds": 60.0, **options}), AdminKey(ADMIN_KEY),
    )  # fmt: skip
    server, ready, bound = Server(service), threading.Event(), listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    thread = threading.Thread(target=server.serve_until_stopped, args=(bound, ready.set))
    thread.start()
    try:
        assert ready.wait(120)
        yield Live(url, service, server, runner)
    finally:
        if hasattr(runner, "release"):
            runner.release()
        service.options.__dict__["grace_seconds"] = 0.0
        server.stop()
        thread.join()
        store.close()
