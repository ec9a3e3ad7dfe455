"""The report of a study: cells, differences on the same rows, verdicts, and a page that a browser can read."""

from __future__ import annotations

import json
import random
import re
import statistics
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.studying import tiny_study, write_study

from foreword.errors import RunError
from foreword.experiments.comparisons import corrected, difference, holm
from foreword.experiments.expectations import expectations
from foreword.experiments.perform import check
from foreword.experiments.plan import Study, list_studies, load_study
from foreword.experiments.published import beside
from foreword.experiments.records import Job
from foreword.experiments.report import save_report
from foreword.experiments.results import gather
from foreword.metrics import get_metric

ROWS = [f"the river {k} is long and blue" for k in range(40)]


def finished(
    folder: Path, label: str, quality: float, *, rows: int = 50, sample: int = 0, tests: tuple[str, ...] = ("test",),
    axis: str = "rows", at: Any = None, metric: str = "exact_match", parameters: int = 0, dev: float = 1.0,
    **config: Any,
) -> Job:  # fmt: skip
    """A run whose texts are right for so large a share of the rows; `axis` is what the study varies, "" for nothing."""
    at = rows if at is None else at
    chance = random.Random(f"{label}{at}{sample}")
    name = ",".join([label, *([f"{axis}={at}"] if axis else []), f"sample={sample}"])
    job_folder = folder / name
    job_folder.mkdir(parents=True)
    texts = [
        {"test": test, "id": f"r{k}", "prompt": f"p{k}\n", "references": [row],
         "text": row if chance.random() < quality else "no idea"}
        for test in tests for k, row in enumerate(ROWS)
    ]  # fmt: skip
    (job_folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    value = 100 * sum(row["text"] == row["references"][0] for row in texts) / len(texts)
    score = {"value": value, "low": value - 5, "high": value + 5}
    result = {
        "scores": {test: {metric: score} for test in tests}, "nats_per_token": dict.fromkeys(tests, 1.0),
        "parameters": parameters or {"prefix": 4000, "full": 100_000}.get(label, 800), "num_bytes": 16_000,
        "dev_nats_per_token": dev, "train_seconds": 10.0, "inference_seconds": 2.0, "inference_rows": 40,
        "candidates": [{}] * 4, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    (job_folder / "result.json").write_text(json.dumps(result))
    record = {"versions": {"torch": "2"}, "machine": "m", "code": "c", "git": {"commit": "0" * 40, "dirty": False}}
    (job_folder / "run.json").write_text(json.dumps({**record, "status": "done"}))
    values = {"method": label, "task": "e2e", "sample": sample, "seed": 0, **({axis: at} if axis else {}), **config}
    return Job(name, values, "m:f", "c", "d", str(job_folder), f"foreword study run s --only {name}")


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    return [
        finished(tmp_path, label, quality + (rows - 50) / 500, rows=rows, sample=sample)
        for label, quality in (("full", 0.3), ("prefix", 0.8), ("lora", 0.79))
        for rows in (50, 100) for sample in (0, 1)
    ]  # fmt: skip


def test_other_weights_under_one_name_are_refused(jobs: list[Job]) -> None:
    def mark(job: Job, weights: str) -> None:
        path = Path(job.folder) / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_fingerprint": weights}))

    for job in jobs:
        mark(job, "one")
    gather(jobs)
    mark(jobs[3], "two")
    with pytest.raises(RunError, match="was made with other weights of .*expected the same base model; remove"):
        gather(jobs)


def test_other_precisions_under_one_name_are_refused(jobs: list[Job]) -> None:
    """What `auto` came to; precisions that a study lists are no mistake."""
    auto = [replace(job, config={**job.config, "dtype": "auto"}) for job in jobs]
    gather(auto)
    edit(auto[3], dtype="bfloat16")
    with pytest.raises(RunError, match="in bfloat16, runs before it in float32; expected one precision for .*'auto'"):
        gather(auto)
    listed = replace(auto[3], config={**auto[3].config, "dtype": "bfloat16"})
    gather([*auto[:3], listed, *auto[4:]])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"machine": "n"}, "machine"),
        ({"threads": 1}, "threads"),
        ({"machine": "n", "threads": 1}, "machine and threads"),
    ],
)
def test_times_of_unlike_runs_are_not_left_unsaid(
    jobs: list[Job], tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    for job in jobs:
        path = Path(job.folder, "run.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "threads": 2}))
    assert "The runs differ in" not in report(tmp_path, jobs)[1]
    path = Path(jobs[0].folder, "run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert f"The runs differ in {told}: their times tell more than how methods differ." in report(tmp_path, jobs)[1]
    edit(jobs[1], device="cuda")
    assert "device" in report(tmp_path, jobs)[1].partition("The runs differ in")[2].partition(":")[0]


def test_what_was_tried_and_chosen_is_told(jobs: list[Job], tmp_path: Path) -> None:
    """With the same seed of a run in all candidates, and whether the last step was the best."""
    for number, job in enumerate(jobs):
        path = Path(job.folder) / "result.json"
        tried = [{"learning_rate": rate, "epochs": 3, "seed": number} for rate in (0.1, 0.2)]
        more = {
            "candidates": [{"config": each} for each in tried], "chosen": tried[number % 4 == 1],
            "fit": {"steps": 60, "planned_steps": 60, "best_step": 60 if number % 4 < 3 else 40},
        }  # fmt: skip
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    _, text = report(tmp_path, jobs)
    told = text.partition("## How methods were tuned")[2]
    assert "| Prefix-Tuning | 2 | learning_rate 0.1 (3), learning_rate 0.2 (1) | 60 | 3 of 4 |" in told


def test_cells_hold_repetitions_and_say_what_is_missing(jobs: list[Job], tmp_path: Path) -> None:
    absent = Job("apt,rows=50,sample=0", {**jobs[0].config, "method": "apt"}, "m:f", "c", "d", str(tmp_path / "none"))
    results = gather([*jobs, absent])
    assert [(cell.label, cell.place, len(cell.results)) for cell in results.cells] == [
        (label, float(rows), 2) for label in ("full", "prefix", "lora") for rows in (50, 100)
    ]
    assert results.missing == (absent,) and results.place == "rows" and results.panels == [""]
    cell = results.cells[0]
    values = [each["scores"]["test"]["exact_match"]["value"] for each in cell.results.values()]
    found = cell.score("test", "exact_match")
    assert (found.mean, found.low, found.high) == (sum(values) / 2, min(values), max(values))


def test_a_difference_is_that_of_the_means_and_beyond_noise_only_where_it_is(jobs: list[Job]) -> None:
    results = gather(jobs)
    full, prefix, lora = (next(c for c in results.of("", label, 50.0)) for label in ("full", "prefix", "lora"))
    found = difference(full, prefix, "test", "exact_match")
    assert found is not None and found.runs == 2
    mean = prefix.score("test", "exact_match").mean - full.score("test", "exact_match").mean
    assert found.found.difference == pytest.approx(mean)
    assert found.found.low > 0 and found.found.p_value < 0.01
    close = difference(lora, prefix, "test", "exact_match")
    assert close is not None and close.found.low <= 0 <= close.found.high and close.found.p_value > 0.05


def test_a_difference_of_corpus_scores_is_that_of_their_means(tmp_path: Path) -> None:
    """Too short in one run and too long in another is no better for it, as it would be if their texts were pooled."""
    cells, jobs = {}, []
    for label, texts in (("full", ("a b", "a b c d e f g h")), ("prefix", ("a b c d f", "a b c d f"))):
        for sample, text in enumerate(texts):
            jobs.append(finished(tmp_path, label, 1.0, sample=sample, metric="bleu"))
            rows = [{"test": "test", "id": f"r{k}", "prompt": "", "text": text, "references": ["a b c d e"]}
                    for k in range(30)]  # fmt: skip
            Path(jobs[-1].folder, "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        cells[label] = statistics.fmean(get_metric("bleu")([text] * 30, [["a b c d e"]] * 30) for text in texts)
    full, prefix = (next(c for c in gather(jobs).of("", label, 50.0)) for label in ("full", "prefix"))
    found = difference(full, prefix, "test", "bleu")
    assert found is not None and found.found.difference == pytest.approx(cells["prefix"] - cells["full"])


def test_texts_may_hold_any_end_of_line_but_their_own(tmp_path: Path) -> None:
    job = finished(tmp_path, "prefix", 1.0)
    row = {"test": "test", "id": "r", "prompt": "", "text": "a\u2028b\u0085c", "references": ["a"]}
    Path(job.folder, "texts.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (cell,) = gather([job]).cells
    assert [each["text"] for each in cell.texts((0, 0), "test")] == ["a\u2028b\u0085c"]


def test_rows_count_once_however_often_they_were_written_for(tmp_path: Path) -> None:
    once = gather([finished(tmp_path / "a", label, q) for label, q in (("full", 0.5), ("prefix", 0.7))])
    same = []
    for sample in (0, 1, 2, 3):  # the same texts four times
        for job in (finished(tmp_path / f"b{sample}", label, q) for label, q in (("full", 0.5), ("prefix", 0.7))):
            config = {**job.config, "sample": sample}
            same.append(Job(job.name.replace("sample=0", f"sample={sample}"), config, "m:f", "c", "d", job.folder))
    often = gather(same)
    first = difference(*once.cells, "test", "exact_match")
    second = difference(*often.cells, "test", "exact_match")
    assert first is not None and second is not None and second.runs == 4
    assert second.found == pytest.approx(first.found), "four copies are no more evidence than one"


def verdicts(jobs: list[Job]) -> dict[str, str]:
    """By the first words of the statements."""
    return {" ".join(each.statement.split()[:4]): each.verdict for each in expectations(gather(jobs))}


def pair(folder: Path, first: str, second: str, better: bool | None, **values: Any) -> list[Job]:
    """Two methods, the second far better, far worse, or the same."""
    qualities = {True: (0.2, 0.9), False: (0.9, 0.2), None: (0.5, 0.5)}[better]
    found = [finished(folder, label, q, **values) for label, q in zip((first, second), qualities, strict=True)]
    if better is None:
        texts = Path(found[0].folder, "texts.jsonl").read_text()
        Path(found[1].folder, "texts.jsonl").write_text(texts)
    return found


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("base", ("smollm2-135m", "gpt2")), ("dtype", ("float32", "bfloat16")), ("beams", (1, 5)),
        ("task", ("webnlg", "dart")), ("task_words", (60, 120)), ("tests", ("e2e", "dart")), ("fraction", (0.1, 1.0)),
        ("metrics", ("bleu", "ter")), ("test_limit", (10, 20)),
    ],
)  # fmt: skip
def test_what_is_not_the_method_is_not_compared_across(tmp_path: Path, key: str, values: tuple[Any, ...]) -> None:
    jobs = [
        replace(job, name=f"{job.name},{key}={value}", config={**job.config, key: value})
        for value in values for job in pair(tmp_path / str(value), "embedding", "prefix", True)
    ]  # fmt: skip
    results = gather(jobs)
    named = [str(value) if key == "task" else f"{key} {value}" for value in values]
    assert (results.panels, results.labels, results.place) == (named, ["embedding", "prefix"], "rows")
    (found,) = expectations(results)
    assert len(found.measured) == 1 + 2, "the mean, and a prefix against embeddings in each panel"
    _, markdown = report(tmp_path, jobs)
    assert markdown.count("| Embedding-only | 50 rows | 1 | -") == 2


@pytest.mark.parametrize(("key", "place"), [("beams", ""), ("task_words", ""), ("rows_per_label", "rows_per_label")])
def test_numbers_that_are_not_of_the_method_are_no_places(tmp_path: Path, key: str, place: str) -> None:
    """But for amounts of data, over which methods are drawn."""
    results = gather([job for at in (1, 5) for job in pair(tmp_path, "full", "prefix", True, axis=key, at=at)])
    assert (results.place, results.panels) == (place, [""] if place else [f"{key} 1", f"{key} 5"])


def test_a_run_without_a_listed_key_is_where_its_default_is(tmp_path: Path) -> None:
    first, second = pair(tmp_path, "full", "prefix", True, base="gpt2")
    default = {key: value for key, value in second.config.items() if key != "base"}
    listed = replace(first, name=f"{first.name},base=gpt2")
    assert gather([listed, second]).panels == ["base gpt2"]
    assert gather([listed, replace(second, config=default)]).panels == ["base gpt2", "base smollm2-135m"]


def test_an_instruction_is_a_variant_of_a_method(tmp_path: Path) -> None:
    """Words from which a prefix is born; with several methods each is held against those that have the same words."""
    random_one = finished(tmp_path, "random", 0.1, axis="", method="prefix", init="random")
    related = [
        finished(tmp_path, "related", 0.9, axis="instruction", at=word, method="prefix", init="words")
        for word in ("summarize", "elephant")
    ]
    results = gather([random_one, *related])
    assert results.panels == [""] and results.labels[1:] == [
        f"related instruction {each}" for each in ("summarize", "elephant")
    ]
    (found,) = expectations(results)
    assert len(found.measured) == 1 + 2
    both = [
        job for word in ("summarize", "elephant")
        for job in pair(tmp_path / "both", "infix", "prefix", True, axis="instruction", at=word)
    ]  # fmt: skip
    (found,) = expectations(gather(both))
    assert len(found.measured) == 1 + 2
    assert all(line.count("elephant") in (0, 2) for line in found.measured)


OUTCOMES = pytest.mark.parametrize(
    ("better", "verdict"), [(True, "agrees"), (False, "disagrees"), (None, "within noise")]
)


@OUTCOMES
@pytest.mark.parametrize(
    ("first", "second", "statement", "values"),
    [
        ("full", "prefix", "On topics that were", {"task": "bbc-within-news"}),
        ("full", "prefix", "On topics that were", {"task": "bbc", "task_transfer": "news-to-sports"}),
        ("full", "prefix", "On topics that were", {"task": "webnlg", "tests": ("webnlg-seen", "webnlg-unseen")}),
        ("adapter", "prefix", "A prefix scores better", {"parameters": 4000, "share": 0.001}),
        ("embedding", "prefix", "A prefix scores better", {"length": 10}),
        ("infix", "prefix", "A prefix scores better", {"length": 10}),
        ("ptuning2", "apt", "APT scores better than", {"length": 10}),
    ],
)
def test_each_statement_follows_the_runs(
    tmp_path: Path, better: bool | None, verdict: str, first: str, second: str, statement: str, values: dict[str, Any]
) -> None:
    assert verdicts(pair(tmp_path, first, second, better, axis="", **values)) == {statement: verdict}


@OUTCOMES
@pytest.mark.parametrize(("place", "where"), [("rows", [50, 100]), ("fraction", [0.2, 0.8])])
def test_data_statements_follow_the_runs(
    tmp_path: Path, better: bool | None, verdict: str, place: str, where: list[float]
) -> None:
    jobs = [job for at in where for job in pair(tmp_path, "full", "prefix", better, axis=place, at=at)]
    statement = {"rows": "With few rows a", "fraction": "From a fifth of"}[place]
    assert verdicts(jobs) == {statement: verdict}


def test_a_tenth_of_the_rows_says_nothing_of_more_than_a_fifth(tmp_path: Path) -> None:
    jobs = [job for at in (0.1, 0.8) for job in pair(tmp_path, "full", "prefix", at > 0.5, axis="fraction", at=at)]
    assert verdicts(jobs) == {"From a fifth of": "agrees"}


def test_opposite_differences_are_mixed(tmp_path: Path) -> None:
    jobs = [job for at in (50, 100) for job in pair(tmp_path, "full", "prefix", at == 50, axis="rows", at=at)]
    assert verdicts(jobs) == {"With few rows a": "mixed"}


def test_a_seen_topic_of_news_says_nothing_of_unseen_ones(tmp_path: Path) -> None:
    assert verdicts(pair(tmp_path, "full", "prefix", True, axis="", task="ag_news")) == {}


@OUTCOMES
def test_lengths_are_chosen_by_dev_and_tested_on_test(tmp_path: Path, better: bool | None, verdict: str) -> None:
    """Length 5 is the best on dev; length 1 is the best on test, and must not be chosen for it."""
    long, short = {True: (0.2, 0.8), False: (0.8, 0.2), None: (0.5, 0.5)}[better]
    jobs = [
        finished(tmp_path, "prefix", quality, axis="length", at=length, dev=dev)
        for length, quality, dev in ((1, 1.0, 3.0), (5, short, 1.0), (10, 0.5, 2.0), (40, long, 1.5))
    ]
    if better is None:
        Path(jobs[1].folder, "texts.jsonl").write_text(Path(jobs[3].folder, "texts.jsonl").read_text())
    (found,) = expectations(gather(jobs))
    assert found.verdict == verdict and "prefix at 5 against prefix at 40" in found.measured[0]


@OUTCOMES
def test_words_are_real_words(tmp_path: Path, better: bool | None, verdict: str) -> None:
    """Random tokens of the vocabulary are no words; they are the other way round here."""
    jobs = pair(tmp_path, "random", "related", better, axis="", method="prefix")
    other = finished(tmp_path, "vocabulary", 0.0 if better else 1.0, axis="", method="prefix")
    for job, init in zip((*jobs, other), ("random", "words", "vocab"), strict=True):
        job.config["init"] = init
    (found,) = expectations(gather([*jobs, other]))
    assert found.verdict == verdict and len(found.measured) == 1 and "related against random" in found.measured[0]


def test_a_random_start_is_held_against_words_in_the_same_form(tmp_path: Path) -> None:
    """A prefix's own start is a text; one made by an MLP differs by more than its start."""
    jobs = [
        finished(tmp_path, label, quality, axis="", method="prefix", **options)
        for label, quality, options in (
            ("prefix", 0.9, {}), ("random", 0.2, {"init": "random"}), ("mlp", 0.1, {"parametrization": "mlp"}),
        )
    ]  # fmt: skip
    (found,) = expectations(gather(jobs))
    assert len(found.measured) == 1 and "prefix against random" in found.measured[0]


@OUTCOMES
def test_lower_may_be_better(tmp_path: Path, better: bool | None, verdict: str) -> None:
    jobs = pair(tmp_path, "full", "prefix", better, axis="rows", metric="ter")
    (found,) = expectations(gather(jobs))
    assert found.verdict == verdict
    assert ("ter -" in found.measured[0]) is (better is True)


def test_a_verdict_is_by_corrected_p_values(tmp_path: Path) -> None:
    """One of many places where a prefix seems better by its own interval is within noise."""
    jobs = pair(tmp_path, "full", "prefix", None, axis="rows", at=50)
    path = Path(jobs[1].folder, "texts.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    wrong = [row for row in rows if row["text"] == "no idea"]
    for row in wrong[:7]:
        row["text"] = row["references"][0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (alone,) = expectations(gather(jobs))
    assert alone.verdict == "agrees"
    others = [job for at in range(60, 100, 10) for job in pair(tmp_path, "full", "prefix", None, axis="rows", at=at)]
    (many,) = expectations(gather([*jobs, *others]))
    assert many.verdict == "within noise" and "+17.5 [+7.5, +30.0], p = 0.082" in many.measured[1]
    assert many.measured[0] == "on average exact_match +3.5"


def edit(job: Job, **values: Any) -> None:
    """Change a result; None removes a key."""
    path = Path(job.folder, "result.json")
    result = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in result.items() if value is not None}))


def report(tmp_path: Path, jobs: list[Job], name: str = "s") -> tuple[str, str]:
    """The page and its Markdown."""
    study = Study(name, tmp_path, "A study of two.", "m:f", {}, ())
    page, text = save_report(study, gather(jobs), tmp_path / "report")
    return page.read_text(), text.read_text()


def picture(html: str, title: str) -> str:
    """The figure of that title."""
    (found,) = (part for part in html.split("<figure>")[1:] if part.startswith(f"<figcaption>{title}</figcaption>"))
    return found.partition("</figure>")[0]


def table(markdown: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the first table that has these columns."""
    for block in markdown.split("\n\n"):
        lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        if block.startswith("|") and set(columns) <= set(lines[0]):
            return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    raise AssertionError(f"no table with {columns}")


def test_methods_are_compared_over_the_repetitions_that_all_have(jobs: list[Job], tmp_path: Path) -> None:
    """A study in the middle: LoRA has one of its two samples at 50 rows."""
    Path(next(job for job in jobs if job.name == "lora,rows=50,sample=0").folder, "result.json").unlink()
    results = gather(jobs)
    assert {cell.label: len(cell.results) for cell in results.of("", place=50.0)} == {"full": 1, "prefix": 1, "lora": 1}
    assert {set(cell.results) == {(1, 0)} for cell in results.of("", place=50.0)} == {True}
    assert {len(cell.results) for cell in results.of("", place=100.0)} == {2}, "other places lose nothing"
    html, markdown = report(tmp_path, jobs)
    assert "50 rows. One run each, the 1 of 2 that all here have" in markdown
    assert {row["runs"] for row in table(markdown, "runs", "parameters")} == {"1 of 2"}
    assert "100 rows. Mean and range over 2 runs" in markdown
    assert markdown.count("| method | runs | exact_match") == 1, "where all have as many, the line above says it"
    assert "11 of 12 runs are done" in markdown
    assert [row["state"] for row in table(markdown, "run", "state")].count("done") == 11
    runs = {(row["method"], row["rows"]): row["runs"] for row in table(markdown, "difference", "runs")}
    assert runs["LoRA", "50 rows"] == "1" and runs["LoRA", "100 rows"] == "2"
    for title in ("exact_match over rows", "exact_match against what it costs, all runs"):
        drawn = picture(html, title)
        hollow = drawn.count('stroke-width="2"/>')
        assert hollow == 3 * drawn.count('class="base"'), "the three marks at 50 rows, in each picture"


def test_what_has_no_repetition_in_common_is_not_ranked(jobs: list[Job], tmp_path: Path) -> None:
    for name in ("lora,rows=50,sample=0", "prefix,rows=50,sample=1"):
        Path(next(job for job in jobs if job.name == name).folder, "result.json").unlink()
    results = gather(jobs)
    assert [(group.place, group.comparable) for group in results.groups("", "test")] == [
        ("50 rows", False),
        ("100 rows", True),
    ]
    _, markdown = report(tmp_path, jobs)
    assert "50 rows: not ranked, for what is compared has no samples and seeds in common" in markdown
    assert "100 rows: best exact_match" in markdown
    assert "different samples and seeds: not to be compared" in markdown
    rows = [row["method"] for row in table(markdown, "method", "runs", "parameters")]
    assert rows == ["Full fine-tuning", "Prefix-Tuning", "LoRA"]


def test_files_are_called_by_their_method_where_it_has_no_other_file(tmp_path: Path) -> None:
    jobs = [
        finished(tmp_path, label, 0.5, axis="", method=method)
        for label, method in (("prompt", "prompt_tuning"), ("prefix", "prefix"), ("related", "prefix"), ("own", "own"))
    ]
    assert [cell.title for cell in gather(jobs).cells] == ["Prompt tuning", "Prefix-Tuning", "related", "own"]
    one = finished(tmp_path / "b", "small", 0.5, axis="rank", at=1, method="lora", targets="all")
    job = Job("small,rank=1,targets=all", one.config, "m:f", "c", "d", one.folder)
    assert [(cell.title, cell.place) for cell in gather([job]).cells] == [("LoRA targets all", 1.0)]


def test_methods_that_plan_fewer_repetitions_are_compared_over_these(jobs: list[Job], tmp_path: Path) -> None:
    """A method without training may have one run only: ranked with it are the others' runs of that sample."""
    alone = finished(tmp_path, "zero_shot", 0.1)
    results = gather([*jobs, replace(alone, name="zero_shot,rows=50")])
    assert {cell.label: set(cell.results) for cell in results.of("", place=50.0)} == {
        label: {(0, 0)} for label in ("full", "prefix", "lora", "zero_shot")
    }
    assert results.groups("", "test")[0].comparable and {len(cell.results) for cell in results.of("", place=100.0)} == {
        2
    }
    _, markdown = report(tmp_path, [*jobs, replace(alone, name="zero_shot,rows=50")])
    assert "50 rows. One run each, the 1 of 2 that all here have" in markdown
    runs = {row["method"]: row["runs"] for row in table(markdown, "runs", "parameters")}
    assert runs == {"Full fine-tuning": "1 of 2", "Prefix-Tuning": "1 of 2", "LoRA": "1 of 2", "Zero-shot": "1"}


def test_methods_that_plan_other_repetitions_are_not_ranked(jobs: list[Job], tmp_path: Path) -> None:
    other = finished(tmp_path, "zero_shot", 0.1, sample=7)
    results = gather([*jobs, other])
    assert {len(cell.results) for cell in results.of("", "prefix")} == {2}, "they stay as they are"
    assert [(group.place, group.comparable) for group in results.groups("", "test")] == [
        ("50 rows", False),
        ("100 rows", True),
    ]
    assert "50 rows: not ranked" in report(tmp_path, [*jobs, other])[1]


def test_the_time_of_all_candidates_stands_beside_that_of_the_chosen_one(jobs: list[Job], tmp_path: Path) -> None:
    for job in jobs:
        edit(job, tuning_seconds=44.0)
    _, markdown = report(tmp_path, jobs)
    assert {(row["training s"], row["tuning s"]) for row in table(markdown, "tuning s")} == {("10", "44")}
    assert "Prefixes that were tuned together share their time" in markdown
    for job in jobs:
        edit(job, candidates=[{}])
    _, markdown = report(tmp_path, jobs)
    assert "tuning s" not in markdown and "share their time" not in markdown


def test_the_page_says_what_the_runs_were_made_on(jobs: list[Job], tmp_path: Path) -> None:
    for number, job in enumerate(jobs):
        path = Path(job.folder, "run.json")
        attempts = [{"started": f"2026-11-26T0{number % 3}:00:00+0000", "seconds": 600.0, "status": "done"}]
        record = {**json.loads(path.read_text()), "seconds": 600.0, "attempts": attempts, "threads": 2}
        path.write_text(json.dumps(record))
    _, markdown = report(tmp_path, jobs)
    for told in (
        "machine: m", "2 threads", "device: cpu, float32", "12 runs took 2 h 00 min",
        "from 2026-11-26T00:00:00+0000 to 2026-11-26T02:10:00+0000",
    ):  # fmt: skip
        assert told in markdown, told
    one = Path(jobs[0].folder, "run.json")
    one.write_text(json.dumps({**json.loads(one.read_text()), "machine": "n", "threads": 1}))
    _, markdown = report(tmp_path, jobs)
    assert "machine: n; m" in markdown and "1; 2 threads" in markdown


def test_results_of_any_perform_can_be_reported(jobs: list[Job], tmp_path: Path) -> None:
    """A function of one's own need not return sizes, times, texts or known metrics."""
    for job in jobs:
        Path(job.folder, "texts.jsonl").unlink()
        unknown = ("nats_per_token", "parameters", "num_bytes", "train_seconds", "inference_seconds", "candidates",
                   "device", "dtype", "inference_rows")  # fmt: skip
        edit(job, scores={"test": {"luck": {"value": 3.0}}}, **dict.fromkeys(unknown))
    _, markdown = report(tmp_path, jobs)
    for row in table(markdown, "method", "luck"):
        assert row["luck"] == "3.0 [3.0, 3.0]" and row["parameters"] == row["training s"] == ""
    for job in jobs:
        edit(job, scores=None)
    assert "12 of 12 runs are done" in report(tmp_path, jobs)[1]


def test_a_metric_that_one_file_has_is_blank_for_the_others(jobs: list[Job], tmp_path: Path) -> None:
    score = {"value": 7.0, "low": 6.0, "high": 8.0}
    for job in jobs:
        if job.name.startswith("lora"):
            edit(job, scores={"test": {"rouge_l": score}})
    _, markdown = report(tmp_path, jobs)
    rows = {row["method"]: row for row in table(markdown, "exact_match", "rouge_l")}
    assert rows["LoRA"]["exact_match"] == "" and rows["LoRA"]["rouge_l"] == "7.0 [7.0, 7.0]"
    assert rows["Full fine-tuning"]["exact_match"] != "" and rows["Full fine-tuning"]["rouge_l"] == ""


def test_the_command_reports_real_and_odd_runs(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    real = "".join(f"{key} = {json.dumps(value)}\n" for key, value in tiny_study(tmp_path).items())
    write_study(
        tmp_path / "experiments" / "real", real + "rows = 6\nepochs = 1\nlength = 2\n",
        prefix='method = "prefix"', ptuning2='method = "ptuning2"\nmetrics = "exact_match"',
    )  # fmt: skip
    write_study(tmp_path / "experiments" / "odd", "seed = [0, 1]\n", a="method = 'a'", b="method = 'b'")
    for name in ("odd", "real"):
        assert run("study", "run", name)[0] == 0
        status, out, _ = run("study", "report", name, "--to", "docs", "--json")
        assert status == 0 and json.loads(out.strip().splitlines()[-1])["missing"] == 0
    markdown = Path("docs/real.md").read_text()
    rows = {row["method"]: row for row in table(markdown, "bleu", "exact_match", "training s")}
    assert rows["Prefix-Tuning"]["bleu"] and not rows["P-Tuning v2"]["bleu"] and rows["P-Tuning v2"]["exact_match"]
    assert "41.5 [41.5, 41.5]" in Path("docs/odd.md").read_text()


class Balance(HTMLParser):
    """Which elements are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_and_its_markdown_say_the_same(jobs: list[Job], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(jobs[0].folder, "texts.jsonl").read_text().splitlines()]
    rows[0]["text"] = "<script>alert(1)</script> | a bar\nand a line"
    Path(jobs[0].folder, "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html, markdown = report(tmp_path, jobs)
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert "<script>alert" not in html and "http://" not in html and "src=" not in html
    titles = ["exact_match over rows", "exact_match: difference to Prefix-Tuning",
              "exact_match against what it costs, all runs"]  # fmt: skip
    assert [part.partition("</figcaption>")[0] for part in html.split("<figcaption>")[1:]] == titles
    wanted = (
        "12 of 12 runs are done", "Methods were tuned over 4 candidates", "p (Holm)", "Published figures, e2e",
        "69.7 (70.3)", "agrees", "foreword study run s --only full,rows=50,sample=0",
    )  # fmt: skip
    for told in wanted:
        assert told in "".join(parser.texts) and told in markdown, told
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            widths = {len(line.replace("\\|", "").split("|")) for line in block.splitlines()}
            assert len(widths) == 1, "rows are as wide as their header"


def test_published_figures_stand_beside_those_of_the_same_method_and_metric(tmp_path: Path) -> None:
    jobs = [
        finished(tmp_path, label, 0.5, axis="", metric="bleu", **options)
        for label, options in (("full", {}), ("prefix", {}), ("adapter", {"share": 0.001}), ("lora", {}))
    ]
    for job, value in zip(jobs, (40.0, 42.5, 41.0, 43.0), strict=True):
        edit(job, scores={"test": {"bleu": {"value": value, "low": 1.0, "high": 99.0}}})
    _, markdown = report(tmp_path, jobs)
    rows = {row["method"]: row["bleu (gpt2-medium)"] for row in table(markdown, "bleu (gpt2-medium)")}
    assert rows == {
        "Full fine-tuning": "68.2 (68.8)", "Prefix-Tuning": "69.7 (70.3)", "Adapter": "66.3", "LoRA": "",
    }  # fmt: skip
    full, prefix, adapter, _ = gather(jobs).cells
    gaps = {row["method"]: row for row in table(markdown, "test", "here", "p (Holm)", "published")}
    assert {method: row["published"] for method, row in gaps.items()} == {"Full fine-tuning": "-1.5", "Adapter": "-3.4"}
    tested = table(markdown, "method", "runs", "difference", "interval", "p (Holm)")
    for cell in (full, adapter):
        (above,) = (row for row in tested if row["method"] == cell.title)
        found = difference(prefix, cell, "test", "bleu")
        assert found and above["difference"] == found.shown
        assert gaps[cell.title]["here"] == f"{above['difference']} {above['interval']}"
        assert gaps[cell.title]["p (Holm)"] == above["p (Holm)"]
    other = [finished(tmp_path / "o", "full", 0.5, axis="", task="e2e"), *jobs[3:]]
    assert "(gpt2-medium)" not in report(tmp_path, other)[1], "another metric, and a method that is not in the paper"


@pytest.mark.parametrize(
    ("key", "values", "usual"),
    [
        ("init", ("random", "text", "vocab"), "text"),
        ("length", (1, 10), 10),
        ("parametrization", ("mlp", "direct"), "direct"),
        ("instruction", ("elephant", ""), ""),
    ],
)
def test_a_published_prefix_is_the_usual_one_of_several(
    tmp_path: Path, key: str, values: tuple[Any, ...], usual: Any
) -> None:
    jobs = [
        finished(tmp_path, f"form{k}", 0.5, axis="", metric="bleu", method="prefix", **{key: value})
        for k, value in enumerate(values)
    ]
    found = {cell.config[key]: beside(cell, "test", "bleu") for cell in gather(jobs).cells}
    assert [value for value, figure in found.items() if figure] == [usual]
    assert "here and in the paper" not in report(tmp_path, jobs)[1]
    alone = gather(jobs[:1]).cells[0]
    assert beside(alone, "test", "bleu"), "the only form that a study has is its prefix"


def test_one_published_figure_is_no_difference(tmp_path: Path) -> None:
    jobs = [finished(tmp_path, label, 0.5, axis="", metric="bleu", method="prefix") for label in ("prefix", "again")]
    assert "here and in the paper" not in report(tmp_path, jobs)[1]


@pytest.mark.parametrize(
    ("task", "method", "metric", "told"),
    [
        ("webnlg-unseen", "prefix", "bleu_webnlg", "45.6 (45.3)"),
        ("webnlg", "full", "ter_webnlg", "53 (54)"),
        ("webnlg-seen", "top2", "meteor_webnlg", "38"),
        ("dart", "prefix", "bleu_dart", "46.4"),
        ("xsum", "full", "rouge_l", "37.25"),
        ("e2e", "infix", "cider", "2.4"),
        ("bbc-news-to-sports", "full", "rouge_l", None),
    ],
)
def test_figures_of_the_paper(tmp_path: Path, task: str, method: str, metric: str, told: str | None) -> None:
    cell = gather([finished(tmp_path, method, 0.5, axis="", task=task)]).cells[0]
    found = beside(cell, "test", metric)
    assert (found and found.told(metric)) == told


def test_what_it_costs_shows_all_cells_with_their_front(jobs: list[Job], tmp_path: Path) -> None:
    for number, job in enumerate(jobs):
        edit(job, train_seconds=10.0 + number)
    html, _ = report(tmp_path, jobs)
    drawn = picture(html, "exact_match against what it costs, all runs")
    root = ET.fromstring(drawn[drawn.index("<svg") :])
    assert len(list(root.iter("g"))) == 2 * 6, "three methods at two places, in two pictures"
    assert len([each for each in root.iter("polyline") if each.get("class") == "front"]) == 2
    assert "trained parameters" in drawn and "seconds to train" in drawn


def test_a_heading_of_pictures_alone_is_not_in_the_markdown(jobs: list[Job], tmp_path: Path) -> None:
    html, markdown = report(tmp_path, jobs)
    assert "What it costs" in html and "What it costs" not in markdown and "## Scores\n\n50 rows" in markdown


def test_differences_say_what_they_are_to(tmp_path: Path) -> None:
    jobs = [finished(tmp_path, label, 0.5, axis="", metric="bleu") for label in ("adapter", "full")]
    assert "## Differences to Adapter, here and in the paper" in report(tmp_path, jobs)[1]


def test_the_usual_prefix_is_the_one_that_others_are_compared_with(tmp_path: Path) -> None:
    jobs = [finished(tmp_path, "prefix", 0.5, axis="length", at=length) for length in (1, 10)]
    jobs.append(finished(tmp_path, "lora", 0.5, axis="rank", at=8))
    assert "exact_match against Prefix-Tuning length 10 on the same" in report(tmp_path, jobs)[1]


def test_every_metric_of_a_table_is_tested(jobs: list[Job], tmp_path: Path) -> None:
    for job in jobs:
        scores = json.loads(Path(job.folder, "result.json").read_text())["scores"]["test"]
        edit(job, scores={"test": {**scores, "bleu": scores["exact_match"], "bertscore:none": {"value": 1.0}}})
    html, markdown = report(tmp_path, jobs)
    for metric in ("exact_match", "bleu"):
        picture(html, f"{metric}: difference to Prefix-Tuning")
        assert f"{metric} against Prefix-Tuning on the same rows, samples and seeds" in markdown
    assert markdown.count("corrected by Holm for the 4 differences of this table") == 2
    assert markdown.count("Neither knows how samples of training rows differ") == 1


@pytest.mark.parametrize(("lengths", "to"), [((1, 10, 40), "10"), ((5, 20, 40), "5")])
def test_places_of_one_method_are_compared_with_one_of_them(tmp_path: Path, lengths: tuple[int, ...], to: str) -> None:
    jobs = [finished(tmp_path, "prefix", 0.1 + length / 50, axis="length", at=length) for length in lengths]
    html, markdown = report(tmp_path, jobs)
    picture(html, f"exact_match: difference to Prefix-Tuning, length {to}")
    rows = table(markdown, "method", "length", "difference")
    assert [row["length"] for row in rows] == [f"length {each}" for each in lengths if str(each) != to]
    best = [f"Prefix-Tuning at length {each}" for each in sorted(lengths, reverse=True)]
    found = re.search(r"\* test: best exact_match (.*)\.", markdown)
    assert found and [each.rpartition(" ")[0] for each in found[1].split(", ")] == best
    assert [row["length"] for row in table(markdown, "method", "length", "parameters")] == [
        f"length {each}" for each in lengths
    ]
    longest = gather(jobs).cells[-1].score("test", "exact_match").mean
    reference = next(cell for cell in gather(jobs).cells if cell.place == float(to)).score("test", "exact_match").mean
    assert rows[-1]["difference"] == f"{longest - reference:+.1f}"


def test_places_of_one_method_are_over_the_samples_that_all_have(tmp_path: Path) -> None:
    jobs = [
        finished(tmp_path, "prefix", 0.5, axis="length", at=length, sample=sample)
        for length in (1, 10, 40) for sample in (0, 1)
    ]  # fmt: skip
    Path(jobs[-1].folder, "result.json").unlink()
    (group,) = gather(jobs).groups("", "test")
    assert group.comparable and [set(cell.results) for cell in group.cells] == [{(0, 0)}] * 3
    _, markdown = report(tmp_path, jobs)
    assert "* test: best exact_match Prefix-Tuning at length " in markdown and "not to be compared" not in markdown
    assert "One run each, the 1 of 2 that all here have" in markdown


def test_methods_to_come_are_no_method_alone(jobs: list[Job], tmp_path: Path) -> None:
    for job in jobs:
        if not job.name.startswith("prefix"):
            Path(job.folder, "result.json").unlink()
    _, markdown = report(tmp_path, jobs)
    assert "50 rows: best exact_match Prefix-Tuning" in markdown and "100 rows: best exact_match" in markdown


@pytest.mark.parametrize(("steps", "place"), [((60, 180), "max_steps"), ((0, 60), "")])
def test_steps_are_a_place_unless_some_train_for_all_epochs(tmp_path: Path, steps: tuple[int, ...], place: str) -> None:
    jobs = [
        finished(tmp_path, label, 0.5, axis="max_steps", at=each) for label in ("prefix", "lora") for each in steps
    ]  # fmt: skip
    assert gather(jobs).place == place
    html, markdown = report(tmp_path, jobs)
    if place:
        assert picture(html, "exact_match over max_steps").count("<circle") == 2 + 1, "a method has marks of its own"
        assert "60 steps: best exact_match" in markdown and "milliseconds to write" not in html
    else:
        assert "Prefix-Tuning max_steps 0" in markdown


def test_one_price_is_no_picture_of_prices(tmp_path: Path) -> None:
    jobs = [finished(tmp_path, label, 0.5, axis="", parameters=100) for label in ("prefix", "ptuning2")]
    assert "against what it costs" not in report(tmp_path, jobs)[0]
    edit(jobs[0], train_seconds=5.0)
    drawn = picture(report(tmp_path, jobs)[0], "exact_match against what it costs, all runs")
    assert "seconds to train" in drawn and "trained parameters" not in drawn


def test_scores_over_parameters_join_the_sizes_of_a_method(tmp_path: Path) -> None:
    jobs = [
        finished(tmp_path, "lora", 0.3 + rank / 20, axis="rank", at=rank, parameters=1000 * rank) for rank in (1, 4, 8)
    ]
    html, _ = report(tmp_path, jobs)
    assert picture(html, "exact_match over trained parameters for each task").count("<circle") == 3 + 1
    assert "milliseconds to write a row over rank" in html
    same = [finished(tmp_path / "same", "lora", 0.5, axis="rank", at=rank) for rank in (1, 4)]
    assert "over trained parameters" not in report(tmp_path, same)[0], "one size makes no curve"


def test_lengths_are_shown_with_their_scores_and_costs(tmp_path: Path) -> None:
    jobs = [finished(tmp_path, "prefix", 0.5, axis="length", at=length) for length in (1, 10, 40)]
    for job, seconds in zip(jobs, (2.0, 4.0, 8.0), strict=True):
        edit(job, inference_seconds=seconds)
    html, _ = report(tmp_path, jobs)
    assert picture(html, "exact_match over length").count("<circle") == 3 + 1
    drawn = picture(html, "milliseconds to write a row over length")
    heights = [float(y) for y in re.findall(r'<circle cx="\S+" cy="(\S+)"', drawn)[:3]]
    assert heights[0] > heights[1] > heights[2], "longer is dearer, and y grows downwards"
    assert "Prefix-Tuning, length 40: ms a row 200 [200, 200], 1 of 1 runs" in drawn


def test_seen_stands_beside_unseen(tmp_path: Path) -> None:
    tests = ("webnlg-seen", "webnlg-unseen", "webnlg")
    jobs = [finished(tmp_path, label, 0.5, axis="", tests=tests, task="webnlg") for label in ("full", "prefix")]
    scores = {"webnlg-seen": 60.0, "webnlg-unseen": 20.0, "webnlg": 40.0}
    for job in jobs:
        edit(job, scores={test: {"exact_match": {"value": each}} for test, each in scores.items()})
    html, _ = report(tmp_path, jobs)
    drawn = picture(html, "exact_match on seen and on unseen topics")
    heights = [float(y) for y in re.findall(r'<circle cx="\S+" cy="(\S+)"', drawn)[:2]]
    assert heights[0] < heights[1] and ">webnlg-seen</text>" in drawn and ">webnlg-unseen</text>" in drawn


def test_scores_of_one_place_are_ranked_in_a_picture(tmp_path: Path) -> None:
    jobs = [finished(tmp_path, label, quality, axis="") for label, quality in (("full", 0.2), ("prefix", 0.9))]
    drawn = picture(report(tmp_path, jobs)[0], "exact_match, the best first")
    assert drawn.index(">Prefix-Tuning</text>") < drawn.index(">Full fine-tuning</text>")
    jobs = [finished(tmp_path / "t", each, q, axis="", metric="ter") for each, q in (("full", 0.2), ("prefix", 0.9))]
    drawn = picture(report(tmp_path, jobs)[0], "ter, the best first")
    assert drawn.index(">Full fine-tuning</text>") < drawn.index(">Prefix-Tuning</text>"), "their values say so here"


def test_cells_are_compared_on_the_rows_that_both_have(jobs: list[Job], tmp_path: Path) -> None:
    """A row is missing in one run, and another has a name of its own in it."""
    path = Path(jobs[0].folder, "texts.jsonl")
    path.write_text("".join(line.replace('"r3"', '"r99"') for line in path.read_text().splitlines(True)[1:]))
    results = gather(jobs)
    first, second = results.of("", "full", 50.0)[0], results.of("", "prefix", 50.0)[0]
    found = difference(first, second, "test", "exact_match")
    assert found is not None and (found.rows, found.others, found.runs) == (38, 3, 2)
    kept = [[row for row in cell.texts(each, "test") if row["id"] not in ("r0", "r3", "r99")]
            for cell in (first, second) for each in cell.results]  # fmt: skip
    right = [100 * statistics.fmean(row["text"] == row["references"][0] for row in rows) for rows in kept]
    assert found.found.difference == pytest.approx((right[2] + right[3] - right[0] - right[1]) / 2)
    told = (
        "differences are over the 38 to 40 that two methods and their runs have in common, 0 to 3 others are left out"
    )
    assert told in report(tmp_path, jobs)[1]
    path.write_text(path.read_text().replace('"id": "r', '"id": "q'))
    assert difference(first, second, "test", "exact_match") is None


def test_rows_of_one_name_are_compared_in_their_order(tmp_path: Path) -> None:
    jobs = pair(tmp_path, "full", "prefix", True, axis="")
    expected = difference(*gather(jobs).cells, "test", "exact_match")
    for job in jobs:
        path = Path(job.folder, "texts.jsonl")
        path.write_text(re.sub(r'"id": "r\d+"', '"id": "r"', path.read_text()))
    assert (found := difference(*gather(jobs).cells, "test", "exact_match")) and expected
    assert found.rows == 40 and found.found == expected.found


def test_tables_say_how_many_test_rows_there_are(jobs: list[Job], tmp_path: Path) -> None:
    for job in jobs:
        edit(job, test_rows={"test": 40}, skipped_test_rows={"test": 2 if "rows=50" in job.name else 0})
    _, markdown = report(tmp_path, jobs)
    assert (
        "50 rows. Mean and range over 2 runs (samples and seeds). 40 test rows, and 2 too long for the base model."
        in (markdown.splitlines())
    )
    assert "100 rows. Mean and range over 2 runs (samples and seeds). 40 test rows." in markdown.splitlines()
    assert "left out" not in markdown


def test_damaged_texts_are_an_error(jobs: list[Job]) -> None:
    results = gather(jobs)
    first, second = results.of("", "full", 50.0)[0], results.of("", "prefix", 50.0)[0]
    Path(jobs[0].folder, "texts.jsonl").write_text("{")
    with pytest.raises(RunError, match="texts of a run"):
        difference(first, second, "test", "exact_match")


def test_the_least_p_value_is_a_bound(tmp_path: Path) -> None:
    """Every row tells prefixes and the others apart, so that no toss of ten thousand does as well."""
    jobs = [finished(tmp_path, label, quality, axis="") for label, quality in (("prefix", 1.0), ("full", 0.0))]
    first, second = gather(jobs).cells
    found = difference(first, second, "test", "exact_match")
    assert found is not None and found.p_value == pytest.approx(1 / 10_001) and found.p == "< 0.001"
    many = corrected([found] * 28)
    assert {each.p for each in many} == {"< 0.003"} and many[0].p_value == pytest.approx(28 / 10_001)
    told = corrected([found._replace(found=found.found._replace(p_value=p)) for p in (0.0004, 0.02, 1.0)])
    assert [each.p for each in told] == ["0.001", "0.040", "1.000"]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("name", "runs", "axes"),
    [
        ("fractions", 30, {"fraction": {0.1, 0.2, 0.4, 0.6, 0.8}}),
        ("budget", 40, {"share": {0.001, 0.03}, "rank": {1, 2, 4, 8, 16, 32, 64}}),
        ("ablations", 26, {"length": {1, 10, 20}, "parametrization": {"mlp"}, "init": {"random"}}),
    ],
)
def test_built_in_studies_have_the_cells_of_the_papers(name: str, runs: int, axes: dict[str, set[Any]]) -> None:
    study = load_study(name, own="no such folder")
    assert len(study.runs) == runs
    for key, values in axes.items():
        assert {run.config[key] for run in study.runs if key in run.config} == values
    for run in study.runs:
        check(run.config)
        assert (run.config["task"], run.config["beams"]) == ("e2e", 5)


def test_every_built_in_study_is_described() -> None:
    told = (Path(__file__).parents[1] / "docs" / "studies.md").read_text()
    assert [name for name in list_studies("no such folder") if f"| `{name}` |" not in told] == []
