"""Classification and multiple choice, and the tasks `sst2`, `trec` and `ag_news`.

SST-2 (Socher et al. 2013, D13-1170) with the sentences and splits of Kim (2014), TREC's six coarse classes (Li & Roth
2002, C02-1150), AG News (Zhang et al. 2015, arXiv:1509.01626).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from foreword.tasks.dataset import DatasetTask
from foreword.tasks.rows import Unusable, row_label, row_text
from foreword.tasks.source import HubSource, Row
from foreword.tasks.task import Labelled

__all__ = ["ClassificationTask", "Reading", "ag_news", "check_label", "sst2", "trec"]


class Reading(NamedTuple):
    """What a row says, but for its label: `texts` for an encoder, `prompt` and the options for a decoder."""

    texts: tuple[tuple[str, ...], ...]
    prompt: str
    options: tuple[str, ...] = ()


class ClassificationTask(DatasetTask):
    """Rows with one of some labels; `read` says what a row looks like.

    `words` are the labels as a decoder writes them; without any, the task is a choice among each row's own options.
    `stored` are the labels by what `label_column` holds, as text; `columns` are those that `read` needs.
    """

    def __init__(
        self,
        name: str,
        labels: tuple[str, ...],
        *,
        read: Callable[[Row], Reading],
        stored: Mapping[str, str],
        words: tuple[str, ...] = (),
        columns: tuple[str, ...] = ("text",),
        label_column: str = "label",
        **options: Any,
    ) -> None:
        super().__init__(name, labels, **options)
        self.kind, self.columns = "classification" if words else "choice", columns
        self._read, self._words, self._label_column, self._stored = read, words, label_column, stored
        if not words:
            self.max_new_tokens = 32

    def example(self, row: Row, name: str, number: int) -> Labelled:
        """The example in a row; `Unusable` if there is none."""
        found = self.unlabelled(row, name, number)
        stored = row_label(row, self._label_column)
        check_label(stored, tuple(self._stored))
        return found._replace(label=self._stored[stored])

    def unlabelled(self, row: Row, name: str, number: int) -> Labelled:
        """What is read of a row whose label nobody knows; the first one stands in for it."""
        texts, prompt, options = self._read(row)
        return Labelled(name, texts, self.labels[0], prompt, self._words or options, number)

    def key(self, example: Labelled) -> str:
        """The texts of an example."""
        return json.dumps(example.texts)


def check_label(label: str, labels: tuple[str, ...]) -> None:
    """Raise `Unusable` unless the label is one of the labels."""
    if label not in labels:
        raise Unusable(f"unknown label {label!r} (known: {', '.join(labels)})")


def _asking(question: str) -> Callable[[Row], Reading]:
    """Rows of one text; a decoder is asked the question after it."""

    def read(row: Row) -> Reading:
        text = row_text(row, "text").strip()
        return Reading(((text,),), f"{text}\n{question}\n")

    return read


def sst2() -> ClassificationTask:
    """The task `sst2`: 6,920 / 872 / 1,821 sentences of film reviews.

    >>> sst2().labels
    ('negative', 'positive')
    """
    return ClassificationTask(
        "sst2",
        ("negative", "positive"),
        words=("negative", "positive"),
        stored={"0": "negative", "1": "positive"},
        read=_asking("Is this review positive or negative?"),
        instruction="Say whether the review is positive or negative.",
        metrics=("accuracy",),
        files={split: f"classification/sst2/{split}.parquet" for split in ("train", "dev", "test")},
        hub=HubSource(
            "SetFit/sst2",  # GLUE hides its test labels
            {"train": "train", "dev": "validation", "test": "test"},
            {"text": "text", "label": "label"},
        ),
    )


def trec() -> ClassificationTask:
    """The task `trec`: 5,452 / 500 questions by what they ask for; dev is held out of train.

    >>> trec().labels
    ('abbreviation', 'entity', 'description', 'person', 'location', 'number')
    """
    labels = ("abbreviation", "entity", "description", "person", "location", "number")
    return ClassificationTask(
        "trec",
        labels,
        words=labels,
        label_column="coarse",
        stored=dict(zip(("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"), labels, strict=True)),
        read=_asking("What does this question ask for?"),
        instruction="Say whether the question asks for an abbreviation, an entity, a description, a person, "
        "a location or a number.",
        metrics=("accuracy",),
        files={split: f"classification/trec/{split}.parquet" for split in ("train", "test")},
        cut=("dev",),
        hub=HubSource(
            "CogComp/trec",
            {"train": "train", "test": "test"},
            {"text": "text", "coarse_label": "coarse"},
            revision="refs/convert/parquet",
        ),
    )


def ag_news() -> ClassificationTask:
    """The task `ag_news`: news by topic; dev is held out of train.

    The hub has title and description together, 120,000 / 7,600 rows. The folder has 10,001 descriptions of the
    training rows, and the test rows are read the same way, without their titles.

    >>> ag_news().labels
    ('World', 'Sports', 'Business', 'Sci/Tech')
    """
    ask = _asking("Which topic is this news about: world, sports, business or technology?")
    labels = ("World", "Sports", "Business", "Sci/Tech")
    return ClassificationTask(
        "ag_news",
        labels,
        words=("world", "sports", "business", "technology"),
        stored={**{str(number): label for number, label in enumerate(labels)}, **{label: label for label in labels}},
        read=lambda row: ask(row if "text" in row else {"text": row.get("description")}),
        instruction="Say whether the news is about the world, sports, business or technology.",
        metrics=("accuracy",),
        files={
            "train": "classification/ag_news/train10k_desc.parquet",
            "test": "classification/ag_news/test.parquet",
        },
        cut=("dev",),
        hub=HubSource("fancyzhx/ag_news", {"train": "train", "test": "test"}, {"text": "text", "label": "label"}),
    )
