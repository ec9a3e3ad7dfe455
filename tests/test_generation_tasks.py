"""WebNLG, DART, XSum, BBC headlines, SciTLDR, DialogSum: sizes, linearisations, splits, folder and hub."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import ConfigError, DataError
from foreword.metrics import get_metric
from foreword.tasks import OWN_TASKS, Example, SkippedRow, Split, Task, get_task, list_tasks
from foreword.tasks.bbc import TOPICS, TRANSFERS
from foreword.tasks.generation import one_line, row_lines, triples_line
from foreword.tasks.rows import Unusable
from foreword.tasks.source import FOLDER_VARIABLE
from foreword.tasks.webnlg import SEEN

MIRROR = Path(os.environ.get(FOLDER_VARIABLE, Path(__file__).parent.parent.parent / "shared" / "data"))

# examples and references of train, dev and test; None where the mirror has no file
SIZES: dict[str, tuple[Any, Any, Any]] = {
    "webnlg": ((18025, 18025), (872, 2268), (1862, 4928)),
    "webnlg-seen": ((18025, 18025), (872, 2268), (971, 2495)),
    "webnlg-unseen": ((18025, 18025), (872, 2268), (891, 2433)),
    "dart": (None, (2768, 6980), (5097, 12551)),
    "xsum_subset": ((1122, 1122), (187, 187), (294, 294)),
    "bbc": ((1412, 1412), (225, 225), (421, 421)),
    "bbc-news-to-sports": ((1090, 1090), (167, 167), (107, 107)),
    "bbc-within-news": ((632, 632), (94, 94), (153, 153)),
    "scitldr": ((1992, 1992), (619, 1453), (618, 1967)),
    "dialogsum": (None, (500, 500), (500, 1500)),
    "xsum": (None, None, None),
}
GOLDEN = {
    "webnlg": (
        "Abilene_Regional_Airport : cityServed : Abilene,_Texas\n",
        "Abilene, Texas is served by the Abilene regional airport.",
    ),
    "dart": (
        "Hawaii Five-O : notes : Episode: The Flight of the Jewels | [TABLECONTEXT] : [title] : Jeff Daniels"
        " | [TABLECONTEXT] : title : Hawaii Five-O\n",
        "Jeff Daniels played in the Hawaii Five-O episode The Flight of the Jewels",
    ),
    "xsum_subset": (
        "The Gaia satellite will be sent far from Earth to map the positions of more than a billion stars",
        "It should be one of the great space ventures of the decade.",
    ),
    "bbc": ("British Airways has blamed high fuel prices for a 40% drop", "High fuel prices hit BA's profits"),
    "scitldr": ("Incremental class learning involves sequentially learning classes in bursts", "FearNet is a memory"),
    "dialogsum": (
        "#Person1#: Ms. Dawson, I need you to take a dictation for me. #Person2#: Yes, sir... #Person1#: This should",
        "Ms. Dawson helps #Person1# to write a memo",
    ),
}


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (MIRROR / "webnlg2017").is_dir():
        pytest.skip(f"no folder webnlg2017 in {FOLDER_VARIABLE}")
    pytest.importorskip("pyarrow")
    monkeypatch.setenv(FOLDER_VARIABLE, str(MIRROR))


def folder(root: Path, monkeypatch: pytest.MonkeyPatch, file: str, rows: list[dict[str, Any]]) -> None:
    """A folder with one parquet file of the given rows."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = root / f"{file}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(root))


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A stand-in for the package `datasets`; the requests it gets."""
    asked: list[dict[str, Any]] = []

    def load_dataset(repository: str, **options: Any) -> list[dict[str, Any]]:
        asked.append({"repository": repository, **options})
        return rows

    module = ModuleType("datasets")
    vars(module).update(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    return asked


def said(split: Split) -> list[tuple[str, tuple[str, ...]]]:
    return [(example.prompt, example.references) for example in split]


# ---- all tasks


def test_every_task_is_tested() -> None:
    named = [name for name in list_tasks() if name not in OWN_TASKS and get_task(name).kind == "generation"]
    assert set(named) == {*SIZES, "e2e", "trails"}


@pytest.mark.parametrize("name", SIZES)
def test_every_task_says_what_it_is(name: str) -> None:
    task = get_task(name)
    assert isinstance(task, Task) and task.name == name and task.instruction.endswith(".")
    assert (task.kind, task.labels, task.stop) == ("generation", (), ("\n",)) and 0 < task.max_new_tokens <= 100
    assert task.metrics and all(get_metric(metric) for metric in task.metrics)
    with pytest.raises(ConfigError, match="split 'validation'; expected one of train, dev, test"):
        task.split("validation")
    with pytest.raises(ConfigError, match="limit 0"):
        task.split("test", limit=0)
    with pytest.raises(ConfigError, match=f"option 'folder' of task {name!r}; expected"):
        get_task(name, folder="x")


@pytest.mark.parametrize("name", SIZES)
def test_the_mirror(mirror: None, name: str) -> None:
    task = get_task(name)
    for part, size in zip(("train", "dev", "test"), SIZES[name], strict=True):
        if size is None:
            with pytest.raises(DataError, match=rf"no file {name}/{part}\.parquet in the folder.*unset FOREWORD_DATA"):
                task.split(part)
            continue
        split = task.split(part)
        assert (len(split), sum(len(example.references) for example in split)) == size
        assert task.split(part, limit=20).examples == split.examples[:20]
        assert len({example.id for example in split}) == len(split)
        _check(split)


def _check(split: Split) -> None:
    for example in split:
        assert isinstance(example, Example) and example.completion == example.references[0]
        assert example.prompt.endswith("\n") and "\n" not in example.prompt[:-1] and example.prompt.strip()
        assert all(text == one_line(text) and text for text in example.references)
        if split.name == "train":
            assert len(example.references) == 1


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_examples(mirror: None, name: str) -> None:
    example, (prompt, completion) = get_task(name).split("test", limit=1).examples[0], GOLDEN[name]
    assert example.prompt.startswith(prompt) and example.completion.startswith(completion)
    if prompt.endswith("\n"):
        assert (example.prompt, example.completion) == (prompt, completion)


# ---- triples


parts = st.text(st.characters(codec="utf-8", exclude_characters="|:"), min_size=1).map(one_line).filter(bool)


@given(st.lists(st.tuples(parts, parts, parts), min_size=1))
def test_a_line_of_triples_keeps_every_part(triples: list[tuple[str, str, str]]) -> None:
    assert [tuple(part.split(" : ")) for part in triples_line(triples).split(" | ")] == triples


def test_webnlg_seen_and_unseen(mirror: None) -> None:
    """The two parts are apart and make up the whole, and the categories are those that the data set calls seen."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(MIRROR / "webnlg2017" / "test.parquet").to_pylist()
    assert {row["category"] for row in rows if row["seen_category"]} == set(SEEN)
    both = get_task("webnlg").split("test").examples
    seen, unseen = (get_task("webnlg", categories=part).split("test").examples for part in ("seen", "unseen"))
    assert {example.row for example in seen} == {i for i, row in enumerate(rows, start=1) if row["seen_category"]}
    assert sorted(seen + unseen, key=lambda example: example.row) == both
    train = parquet.read_table(MIRROR / "webnlg2017" / "train.parquet", columns=["category"]).to_pylist()
    assert {row["category"] for row in train} == set(SEEN)


