"""Comparing runs: scores, sizes, costs and paired differences; what is missing is said; similarity of gate patterns."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.labels import LabelToy, config_values
from tests.test_explain import call
from tests.test_gates import prefix_for, with_gates
from tests.test_plots import Reader
from tests.tiny import save_tiny, tiny_base, tiny_model, tiny_tokenizer

import foreword as fw
from foreword.compare import compare, method_words, short_names
from foreword.cost import attention_costs, forward_seconds, query_heads
from foreword.errors import ConfigError, DataError, PrefixError, RunError
from foreword.evaluate import Evaluation, evaluate, evaluation_file
from foreword.metrics import PairedDifference, get_metric
from foreword.metrics.bootstrap import paired_difference
from foreword.prefix import Prefix, Site, SiteTensors
from foreword.probe import probe
from foreword.seeds import evaluate_run, spread, train_seeds
from foreword.similarity import Pattern, compare_patterns, draw_similarity, gate_pattern, similarity
from foreword.tasks import get_task

OPTIONS = config_values(learning_rate=0.02)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `apt` and `plain` with scores, `static` without, the two seeds `seeds`, and a prefix."""
    folder = tmp_path_factory.mktemp("runs")
    base, task = tiny_base("bert"), LabelToy("classification")
    for name, gates in (("apt", "apt"), ("plain", "none"), ("static", "static")):
        result = fw.train(base, None, task, fw.TrainConfig(**OPTIONS, gates=gates), out=folder / name)
        if name != "static":
            evaluate(base, result.prefix, task).save(folder / name / "evaluation.json")
    train_seeds(base, None, task, fw.TrainConfig(**OPTIONS, shots=2), seeds=2, out=folder / "seeds")
    shutil.copytree(folder / "plain" / "prefix", folder / "prefix")
    return folder


