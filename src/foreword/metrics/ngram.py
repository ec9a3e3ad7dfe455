"""BLEU (Papineni et al. 2002) and chrF++ (Popovic 2017), as sacrebleu computes them (Post 2018, arXiv:1804.08771)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from foreword.metrics.metric import Metric, Numbers, Targets
from foreword.optional import optional

__all__ = ["Bleu", "ChrfPlusPlus"]


class _SacreBleu(Metric):
    """A metric of sacrebleu. Rows may have different numbers of references."""

    def scorer(self) -> Any:
        """The metric's object of sacrebleu."""
        raise TypeError(f"{type(self).__name__} has no scorer")

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        streams = list(zip_longest(*targets))  # one stream per reference, None where a row has fewer
        statistics: list[list[float]] = self.scorer()._extract_corpus_statistics(list(hypotheses), streams)
        return statistics

    def score(self, sums: Numbers) -> float:
        return float(self.scorer()._compute_score_from_stats(sums.tolist()).score)


class Bleu(_SacreBleu):
    """Corpus BLEU; lower-cased with mteval-13a tokens it equals the official E2E script's.

    >>> bleu = Bleu()
    >>> round(bleu(["Aromi is a pub by the river ."], [["Aromi is a pub near the river .", "A pub: Aromi."]]), 2)
    50.0
    """

    name = "bleu"
    description = "BLEU-4 of the corpus, lower-cased, 13a tokens, all references"

    def __init__(self, *, lowercase: bool = True, tokenize: str = "13a", smoothing: str = "exp") -> None:
        self._options = {"lowercase": lowercase, "tokenize": tokenize, "smooth_method": smoothing}
        self._scorer: Any = None

    def scorer(self) -> Any:
        if self._scorer is None:
            # `force`: text that looks tokenised is the caller's choice, no warning is due
            self._scorer = optional("sacrebleu.metrics", "eval").BLEU(force=True, **self._options)
        return self._scorer


class ChrfPlusPlus(_SacreBleu):
    """Corpus chrF++: F2 of character 1- to 6-grams and word 1- and 2-grams, against each row's best reference.

    >>> ChrfPlusPlus()(["Aromi is a pub."], [["Aromi is a pub."]])
    100.0
    """

    name = "chrf++"
    description = "chrF++ of the corpus, cased, best reference of each row"

    def __init__(self) -> None:
        self._scorer: Any = None

    def scorer(self) -> Any:
        if self._scorer is None:
            self._scorer = optional("sacrebleu.metrics", "eval").CHRF(word_order=2)
        return self._scorer
