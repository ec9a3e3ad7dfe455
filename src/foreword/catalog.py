"""What a store knows of its prefixes: tenants, names, versions and the objects they point at, in one SQLite file.

Readers never wait: the file is in write-ahead mode. Whoever changes anything in a store, objects too, does so between
`BEGIN IMMEDIATE` and `COMMIT`. That is the one lock of a store: it holds between threads and between processes, and
ends with the process that holds it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from foreword import database
from foreword.errors import ForewordError, StorageError, StoreError
from foreword.storage import locked, storage_errors

__all__ = ["Catalog", "StoredPrefix"]

_SCHEMA_VERSION = 1

# A row of `names` outlives its newest version, so that a number means one content as long as the name is there.
_SCHEMA = (
    """CREATE TABLE versions (
        name TEXT NOT NULL, version INTEGER NOT NULL, tenant TEXT NOT NULL, object_id TEXT NOT NULL,
        base TEXT NOT NULL, fingerprint TEXT NOT NULL, task TEXT NOT NULL, length INTEGER NOT NULL,
        parameters INTEGER NOT NULL, num_bytes INTEGER NOT NULL, gates TEXT NOT NULL,
        position_offset INTEGER NOT NULL, created_seconds REAL NOT NULL,
        PRIMARY KEY (tenant, name, version)
    ) WITHOUT ROWID""",
    "CREATE INDEX versions_by_object ON versions (object_id)",
    "CREATE INDEX versions_by_task ON versions (task)",
    "CREATE INDEX versions_by_base ON versions (base)",
    "CREATE INDEX versions_by_fingerprint ON versions (fingerprint)",
    """CREATE TABLE names (
        tenant TEXT NOT NULL, name TEXT NOT NULL, last_version INTEGER NOT NULL, PRIMARY KEY (tenant, name)
    ) WITHOUT ROWID""",
)


class StoredPrefix(NamedTuple):
    """One version of one name in a store.

    `tenant` "" is shared with all; `object_id` is the content. `base`, `fingerprint`, `task` (empty where there is
    none) and `position_offset` are the prefix's own; `length` counts the slots of its longest site, `num_bytes` the
    bytes of its folded tensors. `gates` names what a reader has to compute: `none`, or `mass` and what input-dependent
    gates read (`token`, ...), with commas. `created_seconds` is Unix time.
    """

    name: str
    version: int
    tenant: str
    object_id: str
    base: str
    fingerprint: str
    task: str
    length: int
    parameters: int
    num_bytes: int
    gates: str
    position_offset: int
    created_seconds: float

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}" if self.tenant else f"{self.name}@{self.version}"


_Versions = list[StoredPrefix]
_SELECT = f"SELECT {', '.join(StoredPrefix._fields)} FROM versions AS v"
_IS_CURRENT = (
    "NOT EXISTS (SELECT 1 FROM versions AS w WHERE w.tenant = v.tenant AND w.name = v.name AND w.version > v.version)"
)


class Catalog(database.Database):
    """The SQLite file of a store; made where it does not exist. Any number of threads and processes may use it at once.

    Raises `StoreError` for a file that is none or of a newer format, `StorageError` where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        # No copy of what is deleted goes to a temporary file.
        super().__init__(path, lambda error: _explained(error, path), ("temp_store = MEMORY",))
        # The change to write-ahead mode is the one step that SQLite does not queue.
        with storage_errors(path), locked(path.parent), self.reading() as connection:
            _set_up(connection, path)

    # Reading

    def current(self, name: str, tenant: str, connection: sqlite3.Connection | None = None) -> StoredPrefix | None:
        """The newest version of a name, None if there is none."""
        sql = f"{_SELECT} WHERE tenant = ? AND name = ? ORDER BY version DESC LIMIT 1"
        found = self._rows(sql, (tenant, name), connection)
        return found[0] if found else None

    def versions(self, name: str, tenant: str, connection: sqlite3.Connection | None = None) -> _Versions:
        """All versions of a name, the newest first."""
        return self._rows(f"{_SELECT} WHERE tenant = ? AND name = ? ORDER BY version DESC", (tenant, name), connection)

    def select(
        self, equal: dict[str, str | None], *, current: bool, limit: int | None, after: StoredPrefix | None
    ) -> _Versions:
        """Versions whose columns are as `equal` says (None: any), by tenant, name and version, from `after` on."""
        wanted = {column: value for column, value in equal.items() if value is not None}
        terms = [f"{column} = ?" for column in wanted]
        values: list[Any] = list(wanted.values())
        if current:
            terms.append(_IS_CURRENT)
        if after is not None and equal.get("tenant") == after.tenant:
            # With the tenant said apart, the index goes straight to the place.
            terms.append("(name, version) > (?, ?)")
            values += [after.name, after.version]
        elif after is not None:
            terms.append("(tenant, name, version) > (?, ?, ?)")
            values += [after.tenant, after.name, after.version]
        where = f" WHERE {' AND '.join(terms)}" if terms else ""
        sql = f"{_SELECT}{where} ORDER BY tenant, name, version LIMIT ?"
        return self._rows(sql, (*values, -1 if limit is None else limit))

    def users(self, object_id: str) -> _Versions:
        """The versions that point at an object."""
        return self._rows(f"{_SELECT} WHERE object_id = ? ORDER BY tenant, name, version", (object_id,))

    def objects(self, connection: sqlite3.Connection) -> set[str]:
        """All objects that a version points at."""
        return {row[0] for row in connection.execute("SELECT DISTINCT object_id FROM versions").fetchall()}

    def damage(self) -> str:
        """What SQLite finds wrong with its file, empty if nothing."""
        with self.reading() as connection:
            found = connection.execute("PRAGMA integrity_check(1)").fetchall()[0][0]
        return "" if found == "ok" else str(found)

    def _rows(self, sql: str, values: tuple[Any, ...], connection: sqlite3.Connection | None = None) -> _Versions:
        if connection is None:
            with self.reading() as own:
                return self._rows(sql, values, own)
        return [StoredPrefix(*row) for row in connection.execute(sql, _storable(values)).fetchall()]

    # Changing; the caller holds the lock with `writing`

    def record(self, connection: sqlite3.Connection, new: StoredPrefix) -> StoredPrefix:
        """Make `new` the next version of its name; the current one stays if it has the same content."""
        new = StoredPrefix(*_storable(new))
        current = self.current(new.name, new.tenant, connection)
        if current is not None and current.object_id == new.object_id:
            return current
        key = (new.tenant, new.name)
        last = connection.execute("SELECT last_version FROM names WHERE tenant = ? AND name = ?", key).fetchall()
        new = new._replace(version=1 + (last[0][0] if last else 0))
        connection.execute("INSERT OR REPLACE INTO names VALUES (?, ?, ?)", (*key, new.version))
        marks = ", ".join("?" * len(new))
        connection.execute(f"INSERT INTO versions ({', '.join(new._fields)}) VALUES ({marks})", new)
        return new

    def remove(self, connection: sqlite3.Connection, versions: _Versions) -> None:
        """Forget these versions, and names of which none is left."""
        for each in versions:
            key, where = (each.tenant, each.name), "WHERE tenant = ? AND name = ?"
            connection.execute(f"DELETE FROM versions {where} AND version = ?", (*key, each.version))
            if self.current(each.name, each.tenant, connection) is None:
                connection.execute(f"DELETE FROM names {where}", key)

    def forget(self, connection: sqlite3.Connection, tenant: str) -> _Versions:
        """Remove all of a tenant; the versions that there were."""
        there = self._rows(f"{_SELECT} WHERE tenant = ? ORDER BY name, version", (tenant,), connection)
        for table in ("versions", "names"):
            connection.execute(f"DELETE FROM {table} WHERE tenant = ?", (tenant,))
        return there

    def shred(self) -> None:
        """Leave no byte of removed rows in the file or its log; takes the lock by itself.

        `secure_delete` overwrites removed rows, but not where a row was before SQLite moved it to another page: the
        file is built anew, and the log, which holds former pages, is emptied.
        """
        with self.reading() as connection:
            connection.execute("VACUUM")
            if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0]:
                raise StoreError(
                    f"the log of {self.path} cannot be emptied, it is being read", "a moment without a long read",
                    "what was to be removed is removed; try again to empty the log too",
                )  # fmt: skip


