"""Explaining: AUROC against scikit-learn, gates against a plain reading of each row, chance, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from tests.labels import KINDS, LabelToy
from tests.test_gates import prefix_for, with_gates
from tests.test_plots import Reader
from tests.test_probe import headed
from tests.tiny import tiny_base, tiny_model, tiny_tokenizer
from tests.toy import ToyTask
from typer.testing import CliRunner

import foreword as fw
from foreword.base import BaseModel
from foreword.errors import ConfigError, DataError, PrefixError
from foreword.evaluate import evaluate, objective_for
from foreword.explain import Explained, Explanation, explain, row_gates
from foreword.explain_page import save_explanation
from foreword.metrics.auroc import (
    auroc,
    auroc_interval,
    aurocs,
    bootstrap_aurocs,
    intervals,
    permuted_aurocs,
)  # fmt: skip
from foreword.objectives import Objective
from foreword.prefix import Prefix
from foreword.probe import probe
from foreword.tasks import Labelled, Split

# ---- AUROC

labelled = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({label for _, label in rows}) == 2
)


@given(labelled)
def test_auroc_is_that_of_scikit_learn_ties_included(rows: list[tuple[int, bool]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    numbers, labels = zip(*rows, strict=True)
    assert auroc(numbers, labels) == pytest.approx(metrics.roc_auc_score(labels, numbers), abs=1e-12)


@given(labelled)
def test_auroc_is_the_share_of_pairs_and_turns_around(rows: list[tuple[int, bool]]) -> None:
    pairs = [(a > b) + (a == b) / 2 for a, yes in rows if yes for b, no in rows if not no]
    numbers, labels = zip(*rows, strict=True)
    assert auroc(numbers, labels) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auroc([-n for n in numbers], labels) == pytest.approx(1 - auroc(numbers, labels), abs=1e-12)
    low, high = auroc_interval(numbers, labels, samples=50)
    assert 0 <= low <= auroc(numbers, labels) <= high <= 1


@given(st.integers(0, 10_000))
def test_a_bootstrap_sample_is_the_auroc_of_the_rows_it_draws(seed: int) -> None:
    random = np.random.default_rng(seed)
    features = random.integers(0, 5, size=(12, 3)).astype(float)
    labels = np.arange(12) % 3 == 0
    found = bootstrap_aurocs(features, labels, samples=2, seed=seed)
    again = np.random.default_rng(seed)
    draws = [again.multinomial(each.sum(), np.full(each.sum(), 1 / each.sum()), size=2) for each in (labels, ~labels)]
    for sample in range(2):
        rows = np.concatenate([np.repeat(np.flatnonzero(each), draw[sample]) for each, draw in
                               zip((labels, ~labels), draws, strict=True)])  # fmt: skip
        np.testing.assert_allclose(found[sample], aurocs(features[rows], labels[rows]), atol=1e-12)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random, held = np.random.default_rng(0), []
    for trial in range(60):
        labels = np.arange(80) % 2 == 0
        features = random.normal(size=(80, 5)) + 0.5 * labels[:, None]
        low, high = intervals(bootstrap_aurocs(features, labels, 300, seed=trial), aurocs(features, labels))
        held += ((low <= 0.6382) & (high >= 0.6382)).tolist()  # Φ(0.5 / √2)
    assert 0.91 <= np.mean(held) <= 0.98


def test_dealt_out_labels_tell_nothing_and_keep_their_number() -> None:
    labels = np.arange(50) < 10
    features = np.random.default_rng(1).normal(size=(50, 2))
    found = permuted_aurocs(features, labels, samples=4000, seed=3)
    assert found.mean() == pytest.approx(0.5, abs=0.01)
    assert found.std() == pytest.approx(np.sqrt(51 / (12 * 10 * 40)), rel=0.05)  # Mann and Whitney 1947


@given(labelled, st.integers(1, 4))
def test_labels_dealt_out_in_groups_stay_there(rows: list[tuple[int, bool]], count: int) -> None:
    labels = np.array([label for _, label in rows])
    groups = np.arange(len(rows)) % count
    one_group = [(groups == k).astype(float) for k in range(count)]  # whose AUROC counts the positive rows of the group
    found = permuted_aurocs(np.stack(one_group, axis=1), labels, samples=5, seed=1, groups=groups)
    np.testing.assert_allclose(found, np.tile(aurocs(np.stack(one_group, axis=1), labels), (5, 1)))


def test_what_only_follows_length_does_not_tell_beyond_it() -> None:
    from foreword.explain import _chance_of_best, _like_lengths

    random = np.random.default_rng(0)
    lengths = random.integers(5, 60, size=400).astype(float)
    right = random.random(400) < 1 / (1 + np.exp((lengths - 30) / 6))
    follows = (lengths + random.normal(size=400))[:, None]
    assert _chance_of_best(follows, right, 0) < 0.01 < 0.05 < _chance_of_best(follows, right, 0, _like_lengths(lengths))
    more = follows + 8 * right[:, None]
    assert _chance_of_best(more, right, 0, _like_lengths(lengths)) < 0.01


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(DataError, match="3 positive of 3 rows; expected at least one positive and one negative"):
        auroc([1.0, 2.0, 3.0], [True] * 3)
    with pytest.raises(DataError, match="not finite"):
        auroc([1.0, float("nan")], [True, False])
    with pytest.raises(DataError, match="as many rows"):
        auroc([1.0], [True, False])
    with pytest.raises(ConfigError, match="samples 0"):
        auroc_interval([1.0, 2.0], [True, False], samples=0)
    with pytest.raises(ConfigError, match="confidence 1"):
        auroc_interval([1.0, 2.0], [True, False], confidence=1)


# ---- Gates of rows


def gated(name: str, kind: str, pooling: str, rows: int = 20) -> tuple[BaseModel, Prefix, LabelToy]:
    """A base model, a prefix with random gates (and a head for an encoder), and a task."""
    base, task = tiny_base(name), LabelToy(kind, rows)
    prefix = with_gates(base, prefix_for(base), pooling)
    values = {str(site): {"layer": 2.0 - 0.5 * k} for k, site in enumerate(prefix.sites)}
    prefix.metadata["gates"] = {"kind": "apt", "values": values}
    return base, headed(base, prefix, task), task


def prepared(base: BaseModel, prefix: Prefix, task: Any, split: str = "train") -> tuple[Objective, Any]:
    objective = objective_for(base, prefix, task)
    return objective, objective.encode(task.split(split))


READERS = [
    *(("bert", kind, pooling) for kind in KINDS for pooling in ("cls", "mean", "token")),
    ("distilbert", "classification", "mean"), ("llama", "classification", "token"), ("llama", "choice", "prompt"),
    ("bart", "classification", "token"), ("t5", "choice", "token"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "pooling"), READERS)
def test_a_rows_gates_do_not_depend_on_the_rows_beside_it(name: str, kind: str, pooling: str) -> None:
    base, prefix, task = gated(name, kind, pooling)
    objective, rows = prepared(base, prefix, task)
    together, alone = (row_gates(objective, rows, prefix, batch_size=size) for size in (7, 1))
    for site in prefix.sites:
        assert together[site].shape == (20, 4)
        torch.testing.assert_close(together[site], alone[site], rtol=1e-5, atol=1e-5)
    assert max(float(each.std(0).max()) for each in together.values()) > 1e-4  # the first token of all may be the same


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["cls", "mean", "token"])
def test_gates_are_those_of_the_probe(kind: str, pooling: str) -> None:
    base, prefix, task = gated("bert", kind, pooling)
    found = probe(base, prefix, task, "train")
    gates = row_gates(*prepared(base, prefix, task), prefix)
    for site, each in gates.items():
        torch.testing.assert_close(each.mean(0).tolist(), found.sites[site].gates, rtol=1e-4, atol=1e-5)


def test_lambda_and_mass_are_folded_in() -> None:
    base, prefix, task = gated("bert", "classification", "mean")
    objective, rows = prepared(base, prefix, task)
    plain = row_gates(objective, rows, replace(prefix, metadata={}))
    log_mass = torch.tensor([0.0, -1.0, 0.5, -torch.inf])
    masses = {site: each._replace(log_mass=log_mass) for site, each in prefix.sites.items()}
    heavy = row_gates(objective, rows, replace(prefix, sites=masses, metadata={}))
    scaled = row_gates(objective, rows, prefix)
    for k, site in enumerate(prefix.sites):
        torch.testing.assert_close(scaled[site], (2.0 - 0.5 * k) * plain[site])
    first = next(iter(prefix.sites))  # deeper layers read what lighter slots gave
    torch.testing.assert_close(heavy[first], plain[first] * log_mass.exp())


class OtherAnswers(LabelToy):
    """The same texts with other right answers."""

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        data = super().split(name, limit, strict)
        return Split(name, [example._replace(label=self.labels[0]) for example in data.examples])


@pytest.mark.parametrize(("name", "pooling"), [("llama", "token"), ("llama", "prompt"), ("t5", "token")])
def test_gates_do_not_see_the_right_answer(name: str, pooling: str) -> None:
    base, prefix, task = gated(name, "classification", pooling)
    one, other = (
        row_gates(*prepared(base, prefix, each), prefix) for each in (task, OtherAnswers("classification"))
    )  # fmt: skip
    assert all(torch.equal(one[site], other[site]) for site in one)


# ---- What they tell


class Telltale:
    """Rows whose answer is right or wrong by a fixed head, with texts that open gates differently."""

    kind, instruction, max_new_tokens, stop = "classification", "", 1, ()
    metrics, labels = ("accuracy",), ("low", "high")

    def __init__(self, rows: int, label: str = "", name: str = "telltale") -> None:
        self.rows, self.label, self.name = rows, label, name

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        examples = []
        for row in range(self.rows):
            text = ("one two " if row % 2 else "eight pubs ") * (1 + row % 5) + f"{row} <i>&"
            label = self.label or self.labels[row * 7 % 3 % 2]
            examples.append(Labelled(f"{name}-{row}", ((text,),), label, f"{text}\n", ("low", "high"), row))
        return Split(name, examples[:limit])


def told(rows: int = 60, label: str = "", **options: Any) -> Explanation:
    base = tiny_base("bert")
    task = Telltale(rows, label)
    prefix = headed(base, with_gates(base, prefix_for(base), "mean"), task)  # type: ignore[arg-type]
    if label:  # a head that always says `low`
        head = prefix.head
        assert head is not None
        prefix = replace(prefix, head=head._replace(weight=0 * head.weight, bias=torch.tensor([5.0, 0.0])))
    return explain(base, prefix, task, "test", samples=200, **options)  # type: ignore[arg-type]


def test_an_explanation_is_of_the_evaluation() -> None:
    found, task = told(), Telltale(60)
    base = tiny_base("bert")
    prefix = headed(base, with_gates(base, prefix_for(base), "mean"), task)  # type: ignore[arg-type]
    scored = evaluate(base, prefix, task, "test")  # type: ignore[arg-type]
    assert 100 * found.right / len(found.rows) == pytest.approx(scored.scores["accuracy"].value)
    for row, output in zip(found.rows, scored.outputs, strict=True):
        assert (row.id, row.predicted, (row.gold,)) == (output.id, output.text, output.references)
        assert row.probability == pytest.approx(output.probability, rel=1e-4)
    assert found.data_sha256 == scored.data_sha256


def test_aurocs_are_those_of_the_rows() -> None:
    found = told()
    right = [row.right for row in found.rows]
    assert 0 < found.right < 60 and [each.name for each in found.layers] == found.sites
    for place, layer in enumerate(found.layers):
        assert layer.auroc == pytest.approx(auroc([row.gates[place] for row in found.rows], right))
        assert layer.low <= layer.auroc <= layer.high
    assert found.probability is not None and found.tokens is not None
    assert found.probability.auroc == pytest.approx(auroc([row.probability for row in found.rows], right))
    assert found.tokens.auroc == pytest.approx(auroc([row.tokens for row in found.rows], right))
    assert [len(row) for row in found.slot_aurocs] == [4, 4]
    best = max(abs(each - 0.5) for row in found.slot_aurocs for each in row)
    assert abs(found.slots[0].auroc - 0.5) == pytest.approx(best)
    assert abs(found.most_telling[0].auroc - 0.5) == max(abs(each.auroc - 0.5) for each in found.layers)
    assert 0 < (found.layer_chance or 0) <= 1 and 0 < (found.slot_chance or 0) <= 1
    assert found.clear_by_chance is not None and 0 <= found.clear_by_chance <= len(found.layers)


def test_the_same_seed_explains_alike_and_the_batch_does_not_matter() -> None:
    one, other = told().to_dict(), told(batch_size=7).to_dict()
    assert told().to_dict() == one
    assert [row["predicted"] for row in one["rows"]] == [row["predicted"] for row in other["rows"]]


def strong(chance: float) -> Explanation:
    """An explanation of 200 rows whose one layer tells, or not."""
    from foreword.explain import _told

    random = np.random.default_rng(0)
    right = np.arange(200) % 2 == 0
    gates = random.normal(size=(200, 2)) + chance * right[:, None]
    rows = [Explained(str(k), "text", "a", "a" if r else "b", 0.5 + 0.001 * k, bool(r), 9 + k % 4, tuple(g))
            for k, (r, g) in enumerate(zip(right, gates, strict=True))]  # fmt: skip
    plain = Explanation("tiny", "toy", "test", "0" * 64, ["encoder.0", "encoder.1"], rows)
    return replace(plain, **_told(plain, gates, [gates, random.normal(size=(200, 3))], 200, 0))


def test_what_tells_is_told_from_chance() -> None:
    clear, none = strong(1.0), strong(0.0)
    assert clear.clear_layers == 2 and (clear.layer_chance or 1) < 0.01 and "more than chance" in clear.summary()[2]
    assert (none.layer_chance or 0) > 0.05 and "may well be chance" in none.summary()[2]
    assert (clear.clear_by_chance or 0) < 1


@pytest.mark.parametrize(("label", "same"), [("low", "right"), ("high", "wrong")])
def test_rows_that_are_all_alike_are_said_to_be(label: str, same: str, tmp_path: Path) -> None:
    found = told(label=label)
    assert found.layers == [] and found.layer_chance is None
    assert found.summary()[1] == f"Every row is {same}: there is nothing to tell apart."
    save_explanation(found, tmp_path)
    assert same in Reader((tmp_path / "explain.html").read_text()).text


def test_few_rows_are_said_to_be_few() -> None:
    assert "hardly known" in told(rows=12).notes[0]


def test_what_cannot_be_explained_is_refused_in_one_line() -> None:
    base, prefix, _ = gated("llama", "classification", "token")
    with pytest.raises(ConfigError, match="task 'toy', in which text is written; expected a task with labels"):
        explain(base, prefix, ToyTask())
    base = tiny_base("bert")
    with pytest.raises(PrefixError, match="gates do not read the text; expected gates that do; train it with --gates"):
        explain(base, headed(base, prefix_for(base), LabelToy("tagging")), LabelToy("tagging"))


@pytest.mark.parametrize(("name", "kind", "pooling"), READERS)
def test_every_kind_of_task_is_explained(name: str, kind: str, pooling: str, tmp_path: Path) -> None:
    base, prefix, task = gated(name, kind, pooling)
    found = explain(base, prefix, task, "test", samples=20)
    assert len(found.rows) == 9 and len(found.sites) == len(prefix.sites)
    save_explanation(found, tmp_path)
    Reader((tmp_path / "explain.html").read_text())


# ---- The report


def test_the_report_says_what_was_found(tmp_path: Path) -> None:
    found = told()
    save_explanation(found, tmp_path)
    page = Reader((tmp_path / "explain.html").read_text())
    assert all(line in page.text for line in found.summary())
    assert f"{found.layers[0].auroc:.2f} [{found.layers[0].low:.2f}, {found.layers[0].high:.2f}]" in page.text
    assert all(row.text in page.text and row.id in page.text for row in found.rows)
    assert len([bar for bar in page.all("i") if bar.get("class") == "strip"]) == 60
    kept = json.loads((tmp_path / "explain.json").read_text())
    assert kept["summary"] == found.summary() and len(kept["rows"]) == 60
    assert kept["right"] + kept["wrong"] == 60 and kept["layers"][0]["auroc"] == found.layers[0].auroc


def test_of_many_rows_the_report_lists_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreword.explain_page._LISTED", 25)
    save_explanation(told(), tmp_path)
    text = Reader((tmp_path / "explain.html").read_text()).text
    assert "20 of 60 rows, one in 3; explain.json has all" in text


def call(command: Any, *arguments: object) -> str:
    """What a command prints on standard output."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def test_the_command(tmp_path: Path) -> None:
    from foreword.cli.explain import explain as command

    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(
        json.dumps({"text": f"{'one' if k % 2 else 'pub'} {k} " * (1 + k % 3), "label": "ab"[k % 3 % 2]}) + "\n"
        for k in range(40)
    ))  # fmt: skip
    columns = {"text_column": "text", "label_column": "label"}
    task = fw.get_task("labelled", train=rows, test=rows, **columns)
    base = BaseModel.load(str(tmp_path / "model"))
    options = fw.TrainConfig(length=3, epochs=2, batch_size=8, gates="apt", learning_rate=0.02)
    fw.train(base, None, task, options, out=tmp_path / "run")
    flags = ("--test", rows, "--text-column", "text", "--label-column", "label", "--json")
    printed = call(command, tmp_path / "run", *flags).strip().splitlines()
    found = json.loads(printed[-1])
    assert len(found["layers"]) == 2 and found["folder"] == str(tmp_path / "run" / "explain")
    assert {path.name for path in (tmp_path / "run" / "explain").iterdir()} == {"explain.html", "explain.json"}
    assert any(line.startswith("report ") for line in printed) and any("rows are right" in line for line in printed)
