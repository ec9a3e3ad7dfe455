"""A user's own labelled texts and tagged sentences: formats, labels, rows that cannot be used, errors of one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import ConfigError, DataError, ForewordError
from foreword.tasks import ConllFiles, FewShot, LabelledFiles, SkippedRow, Task, get_task
from foreword.tasks.bio import to_bio
from foreword.tasks.conll import conll_rows

ROWS = [{"text": f"text {i}", "label": ("bad", "good", "fair")[i % 3]} for i in range(12)]


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def one_line(error: pytest.ExceptionInfo[ForewordError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- labelled texts


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet"])
def test_all_formats_read_the_same(tmp_path: Path, extension: str) -> None:
    task = LabelledFiles(train=write(tmp_path / f"rows.{extension}", ROWS), dev_fraction=0)
    assert isinstance(task, Task) and (task.kind, task.labels) == ("classification", ("bad", "fair", "good"))
    split = task.split("train")
    assert [e.texts for e in split] == [((row["text"],),) for row in ROWS]
    assert [e.label for e in split] == [row["label"] for row in ROWS]
    assert split.examples[0].prompt == "text 0\n" and split.examples[0].candidates == ("bad", "fair", "good")
    assert split.source == f"rows.{extension}" and split.examples[0].id.startswith("labelled-train-")
    assert split.examples[0].row == (2 if extension in ("csv", "tsv") else 1)


def test_pairs_templates_and_label_words(tmp_path: Path) -> None:
    rows = [{"one": " a ", "two": "b", "gold": "1", "hint": "h"}, {"one": "c", "two": "d", "gold": "0", "hint": "i"}]
    path = write(tmp_path / "a.csv", rows)
    task = LabelledFiles(
        train=path,
        dev_fraction=0,
        text_column="one",
        text_pair_column="two",
        label_column="gold",
        label_words=["No", "Yes"],
        template="{hint}: {one} and {two}?\\n\\n",
    )
    first = task.split("train").examples[0]
    assert first.texts == (("a", "b"),) and first.prompt == "h:  a  and b?\n"
    assert task.labels == ("0", "1") and first.candidates[task.labels.index(first.label)] == "Yes"
    plain = LabelledFiles(test=path, text_column="one", text_pair_column="two", label_column="gold", labels=["1", "0"])
    assert plain.labels == ("1", "0") and plain.split("test").examples[0].prompt == " a \nb\n"


def test_labels_are_texts_whole_numbers_or_truth_values(tmp_path: Path) -> None:
    for labels, expected in (([0, 10, 2], ("0", "2", "10")), ([True, False], ("False", "True"))):
        rows = [{"text": "a", "label": label} for label in labels]
        for extension in ("jsonl", "parquet"):
            task = LabelledFiles(train=write(tmp_path / f"a.{extension}", rows), dev_fraction=0)
            assert task.labels == expected and len(task.split("train", strict=True)) == len(rows)
    rows = [{"text": "a", "label": label} for label in ("x", "y", 0.5, None, ["x"])]
    task = LabelledFiles(train=write(tmp_path / "b.jsonl", rows), dev_fraction=0)
    assert task.labels == ("x", "y")
    assert task.split("train").skipped == [
        SkippedRow(3, "column 'label' is a number, not text"),
        SkippedRow(4, "column 'label' is empty"),
        SkippedRow(5, "column 'label' is a list, not text"),
    ]


def test_unknown_labels(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", ROWS)
    test = write(tmp_path / "test.csv", [*ROWS[:2], {"text": "x", "label": "great"}, {"text": " ", "label": "bad"}])
    split = LabelledFiles(train=train, test=test).split("test")
    assert len(split) == 2
    assert split.skipped == [
        SkippedRow(4, "unknown label 'great' (known: bad, fair, good)"),
        SkippedRow(5, "column 'text' is empty"),
    ]
    with pytest.raises(DataError) as error:
        LabelledFiles(train=train, test=test).split("test", strict=True)
    assert one_line(error).startswith("row 4 of test.csv: unknown label 'great' (known: bad, fair, good)")
    given_labels = LabelledFiles(train=train, labels=["bad", "good"], dev_fraction=0).split("train")
    assert len(given_labels) == 8 and len(given_labels.skipped) == 4


def test_dev_is_cut_from_train_by_text(tmp_path: Path) -> None:
    rows = [{"text": f"text {i // 2}", "label": "ab"[i % 2]} for i in range(100)]
    task = LabelledFiles(train=write(tmp_path / "a.csv", rows), dev_fraction=0.2, seed=3)
    train, dev = task.split("train"), task.split("dev")
    assert (len(train), len(dev)) == (80, 20) and not {e.texts for e in train} & {e.texts for e in dev}
    assert dev.source == "a.csv (0.2 for dev, seed 3)"
    assert task.split("train", limit=5).examples == train.examples[:5]
    one = write(tmp_path / "b.csv", rows[:2])
    with pytest.raises(DataError, match="b.csv has one text only; expected two or more"):
        LabelledFiles(train=one).split("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no file; expected a train, dev or test file"),
        ({"test": "a.csv"}, "neither labels nor a train file; expected one of them; name the labels"),
        (
            {"train": "a.csv", "label_column": "gold"},
            "no column 'gold' in a.csv; expected one of its columns: text, la",
        ),
        (
            {"train": "a.jsonl", "label_column": "gold"},
            "no column 'gold' in a.jsonl; expected one of its columns: text",
        ),
        ({"train": "a.csv", "text_pair_column": "b"}, "no column 'b' in a.csv"),
        ({"train": "a.csv", "template": "{b}"}, "no column 'b' in a.csv"),
        ({"train": "a.csv", "template": "no column"}, "template 'no column' without a column"),
        (
            {"train": "a.csv", "label_words": ["x"]},
            r"1 label words \(x\); expected one for each label \(bad, fair, good\)",
        ),
        ({"train": "a.csv", "label_words": ["x", "x", "y"]}, "label word 'x' more than once"),
        ({"train": "a.csv", "labels": ["x", "x"]}, "label 'x' more than once"),
        ({"train": "a.csv", "dev_fraction": 1.5}, "dev_fraction 1.5"),
        ({"train": "none.csv"}, "none.csv does not exist"),
        ({"train": "a.xlsx"}, "a.xlsx; expected an extension"),
        ({"train": "one.csv"}, r"one.csv has one label only \(bad\) in column 'label'; expected two or more"),
        ({"train": "empty.csv"}, "empty.csv has no labels in column 'label'"),
    ],
)
def test_mistakes_are_found_at_once(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.csv", ROWS)
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "one.csv", ROWS[:1])
    (tmp_path / "empty.csv").write_text("text,label\n")
    files = {key: tmp_path / value if key in ("train", "test") else value for key, value in options.items()}
    with pytest.raises(ForewordError, match=message) as error:
        LabelledFiles(**files)
    one_line(error)


def test_shots_of_own_files(tmp_path: Path) -> None:
    task = FewShot(get_task("labelled", train=write(tmp_path / "a.csv", ROWS * 3), dev_fraction=0), 2)
    assert len(task.split("train")) == len(task.split("dev")) == 6
    with pytest.raises(DataError, match=r"class 'bad' has 4 rows in a.csv, rows 2, 5, 8, \.\.\.; expected at least 5"):
        FewShot(get_task("labelled", train=tmp_path / "a.csv", dev_fraction=0), 5).split("train")


@given(st.lists(st.tuples(st.text(), st.sampled_from("ab")), min_size=1, max_size=8))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"text": "q" + text.replace("\0", ""), "label": label} for text, label in pairs]
    for name in ("a.jsonl", "a.csv"):
        split = LabelledFiles(test=write(folder / name, rows), labels=["a", "b"]).split("test", strict=True)
        assert [(e.texts[0][0], e.label) for e in split] == [(row["text"].strip(), row["label"]) for row in rows]


# ---- tagged sentences

CONLL = """\
-DOCSTART- -X- O O

