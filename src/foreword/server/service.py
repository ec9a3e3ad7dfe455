"""What a server is made of, and its decisions: who may ask, which model a name means, what is refused.

It belongs to the event loop's thread. Routes are in `foreword.server.app`, the admin's in `foreword.server.admin`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from foreword.base import BaseModel
from foreword.engine import EngineRunner, EngineStats
from foreword.errors import ConfigError, DataError
from foreword.server.audit import Audit
from foreword.server.errors import ApiError, bad_request, unavailable, unknown_model
from foreword.server.events import Bridge
from foreword.server.limits import Limits, TenantState
from foreword.server.metrics import Metrics
from foreword.server.tenants import AdminKey, Tenant, TenantStore
from foreword.server.text import Codec
from foreword.store import PrefixStore, StoredPrefix, is_name

__all__ = ["Caller", "Model", "ServerOptions", "Service"]

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_LONG_TEXT = 4096  # characters or tokens
_NO_LIMITS = Limits(0, 0, 0)


@dataclass(frozen=True)
class ServerOptions:
    """How a server behaves.

    `needs_keys` False lets everybody in, as long as there is no tenant. `model_name` is what the base model is called;
    empty: by its own name. `max_inflight` HTTP requests are answered at once. Sizes are in bytes, times in seconds:
    for a whole request, for its body to come, for a client to take what was sent, and for running requests to end
    when the server stops.
    """

    needs_keys: bool = True
    model_name: str = ""
    request_timeout_seconds: float = 600.0
    body_timeout_seconds: float = 30.0
    send_timeout_seconds: float = 60.0
    grace_seconds: float = 30.0
    max_body_bytes: int = 1 << 20
    max_sequences: int = 128
    max_inflight: int = 1024

    def __post_init__(self) -> None:
        for name in ("request_timeout_seconds", "body_timeout_seconds", "send_timeout_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} {getattr(self, name)}", "seconds above 0", "correct it")
        for name in ("max_body_bytes", "max_sequences", "max_inflight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}", "at least 1", "correct it")


class Caller(NamedTuple):
    """Who sent a request, and what the tenant has running."""

    tenant: Tenant
    state: TenantState


class Model(NamedTuple):
    """What a name means: the base model, alone or through a version of a prefix."""

    id: str
    prefix: StoredPrefix | None = None


@dataclass
class Service:
    """A base model, its engine, its store and its tenants, together.

    The runner is started and stopped by who made it. `start` has to be called in the event loop.
    """

    base: BaseModel
    runner: EngineRunner
    store: PrefixStore
    tenants: TenantStore
    audit: Audit
    options: ServerOptions = field(default_factory=ServerOptions)
    admin_key: AdminKey = field(default_factory=lambda: AdminKey(None))

    def __post_init__(self) -> None:
        self.name = self.options.model_name or _short(self.base.name)
        self.fingerprint = self.base.fingerprint
        self.codec = Codec(self.base)
        self.end_tokens = self.base.end_tokens
        self.max_tokens = self.runner.engine.max_tokens
        self.metrics = Metrics(self.stats)
        self.draining = False
        self.inflight = 0
        self.changing: asyncio.Lock
        self.bridge: Bridge
        self._states: dict[str, TenantState] = {}
        self._tokenizing = ThreadPoolExecutor(1, "foreword-tokenizer")

    def start(self) -> None:
        """Begin to serve in the running event loop."""
        self.bridge = Bridge(asyncio.get_running_loop())
        self.changing = asyncio.Lock()

    def close(self) -> None:
        """Let go of threads and files; the runner and the store are their owner's."""
        self._tokenizing.shutdown(wait=False)
        self.tenants.close()
        self.audit.close()

    def stats(self) -> EngineStats:
        """What the engine says of itself."""
        return self.runner.stats()

    # Who asks

    def refuse(self, error: ApiError, **fields: str | None) -> ApiError:
        """Count a refusal and write it down; the same error, to be raised."""
        reason = error.code or "error"
        self.metrics.refused(reason)
        if error.status_code in (401, 404, 429):
            self.audit.refusal(reason, status=error.status_code, **fields)
        return error

    def check_room(self) -> None:
        """Raise `ApiError` 503 while the server stops or has more requests than it can hold."""
        if self.draining:
            raise self.refuse(unavailable("The server is stopping.", "stopping"))
        if not self.runner.alive:
            raise self.refuse(unavailable("The engine has stopped.", "engine_stopped"))
        if self.inflight >= self.options.max_inflight:
            raise self.refuse(unavailable("The server has too many connections.", "too_many_requests", 1))

    def identify(self, key: str | None, client: str) -> Caller:
        """Whose key it is. Raises `ApiError` 401 for none, 429 for one too many requests of a tenant."""
        if self._is_open():
            tenant: Tenant | None = Tenant("", _NO_LIMITS)
        else:
            tenant = self.tenants.find(key or "")
        if tenant is None:
            message = "You need an API key." if not key else "The API key is not valid."
            raise self.refuse(_no_access(message), client=client)
        state = self._states.get(tenant.name)
        if state is None:
            state = self._states[tenant.name] = TenantState(tenant.limits)
        state.change(tenant.limits)
        try:
            state.count_request()
        except ApiError as error:
            raise self.refuse(error, tenant=tenant.name) from None
        return Caller(tenant, state)

    def check_admin(self, key: str | None, client: str) -> None:
        """Raise `ApiError` 401 for any key but the admin's."""
        if not self.admin_key.fits(key or ""):
            raise self.refuse(_no_access("This needs the admin key."), client=client, api="admin")

    def expel(self, tenant: str) -> None:
        """End all that a tenant has running or waiting."""
        state = self._states.pop(tenant, None)
        if state is not None:
            state.close(_no_access("The API key is not valid."))

    def inflight_by_tenant(self) -> dict[str, int]:
        """Sequences that run or wait, of tenants that have any."""
        return {name: state.slots.used + state.slots.waiting for name, state in self._states.items() if not state.idle}

    def _is_open(self) -> bool:
        return not self.options.needs_keys and not self.tenants.any()

    # What is asked for

    def resolve(self, name: str, caller: Caller) -> Model:
        """The model that a name means to a caller: `base` or `base:prefix`.

        Raises `ApiError` 404 for what is not there and what is somebody else's; both take the same way.
        """
        if name == self.name:
            return Model(name)
        head, _, prefix = name.rpartition(":")
        there = [self.store.resolve(prefix, [tenant]) for tenant in self.sees(caller)] if head == self.name else []
        found = next((each for each in there if each is not None and each.fingerprint == self.fingerprint), None)
        if found is None:
            error = unknown_model(name)
            asked = prefix if is_name(prefix) else None  # whatever else was sent there is not written down
            raise self.refuse(error, tenant=caller.tenant.name, prefix=asked)
        return Model(name, found)

    def models(self, caller: Caller) -> list[Model]:
        """All that a caller can ask: the base model, and each prefix once, own ones before shared ones."""
        found: dict[str, StoredPrefix] = {}
        for tenant in self.sees(caller):
            for each in self.store.list(tenant=tenant, fingerprint=self.fingerprint):
                found.setdefault(each.name, each)
        return [Model(self.name), *(Model(f"{self.name}:{name}", found[name]) for name in sorted(found))]

    def sees(self, caller: Caller) -> list[str]:
        """Whose prefixes a caller may use. The same number of queries for everybody."""
        return [caller.tenant.name, ""] if caller.tenant.name else [""]

    async def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Token ids of texts; long ones are read beside the event loop."""

        def work() -> list[list[int]]:
            return [self.codec.encode(text, special) for text in texts]

        return await self._beside(work, sum(map(len, texts)))

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation. Raises `ApiError` 400 where there is no chat template, or it refuses."""

        def work() -> list[list[int]]:
            return [self.codec.encode_chat(messages)]

        try:
            return (await self._beside(work, sum(len(message["content"]) for message in messages)))[0]
        except DataError as error:
            message = str(error)
            raise bad_request(f"{message[0].upper()}{message[1:]}.", "messages", "no_chat_template") from None

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special ones included."""
        return await self._beside(lambda: self.codec.decode(ids, special=True), len(ids))

    async def _beside(self, work: Callable[[], _T], size: int) -> _T:
        """What the work gives; on long texts it is done beside the event loop."""
        if size < _LONG_TEXT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    def room(self, model: Model) -> int:
        """Tokens of prompt and answer together that a model takes."""
        limit = self.base.max_tokens
        if model.prefix is None or self.base.family.positions != "learned" or limit is None:
            return self.max_tokens
        return min(self.max_tokens, limit - model.prefix.position_offset)


def _short(name: str) -> str:
    """A base model's name; of a folder its last part."""
    return Path(name).resolve().name if os.path.isdir(name) else name


def _no_access(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
