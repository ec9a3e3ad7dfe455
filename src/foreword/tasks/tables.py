"""A user's own tables, read row by row: JSON lines, CSV, TSV and parquet.

Rows are counted from 1 as an editor or a spreadsheet shows them: lines of JSON, records of CSV and TSV with the
header as row 1, records of parquet. Blank lines are passed over. A row that cannot be read is a `SkippedRow`; a file
that cannot be read is a `DataError`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from foreword.errors import ConfigError, DataError
from foreword.tasks.source import Row, parquet_columns, parquet_rows
from foreword.tasks.task import SkippedRow

__all__ = ["FORMATS", "check_exists", "check_file", "first_columns", "read_lines", "table_columns", "table_rows"]

FORMATS = {".jsonl": "json", ".ndjson": "json", ".csv": ",", ".tsv": "\t", ".parquet": "parquet"}

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Rows = Iterator[tuple[int, Row] | SkippedRow]


def check_file(path: Path) -> None:
    """Raise unless the path is a file with a known extension."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"file {path}", "an extension of " + ", ".join(FORMATS), "convert or rename the file")
    check_exists(path)


def check_exists(path: Path) -> None:
    """Raise unless the path is a file."""
    if not path.is_file():
        found = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {found}", "a file of rows", "correct the path")


def table_columns(path: Path) -> list[str] | None:
    """The columns of a table; None for JSON lines, where every row names its own."""
    kind = FORMATS[path.suffix.lower()]
    if kind == "json":
        return None
    if kind == "parquet":
        return parquet_columns(path, path.name)
    header = next(_records(path, kind), None)
    if header is None:
        raise DataError(f"{path.name} is empty", "a header and at least one row", "fill it or name another file")
    if isinstance(header, SkippedRow):
        raise DataError(f"row {header.row} of {path.name}: {header.reason}", "a header", "correct it")
    repeated = sorted({column for column in header[1] if header[1].count(column) > 1})
    if repeated:
        raise DataError(
            f"{path.name} has column {repeated[0]!r} more than once", "different names", "rename one of them"
        )
    return header[1]


def first_columns(path: Path) -> set[str]:
    """The columns of a table, or of its first row where every row names its own; none where it cannot be read."""
    if path.suffix.lower() not in FORMATS or not path.is_file():
        return set()
    columns = table_columns(path)
    if columns is None:
        first = next((row for row in _json_rows(path) if not isinstance(row, SkippedRow)), None)
        columns = [] if first is None else list(first[1])
    return set(columns)


def table_rows(path: Path, columns: Collection[str]) -> Rows:
    """The rows of a table with their numbers; of parquet only the given columns are read."""
    kind = FORMATS[path.suffix.lower()]
    if kind == "parquet":
        return enumerate(parquet_rows(path, path.name, columns), start=1)
    return _json_rows(path) if kind == "json" else _csv_rows(path, kind)


def _json_rows(path: Path) -> Rows:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            yield SkippedRow(number, f"not valid JSON ({error.msg}, column {error.colno})")
        except (ValueError, RecursionError) as error:  # a number too long, lists too deep
            yield SkippedRow(number, f"not usable JSON ({str(error).partition(';')[0]})")
        else:
            yield (number, row) if isinstance(row, dict) else SkippedRow(number, "not a JSON object")


def _csv_rows(path: Path, delimiter: str) -> Rows:
    records = _records(path, delimiter)
    header = next(records, None)
    columns = [] if header is None or isinstance(header, SkippedRow) else header[1]
    for record in records:
        if isinstance(record, SkippedRow):
            yield record
        elif len(record[1]) != len(columns):
            yield SkippedRow(record[0], f"{len(record[1])} fields, the header has {len(columns)}")
        else:
            yield record[0], dict(zip(columns, record[1], strict=True))


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]] | SkippedRow]:
    reader = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    number = 0
    while True:
        number += 1
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error).partition(" - ")[0]
            if "end of data" in reason or "limit" in reason:  # everything after the quote was swallowed
                raise DataError(
                    f"row {number} of {path.name}: a quoted field from line {line} on is never closed",
                    action="close the quote, or double the quotes that are text",
                ) from None
            yield SkippedRow(number, f"not valid CSV ({reason})")
        else:
            if record:
                yield number, record


def read_lines(path: Path) -> Iterator[str]:
    """The decoded lines of a file, with their ends."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                try:
                    yield line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path.name} is not UTF-8 at line {number}, byte {error.start + 1} of the line",
                        "UTF-8 text",
                        "convert the file",
                    ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", "a readable file") from None
