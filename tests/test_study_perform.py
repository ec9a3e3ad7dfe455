"""One run of a study: what it reads, tunes, writes and records, with tiny models."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.studying import tiny_study
from tests.tiny import VOCAB, save_tiny

from foreword.base import BaseModel
from foreword.errors import ConfigError, DataError, MissingPackage, RunError
from foreword.evaluate import Interval, evaluate, score_outputs
from foreword.experiments import jobs_of, list_studies, load_study
from foreword.experiments.perform import TEXTS, _base, _files_hash, check, data_of, perform
from foreword.methods import METHODS, MethodConfig, fit, search_space
from foreword.prefix import Prefix
from foreword.tasks import FewShot, LowData, get_task


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A configuration with a tiny model and rows of its own."""
    yield tiny_study(tmp_path_factory.mktemp("tiny"))
    _base.cache_clear()


def run(tmp_path: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], set[str]]:
    stages: set[str] = set()
    result = perform(config, tmp_path, lambda stage, done, total: stages.add(stage))
    lines = [json.loads(line) for line in (tmp_path / TEXTS).read_text().splitlines()]
    return json.loads(json.dumps(result, allow_nan=False)), lines, stages


def test_a_run_equals_its_parts_done_by_hand(tmp_path: Path, tiny: dict[str, Any]) -> None:
    config = {**tiny, "rows": 12, "sample": 3, "seed": 1, "method": "prefix", "epochs": 2, "length": 3}
    result, lines, stages = run(tmp_path, config)
    base = BaseModel.load(tiny["base"], dtype="float32")
    task = get_task("files", train=tiny["task_train"], test=tiny["task_test"])
    source = LowData(task, 12, 3)
    fitted = fit(
        base, source.split("train"), source.split("dev"),
        MethodConfig.of("prefix", epochs=2, length=3, seed=1), instruction=task.instruction,
    )  # fmt: skip
    examples = task.split("test", limit=6).examples
    texts = fitted.generate(
        [example.prompt for example in examples],
        max_new_tokens=task.max_new_tokens,
        stop=[],
        num_beams=1,
        batch_size=20,
    )
    assert [line["text"] for line in lines] == [text.strip() for text in texts] and len(lines) == 6
    assert [line["references"] for line in lines] == [list(example.references) for example in examples]
    scores = score_outputs(task.metrics, [line["text"] for line in lines], examples)
    assert result["scores"] == {"test": {name: score._asdict() for name, score in scores.items()}}
    assert result["nats_per_token"]["test"] == pytest.approx(fitted.score(examples), rel=1e-5)
    assert result["dev_nats_per_token"] == fitted.metrics["dev_loss"]
    assert result["parameters"] == fitted.parameters and result["num_bytes"] == fitted.num_bytes
    assert result["rows"] == {"train": 12, "dev": 4} and result["test_rows"] == {"test": 6}
    assert result["chosen"] == fitted.config.to_dict() and len(result["candidates"]) == 1
    assert result["base_fingerprint"] == base.fingerprint and result["device"] == str(base.device)
    assert result["train_seconds"] > 0 and result["inference_seconds"] > 0
    assert "writing test" in stages and any(stage.startswith("training") for stage in stages)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """Configurations with labels or tags, an encoder or a decoder, by the task."""
    folder = tmp_path_factory.mktemp("labelled")
    for split, count in (("train", 40), ("test", 8)):
        texts = [(f"{split} {row}, " + ("good" if row % 2 else "bad"), "ny"[row % 2]) for row in range(count)]
        (folder / f"{split}.csv").write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in texts))
        tagged = [f"{split}{row} O\nin O\n{'Rome' if row % 2 else 'Oslo'} B-Loc\n" for row in range(count)]
        (folder / f"{split}.conll").write_text("\n".join(tagged))
    encoder = save_tiny("bert", folder / "encoder")
    decoder = save_tiny("llama", folder / "decoder", max_position_embeddings=256)
    texts = {"task": "labelled", "task_train": str(folder / "train.csv"), "task_test": str(folder / "test.csv")}
    tags = {"task": "conll", "task_train": str(folder / "train.conll"), "task_test": str(folder / "test.conll")}
    yield {
        "heads": {**texts, "base": encoder}, "words": {**texts, "base": decoder}, "tags": {**tags, "base": encoder},
    }  # fmt: skip
    _base.cache_clear()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("heads", "apt"),
        ("heads", "full"),
        ("words", "prefix"),
        ("words", "few_shot"),
        ("tags", "apt"),
        ("tags", "head"),
    ],
)
def test_labels_are_predicted_kept_and_scored(
    kind: str, method: str, tmp_path: Path, labelled: dict[str, dict[str, Any]]
) -> None:
    config = {
        **labelled[kind], "method": method, "rows_per_label": 5, "sample": 2, "seed": 1, "epochs": 2, "test_limit": 7
    }  # fmt: skip
    check(config)
    result, lines, stages = run(tmp_path, config)
    base, task = BaseModel.load(config["base"]), get_task(
        config["task"], train=config["task_train"], test=config["task_test"]
    )  # fmt: skip
    source = FewShot(task, 5, 2)
    train, dev = source.split("train"), source.split("dev")
    assert result["rows"] == {"train": len(train), "dev": len(dev)}
    assert result["data"] == {"train": train.sha256, "dev": dev.sha256}
    fitted = fit(base, train, dev, MethodConfig.of(method, epochs=2, seed=1), task=task)
    by_id = {example.id: example for example in task.split("test").examples}
    tested = [by_id[line["id"]] for line in lines]
    assert len(tested) == 7 and [line["text"] for line in lines] == fitted.predict(tested)
    for line, example in zip(lines, tested, strict=True):
        right = " ".join(example.tags) if kind == "tags" else example.label
        read = " ".join(example.words) if kind == "tags" else example.prompt
        assert line == {"test": "test", "id": example.id, "prompt": read, "text": line["text"], "references": [right]}
    assert result["nats_per_token"]["test"] == pytest.approx(fitted.score(tested), rel=1e-5)
    assert result["unit"] == ("token" if kind == "words" else "label")
    assert (result["parameters"], result["num_bytes"]) == (fitted.parameters, fitted.num_bytes)
    assert (result["inference_rows"], result["inference_tokens"]) == (7, 0) and result["inference_seconds"] > 0
    assert list(result["scores"]["test"]) == list(task.metrics) and "predicting test" in stages
    if kind != "tags":
        share = 100 * sum(line["text"] == line["references"][0] for line in lines) / 7
        assert result["scores"]["test"]["accuracy"]["value"] == pytest.approx(share)


