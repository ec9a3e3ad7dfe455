"""Several processes train one prefix together: with copies of the base (DDP) and with a sharded base (FSDP2)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.labels import LabelToy
from tests.tiny import tiny_base
from tests.toy import ToyTask, toy_config

from foreword.prefix import Prefix
from foreword.train import train

ROOT = Path(__file__).parents[1]

# Batches of 7, 7 and 6 rows over two processes, the last with a micro-batch that one of them has no row for.
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp_mlp": {"parametrization": "mlp"},
    "ddp_micro": {"micro_batch_size": 3, "batch_size": 9},
    "fsdp": {"shard": True},
    "fsdp_saving": {"shard": True, "gradient_checkpointing": True, "micro_batch_size": 2},
    "fsdp_encoder_decoder": {"shard": True, "model": "t5"},
    "ddp_head": {"model": "bert", "kind": "classification", "head_dropout": 0.3},
    "fsdp_head": {"model": "roberta", "kind": "tagging", "shard": True, "gates": "apt"},
    "fsdp_label_words": {"kind": "choice", "shard": True, "micro_batch_size": 3, "batch_size": 9},
}


def tensors_of(prefix: Prefix) -> dict[str, torch.Tensor]:
    """All that was trained."""
    head = {} if prefix.head is None else {"weight": prefix.head.weight, "bias": prefix.head.bias}
    return {**prefix.tensors(), **head}


def task_of(options: dict[str, Any]) -> Any:
    """The toy task of a run, which is taken out of its options."""
    kind = options.pop("kind", None)
    return ToyTask() if kind is None else LabelToy(kind)


def main(out: Path) -> None:
    """What each process does: all runs, one after the other."""
    from foreword.errors import RunError

    torch.set_num_threads(1)
    facts: dict[str, Any] = {}
    for name, options in RUNS.items():
        options = dict(options)
        base, task = tiny_base(options.pop("model", "llama")), task_of(options)
        local = {n: p.numel() for n, p in base.model.named_parameters()}
        result = train(base, None, task, toy_config(**options), out=out / name)
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in base.model.parameters())
        digest = sum(float(t.double().sum()) for t in tensors_of(result.prefix).values())
        facts[name] = {"held": held / sum(local.values()), "digest": digest, "metrics": result.metrics}
    # An error of the first process is raised in all, and a finished run is returned to all.
    try:
        train(tiny_base("llama"), None, ToyTask(), toy_config(seed=5), out=out / "ddp")
    except RunError as error:
        facts["refused"] = str(error)
    facts["again"] = train(tiny_base("llama"), None, ToyTask(), toy_config(), out=out / "ddp").metrics
    (out / f"facts-{os.environ['RANK']}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
    }  # fmt: skip
    code = f"from pathlib import Path; from tests.test_distributed import main; main(Path({str(out)!r}))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
    finally:
        for process in processes:
            process.kill()
    return out, [json.loads((out / f"facts-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_equal_one(name: str, results: tuple[Path, list[dict[str, Any]]]) -> None:
    out, facts = results
    options = {option: value for option, value in RUNS[name].items() if option != "shard"}
    base, task = tiny_base(options.pop("model", "llama")), task_of(options)
    alone = train(base, None, task, toy_config(**options))
    together = tensors_of(Prefix.load(out / name / "prefix", base))
    assert together.keys() == tensors_of(alone.prefix).keys()
    for part, tensor in tensors_of(alone.prefix).items():
        torch.testing.assert_close(together[part], tensor, rtol=1e-5, atol=2e-5)
    assert facts[0][name]["metrics"]["best_dev_score"] == alone.metrics["best_dev_score"]
    assert facts[0][name]["digest"] == facts[1][name]["digest"]
    assert facts[0][name]["metrics"]["best_dev_loss"] == pytest.approx(alone.metrics["best_dev_loss"], rel=1e-5)
    assert facts[0][name]["metrics"]["tokens"] == alone.metrics["tokens"]
    assert facts[0][name]["metrics"]["processes"] == 2


@pytest.mark.parametrize("name", list(RUNS))
def test_a_sharded_base_is_split(name: str, results: tuple[Path, list[dict[str, Any]]]) -> None:
    expected = 0.5 if name.startswith("fsdp") else 1.0
    assert results[1][0][name]["held"] == pytest.approx(expected, abs=0.02)


def test_all_processes_hear_of_errors_and_finished_runs(results: tuple[Path, list[dict[str, Any]]]) -> None:
    for facts in results[1]:
        assert "holds another run: seed 0 (now 5)" in facts["refused"]
        assert facts["again"]["status"] == "finished"
        assert facts["again"]["steps"] == 9
