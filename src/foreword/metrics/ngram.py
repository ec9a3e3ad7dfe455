"""BLEU (Papineni et al. 2002), chrF++ (Popovic 2017) and TER (Snover et al. 2006), as sacrebleu computes them.

Source: Post 2018, arXiv:1804.08771.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from foreword.metrics.metric import Metric, Numbers, Targets
from foreword.metrics.tokens import split_at_punctuation
from foreword.optional import optional

__all__ = ["Bleu", "ChrfPlusPlus", "MultiBleu", "Ter"]

SCRIPT_REFERENCES = 3  # the scripts of WebNLG 2017 and DART read three files of references


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


class MultiBleu(Bleu):
    """BLEU of multi-bleu.perl with three references, as the scripts of WebNLG 2017 and DART call it.

    Texts are lower-cased and split at punctuation; text that was split before stays as it is. Of each row the first
    three references count. With `fill`, missing ones are empty lines whose length 0 counts as one, as in the files of
    DART; this can only raise the score, and published scores have it.

    >>> round(MultiBleu()(["A pub (cheap)."], [["a pub ( cheap ) ."]]), 2)
    100.0
    """

    def __init__(self, name: str = "bleu_webnlg", *, fill: bool = False) -> None:
        super().__init__(lowercase=False, tokenize="none", smoothing="none")
        self.name, self._fill = name, fill
        script, filled = ("DART", ", empty ones where there are fewer") if fill else ("WebNLG 2017", "")
        self.description = f"BLEU-4 as the script of {script}: split at punctuation, first three references{filled}"

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        rows = [[split_at_punctuation(text) for text in references[:SCRIPT_REFERENCES]] for references in targets]
        if self._fill:
            rows = [row + [""] * (SCRIPT_REFERENCES - len(row)) for row in rows]
        return super().row_statistics([split_at_punctuation(text) for text in hypotheses], rows)


class Ter(_SacreBleu):
    """Translation edit rate: insertions, deletions, substitutions and shifts per word of the references.

    Texts are lower-cased and split at punctuation. The edits are those to the nearest reference, the words the mean of
    its references. With `limit`, only so many references of each row count: three in the scripts of WebNLG and DART.
    It is slow: a test set takes minutes.

    >>> Ter()(["by the river a cheap pub"], [["a cheap pub by the river"]])  # one shift, six words
    16.66...
    """

    higher_is_better = False
    maximum = None

    def __init__(self, name: str = "ter", *, limit: int | None = None) -> None:
        self.name, self._limit = name, limit
        which = "all references" if limit is None else f"first {limit} references, as WebNLG and DART"
        self.description = f"translation edit rate, split at punctuation, nearest of {which}; slow"
        self._scorer: Any = None

    def scorer(self) -> Any:
        if self._scorer is None:
            self._scorer = optional("sacrebleu.metrics", "eval").TER()
        return self._scorer

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        rows = [[split_at_punctuation(text) for text in references[: self._limit]] for references in targets]
        return super().row_statistics([split_at_punctuation(text) for text in hypotheses], rows)


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
