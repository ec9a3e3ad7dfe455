"""k-shot samples: stratified, seeded, apart, and independent of the order of rows and of limits."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.toy import ToyTask

from foreword.errors import ConfigError, DataError
from foreword.tasks import FewShot, Labelled, SkippedRow, Split, Tagged, Task, get_task
from foreword.tasks.bio import bio_labels, entity_types
from foreword.tasks.source import FOLDER_VARIABLE

MIRROR = Path(os.environ.get(FOLDER_VARIABLE, Path(__file__).parent.parent.parent / "shared" / "data"))

OWN_DEV = [Labelled("dev", (("own dev",),), "a", "own dev\n", ("a", "b"), 1)]


class Rows:
    """A task of the given training rows."""

    name = "rows"
    instruction = "Do."
    metrics = ("accuracy",)
    max_new_tokens = 4
    stop = ("\n",)

    def __init__(self, kind: str, labels: tuple[str, ...], rows: list[Any], dev: list[Any] | None = None) -> None:
        self.kind, self.labels, self.rows, self.dev = kind, labels, rows, dev or OWN_DEV

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        rows = {"train": self.rows, "dev": self.dev, "test": self.rows[:3]}[name]
        return Split(name, rows[:limit], [SkippedRow(99, "empty")], source=f"{name}.rows")


def labelled(texts: list[tuple[str, str]], rows: list[int] | None = None) -> list[Labelled]:
    numbers = rows or range(1, len(texts) + 1)
    return [
        Labelled(f"rows-{row}", ((text,),), label, text + "\n", ("a", "b"), row)
        for row, (text, label) in zip(numbers, texts, strict=True)
    ]


def ab(rows: list[Labelled]) -> Rows:
    return Rows("classification", ("a", "b"), rows)


def shuffled(rows: list[Any], seed: int) -> list[Any]:
    return random.Random(seed).sample(rows, len(rows))


TEXTS = [(f"text {i}", "ab"[i % 3 == 0]) for i in range(60)]  # 40 of a, 20 of b


def test_shots_are_a_task() -> None:
    task = FewShot(ab(labelled(TEXTS)), 4, seed=1)
    assert isinstance(task, Task)
    assert (task.name, task.kind, task.labels, task.metrics) == ("rows", "classification", ("a", "b"), ("accuracy",))
    assert (task.instruction, task.max_new_tokens, task.stop) == ("Do.", 4, ("\n",))
    train, dev, test = (task.split(name) for name in ("train", "dev", "test"))
    assert Counter(e.label for e in train) == Counter(e.label for e in dev) == {"a": 4, "b": 4}
    assert train.source == dev.source == "train.rows, 4 per class, seed 1" and test.source == "test.rows"
    assert train.skipped == [SkippedRow(99, "empty")] and not dev.skipped and len(test) == 3
    assert [e.row for e in train] == sorted(e.row for e in train)
    assert task.split("test", limit=1).examples == test.examples[:1]
    with pytest.raises(ConfigError, match="split 'validation'"):
        task.split("validation")


@given(
    st.lists(st.tuples(st.text(max_size=4), st.sampled_from("ab")), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(0, 3),
    st.integers(),
    st.integers(1, 5),
)
def test_laws_of_sampling(texts: list[tuple[str, str]], shots: int, seed: int, order: int, limit: int) -> None:
    rows = labelled(texts)
    different = {e.texts: e.label for e in reversed(rows)}
    available = Counter(different.values())
    task = FewShot(ab(rows), shots, seed)
    if min(available["a"], available["b"]) < shots:
        with pytest.raises(DataError, match="expected at least"):
            task.split("train")
        return
    train, dev = task.split("train").examples, task.split("dev").examples
    assert Counter(e.label for e in train) == {"a": shots, "b": shots}  # stratified
    assert len({e.texts for e in train}) == len(train) and set(train) <= set(rows)
    if dev is not OWN_DEV and dev != OWN_DEV:
        assert not {e.texts for e in train} & {e.texts for e in dev}  # apart
        assert Counter(e.label for e in dev) == {label: min(shots, available[label] - shots) for label in "ab"}
    else:
        assert min(available.values()) == shots
    for name, whole in (("dev", dev), ("train", train), ("dev", dev)):  # whatever was asked before
        assert task.split(name, limit=limit).examples == whole[:limit]
        assert FewShot(ab(rows), shots, seed).split(name).examples == whole
    if len(different) == len(rows):  # whatever the order of rows
        other = FewShot(ab(shuffled(rows, order)), shots, seed)
        assert other.split("train").examples == train and other.split("dev").examples == dev


def test_another_seed_is_another_sample() -> None:
    samples = {FewShot(ab(labelled(TEXTS)), 4, seed).split("train").sha256 for seed in range(5)}
    assert len(samples) == 5


def test_the_sample_does_not_depend_on_pythons_hash() -> None:
    code = (
        "from tests.test_shots import *; print([e.row for e in FewShot(ab(labelled(TEXTS)), 3, seed=7).split('dev')])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and outputs.pop().startswith("[")


def test_dev_has_what_is_left_or_is_the_tasks_own() -> None:
    texts = [(f"text {i}", "a") for i in range(9)] + [(f"other {i}", "b") for i in range(5)]
    assert Counter(e.label for e in FewShot(ab(labelled(texts)), 4).split("dev")) == {"a": 4, "b": 1}
    own = FewShot(ab(labelled(texts)), 5).split("dev")
    assert own.examples == OWN_DEV and own.source == "dev.rows"


def test_classes_with_too_few_rows() -> None:
    rows = labelled([*TEXTS, ("text 0", "b")])  # a text that is there already
    with pytest.raises(DataError) as error:
        FewShot(ab(rows), 21).split("train")
    assert str(error.value) == (
        "class 'b' has 20 rows in train.rows, rows 1, 4, 7, ...; expected at least 21; lower shots or add rows"
    )
    with pytest.raises(DataError, match="class 'b' has 1 rows in train.rows, rows 2; expected at least 2; lower"):
        FewShot(ab(labelled([("x", "a"), ("y", "b"), ("z", "a")])), 2).split("dev")
    with pytest.raises(DataError, match="class 'b' has 0 rows in train.rows; expected at least 1"):
        FewShot(ab(labelled([("x", "a")])), 1).split("train")
    with pytest.raises(ConfigError, match="shots 0; expected at least 1 row of every class"):
        FewShot(ab(rows), 0)
    with pytest.raises(ConfigError, match=r"shots of task 'toy' \(generation\); expected a task with labels"):
        FewShot(ToyTask(), 16)


# ---- tagging


def tagged(sentences: list[list[str]]) -> list[Tagged]:
    return [
        Tagged(f"rows-{row}", tuple(f"w{row}.{i}" for i in range(len(tags))), tuple(tags), row)
        for row, tags in enumerate(sentences, start=1)
    ]


@given(
    st.lists(st.lists(st.sampled_from(["O", "B-X", "B-Y", "B-Z"]), min_size=1, max_size=4), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(),
)
def test_sentences_until_every_type_is_mentioned(sentences: list[list[str]], shots: int, seed: int, order: int) -> None:
    rows = tagged(sentences)
    available = Counter(kind for e in rows for kind in entity_types(e.tags))
    dev = tagged([["O"]])
    task = FewShot(Rows("tagging", bio_labels("XYZ"), rows, dev), shots, seed)
    if min(available[kind] for kind in "XYZ") < shots:
        with pytest.raises(DataError, match=r"class '[XYZ]' has \d+ mentions in train.rows.*; expected at least"):
            task.split("train")
        return
    train, second = task.split("train").examples, task.split("dev").examples
    counts = Counter(kind for e in train for kind in entity_types(e.tags))
    assert all(counts[kind] >= shots for kind in "XYZ") and all(entity_types(e.tags) for e in train)
    for example in train:  # greedy: at most the last sentence of a type goes over
        assert example in rows
    if second != dev:
        assert not set(train) & set(second)
        assert set(entity_types(tag for e in second for tag in e.tags)) == set("XYZ")
    other = FewShot(Rows("tagging", bio_labels("XYZ"), shuffled(rows, order), dev), shots, seed)
    assert other.split("train").examples == train and other.split("dev").examples == second


# ---- the mirror


@pytest.mark.parametrize("name", ["rte", "copa", "wic", "sst2", "trec", "ag_news", "conll04", "wnut17", "mit_movie"])
def test_the_mirror(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip("pyarrow")
    if not (MIRROR / "superglue").is_dir():
        pytest.skip(f"no folder superglue in {FOLDER_VARIABLE}")
    monkeypatch.setenv(FOLDER_VARIABLE, str(MIRROR))
    inner = get_task(name)
    task = FewShot(inner, 16)
    train, dev = task.split("train"), task.split("dev")
    assert not {e.row for e in train} & {e.row for e in dev} and set(train) | set(dev) <= set(inner.split("train"))
    if task.kind != "tagging":
        assert Counter(e.label for e in train) == Counter(e.label for e in dev) == dict.fromkeys(task.labels, 16)
    assert task.split("test").sha256 == inner.split("test").sha256
    assert train.source == f"{inner.split('train').source}, 16 per class, seed 0"


def test_a_class_that_is_too_rare_in_the_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    if not (MIRROR / "superglue").is_dir():
        pytest.skip(f"no folder superglue in {FOLDER_VARIABLE}")
    monkeypatch.setenv(FOLDER_VARIABLE, str(MIRROR))
    with pytest.raises(DataError, match=r"class 'neutral' has 15 rows in superglue/cb.*, rows 34, 68, 77, \.\.\.; exp"):
        FewShot(get_task("cb"), 16).split("train")
    with pytest.raises(DataError, match=r"class 'Soundtrack' has 45 mentions in ner/mit_movie_trivia.*; expected at"):
        FewShot(get_task("mit_movie"), 64).split("train")