@pytest.fixture
def own(runs: Path, tmp_path: Path) -> Path:
    """A copy of the runs to change."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


# ---- Entries


def test_what_a_run_tells_of_itself(runs: Path) -> None:
    (entry,) = compare([runs / "apt"]).entries
    summary = json.loads((runs / "apt" / "summary.json").read_text())
    scored = Evaluation.load(runs / "apt" / "evaluation.json")
    assert (entry.name, entry.kind, entry.task, entry.base) == ("apt", "run", "toy-classification", "tiny-bert")
    assert entry.method == "4 slots, apt gates (mean)" and entry.scores == scored.scores and entry.notes == []
    assert entry.prefix_parameters == 2 * (2 * 4 * 32 + 32 * 4) and entry.num_bytes == 4 * entry.prefix_parameters
    assert entry.trained_parameters == summary["trained_parameters"]
    assert (entry.train_seconds, entry.wall_seconds) == (summary["train_seconds"], summary["wall_seconds"])


def test_several_seeds_are_one_entry(runs: Path, own: Path) -> None:
    (entry,) = compare([runs / "seeds"]).entries
    kept = json.loads((runs / "seeds" / "summary.json").read_text())
    assert (entry.kind, entry.seeds, len(entry.evaluations)) == ("seeds", 2, 2)
    assert entry.method == "4 slots, 2 shots"
    accuracy = kept["scores"]["accuracy"]
    assert entry.scores["accuracy"]._asdict() == {**accuracy, "per_seed": tuple(accuracy["per_seed"])}
    assert entry.train_seconds == pytest.approx(np.mean([run["train_seconds"] for run in kept["runs"]]))
    (own / "seeds" / "summary.json").unlink()  # then the scores are spread anew
    assert compare([own / "seeds"]).entries[0].scores == entry.scores
    (own / "seeds" / "seed1" / "evaluation.json").unlink()
    (part,) = compare([own / "seeds"]).entries
    assert part.scores == {} and part.notes[0].startswith("seed1: no test score")


def test_what_is_missing_is_left_open_with_a_word_how_to_get_it(runs: Path, own: Path) -> None:
    (own / "apt" / "summary.json").unlink()
    shutil.rmtree(own / "plain" / "prefix")
    found = compare([own / name for name in ("apt", "plain", "static", "prefix")])
    _, rows = found.cost_table()
    assert rows[0][2] == "–" and rows[0][4] == "–" and rows[1][1] == "–" and rows[1][2] != "–"
    notes = "\n".join(found.notes)
    assert "apt: not finished" in notes
    assert (
        f"static: no test score (dev accuracy {_dev(own / 'static'):.1f}); foreword evaluate {own / 'static'}" in notes
    )
    assert "prefix: a prefix keeps no test score; compare its run folder" in notes
    assert found.entries[3].method == "4 slots" and found.entries[3].task == "toy-classification"
    dev = compare([own / "apt"], split="dev").notes
    assert any(f"foreword evaluate {own / 'apt'} --split dev" in note for note in dev)


def _dev(run: Path) -> float:
    return float(json.loads((run / "summary.json").read_text())["best_dev_score"])


def test_what_cannot_be_compared_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare([])
    with pytest.raises(RunError, match="is neither a run nor a prefix; expected a folder of foreword train"):
        compare([tmp_path / "nowhere"])
    (own / "apt" / "config.json").write_text("{")
    with pytest.raises(RunError, match="config.json cannot be read"):
        compare([own / "apt"])
    (own / "plain" / "evaluation.json").write_text("{}")
    with pytest.raises(DataError, match="holds no evaluation"):
        compare([own / "plain"])


def test_methods_in_words() -> None:
    base = tiny_base("bert")
    prefix = prefix_for(base)
    assert method_words(prefix, {"parametrization": "mlp"}) == "4 slots, MLP"
    assert method_words(prefix, {"gates": "static", "slot_gates": False}) == "4 slots, static gates without slot gates"
    assert method_words(with_gates(base, prefix, "cls"), {"gates": "apt"}) == "4 slots, apt gates (cls)"
    sites = dict(prefix.sites)
    sites[Site("encoder", 0)] = sites[Site("encoder", 0)].keep(torch.tensor([0]))
    assert method_words(replace(prefix, sites=sites), {}) == "1–4 slots"


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), min_size=1, max_size=5))
def test_short_names_tell_paths_apart(parts: list[list[str]]) -> None:
    paths = sorted({"/".join(each) for each in parts})
    names = short_names(paths)
    assert len(set(names)) == len(paths)
    assert all(str(Path(path).absolute()).endswith(name) for path, name in zip(paths, names, strict=True))


# ---- Differences


def gap(first: list[list[str]], second: list[list[str]], targets: list[list[str]]) -> PairedDifference:
    """How the accuracy of several seeds differs, as `compare` asks."""
    numbers = get_metric("accuracy").joint_statistics([*first, *second], targets)
    one, two = numbers[: len(first)], numbers[len(first) :]
    return paired_difference(get_metric("accuracy"), one, two, samples=1000, draw_repetitions=True)


def test_a_paired_difference_of_one_seed_is_that_of_the_rows() -> None:
    random = np.random.default_rng(0)
    targets = [["a"]] * 200
    first = ["a" if x < 0.6 else "b" for x in random.random(200)]
    second = ["a" if x < 0.8 else "b" for x in random.random(200)]
    found = gap([first], [second], targets)
    rows = np.array([100.0 * ((b == "a") - (a == "a")) for a, b in zip(first, second, strict=True)])
    assert found.difference == pytest.approx(rows.mean())
    error = rows.std() / math.sqrt(200)
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=1.0)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=1.0)
    turned = gap([second], [first], targets)
    assert (turned.difference, turned.low, turned.high) == pytest.approx((-found.difference, -found.high, -found.low))
    assert gap([first], [first], targets)[:4] == (0.0, 0.0, 0.0, 1.0)


def test_rows_in_common_make_a_difference_surer_and_seeds_less_sure() -> None:
    accuracy = get_metric("accuracy")
    random = np.random.default_rng(0)
    targets = [["a"]] * 300
    first = ["a" if x < 0.5 else "b" for x in random.random(300)]
    better = ["a" if a == "a" or x < 0.1 else "b" for a, x in zip(first, random.random(300), strict=True)]
    shuffled = list(random.permutation(np.array(better)))
    paired, apart = (gap([first], [each], targets) for each in (better, shuffled))
    assert paired.low > 0 and paired.high - paired.low < (apart.high - apart.low) / 2
    worse = ["b" if x < 0.4 else a for a, x in zip(first, random.random(300), strict=True)]
    several = gap([first, first], [better, worse], targets)
    assert several.high - several.low > 2 * (paired.high - paired.low)
    whole = spread(accuracy, [better, worse], targets).mean - spread(accuracy, [first], targets).mean
    assert several.difference == pytest.approx(whole)


def test_differences_are_from_the_first_and_of_the_same_rows(runs: Path) -> None:
    found = compare([runs / "apt", runs / "plain", runs / "seeds"])
    assert [(each.name, each.against, each.metric) for each in found.differences] == [
        (name, "apt", metric) for name in ("plain", "seeds") for metric in ("accuracy", "macro_f1")
    ]
    scores = [entry.scores["accuracy"] for entry in found.entries]
    assert found.differences[0].value == pytest.approx(scores[1].value - scores[0].value)  # type: ignore[union-attr]
    assert found.differences[2].value == pytest.approx(scores[2].mean - scores[0].value)  # type: ignore[union-attr]
    assert found.differences[0].rows == 9 and all(0 < each.p_value <= 1 for each in found.differences)
    assert str(found.differences[0]).endswith(f", p = {found.differences[0].p_value:.3f}")
    assert any(note.startswith("2 differences") for note in found.notes)
    assert any("of a single seed" in note for note in found.notes)
    assert any("of several seeds" in note for note in found.notes)
    alone = compare([runs / "seeds", runs / "seeds"])
    assert not any("of a single seed" in note for note in alone.notes)


def test_other_rows_and_other_tasks_are_not_compared(own: Path) -> None:
    path = own / "plain" / "evaluation.json"
    scored = json.loads(path.read_text())
    path.write_text(json.dumps({**scored, "data_sha256": "0" * 64}))
    found = compare([own / "apt", own / "plain"])
    assert found.differences == []
    assert found.notes[0] == "plain and apt are not comparable: they were scored on different rows (9 and 9)"
    path.write_text(json.dumps({**scored, "outputs": scored["outputs"][:-1]}))
    assert "could use different rows of the split" in compare([own / "apt", own / "plain"]).notes[0]
    path.write_text(json.dumps({**scored, "task": "rte"}))
    found = compare([own / "apt", own / "plain"])
    assert "not comparable: tasks rte and toy-classification" in found.notes[0]
    assert found.entries[1].task == "rte", "scores of other rows do not pass for those of the task of training"
    assert "plain: trained for toy-classification, scored on rte" in found.notes


@pytest.mark.parametrize(
    ("options", "other", "reason"),
    [
        ({"max_new_tokens": 8, "stop": ["\n"]}, {"max_new_tokens": 8, "stop": ["\n"], "num_beams": 1}, ""),
        ({"max_new_tokens": 8}, {"max_new_tokens": 8, "num_beams": 5}, "they were written with num_beams 5 and 1"),
        ({"max_new_tokens": 8}, {"max_new_tokens": 9}, "they were written with max_new_tokens 9 and 8"),
        ({"stop": ["\n"]}, {"stop": []}, "they were written with stop [] and ['\\n']"),
    ],
)
def test_texts_that_were_written_in_other_ways_are_not_compared(
    own: Path, options: dict[str, Any], other: dict[str, Any], reason: str
) -> None:
    def rewrite(run: Path, generation: dict[str, Any]) -> Path:
        scored = json.loads((run / "evaluation.json").read_text())
        (run / "evaluation.json").write_text(json.dumps({**scored, "generation": generation}))
        return run

    found = compare([rewrite(own / "apt", options), rewrite(own / "plain", other)])
    assert bool(found.differences) == (not reason)
    assert not reason or f"plain and apt are not comparable: {reason}" in found.notes
    rewrite(own / "seeds" / "seed0", options), rewrite(own / "seeds" / "seed1", other)
    (entry,) = compare([own / "seeds"]).entries
    assert bool(entry.scores) == (not reason)
    assert entry.notes == ([f"the scores of its seeds do not go together: {reason}"] if reason else [])


# ---- What a run keeps


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows `rows.jsonl` and a run, `run`, that learned to write their completions."""
    folder = tmp_path_factory.mktemp("writer")
    base = fw.BaseModel.load(save_tiny("llama", folder / "model", max_position_embeddings=400))
    rows = [{"prompt": f"say {word}", "completion": f"{word} {word}"} for word in ("one", "two", "three", "four")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task("files", train=folder / "rows.jsonl", metrics=["exact_match"])
    fw.train(base, None, task, fw.TrainConfig(**OPTIONS), out=folder / "run")
    return folder


def test_a_runs_own_test_scores_are_not_overwritten_by_others(writer: Path) -> None:
    from foreword.cli.evaluate import evaluate as command

    run, rows = writer / "run", writer / "rows.jsonl"

    def written(*options: object) -> str:
        before = set(run.glob("evaluation*"))
        call(command, run, "--show", 0, *options)
        return " ".join(path.name for path in set(run.glob("evaluation*")) - before)

    assert written("--test", rows, "--metrics", "bleu,chrf++") == "evaluation.json", "the task's own metrics"
    kept = (run / "evaluation.json").read_bytes()
    assert written("--test", rows, "--limit", 1) == "evaluation-limit-1.json"
    assert written("--test", rows, "--beams", 2, "--max-new-tokens", 2) == "evaluation-beams-2-tokens-2.json"
    named = ["--metrics", "exact_match, summary", "--limit", 1]
    assert written("--test", rows, *named) == "evaluation-limit-1-exact_match-summary.json"
    other = ["--task", "trails", "--limit", 1, "--max-new-tokens", 2]
    assert written(*other) == "evaluation-trails-limit-1-tokens-2.json"
    assert written(*other, "--split", "dev") == "evaluation-dev-trails-limit-1-tokens-2.json"
    assert (run / "evaluation.json").read_bytes() == kept
    found = compare([run, run], split="beams-2-tokens-2")
    assert found.entries[0].evaluations[0].generation["num_beams"] == 2 and found.differences


def test_own_rows_and_precisions_have_files_of_their_own(writer: Path, tmp_path: Path) -> None:
    from foreword.cli.evaluate import evaluate as command

    run = Path(shutil.copytree(writer / "run", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation*")))
    files = {name: tmp_path / f"{name} rows.jsonl" for name in "ab"}
    for name, path in files.items():
        path.write_text(json.dumps({"prompt": f"say {name}", "completion": name}) + "\n")
    digits = {name: get_task("files", test=path).split("test").sha256[:8] for name, path in files.items()}

    def written(name: str, *options: object) -> str:
        before = {path: path.read_bytes() for path in run.glob("evaluation*")}
        call(command, run, "--show", 0, "--max-new-tokens", 64, "--test", files[name], *options)
        assert all(path.read_bytes() == kept for path, kept in before.items())
        return " ".join(path.name for path in set(run.glob("evaluation*")) - {*before})

    assert written("b", "--limit", 1) == f"evaluation-b-rows-{digits['b']}-limit-1.json"
    assert written("b", "--dtype", "bfloat16") == f"evaluation-b-rows-{digits['b']}-bfloat16.json"
    assert written("a") == "evaluation.json", "the first are the run's own"
    assert written("b") == f"evaluation-b-rows-{digits['b']}.json"
    assert written("a", "--dtype", "bfloat16") == "evaluation-bfloat16.json"
    assert written("a", "--limit", 1) == "evaluation-limit-1.json"
    before = (run / "evaluation.json").stat().st_ino
    call(command, run, "--test", files["a"], "--strict", "--dtype", "float32")
    assert (run / "evaluation.json").stat().st_ino != before, "the same rows in the same way"
    other = Path(shutil.copytree(run, tmp_path / "other"))
    shutil.copy(run / "evaluation-bfloat16.json", other / "evaluation.json")
    note = "scored with base models in bfloat16 and float32: rounding may be part of what differs"
    assert note in compare([run, other]).notes and note not in compare([run, run]).notes


def test_a_name_that_is_cut_says_so_by_a_hash() -> None:
    names = [evaluation_file("test", ["metric-" * 25, *more]) for more in ([], ["one"], ["two"])]
    assert len(set(names)) == 3 and {len(name) for name in names} == {len("evaluation-.json") + 150}
    assert evaluation_file(names[0].removeprefix("evaluation-").removesuffix(".json")) == names[0]
    assert evaluation_file("test", ["é" * 300]).isascii()


def test_written_texts_are_kept_when_scoring_fails(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foreword.cli.evaluate import evaluate as command

    def fail(*_: Any) -> None:
        raise DataError("Java stopped", "an answer")

    monkeypatch.setattr(sys.modules["foreword.evaluate"], "score_outputs", fail)
    before = (writer / "run" / "evaluation.json").read_bytes()
    with pytest.raises(DataError, match="Java stopped"):
        call(command, writer / "run", "--test", writer / "rows.jsonl")
    assert (writer / "run" / "evaluation.json").read_bytes() == before
    kept = Evaluation.load(writer / "run" / "evaluation-unscored.json")
    assert len(kept.outputs) == 4 and kept.scores == {}


@pytest.mark.parametrize(
    ("other", "again"),
    [
        ({}, False),
        ({"generation": {"max_new_tokens": 64, "stop": []}}, False),  # one beam is what is meant
        ({"generation": {"max_new_tokens": 64, "stop": [], "num_beams": 5}}, True),
        ({"generation": {"max_new_tokens": 3, "stop": []}}, True),
        ({"task": "trails"}, True),
        ({"split": "dev"}, True),
        ({"record": {"dtype": "bfloat16"}}, True),
        ({"scores": {"bleu": {"value": 1.0, "low": 1.0, "high": 1.0}}}, True),
    ],
)
def test_a_kept_evaluation_is_taken_only_for_the_same_question(
    writer: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], again: bool
) -> None:
    base = fw.BaseModel.load(str(writer / "model"))
    rows = writer / "rows.jsonl"
    task = get_task("files", train=rows, test=rows, metrics=["exact_match"])
    kept = writer / "run" / "evaluation.json"
    run = fw.train(base, None, task, fw.TrainConfig(**OPTIONS), out=writer / "run")
    evaluate(base, run.prefix, task).save(kept)
    kept.write_text(json.dumps({**json.loads(kept.read_text()), **other}))
    asked: list[str] = []

    def count(*arguments: Any, **options: Any) -> Evaluation:
        asked.append("again")
        return evaluate(*arguments, **options)

    monkeypatch.setattr("foreword.seeds.evaluate", count)
    found = evaluate_run(base, run, task)
    assert bool(asked) == again
    assert (found.task, found.split, list(found.scores)) == ("files", "test", ["exact_match"])


# ---- Cost


def test_the_cost_of_attention_is_counted() -> None:
    base = tiny_base("llama")  # 4 query heads of 8, 2 key/value heads, 2 layers
    prefix = prefix_for(base, 5)
    (cost,) = attention_costs(prefix, 4)
    assert cost == ("decoder", 10, 2 * 4 * 5 * (8 + 8), 0, True)
    (least,) = attention_costs(prefix, None)
    assert least.multiply_adds == cost.multiply_adds // 2 and not least.exact
    (gated,) = attention_costs(with_gates(base, prefix, "token"), 4)
    assert gated.multiply_adds == cost.multiply_adds + 2 * 32 * 5 and gated.once == 0
    (pooled,) = attention_costs(with_gates(base, prefix, "prompt"), 4)
    assert (pooled.multiply_adds, pooled.once) == (cost.multiply_adds, 2 * 32 * 5)
    encoder, decoder = attention_costs(prefix_for(tiny_base("t5"), 3), 4)
    assert (encoder.token, encoder.slots, decoder.token, decoder.slots) == ("encoder", 6, "decoder", 12)


def test_query_heads_are_read_from_the_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama", "gpt2", "distilbert", "t5", "bart"):
        tiny_model(name).config.save_pretrained(tmp_path / name)
        assert query_heads(str(tmp_path / name)) == 4
    assert query_heads(str(tmp_path / "nowhere")) is None
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    assert query_heads(str(tmp_path / "odd")) is None
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "cache"))
    assert query_heads("minilm") is None  # and nothing is fetched


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "bart", "deberta-v2"])
def test_forward_passes_are_timed_and_leave_nothing_behind(name: str) -> None:
    base = tiny_base(name)
    resident = len(base.attachment.bank)
    found = forward_seconds(base, prefix_for(base), batch=2, tokens=8, repeats=3)
    assert found.without_seconds > 0 and found.with_seconds > 0 and found.ratio > 0
    assert (found.batch, found.tokens, len(base.attachment.bank)) == (2, 8, resident)


def test_each_base_model_is_loaded_once(runs: Path) -> None:
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return tiny_base("bert")

    assert compare([runs / "apt"]).notes[-1].startswith("≥")
    found = compare([runs / "apt", runs / "plain", runs / "seeds"], load=load)
    assert not any(note.startswith("≥") for note in found.notes)
    assert asked == ["tiny-bert"] and all(entry.forward is not None for entry in found.entries)
    header, rows = found.cost_table()
    assert header[-1] == "forward" and rows[0][-1].startswith("× ")


# ---- Tables


def test_tables_json_and_markdown(runs: Path) -> None:
    found = compare([runs / "apt", runs / "plain", runs / "static"])
    header, rows = found.score_table()
    assert header == ["", "method", "accuracy", "macro_f1", "Δ accuracy", "Δ macro_f1"]
    assert rows[0][4:] == ["", ""] and rows[1][4] == str(found.differences[0]) and rows[2][2:] == ["–"] * 4
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["entries"][0]["scores"]["accuracy"]["value"] == found.entries[0].scores["accuracy"][0]
    assert plain["entries"][0]["scored_rows"]["rows"] == 9 and "evaluations" not in plain["entries"][0]
    assert plain["differences"][0]["clear"] == found.differences[0].clear
    lines = found.to_markdown().splitlines()
    assert lines[1] == "| --- | --- | --- | --- | --- | --- |"
    assert all(line.count("|") == 7 for line in lines[:5])


