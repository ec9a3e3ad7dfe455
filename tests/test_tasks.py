"""The tasks `e2e` and `trails`, and where their rows come from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import ConfigError, DataError, MissingPackage
from foreword.tasks import Example, SkippedRow, Split, Task, get_task, list_tasks
from foreword.tasks.e2e import linearise
from foreword.tasks.source import FOLDER_VARIABLE

MIRROR = Path(os.environ.get(FOLDER_VARIABLE, Path(__file__).parent.parent.parent / "shared" / "data"))

ROWS = [
    {"mr": "name[Aromi], eatType[pub]", "ref": " Aromi is a pub. "},
    {"mr": "name[Zizzi]", "ref": "Zizzi."},
    {"mr": "name[Aromi], eatType[pub]", "ref": "A pub: Aromi."},
    {"mr": "nothing", "ref": "Nothing."},
    {"mr": "name[Zizzi]", "ref": None},
]


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (MIRROR / "e2e").is_dir():
        pytest.skip(f"no folder e2e in {FOLDER_VARIABLE}")
    monkeypatch.setenv(FOLDER_VARIABLE, str(MIRROR))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three rows that can be used and two that cannot."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "e2e").mkdir()
    for split in ("train", "dev"):
        parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "e2e" / f"{split}.parquet")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def test_the_tasks_there_are() -> None:
    assert list_tasks() == [
        "ag_news", "bbc", "bbc-news-to-sports", "bbc-within-news", "bc5cdr", "boolq", "cb", "conll", "conll04", "copa",
        "dart", "dialogsum", "e2e", "fewglue-boolq", "fewglue-cb", "fewglue-copa", "fewglue-rte", "fewglue-wic",
        "fewglue-wsc", "files", "labelled", "mit_movie", "rte", "scitldr", "sst2", "trails", "trec", "webnlg",
        "webnlg-seen", "webnlg-unseen", "wic", "wikiann", "wikigold", "wnut17", "wsc", "xsum", "xsum_subset",
    ]  # fmt: skip
    for name in ("e2e", "trails"):
        task = get_task(name)
        assert isinstance(task, Task) and task.name == name and task.instruction.endswith(".")
    with pytest.raises(ConfigError, match="task 'e3e'; expected one of ag_news, bbc, .*, xsum_subset; name one"):
        get_task("e3e")
    with pytest.raises(ConfigError, match="option 'folder' of task 'e2e'; expected none"):
        get_task("e2e", folder="x")


@pytest.mark.parametrize("name", ["e2e", "trails"])
def test_unknown_splits_and_limits(name: str) -> None:
    with pytest.raises(ConfigError, match="split 'validation'; expected one of train, dev, test"):
        get_task(name).split("validation")
    with pytest.raises(ConfigError, match="limit 0; expected at least 1"):
        get_task(name).split("train", limit=0)


def test_e2e_as_published(mirror: None) -> None:
    task = get_task("e2e")
    train, dev, test = (task.split(name) for name in ("train", "dev", "test"))
    assert (len(train), len(dev), len(test)) == (42061, 547, 630)
    assert not train.skipped and not dev.skipped and not test.skipped
    assert sum(len(example.references) for example in test) == 4693
    assert train.examples[0].prompt == (
        "name : The Vaults | eatType : pub | priceRange : more than £30 | customer rating : 5 out of 5"
        " | near : Café Adriatic\n"
    )
    assert train.examples[0].row == 1
    assert test.examples[0].completion == "A coffee shop in the city centre area called Blue Spice."
    assert test.examples[0].references[1] == "Blue Spice is a coffee shop in city centre."
    assert task.split("train", limit=100).examples == train.examples[:100]
    assert task.split("test", limit=100).examples == test.examples[:100]
    assert test.source == "e2e/test.parquet"


def test_e2e_groups_as_the_official_references(mirror: None) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    official = parquet.read_table(MIRROR / "e2e" / "test_grouped.parquet").to_pylist()
    for example, row in zip(get_task("e2e").split("test"), official, strict=True):
        assert example.prompt == linearise(row["mr"]) + "\n"
        assert example.references == tuple(text.strip() for text in row["refs"])


def test_e2e_rows_that_cannot_be_used(small: Path) -> None:
    train, dev = get_task("e2e").split("train"), get_task("e2e").split("dev")
    assert [(e.id, e.completion, e.row) for e in train] == [
        ("e2e-train-1", "Aromi is a pub.", 1), ("e2e-train-2", "Zizzi.", 2), ("e2e-train-3", "A pub: Aromi.", 3)
    ]  # fmt: skip
    assert [(e.id, e.references) for e in dev] == [
        ("e2e-dev-1", ("Aromi is a pub.", "A pub: Aromi.")), ("e2e-dev-2", ("Zizzi.",))
    ]  # fmt: skip
    assert train.skipped == dev.skipped == [SkippedRow(4, "no meaning representation"), SkippedRow(5, "no reference")]
    with pytest.raises(DataError, match="row 4 of e2e/train.parquet: no meaning representation"):
        get_task("e2e").split("train", strict=True)
    assert len(get_task("e2e").split("train", limit=3, strict=True)) == 3


def test_a_folder_without_the_file(small: Path) -> None:
    with pytest.raises(DataError, match="no file e2e/test.parquet in the folder of FOREWORD_DATA"):
        get_task("e2e").split("test")
    (small / "e2e" / "test.parquet").write_bytes(b"PAR1 this is not parquet")
    with pytest.raises(DataError, match="e2e/test.parquet cannot be read") as error:
        get_task("e2e").split("test")
    assert "\n" not in str(error.value)


def test_the_hub(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    """The hub's columns and split names give the same examples as the folder."""
    local = get_task("e2e").split("dev")
    monkeypatch.delenv(FOLDER_VARIABLE)
    asked: list[Any] = []

    def load_dataset(repository: str, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.append((repository, split))
        return [{"meaning_representation": row["mr"], "human_reference": row["ref"]} for row in ROWS]

    monkeypatch.setitem(sys.modules, "datasets", _module("datasets", load_dataset=load_dataset))
    hub = get_task("e2e").split("dev")
    assert asked == [("tuetschek/e2e_nlg", "validation")]
    assert hub.examples == local.examples and hub.sha256 == local.sha256
    assert hub.source == "tuetschek/e2e_nlg (validation)"


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nand many lines more")

    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", _module("datasets", load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"could not be fetched from the hub \(no route to the hub\)") as error:
        get_task("e2e").split("train")
    assert "\n" not in str(error.value) and "set FOREWORD_DATA" in str(error.value)


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    if package == "pyarrow":
        (tmp_path / "e2e").mkdir()
        (tmp_path / "e2e" / "train.parquet").touch()
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(MissingPackage, match=rf"'{package}' is not installed; run pip install 'foreword\[data\]'"):
        get_task("e2e").split("train")


def test_trails() -> None:
    task = get_task("trails")
    for name in ("dev", "test"):
        split = task.split(name)
        assert all(len(example.references) == 2 for example in split) and not split.skipped
        assert all(example.completion == example.references[0] for example in split)
        assert len({example.prompt for example in split}) == len(split)
    train, dev, test = (task.split(name) for name in ("train", "dev", "test"))
    assert len(train) == 2 * len({example.row for example in train})
    assert train.examples[0].prompt == train.examples[1].prompt
    assert train.examples[0].completion != train.examples[1].completion
    prompts = [{example.prompt for example in split} for split in (train, dev, test)]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    everything = [*train, *dev, *test]
    assert all(example.prompt.startswith("name : ") and example.prompt.endswith("\n") for example in everything)
    assert all("\n" not in reference for example in everything for reference in example.references)
    assert len({example.id for example in everything}) == len(everything)


def test_a_split_is_named_by_its_content() -> None:
    example = Example("a", "x\n", "y", ("y",), 1)
    split = Split("dev", [example])
    assert Split("dev", [example], source="elsewhere").sha256 == split.sha256
    assert Split("dev", [example._replace(references=("z",))]).sha256 != split.sha256
    assert Split("dev", [example, example]).sha256 != split.sha256


names = st.text(st.characters(codec="utf-8", exclude_characters="[],|\n\r"), min_size=1).map(str.strip).filter(bool)


@given(st.lists(st.tuples(names, names), min_size=1))
def test_linearise_keeps_every_field(fields: list[tuple[str, str]]) -> None:
    text = linearise(", ".join(f"{name}[{value}]" for name, value in fields))
    assert text == " | ".join(f"{name} : {value}" for name, value in fields)


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module
