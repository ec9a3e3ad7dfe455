"""`foreword tenant`: who may use a server, with keys and limits; it works on the store's folder, server or none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli.console import emit, note, say, table
from foreword.cli.options import Json, Store

if TYPE_CHECKING:
    from foreword.server.audit import Audit
    from foreword.server.limits import Limits
    from foreword.server.tenants import TenantStore
    from foreword.store import PrefixStore

__all__ = ["tenant"]

tenant = typer.Typer(
    name="tenant",
    help="Say who may use `foreword serve`: tenants, their keys and limits.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Name = Annotated[str, typer.Argument(help="1 to 63 of a-z, 0-9, '.', '_' and '-'.")]
_PerMinute = Annotated[int | None, typer.Option(min=0, help="HTTP requests; 0 is no limit. (default: 600)")]
_Concurrent = Annotated[int | None, typer.Option(min=0, help="Sequences that run at once. (default: 32)")]
_Queued = Annotated[int | None, typer.Option(min=0, help="Sequences that wait. (default: 128)")]


@tenant.command("add")
def add(
    name: _Name,
    requests_per_minute: _PerMinute = None,
    concurrent: _Concurrent = None,
    queued: _Queued = None,
    folder: Store = None,
    as_json: Json = False,
) -> None:
    """Add a tenant, with a first key. The key is shown this once.

    foreword tenant add acme --requests-per-minute 120
    """
    tenants, _, audit = _opened(folder)
    limits = _limits(requests_per_minute, concurrent, queued)
    tenants.add(name, limits)
    audit.write("tenant_add", tenant=name, by="command line", **limits._asdict())
    _create_key(tenants, audit, name, as_json)


@tenant.command("limits")
def limits(
    name: _Name,
    requests_per_minute: _PerMinute = None,
    concurrent: _Concurrent = None,
    queued: _Queued = None,
    folder: Store = None,
    as_json: Json = False,
) -> None:
    """Change the limits of a tenant; those that are not given stay. A server that runs holds to them at once."""
    from foreword.errors import ConfigError

    tenants, _, audit = _opened(folder)
    known = tenants.get(name)
    if known is None:
        raise ConfigError(f"no tenant {name!r}", "one that was added", "list them to see names")
    changed = _limits(requests_per_minute, concurrent, queued, known.limits)
    tenants.change(name, changed)
    audit.write("tenant_change", tenant=name, by="command line", **changed._asdict())
    say(f"{name}: {_told(changed)}")
    emit({"tenant": name, **changed._asdict()}, as_json)


@tenant.command("key")
def key(
    name: _Name,
    revoke: Annotated[str | None, typer.Option(help="Let the key of this id be valid no longer.")] = None,
    folder: Store = None,
    as_json: Json = False,
) -> None:
    """Make another key for a tenant, or revoke one."""
    tenants, _, audit = _opened(folder)
    if revoke is None:
        _create_key(tenants, audit, name, as_json)
        return
    tenants.revoke_key(name, revoke)
    audit.write("key_revoke", tenant=name, key=revoke, by="command line")
    say(f"key {revoke} of {name} is valid no longer")
    emit({"tenant": name, "revoked": revoke}, as_json)


@tenant.command("list")
def list_(folder: Store = None, as_json: Json = False) -> None:
    """List tenants, their limits, and the ids of their keys."""
    tenants, store, _ = _opened(folder)
    found = [(each, tenants.keys(each.name)) for each in tenants.all()]
    header = ["tenant", "requests per minute", "concurrent", "queued", "keys", "prefixes"]
    rows = [
        [each.name, *each.limits, ", ".join(key.id for key in keys), len(store.list(tenant=each.name))]
        for each, keys in found
    ]
    table(str(tenants.path), header, rows) if rows else say(f"{tenants.path}: no tenants")
    told = [{"tenant": each.name, **each.limits._asdict(), "keys": [key.id for key in keys]} for each, keys in found]
    emit({"tenants": told}, as_json)


@tenant.command("remove")
def remove(name: _Name, folder: Store = None, as_json: Json = False) -> None:
    """Remove a tenant with its keys and prefixes, so that no byte of them is left in the store.

    A server that runs refuses its keys at once, but may keep its prefixes in memory: use `foreword admin remove-tenant`
    where one runs.
    """
    tenants, store, audit = _opened(folder)
    tenants.remove(name)
    removed = store.remove_tenant(name)
    gone = {"versions": len(removed.versions), "objects": len(removed.freed.objects)}
    audit.write("tenant_remove", tenant=name, by="command line", **gone)
    say(f"{name} removed, with {gone['versions']} versions of prefixes and {gone['objects']} objects")
    emit({"tenant": name, **gone}, as_json)


def _opened(folder: Path | None) -> tuple[TenantStore, PrefixStore, Audit]:
    from foreword.server import require

    require()
    from foreword.server.audit import FILE, Audit
    from foreword.server.tenants import TenantStore
    from foreword.store import PrefixStore, default_store

    store = PrefixStore(folder or default_store())
    return TenantStore(store.root), store, Audit(store.root / FILE)


def _limits(
    requests_per_minute: int | None, concurrent: int | None, queued: int | None, known: Limits | None = None
) -> Limits:
    from foreword.server.limits import Limits

    given = {"requests_per_minute": requests_per_minute, "concurrent": concurrent, "queued": queued}
    return (known or Limits())._replace(**{name: value for name, value in given.items() if value is not None})


def _create_key(tenants: TenantStore, audit: Audit, name: str, as_json: bool) -> None:
    made = tenants.create_key(name)
    key_id = made.split("-")[1]
    audit.write("key_create", tenant=name, key=key_id, by="command line")
    note(f"a key for {name}; it is shown this once, only its hash is kept")
    say(made)
    emit({"tenant": name, "id": key_id, "key": made}, as_json)


def _told(limits: Limits) -> str:
    return ", ".join(f"{value or 'no limit of'} {field.replace('_', ' ')}" for field, value in limits._asdict().items())
