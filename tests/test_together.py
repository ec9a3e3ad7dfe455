"""Prefixes that are trained together: each gets what it gets alone, whatever stands beside it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.labels import LabelToy
from tests.tiny import tiny_base
from tests.toy import ToyTask, toy_config

from foreword.bank import Shared, Stacked
from foreword.base import BaseModel
from foreword.begin import begin_module
from foreword.config import TrainConfig
from foreword.errors import ConfigError, PrefixMismatch
from foreword.gates import GateInput
from foreword.objectives import Part, objective_of
from foreword.prefix import Gate, Prefix, Site, SiteTensors
from foreword.runs import RunFolder
from foreword.tasks import Split, Task
from foreword.together import SomeFailed, train_together
from foreword.train import TrainResult, train

# Runs that differ in all that is a prefix's own; 0 stands for the defaults of the toy.
DIFFERENT: tuple[dict[str, Any], ...] = (
    {"seed": 0},
    {"seed": 1, "learning_rate": 2e-2, "schedule": "cosine", "warmup_ratio": 0.3},
    {"seed": 2, "length": 7, "clip": 0.1, "weight_decay": 0.1},
    {"seed": 3, "epochs": 1, "batch_size": 3},
    {"seed": 4, "init": "random", "eval_every": 2, "patience": 1, "learning_rate": 0.5},
    {"seed": 5, "parametrization": "mlp", "hidden_size": 16},
)


def tensors(result: TrainResult) -> dict[str, torch.Tensor]:
    """All that was trained: keys, values, masses, gates, and a head's."""
    named = result.prefix.tensors()
    if result.prefix.head is not None:
        named |= {"head.weight": result.prefix.head.weight, "head.bias": result.prefix.head.bias}
    return named


def assert_same(together: TrainResult, alone: TrainResult) -> None:
    """Equal but rounding: what was trained, and all numbers but those of time and memory."""
    one, other = tensors(together), tensors(alone)
    if together.prefix.head is not None and together.prefix.head.kind == "choice":
        # What is added to all options changes nothing: its gradient is rounding, which AdamW makes a step of.
        del one["head.bias"], other["head.bias"]
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name} {text}"
        )
    for name in ("steps", "best_step", "tokens", "train_rows", "dev_rows", "trained_parameters", "head_parameters"):
        assert together.metrics[name] == alone.metrics[name], name
    assert together.metrics["best_dev_loss"] == pytest.approx(alone.metrics["best_dev_loss"], rel=1e-4)
    assert together.metrics["best_dev_score"] == alone.metrics["best_dev_score"]
    assert together.prefix.metadata.keys() == alone.prefix.metadata.keys()
    assert together.prefix.metadata["training"] == alone.prefix.metadata["training"]


def compare(base: BaseModel, task: Task | Sequence[Task], configs: Sequence[TrainConfig]) -> list[TrainResult]:
    """Train together and alone; all equal, and no two of them alike."""
    tasks = list(task) if isinstance(task, Sequence) else [task] * len(configs)
    found = train_together(base, None, task, configs)
    for own, config, result in zip(tasks, configs, found, strict=True):
        assert_same(result, train(base, None, own, config))
    return found


@pytest.mark.parametrize("model", ["llama", "gemma2", "t5"])
def test_runs_that_differ_in_everything(model: str) -> None:
    configs = [toy_config(**options) for options in DIFFERENT if model != "t5" or "parametrization" not in options]
    tasks = [ToyTask(rows=20 - 3 * place) for place in range(len(configs))]
    found = compare(tiny_base(model), tasks, configs)
    assert len({result.prefix.sha256() for result in found}) == len(configs)
    assert len({result.metrics["steps"] for result in found}) > 1  # some end before others


GATES: tuple[dict[str, Any], ...] = (
    {"gates": "apt"},
    {"gates": "apt", "gate_pooling": "prompt", "length": 6},
    {"gates": "static"},
    {"gates": "mass"},
    {},
)


def test_every_kind_of_gate_beside_the_others() -> None:
    compare(tiny_base("llama"), ToyTask(), [toy_config(**{**options, "seed": k}) for k, options in enumerate(GATES)])


@pytest.mark.parametrize("kind", ["classification", "choice", "tagging"])
def test_heads_and_what_they_drop(kind: str) -> None:
    options = [{"gates": "apt"}, {"gates": "apt", "gate_pooling": "cls"}, {"seed": 1, "head_dropout": 0.4}, {"seed": 2}]
    found = compare(tiny_base("bert"), LabelToy(kind), [toy_config(**each) for each in options])
    assert all(result.prefix.head is not None for result in found)


