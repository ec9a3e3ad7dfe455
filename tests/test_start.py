"""What a run starts from: a pruned prefix as it is or as it was born, learned lengths, learned gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.labels import LabelToy, config_values
from tests.tiny import tiny_base

import foreword as fw
from foreword.errors import ConfigError, PrefixMismatch
from foreword.prefix import Prefix
from foreword.probe import beside, probe
from foreword.prune import lengths_from, prune
from foreword.runs import find_prefix
from foreword.seeds import train_seeds
from foreword.start import Start, of_seed


def config(**options: Any) -> fw.TrainConfig:
    return fw.TrainConfig(**config_values(**options))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two seeds with apt gates that have moved."""
    folder = tmp_path_factory.mktemp("learned") / "apt"
    task = LabelToy("classification")
    train_seeds(tiny_base("bert"), None, task, config(gates="apt", learning_rate=0.1), seeds=2, out=folder, test=False)
    return folder


def test_a_new_prefix_needs_no_start() -> None:
    assert Start().load(tiny_base("bert"), LabelToy("classification"), config()) is None


def test_a_pruned_prefix_goes_on_or_is_rewound(learned: Path, tmp_path: Path) -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    for seed in (0, 1):
        full = Prefix.load(find_prefix(learned / f"seed{seed}"), base)
        prune(full, probe(base, full, task).scores(), keep=0.5).save(tmp_path / "half" / f"seed{seed}")
    for seed in (0, 1):
        chosen = config(seed=seed)
        kept = Prefix.load(tmp_path / "half" / f"seed{seed}", base)
        going_on = Start(tmp_path / "half").load(base, task, chosen)
        assert going_on is not None and going_on.lengths == kept.lengths and going_on.head is not None
        for site, tensors in kept.sites.items():
            assert torch.equal(going_on.sites[site].keys, tensors.keys)
        born = Start(tmp_path / "half", "rewind").load(base, task, chosen)
        assert born is not None and born.lengths == kept.lengths and born.head is None
        assert any(not torch.equal(born.sites[site].keys, t.keys) for site, t in kept.sites.items() if t.length)
    result = train_seeds(
        base, lambda each: Start(tmp_path / "half").load(base, task, each), task, config(), seeds=2, out=tmp_path / "re"
    )
    assert [run.prefix.num_parameters for run in result.runs] == [
        Prefix.load(tmp_path / "half" / f"seed{seed}", base).num_parameters for seed in (0, 1)
    ]
    assert all(each.gate is not None for run in result.runs for each in run.prefix.sites.values() if each.length)


def test_lengths_follow_the_gates_of_the_seed(learned: Path) -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    for seed in (0, 1):
        full = Prefix.load(find_prefix(learned / f"seed{seed}"), base)
        wanted = lengths_from(probe(base, full, task).scores("gates"), 8)
        start = Start(lengths=learned).load(base, task, config(length=8, seed=seed))
        assert start is not None and start.lengths == wanted and start.length == 8
        assert all(tensors.gate is None for tensors in start.sites.values())
    probe(base, full, task).save(beside(learned / "seed1", "probe"))  # the one that is kept is read
    again = Start(lengths=learned).load(base, task, config(length=8, seed=1))
    assert again is not None and again.lengths == wanted


def test_gates_of_another_run_are_the_beginning(learned: Path) -> None:
    base, task = tiny_base("bert"), LabelToy("choice")
    start = Start(gates=learned).load(base, task, config(gates="apt", seed=1))
    source = Prefix.load(find_prefix(learned / "seed1"), base)
    assert start is not None
    for site, tensors in source.sites.items():
        gate, own = tensors.gate, start.sites[site].gate
        assert gate is not None and own is not None and torch.equal(gate.weight, own.weight)
    result = fw.train(base, start, task, config(gates="apt", seed=1))
    assert result.prefix.metadata["gates"]["kind"] == "apt" and result.prefix.head is not None


def test_gates_that_do_not_fit_are_refused(learned: Path) -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    with pytest.raises(ConfigError, match=r"gates of the shapes .*\[2, 32, 4\].*; expected .*\[2, 32, 6\]"):
        Start(gates=learned).load(base, task, config(gates="apt", length=6))
    with pytest.raises(ConfigError, match="mean apt gates to begin from; expected cls apt gates"):
        Start(gates=learned).load(base, task, config(gates="apt", gate_pooling="cls"))
    with pytest.raises(ConfigError, match="gates of another prefix for one without gates"):
        Start(gates=learned).load(base, task, config())
    with pytest.raises(PrefixMismatch, match="weights"):
        Start(learned).load(tiny_base("electra"), task, config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrain": "again"}, "retrain 'again'; expected continue or rewind"),
        ({"retrain": "rewind"}, "retrain 'rewind' without a prefix"),
        ({"prefix": Path("a"), "gates": Path("b")}, "a prefix to start from, and lengths or gates of another"),
    ],
)
def test_starts_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Start(**options)


def test_the_folder_of_a_seed(tmp_path: Path) -> None:
    (tmp_path / "several" / "seed0").mkdir(parents=True)
    (tmp_path / "one").mkdir()
    assert of_seed(tmp_path / "several", 0).name == "seed0" and of_seed(tmp_path / "one", 3).name == "one"
    with pytest.raises(ConfigError, match="no seed 3 in .*several; expected a folder of that seed"):
        of_seed(tmp_path / "several", 3)
