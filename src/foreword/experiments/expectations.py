"""What the papers lead one to expect, and whether a study's runs agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from foreword.experiments.comparisons import Difference, corrected, difference
from foreword.experiments.results import REPEATED, Cell, Results
from foreword.metrics import number_format

__all__ = ["Expectation", "expectations"]

_PREFIX_TUNING = "Li & Liang 2021, arXiv:2101.00190"
_APT = "Zhang et al. 2023, arXiv:2305.15212"
_LEVEL = 0.05  # of the corrected p-values

# Tasks whose test rows are of topics that were not trained on.
_UNSEEN = ("webnlg-unseen", "bbc-news-to-sports", "bbc-within-news")
_WORDS = ("words", "text")  # how a prefix is born from real words; "vocab" draws its tokens at random
_PREFIXES = ("prefix", "ptuning2", "apt")
_SMALL = 0.001  # the share of parameters that the paper's small adapter and prefix have


class Expectation(NamedTuple):
    """A statement, its source, what was published, and what the runs say of it.

    The verdict is `agrees`, `disagrees`, `within noise`, or `mixed`; by p-values that are corrected for the differences
    of the statement.
    """

    statement: str
    source: str
    published: str
    verdict: str
    measured: list[str]


class _Claim(NamedTuple):
    """That the second method scores better than the first, where the two cells and a test fit."""

    first: str
    second: str
    fits: Callable[[Results, Cell, Cell, str], bool]
    statement: str
    source: str
    published: str


def _of_one_length(_: Results, first: Cell, second: Cell, __: str) -> bool:
    return first.option("length") == second.option("length")


def _of_one_size(_: Results, first: Cell, second: Cell, __: str) -> bool:
    """Whether they are the paper's small adapter and a prefix of about as many parameters."""
    one, two = first.mean("parameters"), second.mean("parameters")
    return first.option("share") == _SMALL and bool(one and two) and 0.5 <= (two or 0.0) / (one or 1.0) <= 2


_CLAIMS = (
    _Claim(
        "full", "prefix", lambda results, *_: results.place == "rows",
        "With few rows a prefix scores better than full fine-tuning.", f"{_PREFIX_TUNING}, 6.3",
        "E2E, gpt2-medium: 2.9 BLEU better on average over 50 to 500 rows",
    ),
    _Claim(
        "full", "prefix", lambda results, first, *_: results.place == "fraction" and (first.place or 0.0) >= 0.2,
        "From a fifth of the rows on a prefix scores better than full fine-tuning.", f"{_PREFIX_TUNING}, 7.5",
        "E2E, gpt2-medium: a figure without numbers",
    ),
    _Claim(
        "full", "prefix", lambda _, first, __, test: first.tested(test) in _UNSEEN,
        "On topics that were not trained on a prefix scores better than full fine-tuning.", f"{_PREFIX_TUNING}, 6.4",
        "WebNLG unseen, gpt2-medium: BLEU 45.6 against 27.7; XSum news to sports, bart-large: ROUGE-L 31.51 against "
        "30.26, within news 31.47 against 31.15",
    ),
    _Claim(
        "adapter", "prefix", _of_one_size,
        "A prefix scores better than an adapter that is as small.", f"{_PREFIX_TUNING}, 6.1",
        "gpt2-medium: E2E BLEU 69.7 against 66.3, WebNLG 55.1 against 50.2, DART 46.4 against 42.4",
    ),
    _Claim(
        "embedding", "prefix", _of_one_length,
        "A prefix scores better than trained embeddings alone.", f"{_PREFIX_TUNING}, 7.2",
        "E2E, gpt2-medium: BLEU 69.7 against 48.1, 62.2 and 61.9 with 1, 10 and 20 embeddings",
    ),
    _Claim(
        "infix", "prefix", _of_one_length,
        "A prefix scores better than an infix.", f"{_PREFIX_TUNING}, 7.3",
        "E2E, gpt2-medium: BLEU 69.7 against 67.9, 67.2 and 66.7 with infixes of 1, 10 and 20",
    ),
    _Claim(
        "ptuning2", "apt", _of_one_length,
        "APT scores better than P-Tuning v2 of the same length.", _APT,
        "labels and tags with encoders; not these tasks",
    ),
)  # fmt: skip


def expectations(results: Results) -> list[Expectation]:
    """All statements that the runs at hand can say something of."""
    found = [_claimed(results, claim) for claim in _CLAIMS]
    return [each for each in [*found, _lengths(results), _words(results)] if each is not None]


