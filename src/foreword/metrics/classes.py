"""Metrics of labels and tags: accuracy, macro F1, and F1 of entities as seqeval and conlleval count them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foreword.errors import DataError
from foreword.metrics.metric import Mean, Metric, Numbers, Targets
from foreword.optional import optional

__all__ = ["Accuracy", "EntityF1", "MacroF1"]


class Accuracy(Mean):
    """The share of rows whose label is one of their references, letter for letter.

    >>> Accuracy()(["yes", "no"], [["yes"], ["yes"]])
    50.0
    """

    name = "accuracy"
    description = "rows with the right label"
    suits = ("label",)

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        return [[float(label in right), 1.0] for label, right in zip(hypotheses, targets, strict=True)]


class MacroF1(Metric):
    """The mean of the F1 of every label that occurs, right or predicted: F1-a of SuperGLUE's CB, scikit-learn's macro.

    >>> MacroF1()(["yes", "yes"], [["yes"], ["no"]])
    33.33...
    """

    name = "macro_f1"
    description = "F1 of each label, averaged over the labels"
    suits = ("label",)

    def joint_statistics(self, systems: Sequence[Sequence[str]], targets: Targets) -> list[Numbers]:
        """Computed together, so that all have the same labels."""
        texts = [text for hypotheses in systems for text in hypotheses]
        return np.split(self.statistics(texts, [*targets] * len(systems)), len(systems))

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        """For each label three numbers: right, predicted, true."""
        pairs = list(zip(hypotheses, _single(targets), strict=True))
        labels = sorted({label for pair in pairs for label in pair})
        return [
            [float(number) for label in labels for number in (got == label == right, got == label, right == label)]
            for got, right in pairs
        ]

    def score(self, sums: Numbers) -> float:
        scores = [_f1(right, got + true) for right, got, true in sums.reshape(-1, 3).tolist() if got + true]
        return 100.0 * sum(scores) / len(scores)


class EntityF1(Metric):
    """Micro F1 over entities, each right if type, first and last word are: seqeval's default mode, conlleval.

    Hypotheses and references are the BIO tags of a sentence with a space between them.

    >>> EntityF1()(["B-PER O B-LOC"], [["B-PER O B-ORG"]])
    50.0
    """

    name = "entity_f1"
    description = "micro F1 of entities, as seqeval and conlleval count them"
    suits = ("tag",)

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        """For each row the entities that are right, predicted, true."""
        get_entities = optional("seqeval.metrics.sequence_labeling", "eval").get_entities
        rows = []
        for row, (hypothesis, reference) in enumerate(zip(hypotheses, _single(targets), strict=True)):
            got, true = hypothesis.split(), reference.split()
            if len(got) != len(true):
                raise DataError(f"{len(got)} tags against {len(true)} in row {row}", "as many of each")
            found, right = set(get_entities(got)), set(get_entities(true))
            rows.append([float(len(found & right)), float(len(found)), float(len(right))])
        return rows

    def score(self, sums: Numbers) -> float:
        right, got, true = sums.tolist()
        return 100.0 * _f1(right, got + true)


def _f1(right: float, got_and_true: float) -> float:
    return 2.0 * right / got_and_true if got_and_true else 0.0


def _single(targets: Targets) -> list[str]:
    """The only reference of each row."""
    for row, references in enumerate(targets):
        if len(references) != 1:
            raise DataError(f"{len(references)} references of row {row}", "exactly one label")
    return [references[0] for references in targets]
