"""A SQLite file that many threads and processes use at once: its connections, and transactions that hold its lock."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ["BUSY_SECONDS", "Database"]

BUSY_SECONDS = 60.0  # how long a writer waits for the one before it

# SQLite forbids a forked child to touch its parent's connections, even to close them: they stay here.
_INHERITED: list[list[sqlite3.Connection]] = []


class Database:
    """Connections to one file, opened when they are needed and used again. `explain` makes our errors of SQLite's.

    What is committed is on the disk, and what is deleted is overwritten.

    >>> import tempfile
    >>> database = Database(Path(tempfile.mkdtemp()) / "numbers.sqlite", lambda error: error)
    >>> with database.writing() as connection:
    ...     _ = connection.execute("CREATE TABLE numbers (number)")
    >>> with database.reading() as connection:
    ...     connection.execute("SELECT count(*) FROM numbers").fetchone()
    (0,)
    """

    def __init__(self, path: Path, explain: Callable[[sqlite3.Error], Exception], pragmas: Sequence[str] = ()) -> None:
        self.path, self._explain = path, explain
        self._pragmas = ("synchronous = FULL", "secure_delete = ON", *pragmas)
        self._idle: list[sqlite3.Connection] = []
        self._process = os.getpid()

    def close(self) -> None:
        """Close the connections that nobody uses at the moment; asked again, it opens new ones."""
        self._leave_inherited()
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def __del__(self) -> None:
        self.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that is the block's own. After an exception it is closed, which undoes what was begun."""
        self._leave_inherited()
        try:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._open()
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
            self._idle.append(connection)
        except sqlite3.Error as error:
            raise self._explain(error) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the file's lock; it lasts if the block ends well, else nothing of it does."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def _leave_inherited(self) -> None:
        if os.getpid() != self._process:
            _INHERITED.append(self._idle)
            self._idle, self._process = [], os.getpid()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        for pragma in self._pragmas:
            connection.execute(f"PRAGMA {pragma}").fetchall()
        return connection