def test_webnlg_trains_on_good_texts(mirror: None) -> None:
    task = get_task("webnlg")
    train, dev = task.split("train"), task.split("dev")
    assert [row for row, _ in train.skipped] == [491, 558, 2781, 6600, 6672]
    assert {reason for _, reason in train.skipped} == {"no text that is marked as good"} and not dev.skipped
    assert sum(len(example.references) for example in dev) == 2268


def triples(*texts: str, comments: list[str] | None = None, category: str = "Food", **more: Any) -> dict[str, Any]:
    comments = comments or ["good"] * len(texts)
    return {
        "category": category, "modified_triples": ["A | b | C", "C | d | E"], "lexs": list(texts),
        "lex_comments": comments, **more,
    }  # fmt: skip


def test_webnlg_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        triples("bad", " so \n good ", comments=["toFix", "good"]),
        triples("bad", comments=["toFix"]),
        {**triples("text"), "modified_triples": ["A | b"]},
        {**triples("text"), "lexs": []},
        triples("text", "more", comments=["good"]),
        {**triples("text"), "category": None},
        triples("unseen", category="Artist"),
    ]
    for split in ("train", "dev", "test"):
        folder(tmp_path, monkeypatch, f"webnlg2017/{split}", rows)
    prompt = "A : b : C | C : d : E\n"
    train, dev = get_task("webnlg").split("train"), get_task("webnlg").split("dev")
    assert said(train) == [(prompt, ("so good",)), (prompt, ("unseen",))]
    assert [example.id for example in train] == ["webnlg-train-1.1", "webnlg-train-7.1"]
    assert said(dev) == [(prompt, ("so good", "bad")), (prompt, ("bad",)), (prompt, ("unseen",))]
    assert train.skipped == [
        SkippedRow(2, "no text that is marked as good"),
        SkippedRow(3, "'A | b' is no triple (subject | property | object)"),
        SkippedRow(4, "column 'lexs' is empty"),
        SkippedRow(5, "2 texts and 1 comments"),
        SkippedRow(6, "column 'category' is empty"),
    ]
    assert said(get_task("webnlg-unseen").split("test")) == [(prompt, ("unseen",))]
    assert [example.row for example in get_task("webnlg-seen").split("test")] == [1, 2]
    with pytest.raises(DataError, match=r"row 3 of webnlg2017/dev.parquet: 'A \| b' is no triple"):
        get_task("webnlg").split("dev", strict=True)
    with pytest.raises(ConfigError, match="categories 'new'; expected all, seen, unseen; choose"):
        get_task("webnlg", categories="new")


