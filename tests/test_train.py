"""The training loop: what it computes, what it keeps, what it refuses."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import LoggerType
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tiny_base, tiny_model, tiny_tokenizer
from tests.toy import ToyTask, toy_config, toy_train

from foreword.base import BaseModel
from foreword.config import TrainConfig
from foreword.errors import (
    ConfigError,
    DataError,
    MissingPackage,
    PrefixError,
    PrefixMismatch,
    RunError,
    UnsupportedModel,
)
from foreword.parallel import Processes
from foreword.prefix import Prefix, Sites
from foreword.runs import RunFolder, find_prefix
from foreword.tasks import Split
from foreword.train import learning_rate, train


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(one: Prefix, other: Prefix) -> float:
    pairs = [(one.sites[site], other.sites[site]) for site in one.sites]
    return max(float((a - b).abs().max()) for x, y in pairs for a, b in ((x.keys, y.keys), (x.values, y.values)))


def loss_on(split: str, base: BaseModel, prefix: Prefix) -> float:
    rows = ToyTask().split(split).examples
    scores = base.score([e.prompt for e in rows], [e.completion for e in rows], prefix)
    return sum(s.nats for s in scores) / sum(s.tokens for s in scores)


@given(
    st.integers(1, 200), st.floats(0, 1), st.sampled_from(["linear", "cosine", "constant"]), st.floats(1e-6, 10)
)  # fmt: skip
def test_learning_rate_rises_then_falls(steps: int, warmup: float, schedule: str, peak: float) -> None:
    config = TrainConfig(learning_rate=peak, warmup_ratio=warmup, schedule=schedule)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    assert max(rates) == pytest.approx(peak)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma3_text", "bart", "t5"])
def test_training_lowers_the_loss(model: str) -> None:
    base = tiny_base(model)
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    start = Prefix.new(base, 4, text=ToyTask.instruction)
    result = train(base, start, ToyTask(), toy_config())
    assert loss_on("train", base, result.prefix) < loss_on("train", base, start)
    assert result.metrics["best_dev_loss"] == pytest.approx(loss_on("dev", base, result.prefix), rel=1e-5)
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name
    for site, tensors in result.prefix.sites.items():
        assert not torch.equal(tensors.keys, start.sites[site].keys), site
        assert not torch.equal(tensors.values, start.sites[site].values), site
    assert not base.model.training
    assert result.folder is None


def reference(base: BaseModel, prefix: Prefix, config: TrainConfig) -> Sites:
    """The same optimization, written plainly: one graph, one pass per batch."""
    from foreword.data import encode_split, epoch_batches
    from foreword.parametrization import parametrize

    module = parametrize(prefix, config.parametrization, hidden=config.hidden_size)
    rows = encode_split(base, ToyTask().split("train"))
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=config.weight_decay)
    per_epoch = math.ceil(len(rows) / config.batch_size)
    for epoch in range(config.epochs):
        for index, batch in enumerate(epoch_batches(rows.lengths, config.batch_size, config.seed, epoch)):
            rate = learning_rate(config, epoch * per_epoch + index, config.epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = rate
            nats, tokens = base.completion_loss(base.collate([rows.encoded[row] for row in batch]), module())
            optimizer.zero_grad()
            (nats / tokens).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), config.clip)
            optimizer.step()
    return module.fold().sites


@pytest.mark.parametrize("parametrization", ["direct", "mlp"])
def test_the_loop_equals_a_plain_one(parametrization: str) -> None:
    base = tiny_base("llama")
    # The dev loss is measured at the end alone, so that the last prefix is the best.
    config = toy_config(parametrization=parametrization, weight_decay=0.1, eval_every=99)
    start = Prefix.new(base, 4, text="one two three four")
    result = train(base, start, ToyTask(), config)
    plain = reference(base, start, config)
    assert difference(result.prefix, Prefix(plain, "", "")) < 1e-5


@pytest.mark.parametrize("model", ["llama", "t5"])
@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"gradient_checkpointing": True}]
)
def test_memory_savers_change_no_more_than_rounding(model: str, options: dict[str, Any]) -> None:
    plain, saver = toy_train(model=model), toy_train(model=model, **options)
    assert difference(plain.prefix, saver.prefix) < 1e-5
    assert plain.metrics["best_dev_loss"] == pytest.approx(saver.metrics["best_dev_loss"], rel=1e-5)


def test_checkpointing_leaves_the_model_as_it_was() -> None:
    base = tiny_base("llama")
    layer = base.model.model.layers[0]
    before = dict(vars(layer))
    train(base, None, ToyTask(), toy_config(gradient_checkpointing=True))
    assert vars(layer) == before


def test_bfloat16_base_trains_a_float32_prefix() -> None:
    base = BaseModel(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer(), "tiny")
    result = train(base, None, ToyTask(), toy_config(precision="bfloat16"))
    assert {t.dtype for site in result.prefix.sites.values() for t in site if t is not None} == {torch.float32}
    assert math.isfinite(result.metrics["best_dev_loss"])
    with pytest.raises(ConfigError, match="precision 'float32' with a base model in bfloat16"):
        train(base, None, ToyTask(), toy_config(precision="float32"))


def test_everything_is_seeded() -> None:
    first, again, other = toy_train(), toy_train(), toy_train(seed=1)
    assert difference(first.prefix, again.prefix) == 0
    assert difference(first.prefix, other.prefix) > 0


def test_the_random_state_of_the_caller_is_not_touched() -> None:
    before = torch.get_rng_state()
    toy_train(parametrization="mlp", init="vocab")
    assert torch.equal(before, torch.get_rng_state())


def test_patience_ends_a_run_that_gets_worse() -> None:
    result = toy_train(learning_rate=50.0, epochs=20, patience=2, schedule="constant", warmup_ratio=0.0)
    metrics = result.metrics
    assert metrics["steps"] < metrics["planned_steps"]
    assert metrics["steps"] == metrics["best_step"] + 2 * 3
    assert loss_on("dev", tiny_base("llama"), result.prefix) == pytest.approx(metrics["best_dev_loss"], rel=1e-5)


def test_max_steps_and_limits() -> None:
    metrics = toy_train(max_steps=4, train_limit=5, dev_limit=2, eval_every=2).metrics
    assert (metrics["steps"], metrics["train_rows"], metrics["dev_rows"], metrics["epochs"]) == (4, 5, 2, 4.0)


def test_the_run_folder_records_everything(tmp_path: Path) -> None:
    out = tmp_path / "run"
    base = tiny_base("llama")
    stages: list[tuple[str, int, int]] = []
    result = train(base, None, ToyTask(skipped=2), toy_config(), out=out, progress=lambda *call: stages.append(call))
    assert result.folder == out
    record = json.loads((out / "config.json").read_text())
    assert record["options"] == toy_config().to_dict()
    assert record["identity"]["base"] == base.fingerprint
    assert record["data"]["train"] | {"sha256": ""} == {
        "source": "train.toy", "sha256": "", "rows": 20,
        "skipped": [{"row": 1000, "reason": "no prompt"}, {"row": 1001, "reason": "no prompt"}],
    }  # fmt: skip
    assert {"python", "torch", "transformers"} <= record["versions"].keys()
    assert record["command"] == sys.argv
    assert record["device"] == "cpu"
    steps = [line for line in lines(out) if "nats_per_token" in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert all({"epoch", "learning_rate", "gradient_norm", "tokens", "seconds"} <= line.keys() for line in steps)
    assert [line["step"] for line in lines(out) if "dev_nats_per_token" in line] == [3, 6, 9]
    summary = json.loads((out / "summary.json").read_text())
    assert summary == result.metrics
    assert summary["status"] == "finished"
    assert summary["skipped_rows"] == 4
    assert min(summary[n] for n in ("wall_seconds", "tokens_per_second", "peak_memory_bytes")) > 0
    assert stages[-1] == (stages[-1][0], 7, 7) or stages[-1][1] == stages[-1][2]
    assert {stage.split("|")[0].strip() for stage, _, _ in stages} == {
        "reading train rows", "reading dev rows", "training", "dev loss",
    }  # fmt: skip
    kept = Prefix.load(find_prefix(out), base)
    assert difference(kept, result.prefix) == 0
    assert kept.metadata["task"] == "toy"
    assert kept.metadata["metrics"]["dev_nats_per_token"] == summary["best_dev_loss"]
    assert kept.training_state is None
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "lock", "metrics.jsonl", "prefix", "summary.json",
    ]  # fmt: skip


def test_a_trained_mlp_can_be_trained_further(tmp_path: Path) -> None:
    base = tiny_base("llama")
    config = toy_config(parametrization="mlp", keep_training_state=True)
    first = train(base, None, ToyTask(), config, out=tmp_path / "a")
    kept = Prefix.load(tmp_path / "a" / "prefix", base)
    assert kept.training_state
    second = train(base, kept, ToyTask(), toy_config(parametrization="mlp"), out=tmp_path / "b")
    assert second.metrics["best_dev_loss"] < first.metrics["best_dev_loss"]
    with pytest.raises(RunError, match="start 'prefix "):
        train(base, first.prefix.fold(), ToyTask(), toy_config(parametrization="mlp"), out=tmp_path / "b")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    original, calls = base.completion_logits, 0

    def spoiled(batch: dict[str, torch.Tensor], sites: Sites) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += torch.is_grad_enabled()
        logits, targets, rows = original(batch, sites)
        return (logits * math.nan if calls == 5 else logits), targets, rows

    monkeypatch.setattr(base, "completion_logits", spoiled)
    with pytest.raises(RunError, match="loss is nan and gradient norm nan in step 5; expected finite numbers") as error:
        train(base, None, ToyTask(), toy_config(checkpoint_seconds=0), out=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "run" / "prefix") in str(error.value)
    # The state before the bad step is still there, and so is the best prefix.
    monkeypatch.undo()
    resumed = train(base, None, ToyTask(), toy_config(checkpoint_seconds=0), out=tmp_path / "run")
    assert difference(resumed.prefix, toy_train().prefix) == 0


def test_the_best_prefix_is_written_with_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once, then when the state is saved, and the last one; never one that is not the best so far."""
    saved: list[int] = []
    original = RunFolder.save_prefix

    def save(folder: RunFolder, prefix: Prefix) -> None:
        saved.append(prefix.metadata["metrics"]["step"])
        original(folder, prefix)

    monkeypatch.setattr(RunFolder, "save_prefix", save)
    quiet = toy_train(tmp_path / "quiet", checkpoint_seconds=3600)
    assert saved == [3, 9] == [3, quiet.metrics["best_step"]]
    saved.clear()
    toy_train(tmp_path / "often", checkpoint_seconds=0)
    assert saved == [3, 6, 9]
    assert (tmp_path / "quiet/prefix/prefix.safetensors").read_bytes() == (
        tmp_path / "often/prefix/prefix.safetensors"
    ).read_bytes()


