"""Pruning: planted slots are found, what stays is exact, budgets hold, and what stays trains again."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.labels import LabelToy
from tests.test_gates import moved, prefix_for, with_gates
from tests.test_probe import headed
from tests.tiny import save_tiny, tiny_base, tiny_inputs
from tests.toy import ToyTask, toy_config
from torch import Tensor

import foreword as fw
from foreword.base import BaseModel
from foreword.errors import ConfigError, PrefixError, PrefixMismatch
from foreword.gates import GateOptions
from foreword.init import new_prefix
from foreword.parametrization import parametrize
from foreword.prefix import Gate, Prefix, Site, Sites, SiteTensors
from foreword.probe import Probe, probe
from foreword.prune import lengths_from, prune, rewound, start_gates_from, with_lengths
from foreword.tasks import Task
from foreword.train import train

Run = Callable[..., tuple[int, str, str]]


def random_scores(prefix: Prefix, seed: int = 0) -> dict[Site, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.rand(length, generator=generator) for site, length in prefix.lengths.items()}


def same(one: Sites, other: Sites) -> bool:
    """Whether all tensors are, bit for bit."""
    pairs = [(one[site].named(), other[site].named()) for site in {**one, **other}]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


# Planted slots


PLANTED = {0: [1, 4], 1: [0, 2, 5]}


def planted(prefix: Prefix, useless: Callable[[Site, int, SiteTensors], SiteTensors]) -> Prefix:
    """The prefix, of length 6, with the planted slots of both layers made useless."""
    sites = {}
    for site, tensors in prefix.sites.items():
        for slot in PLANTED[site.layer]:
            tensors = useless(site, slot, tensors)
        sites[site] = tensors
    return replace(prefix, sites=sites)


def without_planted(prefix: Prefix) -> dict[Site, list[int]]:
    return {site: [slot for slot in range(6) if slot not in PLANTED[site.layer]] for site in prefix.sites}


def kept(pruned: Prefix) -> dict[Site, list[int]]:
    return {Site.parse(name): slots for name, slots in pruned.metadata["pruned"]["kept"].items()}


def hardly_read(_: Site, slot: int, tensors: SiteTensors) -> SiteTensors:
    mass = torch.zeros(6) if tensors.log_mass is None else tensors.log_mass.clone()
    mass[slot] = -12.0
    return tensors._replace(log_mass=mass)


@pytest.mark.parametrize(("name", "task"), [("llama", ToyTask()), ("bert", LabelToy("classification"))])
@pytest.mark.parametrize("by", ["importance", "gates"])
def test_slots_that_hardly_get_attention_are_found(name: str, task: Task, by: str) -> None:
    base = tiny_base(name)
    prefix = headed(base, planted(prefix_for(base, 6), hardly_read), task)
    pruned = prune(prefix, probe(base, prefix, task).scores(by), keep=7 / 12, by=by)
    assert kept(pruned) == without_planted(prefix) and pruned.lengths == {s: len(k) for s, k in kept(pruned).items()}


def test_slots_with_small_gates_are_found_by_gates() -> None:
    """Gates of the text that are nearly shut on the rows that are read; static ones, whatever is read."""
    base, task = tiny_base("bert"), LabelToy("classification")
    prefix = headed(base, with_gates(base, prefix_for(base, 6), "mean"), task)
    for site in prefix.sites:  # layer by layer: what enters the second depends on the first
        entered = entering(base, prefix, task, site)
        tensors = prefix.sites[site]
        assert tensors.gate is not None
        weight = tensors.gate.weight.clone()
        shut = torch.linalg.lstsq(entered, torch.full((len(entered), 1), -6.0)).solution
        weight[:, PLANTED[site.layer]] = shut
        prefix = replace(prefix, sites={**prefix.sites, site: tensors._replace(gate=Gate(weight, "mean"))})
    found = probe(base, prefix, task)
    assert kept(prune(prefix, found.scores("gates"), keep=7 / 12)) == without_planted(prefix)
    module = parametrize(prefix_for(base, 6), gates=GateOptions("static"), hidden_sizes=base.hidden_sizes)
    assert module.gates is not None
    with torch.no_grad():
        for layer, slots in PLANTED.items():
            module.gates.encoder_slots[layer, slots] = -5.0
    static = headed(base, module.fold(), task)
    assert kept(prune(static, probe(base, static, task).scores("gates"), keep=7 / 12)) == without_planted(static)


def entering(base: BaseModel, prefix: Prefix, task: Task, site: Site) -> Tensor:
    """What the gates of a site read on every dev row, `[rows, hidden]`."""
    hidden = prefix.sites[site].gate.weight.shape[0]  # type: ignore[union-attr]
    found = []
    for row in task.split("dev").examples:
        ids = base.tokenizer(row.texts[0][0], return_tensors="pt")
        columns = []
        for start in range(0, hidden, 6):  # six hidden units at a time, through gates that read them out
            weight = torch.zeros(hidden, 6)
            for k in range(min(6, hidden - start)):
                weight[start + k, k] = 1.0
            gate = Gate(weight, "mean")
            read = replace(prefix, sites={**prefix.sites, site: prefix.sites[site]._replace(gate=gate)})
            with torch.no_grad(), base.attachment.recording_gates() as seen:
                base.hidden_states({name: ids[name] for name in ("input_ids", "attention_mask")}, read)
            columns.append(torch.logit(seen[site][0, 0].double()))
        found.append(torch.cat(columns)[:hidden].float())
    return torch.stack(found)


def test_random_slots_that_are_added_to_a_trained_prefix_are_found() -> None:
    """Slots of hardly any mass between those that training made, at places of their own in every layer."""
    base = tiny_base("llama")
    config = toy_config(length=4, epochs=6, learning_rate=0.05)
    trained = train(base, None, ToyTask(), config).prefix
    noise = prefix_for(base, 3, seed=9)
    sites = {}
    for site, tensors in trained.sites.items():
        order = torch.tensor([4, 0, 5, 1, 2, 6, 3]).roll(site.layer)
        mass = torch.tensor([0.0] * 4 + [-12.0] * 3)
        keys = torch.cat([tensors.keys, noise.sites[site].keys], 1)
        values = torch.cat([tensors.values, noise.sites[site].values], 1)
        sites[site] = SiteTensors(keys, values, mass).keep(order)
    grown = replace(trained, sites=sites, training_state=None)
    pruned = prune(grown, probe(base, grown, ToyTask()).scores(), budget_parameters=sum(4 * 33 for _ in sites))
    for site, tensors in pruned.sites.items():
        assert torch.equal(tensors.keys.sort(1).values, trained.sites[site].keys.sort(1).values)


# Exactness


FAMILIES = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "bert", "albert", "deberta-v2", "modernbert", "t5", "bart")


def masked(prefix: Prefix, pruned: Prefix) -> Prefix:
    """The whole prefix with mass 0 on what was cut."""
    sites = {}
    for site, tensors in prefix.sites.items():
        mass = torch.full((tensors.length,), -math.inf)
        mass[kept(pruned)[site]] = 0.0
        sites[site] = tensors._replace(log_mass=mass if tensors.log_mass is None else mass + tensors.log_mass)
    return replace(prefix, sites=sites)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "apt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_stays_is_the_whole_prefix_with_mass_0_on_the_rest(name: str, gated: bool) -> None:
    base = tiny_base(name)
    prefix = prefix_for(base, 6)
    if gated:
        prefix = with_gates(base, prefix, "mean" if base.family.kind == "encoder" else "token")
    scores = random_scores(prefix)
    last = list(prefix.sites)[-1]
    scores[last] = scores[last] - 2  # a whole site goes
    pruned = prune(prefix, scores, keep=0.4)
    assert pruned.lengths[last] == 0 and pruned.length > 0
    inputs = tiny_inputs(name)
    want, got = (base.logits(prefixes=each, **inputs) for each in (masked(prefix, pruned), pruned))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    mixed = base.logits(prefixes=[prefix, pruned], **inputs)  # in a bank, beside the whole one
    torch.testing.assert_close(mixed[1], got[1], atol=2e-4, rtol=1e-4)


def test_a_pruned_prefix_survives_the_disk(tmp_path: Path) -> None:
    base = tiny_base("bert")
    prefix = headed(base, with_gates(base, prefix_for(base, 6), "cls"), LabelToy("tagging"))
    scores = {site: torch.arange(6.0) * (1 - site.layer) for site in prefix.sites}
    pruned = prune(prefix, scores, keep=0.25)
    pruned.save(tmp_path / "p")
    loaded = fw.Prefix.load(tmp_path / "p", base)
    assert same(loaded.sites, pruned.sites) and loaded.metadata == json.loads(json.dumps(pruned.metadata))
    assert list(loaded.lengths.values()) == [3, 0] and loaded.head is not None


# Budgets


def prefix_of(lengths: list[int], heads: list[int], mass: bool) -> Prefix:
    sites = {}
    for layer, (length, kv_heads) in enumerate(zip(lengths, heads, strict=True)):
        keys, values = (torch.randn(kv_heads, length, dim) for dim in (3, 2))
        sites[Site("decoder", layer)] = SiteTensors(keys, values, torch.zeros(length) if mass else None)
    return Prefix(sites, "tiny", "")


@st.composite
def prefixes(draw: Any, alike: bool = False) -> tuple[Prefix, dict[Site, Tensor]]:
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    heads = (
        [2] * len(lengths) if alike else draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths)))
    )
    prefix = prefix_of(lengths, heads, draw(st.booleans()))
    values = st.integers(0, 4).map(float)
    return prefix, {
        site: torch.tensor(draw(st.lists(values, min_size=n, max_size=n))) for site, n in prefix.lengths.items()
    }


@given(prefixes(), st.integers(15, 400))
def test_a_budget_is_kept_and_used_up(given_: tuple[Prefix, dict[Site, Tensor]], budget: int) -> None:
    prefix, scores = given_
    costs = {s: sum(t.numel() for t in x.named().values()) // x.length for s, x in prefix.sites.items() if x.length}
    if budget < min(costs.values()):
        with pytest.raises(ConfigError, match="one slot; raise it"):
            prune(prefix, scores, budget_parameters=budget)
        return
    pruned = prune(prefix, scores, budget_parameters=budget)
    assert pruned.num_parameters <= budget and pruned.metadata["pruned"]["parameters"][1] == pruned.num_parameters
    left = [cost for site, cost in costs.items() if pruned.lengths[site] < prefix.lengths[site]]
    assert all(pruned.num_parameters + cost > budget for cost in left)
    for site, slots in kept(pruned).items():
        assert slots == sorted(set(slots))
        worst = min((float(scores[site][slot]) for slot in slots), default=math.inf)
        assert all(float(scores[site][k]) <= worst for k in range(prefix.lengths[site]) if k not in slots)


@given(prefixes(alike=True), st.floats(0.01, 1), st.floats(0.01, 1))
def test_more_to_keep_keeps_all_that_less_keeps(
    given_: tuple[Prefix, dict[Site, Tensor]], one: float, other: float
) -> None:
    prefix, scores = given_
    slots = sum(prefix.lengths.values())
    few, many = sorted((max(one, 1 / slots), max(other, 1 / slots)))
    less, more = (kept(prune(prefix, scores, keep=keep)) for keep in (few, many))
    assert all(set(less[site]) <= set(more[site]) for site in less)
    assert sum(map(len, more.values())) == math.floor(many * slots + 1e-6)


@given(prefixes())
def test_keeping_all_is_the_identity(given_: tuple[Prefix, dict[Site, Tensor]]) -> None:
    prefix, scores = given_
    pruned = prune(prefix, scores, keep=1)
    assert same(pruned.sites, prefix.sites) and pruned.num_parameters == prefix.num_parameters
    if min(prefix.lengths.values()) > 0:
        least = prune(prefix, scores, budget_parameters=prefix.num_parameters, least=min(prefix.lengths.values()))
        assert same(least.sites, prefix.sites)


def test_each_layer_keeps_the_least() -> None:
    prefix = prefix_of([4, 4, 4], [1, 1, 1], False)
    scores = {site: torch.arange(4.0) + 10 * site.layer for site in prefix.sites}
    assert list(prune(prefix, scores, keep=0.5).lengths.values()) == [0, 2, 4]
    assert list(prune(prefix, scores, keep=0.5, least=1).lengths.values()) == [1, 1, 4]
    assert kept(prune(prefix, scores, keep=0.5, least=1))[Site("decoder", 0)] == [3]
    with pytest.raises(ConfigError, match="a budget of 30 parameters; expected at least 60, 4 slots at every site"):
        prune(prefix, scores, keep=0.5, least=4)


def test_equal_slots_stay_in_order() -> None:
    prefix = prefix_of([3, 3], [1, 1], False)
    equal = {site: torch.ones(3) for site in prefix.sites}
    assert list(kept(prune(prefix, equal, keep=0.67)).values()) == [[0, 1, 2], [0]]


# Training again


@pytest.mark.parametrize("kind", ["none", "apt", "static", "mass"])
def test_a_pruned_prefix_trains_on(kind: str, tmp_path: Path) -> None:
    """From where it stood or from its birth, with its gates, also with a layer that has lost all of its slots."""
    base, task = tiny_base("bert"), LabelToy("classification")
    config = fw.TrainConfig(length=4, epochs=2, batch_size=7, gates=kind, keep_training_state=True)
    trained = train(base, None, task, config).prefix
    scores = {site: torch.tensor([3.0, 1.0, 2.0, 4.0]) * site.layer for site in trained.sites}
    pruned = prune(trained, scores, keep=0.25)
    assert list(pruned.lengths.values()) == [0, 2] and pruned.head is not None and pruned.training_state is None
    assert "metrics" not in pruned.metadata
    more = fw.TrainConfig(epochs=2, batch_size=7, gates=kind if kind == "apt" else "none")
    on = train(base, pruned, task, more, out=tmp_path / "on").prefix
    assert on.lengths == pruned.lengths and not same(on.sites, pruned.sites)
    assert on.metadata["pruned"] == pruned.metadata["pruned"]
    assert [t.gate is not None for t in on.sites.values()] == [False, kind == "apt"]
    born = rewound(base, pruned)
    assert born.head is None and born.lengths == pruned.lengths
    assert [t.gate is not None for t in born.sites.values()] == [kind == "apt"] * 2
    anew = train(base, born, task, more).prefix
    assert anew.lengths == pruned.lengths and anew.metadata["pruned"] == pruned.metadata["pruned"]


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_rewinding_gives_the_slots_as_they_were_born(name: str) -> None:
    base, task = tiny_base(name), LabelToy("classification")
    config = fw.TrainConfig(length=5, epochs=1, batch_size=7, text="Say one number.", seed=3)
    trained = train(base, None, task, config).prefix
    born = new_prefix(base, 5, "text", text="Say one number.", seed=3)
    assert not same(trained.sites, born.sites) and same(rewound(base, trained).sites, born.sites)
    once = prune(trained, random_scores(trained), keep=0.8)
    twice = prune(once, random_scores(once, 1), keep=0.5)
    want = {site: tensors.keep(torch.tensor(kept(twice)[site]).long()) for site, tensors in born.sites.items()}
    assert same(rewound(base, twice).sites, want)
    for site, slots in kept(twice).items():  # places in the prefix as it was born
        assert set(slots) <= set(kept(once)[site])
        assert torch.equal(twice.sites[site].keys, trained.sites[site].keys[:, slots])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_rewinding_gates_is_the_function_without_them(name: str) -> None:
    base = tiny_base(name)
    born = new_prefix(base, 5, "words", seed=1)
    module = moved(parametrize(born, gates=GateOptions("apt"), hidden_sizes=base.hidden_sizes))
    again = rewound(base, module.fold())
    inputs = tiny_inputs(name)
    want, got = (base.logits(prefixes=each, **inputs) for each in (born, again))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    trained = parametrize(again)
    assert trained.gates is not None and trained.gates.gate_options == GateOptions("apt")
    with torch.no_grad(), base.attachment.bound(trained()):
        torch.testing.assert_close(base.model(**inputs)[0], want, atol=2e-4, rtol=1e-4)


def test_what_cannot_be_rewound() -> None:
    base = tiny_base("llama")
    prefix = new_prefix(base, 3)
    with pytest.raises(PrefixError, match="does not say how it was born"):
        rewound(base, replace(prefix, metadata={}))
    with pytest.raises(PrefixError, match="was born from another prefix"):
        rewound(base, new_prefix(base, 3, "prefix", source=prefix))
    with pytest.raises(PrefixMismatch):
        rewound(tiny_base("bert"), prefix)
    wrong = {"pruned": {"from": {"decoder.0": 3}, "kept": {"decoder.0": [1]}}}
    with pytest.raises(PrefixError, match="a record of 1 slots at decoder.0, which has 3"):
        rewound(base, replace(prefix, metadata={**prefix.metadata, **wrong}))


# Lengths (PT-2*)


def test_lengths_follow_the_learned_ratio() -> None:
    sites = [Site("encoder", layer) for layer in range(4)]
    values = [[0.9, 0.7], [0.4, 0.4], [0.01, 0.0], [0.6, 0.6]]
    scores = {site: torch.tensor(each) for site, each in zip(sites, values, strict=True)}
    assert list(lengths_from(scores, 20).values()) == [20, 10, 0, 15]
    assert list(lengths_from(scores).values()) == [2, 1, 0, 2]
    with pytest.raises(ConfigError, match="from mean scores of up to 0"):
        lengths_from({sites[0]: torch.zeros(3)})
    with pytest.raises(ConfigError, match="lengths of up to 0 slots"):
        lengths_from(scores, 0)


@given(prefixes(), st.integers(1, 30))
def test_lengths_never_exceed_the_fixed_length(given_: tuple[Prefix, dict[Site, Tensor]], length: int) -> None:
    scores = {site: each + 0.1 for site, each in given_[1].items()}
    lengths = lengths_from(scores, length)
    assert max(lengths.values()) == length and min(lengths.values()) >= 0 and lengths.keys() == scores.keys()


def test_a_prefix_of_variable_length_is_trained_from_scratch() -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    first, second = base.geometry
    start = with_lengths(new_prefix(base, 6, text="a pub", seed=2), {first: 6, second: 2})
    assert torch.equal(start.sites[second].keys, new_prefix(base, 6, text="a pub", seed=2).sites[second].keys[:, :2])
    trained = train(base, start, task, fw.TrainConfig(epochs=1, batch_size=7)).prefix
    assert trained.lengths == {first: 6, second: 2}
    assert same(rewound(base, trained).sites, start.sites)
    with pytest.raises(ConfigError, match=r"length 7 at encoder.0; expected 0 to 6"):
        with_lengths(start, {first: 7, second: 2})
    with pytest.raises(ConfigError, match="length 0 at every site"):
        with_lengths(start, {first: 0, second: 0})
    with pytest.raises(
        PrefixMismatch, match=r"lengths for 1 sites \(decoder.0, decoder.0\); expected for 2 \(encoder.0"
    ):
        with_lengths(start, {Site("decoder", 0): 4})


# Gates of another task


def gates_of(module: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.gates.named_parameters()}


@pytest.mark.parametrize("state", [True, False], ids=["training state", "folded"])
@pytest.mark.parametrize("options", [
    GateOptions("apt"), GateOptions("apt", layers=False), GateOptions("apt", slots=False), GateOptions("static"),
    GateOptions("mass"),
], ids=lambda o: f"{o.kind}-{o.slots}-{o.layers}")  # fmt: skip
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_gates_begin_as_another_prefix_learned_them(name: str, options: GateOptions, state: bool) -> None:
    base = tiny_base(name)
    learned = moved(parametrize(prefix_for(base), gates=options, hidden_sizes=base.hidden_sizes))
    module = parametrize(prefix_for(base, seed=5), gates=options, hidden_sizes=base.hidden_sizes)
    start_gates_from(module, learned.fold(keep_training_state=state))
    for (name, got), want in zip(gates_of(module).items(), gates_of(learned).values(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, msg=name)


def test_gates_that_do_not_fit_are_refused() -> None:
    base = tiny_base("bert")

    def module(length: int = 4, of: BaseModel = base, **options: Any) -> Any:
        gates = GateOptions(**{"kind": "apt", **options})
        return parametrize(prefix_for(of, length), gates=gates, hidden_sizes=of.hidden_sizes)

    with pytest.raises(
        ConfigError,
        match=r"gates of the shapes encoder_slots \[2, 32, 5\].*; expected encoder_slots \[2, 32, 4\].*; take gates",
    ):
        start_gates_from(module(), module(5).fold())
    with pytest.raises(ConfigError, match="mean apt gates to begin from; expected cls apt gates"):
        start_gates_from(module(pooling="cls"), module().fold())
    with pytest.raises(ConfigError, match="mass gates to begin from; expected static gates"):
        start_gates_from(module(kind="static", layers=False), module(kind="mass").fold())
    with pytest.raises(ConfigError, match="gates of another prefix for one without gates"):
        start_gates_from(parametrize(prefix_for(base)), module().fold())
    with pytest.raises(PrefixError, match="a prefix without gates to begin from"):
        start_gates_from(module(), prefix_for(base))
    with pytest.raises(PrefixMismatch, match=r"gates that were learned on 'tiny-roberta' \(.*expected on 'tiny-bert'"):
        start_gates_from(module(), module(of=tiny_base("roberta")).fold())
    pruned = prune(module().fold(), {site: torch.arange(4.0) for site in prefix_for(base).sites}, keep=0.5)
    with pytest.raises(ConfigError, match=r"gates of the shapes .*\[2, 32, 2\]"):
        start_gates_from(module(), pruned)


def test_recorded_gates_are_cut_with_their_slots() -> None:
    base = tiny_base("bert")
    module = moved(parametrize(prefix_for(base), gates=GateOptions("static"), hidden_sizes=base.hidden_sizes))
    prefix = module.fold()
    pruned = prune(prefix, random_scores(prefix), keep=0.5)
    before, after = (each.metadata["gates"]["values"] for each in (prefix, pruned))
    for site, slots in kept(pruned).items():
        assert after[str(site)]["slots"] == [before[str(site)]["slots"][slot] for slot in slots]
        assert after[str(site)]["layer"] == before[str(site)]["layer"]


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither keep nor budget_parameters; expected one of both"),
        ({"keep": 0.5, "budget_parameters": 9}, "keep together with budget_parameters; expected one of both"),
        ({"keep": 0.0}, "keep 0.0; expected more than 0 and at most 1"),
        ({"keep": 1.5}, "keep 1.5"),
        ({"keep": float("nan")}, "keep nan"),
        ({"keep": 0.1}, "a budget of 3 parameters; expected at least 5, one slot"),
        ({"budget_parameters": 4}, "a budget of 4 parameters; expected at least 5, one slot"),
        ({"keep": 0.5, "least": -1}, "least -1; expected at least 0 slots at every site"),
    ],
)  # fmt: skip
def test_budgets_that_cannot_be(options: dict[str, Any], message: str) -> None:
    prefix = prefix_of([4, 2], [1, 1], False)
    with pytest.raises(ConfigError, match=message):
        prune(prefix, {site: torch.ones(n) for site, n in prefix.lengths.items()}, **options)


def test_scores_of_another_prefix_are_refused() -> None:
    prefix = prefix_of([4, 2], [1, 1], False)
    first, second = prefix.sites
    with pytest.raises(PrefixMismatch, match="3 scores at decoder.1; expected 2, one for each slot; probe this prefix"):
        prune(prefix, {first: torch.ones(4), second: torch.ones(3)}, keep=0.5)
    with pytest.raises(PrefixMismatch, match="scores for 1 sites"):
        prune(prefix, {first: torch.ones(4)}, keep=0.5)
    with pytest.raises(ConfigError, match="scores at decoder.0 that are not finite"):
        prune(prefix, {first: torch.tensor([1.0, 2.0, math.nan, 1.0]), second: torch.ones(2)}, keep=0.5)


# The commands


ROWS = [{"text": f"{word} {k}", "label": label} for k in range(12) for word, label in (("good", "yes"), ("bad", "no"))]
COLUMNS = ["--text-column", "text", "--label-column", "label"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("bert", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def last_json(out: str) -> dict[str, Any]:
    return json.loads(out.strip().splitlines()[-1])


def test_probe_prune_and_retrain(run: Run, model: str, rows: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    small = ["--epochs", "2", "--length", "4", "--batch-size", "6"]
    own = ["--dev", rows, *COLUMNS]
    status, _, err = run("train", "--base", model, "--train", rows, *own, *small, "--gates", "apt", "-o", str(folder))
    assert status == 0, err

    status, out, err = run("probe", str(folder), *own, "--limit", "20", "--json")
    assert status == 0, err
    assert {path.name for path in (folder / "probe").iterdir()} == {"probe.json", "heatmap.html", "heatmap.png"}
    assert "agreement" in out and "encoder.1" in out and f"next       foreword prune {folder} --keep 0.5 --dev" in out
    found = last_json(out)
    assert found["rows"] == 20 and Probe.load(folder / "probe").to_dict() == {
        k: found[k] for k in found if k != "folder"
    }

    stamp = (folder / "probe" / "probe.json").stat().st_mtime_ns
    status, out, err = run("prune", str(folder), "--keep", "0.5", *own, "--json")
    assert status == 0, err
    result = last_json(out)
    assert (folder / "probe" / "probe.json").stat().st_mtime_ns == stamp  # what was found is used
    assert sum(result["lengths"].values()) == 4 and result["parameters"][1] * 2 == result["parameters"][0]
    assert len(result["results"]) == 2 and result["results"][0]["rows"] == 20
    assert "--retrain continue" in out and fw.Prefix.load(folder / "pruned").lengths == {
        Site.parse(site): length for site, length in result["lengths"].items()
    }

    again = tmp_path / "again"
    start = ["--from", str(folder / "pruned")]
    status, _, err = run("train", "--base", model, "--train", rows, *own, "--epochs", "1", *start, "-o", str(again))
    assert status == 0, err
    assert fw.Prefix.load(again / "prefix").lengths == fw.Prefix.load(folder / "pruned").lengths

    status, out, err = run("prune", str(again), "--keep", "0.5", *own, "--no-evaluate", "--by", "gates")
    assert status == 0, err
    assert (again / "probe" / "probe.json").exists() and "change" not in out

    folded = tmp_path / "folded"
    status, out, err = run("fold", str(folder), "--gates", "mean", *own, "--limit", "20", "-o", str(folded), "--json")
    assert status == 0, err
    assert "change" in out and len(last_json(out)["results"]) == 2
    plain = fw.Prefix.load(folded)
    assert all(tensors.gate is None for tensors in plain.sites.values())
    assert plain.metadata["folded_gates"]["by"] == "mean" and "gates" not in plain.metadata


def test_without_matplotlib_the_page_is_written(
    run: Run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BaseModel.load(model)
    prefix = headed(base, new_prefix(base, 3), LabelToy("classification"))
    prefix.metadata["labels"] = list(LabelToy("classification").labels)
    prefix.save(tmp_path / "p")
    toy = tmp_path / "toy.jsonl"
    labels = [{"text": "one two", "label": label} for label in prefix.metadata["labels"]]
    toy.write_text("".join(json.dumps(row) + "\n" for row in labels))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run("probe", str(tmp_path / "p"), "--test", str(toy), *COLUMNS, "--split", "test")
    assert status == 0 and "no image: package 'matplotlib' is not installed" in err
    assert {path.name for path in (tmp_path / "p-probe").iterdir()} == {"probe.json", "heatmap.html"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe", "nowhere"], "nowhere"),
        (["prune", "nowhere", "--keep", "0.5"], "nowhere"),
        (["fold", "nowhere", "--gates", "median", "-o", "x"], "--gates median; expected mean"),
    ],
)
def test_errors_are_one_line(run: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*arguments)
    assert status == 1 and message in err and err.strip().splitlines()[-1].startswith("error: ")
