"""Metrics of labels and tags: beside scikit-learn, seqeval and published scores, and by hand."""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import DataError, MissingPackage
from foreword.metrics import accuracy, bootstrap_interval, entity_f1, get_metric, list_metrics, macro_f1

DATA = Path(os.environ.get("FOREWORD_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))

LABELS = st.sampled_from(["entailment", "contradiction", "neutral", "a label", ""])
PAIRS = st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=40)
TAGS = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])
SENTENCES = st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=10), min_size=1, max_size=10)


def test_the_metrics_are_listed() -> None:
    assert {"accuracy", "macro_f1", "entity_f1"} <= {metric.name for metric in list_metrics()}
    assert get_metric("entity_f1") is entity_f1 and get_metric("macro_f1") is macro_f1


def test_accuracy_by_hand() -> None:
    assert accuracy(["yes", "no", "Yes"], [["yes"], ["yes"], ["yes"]]) == pytest.approx(100 / 3)
    assert accuracy(["2"], [["1", "2"]]) == 100.0
    low, high = bootstrap_interval(accuracy, ["yes"] * 50 + ["no"] * 50, [["yes"]] * 100)
    assert 38 < low < 50 < high < 62


def test_macro_f1_by_hand() -> None:
    # entailment 1 of 1 predicted, 2 true: 2/3; contradiction 1 of 2 predicted, 1 true: 2/3; neutral never right: 0
    got = ["entailment", "contradiction", "contradiction", "entailment"]
    assert macro_f1(got[:3], [["entailment"], ["entailment"], ["contradiction"]]) == pytest.approx(100 * 2 / 3)
    right = [["entailment"], ["entailment"], ["contradiction"], ["neutral"]]
    assert macro_f1(got, right) == pytest.approx(100 * (1 / 2 + 2 / 3 + 0) / 3)


@given(PAIRS)
def test_macro_f1_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    got, right = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    expected = metrics.f1_score(right, got, average="macro", zero_division=0.0)
    assert macro_f1(got, [[label] for label in right]) == pytest.approx(100 * expected)
    assert accuracy(got, [[label] for label in right]) == pytest.approx(100 * metrics.accuracy_score(right, got))


@given(PAIRS)
def test_resampled_macro_f1_is_that_of_the_resampled_rows(pairs: list[tuple[str, str]]) -> None:
    got, right = [pair[0] for pair in pairs], [[pair[1]] for pair in pairs]
    statistics = macro_f1.statistics(got, right)
    drawn = random.Random(0).choices(range(len(pairs)), k=len(pairs))
    expected = macro_f1([got[row] for row in drawn], [right[row] for row in drawn])
    assert macro_f1.score(statistics[drawn].sum(axis=0)) == pytest.approx(expected)


def test_entity_f1_by_hand() -> None:
    pytest.importorskip("seqeval")
    right = [["B-PER I-PER O B-LOC"]]
    assert entity_f1(["B-PER I-PER O B-LOC"], right) == 100.0
    assert entity_f1(["B-PER O O B-LOC"], right) == 50.0  # a wrong end
    assert entity_f1(["B-PER I-PER O O"], right) == pytest.approx(200 / 3)
    assert entity_f1(["O I-PER O I-LOC"], right) == 50.0  # an I- without a B- begins an entity
    assert entity_f1(["O O O O"], right) == entity_f1(["O"], [["O"]]) == 0.0


@given(SENTENCES)
def test_entity_f1_is_seqevals(sentences: list[list[tuple[str, str]]]) -> None:
    f1_score = pytest.importorskip("seqeval.metrics").f1_score
    got = [[pair[0] for pair in sentence] for sentence in sentences]
    right = [[pair[1] for pair in sentence] for sentence in sentences]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about corpora without an entity
        expected = f1_score(right, got)
    assert entity_f1([" ".join(tags) for tags in got], [[" ".join(tags)] for tags in right]) == pytest.approx(
        100 * expected
    )


@pytest.mark.parametrize("system", ["uh_ritual", "drexel_cci", "arcada"])
def test_entity_f1_of_wnut17_is_the_published_one(system: str) -> None:
    pytest.importorskip("seqeval")
    folder = DATA / "metric_refs" / "wnut17"
    if not folder.is_dir():
        pytest.skip("no folder metric_refs in FOREWORD_DATA")
    rows = pytest.importorskip("pyarrow.parquet").read_table(folder / "wnut17_submissions.parquet").to_pylist()
    outputs, gold = [" ".join(row[system]) for row in rows], [[" ".join(row["gold"])] for row in rows]
    published = json.loads((folder / "wnut17_scores.json").read_text())[system]["published_F1"]
    assert round(entity_f1(outputs, gold), 2) == pytest.approx(published, abs=1e-4)
    low, high = bootstrap_interval("entity_f1", outputs, gold, samples=200)
    assert published - 6 < low < published < high < published + 6


@pytest.mark.parametrize("metric", [macro_f1, entity_f1], ids=lambda metric: metric.name)
def test_one_label_for_each_row(metric: Any) -> None:
    if metric is entity_f1:
        pytest.importorskip("seqeval")
    with pytest.raises(DataError, match="2 references of row 1; expected exactly one label"):
        metric(["O", "O"], [["O"], ["O", "O"]])


def test_tags_that_do_not_align() -> None:
    pytest.importorskip("seqeval")
    with pytest.raises(DataError, match="3 tags against 2 in row 1; expected as many of each"):
        entity_f1(["O", "O O O"], [["O"], ["O O"]])


def test_without_seqeval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "seqeval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "seqeval", None)
    with pytest.raises(MissingPackage, match=r"'seqeval' is not installed; run pip install 'foreword\[eval\]'"):
        entity_f1(["O"], [["O"]])
