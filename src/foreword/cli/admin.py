"""`foreword admin`: change a server that runs, through its admin API."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from foreword.cli.console import emit, note, say, table
from foreword.cli.options import Json
from foreword.errors import ConfigError

__all__ = ["admin"]

admin = typer.Typer(
    name="admin",
    help="Change a server that runs: publish, load and unload prefixes, add and remove tenants.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TIMEOUT_SECONDS = 300.0
_Url = Annotated[str, typer.Option("--url", envvar="FOREWORD_URL", help="Where the server is.")]
_Key = Annotated[
    str, typer.Option("--key", envvar="FOREWORD_ADMIN_KEY", help="The admin key.", show_default=False, prompt=False)
]
_Name = Annotated[str, typer.Argument(help="A prefix's name.")]
_Tenant = Annotated[str, typer.Option(help="Whose prefix it is. (default: shared with all)")]
_LOCAL = "http://127.0.0.1:8000"


@admin.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Of one tenant only; '' are the shared ones.")] = None,
    url: _Url = _LOCAL,
    key: _Key = "",
    as_json: Json = False,
) -> None:
    """List the prefixes that a server can serve, the current version of each."""
    query = {} if tenant is None else {"tenant": tenant}
    answer = _ask("GET", "/admin/prefixes", url, key, query=query)
    rows = [
        [each["model"], each["version"], each["tenant"] or "(shared)", each["length"], each["num_bytes"],
         each["object_id"][:12], time.strftime("%Y-%m-%d %H:%M", time.localtime(each["created_seconds"]))]
        for each in answer["prefixes"]
    ]  # fmt: skip
    header = ["model", "version", "tenant", "length", "bytes", "object", "published"]
    table(url, header, rows) if rows else say(f"{url}: no prefixes")
    emit(answer, as_json)


def publish(
    name: _Name,
    path: Annotated[Path, typer.Argument(help="A prefix or run folder on the server's disk.", metavar="RUN_OR_PREFIX")],
    tenant: _Tenant = "",
    url: _Url = _LOCAL,
    key: _Key = "",
    as_json: Json = False,
) -> None:
    """Publish a folder as a name's first or next version, without a restart.

    Requests that run finish on the version that they began with.

    foreword admin publish trails runs/trails --tenant acme
    """
    body = {"name": name, "path": str(path.resolve()), "tenant": tenant}
    answer = _ask("POST", "/admin/prefixes", url, key, body=body)
    say(f"{answer['model']} is version {answer['version']}, object {answer['object_id'][:12]}")
    emit(answer, as_json)


admin.command("publish")(publish)
admin.command("replace", help="The same as publish.")(publish)


@admin.command("load")
def load(name: _Name, tenant: _Tenant = "", url: _Url = _LOCAL, key: _Key = "", as_json: Json = False) -> None:
    """Bring a prefix into the bank, so that its first request need not wait for the disk."""
    answer = _ask("POST", f"/admin/prefixes/{_quoted(name)}/load", url, key, query={"tenant": tenant})
    say(f"{answer['model']} version {answer['version']} is in the bank")
    emit(answer, as_json)


@admin.command("unload")
def unload(name: _Name, tenant: _Tenant = "", url: _Url = _LOCAL, key: _Key = "", as_json: Json = False) -> None:
    """Take a prefix out of the bank; it stays in the store."""
    answer = _ask("POST", f"/admin/prefixes/{_quoted(name)}/unload", url, key, query={"tenant": tenant})
    say(f"{answer['model']} version {answer['version']} is out of the bank")
    emit(answer, as_json)


@admin.command("remove")
def remove(name: _Name, tenant: _Tenant = "", url: _Url = _LOCAL, key: _Key = "", as_json: Json = False) -> None:
    """Remove all versions of a prefix from memory and from the disk."""
    answer = _ask("DELETE", f"/admin/prefixes/{_quoted(name)}", url, key, query={"tenant": tenant})
    say(f"{name} removed, {len(answer['removed'])} versions")
    emit(answer, as_json)


@admin.command("add-tenant")
def add_tenant(
    name: Annotated[str, typer.Argument(help="The tenant's name.")],
    requests_per_minute: Annotated[int, typer.Option(min=0, help="HTTP requests; 0 is no limit.")] = 600,
    concurrent: Annotated[int, typer.Option(min=0, help="Sequences that run at once.")] = 32,
    queued: Annotated[int, typer.Option(min=0, help="Sequences that wait.")] = 128,
    url: _Url = _LOCAL,
    key: _Key = "",
    as_json: Json = False,
) -> None:
    """Add a tenant and a key of it, which is shown this once; or give one that is there other limits."""
    body = {"name": name, "requests_per_minute": requests_per_minute, "concurrent": concurrent, "queued": queued}
    answer = _ask("POST", "/admin/tenants", url, key, body=body)
    if answer["new"]:
        made = _ask("POST", f"/admin/tenants/{_quoted(name)}/keys", url, key)
        note(f"a key for {name}; it is shown this once, only its hash is kept")
        say(made["key"])
        answer = {**answer, **made}
    else:
        say(f"{name} has other limits")
    emit(answer, as_json)


@admin.command("remove-tenant")
def remove_tenant(
    name: Annotated[str, typer.Argument(help="The tenant's name.")],
    url: _Url = _LOCAL,
    key: _Key = "",
    as_json: Json = False,
) -> None:
    """Remove a tenant: its keys, what it has running, and its prefixes in memory and on the disk."""
    answer = _ask("DELETE", f"/admin/tenants/{_quoted(name)}", url, key)
    say(f"{name} removed, with {len(answer['removed'])} versions of prefixes")
    emit(answer, as_json)


@admin.command("stats")
def stats(url: _Url = _LOCAL, key: _Key = "", as_json: Json = False) -> None:
    """What the server has to do, and what its bank holds."""
    answer = _ask("GET", "/admin/stats", url, key)
    rows = [
        [f"{part}: {name.replace('_', ' ')}", value]
        for part, values in answer.items()
        for name, value in values.items()
    ]
    table(url, ["", ""], rows)
    emit(answer, as_json)


def _ask(
    method: str,
    path: str,
    url: str,
    key: str,
    *,
    query: dict[str, str] | None = None,
    body: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the admin API answers. Raises `ConfigError` with the server's words where that is an error."""
    from foreword.optional import optional

    httpx = optional("httpx", "serve")
    if not key:
        raise ConfigError(
            "no admin key", "--key or $FOREWORD_ADMIN_KEY", "give the key that the server was started with"
        )
    try:
        answer = httpx.request(
            method, url.rstrip("/") + path, params=query, json=body, headers={"Authorization": f"Bearer {key}"},
            timeout=_TIMEOUT_SECONDS,
        )  # fmt: skip
        told: dict[str, Any] = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{url} gives no answer ({reason})", "a server that runs", "check --url") from None
    if answer.status_code >= 400:
        message = str(told.get("error", {}).get("message", answer.status_code)).rstrip(".")
        raise ConfigError(f"{url} refuses: {message}", action="see foreword admin --help")
    return told


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")
