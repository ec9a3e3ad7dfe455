"""A toy task for tests of training: short rows that a tiny model can learn something of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import tiny_base

from foreword.config import TrainConfig
from foreword.tasks import Example, SkippedRow, Split
from foreword.train import TrainResult, train

__all__ = ["ToyTask", "toy_config", "toy_train"]


class ToyTask:
    """Prompts of one to four words; the completion is the first of them."""

    name = "toy"
    kind = "generation"
    labels: tuple[str, ...] = ()
    instruction = "Say the first word again."
    metrics = ("bleu",)
    max_new_tokens = 8
    stop = ("\n",)

    def __init__(self, rows: int = 20, skipped: int = 0) -> None:
        self.rows, self.skipped = rows, [SkippedRow(1000 + row, "no prompt") for row in range(skipped)]

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        count = {"train": self.rows, "dev": 7, "test": 0}[name]
        assert count, "training must not read the test split"
        examples = []
        for row in range(count):
            word = f"{name[0]}{row}"
            examples.append(Example(f"{name}-{row}", f"{word} " * (1 + row % 4) + "\n", word, (word,), row))
        return Split(name, examples[:limit], self.skipped, source=f"{name}.toy")


def toy_config(**options: Any) -> TrainConfig:
    """Small and quick: 3 epochs of 3 steps."""
    return TrainConfig(**{"length": 4, "epochs": 3, "batch_size": 7, "hidden_size": 8, "patience": 0, **options})


def toy_train(out: Path | None = None, model: str = "llama", **options: Any) -> TrainResult:
    """Train a tiny model's prefix on the toy task."""
    return train(tiny_base(model), None, ToyTask(), toy_config(**options), out=out)
