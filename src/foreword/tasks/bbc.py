"""Task `bbc`: headlines of BBC articles from five topics (Greene & Cunningham 2006, 10.1145/1143844.1143892).

Its topics are true ones, so that it shows how a method goes over to topics that it was not trained on, as in section
6.4 of Prefix-Tuning (Li & Liang 2021, arXiv:2101.00190), which splits XSum by the addresses of its articles.
"""

from __future__ import annotations

from foreword.errors import ConfigError
from foreword.tasks.generation import ARTICLE_WORDS, GenerationTask, Record, one_line
from foreword.tasks.rows import Unusable, row_text
from foreword.tasks.source import Row

__all__ = ["TOPICS", "TRANSFERS", "bbc"]

TOPICS = ("business", "entertainment", "politics", "sport", "tech")

# the topics of train and dev, and those of test
TRANSFERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": (TOPICS, TOPICS),
    "news-to-sports": (("business", "entertainment", "politics", "tech"), ("sport",)),
    "within-news": (("business", "politics"), ("entertainment", "tech")),
}


def bbc(transfer: str = "none", words: int = ARTICLE_WORDS) -> GenerationTask:
    """The task `bbc`: 1,412 / 225 / 421 articles of 2004 and 2005, cut to their first `words` words (0: whole).

    `transfer` keeps some topics for train and dev and others for test: `news-to-sports` 1,090 / 167 / 107 articles,
    `within-news` 632 / 94 / 153; the task is then called `bbc-news-to-sports` or `bbc-within-news`. The data set has no
    official split. It is read from a folder, not from the hub. `ConfigError` for another transfer.

    >>> bbc("within-news").name
    'bbc-within-news'
    """
    if transfer not in TRANSFERS:
        raise ConfigError(f"transfer {transfer!r}", ", ".join(TRANSFERS), "choose one of them")
    trained, tested = TRANSFERS[transfer]

    def read(row: Row, split: str) -> Record | None:
        topic = row_text(row, "category")
        if topic not in TOPICS:
            raise Unusable(f"unknown topic {topic!r} (known: {', '.join(TOPICS)})")
        if topic not in (tested if split == "test" else trained):
            return None
        return Record(one_line(row_text(row, "document"), words), (one_line(row_text(row, "title")),))

    return GenerationTask(
        "bbc" if transfer == "none" else f"bbc-{transfer}",
        read=read,
        instruction="Write the headline of the article.",
        metrics=("rouge_1", "rouge_2", "rouge_l"),
        max_new_tokens=24,
        files={split: f"bbc_headlines/{split}.parquet" for split in ("train", "dev", "test")},
        hub=None,
        dataset="bbc",
    )
