"""Slot errors of table-to-text: which values of the source are missing, wrong, or invented in the output.

After Wen et al. 2015 (arXiv:1508.01745, section 4.1) and Dusek et al. 2019 (arXiv:1911.03905), who look for the
values by patterns too. What texts call a value is in `SAID`, for the fields of E2E; other values are looked for as
written.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from foreword.metrics.metric import Metric, Numbers
from foreword.metrics.sources import read_source

__all__ = ["SAID", "SlotErrors", "SlotVerdict", "Slots", "slot_verdict"]

Slots = Mapping[str, Sequence[str]]  # the values of each field

_CHILDREN = r"(?:famil(?:y|ies)|kids?|child(?:ren)?(?:s)?)"
_NOT = (
    r"(?:not?(?! only)|none?|nor|un(?:able|friendly|suitable)?|never|without|cannot|discourages?|prohibit(?:s|ed)?"
    r"|(?:is|are|was|were|do|does|did|has|have|had|would|should|could|wo|ca|must|need|ai)n ?t)\b"
)
_RATED = r"(?:rat(?:ed?|ings?)|reviews?|scores?|stars?)"
_POUNDS = r"(?:£|gbp|l)? ?"


def _rated(word: str) -> str:
    """A word near one that tells of a rating, before or behind it."""
    return rf"{word}(?: \w+){{0,2}} {_RATED}|{_RATED}(?: \w+){{0,3}} {word}"


def _stars(number: str, word: str) -> str:
    count = rf"(?:{number}|{word})"
    return rf"{count} ?(?:out )?of (?:5|five)|{number} ?/ ?5|{count} stars?"


# Patterns by field and value, all in lower case, hyphens as spaces: how a text states the value.
SAID: dict[str, dict[str, str]] = {
    "familyfriendly": {
        "no": rf"{_NOT} (?:(?!and\b|but\b)\w+ ){{0,5}}{_CHILDREN}|(?:un|non){_CHILDREN}"
        rf"|{_CHILDREN} (?:free|(?:un|non )friendly)"
        rf"|adults? only|only (?:for )?adults|for adults|{_CHILDREN} (?:(?!and\b|but\b)\w+ ){{0,2}}{_NOT}",
        "yes": _CHILDREN,
    },
    "area": {
        "city centre": r"(?:city|town) cent(?:re|er)|cent(?:re|er) of (?:the )?(?:city|town)|downtown",
        "riverside": r"river ?(?:side|front|bank)?|water ?front",
    },
    "pricerange": {
        "cheap": r"cheap(?:ly|er)?|inexpensive|low(?:er)? (?:price[ds]?|cost|priced)|affordable|low price range",
        "moderate": r"moderate(?:ly)?|reasonabl[ey]|mid(?:dle)? (?:price[ds]?|range)|medium price[ds]?"
        r"|average price[ds]?|fair(?:ly)? price[ds]?",
        "high": r"high(?:ly|er|end)? (?:end )?(?:price[ds]?|cost|pricing)|(?<!in)expensive|pric(?:es?|ey|y|ing)"
        r"(?: \w+){0,3} high|above average price[ds]?|upscale|costly",
        "less than £20": rf"(?:less|cheaper|lower) than {_POUNDS}20|(?:under|below|sub) {_POUNDS}20|up to {_POUNDS}20",
        "£20-25": rf"{_POUNDS}20 ?(?:to|and|through|) ?{_POUNDS}25",
        "more than £30": rf"(?:more|higher|over|greater) than {_POUNDS}30|(?:over|above) {_POUNDS}30"
        rf"|{_POUNDS}30 (?:or more|and up|plus)",
    },
    "customer rating": {
        "low": _rated("low(?:ly)?") + "|" + _rated("poor(?:ly)?") + "|" + _rated("bad(?:ly)?"),
        "average": _rated("average") + "|" + _rated("moderate(?:ly)?") + "|" + _rated("mediocre"),
        "high": _rated("high(?:ly)?") + "|" + _rated("excellent") + "|" + _rated("great"),
        "1 out of 5": _stars("1", "one"),
        "3 out of 5": _stars("3", "three"),
        "5 out of 5": _stars("5", "five"),
    },
    "food": {"english": "english|british", "fast food": "fast food", "japanese": "japanese|sushi"},
}  # fmt: skip


class SlotVerdict(NamedTuple):
    """What an output gets wrong, as pairs of field and value, and how many slots its source has.

    `wrong` names the source's value of a field for which the output states another one.
    """

    missing: list[tuple[str, str]]
    wrong: list[tuple[str, str]]
    invented: list[tuple[str, str]]
    slots: int


class SlotErrors(Metric):
    """Missing, wrong and invented values per slot of the sources, in percent; lower is better.

    A source is a linearised prompt, "name : Aromi | eatType : pub", or one of triples, whose relations are the fields.
    A value is missing if the output does not state it, wrong if the output states another value of its field instead,
    invented if the output states a value of a field that the source does not have. The values that can be recognised
    as wrong or invented are those of all rows' sources, but for those that are said as one of the source is, whose
    text may name it again. Values said in words that are not in `SAID` count as missing: on new data sets read some
    rows first.

    >>> sources = ["name : Aromi | eatType : pub", "name : Zizzi | area : riverside | eatType : cafe"]
    >>> SlotErrors()(["Aromi is a cafe by the river.", "Zizzi is a cafe."], sources)  # wrong, invented, missing of 5
    60.0
    """

    needs = "sources"
    higher_is_better = False
    maximum = None

    def __init__(self, name: str = "slot_error_rate", kinds: Sequence[str] = ("missing", "wrong", "invented")) -> None:
        self.name, self._kinds = name, tuple(kinds)
        self.description = f"{', '.join(kinds)} values for each 100 slots of the sources"

    def row_statistics(self, hypotheses: Sequence[str], targets: Sequence[str]) -> list[list[float]]:
        sources = [read_source(source) for source in targets]
        known: dict[str, dict[str, None]] = {}
        for source in sources:
            for field, values in source.items():
                known.setdefault(field, {}).update(dict.fromkeys(values))
        domain = {field: tuple(values) for field, values in known.items()}
        rows = []
        for hypothesis, source in zip(hypotheses, sources, strict=True):
            verdict = slot_verdict(hypothesis, source, domain)
            errors = sum(len(getattr(verdict, kind)) for kind in self._kinds)
            rows.append([float(errors), float(verdict.slots)])
        return rows

    def score(self, sums: Numbers) -> float:
        errors, slots = sums.tolist()
        return 100.0 * errors / slots if slots else 0.0


def slot_verdict(text: str, source: Slots, domain: Slots) -> SlotVerdict:
    """What a text gets wrong of its source; `domain` has the values that each field may have.

    >>> verdict = slot_verdict("Aromi is a cheap cafe.", {"name": ["Aromi"], "eatType": ["pub"]},
    ...                        {"eatType": ["pub", "cafe"], "priceRange": ["cheap"]})
    >>> verdict.wrong, verdict.invented, verdict.missing
    ([('eatType', 'pub')], [('priceRange', 'cheap')], [])
    """
    rest = _plain(text)
    stated, wrong, invented = [], [], []
    # Longest first: what states one value ("Burger King") is not read again as part of another ("King").
    for field, value in sorted(_pairs(source), key=lambda pair: -len(pair[1])):
        match = _find(field, value, rest)
        if match is not None:
            stated.append((field, value))
            rest = _without(rest, match)
    unsaid = [pair for pair in _pairs(source) if pair not in stated]
    own = {_pattern(*pair) for pair in _pairs(source)}  # the same words may be a value of several fields
    for field, value in sorted(_pairs(domain), key=lambda pair: -len(pair[1])):
        match = None if _pattern(field, value) in own else _find(field, value, rest)
        if match is None:
            continue
        instead = next((pair for pair in unsaid if pair[0] == field), None)
        if instead is not None:
            wrong.append(instead)
            unsaid.remove(instead)
        else:
            invented.append((field, value))
        rest = _without(rest, match)
    return SlotVerdict(unsaid, wrong, invented, len(list(_pairs(source))))


def _pairs(slots: Slots) -> Iterator[tuple[str, str]]:
    return ((field, value) for field, values in slots.items() for value in values)


def _find(field: str, value: str, text: str) -> re.Match[str] | None:
    """Where the text states the value; a "yes" is not stated by what says "no"."""
    if value.casefold() == "yes" and "no" in SAID.get(field.casefold(), {}):
        text = _pattern(field, "no").sub(lambda match: "\0" * len(match[0]), text)
    return _pattern(field, value).search(text)


def _without(text: str, match: re.Match[str]) -> str:
    """The text with a mark, that is no word, where the match was."""
    return f"{text[: match.start()]}\0{text[match.end() :]}"


@lru_cache(maxsize=10_000)
def _pattern(field: str, value: str) -> re.Pattern[str]:
    """How a text states the value: as whole words."""
    said = SAID.get(field.casefold(), {}).get(value.casefold())
    return re.compile(rf"(?<!\w)(?:{said or re.escape(_plain(value))})(?!\w)")


def _plain(text: str) -> str:
    """Lower case without accents, single spaces; hyphens and apostrophes are spaces."""
    letters = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return " ".join(re.sub(r"['’–—-]", " ", letters.casefold()).split())
