"""SuperGLUE, FewGLUE, classification and named entities: counts, formats, splits, labels, folder and hub."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import ConfigError, DataError
from foreword.metrics import get_metric
from foreword.tasks import OWN_TASKS, Labelled, SkippedRow, Split, Tagged, Task, get_task, list_tasks
from foreword.tasks.bio import bio_labels, check_tags, entity_types, to_bio
from foreword.tasks.holdout import held_out, in_order
from foreword.tasks.ner import NER
from foreword.tasks.rows import Unusable
from foreword.tasks.source import FOLDER_VARIABLE
from foreword.tasks.superglue import SUPERGLUE

MIRROR = Path(os.environ.get(FOLDER_VARIABLE, Path(__file__).parent.parent.parent / "shared" / "data"))
NAMES = [name for name in list_tasks() if name not in OWN_TASKS and get_task(name).kind != "generation"]

# train, dev, test as published, but for the dev split where it is held out of train
SIZES = {
    "sst2": (6920, 872, 1821),
    "trec": (4941, 511, 500),
    "ag_news": (9501, 500, 7600),
    "cb": (225, 25, 56),
    "copa": (360, 40, 100),
    "rte": (2241, 249, 277),
    "wic": (4928, 500, 638),
    "boolq": (None, None, 3270),
    "wsc": (None, None, 104),
    "conll04": (922, 231, 288),
    "wnut17": (3394, 1009, 1287),
    "wikigold": (1355, 169, 172),
    "bc5cdr": (4560, 4581, 4797),
    "wikiann": (20000, 10000, 10000),
    "mit_movie": (7034, 782, 1953),
    **{f"fewglue-{name}": (32, 32, size) for name, size in
       {"boolq": 3270, "cb": 56, "copa": 100, "rte": 277, "wic": 638, "wsc": 104}.items()},
}  # fmt: skip


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (MIRROR / "superglue").is_dir():
        pytest.skip(f"no folder superglue in {FOLDER_VARIABLE}")
    pytest.importorskip("pyarrow")
    monkeypatch.setenv(FOLDER_VARIABLE, str(MIRROR))


def folder(root: Path, monkeypatch: pytest.MonkeyPatch, **files: list[dict[str, Any]]) -> None:
    """A folder of the given rows, by file name with `__` for a slash and `_0_` for a dot."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, rows in files.items():
        path = root / (name.replace("__", "/").replace("_0_", ".") + ".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(root))


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], **features: Any) -> list[dict[str, Any]]:
    """A stand-in for the package `datasets`; the requests it gets."""
    asked: list[dict[str, Any]] = []

    class Table(list[dict[str, Any]]):
        pass

    def load_dataset(repository: str, **options: Any) -> Table:
        asked.append({"repository": repository, **options})
        table = Table(rows)
        table.features = features  # type: ignore[attr-defined]
        return table

    module = ModuleType("datasets")
    vars(module).update(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    return asked


# ---- all tasks


@pytest.mark.parametrize("name", NAMES)
def test_every_task_says_what_it_is(name: str) -> None:
    task = get_task(name)
    assert isinstance(task, Task) and task.name == name and task.instruction.endswith(".")
    kind = "tagging" if name in NER else "choice" if name.endswith("copa") else "classification"
    assert task.kind == kind and len(set(task.labels)) == len(task.labels) >= 2
    assert all(get_metric(metric).higher_is_better for metric in task.metrics)
    official = {"cb": ("accuracy", "macro_f1")}.get(name.removeprefix("fewglue-"), ("accuracy",))
    assert task.metrics == (("entity_f1",) if name in NER else official)
    with pytest.raises(ConfigError, match="split 'validation'; expected one of train, dev, test"):
        task.split("validation")
    with pytest.raises(ConfigError, match="limit 0"):
        task.split("test", limit=0)
    with pytest.raises(ConfigError, match=f"option 'folder' of task {name!r}; expected none"):
        get_task(name, folder="x")


@pytest.mark.parametrize("name", NAMES)
def test_the_mirror(mirror: None, name: str) -> None:
    task = get_task(name)
    for part, size in zip(("train", "dev", "test"), SIZES[name], strict=True):
        if size is None:
            continue
        split = task.split(part)
        assert len(split) == size
        assert not split.skipped and len({example.id for example in split}) == len(split)
        _check(task, split)
        assert task.split(split.name, limit=20).examples == split.examples[:20]
        assert task.split(split.name, strict=True).sha256 == split.sha256


def _check(task: Task, split: Split) -> None:
    seen = Counter(tag for e in split for tag in e.tags) if task.kind == "tagging" else Counter(e.label for e in split)
    assert set(seen) <= set(task.labels)
    if split.name == "train" and task.name != "fewglue-wsc":  # all of whose 32 rows are true
        assert set(seen) == set(task.labels)
    for example in split:
        if isinstance(example, Tagged):
            assert example.tags == to_bio(example.tags) and len(example.words) == len(example.tags)
            continue
        assert isinstance(example, Labelled)
        assert example.prompt.endswith("\n") and not example.prompt.endswith("\n\n")
        assert len(example.candidates) == len(task.labels) and len(set(example.candidates)) == len(task.labels)
        assert all(text.strip() for texts in example.texts for text in texts)
        assert len(example.texts) == (len(task.labels) if task.kind == "choice" else 1)


def test_classes_of_the_mirror_are_those_of_its_readme(mirror: None) -> None:
    def count(name: str, *splits: str) -> Counter[str]:
        return Counter(example.label for split in splits for example in get_task(name).split(split))

    assert count("cb", "train", "dev") == {"entailment": 115, "contradiction": 119, "neutral": 16}
    assert count("copa", "train", "dev") == {"1": 195, "2": 205}
    assert count("rte", "train", "dev") == {"not_entailment": 1241, "entailment": 1249}
    assert count("wic", "train", "dev") == {"False": 2714, "True": 2714}
    assert count("wsc", "test") == {"False": 66, "True": 38} and count("copa", "test") == {"1": 55, "2": 45}
    assert count("boolq", "test") == {"True": 2033, "False": 1237}
    assert count("sst2", "test") == {"negative": 912, "positive": 909}
    assert count("trec", "train", "dev") == {
        "description": 1162, "entity": 1250, "abbreviation": 86, "person": 1223, "number": 896, "location": 835
    }  # fmt: skip
    assert count("ag_news", "train", "dev") == {"Sci/Tech": 2538, "World": 2509, "Sports": 2458, "Business": 2496}


def test_entities_of_the_mirror_are_those_of_its_readme(mirror: None) -> None:
    def count(name: str, *splits: str) -> dict[str, int]:
        return Counter(kind for split in splits for e in get_task(name).split(split) for kind in entity_types(e.tags))

    assert count("conll04", "train") == {"Loc": 1219, "Org": 616, "Other": 455, "Peop": 1087}
    assert count("wikigold", "train", "dev", "test") == {"MISC": 712, "ORG": 898, "PER": 934, "LOC": 1014}
    assert count("wikiann", "train") == {"ORG": 9422, "PER": 9164, "LOC": 9345}
    assert count("bc5cdr", "test") == {"Disease": 4424, "Chemical": 5385}
    assert count("mit_movie", "dev")["Soundtrack"] == 5
    assert count("wnut17", "test") == {
        "location": 150, "group": 165, "person": 429, "creative-work": 142, "corporation": 66, "product": 127
    }  # fmt: skip


def test_formats(mirror: None) -> None:
    def first(name: str, split: str = "test") -> Labelled:
        example = get_task(name).split(split, limit=1).examples[0]
        assert isinstance(example, Labelled)
        return example

    copa = first("fewglue-copa", "train")
    premise = "The chandelier shattered on the floor."
    choices = ("The chandelier dropped from the ceiling.", "The chandelier's lights flickered on and off.")
    assert copa.texts == tuple((premise + " because", choice) for choice in choices)
    assert copa.prompt == premise + "\nWhat was the cause?\n" and copa.candidates == choices and copa.label == "1"
    assert first("copa").texts[1] == ("The man turned on the faucet. so", "Water flowed from the spout.")
    assert first("copa").label == "2"
    wic = first("wic")
    assert wic.texts[0][0] == "class: An emerging professional class." and wic.texts[0][1].startswith("class: Apolog")
    assert wic.candidates == ("No", "Yes") and wic.label == "False"
    wsc = first("wsc")
    assert wsc.texts[0][0].startswith("him: Bernard , who had") and wsc.texts[0][1] == "anyone"
    assert wsc.prompt.endswith('his claim away from him .\nDoes "him" refer to "anyone"?\n')
    boolq = first("boolq")
    assert boolq.texts[0][0] == "does ethanol take more energy make that produces"
    assert boolq.prompt == f"{boolq.texts[0][1]}\nQuestion: {boolq.texts[0][0]}?\n"
    rte = first("rte")
    assert rte.texts[0][1] == "Christopher Reeve had an accident." and rte.label == "not_entailment"
    assert rte.candidates[get_task("rte").labels.index(rte.label)] == "No"


def test_tags_become_bio(mirror: None) -> None:
    conll04 = get_task("conll04").split("train", limit=1).examples[0]
    assert conll04.tags[8:13] == ("O", "B-Loc", "B-Org", "I-Org", "I-Org") and "B-Loc" in conll04.tags
    wikigold = [*get_task("wikigold").split("train"), *get_task("wikigold").split("test")]
    (first,) = [example for example in wikigold if example.row == 1]
    assert first.tags[6:7] == ("B-MISC",) and first.tags[10:14] == ("B-ORG", "I-ORG", "I-ORG", "I-ORG")


# ---- splits


def test_held_out_rows_are_apart(mirror: None) -> None:
    for name in ("trec", "rte", "cb", "wikigold"):
        splits = [get_task(name).split(split) for split in ("train", "dev", "test")]
        texts = [{e.words if isinstance(e, Tagged) else e.texts for e in split} for split in splits]
        assert not texts[0] & texts[1]
        assert name != "wikigold" or not (texts[0] | texts[1]) & texts[2]
    train, dev = get_task("rte").split("train"), get_task("rte").split("dev")
    assert sorted(e.row for e in [*train, *dev]) == list(range(1, 2491))
    assert train.source == "superglue/rte.train.parquet (without rows held out for dev)"
    assert dev.source == "superglue/rte.train.parquet (rows held out for dev)"
    rows = [e.row for split in ("train", "dev", "test") for e in get_task("wikigold").split(split)]
    assert sorted(rows) == list(range(1, 1697))


def test_training_rows_that_the_mirror_lacks(mirror: None) -> None:
    for name in ("boolq", "wsc"):
        for split in ("train", "dev"):
            with pytest.raises(DataError) as error:
                get_task(name).split(split)
            message = f"no file superglue/{name}.train.parquet in the folder of FOREWORD_DATA"
            assert str(error.value).startswith(message) and "\n" not in str(error.value)
            assert f"use the task fewglue-{name}, or unset FOREWORD_DATA to read from the hub" in str(error.value)


def test_fewglue_is_not_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with pytest.raises(DataError, match="FOREWORD_DATA is not set and fewglue-cb is not on the hub") as error:
        get_task("fewglue-cb").split("train")
    assert str(error.value).endswith("set FOREWORD_DATA to one")


@given(st.lists(st.text(), min_size=2, max_size=30, unique=True), st.integers(), st.floats(0.01, 0.99), st.randoms())
def test_who_is_held_out_does_not_depend_on_the_order(keys: list[str], seed: int, fraction: float, random: Any) -> None:
    chosen = held_out(keys, fraction, seed)
    shuffled = random.sample(keys + keys[:1], len(keys) + 1)
    assert held_out(shuffled, fraction, seed) == chosen and chosen <= set(keys)
    assert len(chosen) == max(1, round(fraction * len(keys)))
    assert in_order(shuffled, seed) == in_order(keys, seed) and set(in_order(keys, seed)) == set(keys)


# ---- rows that cannot be used


RTE = {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}


def test_rows_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        RTE,
        {**RTE, "label": "perhaps"},
        {**RTE, "premise": " "},
        {**RTE, "label": None},
        {**RTE, "hypothesis": "x"},
    ]
    folder(tmp_path, monkeypatch, superglue__rte_0_val=rows)
    split = get_task("rte").split("test")
    assert [e.row for e in split] == [1, 5] and [e.id for e in split] == ["rte-test-1", "rte-test-5"]
    assert split.skipped == [
        SkippedRow(2, "unknown label 'perhaps' (known: 0, 1, entailment, not_entailment)"),
        SkippedRow(3, "column 'premise' is empty"),
        SkippedRow(4, "column 'label' is empty"),
    ]
    with pytest.raises(DataError, match="row 2 of superglue/rte.val.parquet: unknown label 'perhaps'"):
        get_task("rte").split("test", strict=True)