def test_the_scores_of_labels_are_those_of_an_evaluation(tmp_path: Path, labelled: dict[str, dict[str, Any]]) -> None:
    config = {**labelled["heads"], "method": "prefix", "rows": 10, "epochs": 1}
    result, _, _ = run(tmp_path, config)
    base = BaseModel.load(config["base"])
    task = get_task("labelled", train=config["task_train"], test=config["task_test"])
    source = LowData(task, 10, 0)
    fitted = fit(base, source.split("train"), source.split("dev"), MethodConfig.of("prefix", epochs=1), task=task)
    assert isinstance(fitted.prefix, Prefix)
    found = evaluate(base, fitted.prefix, task)
    assert {name: Interval(**score) for name, score in result["scores"]["test"].items()} == found.scores


def test_tuning_tries_as_many_candidates_and_keeps_the_best(tmp_path: Path, tiny: dict[str, Any]) -> None:
    config = {**tiny, "rows": 10, "method": "lora", "tuning": 3, "epochs": 1, "rank": 2}
    result, _, stages = run(tmp_path, config)
    tried = result["candidates"]
    grid = search_space("lora", epochs=1, rank=2, seed=0)[:3]
    assert [each["config"] for each in tried] == [each.to_dict() for each in grid]
    best = min(tried, key=lambda each: each["dev_nats_per_token"])
    assert len({each["dev_nats_per_token"] for each in tried}) == 3
    assert (result["chosen"], result["dev_nats_per_token"]) == (best["config"], best["dev_nats_per_token"])
    assert result["tuning_seconds"] > sum(each["seconds"] for each in tried) > 0
    assert any(stage.startswith("candidate 3 of 3: ") for stage in stages)


