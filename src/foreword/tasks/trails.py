"""Task `trails`: descriptions of hiking trails from their facts, the data set that comes with Foreword (CC0)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from foreword.tasks.source import packaged_rows
from foreword.tasks.task import Example, Split, check_split, collect

__all__ = ["Trails", "linearise"]


def linearise(fields: Mapping[str, str]) -> str:
    """The facts as text, in their order.

    >>> linearise({"name": "Heron Loop", "length": "14 km"})
    'name : Heron Loop | length : 14 km'
    """
    return " | ".join(f"{name} : {value}" for name, value in fields.items())


class Trails:
    """Records of a trail with two references each.

    A training example is one reference. A dev or test example is one record with both; its completion is the first.
    """

    name = "trails"
    kind = "generation"
    labels: tuple[str, ...] = ()
    instruction = "Describe the trail in one or two fluent sentences that state all of the given facts."
    metrics: tuple[str, ...] = ("bleu", "chrf++", "coverage")
    max_new_tokens = 96
    stop: tuple[str, ...] = ("\n",)

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        """The first `limit` examples of `train`, `dev` or `test`; no row is ever skipped."""
        check_split(name, limit)
        source = f"{self.name}/{name}.jsonl"
        examples, skipped = collect(_examples(name), limit, strict, source)
        return Split(name, examples, skipped, source=source)


def _examples(split: str) -> Iterator[Example]:
    for number, row in enumerate(packaged_rows("trails", split), start=1):
        prompt, references = linearise(row["fields"]) + "\n", tuple(row["references"])
        if split == "train":
            for version, reference in enumerate(references, start=1):
                yield Example(f"{row['id']}.{version}", prompt, reference, (reference,), number)
        else:
            yield Example(str(row["id"]), prompt, references[0], references, number)
