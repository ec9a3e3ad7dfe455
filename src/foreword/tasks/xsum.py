"""Tasks `xsum` and `xsum_subset`: BBC articles to one sentence (Narayan et al. 2018, arXiv:1808.08745)."""

from __future__ import annotations

from functools import partial
from typing import Any

from foreword.tasks.generation import ARTICLE_WORDS, GenerationTask, Record, one_line
from foreword.tasks.rows import row_text
from foreword.tasks.source import HubSource, Row

__all__ = ["xsum", "xsum_subset"]


def xsum(words: int = ARTICLE_WORDS) -> GenerationTask:
    """The task `xsum`: 204,045 / 11,332 / 11,334 articles, cut to their first `words` words (0: whole).

    >>> xsum().metrics
    ('rouge_1', 'rouge_2', 'rouge_l')
    """
    return _task(
        "xsum",
        words,
        files={split: f"xsum/{split}.parquet" for split in ("train", "dev", "test")},
        hub=HubSource(
            "EdinburghNLP/xsum",
            {"train": "train", "dev": "validation", "test": "test"},
            {"document": "document", "summary": "summary"},
            revision="refs/convert/parquet",
        ),
        without_file="use the task xsum_subset, or unset FOREWORD_DATA to read from the hub",
    )


def xsum_subset(words: int = ARTICLE_WORDS) -> GenerationTask:
    """The task `xsum_subset`: 1,122 / 187 / 294 articles, all of them of XSum's official test split.

    For work without the hub. The splits are Foreword's own, by a hash of the article's id, so that scores cannot be
    compared with those on XSum. Articles are cut to their first `words` words (0: whole).

    >>> xsum_subset().name
    'xsum_subset'
    """
    files = {split: f"xsum_subset/mini_{split}.parquet" for split in ("train", "dev", "test")}
    return _task("xsum_subset", words, files=files, hub=None)


def _task(name: str, words: int, **places: Any) -> GenerationTask:
    return GenerationTask(
        name,
        read=partial(_record, words),
        instruction="Say in one sentence what the article is about.",
        metrics=("rouge_1", "rouge_2", "rouge_l"),
        max_new_tokens=64,
        **places,
    )


def _record(words: int, row: Row, _split: str) -> Record:
    return Record(one_line(row_text(row, "document"), words), (one_line(row_text(row, "summary")),))
