"""The prefix store: one object per content, names per tenant, and never anything in between, whatever dies when."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.artifact import HEADER, TENSORS, load_prefix, read_header, save_prefix
from foreword.errors import PrefixFormatError, PrefixMismatch, RunError, StorageError, StoreError
from foreword.prefix import Head, Prefix
from foreword.store import PrefixStore, StoredPrefix, default_store
from test_artifact import assert_equal, base_for, make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    with PrefixStore(tmp_path / "store") as opened:
        yield opened


def filled(number: float, **metadata: Any) -> Prefix:
    """A prefix that its number tells apart."""
    return make(fill=float(number), metadata=metadata)


def number_of(store: PrefixStore, stored: StoredPrefix | None) -> float | None:
    if stored is None:
        return None
    (number,) = {n for site in store.load(stored.object_id).sites.values() for n in site.keys.unique().tolist()}
    return number


def kinds(store: PrefixStore) -> list[str]:
    return sorted({problem.kind for problem in store.verify()})


def objects_on_disk(store: PrefixStore) -> set[str]:
    return {path.name for path in store.root.glob("objects/*/*")}


# Adding


def test_add_then_load(store: PrefixStore, tmp_path: Path) -> None:
    prefix = make(mass=True, gate="token", metadata={"task": "e2e", "metrics": {"bleu": 50.1}})
    save_prefix(prefix, tmp_path / "p")
    added = store.add(tmp_path / "p", "e2e", "acme")
    assert added == store.resolve("e2e", ["acme"]) and str(added) == "acme/e2e@1"
    assert (added.base, added.fingerprint, added.task, added.gates) == ("tiny", "0f" * 32, "e2e", "mass, token")
    assert (added.length, added.parameters, added.num_bytes) == (4, prefix.num_parameters, prefix.num_bytes)
    assert_equal(store.load(added.object_id, base_for(prefix)), prefix)
    # The folder is an ordinary prefix folder, and anybody can compute its address.
    folder = store.path(added.object_id)
    assert_equal(load_prefix(folder), prefix)
    assert sorted(os.listdir(folder)) == [HEADER, TENSORS]
    assert hashlib.sha256((folder / HEADER).read_bytes()).hexdigest() == added.object_id
    assert store.verify() == []


def test_all_that_is_read_stays_and_the_training_state_goes(store: PrefixStore, tmp_path: Path) -> None:
    head = Head("classification", ("no", "yes"), "mean", torch.randn(2, 12), torch.randn(2))
    prefix = make(gate="token", mass=True, head=head, training_state={"embedding": torch.randn(99)}, position_offset=4)
    save_prefix(prefix, tmp_path / "p")
    added = store.add(tmp_path / "p", "x")
    assert_equal(store.load(added.object_id), prefix.fold())
    assert store.load(added.object_id).sha256() == prefix.sha256()
    assert read_header(store.path(added.object_id))["training"] is None and added.position_offset == 4
    assert prefix.training_state is not None and load_prefix(tmp_path / "p").training_state is not None
    # With or without training state, it is the same content.
    assert store.put(prefix.fold(), "y").object_id == added.object_id


def test_a_run_folder_is_its_best_prefix(store: PrefixStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (run / name).touch()
    with pytest.raises(RunError, match="has no prefix yet"):
        store.add(run, "x")
    save_prefix(filled(1), run / "prefix")
    assert number_of(store, store.add(run, "x")) == 1


def test_what_cannot_be_used_is_not_published(store: PrefixStore, tmp_path: Path) -> None:
    save_prefix(make(), tmp_path / "p")
    data = (tmp_path / "p" / TENSORS).read_bytes()
    (tmp_path / "p" / TENSORS).write_bytes(data[:-1] + b"\x7f")
    save_prefix(make(gate="mean"), tmp_path / "gates")
    with pytest.raises(PrefixFormatError, match="has sha256"):
        store.add(tmp_path / "p", "x")
    with pytest.raises(PrefixFormatError, match="does not exist"):
        store.add(tmp_path / "nothing", "x")
    with pytest.raises(PrefixMismatch, match="gate pooling 'mean' in a causal decoder"):
        store.add(tmp_path / "gates", "x")
    with pytest.raises(PrefixFormatError, match="holds NaN"):
        store.put(make(fill=math.nan), "x")
    assert store.list() == [] and objects_on_disk(store) == set() and store.verify() == []


def test_equal_content_is_one_object_and_no_new_version(store: PrefixStore) -> None:
    first = store.put(filled(1), "a")
    assert store.put(filled(1), "a") == first
    assert store.put(filled(1), "b").object_id == store.put(filled(1), "a", "acme").object_id == first.object_id
    assert len(objects_on_disk(store)) == 1
    second = store.put(filled(2), "a")
    assert (second.version, store.resolve("a", [""])) == (2, second)
    third = store.put(filled(1), "a")
    assert (third.version, third.object_id) == (3, first.object_id)


CHANGES: dict[str, Callable[[Prefix], Any]] = {
    "numbers": lambda prefix: next(iter(prefix.sites.values())).keys.view(-1)[:1].add_(1e-6),
    "sign of zero": lambda prefix: next(iter(prefix.sites.values())).values.view(-1)[:1].mul_(-1),
    "base": lambda prefix: setattr(prefix, "base_name", "other"),
    "fingerprint": lambda prefix: setattr(prefix, "fingerprint", "0e" * 32),
    "offset": lambda prefix: setattr(prefix, "position_offset", 1),
    "task": lambda prefix: prefix.metadata.update(task="e2e"),
    "origin": lambda prefix: prefix.metadata.update(provenance={"command": ["foreword"]}),
    "head": lambda prefix: setattr(
        prefix, "head", Head("choice", ("a", "b"), "cls", torch.zeros(1, 12), torch.zeros(1))
    ),
    "head's pooling": lambda prefix: setattr(
        prefix, "head", Head("choice", ("a", "b"), "mean", torch.zeros(1, 12), torch.zeros(1))
    ),
}


def test_different_content_is_another_object(store: PrefixStore) -> None:
    ids = {store.put(filled(0), "x").object_id}
    for change in CHANGES.values():
        prefix = filled(0)
        change(prefix)
        ids.add(store.put(prefix, "x").object_id)
    assert len(ids) == len(CHANGES) + 1 == store.put(filled(7), "x").version - 1


def test_odd_texts_in_a_header_do_no_harm(store: PrefixStore) -> None:
    prefix = make(metadata={"task": {"name": "own", "rows": [1]}})
    prefix.base_name = "half \ud800 a character, a \0 and 'quotes'"
    added = store.put(prefix, "x")
    assert added.base == "half ? a character, a \0 and 'quotes'" and added.task == '{"name": "own", "rows": [1]}'
    assert store.resolve("x", [""]) == added == store.list(base=prefix.base_name)[0]
    assert store.load(added.object_id).base_name == prefix.base_name


# Names and tenants


@pytest.mark.parametrize("name", ["", "A", "ü", "-a", ".a", "a" * 64, "a/b", "../a", "a\n", "a b", "a\0", "\ud800"])
def test_names_that_cannot_be(store: PrefixStore, name: str) -> None:
    with pytest.raises(StoreError, match="expected 1 to 63 of a-z"):
        store.put(filled(0), name)
    if name:
        with pytest.raises(StoreError, match="tenant .* expected 1 to 63 of a-z"):
            store.put(filled(0), "a", name)
    with pytest.raises(StoreError, match="tenant .* expected 1 to 63 of a-z"):
        store.remove_tenant(name)  # "" is all: removed by name only
    assert store.resolve(name, [""]) is None and store.versions(name) == []
    assert store.resolve("a", [name]) is None and store.list(tenant=name, task=name) == []
    for tenant in ("", name):
        with pytest.raises(StoreError, match="no prefix"):
            store.remove(name, tenant)
    assert not any((store.root / "objects").iterdir())


@pytest.mark.parametrize("name", ["a", "0", "a" * 63, "trails.v2_x-y", "store.sqlite", "objects"])
def test_names_that_can_be(store: PrefixStore, name: str) -> None:
    assert store.put(filled(0), name, name) == store.resolve(name, [name])


def test_a_name_is_its_tenants_alone(store: PrefixStore) -> None:
    mine, theirs, shared = (store.put(filled(k), "x", tenant) for k, tenant in enumerate(("a", "b", "")))
    only = store.put(filled(9), "only", "a")
    # Each tenant gets its own, the shared one where it has none, and never another's.
    assert store.resolve("x", ["a", ""]) == mine and store.resolve("x", ["b", ""]) == theirs
    assert store.resolve("x", ["c", ""]) == shared and store.resolve("x", ["c"]) is None
    assert store.resolve("x", ["", "a"]) == shared and store.resolve("x", []) is None
    assert store.resolve("only", ["a", ""]) == only  # the control: the name is there
    assert store.resolve("only", ["b", ""]) is store.resolve("nothing", ["b", ""]) is None
    assert store.list(tenant="b") == [theirs] and store.list(tenant="a") == [only, mine]
    with pytest.raises(StoreError, match="no prefix 'b/only'"):
        store.remove("only", "b")
    store.remove("x", "b")
    assert store.resolve("x", ["a", ""]) == mine and store.resolve("x", ["b", ""]) == shared


def test_the_same_numbers_do_not_tell_who_else_has_them(store: PrefixStore) -> None:
    first = store.put(filled(1, provenance={"command": ["--train", "secret-of-a.jsonl"]}), "x", "a")
    second = store.put(filled(1, provenance={"command": ["--train", "rows.jsonl"]}), "x", "b")
    assert first.object_id != second.object_id
    assert "secret" not in json.dumps(store.load(second.object_id).metadata)
    assert "secret" in json.dumps(store.load(first.object_id).metadata)


def test_removing_versions(store: PrefixStore) -> None:
    one, two, three = (store.put(filled(k), "x") for k in (1, 2, 3))
    assert store.versions("x") == [three, two, one]
    with pytest.raises(StoreError, match="'x' has no version 4; expected one of 1, 2, 3"):
        store.remove("x", version=4)
    with pytest.raises(StoreError, match="no version 99999999999999999999"):
        store.remove("x", version=99999999999999999999)
    # Without the newest the one before is current again; its number is not given to another content.
    assert store.remove("x", version=3) == [three] and store.resolve("x", [""]) == two
    assert store.put(filled(4), "x").version == 4
    assert store.remove("x", version=1) == [one]
    assert [each.version for each in store.remove("x")] == [4, 2]
    assert store.resolve("x", [""]) is None and store.list(all_versions=True) == []
    assert store.put(filled(5), "x").version == 1


def test_list_filters_and_pages(store: PrefixStore) -> None:
    for k in range(6):
        prefix = filled(k, task=("e2e", "dart")[k % 2])
        prefix.base_name, prefix.fingerprint = ("small", "f0") if k < 3 else ("large", "f1")
        store.put(prefix, f"n{k}", ("", "acme")[k // 4])
    store.put(filled(9, task="rte"), "n0")

    def names(**filters: Any) -> list[str]:
        return [str(each) for each in store.list(**filters)]

    assert names() == ["n0@2", "n1@1", "n2@1", "n3@1", "acme/n4@1", "acme/n5@1"]
    assert names(all_versions=True)[:2] == ["n0@1", "n0@2"]
    assert names(task="e2e") == ["n2@1", "acme/n4@1"]
    assert names(task="e2e", all_versions=True) == ["n0@1", "n2@1", "acme/n4@1"]
    assert names(base="large", tenant="") == ["n3@1"] and names(fingerprint="f0") == ["n1@1", "n2@1"]
    assert names(task="none") == names(tenant="nobody") == []
    for filters in ({}, {"tenant": ""}, {"all_versions": True}, {"base": "large"}):
        pages, after = [], None
        while page := store.list(limit=2, after=after, **filters):
            pages += page
            after = page[-1]
            assert len(page) <= 2
        assert pages == store.list(**filters)


# Objects


def test_garbage_is_what_nothing_points_at(store: PrefixStore) -> None:
    kept, gone = store.put(filled(1), "kept"), store.put(filled(2), "gone")
    store.put(filled(1), "gone")
    store.remove("gone")
    assert store.load(gone.object_id) and kinds(store) == ["orphaned"]  # for who still reads it
    freed = store.collect_garbage()
    assert freed.objects == [gone.object_id] and freed.leftovers == 0 and freed.num_bytes > gone.num_bytes
    with pytest.raises(StoreError, match="is not in"):
        store.load(gone.object_id)
    assert number_of(store, kept) == 1 and store.verify() == []
    assert store.collect_garbage() == ([], 0, 0)
    assert [path.name for path in (store.root / "objects").iterdir()] == [kept.object_id[:2]]


def test_leftovers_are_found_and_deleted(store: PrefixStore) -> None:
    kept = store.put(filled(1), "kept")
    places = {
        store.root / "staging" / "abc" / HEADER, store.root / "staging" / "file", store.root / "objects" / "file",
        store.root / "objects" / "aa" / "file", store.path(kept.object_id) / "prefix.json.next",
        store.root / "objects" / "aa" / kept.object_id / HEADER,
    }  # fmt: skip
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("x")
    found = store.verify()
    assert {problem.kind for problem in found} == {"leftover"} and len(found) == len(places)
    assert store.collect_garbage() == ([], len(places), len(places))
    assert store.verify() == [] and number_of(store, kept) == 1


@settings(max_examples=40)
@given(file=st.sampled_from([HEADER, TENSORS]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_and_refused(
    tmp_path_factory: pytest.TempPathFactory, file: str, place: float, bit: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "flipped"
    with PrefixStore(root) as store:
        added, other = store.put(make(fill=0.5, mass=True, metadata={"note": "text"}), "x"), store.put(filled(2), "y")
        path = store.path(added.object_id) / file
        whole = path.read_bytes()
        data = bytearray(whole)
        data[int(place * len(data))] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(PrefixFormatError) as info:
            store.load(added.object_id)
        assert "\n" not in str(info.value)
        (problem,) = store.verify()
        assert (problem.kind, problem.path, problem.versions) == ("damaged", path.parent, [added])
        assert number_of(store, other) == 2 and store.resolve("x", [""]) == added
        # Adding it again mends it, and is no new version.
        assert store.put(make(fill=0.5, mass=True, metadata={"note": "text"}), "x") == added
        assert store.verify() == [] and path.read_bytes() == whole


def test_missing_and_exchanged_objects_are_named(store: PrefixStore) -> None:
    one, two = store.put(filled(1), "one"), store.put(filled(2), "two", "acme")
    store.put(filled(1), "also")
    shutil.rmtree(store.path(one.object_id))
    (problem,) = store.verify()
    assert problem.kind == "missing" and [str(each) for each in problem.versions] == ["also@1", "one@1"]
    with pytest.raises(StoreError, match="is not in"):
        store.load(one.object_id)
    # An intact prefix in another's place is still not that one.
    shutil.copytree(store.path(two.object_id), store.path(one.object_id))
    with pytest.raises(PrefixFormatError, match="holds another prefix"):
        store.load(one.object_id)
    assert [problem.kind for problem in store.verify()] == ["damaged"]
    (store.path(one.object_id) / HEADER).unlink()
    with pytest.raises(PrefixFormatError, match="does not exist"):
        store.load(one.object_id)
    store.put(filled(1), "one")
    assert store.verify() == [] and store.versions("one") == [one]


@pytest.mark.parametrize("object_id", ["", "..", "../../etc", "a" * 63, "A" * 64, "a" * 64 + "\n"])
def test_only_object_ids_are_paths(store: PrefixStore, object_id: str) -> None:
    for call in (store.load, store.path):
        with pytest.raises(StoreError, match="expected 64 hexadecimal digits"):
            call(object_id)


def test_another_base_is_refused(store: PrefixStore) -> None:
    added = store.put(make(), "x")
    with pytest.raises(PrefixMismatch, match="weights"):
        store.load(added.object_id, base_for(make(), fingerprint="ff" * 32))


# No byte is left


def holders(root: Path, *needles: bytes) -> list[set[str]]:
    """Which files hold each of these bytes."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return [{name for name, data in files.items() if needle in data} for needle in needles]


