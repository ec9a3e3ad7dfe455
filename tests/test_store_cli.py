"""`foreword store` as its users meet it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foreword.artifact import TENSORS, save_prefix
from foreword.store import PrefixStore
from test_artifact import make

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store's folder, which commands find by themselves, and a run beside it."""
    monkeypatch.setenv("FOREWORD_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")
    save(tmp_path / "trails" / "prefix", 1.0)
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "trails" / name).touch()
    return tmp_path / "store"


def save(folder: Path, number: float) -> Path:
    save_prefix(make(fill=number, metadata={"task": "trails"}), folder)
    return folder


def last(out: str) -> Any:
    return json.loads(out.strip().splitlines()[-1])


def test_add_list_show_remove(run: Run, root: Path, tmp_path: Path) -> None:
    status, out, _ = run("store", "add", tmp_path / "trails", "--json")
    added = last(out)
    assert status == 0 and out.startswith(f"trails@1 in {root}: 4 slots, 896 bytes for tiny")
    assert (added["name"], added["version"], added["tenant"], added["task"]) == ("trails", 1, "", "trails")
    status, out, _ = run("store", "add", tmp_path / "trails" / "prefix")  # the run's name too
    assert status == 0 and "trails@1" in out and "which was current already" in out
    other = save(tmp_path / "other", 2.0)
    status, out, _ = run("store", "add", other, "--name", "trails", "--tenant", "acme", "--json")
    assert status == 0 and out.startswith("acme/trails@1") and last(out)["object_id"] != added["object_id"]
    assert run("store", "add", other, "--name", "trails")[0] == 0

    status, out, _ = run("store", "list", "--json")
    assert [(each["tenant"], each["name"], each["version"]) for each in last(out)["prefixes"]] == [
        ("", "trails", 2), ("acme", "trails", 1),
    ]  # fmt: skip
    assert "(shared)" in out and "acme" in out and "896" in out
    for options, count in (
        (["--tenant", "acme"], 1), (["--tenant", ""], 1), (["--all-versions"], 3), (["--task", "e2e"], 0),
        (["--base", "tiny"], 2), (["--limit", "1"], 1),
    ):  # fmt: skip
        status, out, err = run("store", "list", *options, "--json")
        assert status == 0 and len(last(out)["prefixes"]) == count, options
        assert ("there are more" in err) == ("--limit" in options) and ("nothing to list" in out) == (count == 0)

    status, out, _ = run("store", "show", "trails", "--version", "1", "--json")
    assert status == 0 and last(out)["versions"] == [2, 1] and "other versions" in out and added["object_id"] in out
    assert run("show", last(out)["folder"])[0] == 0

    status, out, _ = run("store", "remove", "trails", "--version", "2", "--json")
    assert status == 0 and "removed trails@2; trails@1 is current" in out and last(out)["current"]["version"] == 1
    status, out, _ = run("store", "gc", "--json")
    assert status == 0 and last(out)["objects"] == []  # the other tenant has it too
    status, out, _ = run("store", "remove", "--tenant", "acme", "--all", "--json")
    assert status == 0 and "1 version of tenant 'acme' removed; 1 object and 0 leftovers deleted" in out
    assert len(last(out)["objects"]) == len(last(out)["removed"]) == 1
    status, out, _ = run("store", "remove", "trails")
    assert status == 0 and out == "removed trails@1\n"
    status, out, _ = run("store", "gc")
    assert status == 0 and out.startswith("1 object and 0 leftovers deleted")


def test_verify_tells_what_is_wrong(run: Run, root: Path, tmp_path: Path) -> None:
    run("store", "add", tmp_path / "trails")
    run("store", "add", save(tmp_path / "other", 2.0))
    status, out, _ = run("store", "verify", "--json")
    assert status == 0 and "is whole" in out and last(out) == {"store": str(root), "whole": True, "problems": []}
    with PrefixStore(root) as store:
        broken = store.path(store.versions("trails")[0].object_id)
    (broken / TENSORS).write_bytes(b"x")
    run("store", "remove", "other")
    (root / "staging" / "left").touch()
    status, out, _ = run("store", "verify", "--json")
    assert status == 1 and "1 damaged or missing" in out
    found = {each["kind"]: each for each in last(out)["problems"]}
    assert found.keys() == {"damaged", "orphaned", "leftover"}
    assert found["damaged"]["versions"] == ["trails@1"] and "has 1 bytes" in found["damaged"]["message"]
    assert run("store", "gc")[1].startswith("1 object and 1 leftover deleted")
    assert run("store", "add", tmp_path / "trails")[0] == 0  # mends it
    assert run("store", "verify")[0] == 0


ERRORS = {
    "no store": (["list"], "no store in"),
    "no path": (["add", "nowhere"], "does not exist"),
    "bad name": (["add", "trails", "--name", "Trails"], "name 'Trails'; expected 1 to 63 of a-z"),
    "bad tenant": (["add", "trails", "--tenant", "a/b"], "tenant 'a/b'; expected"),
    "no name": (["remove"], "nothing to remove; expected a name"),
    "all of all": (["remove", "--all"], "--all with a name or without --tenant"),
    "all and a name": (["remove", "x", "--tenant", "a", "--all"], "--all with a name"),
    "nobody's": (["remove", "--tenant", "A", "--all", "--store", "full"], "tenant 'A'; expected 1 to 63"),
    "unknown": (["show", "other", "--store", "full"], "no prefix 'other' in full"),
    "another's": (["show", "trails", "--tenant", "acme", "--store", "full"], "no prefix 'trails' of tenant 'acme'"),
    "no version": (["show", "trails", "--version", "7", "--store", "full"], "no version 7 of 'trails'"),
    "remove unknown": (["remove", "other", "--store", "full"], "no prefix 'other' in full; expected a name that was"),
    "not a store": (["add", "trails", "--store", "trails"], "and no store; expected a store or an unused folder"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line(run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("store", "add", "trails", "--store", "full")[0] == 0
    arguments, message = ERRORS[case]
    status, out, err = run("store", *arguments)
    assert status == 1 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message in line


def test_help_names_every_command(run: Run) -> None:
    status, out, _ = run("store", "--help")
    assert status == 0 and all(name in out for name in ("add", "list", "show", "remove", "verify", "gc"))
