"""Task `e2e`: restaurant descriptions from meaning representations (Novikova et al. 2017, arXiv:1706.09254).

Linearised as in Prefix-Tuning (Li & Liang 2021, arXiv:2101.00190, appendix A.1): "name : Aromi | eatType : pub".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from foreword.tasks.source import HubSource, Row, dataset_rows
from foreword.tasks.task import Example, SkippedRow, Split, check_split, collect

__all__ = ["E2E", "linearise"]

_HUB = HubSource(
    repository="tuetschek/e2e_nlg",
    splits={"train": "train", "dev": "validation", "test": "test"},
    columns={"meaning_representation": "mr", "human_reference": "ref"},
    revision="refs/convert/parquet",
)
_FIELD = re.compile(r"([^\[\],]+)\[([^\]]*)\]")


def linearise(meaning: str) -> str:
    """A meaning representation as text; an empty string when there is no field in it.

    >>> linearise("name[Aromi], eatType[pub], customer rating[5 out of 5]")
    'name : Aromi | eatType : pub | customer rating : 5 out of 5'
    """
    return " | ".join(f"{name.strip()} : {value.strip()}" for name, value in _FIELD.findall(meaning))


class E2E:
    """The E2E data set as published: 42,061 training rows; 547 and 630 meanings with all references.

    A training example is one row. A dev or test example is one meaning, in order of first appearance, with all
    its references; its completion is the first and its row that of the first.
    """

    name = "e2e"
    kind = "generation"
    labels: tuple[str, ...] = ()
    instruction = "Describe the restaurant in one or two fluent sentences that state all of the given facts."
    metrics: tuple[str, ...] = ("bleu", "chrf++")
    max_new_tokens = 80
    stop: tuple[str, ...] = ("\n",)

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        """The first `limit` examples of `train`, `dev` or `test`."""
        check_split(name, limit)
        rows, source = dataset_rows(self.name, name, _HUB)
        examples = _examples(rows, name) if name == "train" else _grouped(_examples(rows, name), name)
        used, skipped = collect(examples, limit, strict, source)
        return Split(name, used, skipped, source=source)


def _examples(rows: Iterable[Row], split: str) -> Iterator[Example | SkippedRow]:
    for number, row in enumerate(rows, start=1):
        meaning, reference = row.get("mr"), row.get("ref")
        prompt = linearise(meaning) if isinstance(meaning, str) else ""
        if not prompt:
            yield SkippedRow(number, "no meaning representation")
        elif not isinstance(reference, str) or not reference.strip():
            yield SkippedRow(number, "no reference")
        else:
            reference = reference.strip()
            yield Example(f"e2e-{split}-{number}", prompt + "\n", reference, (reference,), number)


def _grouped(examples: Iterable[Example | SkippedRow], split: str) -> Iterator[Example | SkippedRow]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        if isinstance(example, SkippedRow):
            yield example
        else:
            groups.setdefault(example.prompt, []).append(example)
    for number, group in enumerate(groups.values(), start=1):
        references = tuple(example.completion for example in group)
        yield group[0]._replace(id=f"e2e-{split}-{number}", references=references)
