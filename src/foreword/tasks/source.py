"""Where the rows of a data set come from: a folder of parquet files, the hub, or the package itself."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from foreword.errors import DataError
from foreword.optional import optional

__all__ = ["FOLDER_VARIABLE", "HubSource", "Row", "dataset_rows", "packaged_rows", "parquet_columns", "parquet_rows"]

FOLDER_VARIABLE = "FOREWORD_DATA"

Row = dict[str, Any]


class HubSource(NamedTuple):
    """A data set on the Hugging Face hub: its splits by our names, its columns by theirs.

    `config` is one of its configurations and `folder` one of its folders, which take the place of configurations in
    `refs/convert/parquet`. Numbers that stand for names become those names: the data set's own or, by our name of the
    column, those of `names`.
    """

    repository: str
    splits: Mapping[str, str]
    columns: Mapping[str, str]
    revision: str | None = None
    config: str | None = None
    folder: str | None = None
    names: Mapping[str, Sequence[str]] = MappingProxyType({})


def dataset_rows(
    dataset: str, split: str, hub: HubSource | None, *, file: str | None = None, action: str = ""
) -> tuple[Iterator[Row], str]:
    """The rows of `dataset` and the name of their source.

    Read from `{FOREWORD_DATA}/{dataset}/{split}.parquet`, or `file` in that folder, where that variable is set,
    otherwise from the hub. `action` is what to do when the file is missing.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        if hub is None:
            raise DataError(
                f"{FOLDER_VARIABLE} is not set and {dataset} is not on the hub",
                "a folder of parquet files",
                f"set {FOLDER_VARIABLE} to one",
            )
        part = f"{hub.config or hub.folder}, " if hub.config or hub.folder else ""
        return _hub_rows(split, hub), f"{hub.repository} ({part}{hub.splits[split]})"
    name = file or f"{dataset}/{split}.parquet"
    path = Path(folder) / name
    if not path.is_file():
        raise DataError(
            f"no file {name} in the folder of {FOLDER_VARIABLE}",
            "a folder with one parquet file per split",
            action or f"correct {FOLDER_VARIABLE} or unset it to read from the hub",
        )
    return parquet_rows(path, name), name


def parquet_rows(path: Path, name: str, columns: Collection[str] | None = None) -> Iterator[Row]:
    """The rows of a parquet file, read in batches, with all or the given columns; messages call the file `name`."""
    with _parquet_file(path, name) as file:
        wanted = None if columns is None else [column for column in file.schema_arrow.names if column in columns]
        for batch in file.iter_batches(batch_size=4096, columns=wanted):
            yield from batch.to_pylist()


def parquet_columns(path: Path, name: str) -> list[str]:
    """The columns of a parquet file; messages call the file `name`."""
    with _parquet_file(path, name) as file:
        return list(file.schema_arrow.names)


@contextmanager
def _parquet_file(path: Path, name: str) -> Iterator[Any]:
    parquet = optional("pyarrow.parquet", "data")
    arrow_error = optional("pyarrow", "data").ArrowException
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (arrow_error, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{name} cannot be read ({reason})", "a parquet file", "check the file") from None


def packaged_rows(dataset: str, split: str) -> Iterator[Row]:
    """The rows of a data set that is part of the package: `datasets/{dataset}/{split}.jsonl`."""
    resource = files("foreword") / "datasets" / dataset / f"{split}.jsonl"
    try:
        text = resource.read_text(encoding="utf-8")
    except OSError:
        raise DataError(
            f"the packaged file {dataset}/{split}.jsonl is missing", action="install foreword again"
        ) from None
    for line in text.split("\n"):
        if line:
            yield json.loads(line)


def _hub_rows(split: str, hub: HubSource) -> Iterator[Row]:
    datasets = optional("datasets", "data")
    options = {"name": hub.config, "data_dir": hub.folder}
    given = {option: value for option, value in options.items() if value is not None}
    try:
        table = datasets.load_dataset(hub.repository, split=hub.splits[split], revision=hub.revision, **given)
    except Exception as error:  # the hub's client raises errors of a dozen packages
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"data set {hub.repository!r} could not be fetched from the hub ({reason})",
            "a connection or a local copy",
            f"set {FOLDER_VARIABLE} to a folder of parquet files",
        ) from None
    features = getattr(table, "features", None) or {}
    names = {ours: hub.names.get(ours) or _names(features.get(theirs)) for theirs, ours in hub.columns.items()}
    for row in table:
        yield {ours: _named(row.get(theirs), names[ours]) for theirs, ours in hub.columns.items()}


def _names(feature: Any) -> Sequence[str] | None:
    """The names behind the numbers of a column, or of a column of lists, if it has any."""
    return getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)


def _named(value: Any, names: Sequence[str] | None) -> Any:
    if names is None:
        return value
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    # hidden labels are -1, and stay what they are
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value
