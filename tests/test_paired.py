"""The difference of two systems: its interval and its p-value."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.errors import ConfigError, DataError
from foreword.metrics import PairedDifference, get_metric, paired_test
from foreword.metrics.bootstrap import paired_difference

labels = st.sampled_from(["a", "b", "c"])
corpora = st.lists(st.tuples(labels, labels, labels), min_size=1, max_size=7)


def split(corpus: list[tuple[str, str, str]]) -> tuple[list[str], list[str], list[list[str]]]:
    return [one for one, _, _ in corpus], [two for _, two, _ in corpus], [[right] for _, _, right in corpus]


@pytest.mark.parametrize("name", ["accuracy", "macro_f1"])
@given(corpus=corpora)
@settings(max_examples=15)
def test_the_p_value_is_the_share_of_all_exchanges(name: str, corpus: list[tuple[str, str, str]]) -> None:
    first, second, targets = split(corpus)
    metric = get_metric(name)
    found = paired_test(metric, first, second, targets, samples=4000)
    assert found.difference == pytest.approx(metric(second, targets) - metric(first, targets))
    gaps = []
    for swap in itertools.product([False, True], repeat=len(corpus)):
        one = [b if moved else a for a, b, moved in zip(first, second, swap, strict=True)]
        two = [a if moved else b for a, b, moved in zip(first, second, swap, strict=True)]
        gaps.append(abs(metric(two, targets) - metric(one, targets)))
    exact = np.mean(np.array(gaps) >= abs(found.difference) - 1e-9)
    assert found.p_value == pytest.approx(exact, abs=0.035)  # four standard errors of 4000 tosses


@given(corpus=corpora)
def test_the_laws_of_differences(corpus: list[tuple[str, str, str]]) -> None:
    first, second, targets = split(corpus)
    metric = get_metric("accuracy")
    found = paired_test(metric, first, second, targets, samples=100)
    back = paired_test(metric, second, first, targets, samples=100)
    assert back.difference == -found.difference and back.p_value == found.p_value
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert found.low <= found.difference <= found.high and 1 / 101 <= found.p_value <= 1
    assert found.better == (found.difference > 0)
    same = paired_test(metric, first, first, targets, samples=100)
    assert same == PairedDifference(0.0, 0.0, 0.0, 1.0, False)


def test_pairing_sees_what_two_intervals_do_not() -> None:
    """Two systems right in half of the rows, one of them in 10 more of 400: far inside of either interval."""
    right = ["yes", "no"] * 200
    first = ["yes"] * 400
    second = [*["no"] * 20, *["yes"] * 380]  # of the first 20 rows 10 change to right, 10 to wrong
    even = paired_test(get_metric("accuracy"), first, second, [[label] for label in right])
    assert even.difference == 0 and even.p_value == 1.0 and even.low < 0 < even.high
    better = ["no" if row < 20 and right[row] == "no" else "yes" for row in range(400)]
    clear = paired_test(get_metric("accuracy"), first, better, [[label] for label in right])
    assert clear.difference == 2.5 and clear.low > 0.9 and clear.better
    assert clear.p_value == pytest.approx(2 / 2**10, abs=0.002)  # all ten on one side


def test_systems_that_do_not_differ_are_seldom_called_different() -> None:
    """Under the null p-values are uniform: about one in ten below 0.1."""
    generator = np.random.default_rng(3)
    below = 0
    for seed in range(200):
        drawn = generator.random((2, 40)) < 0.6
        first, second = ([("yes" if each else "no") for each in side] for side in drawn)
        below += paired_test(get_metric("accuracy"), first, second, [["yes"]] * 40, 200, seed).p_value < 0.1
    assert 6 <= below <= 32  # 20 expected, less for few different outcomes; standard deviation 4.2


def test_lower_is_better_where_the_metric_says_so() -> None:
    pytest.importorskip("sacrebleu")
    for name, better in (("ter", False), ("bleu", True)):
        texts, references = ["a b c d x", "a b c d"] * 5, [["a b c d e"]] * 10
        found = paired_test(get_metric(name), texts, ["a b c d e"] * 10, references, samples=200)
        assert found.better and (found.difference > 0) == better
        assert not paired_test(get_metric(name), ["a b c d e"] * 10, texts, references, samples=200).better


def test_metrics_of_a_corpus_have_the_interval_of_whole_recomputations() -> None:
    pytest.importorskip("sacrebleu")
    bleu = get_metric("bleu")
    first, second = ["a b c d e", "q r s t u", "c c c d e"], ["a b c d x", "q r s t v", "c c d e f"]
    targets = [["a b c d x"], ["q r s t u", "v"], ["c c d e"]]
    draws = np.random.default_rng(5).multinomial(3, np.full(3, 1 / 3), size=100)
    gaps = [
        bleu([second[i] for i in rows], [targets[i] for i in rows])
        - bleu([first[i] for i in rows], [targets[i] for i in rows])
        for rows in (np.repeat(np.arange(3), n) for n in draws)
    ]
    found = paired_test(bleu, first, second, targets, samples=100, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])))


# ---- several repetitions: systems that wrote for the same rows more than once


def test_a_system_that_wrote_several_times_has_the_mean_of_its_scores() -> None:
    """BLEU of pooled counts is another number than the mean of BLEUs, here of the other sign."""
    pytest.importorskip("sacrebleu")
    bleu = get_metric("bleu")
    text = "a b c d e f g h i j"
    targets, short, long = [[text]] * 4, ["a b c d e"] * 4, [f"{text} q r s t u"] * 4
    one, two = ([bleu.statistics(texts, targets) for texts in side] for side in ((short, long), (long, long)))
    found = paired_difference(bleu, one, two, samples=200)
    assert found.difference == pytest.approx(bleu(long, targets) - (bleu(short, targets) + bleu(long, targets)) / 2)
    assert found.difference == pytest.approx(12.9, abs=0.1) and found.better
    assert bleu.score(sum(two).sum(axis=0)) - bleu.score(sum(one).sum(axis=0)) == pytest.approx(-7.3, abs=0.1)
    assert (found.low, found.high) == pytest.approx((found.difference, found.difference))  # all rows are alike


def test_every_resample_and_every_exchange_is_scored_by_repetition() -> None:
    """Against whole recomputations on the same drawn rows, and against all exchanges of rows."""
    pytest.importorskip("sacrebleu")
    bleu = get_metric("bleu")
    targets = [["a b c d x"], ["q r s t u", "v"], ["c c d e"]]
    first = [["a b c d e", "q r s t u", "c c c d e"], ["a b c d x", "q r s t", "c c d"]]
    second = [["a b c d x", "q r s t v", "c c d e f"], ["a b c d", "q r s t u", "x x d e"]]

    def score(texts: list[str], rows: Sequence[int]) -> float:
        return bleu([texts[row] for row in rows], [targets[row] for row in rows])

    def gap(one: list[list[str]], two: list[list[str]], rows: Sequence[int] = range(3)) -> float:
        return float(np.mean([score(texts, rows) for texts in two]) - np.mean([score(texts, rows) for texts in one]))

    draws = np.random.default_rng(5).multinomial(3, np.full(3, 1 / 3), size=100)
    gaps = [gap(first, second, np.repeat(np.arange(3), times).tolist()) for times in draws]
    one, two = ([bleu.statistics(texts, targets) for texts in side] for side in (first, second))
    found = paired_difference(bleu, one, two, samples=100, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(gaps, [2.5, 97.5])))
    exchanged = []
    for swap in itertools.product([False, True], repeat=3):
        a = [
            [y if moved else x for x, y, moved in zip(*texts, swap, strict=True)]
            for texts in zip(first, second, strict=True)
        ]
        b = [
            [x if moved else y for x, y, moved in zip(*texts, swap, strict=True)]
            for texts in zip(first, second, strict=True)
        ]
        exchanged.append(abs(gap(a, b)))
    exact = np.mean(np.array(exchanged) >= abs(found.difference) - 1e-9)
    assert paired_difference(bleu, one, two, samples=4000).p_value == pytest.approx(exact, abs=0.035)


def test_a_repetition_more_of_the_same_changes_nothing() -> None:
    metric = get_metric("macro_f1")
    first, second, targets = ["a", "b", "c", "a"], ["a", "b", "b", "b"], [["a"], ["b"], ["c"], ["b"]]
    one, two = metric.paired_statistics(first, second, targets)
    plain = paired_difference(metric, one, two, samples=100)
    assert plain == paired_test(metric, first, second, targets, samples=100)
    for times, others in ((1, 1), (2, 2), (1, 3), (2, 3)):
        assert paired_difference(metric, [one] * times, [two] * others, samples=100) == pytest.approx(plain)


def test_drawn_repetitions_make_a_difference_less_sure() -> None:
    metric = get_metric("accuracy")
    targets = [["yes"]] * 200
    first = [metric.statistics(["yes"] * 100 + ["no"] * 100, targets)] * 3
    second = [metric.statistics(["yes"] * right + ["no"] * (200 - right), targets) for right in (90, 150, 180)]
    rows_only = paired_difference(metric, first, second, samples=500)
    both = paired_difference(metric, first, second, samples=500, draw_repetitions=True)
    assert both.high - both.low > 1.5 * (rows_only.high - rows_only.low)
    assert (both.difference, both.p_value) == (rows_only.difference, rows_only.p_value)


def test_statistics_of_many_systems_have_the_same_labels() -> None:
    metric = get_metric("macro_f1")
    systems, targets = [["a", "a"], ["b", "a"], ["c", "b"]], [["a"], ["b"]]
    found = metric.joint_statistics(systems, targets)
    assert {each.shape for each in found} == {(2, 9)}
    assert [metric.score(each.sum(axis=0)) for each in found] == [metric(texts, targets) for texts in systems]


def test_what_is_refused() -> None:
    metric = get_metric("accuracy")
    with pytest.raises(DataError, match="2 and 1 outputs; expected two systems on the same rows"):
        paired_test(metric, ["a", "b"], ["a"], [["a"], ["b"]])
    one = metric.statistics(["a", "b"], [["a"], ["b"]])
    with pytest.raises(DataError, match="outputs for 1, 2 rows; expected systems on the same rows"):
        paired_difference(metric, [one, one], [one, one[:1]])
    with pytest.raises(ConfigError, match="samples 0"):
        paired_test(metric, ["a"], ["a"], [["a"]], samples=0)
    with pytest.raises(ConfigError, match="confidence 1.5"):
        paired_test(metric, ["a"], ["a"], [["a"]], confidence=1.5)
