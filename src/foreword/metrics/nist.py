"""NIST (Doddington 2002, https://aclanthology.org/www.mt-archive.info/HLT-2002-Doddington.pdf), as mteval-v13a."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from foreword.metrics.metric import Metric, Numbers, Targets
from foreword.metrics.tokens import thirteen_a_tokens

__all__ = ["Nist"]

Ngram = tuple[str, ...]
LONGEST = 5
# Brevity 2/3 halves the score: equation 3 of the paper.
_BREVITY = math.log(0.5) / math.log(1.5) ** 2


class Nist(Metric):
    """NIST-5 of the corpus: n-grams count by their information, log2 of how often their beginning goes on otherwise.

    Lower-cased 13a tokens; information from all references; the length penalty compares with the mean length of all
    references. It equals the official E2E script. No number bounds the score; E2E systems reach 8.6.

    Information is that of the references of all rows, also where rows are resampled: an interval tells what other
    outputs would change, not what another corpus to count in would. It is the same for all systems on the same rows.

    >>> round(Nist()(["a cheap pub", "a cheap cafe"], [["a cheap pub"], ["a cheap cafe"]]), 3)
    3.418
    """

    name = "nist"
    description = "NIST-5 of the corpus, lower-cased, 13a tokens, all references"
    maximum = None
    digits = 2

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        """Matched information and n-grams for each length, then tokens, tokens of references, references, 1."""
        references = [[thirteen_a_tokens(text) for text in texts] for texts in targets]
        information = _information([text for texts in references for text in texts])
        return [
            _row(thirteen_a_tokens(hypothesis), texts, information)
            for hypothesis, texts in zip(hypotheses, references, strict=True)
        ]

    def score(self, sums: Numbers) -> float:
        values = sums.tolist()
        matched, ngrams = values[:LONGEST], values[LONGEST : 2 * LONGEST]
        tokens, reference_tokens, references, rows = values[2 * LONGEST :]
        precision = sum(part / max(count, 1.0) for part, count in zip(matched, ngrams, strict=True))
        expected = reference_tokens * rows / references
        if not tokens or not expected:
            return 0.0
        return float(precision * math.exp(_BREVITY * math.log(min(1.0, tokens / expected)) ** 2))


def _information(texts: Sequence[Ngram]) -> Callable[[Ngram], float]:
    """What an n-gram of the texts tells, in bits."""
    counts: Counter[Ngram] = Counter(ngram for text in texts for ngram in _ngrams(text))
    counts[()] = sum(len(text) for text in texts)
    return lambda ngram: math.log2(counts[ngram[:-1]] / counts[ngram])


def _row(tokens: Ngram, references: Sequence[Ngram], information: Callable[[Ngram], float]) -> list[float]:
    found: Counter[Ngram] = Counter(_ngrams(tokens))
    most: Counter[Ngram] = Counter()
    for reference in references:
        most |= Counter(_ngrams(reference))
    matched = [0.0] * LONGEST
    for ngram, count in (found & most).items():
        matched[len(ngram) - 1] += count * information(ngram)
    ngrams = [float(max(len(tokens) - n, 0)) for n in range(LONGEST)]
    return [*matched, *ngrams, float(len(tokens)), float(sum(map(len, references))), float(len(references)), 1.0]


def _ngrams(tokens: Ngram) -> Iterator[Ngram]:
    for n in range(1, LONGEST + 1):
        for start in range(len(tokens) - n + 1):
            yield tokens[start : start + n]
