"""Prefixes on disk, by content and by name: what a server serves from.

    store.sqlite                    tenants, names, versions: see `foreword.catalog`
    objects/<2 hex>/<object_id>/    prefix.json and prefix.safetensors, as `docs/prefix-format.md` says; never changed
    staging/                        what a writer is building

An object's id is the sha256 of its prefix.json, which names the sha256 of prefix.safetensors and holds all else: equal
folders are one object, and one that is damaged, changed or put in another's place does not fit its own name. Task,
metrics and origin are part of it: a prefix with the same numbers that another tenant made is another object, so that
nobody reads where another's came from, and removing a tenant removes that too.

An object is on the disk, flushed and in its place, before a row points at it, and no row points at it any more before
it is deleted. Objects come and go under the catalog's lock alone: no garbage collector meets an object whose row is
still to come, and whatever is in `staging` when somebody gets the lock was left by a writer that was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from foreword.artifact import HEADER, TENSORS, load_prefix, save_prefix
from foreword.catalog import Catalog, StoredPrefix
from foreword.errors import PrefixError, PrefixFormatError, StoreError
from foreword.gates import check_poolings
from foreword.prefix import Prefix
from foreword.runs import find_prefix
from foreword.storage import storage_errors, sync_folder

if TYPE_CHECKING:
    from foreword.base import BaseModel

__all__ = ["Freed", "PrefixStore", "Problem", "RemovedTenant", "StoredPrefix", "default_store", "is_name"]

_CATALOG, _OBJECTS, _STAGING = "store.sqlite", "objects", "staging"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_OBJECT = re.compile(r"[0-9a-f]{64}")


class Freed(NamedTuple):
    """What a collection deleted: the ids of objects, how many leftovers of killed writers, and the bytes of both."""

    objects: list[str]
    leftovers: int
    num_bytes: int


class RemovedTenant(NamedTuple):
    """What `remove_tenant` removed: versions, and what was deleted with them."""

    versions: list[StoredPrefix]
    freed: Freed


class Problem(NamedTuple):
    """What `verify` found at `path`.

    `kind` is `damaged` or `missing`: `versions` point at an object that cannot be loaded, or that is not there. Or it
    is `orphaned` (an object that nothing points at) or `leftover` (of a killed writer): these do no harm, and
    `collect_garbage` deletes them.
    """

    kind: str
    path: Path
    message: str
    versions: list[StoredPrefix]


# Inside the class, `list` is a method.
_Versions = list[StoredPrefix]
_Problems = list[Problem]


class PrefixStore:
    """A folder of prefixes by content, with names and versions that point at them; made where there is none.

    Names and tenants are 1 to 63 of `a-z0-9._-`, the first a letter or digit; tenant "" is shared with all. Any number
    of threads and processes may use a store at once. A context manager; closing it is optional.

    Raises `StoreError` for a folder that holds something else, for one that is not there if not `create`, and for
    names that cannot be used; `StorageError` where the disk refuses.

    >>> import tempfile, torch
    >>> from foreword.prefix import Site, SiteTensors
    >>> site = SiteTensors(torch.zeros(2, 4, 8), torch.ones(2, 4, 8))
    >>> store = PrefixStore(Path(tempfile.mkdtemp()) / "store")
    >>> added = store.put(Prefix({Site("decoder", 0): site}, "tiny", "0f" * 32), "e2e", tenant="acme")
    >>> str(added), store.resolve("e2e", ["acme", ""]) == added, store.resolve("e2e", ["other", ""])
    ('acme/e2e@1', True, None)
    >>> store.load(added.object_id).length
    4
    """

    def __init__(self, root: str | Path, *, create: bool = True) -> None:
        self.root = Path(root)
        self._objects, self._staging = self.root / _OBJECTS, self.root / _STAGING
        with storage_errors(self.root):
            new = not (self.root / _CATALOG).is_file()
            if new and not create:
                raise StoreError(f"no store in {self.root}", "the folder of a store", "add a prefix first")
            if new:
                self.root.mkdir(parents=True, exist_ok=True)
                foreign = [each.name for each in self.root.iterdir() if not _is_own(each.name)]
                if foreign:
                    raise StoreError(
                        f"{self.root} holds {foreign[0]!r} and no store", "a store or an unused folder",
                        "choose another folder",
                    )  # fmt: skip
            for folder in (self._objects, self._staging):
                folder.mkdir(exist_ok=True)
        self._catalog = Catalog(self.root / _CATALOG)
        if new:
            with storage_errors(self.root):
                sync_folder(self.root)
                sync_folder(self.root.parent)

    def close(self) -> None:
        """Close what is open; a store that is used again opens it anew."""
        self._catalog.close()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Publishing

    def add(self, folder: str | Path, name: str, tenant: str = "") -> StoredPrefix:
        """Publish a prefix folder, or the best prefix of a run folder, as the new version of a name.

        Everything in it is checked first. The training state is left out: it is of no use to who reads a prefix. What
        is published is whole and lasts, or nothing changed, whenever the process is killed. The same content as the
        current version is no new version; an object that was damaged is replaced.
        Raises `PrefixFormatError` for a damaged prefix, `PrefixMismatch` for gates that no model can read, `RunError`,
        `StoreError` and `StorageError`.
        """
        return self.put(load_prefix(find_prefix(folder)), name, tenant)

    def put(self, prefix: Prefix, name: str, tenant: str = "") -> StoredPrefix:
        """Publish a prefix that is in memory: see `add`."""
        _check_name(name, "name")
        if tenant:
            _check_name(tenant, "tenant")
        check_poolings(prefix.sites)
        folded = prefix.fold()
        with self._catalog.writing() as connection:
            object_id = self._publish(folded)
            return self._catalog.record(connection, _entry(folded, object_id, name, tenant))

    def _publish(self, prefix: Prefix) -> str:
        """Bring an object into its place, under the lock; its id."""
        staged = self._staging / uuid.uuid4().hex
        try:
            save_prefix(prefix, staged)
            with storage_errors(self.root):
                object_id = hashlib.sha256((staged / HEADER).read_bytes()).hexdigest()
                folder = self.path(object_id)
                if self._damage(object_id) is not None:
                    _delete(folder)
                    folder.parent.mkdir(exist_ok=True)
                    os.rename(staged, folder)
                    for changed in (folder.parent, self._objects):
                        sync_folder(changed)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return object_id

    # Reading

    def resolve(self, name: str, tenants: Sequence[str]) -> StoredPrefix | None:
        """The current version of a name in the first of `tenants` that has it, None if none has; any text may be asked.

        A server asks with `[own, ""]`. It takes some ten microseconds, as long for a foreign name as for a missing one.
        """
        if not is_name(name):
            return None
        return next(filter(None, (self._catalog.current(name, tenant) for tenant in tenants)), None)

    def versions(self, name: str, tenant: str = "") -> _Versions:
        """All versions of a name, the newest first; none for a name that is not there."""
        return self._catalog.versions(name, tenant) if is_name(name) else []

    def path(self, object_id: str) -> Path:
        """The folder of an object, which is an ordinary prefix folder. Do not write there."""
        if not _OBJECT.fullmatch(object_id):
            raise StoreError(f"object {object_id[:80]!r}", "64 hexadecimal digits", "take the object_id of a version")
        return self._objects / object_id[:2] / object_id

    def load(self, object_id: str, base: BaseModel | None = None) -> Prefix:
        """An object as a prefix, everything in it checked; with `base`, also that it was made for it.

        Raises `PrefixFormatError` if it is damaged, `PrefixMismatch` for another base, `StoreError` if it is not there.
        """
        folder = self.path(object_id)
        if not folder.is_dir():
            raise StoreError(f"object {object_id[:12]}… is not in {self.root}", "an object of it", "add it again")
        prefix = load_prefix(folder, base)
        try:
            header = (folder / HEADER).read_bytes()
        except OSError:  # deleted since it was read
            header = b""
        if hashlib.sha256(header).hexdigest() != object_id:
            raise PrefixFormatError(f"{folder} holds another prefix", "the one that was added there", "add it again")
        return prefix

    def list(
        self,
        *,
        tenant: str | None = None,
        task: str | None = None,
        base: str | None = None,
        fingerprint: str | None = None,
        all_versions: bool = False,
        limit: int | None = None,
        after: StoredPrefix | None = None,
    ) -> _Versions:
        """Current versions, or all, by tenant, name and version; each filter is exact, None lets all pass.

        `base` is the base model's name, `fingerprint` that of its weights. The next page of `limit` is the one `after`
        the last of this page; names that come or go in between shift nothing.
        """
        equal = {"tenant": tenant, "task": task, "base": base, "fingerprint": fingerprint}
        return self._catalog.select(equal, current=not all_versions, limit=limit, after=after)

    # Removing

    def remove(self, name: str, tenant: str = "", version: int | None = None) -> _Versions:
        """Forget one version of a name, or all; what was removed, the newest first. The version before is then current.

        Objects stay until `collect_garbage`, for who still reads them. Raises `StoreError` if there is no such version.
        """
        with self._catalog.writing() as connection:
            there = self._catalog.versions(name, tenant, connection) if is_name(name) else []
            chosen = [each for each in there if version in (None, each.version)]
            if not chosen:
                what = f"{tenant}/{name}" if tenant else name
                numbers = ", ".join(str(each.version) for each in reversed(there))
                raise StoreError(
                    f"no prefix {what!r} in {self.root}" if not there else f"{what!r} has no version {version}",
                    "a name that was added" if not there else f"one of {numbers}", "list them to see what is there",
                )  # fmt: skip
            self._catalog.remove(connection, chosen)
        return chosen

    def remove_tenant(self, tenant: str) -> RemovedTenant:
        """Remove all of a tenant, so that no byte of its prefixes is left; objects that others use too stay.

        This collects garbage, since what the tenant removed before must go as well. If it is interrupted, or raises,
        a second call ends the work; a tenant that is not there is none to remove, and no error.
        """
        _check_name(tenant, "tenant")
        with self._catalog.writing() as connection:
            versions = self._catalog.forget(connection, tenant)
        freed = self.collect_garbage()
        self._catalog.shred()
        return RemovedTenant(versions, freed)

    def collect_garbage(self) -> Freed:
        """Delete objects that nothing points at, and what killed writers left."""
        objects, leftovers, num_bytes = [], 0, 0
        with self._catalog.writing() as connection, storage_errors(self.root):
            strays = [*self._strays(self._catalog.objects(connection))]
            for path in strays:
                num_bytes += _size(path)
                if _is_object(path):
                    objects.append(path.name)
                else:
                    leftovers += 1
                _delete(path)
            for folder in {path.parent for path in strays}:
                sync_folder(folder)
            for folder in self._objects.iterdir():
                with contextlib.suppress(OSError):
                    folder.rmdir()  # refuses if it is not empty
        return Freed(objects, leftovers, num_bytes)

    # Checking

    def verify(self, progress: Callable[[int, int], None] | None = None) -> _Problems:
        """Read and hash everything; what is wrong, in the order of the paths. `progress(done, total)` counts objects.

        Others may work with the store meanwhile. Raises `StoreError` where the catalog cannot be read at all.
        """
        problems = []
        if damage := self._catalog.damage():
            problems.append(Problem("damaged", self._catalog.path, damage, []))
        with self._catalog.writing() as connection, storage_errors(self.root):
            known = self._catalog.objects(connection)
            for path in self._strays(known):
                kind = "orphaned" if _is_object(path) else "leftover"
                problems.append(Problem(kind, path, "nothing points at it" if kind == "orphaned" else "unfinished", []))
        for done, object_id in enumerate(sorted(known), start=1):
            if (wrong := self._damage(object_id)) is not None and (users := self._catalog.users(object_id)):
                kind = "damaged" if self.path(object_id).is_dir() else "missing"
                problems.append(Problem(kind, self.path(object_id), wrong, users))
            if progress is not None:
                progress(done, len(known))
        return sorted(problems, key=lambda problem: problem.path)

    def _damage(self, object_id: str) -> str | None:
        """Why an object cannot be loaded, None if it can."""
        try:
            self.load(object_id)
        except (PrefixError, StoreError) as error:
            return str(error)
        return None

    def _strays(self, known: set[str]) -> Iterator[Path]:
        """All paths that belong to no object in `known`; the lock is held."""
        yield from self._staging.iterdir()
        for shelf in self._objects.iterdir():
            for path in shelf.iterdir() if shelf.is_dir() else [shelf]:
                if _is_object(path) and path.name in known:
                    yield from (file for file in path.iterdir() if file.name not in (HEADER, TENSORS))
                else:
                    yield path


def default_store() -> Path:
    """Where the store is if nothing else is said: `$FOREWORD_STORE`, else `~/.local/share/foreword/store`."""
    return Path(os.environ.get("FOREWORD_STORE") or Path.home() / ".local" / "share" / "foreword" / "store")


def _entry(prefix: Prefix, object_id: str, name: str, tenant: str) -> StoredPrefix:
    """What the catalog keeps of a prefix, its version still to be given."""
    gates = {"mass" for site in prefix.sites.values() if site.log_mass is not None}
    gates |= {site.gate.pooling for site in prefix.sites.values() if site.gate is not None}
    task = prefix.metadata.get("task")
    return StoredPrefix(
        name=name,
        version=0,
        tenant=tenant,
        object_id=object_id,
        base=prefix.base_name,
        fingerprint=prefix.fingerprint,
        task="" if task is None else task if isinstance(task, str) else json.dumps(task),
        length=prefix.length,
        parameters=prefix.num_parameters,
        num_bytes=prefix.num_bytes,
        gates=", ".join(sorted(gates)) or "none",
        position_offset=prefix.position_offset,
        created_seconds=time.time(),
    )


def is_name(text: str) -> bool:
    """Whether a text can be the name of a prefix or of a tenant.

    >>> is_name("acme"), is_name("a name")
    (True, False)
    """
    return _NAME.fullmatch(text) is not None


def _check_name(text: str, what: str) -> None:
    if not is_name(text):
        raise StoreError(
            f"{what} {text[:80]!r}", "1 to 63 of a-z, 0-9, '.', '_' and '-', first a letter or digit", "choose another"
        )


def _is_own(name: str) -> bool:
    """Whether a name in the root is the store's own, or that of a server which runs on it."""
    return name in (_OBJECTS, _STAGING) or name.startswith((_CATALOG, "tenants.sqlite", "audit.jsonl"))


def _is_object(path: Path) -> bool:
    """Whether a path is that of an object's folder."""
    return bool(_OBJECT.fullmatch(path.name)) and path.parent.name == path.name[:2] and path.is_dir()


def _delete(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if not path.is_dir() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_size for file in files)
