"""Metrics against published scores, against values computed by hand, and their laws."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.labels import LabelToy
from tests.tiny import tiny_base
from tests.toy import ToyTask

from foreword.cli.evaluate import print_scores
from foreword.compare import Difference
from foreword.errors import ConfigError, DataError, MissingPackage
from foreword.evaluate import Evaluation, Interval, evaluate
from foreword.metrics import (
    METRIC_SETS,
    Bleu,
    bleu,
    bootstrap_interval,
    check_metrics,
    chrf,
    coverage,
    exact_match,
    get_metric,
    list_metrics,
    number_format,
    rouge_l,
)

DATA = Path(os.environ.get("FOREWORD_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
REFERENCES = DATA / "metric_refs"

published = pytest.mark.skipif(not REFERENCES.is_dir(), reason="no folder metric_refs in FOREWORD_DATA")
needs_sacrebleu = pytest.mark.usefixtures("sacrebleu")


@pytest.fixture
def sacrebleu() -> None:
    pytest.importorskip("sacrebleu")


def table(path: str) -> list[dict[str, Any]]:
    return pytest.importorskip("pyarrow.parquet").read_table(DATA / path).to_pylist()


def scores(path: str) -> dict[str, Any]:
    return json.loads((REFERENCES / path).read_text())


# ---- published scores


@published
@needs_sacrebleu
def test_bleu_is_the_official_e2e_script() -> None:
    references = [row["refs"] for row in table("e2e/test_grouped.parquet")]
    rows = table("metric_refs/e2e/e2e_outputs.parquet")
    for system in ("tgen", "zhang", "tr2", "zhaw2"):
        score = scores("e2e/e2e_scores.json")[system]
        outputs = [row["output"] for row in rows if row["system"] == system]
        assert bleu(outputs, references) / 100 == pytest.approx(score["official_script"]["BLEU"], abs=5.1e-5), system


@published
@needs_sacrebleu
def test_bleu_and_chrf_of_webnlg() -> None:
    def tokenised(text: str) -> str:
        return " ".join(" ".join(re.split(r"(\W)", text)).lower().split())

    references = [[tokenised(text) for text in item["lexs"][:3]] for item in table("webnlg2017/test.parquet")]
    rows = table("metric_refs/webnlg2017/webnlg_outputs.parquet")
    plain = Bleu(lowercase=False, tokenize="none", smoothing="none")
    for system in ("bart-base", "t5-large"):
        score = scores("webnlg2017/webnlg_scores.json")[system]
        outputs = [row["output"] for row in rows if row["system"] == system]
        assert plain(outputs, references) == pytest.approx(score["published_BLEU"]["all"], abs=5.1e-3), system
        rows_of_system = chrf.statistics(outputs, references)
        own = score["other_all"]["chrFpp_corpus_sacrebleu"]
        assert chrf.score(rows_of_system.sum(axis=0)) == pytest.approx(own, abs=5e-3)
        # Popović's program, whose scores of sentences are averaged
        sentences = score["other_all"]["chrFpp_sentence_mean_popovic"]
        assert np.mean([chrf.score(row) for row in rows_of_system]) == pytest.approx(sentences, abs=0.015)


@published
@needs_sacrebleu
def test_bleu_of_dart() -> None:
    rows = table("metric_refs/dart/dart_bart_large.parquet")
    outputs, references = [row["output"] for row in rows], [[row[f"ref{i}"] for i in range(3)] for row in rows]
    score = scores("dart/dart_scores.json")["bart_large"]
    plain = Bleu(lowercase=False, tokenize="none")
    assert plain(outputs, references) == pytest.approx(score["published"]["BLEU"], abs=5.1e-3)
    dropped = [[text for text in texts if text] for texts in references]
    assert plain(outputs, dropped) == pytest.approx(score["recomputed"]["BLEU_sacrebleu_drop_empty_refs"], abs=5.1e-3)


@published
def test_rouge_of_xsum() -> None:
    pytest.importorskip("rouge_score")
    rows = table("metric_refs/xsum/xsum_outputs.parquet")[:400]
    gold = [[row["gold"]] for row in rows]
    expected = scores("xsum/xsum_scores.json")["topic-convs2s"]["rouge_score_use_stemmer_True_f"]
    # 31.58, 11.49 and 25.58 for all 11,334 rows; the first 400 with their sampling error
    for kind in ("1", "2", "L"):
        name, outputs = f"rouge_{kind.lower()}", [row["topic_convs2s"] for row in rows]
        low, high = bootstrap_interval(name, outputs, gold, confidence=0.999)
        assert low < expected[f"R{kind}"] < high, name


@published
@pytest.mark.slow
def test_rouge_of_all_of_xsum() -> None:
    pytest.importorskip("rouge_score")
    rows = table("metric_refs/xsum/xsum_outputs.parquet")
    expected = scores("xsum/xsum_scores.json")["topic-convs2s"]["rouge_score_use_stemmer_True_f"]
    outputs, gold = [row["topic_convs2s"] for row in rows], [[row["gold"]] for row in rows]
    for kind in ("1", "2", "L"):
        assert get_metric(f"rouge_{kind.lower()}")(outputs, gold) == pytest.approx(expected[f"R{kind}"], abs=5.1e-3)


# ---- by hand


@needs_sacrebleu
def test_bleu_by_hand() -> None:
    # one of the unigrams and no higher one beyond "the cat" is in the reference: 4/6, 2/5, smoothed 1/(2*4), 1/(4*3)
    expected = 100 * (4 / 6 * 2 / 5 * 1 / 8 * 1 / 12) ** 0.25
    assert bleu(["the cat the dog a b"], [["the cat sees the dog c"]]) == pytest.approx(expected)
    # five tokens against eight: brevity penalty exp(1 - 8/5)
    assert bleu(["a b c d e"], [["a b c d e f g h"]]) == pytest.approx(100 * math.exp(1 - 8 / 5))
    # the closest reference length counts, and matches are taken from all references
    assert bleu(["a b c d e"], [["a b c x y", "a b c d e f g h", "c d e x y"]]) == pytest.approx(100.0)
    assert bleu(["A B C, D!"], [["a b c , d !"]]) == pytest.approx(100.0)
    assert bleu([""], [["a b c d"]]) == 0.0


@needs_sacrebleu
def test_rows_may_have_different_numbers_of_references() -> None:
    hypotheses = ["a b c d", "e f g h"]
    one, two = bleu(hypotheses, [["a b c d"], ["x", "e f g h", "y z"]]), bleu(hypotheses, [["a b c d"], ["e f g h"]])
    assert one == two == pytest.approx(100.0)


@needs_sacrebleu
def test_the_corpus_score_is_that_of_sacrebleu() -> None:
    package = pytest.importorskip("sacrebleu")
    hypotheses = ["A pub by the river.", "Zizzi is cheap and near here."]
    references = [["A pub near the river.", "By the river: a pub."], ["Zizzi is a cheap place near here."]]
    streams = [["A pub near the river.", "Zizzi is a cheap place near here."], ["By the river: a pub.", None]]
    assert bleu(hypotheses, references) == package.corpus_bleu(hypotheses, streams, lowercase=True).score
    assert chrf(hypotheses, references) == package.corpus_chrf(hypotheses, streams, word_order=2).score


def test_rouge_by_hand() -> None:
    pytest.importorskip("rouge_score")
    # the longest common subsequence of 5 and 4 words is 3: precision 3/5, recall 3/4
    assert rouge_l(["a b c x y"], [["a b z c"]]) == pytest.approx(100 * 2 * 0.6 * 0.75 / 1.35)
    assert rouge_l(["a b c x y", "walking"], [["q", "a b z c"], ["walks", "sit"]]) == pytest.approx((200 / 3 + 100) / 2)


def test_coverage_by_hand() -> None:
    source = "name : Heron Loop | length : 14 km | dogs : yes\n"
    assert coverage(["The heron\nloop is 14 km long."], [source]) == pytest.approx(200 / 3)
    assert coverage(["Heron Loops, 114 km"], [source]) == 0.0  # whole words only
    assert coverage(["", "x"], [source, "a : x"]) == 25.0  # of all four values
    assert coverage(["anything"], ["no fields"]) == 100.0


def test_exact_match_by_hand() -> None:
    assert exact_match(["Yes", " no  way", "x"], [["yes"], ["x", "No way"], ["y"]]) == pytest.approx(200 / 3)


# ---- laws

words = st.sampled_from(
    ["aromi", "is", "a", "cheap", "pub", "by", "the", "river", ",", ".", "near", "in", "and", "friendly"]
)
sentences = st.lists(words, min_size=4, max_size=12).map(" ".join)
references = st.lists(sentences, min_size=1, max_size=3)
corpora = st.lists(st.tuples(sentences, references), min_size=1, max_size=8)


@needs_sacrebleu
@pytest.mark.parametrize("metric", ["bleu", "chrf++", "rouge_l", "exact_match"])
@given(corpus=corpora)
@settings(max_examples=30, deadline=None)
def test_laws_of_the_metrics(metric: str, corpus: list[tuple[str, list[str]]]) -> None:
    if metric == "rouge_l":
        pytest.importorskip("rouge_score")
    score = get_metric(metric)
    hypotheses, targets = [hypothesis for hypothesis, _ in corpus], [texts for _, texts in corpus]
    value = score(hypotheses, targets)
    assert 0.0 <= value <= 100.0 + 1e-9
    assert score(hypotheses[::-1], targets[::-1]) == pytest.approx(value)  # order of rows
    if metric != "chrf++":  # of references that score the same, chrF++ counts the lengths of the first
        assert score(hypotheses, [texts[::-1] for texts in targets]) == pytest.approx(value)  # order of references
    itself = [[*texts, hypothesis] for hypothesis, texts in corpus]
    assert score(hypotheses, itself) == pytest.approx(100.0)
    low, high = bootstrap_interval(metric, hypotheses, targets, samples=50)
    assert low <= value <= high
    assert (low, high) == bootstrap_interval(metric, hypotheses, targets, samples=50)


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    """Half of 400 rows match: the standard error is 2.5 points."""
    outputs = ["yes", "no"] * 200
    low, high = bootstrap_interval("exact_match", outputs, [["yes"]] * 400, samples=4000, seed=1)
    assert low == pytest.approx(50 - 1.96 * 2.5, abs=0.6) and high == pytest.approx(50 + 1.96 * 2.5, abs=0.6)
    narrow = bootstrap_interval("exact_match", outputs, [["yes"]] * 400, seed=1, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval("exact_match", outputs, [["yes"]] * 400, samples=4000, seed=2) != (low, high)


@needs_sacrebleu
def test_the_interval_is_that_of_whole_recomputations() -> None:
    """Sums of row statistics give the same scores as scoring the drawn rows again."""
    import numpy as np

    texts = ["a b c d e", "a b x d e", "q r s t u v", "a q b r", "c c c c d"]
    targets = [["a b c d e"], ["a b c d e", "x d e"], ["q r s t"], ["a q r b"], ["c c d"]]
    generator = np.random.default_rng(7)
    draws = generator.multinomial(5, np.full(5, 0.2), size=200)
    again = [
        bleu([texts[i] for i in rows], [targets[i] for i in rows])
        for rows in (np.repeat(np.arange(5), n) for n in draws)
    ]
    low, high = np.percentile(again, [2.5, 97.5])
    value = bleu(texts, targets)
    assert bootstrap_interval("bleu", texts, targets, samples=200, seed=7) == pytest.approx(
        (min(low, value), max(high, value))
    )


# ---- the table and the errors


def test_the_metrics_there_are() -> None:
    assert {metric.needs for metric in list_metrics()} == {"references", "sources"}
    assert all(metric.description for metric in list_metrics())
    lower = {"ter", "ter_webnlg", "slot_error_rate", "missing_slots", "wrong_slots", "invented_slots"}
    assert {metric.name for metric in list_metrics() if not metric.higher_is_better} == lower
    assert {metric.name: metric.maximum for metric in list_metrics() if metric.maximum != 100} == {
        "nist": None, "cider": 10.0, **dict.fromkeys(lower),
    }  # fmt: skip
    assert get_metric("chrf++") is chrf
    with pytest.raises(ConfigError, match="metric 'blue'; expected one of bleu, nist, meteor"):
        get_metric("blue")


def test_the_page_has_every_metric() -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page[page.index("| name | what |") : page.index("## Agreement")]
    found = dict(re.findall(r"^\| `([^`]+)` \|.*\| ([^|]*) ?\|$", table, re.MULTILINE))
    assert [name for name in found if ":" not in name] == [metric.name for metric in list_metrics()]
    for metric in list_metrics():
        assert ("lower is better" in found[metric.name]) != metric.higher_is_better, metric.name
        assert bool(found[metric.name].strip()) == (metric.maximum != 100), metric.name
    sets = dict(re.findall(r"^\| `([^`]+)` \| (`.*) \|$", page[: page.index("| name | what |")], re.MULTILINE))
    assert {name: tuple(re.findall(r"`([^`]+)`", line)) for name, line in sets.items()} == METRIC_SETS


def test_a_metric_that_cannot_score_says_so_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("sacrebleu", "rouge_score", "seqeval", "pycocoevalcap"):
        pytest.importorskip(package)
    for metric in list_metrics():
        if not metric.name.startswith("meteor"):  # its own test looks for Java
            metric.ready()
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    for module in [module for module in sys.modules if module.startswith("pycocoevalcap.")]:
        monkeypatch.delitem(sys.modules, module)
    for name in ("meteor", "cider", "rouge_l_coco"):
        with pytest.raises(MissingPackage, match="'pycocoevalcap' is not installed"):
            get_metric(name).ready()


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("generation", "macro_f1", "texts"),
        ("generation", "entity_f1", "texts"),
        ("generation", "accuracy", "texts"),
        ("classification", "entity_f1", "labels"),
        ("classification", "bleu", "labels"),
        ("choice", "coverage", "labels"),
        ("tagging", "accuracy", "tags"),
    ],
)
def test_metrics_that_do_not_suit_a_task_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, expected: str
) -> None:
    task = ToyTask() if kind == "generation" else LabelToy(kind)
    message = f"metric '{name}' for task '{task.name}'; expected a metric of {expected}; choose another"
    with pytest.raises(ConfigError, match=message):
        check_metrics([*task.metrics, name], task, ready=False)
    base = tiny_base("llama")
    monkeypatch.setattr(base, "generate", lambda *_, **__: pytest.fail("something was written"))
    with pytest.raises(ConfigError, match=message):
        evaluate(base, None, task, "dev", metrics=[name])


def test_metrics_that_suit_a_task_are_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_metrics(["exact_match", "rouge_l"], ToyTask(), ready=False) == ("exact_match", "rouge_l")
    assert check_metrics(["exact_match"], LabelToy("tagging")) == ("exact_match",)
    monkeypatch.setenv("PATH", "")
    assert check_metrics(["meteor"], ToyTask(), ready=False) == ("meteor",)
    with pytest.raises(MissingPackage):
        check_metrics(["meteor"], ToyTask())


def test_perplexity_has_the_interval_of_drawn_rows(tmp_path: Path) -> None:
    base, task = tiny_base("llama"), ToyTask()
    found = evaluate(base, None, task, "dev", metrics=["exact_match"], max_new_tokens=1)
    costs = base.score(*zip(*[(row.prompt, row.completion) for row in task.split("dev").examples], strict=True))
    numbers = np.array(costs, dtype=float)
    drawn = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=1000) @ numbers
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    assert found.nats_per_token == pytest.approx(numbers[:, 0].sum() / numbers[:, 1].sum(), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp([found.nats_per_token, low, high]), rel=1e-4)
    assert [row.nats for row in found.outputs] == pytest.approx([cost.nats for cost in costs], rel=1e-4)
    assert [row.tokens for row in found.outputs] == [cost.tokens for cost in costs]
    found.save(tmp_path / "scores.json")
    assert Evaluation.load(tmp_path / "scores.json") == found
    plain = json.loads((tmp_path / "scores.json").read_text())
    assert plain["perplexity"]["value"] == found.perplexity.value
    table = print_scores_of(found)
    assert re.search(r"nats per token +\W* *\d+\.\d{3} \[\d+\.\d{3}, \d+\.\d{3}\]", table)
    assert re.search(r"perplexity +\W* *\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", table)
    labels = evaluate(base, None, LabelToy("classification"), "dev")
    assert labels.perplexity is None and "perplexity" not in print_scores_of(labels)


def print_scores_of(found: Evaluation) -> str:
    with redirect_stdout(io.StringIO()) as out:
        print_scores([found])
    return out.getvalue()


def test_scores_are_written_with_their_digits() -> None:
    assert [number_format(name) for name in ("nist", "cider", "bleu", "bertscore:x")] == [".2f", ".2f", ".1f", ".1f"]
    assert format(Interval(8.6094, 8.5, 8.7123), number_format("nist")) == "8.61 [8.50, 8.71]"
    assert str(Interval(65.934, 64.0, 67.0)) == "65.9 [64.0, 67.0]"
    assert str(Difference("b", "a", "cider", 0.126, -0.1, 0.2, 0.0304, 5)) == "+0.13 [-0.10, +0.20], p = 0.030"
    assert str(Difference("b", "a", "bleu", 0.126, -0.1, 0.2, 0.0009, 5)) == "+0.1 [-0.1, +0.2], p < 0.001"


def test_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(DataError, match="2 hypotheses and 1 rows of references"):
        exact_match(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="no hypotheses"):
        exact_match([], [])
    with pytest.raises(DataError, match="as references of row 1; expected a list of at least one"):
        exact_match(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="as references of row 0"):
        exact_match(["a"], ["a"])
    with pytest.raises(DataError, match="one string"):
        exact_match("a", [["a"]])
    with pytest.raises(DataError, match="as source of row 0; expected a string"):
        coverage(["a"], [["name : a"]])
    for options in ({"samples": 0}, {"confidence": 1.0}):
        with pytest.raises(ConfigError, match="samples"):
            bootstrap_interval("exact_match", ["a"], [["a"]], **options)


@pytest.mark.parametrize(("name", "package"), [("bleu", "sacrebleu"), ("rouge_l", "rouge_score")])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"'{package}' is not installed; run pip install 'foreword\[eval\]'"):
        type(get_metric(name))()(["a"], [["a"]])