def test_sentences_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["In", "New", "York"]
    tags = [
        ["O", "B-location", "I-location"],
        ["O", "B-location"],
        ["O", "X-location", "O"],
        ["O", "B-planet", "O"],
        [],
        ["O", "I-location", "I-group"],
    ]
    folder(tmp_path, monkeypatch, ner__wnut17__test=[{"tokens": words, "tags": row} for row in tags])
    split = get_task("wnut17").split("test")
    assert [e.tags for e in split] == [("O", "B-location", "I-location"), ("O", "B-location", "B-group")]
    known = "corporation, creative-work, group, location, person, product"
    assert split.skipped == [
        SkippedRow(2, "3 words and 2 tags"),
        SkippedRow(3, "tag 'X-location' of word 2 is not BIO (O, B-type or I-type)"),
        SkippedRow(4, f"unknown tag 'B-planet' of word 2 (known types: {known})"),
        SkippedRow(5, "column 'tags' is empty"),
    ]
    with pytest.raises(DataError, match="row 2 of ner/wnut17/test.parquet: 3 words and 2 tags"):
        get_task("wnut17").split("test", strict=True)


def test_copa_rows_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"premise": "p", "choice1": "a", "choice2": "b", "question": "effect", "label": 1}
    rows = [row, {**row, "question": "why"}, {**row, "label": 2}]
    folder(tmp_path, monkeypatch, superglue__copa_0_val=rows)
    split = get_task("copa").split("test")
    assert [e.label for e in split] == ["2"]
    assert split.skipped == [
        SkippedRow(2, "question 'why' is neither cause nor effect"),
        SkippedRow(3, "unknown label '2' (known: 0, 1, choice1, choice2)"),
    ]