def test_what_cannot_be_trained_is_refused() -> None:
    base = tiny_base("llama")
    with pytest.raises(UnsupportedModel, match="is an encoder"):
        train(tiny_base("bert"), None, ToyTask(), toy_config())
    with pytest.raises(PrefixMismatch):
        train(base, Prefix.new(tiny_base("gpt2"), 4, text="a b c d"), ToyTask(), toy_config())
    with pytest.raises(ConfigError, match="task 'nothing'"):
        train(base, None, "nothing", toy_config())
    with pytest.raises(ConfigError, match="shard in a single process"):
        train(base, None, ToyTask(), toy_config(shard=True))
    shifted = Prefix.new(base, 4, text="a b c d")
    shifted.position_offset = 4
    with pytest.raises(PrefixError, match="position offset 4"):
        train(base, shifted, ToyTask(), toy_config())


def test_no_usable_rows_leave_no_folder(tmp_path: Path) -> None:
    class Long(ToyTask):
        def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:
            split = super().split(name, limit, strict)
            return Split(name, [e._replace(prompt="far too long " * 40) for e in split.examples], source="long.toy")

    with pytest.raises(DataError, match="no usable row in long[.]toy, 20 skipped [(]row 0: "):
        train(tiny_base("llama"), None, Long(), toy_config(), out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


TRACKIO = """
class Run(list):
    def log(self, values, step):
        self.append((step, values))
    def finish(self):
        self.append("finished")
class config:
    update = staticmethod(lambda values, allow_val_change: options.update(values))
options, run = {}, Run()
def init(project):
    return run
"""


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPackage, match="tracker 'aim' is not installed; run pip install aim"):
        Processes(torch.device("cpu"), "aim")
    # A stand-in for the package: what accelerate calls of it.
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TRACKIO])
    toy_train(tracker="trackio")
    trackio = importlib.import_module("trackio")

    assert trackio.options["length"] == 4
    steps = [entry[0] for entry in trackio.run[:-1] if "nats_per_token" in entry[1]]
    assert steps == list(range(1, 10))
    assert trackio.run[-1] == "finished"