def _claimed(results: Results, claim: _Claim) -> Expectation | None:
    found = []
    for panel in results.panels:
        cells = results.of(panel)
        for first in _plain(cells, claim.first):
            for second in _plain(cells, claim.second):
                tests = [test for test in results.tests(panel) if claim.fits(results, first, second, test)]
                found += list(_differences(results, first, second, tests)) if _alike(first, second) else []
    return _said(claim.statement, claim.source, claim.published, found)


def _alike(first: Cell, second: Cell) -> bool:
    """Whether two methods are at one place, and have the same of all that the study varies of both."""
    shared = (first.varied & second.varied) - set(REPEATED)
    return first.place == second.place and all(first.option(key) == second.option(key) for key in shared)


def _plain(cells: list[Cell], method: str) -> list[Cell]:
    """The cells of a method in its usual form, where a study has other forms too: files with other names."""
    found = [cell for cell in cells if cell.config.get("method") == method]
    return [cell for cell in found if cell.label.partition(" ")[0] == method] or found


def _lengths(results: Results) -> Expectation | None:
    """The longest prefix against that of the shorter ones which has the lowest dev loss.

    The test rows must not choose what is tested on them: the best of several on these would seem better by chance.
    """
    found: list[Difference] = []
    for panel in results.panels if results.place == "length" else []:
        for label in results.labels:
            cells = [cell for cell in results.of(panel, label) if cell.config.get("method") in _PREFIXES]
            cells = [cell for cell in cells if cell.mean("dev_nats_per_token") is not None]
            cells.sort(key=lambda cell: cell.place or 0.0)
            if len(cells) > 2:
                best = min(cells[:-1], key=lambda cell: cell.mean("dev_nats_per_token") or 0.0)
                found += _differences(results, cells[-1], best, results.tests(panel))
    return _said(
        "Beyond some length a longer prefix scores worse.", f"{_PREFIX_TUNING}, 7.1",
        "best at 10 slots on DART with gpt2-medium, at 200 on XSum with bart-large; a figure", found,
    )  # fmt: skip


def _words(results: Results) -> Expectation | None:
    """Prefixes born from real words against those born from random numbers and alike otherwise."""
    found: list[Difference] = []
    for panel in results.panels:
        cells = [cell for cell in results.of(panel) if cell.config.get("method") == "prefix"]
        for first in cells:
            for second in cells if first.option("init") == "random" else []:
                alike = all(first.option(name) == second.option(name) for name in ("length", "parametrization"))
                if alike and first.place == second.place and second.option("init") in _WORDS:
                    found += _differences(results, first, second, results.tests(panel))
    return _said(
        "A prefix born from real words scores better than a random one.", f"{_PREFIX_TUNING}, 7.4",
        "E2E with 100 rows, gpt2-medium: every word, of the task or not; a figure without numbers", found,
    )  # fmt: skip


def _differences(results: Results, first: Cell, second: Cell, tests: list[str]) -> Iterator[Difference]:
    """How much higher the second cell scores, by the main metric of each test that both have."""
    for test in tests:
        metric = results.metrics(first.panel, test)[0]
        if first.score(test, metric) and second.score(test, metric):
            found = difference(first, second, test, metric)
            if found is not None:
                yield found


def _said(statement: str, source: str, published: str, found: list[Difference]) -> Expectation | None:
    """The verdict over all differences, in each of which the second cell should be the better one."""
    if not found:
        return None
    found = corrected(found)
    signs = {each.found.better if each.p_value < _LEVEL else None for each in found}
    if signs == {True} or signs == {True, None}:
        verdict = "agrees" if signs == {True} else "agrees where it is beyond noise"
    elif signs == {False} or signs == {False, None}:
        verdict = "disagrees" if signs == {False} else "disagrees where it is beyond noise"
    else:
        verdict = "within noise" if signs == {None} else "mixed"
    lines = [_line(each) for each in found]
    if len(found) > 1 and len({each.metric for each in found}) == 1:
        mean = sum(each.found.difference for each in found) / len(found)
        lines.insert(0, f"on average {found[0].metric} {mean:+{number_format(found[0].metric)}}")
    return Expectation(statement, source, published, verdict, lines)


def _line(each: Difference) -> str:
    """A difference in words, with its interval over rows and its corrected p-value."""
    place = "" if each.second.place is None else f" at {each.second.place:g}"
    what = f"{each.second.label}{place} against {each.first.label}"
    if each.first.place != each.second.place and each.first.place is not None:
        what += f" at {each.first.place:g}"
    where = " ".join(part for part in (each.second.panel, each.test if each.test != "test" else "") if part)
    return (
        f"{what}{f' ({where})' if where else ''}: {each.metric} {each.shown} {each.interval}, "
        f"p {each.p if each.p.startswith('<') else f'= {each.p}'}, {each.runs} {'run' if each.runs == 1 else 'runs'}"
    )
