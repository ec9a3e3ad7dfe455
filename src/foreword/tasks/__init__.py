"""Tasks: raw rows in, examples with prompt, completion and references out. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from foreword.errors import ConfigError
from foreword.tasks.e2e import E2E
from foreword.tasks.task import Example, SkippedRow, Split, Task

__all__ = ["E2E", "Example", "SkippedRow", "Split", "Task", "get_task", "list_tasks"]

_TASKS: dict[str, Callable[..., Task]] = {"e2e": E2E}


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
        raise ConfigError(f"task {name!r}", "one of " + ", ".join(list_tasks()), "name one of them")
    try:
        return _TASKS[name](**options)
    except TypeError:
        raise ConfigError(f"task {name!r} with options {sorted(options)}", "options that it has") from None