@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_label_words(kind: str) -> None:
    compare(tiny_base("llama"), LabelToy(kind), [toy_config(seed=seed) for seed in range(3)])


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 2}, {"micro_batch_size": 50}, {"gradient_checkpointing": True}]
)
def test_how_passes_are_cut_changes_no_more_than_rounding(options: dict[str, Any]) -> None:
    base = tiny_base("llama")
    configs = [toy_config(seed=seed) for seed in range(3)]
    cut = train_together(base, None, ToyTask(), [replace(config, **options) for config in configs])
    for own, other in zip(cut, train_together(base, None, ToyTask(), configs), strict=True):
        for name, tensor in tensors(own).items():
            torch.testing.assert_close(tensor, tensors(other)[name], rtol=1e-3, atol=1e-4)


@settings(max_examples=6)
@given(
    st.lists(
        st.fixed_dictionaries({
            "length": st.integers(1, 6), "seed": st.integers(0, 99), "batch_size": st.integers(1, 9),
            "max_steps": st.integers(1, 2), "eval_every": st.integers(1, 2),
            "learning_rate": st.sampled_from([1e-3, 1e-2]), "gates": st.sampled_from(["none", "apt", "mass"]),
        }),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_any_runs(options: list[dict[str, Any]]) -> None:
    compare(tiny_base("llama"), ToyTask(rows=9), [toy_config(**each) for each in options])


def test_prefixes_to_go_on_with_and_their_order() -> None:
    base = tiny_base("llama")
    starts = [Prefix.new(base, length, text="one two three four five") for length in (2, 5)]
    configs = [toy_config(max_steps=3), toy_config(max_steps=2)]
    for own, start, config in zip(train_together(base, starts, ToyTask(), configs), starts, configs, strict=True):
        assert own.prefix.length == start.length
        assert_same(own, train(base, start, ToyTask(), config))
    for own, config in zip(train_together(base, starts[1], ToyTask(), configs), configs, strict=True):
        assert_same(own, train(base, starts[1], ToyTask(), config))


def test_the_base_stays_as_it_is() -> None:
    base = tiny_base("llama")
    weights = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    layer = dict(vars(base.model.model.layers[0]))
    train_together(base, None, ToyTask(), [toy_config(seed=seed) for seed in range(2)])
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, weights[name]) and parameter.grad is None, name
    assert vars(base.model.model.layers[0]) == layer


def test_bfloat16_runs_stay_near_those_alone() -> None:
    base = tiny_base("llama")
    base.model.to(torch.bfloat16)
    configs = [toy_config(seed=seed, eval_every=9) for seed in range(2)]  # measured once: at the end
    start = begin_module(base, None, ToyTask(), configs[0]).fold().tensors()  # of a text: the same for both seeds

    def change(result: TrainResult) -> torch.Tensor:
        return torch.cat([(tensor - start[name]).flatten() for name, tensor in tensors(result).items()])

    together = [change(result) for result in train_together(base, None, ToyTask(), configs)]
    alone = [change(train(base, None, ToyTask(), config)) for config in configs]
    for own, other, another in zip(together, alone, reversed(alone), strict=True):
        assert (own - other).norm() < 0.02 * other.norm()
        assert (own - another).norm() > 0.2 * other.norm()


# Passes and what they read


def test_few_passes_of_like_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several runs share passes; no row is read twice in a step, and none but the right ones."""
    base = tiny_base("llama")
    passes: list[list[int]] = []
    original = base.completion_logits

    def counted(batch: dict[str, torch.Tensor], read: Any) -> Any:
        if torch.is_grad_enabled():
            passes.append(batch["attention_mask"].sum(1).tolist())
        return original(batch, read)

    monkeypatch.setattr(base, "completion_logits", counted)
    train_together(base, None, ToyTask(), [toy_config(seed=seed, max_steps=1) for seed in range(5)])
    assert sum(len(lengths) for lengths in passes) == 5 * 7 and len(passes) < 5
    bounds = [(max(lengths), min(lengths)) for lengths in passes]
    assert all(shortest >= longest for (_, shortest), (longest, _) in itertools.pairwise(bounds))


@pytest.mark.parametrize("pooling", [None, "token", "cls", "mean"])
def test_stacked_sites_give_every_row_its_owners(pooling: str | None) -> None:
    """Slots and gradients of rows with owners of different length, mass and gates, against each alone."""
    site, hidden, generator = Site("encoder", 0), 6, torch.Generator().manual_seed(0)

    def owner(length: int, mass: bool, gated: bool) -> SiteTensors:
        keys, values = (torch.randn(2, length, 4, generator=generator, requires_grad=True) for _ in range(2))
        gate = None
        if gated and pooling is not None:
            gate = Gate(torch.randn(hidden, length, generator=generator, requires_grad=True), pooling)
        return SiteTensors(
            keys, values, torch.randn(length, generator=generator, requires_grad=True) if mass else None, gate
        )

    each = [owner(3, False, True), owner(1, True, False), owner(4, True, True)]
    owners = [2, 0, 1, 0]
    query, given = torch.randn(4, 2, 5, 4, generator=generator), torch.randn(4, 5, hidden, generator=generator)
    slots = Stacked([{site: tensors} for tensors in each]).call(owners).slots(site, query, GateInput(given))
    assert slots is not None and slots.bias is not None
    for row, place in enumerate(owners):
        own = Shared({site: each[place]}).slots(site, query[row : row + 1], GateInput(given[row : row + 1]))
        assert own is not None
        width = own.keys.shape[2]
        torch.testing.assert_close(slots.keys[row : row + 1, :, :width], own.keys)
        torch.testing.assert_close(slots.values[row : row + 1, :, :width], own.values)
        bias = torch.zeros(width) if own.bias is None else own.bias.flatten()
        torch.testing.assert_close(slots.bias[row].flatten(), torch.cat([bias, torch.full((4 - width,), -math.inf)]))
        if pooling is not None:
            assert slots.gate is not None
            gate = torch.ones(1, 1, 1, width) if own.gate is None else own.gate
            torch.testing.assert_close(
                slots.gate[row : row + 1, ..., :width], gate.expand_as(slots.gate[row : row + 1, ..., :width])
            )
    (slots.keys.sum(dim=(1, 2, 3)) * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    for tensors, factor in zip(each, (1010.0, 100.0, 1.0), strict=True):
        assert tensors.keys.grad is not None and torch.equal(tensors.keys.grad, torch.full_like(tensors.keys, factor))


def test_owners_without_a_site_read_nothing_there() -> None:
    here, there, nowhere = (Site("decoder", layer) for layer in range(3))
    tensors = SiteTensors(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    call = Stacked([{here: tensors}, {here: tensors, there: tensors}]).call([0, 1])
    query, given = torch.ones(2, 1, 3, 4), GateInput(torch.ones(2, 3, 4))
    slots = call.slots(there, query, given)
    assert slots is not None and slots.bias is not None
    assert slots.bias.flatten(1).tolist() == [[-math.inf] * 2, [0.0] * 2]
    assert call.slots(nowhere, query, given) is None
    assert not call.reads_prompt


def test_losses_of_a_pass_are_those_of_its_parts() -> None:
    base = tiny_base("llama")
    objective = objective_of(base, ToyTask())
    rows = objective.encode(ToyTask().split("train"))
    sites = [Prefix.new(base, length, text="one two three four five").sites for length in (2, 4)]
    parts = [Part(objective, rows, [3, 0], owner=1), Part(objective, rows, [7], owner=0)]
    losses = objective.losses(parts, Stacked(sites))
    measured = objective.measures(parts, Stacked(sites))
    for part, (nats, count), each in zip(parts, losses, measured, strict=True):
        expected, tokens = objective.loss(rows, part.numbers, sites[part.owner])
        assert (count, each.units) == (tokens, tokens)
        torch.testing.assert_close(nats, expected)
        assert each.nats == pytest.approx(expected.item(), rel=1e-5)


# Run folders


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interrupt_at(done: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, at: int, total: int) -> None:
        if stage.startswith("training") and at >= done:
            raise KeyboardInterrupt

    return progress


def test_run_folders_are_those_of_runs_alone(tmp_path: Path) -> None:
    base, configs = tiny_base("llama"), [toy_config(seed=seed) for seed in range(2)]
    out = [tmp_path / f"run{seed}" for seed in range(2)]
    seen: list[tuple[str, int, int]] = []
    train_together(base, None, ToyTask(), configs, out=out, progress=lambda *told: seen.append(told))
    for folder, config in zip(out, configs, strict=True):
        alone = tmp_path / f"alone{config.seed}"
        train(base, None, ToyTask(), config, out=alone)
        assert sorted(path.name for path in folder.rglob("*")) == sorted(path.name for path in alone.rglob("*"))
        assert [line.keys() for line in lines(folder)] == [line.keys() for line in lines(alone)]
        for one, other in zip(lines(folder), lines(alone), strict=True):
            for name in other.keys() - {"seconds"}:
                assert one[name] == pytest.approx(other[name], rel=1e-3), name
        summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, alone)]
        assert summaries[0].keys() - summaries[1].keys() == {"together"} and summaries[0]["together"] == 2
        assert train(base, None, ToyTask(), config, out=folder).metrics == summaries[0]  # it is the same run
    assert seen[0] == ("run 1 of 2: reading train rows", 1, 20)
    assert seen[-1] == ("dev loss | 2 runs together", 18, 18)


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter run is finished before the stop; the longer one goes on where it was saved."""
    base = tiny_base("llama")
    configs, out = [toy_config(seed=0, max_steps=3), toy_config(seed=1)], [tmp_path / "short", tmp_path / "long"]
    saving = [replace(config, checkpoint_seconds=0) for config in configs]
    with pytest.raises(KeyboardInterrupt):
        train_together(base, None, ToyTask(), saving, out=out, progress=interrupt_at(8))
    assert (out[0] / "summary.json").exists() and not (out[1] / "summary.json").exists()
    before = (out[0] / "metrics.jsonl").read_bytes()
    finished: list[Path] = []
    original = RunFolder.finish
    monkeypatch.setattr(
        RunFolder, "finish", lambda self, summary: (finished.append(self.path), original(self, summary))
    )
    found = train_together(base, None, ToyTask(), configs, out=out)
    assert finished == [out[1]]
    assert (out[0] / "metrics.jsonl").read_bytes() == before
    assert [line["step"] for line in lines(out[1]) if "learning_rate" in line] == list(range(1, 10))
    for result, config in zip(found, configs, strict=True):
        assert_same(result, train(base, None, ToyTask(), config))
    again = train_together(base, None, ToyTask(), configs, out=out)
    assert [result.prefix.sha256() for result in again] == [result.prefix.sha256() for result in found]
    assert finished == [out[1]]


def test_ctrl_c_saves_all_runs(tmp_path: Path) -> None:
    import os
    import signal

    base, configs = tiny_base("llama"), [toy_config(seed=seed) for seed in range(2)]
    out = [tmp_path / f"run{seed}" for seed in range(2)]

    def press(stage: str, done: int, total: int) -> None:
        if stage.startswith("training") and done == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped after 4 of 18 steps of 2 runs"):
        train_together(base, None, ToyTask(), configs, out=out, progress=press)
    assert all((folder / "state.safetensors").exists() for folder in out)
    for result, config in zip(train_together(base, None, ToyTask(), configs, out=out), configs, strict=True):
        assert_same(result, train(base, None, ToyTask(), config))


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    base = tiny_base("llama")
    configs = [
        toy_config(seed=0),
        toy_config(seed=1, learning_rate=1e30, clip=0.0, weight_decay=1.0),
        toy_config(seed=2),
    ]
    out = [tmp_path / f"run{place}" for place in range(3)]
    message = r"run 2: .*loss is (nan|inf).*expected finite numbers; lower learning_rate"
    with pytest.raises(SomeFailed, match=message) as caught:
        train_together(base, None, ToyTask(), configs, out=out)
    results = caught.value.results
    assert [isinstance(each, TrainResult) for each in results] == [True, False, True]
    assert results[2].prefix.sha256() == Prefix.load(out[2] / "prefix", base).sha256()
    assert [(folder / "summary.json").exists() for folder in out] == [True, False, True]
    rest = train_together(base, None, ToyTask(), configs[::2], out=out[::2])
    for result, config in zip(rest, configs[::2], strict=True):
        assert_same(result, train(base, None, ToyTask(), config))


# What is refused


class Long(ToyTask):
    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
        return replace(super().split(name, limit, strict), source="another")


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ([], {}, "no configuration to train with"),
        ([{}], {"prefixes": [None, None]}, "2 prefixes for 1 configurations; expected one for each"),
        ([{}, {}], {"tasks": ["trails"]}, "1 tasks for 2 configurations"),
        ([{}, {}], {"out": ["somewhere"]}, "1 run folders for 2 configurations"),
        ([{}, {"micro_batch_size": 3}], {}, "micro_batch_size 0 and 3 in runs that share passes"),
        ([{}, {"gradient_checkpointing": True}], {}, "gradient_checkpointing False and True"),
        ([{}, {"shard": True}], {}, "shard with several prefixes"),
        ([{"tracker": "tensorboard"}], {}, "tracker with several prefixes"),
        ([{}, {}], {"tasks": [ToyTask(), LabelToy("choice")]}, "tasks of kind generation and, in run 2, choice"),
    ],
)
def test_what_cannot_be_trained_together(options: list[dict[str, Any]], more: dict[str, Any], message: str) -> None:
    given = {"prefixes": None, "tasks": ToyTask(), **more}
    with pytest.raises(ConfigError, match=message):
        train_together(tiny_base("llama"), configs=[toy_config(**each) for each in options], **given)


def test_heads_that_read_differently_are_refused() -> None:
    configs = [toy_config(head_pooling=pooling) for pooling in ("cls", "mean")]
    with pytest.raises(ConfigError, match="heads that read cls and, in run 2, mean"):
        train_together(tiny_base("bert"), None, LabelToy("classification"), configs)


def test_the_prefix_of_another_base_is_refused() -> None:
    other = Prefix.new(tiny_base("gpt2"), 4, text="a b c d")
    with pytest.raises(PrefixMismatch):
        train_together(tiny_base("llama"), [None, other], ToyTask(), [toy_config(), toy_config()])