def test_a_candidate_that_diverges_has_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]
) -> None:
    config = {**tiny, "rows": 10, "method": "lora", "tuning": 3, "epochs": 1, "rank": 2}
    grid = search_space("lora", epochs=1, rank=2, seed=0)[:3]
    lost = {grid[0].learning_rate, grid[2].learning_rate}

    def diverging(base: BaseModel, train: Any, dev: Any, candidates: list[MethodConfig], **options: Any) -> Any:
        for candidate in candidates:
            if candidate.learning_rate in lost:
                yield RunError("loss is nan", "finite numbers", "lower learning_rate")
            else:
                yield fit(base, train, dev, candidate, **options)

    monkeypatch.setattr("foreword.methods.fit_each", diverging)
    result, _, _ = run(tmp_path, config)
    assert [("error" in each) for each in result["candidates"]] == [True, False, True]
    assert result["chosen"] == grid[1].to_dict()
    lost.add(grid[1].learning_rate)
    with pytest.raises(RunError, match="loss is nan"):
        run(tmp_path, config)


def test_several_tests_of_one_fit_share_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]
) -> None:
    from foreword.experiments import perform as module

    whole = get_task("files", train=tiny["task_train"], test=tiny["task_test"])

    class Part:
        """The first rows under another name."""

        name, kind, metrics, max_new_tokens, stop = "part", "generation", ("exact_match",), 64, ()

        def split(self, name: str, limit: int | None = None, strict: bool = False) -> Any:
            return whole.split(name, limit=2)

    monkeypatch.setattr(module, "get_task", lambda name, **options: Part() if name == "part" else whole)
    config = {**tiny, "rows": 10, "method": "zero_shot", "tests": "part files", "metrics": "bleu exact_match"}
    result, lines, _ = run(tmp_path, config)
    assert list(result["scores"]) == ["part", "files"] and list(result["scores"]["part"]) == ["bleu", "exact_match"]
    assert result["test_rows"] == {"part": 2, "files": 6} and result["inference_rows"] == 6
    assert [line["test"] for line in lines] == ["part"] * 2 + ["files"] * 6
    assert [line["text"] for line in lines[:2]] == [line["text"] for line in lines[2:4]]


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path: Path, tiny: dict[str, Any]) -> None:
    rows = [{"prompt": "a " * words, "completion": "b"} for words in (3, 4, 600)]
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in ("prefix", "embedding", "few_shot"):
        config = {**tiny, "rows": 10, "method": method, "task_test": str(test), "epochs": 1}
        result, lines, _ = run(tmp_path, config)
        assert (result["test_rows"], result["skipped_test_rows"]) == ({"test": 2}, {"test": 1}) and len(lines) == 2
    test.write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(DataError, match="no test row of 'files' leaves 64 of the 256 tokens"):
        run(tmp_path, config)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"method": "prefix", "length": 120}, 2),  # slots take no room
        ({"method": "embedding", "length": 120}, 1),
        ({"method": "autoprompt", "length": 120, "candidates": 1, "max_steps": 1}, 1),
        ({"method": "zero_shot", "instruction": "say " * 50}, 1),
        ({"method": "few_shot", "template": "labelled", "instruction": "say " * 50}, 1),
        ({"method": "lora", "template": "last", "instruction": "say " * 50}, 1),
        ({"method": "lora", "instruction": "say " * 50}, 2),
    ],
)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_what_passes_can_be_written(
    model: str, given: dict[str, Any], kept: int, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    size = {"llama": "max_position_embeddings", "gpt2": "n_positions"}[model]
    base = save_tiny(model, tmp_path / "model", **{size: 256})
    test = tmp_path / "test.jsonl"
    rows = [{"prompt": "a " * words, "completion": "b"} for words in (3, 100)]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {**tiny, "base": base, "rows": 10, "task_test": str(test), "epochs": 1, **given}
    result, lines, _ = run(tmp_path, config)
    assert (len(lines), result["skipped_test_rows"]) == (kept, {"test": 2 - kept})


def test_what_would_stop_the_scoring_stops_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]
) -> None:
    monkeypatch.setenv("PATH", "")
    stages: set[str] = set()
    config = {**tiny, "rows": 10, "method": "lora", "metrics": "meteor"}
    with pytest.raises(MissingPackage, match="Java"):
        perform(config, tmp_path, lambda stage, done, total: stages.add(stage))
    assert not stages


def test_texts_are_kept_before_they_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(sys.modules["foreword.evaluate"], "score_outputs", broken)
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, {**tiny, "rows": 10, "method": "zero_shot"})
    assert len((tmp_path / TEXTS).read_text().splitlines()) == 6


def test_limited_rows_are_drawn_and_the_same_for_all(tmp_path: Path, tiny: dict[str, Any]) -> None:
    ids = []
    for method, seed in (("zero_shot", 0), ("few_shot", 1)):
        _, lines, _ = run(tmp_path, {**tiny, "rows": 10, "sample": seed, "method": method, "test_limit": 3})
        ids.append([line["id"] for line in lines])
    first = [example.id for example in get_task("files", test=tiny["task_test"]).split("test", limit=3).examples]
    assert ids[0] == ids[1] != first and len(ids[0]) == 3


def test_other_weights_in_the_folder_of_a_base_are_other_data(tmp_path: Path, tiny: dict[str, Any]) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny["base"], copy)
    before = data_of({**tiny, "base": str(copy), "rows": 10})
    (copy / "model.safetensors").write_bytes(b"other")
    _files_hash.cache_clear()
    assert data_of({**tiny, "base": str(copy), "rows": 10}) != before == data_of({**tiny, "rows": 10})


def test_the_instruction_can_be_other_words(tmp_path: Path, tiny: dict[str, Any]) -> None:
    config = {**tiny, "rows": 10, "method": "zero_shot"}
    own, other = (run(tmp_path, {**config, "instruction": text})[0] for text in ("", "Say it."))
    assert own["dev_nats_per_token"] != other["dev_nats_per_token"]


def test_a_process_loads_a_base_once(tmp_path: Path, tiny: dict[str, Any]) -> None:
    _base.cache_clear()
    for method in ("zero_shot", "few_shot"):
        run(tmp_path, {**tiny, "rows": 10, "method": method, "test_limit": 1})
    assert (_base.cache_info().misses, _base.cache_info().hits) == (1, 1)
    assert _base(tiny["base"], "float32").model.config.vocab_size == VOCAB


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": ""}, "no method; expected the name of a method; add method = "),
        ({"method": "magic"}, "method 'magic'; expected one of full, "),
        ({"task": "magic"}, "task 'magic'"),
        ({"task": "conll04"}, r"task = 'conll04' \(tagging\) on 'smollm2-135m' \(decoder\); expected .* is encoder"),
        (
            {"base": "minilm"},
            r"task = 'e2e' \(generation\) on 'minilm' \(encoder\); expected .* decoder or encoder-decoder",
        ),
        ({"method": "head"}, "method 'head' for task 'e2e' on 'smollm2-135m'; expected one of full, .*, autoprompt, "),
        (
            {"method": "few_shot", "task": "rte", "base": "minilm"},
            "method 'few_shot' .* expected one of full, .*, head, ",
        ),
        ({"method": "lora", "template": "first", "task": "rte", "base": "minilm"}, "template 'first' .* expected none"),
        ({"method": "autoprompt", "task": "conll04", "base": "some/model"}, "method 'autoprompt' for task 'conll04'"),
        ({"task": "rte", "beams": 5}, "beams = 5 for task 'rte'; expected 1: labels are predicted"),
        ({"task": "rte", "metrics": "bleu"}, "metric 'bleu' for task 'rte'; expected a metric of labels"),
        ({"task": "rte", "tests": "rte cb"}, r"tests = 'cb' \(classification\) for task 'rte' .* expected the same"),
        ({"tests": "rte"}, r"tests = 'rte' \(classification\) for task 'e2e' \(generation\)"),
        ({"rows_per_label": 4}, r"shots of task 'e2e' \(generation\)"),
        ({"task": "rte", "rows_per_label": 4, "rows": 8}, "rows_per_label with rows or fraction"),
        ({"tests": "e2e magic"}, "task 'magic'"),
        ({"task_words": 3}, "option 'words' of task 'e2e'"),
        ({"rows": -1}, "rows = -1; expected a whole number of at least 0; correct rows"),
        ({"rows": True}, "rows = True"),
        ({"rows": 1.5}, r"rows = 1\.5"),
        ({"beams": 0}, "beams = 0; expected a whole number of at least 1"),
        ({"fraction": 2}, "fraction = 2"),
        ({"fraction": 0.5, "rows": 5}, r"fraction = 0\.5; expected above 0 and at most 1, without rows"),
        ({"base": 3}, "base = 3; expected a text"),
        ({"metrics": "bleu magic"}, "metric 'magic'"),
        ({"tuning": 5}, "tuning = 5; expected at most 4 candidates"),
        ({"lenght": 5}, "option 'lenght' of method 'prefix'; expected 'length'"),
        ({"length": 0}, "length = 0 for method 'prefix'"),
    ],
)
def test_what_cannot_be_performed_is_told_before(given: dict[str, Any], message: str) -> None:
    check({"method": "prefix", "task": "e2e"})
    with pytest.raises(ConfigError, match=message):
        check({"method": "prefix", "task": "e2e", **given})