# ---- BIO


TAGS = st.lists(
    st.one_of(st.just("O"), st.tuples(st.sampled_from("BIES"), st.sampled_from(["X", "Y", "x-y"])).map("-".join)),
    min_size=1,
    max_size=12,
)


@given(TAGS)
def test_bio_has_the_entities_of_seqeval(tags: list[str]) -> None:
    entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    bio = to_bio(tags)
    assert entities(list(bio)) == entities(tags) and to_bio(bio) == bio
    assert len(entity_types(bio)) == len(entities(tags))
    assert set(bio) <= set(bio_labels(["X", "Y", "x-y"]))
    assert to_bio([tag.replace("E-", "L-").replace("S-", "U-") for tag in tags]) == bio


@pytest.mark.parametrize("tag", ["B-", "B", "LOC", "", "o", "X-LOC", "-LOC", "b-LOC"])
def test_tags_that_are_not_bio(tag: str) -> None:
    with pytest.raises(Unusable, match=r"of word 2 is not BIO"):
        to_bio(["O", tag])


def test_tags_that_do_not_align() -> None:
    with pytest.raises(Unusable, match="1 words and 2 tags"):
        check_tags(["a"], ["O", "O"], ["O"])
    with pytest.raises(Unusable, match=r"unknown tag 'I-B' of word 2 \(known types: A\)"):
        check_tags(["a", "b"], ["O", "I-B"], bio_labels(["A"]))