def many_names(store: PrefixStore, like: StoredPrefix, tenant: str, count: int, name: str = "n{}") -> None:
    """Names without objects of their own: rows alone."""
    with store._catalog.writing() as connection:
        for k in range(count):
            store._catalog.record(connection, like._replace(tenant=tenant, name=name.format(k)))


def shuffle_rows(store: PrefixStore, marked: StoredPrefix, other: StoredPrefix, seed: int) -> None:
    """Rows that come and go in all places, so that SQLite moves others between its pages and leaves copies there."""
    rng = random.Random(seed)
    with store._catalog.writing() as connection:
        there: list[StoredPrefix] = []
        for _ in range(3000):
            like = rng.choice([marked, other, other._replace(tenant="acme")])
            if rng.random() < 0.8 or len(there) < 30:
                name = f"{rng.randrange(10**6)}-{'y' * rng.randrange(40)}-{'marked' if like is marked else 'plain'}"
                there.append(store._catalog.record(connection, like._replace(name=name)))
            else:
                there.sort()
                place = rng.randrange(len(there) - 10)
                gone = slice(place, place + rng.randrange(1, 6))
                store._catalog.remove(connection, there[gone])
                del there[gone]


@pytest.mark.parametrize("seed", range(4))
def test_removing_a_tenant_leaves_no_byte_of_it(store: PrefixStore, seed: int) -> None:
    secret = make(12, metadata={"task": "marked-task", "note": "marked-note", "provenance": {"command": ["marked"]}})
    tensor = next(iter(secret.sites.values())).keys.numpy().tobytes()
    shared, other = filled(1, task="common"), store.put(filled(2), "other")
    for k in range(3):  # former versions, removed versions, and objects that others have too
        store.put(make(metadata={"note": f"marked-{k}"}), "former", "marked-tenant")
    added = store.put(secret, "marked-name", "marked-tenant")
    store.put(shared, "common", "marked-tenant")
    for tenant in ("", "acme"):
        store.put(shared, "common", tenant)
    removed = store.put(make(metadata={"note": "marked-removed"}), "removed", "marked-tenant")
    store.remove("removed", "marked-tenant")
    shuffle_rows(store, added, other, seed)
    names = len(store.list(tenant="acme"))
    before = holders(store.root, b"marked", tensor, bytes.fromhex(added.object_id), added.object_id.encode())
    assert before[0] and before[1], "the control: a leak would be seen"

    gone = store.remove_tenant("marked-tenant")
    assert added in gone.versions and {added.object_id, removed.object_id} <= set(gone.freed.objects)
    assert holders(store.root, b"marked", tensor, tensor[:64], tensor[-64:], added.object_id.encode()) == [set()] * 5
    assert not any(added.object_id in str(path) for path in store.root.rglob("*"))
    assert store.resolve("marked-name", ["marked-tenant", ""]) is None
    assert number_of(store, store.resolve("common", ["acme"])) == 1 and number_of(store, other) == 2
    assert len(store.list(tenant="acme")) == names > 100 and store.verify() == []
    assert store.remove_tenant("marked-tenant") == ([], ([], 0, 0))
    assert store.put(filled(3), "marked-name", "marked-tenant").version == 1


