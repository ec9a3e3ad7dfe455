"""A study that costs nothing, for tests of the grid: what a run does is said by its configuration."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError

__all__ = ["calls", "check", "data_of", "perform", "tiny_study", "write_study"]

ROOT = Path(__file__).parents[1]


def check(config: Mapping[str, Any]) -> None:
    """Refuse a method that there is not."""
    if config.get("method") == "magic":
        raise ConfigError("method = 'magic'", "a method", "correct method")


def data_of(config: Mapping[str, Any]) -> str:
    """The hash of the rows."""
    return str(config.get("data", ""))


def perform(config: dict[str, Any], folder: Path, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """A number that depends on the configuration alone; `behave` says what happens on the way.

    With a base model it is a real run that comes out.
    """
    with open(folder / "calls", "a") as file:
        file.write(f"{os.getpid()}\n")
    first = len(calls(folder)) == 1
    behave = config.get("behave", "well")
    progress("working", 1, 2)
    if config.get("loads", ""):
        __import__(config["loads"])
    time.sleep(config.get("seconds", 0.0))
    if behave == "raise" or (behave == "raise once" and first):
        raise RuntimeError("something broke")
    if behave == "refuse":
        raise ConfigError("rows = 0", "at least 1", "correct rows")
    if behave == "leave":
        sys.exit(3)
    if behave == "nan":
        return {"value": float("nan")}
    if behave == "die" or (behave == "die once" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if "base" in config:
        from foreword.experiments.perform import perform as really

        return really({key: value for key, value in config.items() if key != "behave"}, folder, progress)
    return {
        "value": random.Random(repr(sorted(config.items()))).random(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "process": os.getpid(),
        "scores": {"test": {"bleu": {"value": 41.5, "low": 40.0, "high": 43.0}}},
    }


def tiny_study(folder: Path) -> dict[str, Any]:
    """The configuration of a real run with a tiny model and rows of its own, which are written to the folder."""
    from tests.tiny import save_tiny

    for split, first, count in (("train", 0, 40), ("test", 50, 6)):
        rows = [
            {"prompt": f"after {number}?", "completion": f"it is {number + 1}"}
            for number in range(first, first + count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": save_tiny("llama", folder / "model", max_position_embeddings=256), "dtype": "float32", "task": "files",
        "task_train": str(folder / "train.jsonl"), "task_test": str(folder / "test.jsonl"),
    }  # fmt: skip


def calls(folder: str | Path) -> list[str]:
    """The processes that began a run, one for each attempt."""
    path = Path(folder) / "calls"
    return path.read_text().split() if path.exists() else []


def write_study(folder: Path, defaults: str = "", **files: str) -> Path:
    """A study of that folder; the runs are performed here."""
    folder.mkdir(parents=True)
    head = f'\n[study]\nperform = "{__name__}:perform"\ndescription = "for tests"\n'
    (folder / "defaults.toml").write_text(defaults + head)
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder
