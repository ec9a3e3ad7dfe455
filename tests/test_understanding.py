"""Tasks of understanding from training to prediction: run folders, heads, scores, seeds, and the commands."""

from __future__ import annotations

import csv
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.labels import ENCODERS, KINDS, LabelToy, config_values
from tests.test_resume import same_run
from tests.tiny import save_tiny, tiny_base
from tests.toy import ToyTask

import foreword as fw
from foreword.errors import ConfigError, DataError, PrefixError, RunError
from foreword.evaluate import Evaluation
from foreword.metrics import get_metric
from foreword.runs import find_prefix
from foreword.seeds import evaluate_run, spread, train_seeds

FAST = {"learning_rate": 0.02, "epochs": 12}


def config(**options: Any) -> fw.TrainConfig:
    return fw.TrainConfig(**config_values(**options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ENCODERS)
def test_a_head_is_trained_saved_and_used(model: str, kind: str, tmp_path: Path) -> None:
    base, task = tiny_base(model), LabelToy(kind)
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    result = fw.train(base, None, task, config(**FAST), out=tmp_path / "run")
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.model.named_parameters())
    kept = fw.Prefix.load(find_prefix(tmp_path / "run"), base)
    assert kept.head is not None and kept.head.labels == task.labels and kept.head.kind == kind
    one, other = (fw.evaluate(base, prefix, task) for prefix in (result.prefix, kept))
    assert (one.outputs, one.scores) == (other.outputs, other.scores)
    assert one.nats_per_token is None and one.nats_per_label is not None
    assert all(output.probability is not None and 0 < output.probability <= 1 for output in one.outputs)
    assert one.parameters == {"prefix": kept.num_parameters, "head": kept.head.weight.numel() + kept.head.bias.numel()}
    losses = [line["nats_per_label"] for line in lines(tmp_path / "run") if "nats_per_label" in line]
    assert sum(losses[-3:]) < sum(losses[:3])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["score"] == task.metrics[0]
    assert kept.metadata["metrics"][f"dev_{task.metrics[0]}"] == summary["best_dev_score"]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("model", ["llama", "bart"])
@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_label_words_are_trained_and_scored(model: str, kind: str) -> None:
    base, task = tiny_base(model), LabelToy(kind)
    result = fw.train(base, None, task, config(**FAST))
    assert result.prefix.head is None and result.metrics["score"] == "accuracy"
    untouched, trained = (fw.evaluate(base, prefix, task) for prefix in (None, result.prefix))
    assert untouched.nats_per_token is not None and trained.nats_per_token is not None
    assert trained.nats_per_token < untouched.nats_per_token
    assert {output.text for output in trained.outputs} <= set(task.labels)


def test_the_measured_score_is_that_of_the_evaluation(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), LabelToy("tagging")
    result = fw.train(base, None, task, config(**FAST, dev_limit=0), out=tmp_path / "run")
    dev = fw.evaluate(base, result.prefix, task, "dev")
    assert dev.scores["entity_f1"].value == pytest.approx(result.metrics["best_dev_score"])
    assert dev.nats_per_label == pytest.approx(result.metrics["best_dev_loss"], rel=1e-5)
    measured = [line for line in lines(tmp_path / "run") if "dev_entity_f1" in line]
    best = max(line["dev_entity_f1"] for line in measured)
    assert result.metrics["best_dev_score"] == best
    losses = [line["dev_nats_per_label"] for line in measured if line["dev_entity_f1"] == best]
    assert result.metrics["best_dev_loss"] == min(losses)
    by_loss = fw.train(base, None, task, config(**FAST, dev_limit=0, select="loss"))
    assert by_loss.metrics["best_dev_loss"] == min(line["dev_nats_per_label"] for line in measured)


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_no_more_than_rounding(micro: int) -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    whole, cut = (fw.train(base, None, task, config(micro_batch_size=size)).prefix for size in (0, micro))
    assert whole.head is not None and cut.head is not None
    torch.testing.assert_close(cut.head.weight, whole.head.weight, rtol=1e-4, atol=1e-5)
    for site, tensors in whole.sites.items():
        torch.testing.assert_close(cut.sites[site].keys, tensors.keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gates", ["none", "apt", "mass"])
def test_an_interrupted_run_ends_with_the_same_bytes(gates: str, tmp_path: Path) -> None:
    base, task, options = tiny_base("bert"), LabelToy("classification"), config(gates=gates, head_learning_rate=0.05)

    def interrupt_at(step: int) -> Any:
        def progress(stage: str, done: int, total: int) -> None:
            if stage.startswith("training | loss") and done == step:
                signal.raise_signal(signal.SIGINT)

        return progress

    for step in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            fw.train(base, None, task, options, out=tmp_path / "run", progress=interrupt_at(step))
        assert (tmp_path / "run" / "state.safetensors").exists()
    fw.train(base, None, task, options, out=tmp_path / "run")
    fw.train(base, None, task, options, out=tmp_path / "whole")
    same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("gates", ["apt", "static", "mass"])
def test_gates_move_at_their_own_rate(gates: str) -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    still = fw.train(base, None, task, config(gates=gates, gate_learning_rate=1e-12))
    moved = fw.train(base, None, task, config(gates=gates, gate_learning_rate=0.3))
    assert still.prefix.metadata["training"]["gates"] == gates
    names = {"apt": "gate_weight", "static": "keys", "mass": "log_mass"}
    one, other = (next(iter(r.prefix.sites.values())).named()[names[gates]] for r in (still, moved))
    assert float((one - other).abs().max()) > 1e-2


def test_training_goes_on_from_a_head() -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    first = fw.train(base, None, task, config(**FAST))
    second = fw.train(base, first.prefix, task, config(learning_rate=1e-9, epochs=1))
    assert second.metrics["best_dev_loss"] == pytest.approx(first.metrics["best_dev_loss"], rel=1e-3)
    with pytest.raises(PrefixError, match="a head for classification"):
        fw.train(base, first.prefix, LabelToy("choice"), config())


def test_length_factor_and_options_that_change_nothing() -> None:
    result = fw.train(tiny_base("bert"), None, LabelToy("choice"), config(length=4, length_factor=1.5, max_steps=1))
    assert result.prefix.length == 6
    assert fw.TrainConfig().decisive().keys() & {"gates", "shots", "select", "head_dropout", "max_tokens"} == set()


def test_shots_are_drawn_by_the_seed_and_listed(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), LabelToy("classification", rows=40)
    results = [
        fw.train(base, None, task, config(shots=2, seed=seed, max_steps=1), out=tmp_path / f"{seed}") for seed in (0, 1)
    ]
    chosen = []
    for seed in (0, 1):
        data = json.loads((tmp_path / f"{seed}" / "config.json").read_text())["data"]
        assert data["train"]["rows"] == data["dev"]["rows"] == 6
        chosen.append({row["row"] for row in data["train"]["chosen"]})
        assert chosen[-1].isdisjoint(row["row"] for row in data["dev"]["chosen"])
    assert chosen[0] != chosen[1]
    assert results[0].metrics["train_rows"] == 6


def test_seeds_are_summed_up_and_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    out = tmp_path / "runs"
    result = train_seeds(base, None, task, config(), seeds=3, out=out)
    summary = json.loads((out / "summary.json").read_text())
    scores = result.scores["accuracy"]
    own = [
        json.loads((out / f"seed{s}" / "evaluation.json").read_text())["scores"]["accuracy"]["value"] for s in range(3)
    ]
    assert list(scores.per_seed) == own == summary["scores"]["accuracy"]["per_seed"]
    assert scores.mean == pytest.approx(np.mean(own)) and scores.std == pytest.approx(np.std(own, ddof=1))
    assert scores.low <= scores.mean <= scores.high
    assert summary["seeds"] == [0, 1, 2] and summary["test"]["rows"] == 9
    monkeypatch.setattr(sys.modules["foreword.trainer"], "Trainer", None)  # a finished run needs no trainer
    monkeypatch.setattr("foreword.seeds.evaluate", None)
    again = train_seeds(base, None, task, config(), seeds=3, out=out)
    assert again.scores == result.scores
    with pytest.raises(RunError, match="holds runs of 3 seeds; expected one of them"):
        find_prefix(out)
    with pytest.raises(RunError, match="is the folder of a single run"):
        train_seeds(base, None, task, config(), seeds=2, out=out / "seed0")


def test_an_evaluation_of_other_rows_is_done_again(tmp_path: Path) -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    run = fw.train(base, None, task, config(max_steps=1), out=tmp_path / "run")
    fw.evaluate(base, run.prefix, task, limit=2).save(tmp_path / "run" / "evaluation.json")
    assert len(evaluate_run(base, run, task).outputs) == 9
    assert Evaluation.load(tmp_path / "run" / "evaluation.json") == evaluate_run(base, run, task)
    for text in ("{}", "[]", "nonsense"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match="holds no evaluation"):
            Evaluation.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match="cannot read"):
        Evaluation.load(tmp_path / "none.json")


def test_an_evaluation_from_before_the_end_is_done_again(tmp_path: Path) -> None:
    """What was scored while a run was interrupted says nothing of the prefix that it ends with."""
    base, task, options = tiny_base("bert"), LabelToy("classification"), config(**FAST, select="loss")

    def interrupt(stage: str, done: int, total: int) -> None:
        if "training | loss" in stage and done == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fw.train(base, None, task, options, out=tmp_path / "run", progress=interrupt)
    half = fw.Prefix.load(find_prefix(tmp_path / "run"), base)
    for split, name in (("test", "evaluation.json"), ("dev", "evaluation-dev.json")):
        fw.evaluate(base, half, task, split).save(tmp_path / "run" / name)
    run = fw.train(base, None, task, options, out=tmp_path / "run")
    assert not list((tmp_path / "run").glob("evaluation*"))
    found = evaluate_run(base, run, task)
    assert found.nats_per_label == pytest.approx(fw.evaluate(base, run.prefix, task).nats_per_label)
    fw.evaluate(base, half, task, "dev").save(tmp_path / "run" / "evaluation-dev.json")
    fw.train(base, None, task, config(max_steps=1), out=tmp_path / "run", overwrite=True)
    assert not list((tmp_path / "run").glob("evaluation*"))


@pytest.mark.parametrize("gates", ["none", "apt"])
@pytest.mark.parametrize("model", ["bert", "deberta-v2", "llama", "t5"])
def test_layers_that_are_computed_twice_change_nothing(model: str, gates: str) -> None:
    base, task = tiny_base(model), LabelToy("classification")
    one, other = (
        fw.train(base, None, task, config(max_steps=2, gates=gates, gradient_checkpointing=twice)).prefix.tensors()
        for twice in (False, True)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_interval_covers_seeds_and_rows() -> None:
    metric, generator = get_metric("accuracy"), np.random.default_rng(0)
    targets = [["a"]] * 200

    def answers(chance: float) -> list[str]:
        return ["a" if right else "b" for right in generator.random(200) < chance]

    alike = spread(metric, [answers(0.7)] * 5, targets)
    assert alike.std == 0
    # One set of answers five times: what is left is the binomial spread over rows.
    wide = 2 * 1.96 * 100 * (0.7 * 0.3 / 200) ** 0.5
    assert alike.high - alike.low == pytest.approx(wide, rel=0.15)
    apart = spread(metric, [answers(chance) for chance in (0.5, 0.6, 0.7, 0.8, 0.9)], targets)
    assert apart.high - apart.low > 1.5 * (alike.high - alike.low)
    assert spread(metric, [answers(0.5)], targets).std == 0.0


def test_prediction_of_texts() -> None:
    base, task = tiny_base("bert"), LabelToy("classification", pairs=True)
    result = fw.train(base, None, task, config(**FAST))
    rows = task.split("test").examples
    found = fw.predict(base, result.prefix, [row.texts[0] for row in rows], batch_size=4)
    outputs = fw.evaluate(base, result.prefix, task).outputs
    assert [each.label for each in found] == [output.text for output in outputs]
    assert [each.probability for each in found] == pytest.approx([output.probability for output in outputs], rel=1e-4)
    assert fw.predict(base, result.prefix, []) == []
    for texts, message in [("one", "one string"), ([("a", "b", "c")], "3 texts in row 1"), ([""], "has no tokens")]:
        with pytest.raises(DataError, match=message):
            fw.predict(base, result.prefix, texts)
    with pytest.raises(PrefixError, match="a prefix that predicts no labels"):
        fw.predict(base, fw.Prefix.new(base, 3), ["a"])
    with pytest.raises(PrefixError, match="a prefix without a head predicts no labels; expected a prefix trained for"):
        fw.evaluate(base, fw.Prefix.new(base, 3), task)
    with pytest.raises(PrefixError, match="the untouched encoder without a head predicts no labels"):
        fw.evaluate(base, None, task)
    with pytest.raises(ConfigError, match="num_beams for task 'toy-classification'; expected no options of generation"):
        fw.evaluate(base, result.prefix, task, num_beams=2)
    with pytest.raises(fw.ConfigError, match="metric 'coverage' for task .*; expected a metric of labels"):
        fw.evaluate(base, result.prefix, task, metrics=["accuracy", "coverage"])
    assert list(fw.evaluate(base, result.prefix, task, metrics=["macro_f1"]).scores) == ["macro_f1"]
    task.metrics = ("ter",)
    with pytest.raises(ConfigError, match="metric 'ter' to select by for task .*; expected one of labels, higher"):
        fw.train(base, None, task, config(**FAST))
    with pytest.raises(ConfigError, match="select 'score' for task 'toy'"):
        fw.train(tiny_base("llama"), None, ToyTask(), config(select="score"))


# The commands


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("bert", tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own rows of every kind: rows.csv with labels, rows.conll with tags, and test rows of both."""
    folder = tmp_path_factory.mktemp("files")
    for name, count in (("rows", 24), ("test", 8)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "other", "label"])
            writer.writerows(
                [f"{name} {k} is " + ("low", "high")[k % 2], f"{k}?", ("no", "yes")[k % 2]] for k in range(count)
            )
        sentences = [f"the O\n{k}{name} B-NUM\npubs O\n" for k in range(count)]
        (folder / f"{name}.conll").write_text("\n".join(sentences))
    return folder


SMALL = ["--epochs", 4, "--length", 3, "--batch-size", 6, "--learning-rate", 0.02]
COLUMNS = ["--text-column", "text", "--label-column", "label"]


def test_usual_columns_are_known_and_those_of_a_run_remembered(run: Any, tmp_path: Path) -> None:
    """Nothing has to be said twice: how rows are read goes with the prefix, on decoders up to the words of labels."""
    base = save_tiny("llama", tmp_path / "model")
    for name, columns in (("usual", "text,label"), ("own", "review,verdict")):
        lines = "".join(f"good work {k},yes\nbad work {k},no\n" for k in range(8))
        (tmp_path / f"{name}.csv").write_text(f"{columns}\n{lines}")
    rows, out = tmp_path / "own.csv", tmp_path / "run"
    status, text, err = run("train", "--base", base, "--train", tmp_path / "usual.csv", *SMALL, "-o", tmp_path / "u")
    assert status == 0 and "dev accuracy" in text and "foreword predict" in text, err
    own = ["--text-column", "review", "--label-column", "verdict", "--template", "{review}\\nWell?"]
    own += ["--label-words", "Bad", "--label-words", "Good"]
    status, _, err = run("train", "--base", base, "--train", rows, *own, *SMALL, "--epochs", 12, "-o", out)
    assert status == 0, err
    status, text, err = run("evaluate", out, "--test", rows)
    assert status == 0 and "accuracy" in text, err
    outputs = json.loads((out / "evaluation.json").read_text())["outputs"]
    answers = [output["text"] for output in outputs]
    texts = [output["prompt"].removesuffix("\nWell?\n") for output in outputs]
    assert set(answers) == {"no", "yes"}, "the test would not see what is predicted"
    status, text, err = run("predict", "-p", out, texts[0], "--json")
    assert status == 0 and json.loads(text.splitlines()[-1])["predictions"][0]["label"] == answers[0], err
    loaded = fw.BaseModel.load(base)
    prefix = fw.Prefix.load(find_prefix(out), loaded)
    found = fw.predict(loaded, prefix, [{"review": text} for text in texts])
    assert [each.label for each in found] == answers
    status, _, err = run("predict", "-p", out, texts[0], "two")
    assert status == 1 and "2 text(s) in row 1; expected 1: review; give them in this order" in err
    status, _, err = run("evaluate", out, "--test", rows, "--text-column", "body")
    assert status == 1 and "no column 'body' in own.csv" in err
    status, _, err = run("train", "--from", out, "--train", rows, *SMALL, "--base", base, "-o", tmp_path / "again")
    assert status == 0, err
    again = json.loads((tmp_path / "again" / "prefix" / "prefix.json").read_text())["metadata"]["reading"]
    assert again["task"] == "labelled" and again["options"]["label_words"] == ["Bad", "Good"]
    assert again["options"]["template"] == own[5]


def test_what_is_remembered_is_for_the_same_labels_and_the_same_columns(run: Any, tmp_path: Path) -> None:
    """A label keeps its word in other files; a column that is named is read; prefixes that do not tell are refused."""
    base = save_tiny("llama", tmp_path / "model")
    rows, others = tmp_path / "rows.csv", tmp_path / "others.csv"
    lines = "".join(f"good {k},bad {k},yes\nbad {k},good {k},no\n" for k in range(8))
    rows.write_text(f"review,other,label\n{lines}")
    others.write_text("review,other,label\n" + "so so,x,maybe\ngood 1,x,yes\nbad 2,x,no\ngood 3,x,yes\n")
    own = ["--text-column", "review", "--template", "{review}\\nWell?", "--label-words", "Bad", "--label-words", "Good"]
    out = tmp_path / "run"
    status, _, err = run("train", "--base", base, "--train", rows, *own, *SMALL, "-o", out)
    assert status == 0, err
    status, _, err = run("train", "--from", out, "--base", base, "--train", others, *SMALL, "-o", tmp_path / "again")
    assert status == 0 and "row 2 of train: unknown label 'maybe' (known: no, yes)" in err
    header = json.loads((tmp_path / "again" / "prefix" / "prefix.json").read_text())["metadata"]
    assert header["labels"] == ["no", "yes"] and header["reading"]["options"]["label_words"] == ["Bad", "Good"]

    def read(*options: str) -> list[str]:
        status, _, err = run("evaluate", out, "--test", rows, "--out", tmp_path / "scored.json", *options)
        assert status == 0, err
        return [each["prompt"] for each in json.loads((tmp_path / "scored.json").read_text())["outputs"]]

    assert read()[0] == "good 0\nWell?\n", "what is shown of a row is what the decoder read"
    assert read("--text-column", "other")[0] == "bad 0\n", "a column that is named is read"
    prefix = fw.Prefix.load(find_prefix(out), fw.BaseModel.load(base))
    silent = replace(prefix, metadata={name: v for name, v in prefix.metadata.items() if name != "reading"})
    with pytest.raises(PrefixError, match="a prefix that does not tell how it reads rows"):
        fw.predict(fw.BaseModel.load(base), silent, ["good"])
    for reading in (5, {"task": "labelled", "options": {"train": "/etc/passwd"}}, {"task": "sst2", "options": {}}):
        with pytest.raises(DataError, match="a prefix (that reads rows by 'train'|whose `reading` is none)"):
            fw.predict(
                fw.BaseModel.load(base), replace(prefix, metadata={**prefix.metadata, "reading": reading}), ["x"]
            )
    for odd in ([7], [None]):
        with pytest.raises(DataError, match="in row 1"):
            fw.predict(fw.BaseModel.load(base), prefix, odd)  # type: ignore[arg-type]


def test_which_rows_a_file_has_is_told_by_its_columns(run: Any, encoder: str, tmp_path: Path) -> None:
    both = tmp_path / "both.csv"
    both.write_text("prompt,completion,text,label\n" + "a,b,c,yes\na,b,d,no\n" * 6)
    status, _, err = run("train", "--base", encoder, "--train", both, *SMALL, "-o", tmp_path / "x")
    assert status == 1 and "is an encoder and writes no completions" in err, "prompts come first"
    tags = tmp_path / "tags.conll"
    tags.write_text("\n".join(f"the O\n{k}x B-NUM\n" for k in range(12)))
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "good,yes\nbad,no\n" * 6)
    assert run("train", "--base", encoder, "--train", rows, *SMALL, "-o", tmp_path / "labels")[0] == 0
    status, _, err = run(
        "train", "--from", tmp_path / "labels", "--base", encoder, "--train", tags, *SMALL, "-o", tmp_path / "y"
    )
    assert status == 1 and "a head for classification with labels no, yes; expected one for tagging" in err


def test_references_that_a_file_lacks_are_not_asked_for(run: Any, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "model", max_position_embeddings=200)
    rows, plain = tmp_path / "rows.jsonl", tmp_path / "plain.jsonl"
    made = [{"prompt": f"{k}?", "completion": f"{k}!", "also": [f"{k}."]} for k in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    plain.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "also"}) + "\n" for row in made))
    out = tmp_path / "run"
    status, _, err = run("train", "--base", base, "--train", rows, "--references", "also", *SMALL, "-o", out)
    assert status == 0, err
    for test, reference in ((rows, ["0."]), (plain, ["0!"])):
        status, _, err = run("evaluate", out, "--test", test, "--out", tmp_path / "scored.json")
        assert status == 0, err
        assert json.loads((tmp_path / "scored.json").read_text())["outputs"][0]["references"] == reference


def test_a_decoder_reads_no_rows_otherwise_than_in_training(
    run: Any, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOREWORD_DATA", str(data_folder))
    base, rows = save_tiny("llama", tmp_path / "model", max_position_embeddings=200), tmp_path / "rows.csv"
    rows.write_text("text,label\na joy,positive\n")
    out = tmp_path / "run"
    status, _, err = run(
        "train", "sst2", "--base", base, "--train-limit", 8, "--dev-limit", 4, *SMALL, "--epochs", 1, "-o", out
    )
    assert status == 0, err
    status, _, err = run("evaluate", out, "--test", rows)
    assert status == 1 and "rows of your own for a prefix that was trained for task 'sst2'" in err
    status, text, err = run("predict", "-p", out, "a joy")
    assert status == 0 and text.split()[0] in ("negative", "positive"), err


def test_options_of_a_choice_are_predicted_by_their_text(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_DATA", str(data_folder))
    base, rows = tiny_base("bert"), [["it rained", "wet roads", "a new car", "effect"]]
    result = fw.train(base, None, "copa", config(epochs=1, train_limit=8, dev_limit=4))
    (found,) = fw.predict(base, result.prefix, rows)
    assert found.option == rows[0][int(found.label)]
    with pytest.raises(DataError, match="row 1: question 'why' is neither cause nor effect"):
        fw.predict(base, result.prefix, [[*rows[0][:3], "why"]])


def test_labels_from_own_files(run: Any, encoder: str, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    status, text, err = run(
        "train", "--base", encoder, "--train", files / "rows.csv", "--test", files / "test.csv", *COLUMNS,
        "--text-pair-column", "other", *SMALL, "--evaluate", "-o", out, "--json",
    )  # fmt: skip
    assert status == 0, err
    assert "dev accuracy" in text and "nats per label" in text and "foreword predict" in text
    assert set(json.loads(text.splitlines()[-1])["scores"]) == {"accuracy", "macro_f1"}
    saved = json.loads((out / "evaluation.json").read_text())
    status, text, err = run("evaluate", out, "--test", files / "test.csv")
    assert status == 0, err
    assert "accuracy" in text and str(out / "evaluation.json") in text
    again = json.loads((out / "evaluation.json").read_text())
    assert again["scores"] == saved["scores"] and again["outputs"] == saved["outputs"]
    assert again["record"]["seed"] == 0 and again["record"]["versions"] and again["parameters"]["head"] > 0
    status, text, _ = run("predict", "-p", out, "rows 1 is high", "1?", "--json")
    (found,) = json.loads(text.splitlines()[-1])["predictions"]
    assert status == 0 and found["label"] in ("no", "yes") and found["probability"] >= 0.5
    status, _, err = run("generate", "-p", out, "hello")
    assert status == 1 and "a prefix with a head, which predicts labels; expected one that writes text" in err


def test_tags_from_own_files_and_from_standard_input(
    run: Any, encoder: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    out = tmp_path / "tags"
    status, _, err = run("train", "--base", encoder, "--train", files / "rows.conll", *SMALL, "-o", out)
    assert status == 0, err
    status, text, err = run("evaluate", out, "--test", files / "test.conll")
    assert status == 0 and "entity_f1" in text, err
    monkeypatch.setattr(sys, "stdin", io.StringIO("the 3rows pubs\n"))
    status, text, err = run("predict", "-p", out)
    assert status == 0 and [line.split("\t")[0] for line in text.splitlines() if line] == ["the", "3rows", "pubs"], err


def test_several_seeds_in_one_command(run: Any, encoder: str, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    command = (
        "train", "--base", encoder, "--train", files / "rows.csv", "--test", files / "test.csv", *COLUMNS, *SMALL,
        "--shots", 4, "--seeds", 2, "--evaluate", "--gates", "apt", "-o", out, "--json",
    )  # fmt: skip
    status, text, err = run(*command)
    assert status == 0, err
    assert "mean ± sd" in text and "test scores" in text and "seed 1" in text
    assert json.loads(text.splitlines()[-1])["scores"]["accuracy"]["per_seed"]
    assert sorted(path.name for path in out.iterdir()) == ["seed0", "seed1", "summary.json"]
    assert run(*command)[1].splitlines()[-1].split('"started"')[0] == text.splitlines()[-1].split('"started"')[0]
    before = json.loads(text.splitlines()[-1])["scores"]
    status, text, err = run("evaluate", out, "--test", files / "test.csv", "--json")
    assert status == 0 and "all seeds" in text and "seed1" in text, err
    assert json.loads(text.splitlines()[-1])["scores"] == before
    status, _, err = run("evaluate", out, "--test", files / "test.csv", "--out", tmp_path / "scores.json")
    assert status == 1 and "for 2 seeds; expected no --out" in err
    status, text, err = run("explain", out, "--test", files / "test.csv")
    assert status == 0 and all((out / f"seed{k}" / "explain" / "explain.html").exists() for k in (0, 1)), err


OWN = ["train", "--train", "ROWS", *COLUMNS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "rte", "--label-column", "x"], "task 'rte' together with --label-column"),
        ([*OWN, "--tags-column", "t"], "--text-column together with --tags-column"),
        ([*OWN, "--text-column", "texts"], "no column 'texts'"),
        ([*OWN, "--shots", "50"], "class 'no' has"),
        ([*OWN, "--evaluate"], "--evaluate without --test"),
        ([*OWN, "--gates", "some"], "gates = 'some'; expected none, apt, static or mass"),
        ([*OWN, "--gates", "apt", "--gate-pooling", "prompt"], "gate pooling 'prompt' in an encoder"),
        ([*OWN, "--head-dropout", "1"], "head_dropout = 1.0; expected at most 0.9"),
        (["train", "trails"], "is an encoder and writes no completions"),
        (["train", "trails", "--shots", "4"], "shots of task 'trails'"),
        (["predict", "a text"], "no --prefix"),
        (["evaluate", "--task", "rte"], "the untouched encoder without a head predicts no labels"),
    ],
)
def test_errors_are_one_line(
    run: Any, encoder: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    base = [] if arguments[0] == "predict" else ["--base", encoder]
    given = [str(files / "rows.csv") if word == "ROWS" else word for word in arguments]
    status, out, err = run(*given, *base)
    assert status == 1 and not out
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "; " in last
    assert not list(tmp_path.rglob("config.json"))


def test_what_is_left_out_and_what_is_next_is_said(run: Any, encoder: str, files: Path, tmp_path: Path) -> None:
    """Own rows have to be named again; rows that cannot be used are printed; the next command keeps shots and seeds."""
    out, rows = tmp_path / "run", ["--train", files / "rows.csv"]
    few = ["--shots", 4, "--seeds", 2, "--seed", 1]
    status, text, err = run("train", "labelled", "--base", encoder, *rows, *SMALL, *few, "-o", out)
    assert status == 0 and "the same command with --evaluate and --test ROWS" in text, err
    status, _, err = run("evaluate", out / "seed1")
    assert status == 1 and "task 'labelled' and no file of your own" in err and "name them with --test" in err
    status, _, err = run("probe", out)
    assert status == 1 and "name them with --dev, or --train" in err
    odd = tmp_path / "odd.csv"
    odd.write_text("text,label\nrows 1 is high,yes\nrows 2 is odd,perhaps\n")
    status, _, err = run("evaluate", out / "seed1", "--test", odd)
    assert status == 0 and "skipped    row 3 of test: unknown label 'perhaps'" in err
    status, text, err = run("prune", out, "--keep", 0.5, *rows, "--no-evaluate", "-o", tmp_path / "half")
    command = f"foreword train labelled --train ROWS --base {encoder} --from {tmp_path / 'half'} --retrain continue"
    assert status == 0 and f"{command} --shots 4 --seed 1 --seeds 2 --out {tmp_path / 'half-retrained'}" in text, err
    with pytest.raises(PrefixError, match="foreword generate"):
        fw.predict(tiny_base("llama"), fw.Prefix.new(tiny_base("llama"), length=2, init="random"), ["a"])


def test_a_missing_metric_is_found_out_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqeval.metrics.sequence_labeling", None)
    with pytest.raises(fw.MissingPackage, match="seqeval"):
        fw.train(tiny_base("bert"), None, LabelToy("tagging"), config(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
