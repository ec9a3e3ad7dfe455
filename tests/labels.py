"""Toy tasks with labels, for tests of heads and label words: short rows that a tiny model can learn something of."""

from __future__ import annotations

from typing import Any

from foreword.tasks import Labelled, Split, Tagged

__all__ = ["KINDS", "ENCODERS", "LabelToy"]

KINDS = ("classification", "choice", "tagging")
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "modernbert", "deberta-v2")

_LABELS = {"classification": ("low", "high", "none"), "choice": ("1", "2"), "tagging": ("O", "B-NUM", "I-NUM")}


class LabelToy:
    """Rows about small numbers: is one low or high, which of two options is the number, which words are numbers."""

    instruction = "Say what is asked about the numbers."
    max_new_tokens = 8
    stop = ("\n",)

    def __init__(self, kind: str, rows: int = 20, pairs: bool = False) -> None:
        self.name, self.kind, self.labels, self.rows, self.pairs = f"toy-{kind}", kind, _LABELS[kind], rows, pairs
        self.metrics = ("entity_f1",) if kind == "tagging" else ("accuracy", "macro_f1")

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        count = {"train": self.rows, "dev": 7, "test": 9}[name]
        examples = [getattr(self, f"_{self.kind}")(name, row) for row in range(count)]
        return Split(name, examples[:limit], [], source=f"{name}.toy")

    def _classification(self, name: str, row: int) -> Labelled:
        label = self.labels[row % 3]
        text = f"{name[0]}{row} " * (1 + row % 4) + {"low": "one two", "high": "eight nine", "none": "a pub"}[label]
        texts: tuple[str, ...] = (text, f"is it {row}?") if self.pairs else (text,)
        return Labelled(f"{name}-{row}", (texts,), label, f"{text}\n", ("low", "high", "nothing at all"), row)

    def _choice(self, name: str, row: int) -> Labelled:
        options = ("a number", "no number") if row % 2 else ("nothing", f"the number {row}")
        texts = tuple((f"what is {row}?", option) for option in options)
        return Labelled(f"{name}-{row}", texts, self.labels[(row + 1) % 2], f"what is {row}?\n", options, row)

    def _tagging(self, name: str, row: int) -> Tagged:
        words = (*(f"{name[0]}{row} so".split() * (1 + row % 2)), "nine", "hundred", "pubs")
        tags = ("O",) * (len(words) - 3) + ("B-NUM", "I-NUM", "O")
        return Tagged(f"{name}-{row}", words, tags, row)


def config_values(**options: Any) -> dict[str, Any]:
    """Options of a small, quick run: 3 epochs of 3 steps."""
    return {"length": 4, "epochs": 3, "batch_size": 7, "hidden_size": 8, "patience": 0, **options}