def test_webnlg_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the three files in the hub's test split the whole one is read, with the examples of the folder."""
    folder(tmp_path, monkeypatch, "webnlg2017/test", [triples("one", "two"), triples("three", category="Athlete")])
    local = get_task("webnlg").split("test")

    def row(file: str, category: str, *texts: str) -> dict[str, Any]:
        lex = {"text": list(texts), "comment": ["good"] * len(texts), "lid": ["Id1"] * len(texts)}
        sets = {"mtriple_set": [["A | b | C", "C | d | E"]]}
        return {"category": category, "modified_triple_sets": sets, "lex": lex, "test_category": file}

    rows = [
        row("testdata_no_lex", "Food"), row("testdata_no_lex", "Athlete"),
        row("testdata_unseen_with_lex", "Athlete", "three"),
        row("testdata_with_lex", "Food", "one", "two"), row("testdata_with_lex", "Athlete", "three"),
    ]  # fmt: skip
    asked = hub(monkeypatch, rows)
    split = get_task("webnlg").split("test", strict=True)
    assert split.examples == local.examples and split.sha256 == local.sha256
    assert asked[0]["repository"] == "webnlg-challenge/web_nlg" and asked[0]["data_dir"] == "webnlg_challenge_2017"
    hub(monkeypatch, [row("", "Food", "one", "two")])
    assert said(get_task("webnlg").split("train")) == [("A : b : C | C : d : E\n", (text,)) for text in ("one", "two")]


def test_dart_rows_of_folder_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"tripleset": [["Mars", "JOINED", "1973"], ["Mars", "Place", "NC"]], "texts": ["one", "", " two "]}
    broken = [
        {"tripleset": [["Mars", "JOINED"]], "texts": ["one"]},
        {"tripleset": [], "texts": ["one"]},
        {"tripleset": [["Mars", "", "1973"]], "texts": ["one"]},
        {"tripleset": [["Mars", "JOINED", "1973"]], "texts": ["", None]},
    ]
    folder(tmp_path, monkeypatch, "dart/test", [good, *broken])
    local = get_task("dart").split("test")
    assert said(local) == [("Mars : joined : 1973 | Mars : place : NC\n", ("one", "two"))]
    assert local.skipped == [
        SkippedRow(2, "['Mars', 'JOINED'] is no triple (subject, relation, object)"),
        SkippedRow(3, "no triples"),
        SkippedRow(4, "a part of a triple is empty"),
        SkippedRow(5, "column 'texts' is empty"),
    ]
    asked = hub(monkeypatch, [
        {"tripleset": row["tripleset"], "annotations": {"source": ["x"] * 3, "text": row["texts"]}}
        for row in [good, *broken]
    ])  # fmt: skip
    split = get_task("dart").split("test")
    assert split.sha256 == local.sha256 and split.skipped == local.skipped
    assert asked[0]["repository"] == "Yale-LILY/dart" and split.source == "Yale-LILY/dart (test)"


# ---- summaries


