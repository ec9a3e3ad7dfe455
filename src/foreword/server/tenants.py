"""Who may use a server: tenants with limits, and their API keys, in one SQLite file beside the store.

A key is `fw-<id>-<secret>` with a random secret of 32 bytes. It is shown once; the file has its SHA-256. A key is
looked up by its id and compared in constant time, and a key that is not there takes the same comparison. Processes
share the file: what `foreword tenant` changes holds at once in a server that runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from foreword.database import Database
from foreword.errors import ConfigError, StorageError
from foreword.server.limits import Limits
from foreword.storage import storage_errors
from foreword.store import is_name

__all__ = ["AdminKey", "Key", "Tenant", "TenantStore"]

FILE = "tenants.sqlite"

_KEY = re.compile(r"fw-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_BLANK = bytes(32)
_LEAST_ADMIN_KEY = 16  # characters
_SCHEMA = """
CREATE TABLE IF NOT EXISTS tenants (
    name TEXT PRIMARY KEY, requests_per_minute INTEGER NOT NULL, concurrent INTEGER NOT NULL, queued INTEGER NOT NULL,
    created_seconds REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL REFERENCES tenants ON DELETE CASCADE, hash BLOB NOT NULL,
    created_seconds REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS keys_of_tenant ON keys (tenant);
"""


class Tenant(NamedTuple):
    """Who asks. The name "" is everybody, on a server that needs no keys."""

    name: str
    limits: Limits = Limits()
    created_seconds: float = 0.0


class Key(NamedTuple):
    """What is known of a key without its secret."""

    id: str
    tenant: str
    created_seconds: float


class AdminKey:
    """The key of the admin API; only its hash is kept. None lets nobody in.

    >>> AdminKey("a long enough secret").fits("a long enough secret"), AdminKey(None).fits("")
    (True, False)
    """

    def __init__(self, key: str | None) -> None:
        if key is not None and len(key) < _LEAST_ADMIN_KEY:
            raise ConfigError(
                f"an admin key of {len(key)} characters", f"at least {_LEAST_ADMIN_KEY}",
                "make one with: openssl rand -base64 32",
            )  # fmt: skip
        self._hash = None if key is None else _hash(key)

    def fits(self, key: str) -> bool:
        return hmac.compare_digest(self._hash or _BLANK, _hash(key)) and self._hash is not None


class TenantStore:
    """The tenants in `folder`, which is made where there is none. Any thread may call it.

    Raises `ConfigError` for names that cannot be used, exist already or do not, `StorageError` where the disk refuses.

    >>> import tempfile
    >>> tenants = TenantStore(Path(tempfile.mkdtemp()))
    >>> tenants.add("acme")
    >>> key = tenants.create_key("acme")
    >>> tenants.find(key).name, tenants.find(key[:-1] + "-")
    ('acme', None)
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._file = Database(self.path, self._explained, ("journal_mode = WAL", "foreign_keys = ON"))
        with storage_errors(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        with self._file.reading() as connection:
            connection.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file; a store that is used again opens it anew."""
        self._file.close()

    def _explained(self, error: sqlite3.Error) -> StorageError:
        return StorageError(
            f"cannot use {self.path} ({error})", "a writable place with enough space", "see who holds it"
        )

    # Tenants

    def add(self, name: str, limits: Limits = Limits()) -> None:  # noqa: B008 - a tuple
        """A new tenant."""
        _check(name, limits)
        with self._changing(name) as connection:
            if _exists(connection, name):
                raise ConfigError(f"tenant {name!r} exists already", "a new name", "choose another")
            connection.execute("INSERT INTO tenants VALUES (?, ?, ?, ?, ?)", (name, *limits, time.time()))

    def change(self, name: str, limits: Limits) -> None:
        """Other limits for a tenant."""
        _check(name, limits)
        with self._changing(name) as connection:
            changed = connection.execute(
                "UPDATE tenants SET requests_per_minute = ?, concurrent = ?, queued = ? WHERE name = ?",
                (*limits, name),
            )
            if not changed.rowcount:
                raise _missing(name)

    def get(self, name: str) -> Tenant | None:
        """A tenant by name."""
        with self._file.reading() as connection:
            row = connection.execute("SELECT * FROM tenants WHERE name = ?", (name,)).fetchone()
        return None if row is None else _tenant(row)

    def all(self) -> list[Tenant]:
        """All tenants by name."""
        with self._file.reading() as connection:
            return [_tenant(row) for row in connection.execute("SELECT * FROM tenants ORDER BY name")]

    def any(self) -> bool:
        """Whether there is a tenant."""
        with self._file.reading() as connection:
            return connection.execute("SELECT 1 FROM tenants LIMIT 1").fetchone() is not None

    def remove(self, name: str) -> None:
        """Remove a tenant and its keys; its prefixes are the store's business."""
        with self._changing(name) as connection:
            if not connection.execute("DELETE FROM tenants WHERE name = ?", (name,)).rowcount:
                raise _missing(name)

    # Keys

    def create_key(self, tenant: str) -> str:
        """A new key of a tenant: the only time that it is told."""
        with self._changing(tenant) as connection:
            if not _exists(connection, tenant):
                raise _missing(tenant)
            key_id = secrets.token_hex(6)
            key = f"fw-{key_id}-{secrets.token_urlsafe(32)}"
            connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?)", (key_id, tenant, _hash(key), time.time()))
        return key

    def keys(self, tenant: str) -> list[Key]:
        """The keys of a tenant, the oldest first."""
        with self._file.reading() as connection:
            rows = connection.execute(
                "SELECT id, tenant, created_seconds FROM keys WHERE tenant = ? ORDER BY created_seconds, id", (tenant,)
            )
            return [Key(*row) for row in rows]

    def revoke_key(self, tenant: str, key_id: str) -> None:
        """Let a key be valid no longer."""
        with self._changing(tenant) as connection:
            revoked = connection.execute("DELETE FROM keys WHERE id = ? AND tenant = ?", (key_id, tenant))
            if not revoked.rowcount:
                raise ConfigError(f"no key {key_id!r} of tenant {tenant!r}", "the id of a key", "list them to see ids")

    def find(self, key: str) -> Tenant | None:
        """Whose key it is, if anybody's."""
        match = _KEY.fullmatch(key)
        with self._file.reading() as connection:
            row = connection.execute(
                "SELECT hash, tenants.* FROM keys JOIN tenants ON tenants.name = keys.tenant WHERE id = ?",
                (match[1] if match else "",),
            ).fetchone()  # fmt: skip
        fits = hmac.compare_digest(_BLANK if row is None else row[0], _hash(key))
        return _tenant(row[1:]) if fits and row is not None else None

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[sqlite3.Connection]:
        """One transaction about a tenant."""
        _check(name)
        with self._file.writing() as connection:
            yield connection


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _exists(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM tenants WHERE name = ?", (name,)).fetchone() is not None


def _tenant(row: tuple[str, int, int, int, float]) -> Tenant:
    name, requests, concurrent, queued, created = row
    return Tenant(name, Limits(requests, concurrent, queued), created)


def _check(name: str, limits: Limits | None = None) -> None:
    if not is_name(name):
        expected = "1 to 63 of a-z, 0-9, '.', '_' and '-', first a letter or digit"
        raise ConfigError(f"tenant {name[:80]!r}", expected, "choose another name")
    for field, value in (limits or Limits())._asdict().items():
        if not 0 <= value < 2**31:
            raise ConfigError(f"{field} {value}", "0 (no limit) or more", "correct it")


def _missing(name: str) -> ConfigError:
    return ConfigError(f"no tenant {name!r}", "one that was added", "list them to see names")
