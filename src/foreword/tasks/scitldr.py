"""Task `scitldr`: abstracts of papers to one sentence, SciTLDR-A (Cachola et al. 2020, arXiv:2004.15011)."""

from __future__ import annotations

from foreword.tasks.generation import GenerationTask, Record, row_lines
from foreword.tasks.source import HubSource, Row

__all__ = ["scitldr"]


def scitldr() -> GenerationTask:
    """The task `scitldr`: 1,992 / 619 / 618 abstracts with 1,992 / 1,453 / 1,967 summaries.

    >>> scitldr().instruction
    'Say in one sentence what the paper contributes.'
    """
    return GenerationTask(
        "scitldr",
        read=_record,
        instruction="Say in one sentence what the paper contributes.",
        metrics=("rouge_1", "rouge_2", "rouge_l"),
        max_new_tokens=64,
        files={split: f"scitldr_a/{split}.parquet" for split in ("train", "dev", "test")},
        hub=HubSource(
            "allenai/scitldr",
            {"train": "train", "dev": "validation", "test": "test"},
            {"source": "source", "target": "target"},
            revision="refs/convert/parquet",
            folder="Abstract",
        ),
    )


def _record(row: Row, _split: str) -> Record:
    return Record(" ".join(row_lines(row, "source")), row_lines(row, "target"))
