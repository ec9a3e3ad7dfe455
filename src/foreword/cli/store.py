"""`foreword store`: prefixes by name, version and tenant, as a server serves them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli.console import bar, emit, note, say, table
from foreword.cli.options import Json, Store
from foreword.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from foreword.store import Freed, PrefixStore

__all__ = ["store"]

store = typer.Typer(
    name="store",
    help="Keep prefixes by name, version and tenant, for `foreword serve`.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Tenant = Annotated[str, typer.Option(help="Whose prefix it is. (default: shared with all)")]
_NewName = Annotated[
    str | None, typer.Option("--name", help="1 to 63 of a-z, 0-9, '.', '_', '-'. (default: the folder's)")
]
_Name = Annotated[str, typer.Argument(help="A name in the store.")]


@store.command("add")
def add(
    path: Annotated[Path, typer.Argument(help="A prefix folder or a run folder.", metavar="RUN_OR_PREFIX")],
    name: _NewName = None,
    tenant: _Tenant = "",
    folder: Store = None,
    as_json: Json = False,
) -> None:
    """Publish a prefix as the new version of a name; all of it is checked, and its training state is left out.

    The same content as the current version is no new version.

    foreword store add runs/trails
    foreword store add runs/trails --name trails --tenant acme
    """
    with _opened(folder, create=True) as opened:
        name = name or _name_of(path)
        before = opened.resolve(name, [tenant])
        added = opened.add(path, name, tenant)
        unchanged = ", which was current already" if added == before else ""
        say(f"{added} in {opened.root}{unchanged}: {added.length} slots, {added.num_bytes:,} bytes for {added.base}")
        emit(added._asdict(), as_json)


@store.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Of one tenant only; '' are the shared ones.")] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="For one task only.")] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="For one base model only.")] = None,
    all_versions: Annotated[bool, typer.Option("--all-versions", help="Former versions too.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="The first of them only.")] = 100,
    folder: Store = None,
    as_json: Json = False,
) -> None:
    """List the current versions of all names."""
    with _opened(folder) as opened:
        found = opened.list(tenant=tenant, task=task, base=base, all_versions=all_versions, limit=limit + 1)
        shown = found[:limit]
        rows = [
            [each.name, each.version, each.tenant or "(shared)", each.base, each.task, each.length, each.num_bytes,
             each.gates, each.object_id[:12], _when(each.created_seconds)]
            for each in shown
        ]  # fmt: skip
        header = ["name", "version", "tenant", "base", "task", "length", "bytes", "gates", "object", "published"]
        if rows:
            table(str(opened.root), header, rows)
        else:
            say(f"{opened.root}: nothing to list")
        if len(found) > limit:
            note(f"the first {limit}; there are more, see --limit")
        emit({"store": str(opened.root), "prefixes": [each._asdict() for each in shown]}, as_json)


@store.command("show")
def show(
    name: _Name,
    tenant: _Tenant = "",
    version: Annotated[int | None, typer.Option(min=1, help="A former version. (default: the current one)")] = None,
    folder: Store = None,
    as_json: Json = False,
) -> None:
    """Show one version of a name, and which others there are; `foreword show FOLDER` tells what is in its folder."""
    with _opened(folder) as opened:
        versions = opened.versions(name, tenant)
        chosen = next((each for each in versions if version in (None, each.version)), None)
        if chosen is None:
            what = f"version {version} of {name!r}" if versions else f"prefix {name!r}"
            whose = f" of tenant {tenant!r}" if tenant else ""
            raise StoreError(f"no {what}{whose} in {opened.root}", "one that was added", "list them to see all")
        path = opened.path(chosen.object_id)
        table(
            str(chosen),
            ["", ""],
            [
                ["version", chosen.version],
                ["other versions", ", ".join(str(each.version) for each in versions if each != chosen) or "none"],
                ["tenant", chosen.tenant or "(shared)"],
                ["published", _when(chosen.created_seconds)],
                ["base model", chosen.base],
                ["fingerprint", chosen.fingerprint[:16]],
                ["task", chosen.task],
                ["length", chosen.length],
                ["parameters", chosen.parameters],
                ["bytes", chosen.num_bytes],
                ["gates", chosen.gates],
                ["position offset", chosen.position_offset],
                ["object", chosen.object_id],
                ["folder", str(path)],
            ],
        )
        emit({**chosen._asdict(), "folder": str(path), "versions": [each.version for each in versions]}, as_json)


@store.command("remove")
def remove(
    name: Annotated[str | None, typer.Argument(help="A name in the store; none with --all.")] = None,
    tenant: _Tenant = "",
    version: Annotated[int | None, typer.Option(min=1, help="This version only. (default: all versions)")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that --tenant has, so that no byte is left.")] = False,
    folder: Store = None,
    as_json: Json = False,
) -> None:
    """Remove a name or one of its versions; without its newest version, the one before is current again.

    The bytes go with the next `foreword store gc`. With --all they go at once, and with them everything else that no
    name points at.

    foreword store remove trails --version 3
    foreword store remove --tenant acme --all
    """
    if everything and (name is not None or version is not None or not tenant):
        raise ConfigError("--all with a name or without --tenant", "--tenant and no name", "say whose prefixes go")
    if not everything and name is None:
        raise ConfigError("nothing to remove", "a name, or --tenant and --all", "name it")
    with _opened(folder) as opened:
        if name is None:
            removed, freed = opened.remove_tenant(tenant)
            say(f"{_count(len(removed), 'version')} of tenant {tenant!r} removed; {_told(freed)}")
            emit({"removed": [each._asdict() for each in removed], **freed._asdict()}, as_json)
            return
        removed = opened.remove(name, tenant, version)
        current = opened.resolve(name, [tenant])
        say(f"removed {', '.join(map(str, removed))}" + (f"; {current} is current" if current else ""))
        emit({"removed": [each._asdict() for each in removed], "current": current and current._asdict()}, as_json)


@store.command("verify")
def verify(folder: Store = None, as_json: Json = False) -> None:
    """Read and hash everything in the store; exits with status 1 if a prefix is damaged or missing."""
    with _opened(folder) as opened:
        with bar("verifying") as progress:
            problems = opened.verify(progress)
        rows = [
            [each.kind, ", ".join(map(str, each.versions)), os.path.relpath(each.path, opened.root), each.message]
            for each in problems
        ]
        broken = [each for each in problems if each.versions or each.kind == "damaged"]
        if rows:
            table(str(opened.root), ["", "prefixes", "where", "what"], rows)
            say(f"{len(broken)} damaged or missing; `foreword store gc` deletes what is orphaned or left over")
        else:
            say(f"{opened.root} is whole")
        found = [{**each._asdict(), "versions": [str(version) for version in each.versions]} for each in problems]
        emit({"store": str(opened.root), "whole": not broken, "problems": found}, as_json)
    if broken:
        raise typer.Exit(1)


@store.command("gc")
def gc(folder: Store = None, as_json: Json = False) -> None:
    """Delete prefixes that no name points at any more, and what writers left that were killed."""
    with _opened(folder) as opened:
        freed = opened.collect_garbage()
        say(_told(freed))
        emit(freed._asdict(), as_json)


def _opened(folder: Path | None, create: bool = False) -> PrefixStore:
    from foreword.store import PrefixStore, default_store

    return PrefixStore(folder or default_store(), create=create)


def _name_of(path: Path) -> str:
    """The name of a run folder, also where its prefix is given."""
    from foreword.runs import is_run

    path = path.resolve()
    return path.parent.name if is_run(path.parent) else path.name


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _told(freed: Freed) -> str:
    objects, leftovers = _count(len(freed.objects), "object"), _count(freed.leftovers, "leftover")
    return f"{objects} and {leftovers} deleted, {freed.num_bytes:,} bytes"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")