def test_a_long_read_keeps_the_log_and_is_told(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(filled(1, note="marked"), "x", "acme")
    monkeypatch.setattr("foreword.database.BUSY_SECONDS", 0.1)
    with PrefixStore(store.root) as other:
        reader = sqlite3.connect(store.root / "store.sqlite", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM versions").fetchall()
        with pytest.raises(StoreError, match=r"(cannot be emptied|held by another)"):
            other.remove_tenant("acme")
        reader.close()
        other.remove_tenant("acme")
    assert holders(store.root, b"acme", b"marked") == [set(), set()]


# Many names


def test_ten_thousand_names_are_found_by_index(store: PrefixStore) -> None:
    like = store.put(filled(1, task="e2e"), "first")
    for tenant in range(10):
        many_names(store, like, f"t{tenant}", 1000)
    (connection,) = store._catalog._idle
    asked: list[str] = []
    connection.set_trace_callback(asked.append)
    found = store.resolve("n500", ["t3", ""])
    assert found is not None and store.resolve("first", ["t3", ""]) == like
    after = store.list(tenant="t3", limit=10)[-1]
    assert len(store.list(tenant="t3", limit=10, after=after)) == len(store.list(limit=10, after=after)) == 10
    for filters in ({"task": "e2e"}, {"base": "tiny"}, {"fingerprint": "0f" * 32}):
        assert store.list(**filters, limit=1) == [like]
    assert len(store._catalog.users(like.object_id)) == 10_001
    connection.set_trace_callback(None)
    assert len(asked) == 10
    for sql in asked:
        plan = [row[-1] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()]
        assert plan and all(step.startswith("SEARCH") or "SUBQUERY" in step for step in plan), plan
    assert len(store.list()) == 10_001


def test_resolve_uses_the_whole_key(store: PrefixStore) -> None:
    store.put(filled(1), "x")
    (connection,) = store._catalog._idle
    asked: list[str] = []
    connection.set_trace_callback(asked.append)
    store.resolve("x", [""])
    connection.set_trace_callback(None)
    plan = connection.execute(f"EXPLAIN QUERY PLAN {asked[0]}").fetchall()
    assert [row[-1] for row in plan] == ["SEARCH v USING PRIMARY KEY (tenant=? AND name=?)"]


# Against a plain dictionary

TENANTS, NAMES = ("", "a", "b"), ("x", "y")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(TENANTS), st.sampled_from(NAMES), st.integers(0, 3)),
        st.tuples(st.just("remove"), st.sampled_from(TENANTS), st.sampled_from(NAMES), st.none() | st.integers(1, 3)),
        st.tuples(st.sampled_from(["collect", "reopen"])),
        st.tuples(st.just("remove_tenant"), st.sampled_from(TENANTS[1:])),
    ),
    max_size=25,
)


class Model:
    """What a store must do, on dictionaries: versions and the last number of each name, and the objects there are."""

    def __init__(self) -> None:
        self.versions: dict[tuple[str, str], dict[int, int]] = {}
        self.last: dict[tuple[str, str], int] = {}
        self.objects: set[int] = set()

    def put(self, tenant: str, name: str, number: int) -> None:
        versions = self.versions.setdefault((tenant, name), {})
        self.objects.add(number)
        if not versions or versions[max(versions)] != number:
            self.last[tenant, name] = self.last.get((tenant, name), 0) + 1
            versions[self.last[tenant, name]] = number

    def remove(self, tenant: str, name: str, version: int | None) -> bool:
        versions = self.versions.get((tenant, name), {})
        chosen = [each for each in versions if version in (None, each)]
        for each in chosen:
            del versions[each]
        if not versions:
            self.versions.pop((tenant, name), None)
            self.last.pop((tenant, name), None)
        return bool(chosen)

    def collect(self) -> None:
        self.objects = {number for versions in self.versions.values() for number in versions.values()}

    def remove_tenant(self, tenant: str) -> None:
        for name in NAMES:
            self.remove(tenant, name, None)
        self.collect()


@given(steps=STEPS)
def test_any_sequence_does_what_dictionaries_do(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    model, store = Model(), PrefixStore(tmp_path_factory.mktemp("any") / "store")
    ids: dict[str, int] = {}
    for step, *arguments in steps:
        if step == "put":
            tenant, name, number = arguments
            model.put(*arguments)
            ids[store.put(filled(number), name, tenant).object_id] = number
        elif step == "remove":
            tenant, name, version = arguments
            if model.remove(tenant, name, version):
                store.remove(name, tenant, version)
            else:
                with pytest.raises(StoreError):
                    store.remove(name, tenant, version)
        elif step == "collect":
            model.collect()
            store.collect_garbage()
        elif step == "remove_tenant":
            model.remove_tenant(*arguments)
            store.remove_tenant(*arguments)
        else:
            store.close()
            store = PrefixStore(store.root, create=False)
        for tenant in TENANTS:
            for name in NAMES:
                versions = model.versions.get((tenant, name), {})
                stored = store.versions(name, tenant)
                assert {each.version: ids[each.object_id] for each in stored} == versions
                assert store.resolve(name, [tenant]) == (stored[0] if stored else None)
                assert number_of(store, stored[0] if stored else None) == (
                    versions[max(versions)] if versions else None
                )
        assert {ids[name] for name in objects_on_disk(store)} == model.objects
    assert {problem.kind for problem in store.verify()} <= {"orphaned"}
    store.close()


# Several at once

SCRIPT = """
import ctypes, json, os, resource, signal, sys, time
from pathlib import Path
import torch
from foreword.errors import ForewordError
from foreword.prefix import Prefix, Site, SiteTensors
from foreword.store import PrefixStore

def filled(number, **metadata):
    site = SiteTensors(torch.full((2, 4, 8), float(number)), torch.full((2, 4, 6), float(number)))
    return Prefix({Site("decoder", 0): site}, "tiny", "0f" * 32, metadata=metadata)

def number_of(store, stored):
    return None if stored is None else int(store.load(stored.object_id).sites[Site("decoder", 0)].keys.flatten()[0])
"""


def start(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return outputs


KEEP_PUBLISHING = """
number = int(sys.argv[2])
with PrefixStore(sys.argv[1]) as store:
    for k in range(12):
        for name, content in ("own%d" % number, k), ("both", 100 * number + k), ("same", k):
            added = store.put(filled(content), name)
            assert number_of(store, added) == content
            print(json.dumps([name, added.version, content]))
"""
KEEP_COLLECTING = """
end = time.monotonic() + 60
with PrefixStore(sys.argv[1]) as store:
    while time.monotonic() < end and not os.path.exists(sys.argv[2]):
        store.collect_garbage()
        store.verify()
"""


def test_two_processes_publish_while_a_third_collects(tmp_path: Path) -> None:
    root, stop = tmp_path / "store", tmp_path / "stop"
    collector = start(KEEP_COLLECTING, root, stop)
    lines = "".join(finish(start(KEEP_PUBLISHING, root, 1), start(KEEP_PUBLISHING, root, 2))).splitlines()
    stop.touch()
    finish(collector)
    with PrefixStore(root, create=False) as store:
        stored = {(each.name, each.version): number_of(store, each) for each in store.list(all_versions=True)}
        assert stored == {(name, version): content for name, version, content in map(json.loads, lines)}
        assert [each.version for each in store.versions("both")] == [*range(24, 0, -1)]
        assert [each.version for each in store.versions("own1")] == [*range(12, 0, -1)]
        assert store.verify() == []


POINT_AND_DROP = """
with PrefixStore(sys.argv[1]) as store:
    for k in range(40):
        added = store.put(filled(k % 2), "x")  # an object that a collector is free to delete until now
        assert number_of(store, added) == k % 2
        store.remove("x")
Path(sys.argv[2]).touch()
"""


def test_a_collector_never_takes_what_is_being_added(tmp_path: Path) -> None:
    root, stop = tmp_path / "store", tmp_path / "stop"
    finish(start(KEEP_COLLECTING, root, stop), start(POINT_AND_DROP, root, stop))


def test_threads_share_a_store(store: PrefixStore) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for k in range(6):
                mine = store.put(filled(100 * number + k), f"n{number}", "acme")
                assert store.resolve(f"n{number}", ["acme"]) == mine
                assert number_of(store, mine) == 100 * number + k
                store.put(filled(k), "both")
                assert store.list(tenant="acme") and store.resolve("both", ["acme", ""])
                if number == 0:
                    store.collect_garbage()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [len(store.versions(f"n{number}", "acme")) for number in range(6)] == [6] * 6
    assert len(store._catalog._idle) <= 6
    store.collect_garbage()
    assert store.verify() == []


AFTER_A_FORK = """
store = PrefixStore(sys.argv[1])
store.put(filled(0), "x")
for number in range(1, 4):
    child = os.fork()
    if child == 0:
        store.put(filled(number), "x")
        store.close()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert number_of(store, store.resolve("x", [""])) == number
assert store.verify() == [] and len(store.versions("x")) == 4
"""


def test_a_forked_child_opens_its_own(tmp_path: Path) -> None:
    finish(start(AFTER_A_FORK, tmp_path / "store"))


def test_a_store_that_is_not_closed_says_nothing_at_the_end(tmp_path: Path) -> None:
    code = "store = PrefixStore(sys.argv[1]); store.put(filled(0), 'x')"
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", SCRIPT + code, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "sqlite" not in done.stderr and "ResourceWarning" not in done.stderr


# Killed at every call to the disk

# Every call with which a process changes the disk, SQLite's too: the process is killed before the n-th of them.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/types.h>
#include <unistd.h>

static long left = -1;
void kill_after(long calls) { left = calls; }
static void count(void) { if (left == 0) kill(getpid(), SIGKILL); if (left > 0) left--; }

#define WRAP(type, name, parameters, arguments) \\
    type name parameters { \\
        static type (*real) parameters; \\
        if (!real) real = dlsym(RTLD_NEXT, #name); \\
        count(); \\
        return real arguments; \\
    }
WRAP(ssize_t, write, (int f, const void *b, size_t n), (f, b, n))
WRAP(ssize_t, pwrite, (int f, const void *b, size_t n, off_t o), (f, b, n, o))
WRAP(ssize_t, pwrite64, (int f, const void *b, size_t n, off64_t o), (f, b, n, o))
WRAP(int, fsync, (int f), (f))
WRAP(int, fdatasync, (int f), (f))
WRAP(int, ftruncate, (int f, off_t n), (f, n))
WRAP(int, ftruncate64, (int f, off64_t n), (f, n))
WRAP(int, rename, (const char *a, const char *b), (a, b))
WRAP(int, renameat, (int d, const char *a, int e, const char *b), (d, a, e, b))
WRAP(int, unlink, (const char *a), (a))
WRAP(int, unlinkat, (int d, const char *a, int g), (d, a, g))
WRAP(int, rmdir, (const char *a), (a))
WRAP(int, mkdir, (const char *a, mode_t m), (a, m))

#define MODE \\
    mode_t mode = 0; \\
    if (flags & O_CREAT) { \\
        va_list list; \\
        va_start(list, flags); mode = va_arg(list, int); va_end(list); \\
        count(); \\
    }
#define OPEN(name) \\
    int name(const char *a, int flags, ...) { \\
        static int (*real)(const char *, int, ...); \\
        if (!real) real = dlsym(RTLD_NEXT, #name); \\
        MODE return real(a, flags, mode); \\
    }
#define OPENAT(name) \\
    int name(int d, const char *a, int flags, ...) { \\
        static int (*real)(int, const char *, int, ...); \\
        if (!real) real = dlsym(RTLD_NEXT, #name); \\
        MODE return real(d, a, flags, mode); \\
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
"""

# `prepare` makes what is there before, `act` is killed, `look` says what is there; it must be [None or old] or new.
ACTIONS = """
def counted(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

def arm(calls):
    global left
    if "SHIM" in os.environ:
        ctypes.CDLL(os.environ["SHIM"]).kill_after(calls)
        return
    left = calls
    for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))

def prepare(action, root):
    if action == "new":
        return
    with PrefixStore(root) as store:
        store.put(filled(0), "other")
        store.put(filled(1, note="marked"), "x", "acme")
        store.put(filled(2), "y", "acme")
        store.remove("y", "acme")

def act(action, root):
    with PrefixStore(root) as store:
        if action == "remove_tenant":
            store.remove_tenant("acme")
        else:
            store.put(filled(3), "x", "acme")

action, folder = sys.argv[1], Path(sys.argv[2])
for calls in range(1000):
    root = folder / str(calls)
    prepare(action, root)
    child = os.fork()
    if child == 0:
        arm(calls)
        act(action, root)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with PrefixStore(root) as store:
        found = {problem.kind for problem in store.verify()}
        seen = number_of(store, store.resolve("x", ["acme"]))
        other = number_of(store, store.resolve("other", [""]))
        if action == "remove_tenant":
            store.remove_tenant("acme")
        store.collect_garbage()
        left_over = [problem.kind for problem in store.verify()]
        if seen is not None and action != "remove_tenant":
            assert number_of(store, store.resolve("x", ["acme"])) == seen
        assert store.put(filled(4), "x", "acme").version > 0
    print(json.dumps([code, seen, other, sorted(found), left_over]))
    if code == 0:
        break
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that counts calls to the disk; where there is no compiler, Python's own calls are counted."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return ""
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = [compiler, "-shared", "-fPIC", "-o", folder / "shim.so", folder / "shim.c", "-ldl"]
    subprocess.run(command, check=True)
    return str(folder / "shim.so")


@pytest.mark.parametrize("action", ["new", "replace", "remove_tenant"])
def test_a_killed_process_leaves_old_or_new(tmp_path: Path, shim: str, action: str) -> None:
    environment = {"SHIM": shim, "LD_PRELOAD": shim} if shim else {}
    (output,) = finish(start(ACTIONS, action, tmp_path, **environment))
    codes, seen, others, found, left_over = zip(*map(json.loads, output.splitlines()), strict=True)
    assert len(codes) > (40 if shim else 5)
    assert set(codes[:-1]) == {-signal.SIGKILL} and codes[-1] == 0
    before, after = {"new": (None, 3), "replace": (1, 3), "remove_tenant": (1, None)}[action]
    turn = seen.index(after)
    assert turn > 0 and all(each == before for each in seen[:turn]) and all(each == after for each in seen[turn:])
    assert set(others) == {None if action == "new" else 0}
    assert {kind for kinds in found for kind in kinds} <= {"orphaned", "leftover"}
    assert set(map(tuple, left_over)) == {()}
    if action == "remove_tenant":
        for root in tmp_path.iterdir():
            assert holders(root, b"marked") == [set()]


def test_an_object_is_flushed_before_a_row_points_at_it(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(filled(1), "x")
    (connection,) = store._catalog._idle
    calls: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return real(*arguments, **options)

        return call

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    connection.set_trace_callback(lambda sql: calls.append(sql.split()[0]))
    store.put(filled(2), "x")
    # Two files and two folders for `save_prefix`, and the folders above the object's place.
    saved = ["fsync", "fsync", "fsync", "rename", "fsync"]
    assert [call for call in calls if call != "SELECT"] == [
        "BEGIN", *saved, "rename", "fsync", "fsync", "INSERT", "INSERT", "COMMIT",
    ]  # fmt: skip
    assert connection.execute("PRAGMA synchronous").fetchall() == [(2,)]


# A full disk


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_full_disk_changes_nothing(store: PrefixStore, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    old = store.put(filled(1), "x")
    real, left = getattr(os, call), 0

    def refuse(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    refusals: list[str] = []
    new = old
    while new == old:
        left = len(refusals)
        monkeypatch.setattr(os, call, refuse)
        try:
            new = store.put(filled(2), "x")
        except StorageError as error:
            refusals.append(str(error))
        monkeypatch.setattr(os, call, real)
        assert store.resolve("x", [""]) == new and number_of(store, new) == (1 if new == old else 2)
        assert set(kinds(store)) <= {"orphaned"} and not any((store.root / "staging").iterdir())
    assert 1 <= len(refusals) < 20
    assert all("No space left on device" in each and "\n" not in each for each in refusals)


def test_a_full_catalog_changes_nothing(store: PrefixStore) -> None:
    like = store.put(filled(1), "x")
    pages = store._catalog._idle[0].execute("PRAGMA page_count").fetchall()[0][0]
    store._catalog._idle[0].execute(f"PRAGMA max_page_count = {pages + 2}").fetchall()
    with pytest.raises(StorageError, match=r"cannot write .*store.sqlite \(database or disk is full\)"):
        many_names(store, like, "acme", 1000)
    assert store.list() == [like] and store.verify() == []
    assert store.put(filled(2), "x").version == 2


SMALL_FILES = """
codes = []
with PrefixStore(sys.argv[1]) as store:
    store.put(filled(1), "x")
for limit in [*range(0, 4096, 256), *range(4096, 120000, 4096)]:
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            with PrefixStore(sys.argv[1]) as store:
                store.put(filled(2), "x")
        except ForewordError as error:
            os._exit(10 if type(error).__name__ == "StorageError" else 11)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    with PrefixStore(sys.argv[1]) as store:
        assert number_of(store, store.resolve("x", [""])) == (1 if codes[-1] else 2), codes
        assert {problem.kind for problem in store.verify()} <= {"orphaned"}
    if not codes[-1]:
        break
print(json.dumps(codes))
"""


def test_files_that_may_not_grow_change_nothing(tmp_path: Path) -> None:
    (output,) = finish(start(SMALL_FILES, tmp_path / "store"))
    codes = json.loads(output)
    assert set(codes[:-1]) == {10} and codes[-1] == 0


# Folders and files that are none


def test_a_store_is_opened_again(store: PrefixStore) -> None:
    added = store.put(filled(1), "x")
    with PrefixStore(str(store.root), create=False) as again:
        assert again.resolve("x", [""]) == added
    store.close()
    assert store.resolve("x", [""]) == added


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    with pytest.raises(StoreError, match="holds 'thesis.txt' and no store; expected a store or an unused folder"):
        PrefixStore(tmp_path / "mine")
    with pytest.raises(StorageError, match="cannot write"):
        PrefixStore(tmp_path / "file")
    with pytest.raises(StoreError, match="no store in"):
        PrefixStore(tmp_path / "nothing", create=False)
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"] and os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_a_catalog_that_is_none_is_refused(tmp_path: Path) -> None:
    for name, data in {"text": b"dear diary, " * 999, "newer": b""}.items():
        root = tmp_path / name
        with PrefixStore(root) as store:
            store.put(filled(1), "x")
        if data:
            (root / "store.sqlite").write_bytes(data)
            expected = r"cannot be read \(file is not a database\); expected the catalog of a store"
        else:
            connection = sqlite3.connect(root / "store.sqlite")
            connection.execute("PRAGMA user_version = 2")
            connection.close()
            expected = "has format version 2; expected version 1 or older; update foreword"
        with pytest.raises(StoreError, match=expected):
            PrefixStore(root)


def test_a_damaged_catalog_is_told(store: PrefixStore) -> None:
    like = store.put(filled(1), "x")
    many_names(store, like, "acme", 500)
    store._catalog.shred()
    store.close()
    data = bytearray((store.root / "store.sqlite").read_bytes())
    data[8192:8292] = b"\xff" * 100
    (store.root / "store.sqlite").write_bytes(data)
    # SQLite may still be able to read the file, or not.
    try:
        problems = [(each.kind, each.path) for each in store.verify()]
    except StoreError as error:
        problems = [("damaged", Path(str(error).split()[0]))]
    assert ("damaged", store.root / "store.sqlite") in problems


def test_one_holder_is_not_waited_for_without_end(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(filled(1), "x")
    monkeypatch.setattr("foreword.database.BUSY_SECONDS", 0.1)
    with PrefixStore(store.root) as other, store._catalog.writing():
        with pytest.raises(StoreError, match="has been held by another process .* try again"):
            other.put(filled(2), "x")
        assert number_of(other, other.resolve("x", [""])) == 1  # readers do not wait
    assert store.put(filled(2), "x").version == 2


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOREWORD_STORE", str(tmp_path / "mine"))
    assert default_store() == tmp_path / "mine"
    monkeypatch.setenv("FOREWORD_STORE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_store() == tmp_path / ".local" / "share" / "foreword" / "store"