EU NNP B-ORG
rejects VBZ O

Peter NNP I-PER
Blackburn NNP I-PER
\t
New York\tB-LOC
,\tO
"""


def test_conll_text(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_bytes(b"\xef\xbb\xbf" + CONLL.replace("\n", "\r\n").encode())
    task = ConllFiles(train=path, dev_fraction=0)
    assert isinstance(task, Task) and task.kind == "tagging" and task.metrics == ("entity_f1",)
    assert task.labels == ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER")
    split = task.split("train", strict=True)
    assert [(e.words, e.tags, e.row) for e in split] == [
        (("EU", "rejects"), ("B-ORG", "O"), 3),
        (("Peter", "Blackburn"), ("B-PER", "I-PER"), 6),
        (("New York", ","), ("B-LOC", "O"), 9),
    ]
    assert split.source == "a.conll" and split.examples[0].id == "conll-train-3"


def test_conll_without_a_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n\na B-X\n\n\n-DOCSTART-\nb O\nc U-X")
    assert [(e.words, e.tags, e.row) for e in ConllFiles(test=path, types=["X"]).split("test")] == [
        (("a",), ("B-X",), 4), (("b", "c"), ("O", "B-X"), 8)
    ]  # fmt: skip


def test_tables_of_words_and_tags(tmp_path: Path) -> None:
    rows = [{"words": ["a", "b"], "ner": ["B-X", "I-X"]}, {"words": ["c"], "ner": ["S-Y"]}]
    for extension in ("jsonl", "parquet"):
        path = write(tmp_path / f"a.{extension}", rows)
        task = get_task("conll", train=path, dev_fraction=0, words_column="words", tags_column="ner")
        assert task.labels == ("O", "B-X", "I-X", "B-Y", "I-Y")
        assert [(e.words, e.tags) for e in task.split("train")] == [(("a", "b"), ("B-X", "I-X")), (("c",), ("B-Y",))]
    with pytest.raises(DataError, match="no column 'tokens' in a.parquet; expected one of its columns: words, ner"):
        ConllFiles(train=tmp_path / "a.parquet")


def test_lines_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("a B-X\nb\nc\n\nd O\n\ne X-LOC\n\nf B-Y\ng O\n")
    split = ConllFiles(test=path, types=["X"]).split("test")
    assert [e.words for e in split] == [("d",)]
    assert split.skipped == [
        SkippedRow(2, "one column ('b'), not a word and its tag"),
        SkippedRow(7, "tag 'X-LOC' of word 1 is not BIO (O, B-type or I-type)"),
        SkippedRow(9, "unknown tag 'B-Y' of word 1 (known types: X)"),
    ]
    with pytest.raises(DataError) as error:
        ConllFiles(test=path, types=["X"]).split("test", strict=True)
    assert one_line(error).startswith("row 2 of a.conll: one column ('b'), not a word and its tag")


def test_rows_that_do_not_align(tmp_path: Path) -> None:
    bad = [
        {"tokens": ["a"] * 7, "tags": ["O"] * 6},
        {"tokens": "a b", "tags": ["O"]},
        {"tokens": [], "tags": []},
        {"tokens": ["a", " "], "tags": ["O", "O"]},
        {"tokens": ["a"], "tags": [3]},
        {"tokens": ["a"]},
        {"tokens": 3, "tags": ["O"]},
    ]
    path = write(tmp_path / "a.jsonl", [{"tokens": ["a"], "tags": ["B-X"]}, *bad])
    split = ConllFiles(train=path, dev_fraction=0).split("train")
    assert [e.row for e in split] == [1]
    assert split.skipped == [
        SkippedRow(2, "7 words and 6 tags"),
        SkippedRow(3, "column 'tokens' is text, not a list"),
        SkippedRow(4, "column 'tokens' is empty"),
        SkippedRow(5, "item 2 of column 'tokens' is empty"),
        SkippedRow(6, "item 1 of column 'tags' is a number, not text"),
        SkippedRow(7, "no column 'tags' (columns here: tokens)"),
        SkippedRow(8, "column 'tokens' is a number, not a list"),
    ]
    with pytest.raises(DataError, match="row 2 of a.jsonl: 7 words and 6 tags; expected a usable row; correct it"):
        ConllFiles(train=path, dev_fraction=0).split("train", strict=True)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "a.conll",
            "a O\n",
            {},
            "a.conll has no entity in it; expected tags such as B-PER; correct the tags, or name the types",
        ),
        ("a.conll", "a\nb\n", {"types": ["X"]}, r"no row that can be used \(1 skipped; row 1: one column"),
        ("a.conll", "", {"types": ["X"]}, "a.conll holds no rows"),
        ("a.conll", "a\nb\n", {}, r"has no entity in it \(row 1: one column \('a'\), not a word and its tag\)"),
        ("a.csv", "a,O\n", {}, "a.csv; expected CoNLL text or one of .jsonl, .ndjson, .parquet"),
        ("a.conll", "a B-X\n", {"dev_fraction": 0.1}, "a.conll has one sentence only"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, name: str, content: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ForewordError, match=message) as error:
        ConllFiles(train=tmp_path / name, **{"dev_fraction": 0, **options}).split("train")
    one_line(error)


def test_types_or_a_train_file(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("a B-X\n")
    with pytest.raises(
        ConfigError, match="neither types nor a train file; expected one of them; name the entity types"
    ):
        ConllFiles(test=tmp_path / "a.conll")
    with pytest.raises(DataError, match="none.conll does not exist"):
        ConllFiles(test=tmp_path / "none.conll")
    (tmp_path / "b.conll").write_bytes(b"a B-X\n\xff O\n")
    with pytest.raises(DataError, match="b.conll is not UTF-8 at line 2, byte 1"):
        ConllFiles(train=tmp_path / "b.conll")


def test_dev_is_cut_from_train_by_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("".join(f"word{i // 2} B-X\n. O\n\n" for i in range(40)))
    task = ConllFiles(train=tmp_path / "a.conll", dev_fraction=0.25)
    train, dev = task.split("train"), task.split("dev")
    assert (len(train), len(dev)) == (30, 10) and not {e.words for e in train} & {e.words for e in dev}


WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=5)
SENTENCE = st.lists(st.tuples(WORDS, st.sampled_from(["O", "B-X", "I-X"])), min_size=1, max_size=5)


@given(st.lists(SENTENCE, min_size=1, max_size=5), st.sampled_from([" ", "\t", "  x "]))
def test_any_sentence_survives(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[list[tuple[str, str]]], separator: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.conll"
    path.write_text(
        "\n".join("".join(f"{word}{separator}{tag}\n" for word, tag in sentence) for sentence in sentences),
        encoding="utf-8",
    )
    read = [record for record in conll_rows(path) if not isinstance(record, SkippedRow)]
    assert [row["tokens"] for _, row in read] == [[word for word, _ in sentence] for sentence in sentences]
    split = ConllFiles(test=path, types=["X"]).split("test", strict=True)
    assert [e.tags for e in split] == [to_bio([tag for _, tag in sentence]) for sentence in sentences]