def test_bbc_topics(mirror: None) -> None:
    """Nothing of the topics that are tested is trained on, and both keep the rows of the whole task."""
    parquet = pytest.importorskip("pyarrow.parquet")
    whole = {part: get_task("bbc").split(part).examples for part in ("train", "dev", "test")}
    for part, examples in whole.items():
        rows = parquet.read_table(MIRROR / "bbc_headlines" / f"{part}.parquet", columns=["category"]).to_pylist()
        assert {row["category"] for row in rows} == set(TOPICS)
        for transfer, (trained, tested) in TRANSFERS.items():
            topics = tested if part == "test" else trained
            expected = [example for example in examples if rows[example.row - 1]["category"] in topics]
            assert get_task("bbc", transfer=transfer).split(part).examples == expected
    assert not set(TRANSFERS["news-to-sports"][0]) & {"sport"} and TRANSFERS["news-to-sports"][1] == ("sport",)
    assert not set(TRANSFERS["within-news"][0]) & set(TRANSFERS["within-news"][1])


def test_bbc_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"category": "sport", "title": "A win", "document": "They won.\nAll cheered."}
    rows = [row, {**row, "category": "weather"}, {**row, "title": " "}, {**row, "document": None}]
    folder(tmp_path, monkeypatch, "bbc_headlines/test", rows)
    split = get_task("bbc", words=3).split("test")
    assert said(split) == [("They won. All\n", ("A win",))]
    assert split.skipped == [
        SkippedRow(2, "unknown topic 'weather' (known: business, entertainment, politics, sport, tech)"),
        SkippedRow(3, "column 'title' is empty"),
        SkippedRow(4, "column 'document' is empty"),
    ]
    assert len(get_task("bbc-within-news").split("test")) == 0
    with pytest.raises(ConfigError, match="transfer 'home'; expected none, news-to-sports, within-news"):
        get_task("bbc", transfer="home")
    monkeypatch.delenv(FOLDER_VARIABLE)
    with pytest.raises(DataError, match="FOREWORD_DATA is not set and bbc is not on the hub"):
        get_task("bbc").split("test")


def test_articles_are_cut_to_words(mirror: None) -> None:
    whole, cut = get_task("xsum_subset", words=0).split("test"), get_task("xsum_subset").split("test")
    assert [example.completion for example in whole] == [example.completion for example in cut]
    for long, short in zip(whole, cut, strict=True):
        assert short.prompt.split() == long.prompt.split()[:400]
    assert max(len(example.prompt.split()) for example in whole) > 400


HUB_ROWS: dict[str, tuple[str, list[dict[str, Any]], list[tuple[str, tuple[str, ...]]]]] = {
    "xsum": ("EdinburghNLP/xsum", [{"document": "a\nb", "summary": "c", "id": "1"}], [("a b\n", ("c",))]),
    "scitldr": (
        "allenai/scitldr", [{"source": ["A b.", "", "C d."], "target": ["e", "f"], "paper_id": "x"}],
        [("A b. C d.\n", ("e", "f"))],
    ),
    "dialogsum": (
        "knkarthick/dialogsum",
        [{"id": f"test_{i}_{j}", "dialogue": f"#Person1#: a{i % 2}\n#Person2#: b", "summary": f"s{i}{j}"}
         for i in (9, 10, 12) for j in (1, 2, 3)],
        [("#Person1#: a1 #Person2#: b\n", ("s91", "s92", "s93")),
         ("#Person1#: a0 #Person2#: b\n", ("s101", "s102", "s103")),
         ("#Person1#: a0 #Person2#: b\n", ("s121", "s122", "s123"))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_summaries_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    repository, rows, expected = HUB_ROWS[name]
    asked = hub(monkeypatch, rows)
    split = get_task(name).split("test", strict=True)
    assert said(split) == expected and asked[0]["repository"] == repository
    assert [example.id for example in split] == [f"{name}-test-{i}" for i in range(1, len(expected) + 1)]


def test_dialogues_of_folder_and_hub_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"fname": f"train_{i}", "dialogue": "#Person1#: same", "summaries": [f"s{i}"]} for i in range(3)]
    folder(tmp_path, monkeypatch, "dialogsum/train", rows)
    local = get_task("dialogsum").split("train")
    hub(monkeypatch, [{"id": r["fname"], "dialogue": r["dialogue"], "summary": r["summaries"][0]} for r in rows])
    assert get_task("dialogsum").split("train").sha256 == local.sha256 and len(local) == 3


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"other": []}, r"no column 'texts' \(columns here: other\)"),
        ({"texts": ["", " ", None]}, "column 'texts' is empty"),
        ({"texts": "a"}, "column 'texts' is no list"),
        ({"texts": ["a", 7]}, "an item of column 'texts' is a number, not text"),
        ({"texts": ["a", "\ud800"]}, "an item of column 'texts' holds half a character"),
    ],
)
def test_columns_of_texts_that_cannot_be_used(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        row_lines(row, "texts")
