"""Task `dart`: descriptions of triples from tables, WebNLG and E2E (Nan et al. 2021, arXiv:2007.02871, v1.1.1).

Linearised as in Prefix-Tuning's code (Li & Liang 2021, arXiv:2101.00190), relations in lower case:
"Mars Hill College : joined : 1973 | Mars Hill College : location : Mars Hill, North Carolina".
"""

from __future__ import annotations

from typing import Any

from foreword.tasks.generation import GenerationTask, Record, row_lines, triples_line
from foreword.tasks.rows import Unusable, check_text
from foreword.tasks.source import HubSource, Row

__all__ = ["dart"]


def dart() -> GenerationTask:
    """The task `dart`: 30,526 / 2,768 / 5,097 sets of triples, 62,659 / 6,980 / 12,552 texts.

    These are the sizes as published; one of the test texts is empty and left out. The hub's test split is an older one
    of 6,959 rows, with a second copy of WebNLG's 1,862: scores on the two cannot be compared. In either, a row that
    is there twice counts twice.

    >>> dart().max_new_tokens
    100
    """
    return GenerationTask(
        "dart",
        read=_record,
        instruction="Describe the facts in one or more fluent sentences that state all of them.",
        metrics=("bleu_dart", "chrf++"),
        max_new_tokens=100,
        files={split: f"dart/{split}.parquet" for split in ("train", "dev", "test")},
        hub=HubSource(
            "Yale-LILY/dart",
            {"train": "train", "dev": "validation", "test": "test"},
            {"tripleset": "tripleset", "annotations": "texts"},
            revision="refs/convert/parquet",
        ),
        without_file="add its {split} split, or unset FOREWORD_DATA to read it from the hub",
    )


def _record(row: Row, _split: str) -> Record:
    triples = row.get("tripleset")
    if not isinstance(triples, list) or not triples:
        raise Unusable("no triples")
    texts = row.get("texts")
    if isinstance(texts, dict):  # the hub has texts and their sources in one column
        row = {"texts": texts.get("text")}
    return Record(triples_line(map(_triple, triples)), row_lines(row, "texts"))


def _triple(triple: Any) -> tuple[str, ...]:
    if not isinstance(triple, list) or len(triple) != 3:
        raise Unusable(f"{triple!r} is no triple (subject, relation, object)")
    subject, relation, value = (check_text(part, "a part of a triple") for part in triple)
    return subject, relation.lower(), value