def test_the_data_decide_their_hash(tmp_path: Path, tiny: dict[str, Any]) -> None:
    def hashed(**given: Any) -> str:
        return data_of({**tiny, "method": "prefix", "rows": 10, **given})

    whole = hashed()
    assert hashed(seed=5, sample=2, method="lora") == whole  # these are in the configuration
    assert hashed(test_limit=5) != whole and hashed(rows=0) != whole
    changed = tmp_path / "train.jsonl"
    changed.write_text(Path(tiny["task_train"]).read_text().replace("3", "4", 1))
    assert hashed(task_train=str(changed)) != whole
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist"):
        hashed(task_test="nothing.jsonl")


@pytest.mark.parametrize("name", sorted(set(list_studies("no such folder"))))
def test_built_in_studies_can_be_performed(name: str) -> None:
    study = load_study(name, own="no such folder")
    assert study.description and len(study.runs) > 1
    for run_ in study.runs:
        check(run_.config)


def test_low_data_small_is_what_the_issue_asks_for() -> None:
    runs = load_study("low-data-small", own="no such folder").runs
    assert len(runs) == 28 and {run_.config["method"] for run_ in runs} == {
        "full", "top2", "adapter", "lora", "prompt_tuning", "prefix", "apt",
    }  # fmt: skip
    assert {run_.config["rows"] for run_ in runs} == {50, 100} and {run_.config["sample"] for run_ in runs} == {0, 1}
    assert {
        (run_.config["task"], run_.config["base"], run_.config["seed"], run_.config["test_limit"]) for run_ in runs
    } == {("e2e", "smollm2-135m", 0, 200)}
    assert {(run_.config["tuning"], run_.config["max_steps"]) for run_ in runs} == {(2, 60)}


def test_the_study_of_understanding_is_what_it_says() -> None:
    runs = load_study("understanding", own="no such folder").runs
    cells = {(run_.config["task"], run_.config["method"], run_.config["sample"]) for run_ in runs}
    methods = ("prefix", "ptuning2", "apt", "full", "lora", "adapter", "head")
    assert len(runs) == len(cells) == 84 and cells == {
        (task, method, sample) for task in ("sst2", "trec", "rte", "conll04") for method in methods
        for sample in (0, 1, 2)
    }  # fmt: skip
    assert {(run_.config["base"], run_.config["rows_per_label"]) for run_ in runs} == {("minilm", 32)}


def test_the_full_protocol_has_the_papers_cells() -> None:
    runs = load_study("low-data", own="no such folder").runs
    cells = {(run_.config["rows"], run_.config["sample"], run_.config["seed"]) for run_ in runs}
    assert cells == {(rows, sample, seed) for rows in (50, 100, 200, 500) for sample in range(5) for seed in (0, 1)}
    assert {run_.config["tuning"] for run_ in runs} == {4}
    words = {run_.config["instruction"] for run_ in load_study("initialisation").runs if "instruction" in run_.config}
    assert words == {"active", "elephant", "summarize", "table-to-text:", "banana", "beautiful", "divide", "keep"}


def test_every_method_can_be_named(tiny: dict[str, Any]) -> None:
    for method, known in METHODS.items():
        given = tiny if "decoder" in known.bases else {"task": "conll04", "base": "minilm"}
        check({**given, "method": method})
        check({**given, "method": method, "tuning": 4})


def test_real_rows_have_an_address(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREWORD_DATA", str(data_folder))
    jobs = jobs_of(load_study("low-data-small"), tmp_path)
    assert len({job.key for job in jobs}) == 28 and len({job.data for job in jobs}) == 1
