"""Tasks: raw rows in, examples with prompt, completion and references out. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

from foreword.errors import ConfigError
from foreword.tasks.e2e import E2E
from foreword.tasks.files import FileTask
from foreword.tasks.task import Example, SkippedRow, Split, Task
from foreword.tasks.trails import Trails

__all__ = ["E2E", "Example", "FileTask", "SkippedRow", "Split", "Task", "Trails", "get_task", "list_tasks"]

_TASKS: dict[str, Callable[..., Task]] = {"e2e": E2E, "files": FileTask, "trails": Trails}


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


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(names) if names else "none"