# ---- the hub


def names(*labels: str) -> SimpleNamespace:
    return SimpleNamespace(names=list(labels))


def test_superglue_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's numbers give the same examples as the folder's names."""
    folder(tmp_path, monkeypatch, superglue__rte_0_val=[RTE, {**RTE, "label": "not_entailment"}])
    local = get_task("rte").split("test")
    rows = [{**RTE, "idx": 0, "label": 0}, {**RTE, "idx": 1, "label": 1}, {**RTE, "idx": 2, "label": -1}]
    for features in ({"label": names("entailment", "not_entailment")}, {}):
        asked = hub(monkeypatch, rows, **features)
        split = get_task("rte").split("test", limit=2)
        assert asked == [
            {
                "repository": "aps/super_glue",
                "split": "validation",
                "revision": "refs/convert/parquet",
                "data_dir": "rte",
            }
        ]
        assert split.examples == local.examples and split.sha256 == local.sha256
        assert split.source == "aps/super_glue (rte, validation)"
        assert get_task("rte").split("test").skipped[0].reason.startswith("unknown label '-1'")


HUB_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], Any, str]] = {
    "boolq": ({"question": "q", "passage": "p", "label": 1}, {"label": names("False", "True")}, "True", "boolq, "),
    "cb": (
        {**RTE, "label": 2},
        {"label": names("entailment", "contradiction", "neutral")},
        "neutral",
        "cb, ",
    ),
    "copa": (
        {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": 1},
        {"label": names("choice1", "choice2")},
        "2",
        "copa, ",
    ),
    "wic": ({"word": "w", "sentence1": "a", "sentence2": "b", "label": 0}, {"label": names("False", "True")}, "False",
            "wic, "),
    "wsc": ({"text": "t", "span1_text": "a", "span2_text": "b", "label": 1}, {"label": names("False", "True")}, "True",
            "wsc, "),
    "sst2": ({"text": "t", "label": 0, "label_text": "negative"}, {}, "negative", ""),
    "trec": ({"text": "t", "coarse_label": 2}, {"coarse_label": names("ABBR", "ENTY", "DESC")}, "description", ""),
    "ag_news": ({"text": "t", "label": 3}, {"label": names("World", "Sports", "Business", "Sci/Tech")}, "Sci/Tech", ""),
    "conll04": (
        {"tokens": ["a", "b", "c"], "entities": [{"start": 0, "end": 2, "type": "Org"}]}, {},
        ("B-Org", "I-Org", "O"), "",
    ),
    "wnut17": (
        {"tokens": ["a", "b"], "ner_tags": [1, 2]},
        {"ner_tags": SimpleNamespace(feature=names("O", "B-corporation", "I-corporation"))},
        ("B-corporation", "I-corporation"), "",
    ),
    "bc5cdr": ({"tokens": ["a", "b", "c"], "tags": [2, 3, 1]}, {}, ("B-Disease", "I-Disease", "B-Chemical"), ""),
    "mit_movie": ({"tokens": ["a", "b"], "tags": [17, 18]}, {}, ("B-Soundtrack", "I-Soundtrack"), ""),
    "wikiann": (
        {"tokens": ["a", "b"], "ner_tags": [0, 1]}, {"ner_tags": SimpleNamespace(feature=names("O", "B-PER"))},
        ("O", "B-PER"), "en, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_the_hub_of_each_task(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    row, features, expected, part = HUB_ROWS[name]
    asked = hub(monkeypatch, [row], **features)
    split = get_task(name).split("test")
    (example,) = split
    assert (example.tags if isinstance(example, Tagged) else example.label) == expected
    assert split.source == f"{asked[0]['repository']} ({part}{asked[0]['split']})"
    assert asked[0].get("name") == ("en" if name == "wikiann" else None)
    assert asked[0].get("data_dir") == (name if name in SUPERGLUE else None)


def test_wikigold_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pool, cut by the words alone; marks between documents are no rows."""
    tags = names("O", "B-LOC", "I-LOC", "B-MISC", "I-MISC", "B-ORG", "I-ORG", "B-PER", "I-PER")
    rows = [{"words": ["-DOCSTART-"], "ner_tags": [0]}]
    rows += [{"words": ["Paris", str(i)], "ner_tags": [2, 0]} for i in range(40)]  # IOB1: I- begins
    asked = hub(monkeypatch, rows, ner_tags=SimpleNamespace(feature=tags))
    splits = [get_task("wikigold").split(name, strict=True) for name in ("train", "dev", "test")]
    assert asked[0] == {"repository": "milistu/Wikigold-NER-conll", "split": "train+test", "revision": None}
    assert [len(split) for split in splits] == [32, 4, 4]
    assert sorted(example.row for split in splits for example in split) == list(range(2, 42))
    assert {example.tags for split in splits for example in split} == {("B-LOC", "O")}


def test_spans_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [{"tokens": ["a", "b"], "entities": [{"start": 1, "end": 3, "type": "Org"}]}])
    with pytest.raises(DataError, match="row 1 of .*: an entity from word 1 to 3 in a sentence of 2 words"):
        get_task("conll04").split("test", strict=True)
