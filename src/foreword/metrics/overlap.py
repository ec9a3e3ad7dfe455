"""Metrics of single rows, averaged: ROUGE, exact match, and how much of the source is mentioned."""

from __future__ import annotations

import re
from collections.abc import Sequence

from foreword.metrics.metric import Mean, Targets
from foreword.metrics.sources import field_values
from foreword.optional import optional

__all__ = ["Coverage", "ExactMatch", "Rouge"]


class Rouge(Mean):
    """ROUGE F1 (Lin 2004) of the package rouge-score with Porter's stemmer, against each row's best reference.

    `kind` is "1" or "2" for n-grams, "L" for the longest common subsequence.

    >>> Rouge("2")(["a pub by the river"], [["pubs by the sea"]])  # of 4 and 3 pairs, two are shared
    57.14...
    """

    def __init__(self, kind: str = "L") -> None:
        self.name = f"rouge_{kind.lower()}"
        self.description = f"ROUGE-{kind} F1 by rouge-score, stemmed, best reference of each row, averaged"
        self._key = f"rouge{kind}"

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        module = optional("rouge_score.rouge_scorer", "eval")
        scorer = module.RougeScorer([self._key], use_stemmer=True)
        return [
            [scorer.score_multi(list(references), hypothesis)[self._key].fmeasure, 1.0]
            for hypothesis, references in zip(hypotheses, targets, strict=True)
        ]


class ExactMatch(Mean):
    """The share of rows that equal one of their references, but for case and spaces.

    >>> ExactMatch()(["Yes ", "no"], [["yes"], ["yes", "maybe"]])
    50.0
    """

    name = "exact_match"
    description = "rows equal to one of their references, but for case and spaces"
    suits = ("text", "label", "tag")

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        return [
            [float(_plain(hypothesis) in {_plain(reference) for reference in references}), 1.0]
            for hypothesis, references in zip(hypotheses, targets, strict=True)
        ]


class Coverage(Mean):
    """The share of source field values that appear in the output, as whole words, but for case and spaces.

    A source is a linearised prompt, "name : Aromi | eatType : pub", or one of triples, whose values are subjects and
    objects. Values that are put into other words, such as "yes" or "no", are not recognised: a lower bound. Without
    any value the score is 100.

    >>> Coverage()(["Aromi serves food."], ["name : Aromi | eatType : pub"])
    50.0
    """

    name = "coverage"
    description = "source field values that are found in the output"
    needs = "sources"

    def row_statistics(self, hypotheses: Sequence[str], targets: Sequence[str]) -> list[list[float]]:
        rows = []
        for hypothesis, source in zip(hypotheses, targets, strict=True):
            text, values = _plain(hypothesis), field_values(source)
            found = sum(re.search(rf"(?<!\w){re.escape(_plain(value))}(?!\w)", text) is not None for value in values)
            rows.append([float(found), float(len(values))])
        return rows


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