def test_the_command(runs: Path) -> None:
    from foreword.cli.compare import compare as command

    out = call(command, runs / "apt", runs / "plain", "--json")
    assert "test scores" in out and "4 slots" in out
    assert len(json.loads(out.splitlines()[-1])["entries"]) == 2
    assert call(command, runs / "apt", "--markdown").startswith("|  | method | accuracy | macro_f1 |")


# ---- Similarity


def pattern(name: str, *rows: list[float]) -> Pattern:
    return Pattern(name, "toy", "prefix", {Site("encoder", layer): row for layer, row in enumerate(rows)})


gates = st.lists(st.floats(-2, 2, allow_subnormal=False), min_size=3, max_size=3)


@given(st.lists(st.lists(gates, min_size=4, max_size=4), min_size=2, max_size=4))
def test_similarity_is_the_correlation_and_symmetric(values: list[list[list[float]]]) -> None:
    patterns = [pattern(str(k), *rows) for k, rows in enumerate(values)]
    found = compare_patterns(patterns)
    for matrix, lists in (
        (found.by_layer, [each.profile for each in patterns]),
        (found.by_slot, [[gate for row in rows for gate in row] for rows in values]),
    ):
        for a, one in enumerate(lists):
            for b, other in enumerate(lists):
                value = matrix[a][b]
                assert value == matrix[b][a]
                if np.std(one) > 1e-6 and np.std(other) > 1e-6:
                    assert value == pytest.approx(np.corrcoef(one, other)[0, 1], abs=2e-6)


def test_layer_profiles_do_not_depend_on_the_order_of_slots() -> None:
    one = pattern("a", [0.1, 0.9], [0.4, 0.2], [0.7, 0.5], [0.0, 0.3])
    other = pattern("b", [0.9, 0.1], [0.2, 0.4], [0.5, 0.7], [0.3, 0.0])
    found = compare_patterns([one, other])
    assert found.by_layer[0][1] == pytest.approx(1.0) and (found.by_slot[0][1] or 0) < 0.5
    assert found.chance == pytest.approx(math.tanh(1.959964)) and "no common order" in found.notes[0]


def test_what_has_no_similarity_is_left_open() -> None:
    flat, own = pattern("flat", [0.5], [0.5]), pattern("own", [0.5, 0.1], [0.2, 0.2])
    found = compare_patterns([flat, own])
    assert found.by_layer == [[None, None], [None, 1.0]] and found.by_slot[0][1] is None and found.chance is None
    assert "all layers are alike in flat: no correlation" in found.notes
    assert any("different lengths" in note for note in found.notes)
    with pytest.raises(
        ConfigError, match="own has 2 encoder layers, three 3 encoder layers; expected prefixes of like"
    ):
        compare_patterns([pattern("three", [1.0], [0.5], [0.1]), own])


def test_patterns_come_from_the_prefix_or_its_probe(runs: Path, own: Path) -> None:
    kept = fw.Prefix.load(own / "static" / "prefix").metadata["gates"]["values"]
    found = gate_pattern(own / "static")
    assert found.source == "prefix" and found.task == "toy-classification"
    for site, row in found.gates.items():
        assert row == [kept[str(site)]["layer"] * gate for gate in kept[str(site)]["slots"]]
    with pytest.raises(
        PrefixError, match="the gates of apt depend on the text; expected a probe of it; foreword probe"
    ):
        gate_pattern(own / "apt")
    base = tiny_base("bert")
    probed = probe(base, fw.Prefix.load(own / "apt" / "prefix", base), LabelToy("classification"), "dev")
    probed.save(own / "apt" / "probe")
    read = gate_pattern(own / "apt")
    assert read.source == "probe" and read.gates == {site: each.gates for site, each in probed.sites.items()}
    replace(probed, prefix_sha256="0" * 64).save(own / "apt" / "probe")
    with pytest.raises(PrefixError, match="is of another prefix; expected a probe of apt"):
        gate_pattern(own / "apt")
    with pytest.raises(PrefixError, match="plain has no gates; expected a prefix with gates"):
        gate_pattern(own / "plain")


def test_masses_and_layer_gates_alone_are_patterns(tmp_path: Path) -> None:
    site = SiteTensors(torch.ones(1, 2, 4), torch.ones(1, 2, 4), torch.tensor([0.0, -torch.inf]))
    Prefix({Site("decoder", 0): site}, "tiny", "0f" * 32).save(tmp_path / "mass")
    assert gate_pattern(tmp_path / "mass").gates == {Site("decoder", 0): [1.0, 0.0]}
    layers = {"gates": {"kind": "static", "values": {"decoder.0": {"layer": 1.5}}}}
    Prefix({Site("decoder", 0): site._replace(log_mass=None)}, "tiny", "0f" * 32, metadata=layers).save(tmp_path / "l")
    assert gate_pattern(tmp_path / "l").gates == {Site("decoder", 0): [1.5, 1.5]}


def test_the_command_of_similarity(own: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from foreword.cli.similarity import similarity as command

    base, task = tiny_base("bert"), LabelToy("classification")
    train_seeds(base, None, task, fw.TrainConfig(**OPTIONS, gates="static"), seeds=2, out=own / "several", test=False)
    out = call(command, own / "static", own / "several", "--out", tmp_path / "out", "--json")
    found = json.loads(out.splitlines()[-1])
    assert found["names"] == ["static", "several/seed0", "several/seed1"]
    assert "correlation of layer profiles" in out and "similarity.png" in out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"similarity.json", "similarity.html", "similarity.png"}
    kept = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert kept["by_layer"] == found["by_layer"] and kept["layer_profiles"][0] == found["layer_profiles"][0]
    page = Reader((tmp_path / "out" / "similarity.html").read_text())
    assert "several/seed0" in page.text and len(page.all("table")) == 3
    assert page.text.count("-1") >= 2  # correlations are coloured from -1 to 1, whatever the least of them is
    with pytest.raises(ConfigError, match="1 gate pattern; expected at least two"):
        similarity([own / "static"])


def test_similarity_without_matplotlib_still_writes_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fw.MissingPackage, match="matplotlib"):
        draw_similarity(compare_patterns([pattern("a", [0.1], [0.2]), pattern("b", [0.3], [0.1])]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"similarity.json", "similarity.html"}


def test_a_measured_comparison_from_a_folder(tmp_path: Path) -> None:
    from foreword.cli.compare import compare as command

    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    base = fw.BaseModel.load(str(tmp_path / "model"))
    prefix_for(base).save(tmp_path / "prefix")
    out = call(command, tmp_path / "prefix", "--measure", "--json")
    (entry,) = json.loads(out.splitlines()[-1])["entries"]
    assert entry["forward"]["ratio"] > 0 and entry["costs"][0]["exact"]
