"""SuperGLUE (Wang et al. 2019, arXiv:1905.00537) and FewGLUE, 32 rows of each (Schick & Schütze 2021, 2009.07118).

What encoders read is what P-Tuning v2 gives them (Liu et al. 2022, arXiv:2110.07602). The official test labels are
hidden: `test` is the official validation split, and `dev` is held out of train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from foreword.tasks.classification import ClassificationTask, Reading
from foreword.tasks.rows import Unusable, row_text
from foreword.tasks.source import HubSource, Row

__all__ = ["SUPERGLUE", "fewglue", "superglue"]


def _names(*labels: str) -> dict[str, str]:
    """Labels that are stored by name or by number."""
    return {**{str(number): label for number, label in enumerate(labels)}, **{label: label for label in labels}}


class _Set(NamedTuple):
    read: Callable[[Row], Reading]
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    words: tuple[str, ...]
    stored: Mapping[str, str]
    instruction: str
    metrics: tuple[str, ...] = ("accuracy",)


def superglue(name: str) -> ClassificationTask:
    """One of the tasks of `SUPERGLUE`: all rows.

    >>> superglue("cb").metrics
    ('accuracy', 'macro_f1')
    """
    return _task(
        name,
        name,
        files={"train": f"superglue/{name}.train.parquet", "test": f"superglue/{name}.val.parquet"},
        cut=("dev",),
        hub=HubSource(
            "aps/super_glue",
            {"train": "train", "test": "validation"},
            {column: column for column in (*SUPERGLUE[name].columns, "label")},
            revision="refs/convert/parquet",
            folder=name,
        ),
        without_file=f"use the task fewglue-{name}, or unset FOREWORD_DATA to read from the hub",
    )


def fewglue(name: str) -> ClassificationTask:
    """FewGLUE's rows of one of the tasks: 32 to train on, 32 others for dev, the official validation split as test.

    >>> fewglue("rte").name
    'fewglue-rte'
    """
    parts = {"train": "fewglue_train32", "dev": "fewglue_dev32", "test": "val"}
    return _task(
        f"fewglue-{name}",
        name,
        files={split: f"superglue/{name}.{part}.parquet" for split, part in parts.items()},
        hub=None,
        without_file="correct FOREWORD_DATA",
    )


def _task(name: str, base: str, **places: Any) -> ClassificationTask:
    chosen = SUPERGLUE[base]
    return ClassificationTask(
        name,
        chosen.labels,
        read=chosen.read,
        words=chosen.words,
        columns=chosen.columns,
        stored=chosen.stored,
        instruction=chosen.instruction,
        metrics=chosen.metrics,
        **places,
    )


def _boolq(row: Row) -> Reading:
    question, passage = row_text(row, "question"), row_text(row, "passage")
    return Reading(((question, passage),), f"{passage}\nQuestion: {question}?\n")


def _entailment(question: str) -> Callable[[Row], Reading]:
    def read(row: Row) -> Reading:
        premise, hypothesis = row_text(row, "premise"), row_text(row, "hypothesis")
        return Reading(((premise, hypothesis),), f"{premise}\nHypothesis: {hypothesis}\n{question}\n")

    return read


def _copa(row: Row) -> Reading:
    joiners = {"cause": ("because", "What was the cause?"), "effect": ("so", "What happened as a result?")}
    premise, asked = row_text(row, "premise"), row_text(row, "question")
    if asked not in joiners:
        raise Unusable(f"question {asked!r} is neither cause nor effect")
    joiner, question = joiners[asked]
    options = (row_text(row, "choice1"), row_text(row, "choice2"))
    texts = tuple((f"{premise} {joiner}", option) for option in options)
    return Reading(texts, f"{premise}\n{question}\n", options)


def _wic(row: Row) -> Reading:
    word, first, second = row_text(row, "word"), row_text(row, "sentence1"), row_text(row, "sentence2")
    question = f'Does "{word}" have the same meaning in both sentences?'
    return Reading(((f"{word}: {first}", f"{word}: {second}"),), f"{first}\n{second}\n{question}\n")


def _wsc(row: Row) -> Reading:
    text, noun, pronoun = row_text(row, "text"), row_text(row, "span1_text"), row_text(row, "span2_text")
    question = f'Does "{pronoun}" refer to "{noun}"?'
    return Reading(((f"{pronoun}: {text}", noun),), f"{text}\n{question}\n")


SUPERGLUE: dict[str, _Set] = {
    "boolq": _Set(
        _boolq,
        ("question", "passage"),
        ("False", "True"),
        ("No", "Yes"),
        _names("False", "True"),
        "Read the passage and answer the question with yes or no.",
    ),
    "cb": _Set(
        _entailment("Is the hypothesis true?"),
        ("premise", "hypothesis"),
        ("entailment", "contradiction", "neutral"),
        ("Yes", "No", "Maybe"),
        _names("entailment", "contradiction", "neutral"),
        "Say whether the hypothesis is true: yes, no or maybe.",
        ("accuracy", "macro_f1"),
    ),
    "copa": _Set(
        _copa,
        ("premise", "choice1", "choice2", "question"),
        ("1", "2"),
        (),
        {"0": "1", "1": "2", "choice1": "1", "choice2": "2"},
        "Choose the more likely cause or effect.",
    ),
    "rte": _Set(
        _entailment("Does the hypothesis follow from the text?"),
        ("premise", "hypothesis"),
        ("entailment", "not_entailment"),
        ("Yes", "No"),
        _names("entailment", "not_entailment"),
        "Say whether the hypothesis follows from the text: yes or no.",
    ),
    "wic": _Set(
        _wic,
        ("word", "sentence1", "sentence2"),
        ("False", "True"),
        ("No", "Yes"),
        _names("False", "True"),
        "Say whether the word has the same meaning in both sentences: yes or no.",
    ),
    "wsc": _Set(
        _wsc,
        ("text", "span1_text", "span2_text"),
        ("False", "True"),
        ("No", "Yes"),
        _names("False", "True"),
        "Say whether the pronoun refers to the name: yes or no.",
    ),
}
