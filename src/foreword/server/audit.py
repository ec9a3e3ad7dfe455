"""The audit log: who changed what and who was refused, one JSON object a line, only ever appended to.

It never holds secrets, prompts or answers. Refusals are limited to some per second, so that nobody can fill the disk;
how many were left out is said in the next line.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from foreword.server.limits import TokenBucket
from foreword.storage import storage_errors

__all__ = ["Audit"]

FILE = "audit.jsonl"

_LOG = logging.getLogger(__name__)
_REFUSALS_PER_MINUTE = 600


class Audit:
    """Appends to the file at `path`; None writes nothing. Any thread may call it.

    Raises `StorageError` if the file cannot be opened. A line that cannot be written later is logged instead: a full
    disk stops no request.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "audit.jsonl"
    >>> Audit(path).write("load", prefix="e2e", tenant="acme")
    >>> json.loads(path.read_text())["event"]
    'load'
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._refusals = TokenBucket(_REFUSALS_PER_MINUTE, clock)
        self._left_out = 0
        if path is not None:
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, event: str, **fields: str | int | float | None) -> None:
        """One line; fields that are None are left out."""
        with self._lock:
            self._append(event, fields)

    def refusal(self, reason: str, **fields: str | int | float | None) -> None:
        """A line about a request that was refused."""
        with self._lock:
            if self._refusals.take():
                self._left_out += 1
                return
            left_out, self._left_out = self._left_out or None, 0
            self._append("refused", {"reason": reason, **fields, "left_out_before": left_out})

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def __del__(self) -> None:
        self.close()

    def _append(self, event: str, fields: dict[str, str | int | float | None]) -> None:
        if self._descriptor is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, **{name: value for name, value in fields.items() if value is not None}}
        try:
            os.write(self._descriptor, json.dumps(line).encode() + b"\n")  # one call: lines of processes do not mix
        except OSError as error:
            _LOG.error("the audit log cannot be written (%s): %s", error.strerror, line)