def _set_up(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new file; refuse a file of a newer format."""

    def version() -> int:
        return int(connection.execute("PRAGMA user_version").fetchall()[0][0])

    if version() > _SCHEMA_VERSION:
        raise StoreError(
            f"{path} has format version {version()}", f"version {_SCHEMA_VERSION} or older", "update foreword to use it"
        )
    if version() == _SCHEMA_VERSION:
        return
    connection.execute("PRAGMA journal_mode = WAL").fetchall()
    connection.execute("BEGIN IMMEDIATE")
    if version() == 0:
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _storable(values: Iterable[Any]) -> tuple[Any, ...]:
    """The values with halves of characters, which JSON can hold and SQLite cannot, as question marks."""
    return tuple(value.encode(errors="replace").decode() if isinstance(value, str) else value for value in values)


def _explained(error: sqlite3.Error, path: Path) -> ForewordError:
    """What an error of SQLite means to who uses the store."""
    text = str(error)
    if any(words in text for words in ("disk is full", "disk I/O", "readonly", "unable to open")):
        return StorageError(
            f"cannot write {path} ({text})", "a writable place with enough space",
            "free some space or choose another place",
        )  # fmt: skip
    if "locked" in text:
        return StoreError(
            f"{path} has been held by another process for {database.BUSY_SECONDS:.0f} seconds", "a turn", "try again"
        )
    return StoreError(f"{path} cannot be read ({text})", "the catalog of a store", "bring it back from a backup")
