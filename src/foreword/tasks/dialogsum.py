"""Task `dialogsum`: everyday dialogues to a summary (Chen et al. 2021, arXiv:2105.06762)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from foreword.tasks.generation import GenerationTask, Record, one_line, row_lines
from foreword.tasks.rows import row_text
from foreword.tasks.source import HubSource, Row

__all__ = ["dialogsum"]


def dialogsum() -> GenerationTask:
    """The task `dialogsum`: 12,460 / 500 / 500 dialogues, those of test with three summaries each.

    Turns follow one another on one line; "#Person1#:" and "#Person2#:" say where each begins.

    >>> dialogsum().max_new_tokens
    96
    """
    return GenerationTask(
        "dialogsum",
        read=_record,
        instruction="Summarize the dialogue in one or two sentences.",
        metrics=("rouge_1", "rouge_2", "rouge_l"),
        max_new_tokens=96,
        files={split: f"dialogsum/{split}.parquet" for split in ("train", "dev", "test")},
        hub=HubSource(
            "knkarthick/dialogsum",
            {"train": "train", "dev": "validation", "test": "test"},
            {"id": "id", "dialogue": "dialogue", "summary": "summary"},
        ),
        rows=_rows,
        without_file="add its {split} split, or unset FOREWORD_DATA to read it from the hub",
    )


def _record(row: Row, _split: str) -> Record:
    return Record(one_line(row_text(row, "dialogue")), row_lines(row, "summaries"))


def _rows(rows: Iterable[Row], split: str) -> Iterator[Row]:
    """The rows as the folder has them; the hub has a row for each summary, and in its test split three in a row."""
    for _, group in groupby(rows, key=_dialogue):
        found = list(group)
        if "summaries" in found[0]:
            yield from found
        elif split == "test":
            yield {**found[0], "summaries": [row["summary"] for row in found]}
        else:
            yield from ({**row, "summaries": [row["summary"]]} for row in found)


def _dialogue(row: Row) -> str:
    """What the hub's rows of one dialogue share: test_7 of test_7_1, test_7_2 and test_7_3."""
    name = str(row.get("id"))
    return name.rpartition("_")[0] if name.count("_") == 2 else str(row.get("dialogue"))
