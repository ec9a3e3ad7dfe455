"""Few rows of any task, or a fraction of them: the samples of the low-data studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from foreword.errors import ConfigError, DataError
from foreword.tasks.holdout import in_order
from foreword.tasks.sampled import SampledTask, by_row, content, input_of
from foreword.tasks.shots import FewShot
from foreword.tasks.task import AnyExample, Split, Task

__all__ = ["DataFraction", "LowData", "draw_rows", "drawn"]

_DEV_SHARE = 0.3


class LowData(SampledTask):
    """`rows` training examples of a task and 0.3 times as many for dev, chosen by `seed`.

    As in the low-data setting of Prefix-Tuning (Li & Liang 2021, arXiv:2101.00190, section 6.3), which takes 50, 100,
    200 and 500, five samples of each. Dev is sampled from the training rows that are left, without the prompts of
    train. Test is the whole test split. Rows that say the same count once.

    Which rows are sampled depends on what they say and on the seed, not on their order or a limit. Samples of one seed
    are nested: the 50 rows are among the 100. `ConfigError` below one row, `DataError` for a task with too few.

    >>> from foreword.tasks import get_task
    >>> sample = LowData(get_task("trails"), 50, seed=1)
    >>> len(sample.split("train")), len(sample.split("dev"))
    (50, 15)
    """

    def __init__(self, task: Task, rows: int, seed: int = 0) -> None:
        if rows < 1:
            raise ConfigError(f"rows {rows}", "at least 1 training row", "raise rows or leave them out")
        super().__init__(task, seed)
        self.rows, self.dev_rows = rows, max(1, round(_DEV_SHARE * rows))

    def _sampled(self, name: str, limit: int | None, strict: bool) -> Split:
        pool = self.task.split("train", strict=strict)
        order = _different(pool.examples, self.seed)
        train = order[: self.rows]
        known = {input_of(example) for example in train}
        dev = [example for example in order[self.rows :] if input_of(example) not in known][: self.dev_rows]
        for what, found, wanted in (("rows", train, self.rows), ("rows left for dev", dev, self.dev_rows)):
            if len(found) < wanted:
                raise DataError(
                    f"{len(found)} different {what} in {pool.source}", f"at least {wanted}", "lower rows or add some"
                )
        source = f"{pool.source}, {self.rows} rows, seed {self.seed}"
        if name == "train":
            return Split(name, by_row(train)[:limit], pool.skipped, source=source)
        return Split(name, by_row(dev)[:limit], source=source)


class DataFraction(SampledTask):
    """A fraction of a task's training examples, chosen by `seed`; dev and test are whole.

    As in section 7.5 of Prefix-Tuning (Li & Liang 2021, arXiv:2101.00190), with 10 to 80 % of E2E. Who is in the
    sample is decided as for `LowData`; smaller fractions of one seed are part of larger ones. `ConfigError` for a
    fraction that is not above 0 and at most 1.

    >>> from foreword.tasks import get_task
    >>> trails = get_task("trails")
    >>> len(DataFraction(trails, 0.1).split("train")) / len(trails.split("train"))
    0.1
    """

    def __init__(self, task: Task, fraction: float, seed: int = 0) -> None:
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction {fraction}", "above 0 and at most 1", "correct it or leave it out")
        super().__init__(task, seed)
        self.fraction = fraction

    def _sampled(self, name: str, limit: int | None, strict: bool) -> Split:
        if name == "dev":
            return self.task.split(name, limit, strict)
        pool = self.task.split(name, strict=strict)
        order = _different(pool.examples, self.seed)
        train = by_row(order[: max(1, round(self.fraction * len(order)))])
        source = f"{pool.source}, {100 * self.fraction:g} %, seed {self.seed}"
        return Split(name, train[:limit], pool.skipped, source=source)


def drawn(task: Task, options: Mapping[str, Any]) -> Task:
    """The task with the training rows that the options of a run draw; the task itself where they draw none.

    The options are those of `TrainConfig`, or what a prefix remembers of them: `shots`, `rows` or `fraction`, and the
    seed, `sample_seed` where there is one. Raises what the samplers raise.

    >>> from foreword.tasks import get_task
    >>> drawn(get_task("trails"), {"rows": 50, "seed": 7, "sample_seed": 2}).seed
    2
    """
    chosen = int(options.get("sample_seed", -1))
    seed = int(options.get("seed", 0)) if chosen < 0 else chosen
    if options.get("shots"):
        return FewShot(task, options["shots"], seed)
    if options.get("rows"):
        return LowData(task, options["rows"], seed)
    fraction = options.get("fraction", 1.0)
    return task if fraction == 1.0 else DataFraction(task, fraction, seed)


def draw_rows(split: Split, count: int, seed: int = 0) -> Split:
    """`count` rows of a split in its order (0, or at least as many as there are: all), chosen by what they say.

    The first rows of a file are often alike, such as the shortest or those of one subject; a drawn part is not.

    >>> from foreword.tasks import get_task
    >>> test = get_task("trails").split("test")
    >>> len(draw_rows(test, 5)), draw_rows(test, 0) is test
    (5, True)
    """
    if not 0 < count < len(split):
        return split
    chosen = set(in_order((content(example) for example in split.examples), seed)[:count])
    rows = [example for example in split.examples if content(example) in chosen][:count]
    return replace(split, examples=rows, sha256="", source=f"{split.source}, {count} drawn rows")


def _different(examples: Iterable[AnyExample], seed: int) -> list[AnyExample]:
    """One example of all that say the same, in the order of sampling."""
    by_content: dict[str, AnyExample] = {}
    for example in examples:
        by_content.setdefault(content(example), example)
    return [by_content[key] for key in in_order(by_content, seed)]
