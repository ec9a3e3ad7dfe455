"""Probing: importance against finite differences, gates against what is read, halves, folding by the mean."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.labels import LabelToy
from tests.test_gates import moved, prefix_for, with_gates
from tests.tiny import tiny_base, tiny_inputs, tiny_model, tiny_tokenizer
from tests.toy import ToyTask
from torch import Tensor

from foreword.base import BaseModel
from foreword.errors import ConfigError, DataError, PrefixError, PrefixMismatch, UnsupportedModel
from foreword.gates import GateOptions
from foreword.heads import HeadModule
from foreword.objectives import HeadOptions, Objective, objective_of
from foreword.parametrization import parametrize
from foreword.prefix import Prefix, Site, SiteTensors
from foreword.probe import (
    Agreement,
    Probe,
    SiteProbe,
    _ranks,
    _spearman,
    draw,
    fold_gates,
    mean_gates,
    probe,
)
from foreword.tasks import Split, Task

GATED = {"llama": "token", "t5": "", "bert": "mean"}


def headed(base: BaseModel, prefix: Prefix, task: Task) -> Prefix:
    """The prefix with a random head for the task, on an encoder."""
    if base.family.kind != "encoder":
        return prefix
    pooling = "token" if task.kind == "tagging" else "mean"
    head = HeadModule.new(task.kind, task.labels, pooling, base.model.config.hidden_size).fold()
    return replace(prefix, head=head._replace(weight=20 * head.weight))


def double(name: str) -> BaseModel:
    return BaseModel(tiny_model(name).double(), tiny_tokenizer(), f"tiny-{name}")


def objective_in_double(base: BaseModel, prefix: Prefix, task: Task) -> Objective:
    objective = objective_of(base, task, HeadOptions(dropout=0.0), prefix.head)
    if objective.head is not None:
        objective.head.double()
    return objective


CASES = [
    ("llama", ToyTask(), ""), ("llama", ToyTask(), "token"), ("llama", LabelToy("classification"), "prompt"),
    ("gemma2", ToyTask(), ""), ("bart", LabelToy("choice"), ""), ("bert", LabelToy("classification"), "mean"),
    ("bert", LabelToy("choice"), "token"), ("deberta-v2", LabelToy("tagging"), "cls"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "pooling"), CASES, ids=[f"{n}-{t.kind}-{p or 'none'}" for n, t, p in CASES])
def test_importance_is_the_finite_difference_in_the_mass(name: str, task: Task, pooling: str) -> None:
    """|loss(log g = e) - loss(log g = -e)| / 2e of each row, in double precision, averaged over rows."""
    base = double(name)
    prefix = headed(base, prefix_for(base, 3), task)
    prefix = with_gates(base, prefix, pooling) if pooling else prefix
    found = probe(base, prefix, task, limit=4)
    objective = objective_in_double(base, prefix, task)
    rows = objective.encode(task.split("dev", limit=4))

    def loss(row: int, site: Site, slot: int, log_mass: float) -> float:
        mass = torch.zeros(3)
        mass[slot] = log_mass
        sites = {**prefix.sites, site: prefix.sites[site]._replace(log_mass=mass)}
        with torch.no_grad():
            return objective.loss(rows, [row], sites)[0].item()

    step = 0.01  # norms are in float32 in any model
    for site in prefix.sites:
        for slot in range(3):
            slopes = [abs(loss(r, site, slot, step) - loss(r, site, slot, -step)) / (2 * step) for r in range(4)]
            assert found.sites[site].importance[slot] == pytest.approx(sum(slopes) / 4, rel=5e-3, abs=1e-3)


def test_the_loss_is_the_one_without_dropout() -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    prefix = headed(base, prefix_for(base), task)
    found, again = probe(base, prefix, task), probe(base, prefix, task)
    objective = objective_of(base, task, HeadOptions(), prefix.head)
    rows = objective.encode(task.split("dev"))
    assert found.nats_per_row * 7 == pytest.approx(objective.measure(rows, range(7), prefix).nats, rel=1e-5)
    assert found.sites == again.sites and found.rows == 7 and not found.has_gates


@pytest.mark.parametrize("pooling", ["mean", "cls", "token"])
def test_gates_are_means_over_the_tokens_of_each_text(pooling: str) -> None:
    """The options of a choice are padded to each other; each alone, without padding, gives the same means."""
    base, task = tiny_base("bert"), LabelToy("choice")
    prefix = headed(base, with_gates(base, prefix_for(base), pooling), task)
    found = probe(base, prefix, task)
    objective = objective_of(base, task, HeadOptions(), prefix.head)
    want: dict[Site, list[Tensor]] = {site: [] for site in prefix.sites}
    for row in objective.encode(task.split("dev")).encoded:
        each: dict[Site, list[Tensor]] = {site: [] for site in prefix.sites}
        for text in row.texts:
            inputs = {"input_ids": torch.tensor([text.ids]), "attention_mask": torch.ones(1, len(text.ids))}
            with torch.no_grad(), base.attachment.recording_gates() as seen:
                base.hidden_states({k: v.long() for k, v in inputs.items()}, prefix)
            for site in each:
                each[site].append(seen[site][0].mean(0))
        for site, gates in each.items():
            want[site].append(torch.stack(gates).mean(0))
    for site, gates in want.items():
        rows = torch.stack(gates)
        torch.testing.assert_close(torch.tensor(found.sites[site].gates), rows.mean(0), atol=1e-4, rtol=1e-4)
        spread = torch.tensor(found.sites[site].spread)
        torch.testing.assert_close(spread, rows.std(0, correction=0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mean_gates(base, prefix, task)[site], rows.mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["apt", "static", "mass"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_effective_gates_are_all_factors_together(name: str, kind: str) -> None:
    base = tiny_base(name)
    task: Task = LabelToy("classification")
    options = GateOptions(kind)
    module = moved(parametrize(prefix_for(base), gates=options, hidden_sizes=base.hidden_sizes))
    prefix = headed(base, module.fold(), task)
    found = probe(base, prefix, task)
    recorded = prefix.metadata["gates"]["values"]
    for site, each in found.sites.items():
        assert each.layer == recorded[str(site)].get("layer") and each.gates is not None and each.spread is not None
        if kind == "apt":
            alpha = mean_gates(base, prefix, task)[site]
            torch.testing.assert_close(torch.tensor(each.gates), alpha * (each.layer or 1.0))
            assert all(spread > 0 for spread in each.spread)
        else:
            want = [value * (each.layer or 1.0) for value in recorded[str(site)]["slots"]]
            assert each.gates == pytest.approx(want, rel=1e-5) and each.spread == pytest.approx([0.0] * 4, abs=1e-6)
    assert set(found.agreement) == {"gates", "importance"}
    assert all(bool((scores >= 0).all()) for scores in found.scores("gates").values())


def test_removed_slots_and_empty_sites() -> None:
    base = tiny_base("llama")
    prefix = prefix_for(base)
    first, second = prefix.sites
    mass = torch.tensor([0.0, -math.inf, 0.0, 0.0])
    sites = {
        first: prefix.sites[first]._replace(log_mass=mass),
        second: prefix.sites[second].keep(torch.tensor([]).long()),
    }
    found = probe(base, replace(prefix, sites=sites), ToyTask())
    assert found.sites[first].importance[1] == 0.0 and found.sites[first].gates == [1.0, 0.0, 1.0, 1.0]
    assert min(found.sites[first].importance[::2]) > 0
    assert found.sites[second].importance == [] and found.scores("gates")[second].shape == (0,)


# Halves


class TwoKinds(LabelToy):
    """Rows of which the halves say the same: every text twice."""

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        examples = [self._classification(name, row % 3) for row in range(40)]
        return Split(name, examples, source="twice")


def test_halves_of_like_rows_agree() -> None:
    base = tiny_base("bert")
    task = TwoKinds("classification")
    prefix = headed(base, with_gates(base, prefix_for(base, 8), "mean"), task)
    found = probe(base, prefix, task)
    assert all(each.correlation > 0.8 and each.top_half > 0.6 for each in found.agreement.values())
    assert found.warnings() == []


def test_halves_depend_on_the_seed_alone() -> None:
    base = tiny_base("llama")
    prefix = prefix_for(base)
    found = [probe(base, prefix, ToyTask(), seed=seed).agreement["importance"] for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1] and len(set(found)) > 1


def test_little_agreement_is_said() -> None:
    site = {Site("encoder", 0): SiteProbe([1.0, 2.0])}
    agreement = {"importance": Agreement(0.31, 0.5), "gates": Agreement(None, 0.5)}
    found = Probe("b", "", "t", "dev", "", 9, None, 0, 1.0, site, agreement)
    assert len(found.warnings()) == 2 and "the importance of the slots (0.31)" in found.warnings()[0]
    assert "the gates of all slots is the same" in found.warnings()[1]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.lists(st.floats(-9, 9), min_size=12, max_size=12))
def test_spearman(values: list[int], others: list[float]) -> None:
    one, other = torch.tensor(values).double(), torch.tensor(others[: len(values)]).double()
    naive = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
    assert _ranks(one).tolist() == naive
    found = _spearman(one, other)
    if len(one.unique()) == 1 or len(other.unique()) == 1:
        assert found is None
        return
    ranks = torch.stack([_ranks(one), _ranks(other)])
    assert found == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), abs=1e-5)
    assert _spearman(one, one.exp()) == 1.0 and _spearman(one, -one) == -1.0


# Files


def test_a_probe_comes_back_from_disk(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), LabelToy("tagging")
    prefix = headed(base, with_gates(base, prefix_for(base), "cls"), task)
    found = probe(base, prefix, task, limit=3)
    found.save(tmp_path)
    assert Probe.load(tmp_path) == found and found.limit == 3
    assert found.prefix_sha256 == prefix.sha256() != replace(prefix, head=None).sha256()
    with pytest.raises(DataError, match=r"cannot read .*no/probe.json .*; probe the prefix first"):
        Probe.load(tmp_path / "no")
    for text in ("[]", "{}", "nothing"):
        (tmp_path / "probe.json").write_text(text)
        with pytest.raises(DataError, match="holds no probe"):
            Probe.load(tmp_path)


@pytest.mark.parametrize("gated", [False, True])
def test_heat_maps(tmp_path: Path, gated: bool) -> None:
    pytest.importorskip("matplotlib")
    gates = {"gates": [-1.0, 0.5], "spread": [0.1, 0.2]} if gated else {}
    sites = {
        Site("encoder", 0): SiteProbe([0.1, 0.3], **gates),
        Site("encoder", 1): SiteProbe([], **{k: [] for k in gates}),
    }
    agreement = {"importance": Agreement(1.0, 1.0)}
    draw(Probe("base", "", "rte", "dev", "", 9, None, 0, 1.0, sites, agreement), tmp_path)
    page = (tmp_path / "heatmap.html").read_text()
    assert page.count("<figure") == (3 if gated else 1) and "encoder.1" in page and "75" in page
    assert "importance: rank correlation of two halves 1.00" in page
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")


# Folding


@pytest.mark.parametrize("name", GATED)
def test_folding_gates_that_do_not_vary_is_exact(name: str) -> None:
    base = tiny_base(name)
    task = LabelToy("classification")
    module = parametrize(prefix_for(base), gates=GateOptions("apt"), hidden_sizes=base.hidden_sizes)
    prefix = headed(base, module.fold(), task)
    folded = fold_gates(prefix, mean_gates(base, prefix, task, limit=2))
    assert all(set(tensors.named()) == {"keys", "values"} for tensors in folded.sites.values())
    assert "gates" not in folded.metadata and folded.head is prefix.head
    inputs = tiny_inputs(name)
    want, got = (base.logits(prefixes=each, **inputs) for each in (prefix, folded))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert parametrize(folded).gates is None


@pytest.mark.parametrize("name", GATED)
def test_folding_by_the_mean_of_one_text_is_that_texts_function(name: str) -> None:
    """Gates that are pooled do not vary over the rows of one text."""
    base = tiny_base(name)
    task = LabelToy("classification")
    prefix = headed(base, with_gates(base, prefix_for(base), {"llama": "prompt", "t5": "mean"}.get(name, "mean")), task)
    if name == "t5":  # the gates of its decoder read each token: there, none
        sites = {s: t if s.stack == "encoder" else t._replace(gate=None) for s, t in prefix.sites.items()}
        prefix = replace(prefix, sites=sites)
    folded = fold_gates(prefix, mean_gates(base, prefix, task, limit=1))
    objective = objective_of(base, task, HeadOptions(), prefix.head)
    rows = objective.encode(task.split("dev"))
    first = [objective.measure(rows, [0], each).nats for each in (prefix, folded)]
    assert first[1] == pytest.approx(first[0], rel=1e-4)
    rest = [objective.measure(rows, [1, 2, 3, 4], each).nats for each in (prefix, folded)]
    assert rest[1] != pytest.approx(rest[0], rel=1e-5)


def test_masses_that_can_be_folded_and_others() -> None:
    base = tiny_base("llama")
    prefix = prefix_for(base)
    first, second = prefix.sites
    mass = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    sites = {**prefix.sites, first: prefix.sites[first]._replace(log_mass=mass)}
    removed = replace(prefix, sites=sites)
    folded = fold_gates(removed, {})
    assert folded.lengths == {first: 2, second: 4}
    inputs = tiny_inputs("llama")
    want, got = (base.logits(prefixes=each, **inputs) for each in (removed, folded))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    sites[first] = sites[first]._replace(log_mass=torch.tensor([0.0, 0.0, math.log(0.25), 0.0]))
    with pytest.raises(PrefixError, match=r"slot 2 at decoder.0 has mass 0.25, which keys and values cannot hold"):
        fold_gates(replace(prefix, sites=sites), {})


def test_means_of_another_prefix_are_refused() -> None:
    base = tiny_base("bert")
    prefix = with_gates(base, prefix_for(base), "mean")
    with pytest.raises(PrefixError, match="no mean for the 4 gates at encoder.0"):
        fold_gates(prefix, {})
    with pytest.raises(PrefixError, match="3 means for the 4 gates at encoder.0"):
        fold_gates(prefix, {site: torch.ones(3) for site in prefix.sites})


# Bad input


class OneRow(LabelToy):
    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        return super().split(name, 1)


def test_what_cannot_be_probed() -> None:
    base = tiny_base("bert")
    task = LabelToy("classification")
    prefix = headed(base, prefix_for(base), task)
    with pytest.raises(DataError, match="1 usable row of dev; expected at least two"):
        probe(base, prefix, OneRow("classification"))
    with pytest.raises(PrefixError, match="without a head"):
        probe(base, replace(prefix, head=None), task)
    with pytest.raises(PrefixError, match="a head for classification with labels low"):
        probe(base, prefix, LabelToy("tagging"))
    with pytest.raises(UnsupportedModel, match="writes no completions"):
        probe(base, prefix, ToyTask())
    with pytest.raises(PrefixMismatch, match="prefix for"):
        probe(tiny_base("llama"), prefix, ToyTask())
    with pytest.raises(ConfigError, match="ranking 'size'; expected importance or gates"):
        probe(base, prefix, task).scores("size")
    with pytest.raises(ConfigError, match="the gates of a prefix without gates"):
        probe(base, prefix, task).scores("gates")


def test_a_record_of_other_gates_is_refused() -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    module = parametrize(prefix_for(base), gates=GateOptions("static"), hidden_sizes=base.hidden_sizes)
    prefix = headed(base, module.fold(), task)
    prefix.metadata["gates"] = json.loads(json.dumps(prefix.metadata["gates"]))
    prefix.metadata["gates"]["values"]["encoder.1"]["slots"] = [0.5]
    with pytest.raises(PrefixError, match="the prefix records 1 gates at encoder.1, which has 4 slots"):
        probe(base, prefix, task)


def test_a_loss_that_is_not_finite_is_said() -> None:
    base = tiny_base("llama")
    prefix = prefix_for(base)
    sites = {site: SiteTensors(t.keys, t.values * 1e38 * 1e3) for site, t in prefix.sites.items()}
    with pytest.raises(PrefixError, match="the loss of row"):
        probe(base, replace(prefix, sites=sites), ToyTask())


def progress_of(call: Any) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    call(lambda done, total: seen.append((done, total)))
    return seen


def test_progress_counts_rows() -> None:
    base = tiny_base("llama")
    prefix = replace(prefix_for(base), metadata={})
    assert progress_of(lambda p: probe(base, prefix, ToyTask(), progress=p))[-1] == (7, 7)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bart"])
def test_fast_layers_give_the_same_importance(name: str) -> None:
    """In float32 the passes take the fast ways for frozen models; in double precision they do not."""
    found = [probe(base, prefix_for(base), ToyTask()) for base in (tiny_base(name), double(name))]
    for site, each in found[0].sites.items():
        assert each.importance == pytest.approx(found[1].sites[site].importance, rel=2e-3, abs=1e-4)
