"""`foreword serve`: the OpenAI API over one base model and all prefixes of a store."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.console import emit, note, say
from foreword.cli.options import Device, Dtype, Json, Store, load_base
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.server.service import Service

__all__ = ["serve"]

ADMIN_KEY = "FOREWORD_ADMIN_KEY"

_LOCAL = ("127.0.0.1", "::1", "localhost")

_Base = Annotated[
    str, typer.Option("--base", "-b", help="Base model: smollm2-135m, a folder or a Hugging Face model id.")
]
_Host = Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is all.")]
_Port = Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")]
_Open = Annotated[bool, typer.Option("--open", help="Take requests without keys, while there is no tenant.")]
_Name = Annotated[str, typer.Option(help="What clients call the base model. (default: its own name)")]
_KeyFile = Annotated[
    Path | None, typer.Option(help=f"A file with the key of the admin API. (default: ${ADMIN_KEY}, else no admin API)")
]


def _engine(text: str, least: int = 1) -> Any:
    return typer.Option(min=least, help=text, rich_help_panel="How much it takes on")


def _server(text: str, least: int = 1) -> Any:
    return typer.Option(min=least, help=text, rich_help_panel="How it behaves")


def serve(
    base: _Base,
    folder: Store = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    open_: _Open = False,
    name: _Name = "",
    admin_key_file: _KeyFile = None,
    max_running: Annotated[int, _engine("Sequences in one batch.")] = 32,
    max_waiting: Annotated[int, _engine("Sequences that wait; more are refused with 429.")] = 256,
    max_tokens: Annotated[int, _engine("Prompt and answer together; 0 is what the model has, at most 4096.", 0)] = 0,
    prefill_tokens: Annotated[int, _engine("Tokens of prompts that one step reads.")] = 256,
    bank_bytes: Annotated[int, _engine("Memory for prefixes on the device.", 0)] = 512 << 20,
    host_bytes: Annotated[int, _engine("With a GPU: memory for prefixes beside it.", 0)] = 2 << 30,
    request_timeout: Annotated[float, _server("Seconds until a request is given up.", 0)] = 600.0,
    grace: Annotated[float, _server("Seconds for running requests when the server is stopped.", 0)] = 30.0,
    max_body_bytes: Annotated[int, _server("The largest body of a request.")] = 1 << 20,
    max_sequences: Annotated[int, _server("Prompts times choices of one request.")] = 128,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Serve a base model and the prefixes of a store, each to the tenant that it belongs to.

    foreword tenant add acme

    foreword serve --base smollm2-135m
    """
    key = _admin_key(admin_key_file)
    engine: dict[str, Any] = {
        "max_running": max_running, "max_waiting": max_waiting, "max_tokens": max_tokens,
        "prefill_tokens": prefill_tokens, "bank_bytes": bank_bytes, "host_bytes": host_bytes,
    }  # fmt: skip
    options: dict[str, Any] = {
        "needs_keys": not open_, "model_name": name, "request_timeout_seconds": request_timeout,
        "grace_seconds": grace, "max_body_bytes": max_body_bytes, "max_sequences": max_sequences,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        with _uncollected():
            from foreword.server import require

            require()
            from foreword.server.run import Server, listen

            bound = stack.enter_context(listen(host, port))  # who waits for the model wants no surprise after it
            _log()
            service = _service(base, folder, key, engine, options, dtype, device)
            server = Server(service)
        if open_ and host not in _LOCAL:
            note(f"warning: whoever reaches {host} can use this server; give tenants keys and leave out --open")
        address = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        server.serve_until_stopped(bound, on_ready=lambda: _announce(service, address, as_json))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, the garbage collector is off, and what was made there it never looks at again.

    Imports make half a million objects that stay: a look at all of them takes 0.2 s, several times during the start,
    and later between two tokens.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _service(
    base: str,
    folder: Path | None,
    key: str | None,
    engine: dict[str, Any],
    server: dict[str, Any],
    dtype: str,
    device: str | None,
) -> Service:
    """The service, its engine running."""
    from foreword.engine import EngineOptions, EngineRunner
    from foreword.server.audit import FILE, Audit
    from foreword.server.service import ServerOptions, Service
    from foreword.server.tenants import AdminKey, TenantStore
    from foreword.store import PrefixStore, default_store

    options, admin_key, engine_options = ServerOptions(**server), AdminKey(key), EngineOptions(**engine)
    store = PrefixStore(folder or default_store())
    tenants = TenantStore(store.root)
    if tenants.any() and not options.needs_keys:
        raise ConfigError(f"--open, and {tenants.path} has tenants", "one of both", "leave out --open")
    audit = Audit(store.root / FILE)
    runner = EngineRunner(load_base(base, dtype, device), store, engine_options)
    service = Service(runner.engine.base, runner, store, tenants, audit, options, admin_key)
    runner.start()
    return service


def _admin_key(file: Path | None) -> str | None:
    """The key of the admin API; it does not stay in the environment."""
    given = os.environ.pop(ADMIN_KEY, None)
    if file is not None:
        try:
            given = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read ({error})", "a file with the admin key", "correct it") from None
    return given or None


def _announce(service: Service, address: str, as_json: bool) -> None:
    """Say where it listens and how to try it."""
    import json

    import foreword

    prefixes = len(service.store.list(fingerprint=service.fingerprint))
    say(f"Foreword {foreword.__version__} serves {service.name} and {prefixes:,} prefixes at {address}")
    keys = service.options.needs_keys
    if keys and not service.tenants.any():
        say(f"nobody has a key yet  foreword tenant add NAME --store {service.store.root}")
    body = json.dumps({"model": service.name, "prompt": "The foreword comes", "max_tokens": 16})
    header = ' -H "Authorization: Bearer $FOREWORD_KEY"' if keys else ""
    say(f"try it  curl {address}/v1/completions{header} -H 'Content-Type: application/json' -d '{body}'")
    emit({"url": address, "model": service.name, "prefixes": prefixes, "max_tokens": service.max_tokens}, as_json)


def _log() -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
