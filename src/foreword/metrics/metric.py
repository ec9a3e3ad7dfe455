"""What a metric is: numbers for each row that add up to a corpus, and a score made of their sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreword.errors import DataError

__all__ = ["Mean", "Metric", "Numbers", "Targets"]

Numbers = NDArray[np.float64]

# What hypotheses are held against: the references of every row, or the source of every row.
Targets = Sequence[Sequence[str]]


class Metric(ABC):
    """A score of hypotheses against targets, callable as `metric(hypotheses, targets)`.

    A corpus score is a function of sums over rows, so that resampled corpora cost no second look at the text.
    `needs` is `references` (a sequence for every row) or `sources` (the prompt of every row, one string). `suits` says
    what hypotheses may be: `text` that was written, a `label`, a `tag` for each word.
    A score is in percent unless `maximum` says otherwise: None where no number bounds it. `digits` is how many
    digits after the point tell scores apart.
    """

    name: str
    description: str
    needs: str = "references"
    suits: tuple[str, ...] = ("text",)
    higher_is_better: bool = True
    maximum: float | None = 100.0
    digits: int = 1

    def __call__(self, hypotheses: Sequence[str], targets: Targets) -> float:
        """The score of the whole corpus; `DataError` when rows do not match or there are none."""
        return self.score(self.statistics(hypotheses, targets).sum(axis=0))

    def ready(self) -> None:
        """Raise at once what scoring would raise after hours of writing: `MissingPackage`, `ModelNotFound`."""
        self(["O"], ["O : O"] if self.needs == "sources" else [["O"]])

    def statistics(self, hypotheses: Sequence[str], targets: Targets) -> Numbers:
        """The numbers of every row, `[rows, numbers]`."""
        _check(hypotheses, targets, self.needs)
        return np.asarray(self.row_statistics(hypotheses, targets), dtype=np.float64)

    def joint_statistics(self, systems: Sequence[Sequence[str]], targets: Targets) -> list[Numbers]:
        """The numbers of several systems' rows, such that a row of one may stand in for that of another."""
        return [self.statistics(hypotheses, targets) for hypotheses in systems]

    def paired_statistics(
        self, first: Sequence[str], second: Sequence[str], targets: Targets
    ) -> tuple[Numbers, Numbers]:
        """`joint_statistics` of two systems."""
        one, two = self.joint_statistics([first, second], targets)
        return one, two

    @abstractmethod
    def row_statistics(self, hypotheses: Sequence[str], targets: Any) -> list[list[float]]:
        """The numbers of every row, as lists; the arguments have been checked."""

    @abstractmethod
    def score(self, sums: Numbers) -> float:
        """The score of a corpus whose rows' numbers add up to `sums`."""


class Mean(Metric):
    """The mean of one number per row, or of one number per item where rows have several, in percent."""

    def score(self, sums: Numbers) -> float:
        total, count = sums.tolist()
        return 100.0 * float(total) / float(count) if count else 100.0


def _check(hypotheses: Sequence[str], targets: Targets, needs: str) -> None:
    if isinstance(hypotheses, str) or isinstance(targets, str):
        raise DataError("one string", "a list with one entry for each row", "put it into a list")
    if len(hypotheses) != len(targets):
        raise DataError(f"{len(hypotheses)} hypotheses and {len(targets)} rows of {needs}", "as many of each")
    if not hypotheses:
        raise DataError("no hypotheses", "at least one row")
    for row, target in enumerate(targets):
        if needs == "references" and (isinstance(target, str) or not target):
            raise DataError(f"{target!r} as references of row {row}", "a list of at least one reference")
        if needs == "sources" and not isinstance(target, str):
            raise DataError(f"{target!r} as source of row {row}", "a string")
