"""Tasks: raw rows in, examples out: prompts with completions, texts with labels, words with tags. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import signature
from typing import Any

from foreword.errors import ConfigError, DataError
from foreword.tasks.bbc import TRANSFERS, bbc
from foreword.tasks.classification import ag_news, sst2, trec
from foreword.tasks.conll import ConllFiles
from foreword.tasks.dart import dart
from foreword.tasks.dialogsum import dialogsum
from foreword.tasks.e2e import E2E
from foreword.tasks.files import FileTask
from foreword.tasks.labelled_files import LabelledFiles
from foreword.tasks.ner import NER, ner
from foreword.tasks.scitldr import scitldr
from foreword.tasks.shots import FewShot
from foreword.tasks.subsample import DataFraction, LowData, draw_rows, drawn
from foreword.tasks.superglue import SUPERGLUE, fewglue, superglue
from foreword.tasks.task import AnyExample, Example, Labelled, SkippedRow, Split, Tagged, Task
from foreword.tasks.trails import Trails
from foreword.tasks.webnlg import CATEGORIES, webnlg
from foreword.tasks.xsum import xsum, xsum_subset

__all__ = [
    "E2E", "OWN_TASKS", "AnyExample", "ConllFiles", "DataFraction", "Example", "FewShot", "FileTask", "Labelled",
    "LabelledFiles", "LowData", "SkippedRow", "Split", "Tagged", "Task", "Trails", "draw_rows", "drawn", "get_task",
    "list_tasks", "reading_of",
]  # fmt: skip

_OWN: dict[str, Any] = {"files": FileTask, "labelled": LabelledFiles, "conll": ConllFiles}
OWN_TASKS = tuple(_OWN)  # those that read a user's own rows
_TASKS: dict[str, Callable[..., Task]] = {
    "e2e": E2E,
    **_OWN,
    "trails": Trails,
    "webnlg": webnlg,
    **{f"webnlg-{part}": partial(webnlg, part) for part in CATEGORIES if part != "all"},
    "dart": dart,
    "xsum": xsum,
    "xsum_subset": xsum_subset,
    "bbc": bbc,
    **{f"bbc-{transfer}": partial(bbc, transfer) for transfer in TRANSFERS if transfer != "none"},
    "scitldr": scitldr,
    "dialogsum": dialogsum,
    "sst2": sst2,
    "trec": trec,
    "ag_news": ag_news,
    **{name: partial(superglue, name) for name in SUPERGLUE},
    **{f"fewglue-{name}": partial(fewglue, name) for name in SUPERGLUE},
    **{name: partial(ner, name) for name in NER},
}


def list_tasks() -> list[str]:
    """The names that `get_task` knows.

    >>> "e2e" in list_tasks()
    True
    """
    return sorted(_TASKS)


def get_task(name: str, **options: Any) -> Task:
    """The task of that name; `ConfigError` for an unknown name or option.

    >>> get_task("e2e").metrics
    ('bleu', 'chrf++')
    """
    if name not in _TASKS:
        raise ConfigError(f"task {name!r}", _one_of(list_tasks()), "name one of them")
    known = signature(_TASKS[name]).parameters
    for option in options:
        if option not in known:
            raise ConfigError(f"option {option!r} of task {name!r}", _one_of(known), "leave it out")
    return _TASKS[name](**options)


def reading_of(known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """How a prefix says that it reads a user's own rows: the task and its options; "" for one that does not say.

    What stands in a prefix is anybody's: `DataError` for options that do not say how rows are read.

    >>> reading_of({"reading": {"task": "labelled", "options": {"text_column": "review"}}})
    ('labelled', {'text_column': 'review'})
    """
    reading = known.get("reading")
    if reading is None:
        return "", {}
    expected = "a task for rows of one's own, and its columns and templates"
    if not isinstance(reading, dict) or reading.get("task") not in _OWN or not isinstance(reading.get("options"), dict):
        raise DataError("a prefix whose `reading` is none", expected, "train it again")
    for name, value in reading["options"].items():
        texts = value if isinstance(value, list) else [value]
        if name not in _OWN[reading["task"]]._row_options or not all(isinstance(text, str) for text in texts):
            raise DataError(f"a prefix that reads rows by {name!r}", expected, "train it again")
    return reading["task"], dict(reading["options"])


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names) if names else "none"
