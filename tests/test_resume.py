"""A run that was killed or interrupted, at any moment, ends with the same bytes as one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_base
from tests.toy import ToyTask, toy_config, toy_train

from foreword.errors import RunError
from foreword.train import train

OPTIONS: dict[str, dict[str, Any]] = {
    "direct": {"epochs": 4, "weight_decay": 0.01},
    "mlp": {"epochs": 4, "parametrization": "mlp", "keep_training_state": True, "schedule": "cosine", "eval_every": 2},
}


def prefix_bytes(out: Path) -> bytes:
    return (out / "prefix" / "prefix.safetensors").read_bytes()


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def same_run(one: Path, other: Path) -> None:
    assert prefix_bytes(one) == prefix_bytes(other)
    assert metrics(one) == metrics(other)
    assert (one / "prefix" / "prefix.json").read_bytes() == (other / "prefix" / "prefix.json").read_bytes()
    assert sorted(path.name for path in one.rglob("*")) == sorted(path.name for path in other.rglob("*"))


def run(out: Path, kind: str, kill_at: int | None = None) -> None:
    """One process's life; with `kill_at` it kills itself before the so-manieth time that it touches the disk."""
    torch.set_num_threads(1)
    if kill_at is not None:
        count = 0

        def deadly(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "rename", "truncate"):
            setattr(os, name, deadly(getattr(os, name)))
    toy_train(out, checkpoint_seconds=0, **OPTIONS[kind])


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start fast: forked from one that has the modules loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume"])
    return context


@pytest.fixture(scope="module", params=list(OPTIONS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out, request.param)
    return request.param, out


def test_killed_at_any_touch_of_the_disk(whole: tuple[str, Path], processes: ForkServerContext, tmp_path: Path) -> None:
    kind, reference = whole
    generator, deaths, code = random.Random(kind), 0, -1
    while code != 0:
        process = processes.Process(target=run, args=(tmp_path / "run", kind, generator.randint(1, 40)))
        process.start()
        process.join()
        code = process.exitcode
        assert code in (0, -signal.SIGKILL)
        deaths += code != 0
    assert deaths >= 3
    same_run(tmp_path / "run", reference)


def test_killed_at_any_time(whole: tuple[str, Path], processes: ForkServerContext, tmp_path: Path) -> None:
    kind, reference = whole
    generator, deaths = random.Random(kind), 0
    for _ in range(6):
        process = processes.Process(target=run, args=(tmp_path / "run", kind))
        process.start()
        if deaths < 5:
            time.sleep(generator.uniform(0, 0.6))
            process.kill()
        process.join()
        deaths += process.exitcode != 0
    same_run(tmp_path / "run", reference)


def test_a_checkpoint_now_and_then_is_enough(whole: tuple[str, Path], tmp_path: Path) -> None:
    """A run that loses steps does them again; here all since the start and some in the middle."""
    kind, reference = whole
    base = tiny_base("llama")
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            train(base, None, ToyTask(), toy_config(**OPTIONS[kind]), out=tmp_path / "run", progress=interrupt_at(stop))
    toy_train(tmp_path / "run", **OPTIONS[kind])
    same_run(tmp_path / "run", reference)


def interrupt_at(step: int) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("training | loss") and done == step:
            signal.raise_signal(signal.SIGINT)

    return progress


def test_ctrl_c_saves_and_says_where(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    base = tiny_base("llama")
    with pytest.raises(KeyboardInterrupt, match="stopped after step 6 of 9; the same command resumes"):
        train(base, None, ToyTask(), toy_config(), out=tmp_path / "run", progress=interrupt_at(5))
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "run" / "state.safetensors").exists()
    calls: list[tuple[str, int, int]] = []
    train(base, None, ToyTask(), toy_config(), out=tmp_path / "run", progress=lambda *call: calls.append(call))
    assert [call for call in calls if call[0] == "training"] == [("training", 6, 9)]
    toy_train(tmp_path / "whole")
    same_run(tmp_path / "run", tmp_path / "whole")


def test_ctrl_c_while_the_dev_loss_is_measured(tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage.startswith("dev loss") and done == 1:
            signal.raise_signal(signal.SIGINT)

    config = toy_config(batch_size=4)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of 15"):
        train(tiny_base("llama"), None, ToyTask(), config, out=tmp_path / "run", progress=progress)
    toy_train(tmp_path / "run", batch_size=4)
    toy_train(tmp_path / "whole", batch_size=4)
    same_run(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_is_returned_not_repeated(tmp_path: Path) -> None:
    first = toy_train(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != "lock"}

    def none(stage: str, done: int, total: int) -> None:
        raise AssertionError("a finished run does nothing")

    again = train(tiny_base("llama"), None, ToyTask(), toy_config(), out=tmp_path / "run", progress=none)
    assert again.metrics == first.metrics
    assert all(torch.equal(tensors.keys, again.prefix.sites[site].keys) for site, tensors in first.prefix.sites.items())
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"learning_rate": 0.1}}, "learning_rate 0.005 .now 0.1."),
        ({"model": "qwen2"}, "base '[0-9a-f]{12}…' .now '[0-9a-f]{12}…'."),
        ({"task": ToyTask(rows=9)}, "data.train '[0-9a-f]{12}…' .now '[0-9a-f]{12}…'."),
    ],
)
def test_another_run_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    toy_train(tmp_path / "run", max_steps=1)
    base, task = tiny_base(change.get("model", "llama")), change.get("task", ToyTask())
    config = toy_config(max_steps=1, **change.get("options", {}))
    with pytest.raises(RunError, match=f"holds another run: {message}"):
        train(base, None, task, config, out=tmp_path / "run")
    train(base, None, task, config, out=tmp_path / "run", overwrite=True)


def test_neutral_options_may_change(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base("llama"), None, ToyTask(), toy_config(), out=tmp_path / "run", progress=interrupt_at(2))
    toy_train(tmp_path / "run", checkpoint_seconds=5)
    toy_train(tmp_path / "whole")
    same_run(tmp_path / "run", tmp_path / "whole")
