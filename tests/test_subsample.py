"""Few rows and fractions of rows: sizes, apart, nested, and independent of the order of rows and of limits."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tiny_base
from tests.toy import ToyTask, toy_config

from foreword.cli.prune import _next
from foreword.compare import method_words
from foreword.config import TrainConfig
from foreword.errors import ConfigError, DataError
from foreword.start import drawn_as
from foreword.tasks import DataFraction, Example, FewShot, Labelled, LowData, SkippedRow, Split, Task, drawn, get_task
from foreword.train import train

OWN_DEV = [Example("dev", "own dev\n", "x", ("x",), 1)]
SKIPPED = [SkippedRow(99, "empty")]


class Rows:
    """A task of the given training rows."""

    name, kind, labels = "rows", "generation", ()
    instruction, metrics, max_new_tokens, stop = "Do.", ("bleu",), 4, ("\n",)

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        rows = {"train": self.rows, "dev": OWN_DEV, "test": self.rows[:3]}[name]
        return Split(name, rows[:limit], SKIPPED, source=f"{name}.rows")


def examples(texts: list[tuple[str, str]]) -> list[Example]:
    return [Example(f"rows-{i}", f"{x}\n", y, (y,), i) for i, (x, y) in enumerate(texts, start=1)]


def said(split: Split) -> set[tuple[str, str]]:
    return {(example.prompt, example.completion) for example in split}


MANY = Rows(examples([(f"prompt {i // 3}", f"text {i}") for i in range(3000)]))
TEXTS = st.lists(st.tuples(st.text(max_size=1), st.text(max_size=2)), min_size=1, max_size=40)


def test_few_rows_are_a_task() -> None:
    task = LowData(MANY, 50, seed=1)
    assert isinstance(task, Task)
    assert (task.name, task.kind, task.labels, task.metrics) == ("rows", "generation", (), ("bleu",))
    assert (task.instruction, task.max_new_tokens, task.stop) == ("Do.", 4, ("\n",))
    train, dev, test = (task.split(name) for name in ("train", "dev", "test"))
    assert train.source == dev.source == "train.rows, 50 rows, seed 1" and test.source == "test.rows"
    assert train.skipped == SKIPPED and not dev.skipped and len(test) == 3
    assert [e.row for e in train] == sorted(e.row for e in train)
    assert task.split("test", limit=1).examples == test.examples[:1]
    for other in (task, DataFraction(MANY, 0.1)):
        with pytest.raises(ConfigError, match="split 'validation'"):
            other.split("validation")


def test_samples_stay_what_they_are() -> None:
    """Runs of one version can be compared with those of another."""
    samples = [[e.id for e in LowData(get_task("trails"), 5, seed=1).split(part)] for part in ("train", "dev")]
    assert samples == [["train-012.1", "train-049.2", "train-052.2", "train-069.1", "train-083.1"],
                       ["train-037.1", "train-097.1"]]  # fmt: skip


@pytest.mark.parametrize("rows", [50, 100, 200, 500])
def test_the_sizes_of_the_protocol(rows: int) -> None:
    """Dev is 30 % of train, and shares no prompt with it, whatever the seed."""
    for seed in range(5):
        train, dev = (LowData(MANY, rows, seed).split(name) for name in ("train", "dev"))
        assert (len(said(train)), len(said(dev))) == (rows, rows * 3 // 10) == (len(train), len(dev))
        assert not {e.prompt for e in train} & {e.prompt for e in dev}


def test_another_seed_is_another_sample() -> None:
    assert len({LowData(MANY, 50, seed).split("train").sha256 for seed in range(5)}) == 5
    assert len({DataFraction(MANY, 0.1, seed).split("train").sha256 for seed in range(5)}) == 5


@given(TEXTS, st.integers(1, 12), st.integers(0, 3), st.integers(), st.integers(1, 5))
def test_laws_of_few_rows(texts: list[tuple[str, str]], rows: int, seed: int, order: int, limit: int) -> None:
    pool = examples(texts)
    task, different = LowData(Rows(pool), rows, seed), len(set(texts))
    try:
        train, dev = task.split("train"), task.split("dev")
    except DataError:
        assert different < rows + task.dev_rows or len({x for x, _ in texts}) < different
        return
    assert len(train) == len(said(train)) == rows and len(dev) == len(said(dev)) == task.dev_rows
    assert set(train) <= set(pool) and set(dev) <= set(pool)
    assert not {e.prompt for e in train} & {e.prompt for e in dev}
    assert task.split("train", limit=limit).examples == train.examples[:limit]
    assert task.split("dev", limit=limit).examples == dev.examples[:limit]
    other = LowData(Rows(random.Random(order).sample(pool, len(pool))), rows, seed)
    assert said(other.split("train")) == said(train) and said(other.split("dev")) == said(dev)
    if rows > 1:
        assert said(LowData(Rows(pool), 1, seed).split("train")) <= said(train)


@given(TEXTS, st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 3), st.integers())
def test_laws_of_fractions(texts: list[tuple[str, str]], one: float, two: float, seed: int, order: int) -> None:
    pool, (low, high) = examples(texts), sorted((one, two))
    small, large = (DataFraction(Rows(pool), fraction, seed).split("train") for fraction in (low, high))
    assert len(small) == len(said(small)) == max(1, round(low * len(set(texts))))
    assert said(small) <= said(large) and set(small) <= set(pool)
    assert said(DataFraction(Rows(pool), 1.0, seed).split("train")) == {(f"{x}\n", y) for x, y in texts}
    other = Rows(random.Random(order).sample(pool, len(pool)))
    assert said(DataFraction(other, low, seed).split("train")) == said(small)


def test_a_fraction_keeps_the_dev_rows() -> None:
    task = DataFraction(MANY, 0.1, seed=3)
    assert task.split("dev").examples == OWN_DEV and task.split("dev").source == "dev.rows"
    train = task.split("train")
    assert (len(train), train.source, train.skipped) == (300, "train.rows, 10 %, seed 3", SKIPPED)
    assert task.split("train", limit=5).examples == train.examples[:5]


def test_labelled_rows() -> None:
    """Labels do not tell rows apart: a text is sampled once, and never for both sides."""
    rows = [Labelled(f"rows-{i}", ((f"text {i % 40}",),), "ab"[i % 3 == 0], "", ("a", "b"), i) for i in range(80)]
    train, dev = (LowData(Rows(rows), 20).split(name) for name in ("train", "dev"))
    texts = Counter(example.texts for example in [*train, *dev])
    assert (len(train), len(dev)) == (20, 6) and set(texts.values()) == {1}


def test_too_few_rows() -> None:
    few = Rows(examples([("a", "x"), ("a", "x"), ("a", "y"), ("b", "x")]))
    with pytest.raises(DataError, match=r"3 different rows in train\.rows; expected at least 4; lower rows or add"):
        LowData(few, 4).split("train")
    with pytest.raises(DataError, match=r"0 different rows left for dev in train\.rows; expected at least 1; lower"):
        LowData(few, 3).split("dev")
    with pytest.raises(ConfigError, match="rows 0; expected at least 1"):
        LowData(few, 0)
    for fraction in (0.0, 1.5, -0.1):
        with pytest.raises(ConfigError, match=rf"fraction {fraction}; expected above 0 and at most 1"):
            DataFraction(few, fraction)


def test_what_the_options_of_a_run_draw() -> None:
    assert drawn(MANY, TrainConfig(seed=3).to_dict()) is MANY and drawn(MANY, {}) is MANY
    few = drawn(MANY, TrainConfig(rows=50, seed=3).to_dict())
    assert isinstance(few, LowData) and (few.rows, few.seed) == (50, 3)
    fixed = drawn(MANY, TrainConfig(rows=50, seed=3, sample_seed=0).decisive())
    assert isinstance(fixed, LowData) and fixed.seed == 0
    part = drawn(MANY, TrainConfig(fraction=0.2, sample_seed=4).decisive())
    assert isinstance(part, DataFraction) and (part.fraction, part.seed) == (0.2, 4)
    shots = drawn(get_task("rte"), {"shots": 16, "seed": 2})
    assert isinstance(shots, FewShot) and (shots.shots, shots.seed) == (16, 2)
    assert TrainConfig().decisive().keys() & {"rows", "fraction", "sample_seed"} == set()
    assert [TrainConfig(**{name: 2}).draws_few for name in ("shots", "rows", "sample_seed")] == [True, True, False]
    with pytest.raises(ConfigError, match="shots and rows; expected one way of drawing rows; leave the others out"):
        TrainConfig(shots=2, rows=50)
    with pytest.raises(ConfigError, match="rows and fraction; expected one way"):
        TrainConfig(rows=50, fraction=0.5)


# ---- runs


def test_the_sample_of_a_run_may_have_a_seed_of_its_own(tmp_path: Path) -> None:
    """Five samples and two seeds: rows by the one, births and orders by the other; all dev rows count."""
    base, chosen, kept = tiny_base("llama"), {}, {}
    for sample, seed in ((0, 0), (0, 1), (1, 0)):
        config = toy_config(rows=10, sample_seed=sample, seed=seed, dev_limit=1, max_steps=1)
        out = tmp_path / f"{sample}-{seed}"
        kept[sample, seed] = train(base, None, ToyTask(), config, out=out).prefix
        data = json.loads((out / "config.json").read_text())["data"]
        assert (data["train"]["rows"], data["dev"]["rows"]) == (10, 3)
        assert data["train"]["source"] == f"train.toy, 10 rows, seed {sample}"
        chosen[sample, seed] = [{row["row"] for row in data[part]["chosen"]} for part in ("train", "dev")]
        assert chosen[sample, seed][0].isdisjoint(chosen[sample, seed][1])
    assert chosen[0, 0] == chosen[0, 1] != chosen[1, 0]
    prefix = kept[0, 1]
    again = drawn_as(prefix, ToyTask())
    assert {example.row for example in again.split("train")} == chosen[0, 1][0]
    assert method_words(prefix, prefix.metadata["training"]) == "4 slots, 10 rows"
    command = _next(prefix, 2, "trails", "smollm2-135m", Path("half"))
    assert " --rows 10 --sample-seed 0 --seed 1 --seeds 2 --out half-retrained" in command


def test_a_run_with_a_fraction_of_the_rows(tmp_path: Path) -> None:
    """Dev is the task's own, with its limit."""
    config = toy_config(fraction=0.5, dev_limit=4, max_steps=1)
    prefix = train(tiny_base("llama"), None, ToyTask(), config, out=tmp_path / "run").prefix
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (data["train"]["rows"], data["dev"]["rows"]) == (10, 4) and "chosen" not in data["train"]
    assert method_words(prefix, prefix.metadata["training"]) == "4 slots, 50 % of the rows"
    assert _next(prefix, 1, "trails", "tiny", Path("half")).endswith("continue --fraction 0.5 --out half-retrained")
