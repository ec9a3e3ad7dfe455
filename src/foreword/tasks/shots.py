"""A few rows of every class: k-shot samples of any task with labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from foreword.errors import ConfigError, DataError
from foreword.tasks.bio import entity_types
from foreword.tasks.holdout import in_order
from foreword.tasks.sampled import SampledTask, by_row, input_of
from foreword.tasks.task import Labelled, Split, Tagged, Task

__all__ = ["FewShot"]

Sample = Labelled | Tagged


class FewShot(SampledTask):
    """`shots` training rows of every class of a task, chosen by `seed`; itself a task, with the same name.

    Train is sampled from the task's training rows and dev, of the same size, from those left over, so that no
    hundreds of dev rows choose the settings (Perez et al. 2021, arXiv:2105.11447). Where a class has less left, dev
    has what is left; where it has nothing left, dev is the task's own. Test is the whole test split. Rows with the
    same text count once.

    For tagging, classes are entity types: sentences are taken until every type is mentioned at least `shots` times,
    rare types first (Yang & Katiyar 2020, arXiv:2010.02405). Who is sampled depends on the text and the seed, not on
    the order of rows; `Example.row` says which they are.

    `ConfigError` for a task without labels, `DataError` for a class with too few rows.

    >>> from foreword.tasks import get_task
    >>> FewShot(get_task("rte"), 16).name
    'rte'
    >>> FewShot(get_task("trails"), 16)
    Traceback (most recent call last):
    foreword.errors.ConfigError: shots of task 'trails' (generation); expected a task with labels; leave shots out
    """

    def __init__(self, task: Task, shots: int, seed: int = 0) -> None:
        if shots < 1:
            raise ConfigError(f"shots {shots}", "at least 1 row of every class", "raise shots or leave them out")
        if not task.labels:
            raise ConfigError(f"shots of task {task.name!r} ({task.kind})", "a task with labels", "leave shots out")
        super().__init__(task, seed)
        self.shots = shots
        self._classes = entity_types(task.labels) if task.kind == "tagging" else task.labels

    def _sampled(self, name: str, limit: int | None, strict: bool) -> Split:
        pool = self.task.split("train", strict=strict)
        source = f"{pool.source}, {self.shots} per class, seed {self.seed}"
        rows = self._different(pool.examples)
        self._check(rows, pool.source)
        train = self._sample(rows)
        if name == "train":
            return Split(name, by_row(train)[:limit], pool.skipped, source=source)
        taken = {example.row for example in train}
        left = [example for example in rows if example.row not in taken]
        if not all(self._count(left)[label] for label in self._classes):
            return self.task.split(name, limit, strict)
        return Split(name, by_row(self._sample(left))[:limit], source=source)

    def _different(self, examples: Iterable[Sample]) -> list[Sample]:
        """One example of every text, in the order of sampling."""
        by_text: dict[str, Sample] = {}
        for example in examples:
            by_text.setdefault(input_of(example), example)
        return [by_text[text] for text in in_order(by_text, self.seed)]

    def _sample(self, rows: Sequence[Sample]) -> list[Sample]:
        """The first rows that have every class `shots` times, or as often as there is."""
        available, counts = self._count(rows), Counter[str]()
        chosen: dict[int, Sample] = {}
        for label in sorted(self._classes, key=lambda label: available[label]):
            for example in rows:
                if counts[label] >= self.shots:
                    break
                classes = _classes(example)
                if label in classes and example.row not in chosen:
                    chosen[example.row] = example
                    counts.update(classes)
        return list(chosen.values())

    def _check(self, rows: Sequence[Sample], source: str) -> None:
        counts = self._count(rows)
        for label in self._classes:
            if counts[label] < self.shots:
                numbers = sorted(example.row for example in rows if label in _classes(example))
                listed = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
                unit = "mentions" if self.kind == "tagging" else "rows"
                raise DataError(
                    f"class {label!r} has {counts[label]} {unit} in {source}" + (f", rows {listed}" if listed else ""),
                    f"at least {self.shots}",
                    "lower shots or add rows",
                )

    def _count(self, rows: Iterable[Sample]) -> Counter[str]:
        return Counter(label for example in rows for label in _classes(example))


def _classes(example: Sample) -> tuple[str, ...]:
    """The label of a row, or the type of every entity in a sentence."""
    return entity_types(example.tags) if isinstance(example, Tagged) else (example.label,)
