"""A prefix comes back from disk exactly, or not at all; replacing one never loses it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from foreword import artifact
from foreword.artifact import HEADER, TENSORS, load_prefix, read_header, save_prefix
from foreword.errors import PrefixFormatError, PrefixMismatch, StorageError
from foreword.header import dump_header, parse_header, refuse_disguise
from foreword.prefix import Gate, Head, Prefix, Site, SiteTensors

BLANK = "0" * 64


def make(length: int = 4, *, fill: float | None = None, mass: bool = False, gate: str = "", **fields: Any) -> Prefix:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape) if fill is None else torch.full(shape, fill)

    log_mass = torch.tensor([0.0, -math.inf, *[-0.5] * (length - 2)]) if mass else None
    sites = {
        Site("decoder", layer): SiteTensors(
            tensor(2, length, 8), tensor(2, length, 6), log_mass, Gate(tensor(12, length), gate) if gate else None
        )
        for layer in (0, 1)
    }
    return Prefix(sites, base_name="tiny", fingerprint="0f" * 32, **fields)


def base_for(prefix: Prefix, **changes: Any) -> Any:
    facts = {"name": "tiny", "fingerprint": prefix.fingerprint, "geometry": prefix.geometry, "max_tokens": 64}
    facts["hidden_sizes"] = dict.fromkeys(prefix.geometry, 12)
    return SimpleNamespace(**{**facts, **changes})


def assert_equal(got: Prefix, wanted: Prefix) -> None:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None and b is None) or (
            a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        )

    assert list(got.sites) == list(wanted.sites)
    for site, tensors in wanted.sites.items():
        named = got.sites[site].named()
        assert named.keys() == tensors.named().keys()
        assert all(same(named[name], tensor) for name, tensor in tensors.named().items())
        assert (got.sites[site].gate or ("", ""))[1] == (tensors.gate or ("", ""))[1]
    assert (got.head is None) == (wanted.head is None)
    if got.head is not None and wanted.head is not None:
        assert got.head[:3] == wanted.head[:3] and all(
            same(a, b) for a, b in zip(got.head[3:], wanted.head[3:], strict=True)
        )
    assert (got.training_state is None) == (wanted.training_state is None)
    state, wanted_state = got.training_state or {}, wanted.training_state or {}
    assert state.keys() == wanted_state.keys()
    assert all(same(state[name], wanted_state[name]) for name in state)
    for name in ("base_name", "fingerprint", "position_offset", "metadata"):
        assert getattr(got, name) == getattr(wanted, name)


# Round trips


@pytest.mark.parametrize(("kind", "pooling"), [("classification", "token"), ("choice", "token"), ("tagging", "mean")])
def test_a_head_reads_what_its_kind_reads(kind: str, pooling: str, tmp_path: Path) -> None:
    head = Head(kind, ("only",), pooling, torch.randn(1, 12), torch.randn(1))
    with pytest.raises(PrefixFormatError, match=f"pooling is '{pooling}'"):
        save_prefix(make(head=head), tmp_path / "p")


def test_gates_and_head_come_back(tmp_path: Path) -> None:
    head = Head("classification", ("no", "yes", "maybe"), "mean", torch.randn(3, 12), torch.randn(3))
    for name, prefix in {"gate": make(gate="token", mass=True), "head": make(gate="token", head=head)}.items():
        save_prefix(prefix, tmp_path / name)
        assert_equal(load_prefix(tmp_path / name, base_for(prefix)), prefix)


def test_gates_of_another_width_are_refused(tmp_path: Path) -> None:
    prefix = make(gate="token")
    save_prefix(prefix, tmp_path / "p")
    other = base_for(prefix, hidden_sizes=dict.fromkeys(prefix.geometry, 16))
    with pytest.raises(PrefixMismatch, match="the gate at decoder.0 reads 12 hidden units, 'tiny' has 16; expected"):
        load_prefix(tmp_path / "p", other)


def test_gates_that_would_read_what_is_to_come_are_refused(tmp_path: Path) -> None:
    prefix = make(gate="mean")
    save_prefix(prefix, tmp_path / "p")
    with pytest.raises(PrefixMismatch, match="gate pooling 'mean' in a causal decoder, at decoder.0; expected token"):
        load_prefix(tmp_path / "p", base_for(prefix))


@pytest.mark.parametrize("mass", [False, True])
def test_version_1_is_read(tmp_path: Path, mass: bool) -> None:
    prefix = make(mass=mass)
    save_prefix(prefix, tmp_path / "p")

    def older(header: dict[str, Any]) -> None:
        header["format_version"] = 1
        del header["head"]
        for row in header["sites"].values():
            row["gate"] = "mass" if row.pop("mass") else "none"

    rewrite(tmp_path / "p", older)
    assert_equal(load_prefix(tmp_path / "p"), prefix)
    save_prefix(load_prefix(tmp_path / "p"), tmp_path / "p")
    assert read_header(tmp_path / "p")["format_version"] == 2


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def tensors(draw: st.DrawFn, *shape: int) -> Tensor:
    count = math.prod(shape)
    numbers = draw(st.lists(NUMBERS, min_size=count, max_size=count))
    return torch.tensor(numbers, dtype=torch.float32).reshape(shape)


@st.composite
def prefixes(draw: st.DrawFn) -> Prefix:
    sites = {}
    for stack in draw(st.lists(st.sampled_from(["encoder", "cross", "decoder"]), min_size=1, unique=True)):
        heads, key_dim, value_dim = (draw(st.integers(1, 3)) for _ in range(3))
        for layer in range(draw(st.integers(1, 2))):
            length = draw(st.integers(0 if sites else 1, 3))
            mass = draw(st.none() | st.lists(NUMBERS | st.just(-math.inf), min_size=length, max_size=length))
            sites[Site(stack, layer)] = SiteTensors(
                draw(tensors(heads, length, key_dim)),
                draw(tensors(heads, length, value_dim)),
                None if mass is None else torch.tensor(mass, dtype=torch.float32),
            )
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    shapes = st.lists(st.integers(0, 3), max_size=2)
    state = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, st.sampled_from(dtypes))
    return Prefix(
        sites,
        base_name=draw(st.text(max_size=8)),
        fingerprint=draw(st.text("0123456789abcdef", max_size=64)),
        position_offset=draw(st.integers(0, 100)),
        metadata=draw(st.dictionaries(st.text(max_size=8), JSON, max_size=3)),
        training_state=draw(st.none() | st.dictionaries(st.text("abc._0", min_size=1, max_size=9), state, max_size=3)),
    )


@given(prefix=prefixes())
def test_a_round_trip_is_exact(tmp_path: Path, prefix: Prefix) -> None:
    save_prefix(prefix, tmp_path / "p")
    assert_equal(load_prefix(tmp_path / "p"), prefix)
    assert sorted(os.listdir(tmp_path / "p")) == [HEADER, TENSORS]
    assert os.listdir(tmp_path) == ["p"]


def test_named_metadata_views_and_gradients(tmp_path: Path) -> None:
    metadata = {"task": "e2e", "metrics": {"bleu": 50.1}, "provenance": {"seed": 1}, "note": "ü\n", "pair": (1, 2)}
    block = torch.randn(2, 2, 4, 8, requires_grad=True)
    prefix = Prefix({Site("decoder", 0): SiteTensors(block[0], block[1])}, "tiny", "", metadata=metadata)
    prefix.save(tmp_path / "p")
    header = read_header(tmp_path / "p")
    assert (header["task"], header["metrics"], header["provenance"]) == ("e2e", {"bleu": 50.1}, {"seed": 1})
    assert header["metadata"] == {"note": "ü\n", "pair": [1, 2]}
    loaded = Prefix.load(tmp_path / "p")
    assert loaded.metadata == {**metadata, "pair": [1, 2]}
    assert torch.equal(loaded.sites[Site("decoder", 0)].values, block[1])
    assert not loaded.sites[Site("decoder", 0)].keys.requires_grad


def test_new_metadata_beside_the_same_tensors_is_kept(tmp_path: Path) -> None:
    prefix = make()
    for metrics in ({"bleu": 1.0}, {"bleu": 2.0}):
        prefix.metadata = {"metrics": metrics}
        save_prefix(prefix, tmp_path / "p")
        assert load_prefix(tmp_path / "p").metadata == {"metrics": metrics}
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == [HEADER, TENSORS]


def test_the_same_prefix_gives_the_same_bytes(tmp_path: Path) -> None:
    prefix = make(mass=True, metadata={"b": 1, "a": 2})
    for name in ("p", "q"):
        save_prefix(prefix, tmp_path / name)
    for file in (HEADER, TENSORS):
        assert (tmp_path / "p" / file).read_bytes() == (tmp_path / "q" / file).read_bytes()


@settings(max_examples=150)
@given(file=st.sampled_from([HEADER, TENSORS]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(
    tmp_path_factory: pytest.TempPathFactory, file: str, place: float, bit: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        save_prefix(make(mass=True, metadata={"task": "e2e", "note": "free text"}), folder)
    data = bytearray((folder / file).read_bytes())
    whole = bytes(data)
    data[int(place * len(data))] ^= 1 << bit
    (folder / file).write_bytes(data)
    try:
        with pytest.raises(PrefixFormatError) as info:
            load_prefix(folder)
        assert "\n" not in str(info.value)
    finally:
        (folder / file).write_bytes(whole)


# Another base model


def test_base_model_is_checked(tmp_path: Path) -> None:
    prefix = make()
    save_prefix(prefix, tmp_path / "p")
    assert_equal(load_prefix(tmp_path / "p", base_for(prefix)), prefix)
    assert_equal(load_prefix(tmp_path / "p", base_for(prefix, max_tokens=None)), prefix)
    with pytest.raises(PrefixMismatch, match="weights"):
        load_prefix(tmp_path / "p", base_for(prefix, name="other", fingerprint="ff" * 32))
    with pytest.raises(PrefixMismatch, match="decoder.1"):
        load_prefix(tmp_path / "p", base_for(prefix, geometry={Site("decoder", 0): (2, 8, 6)}))
    with pytest.raises(PrefixMismatch, match="4 slots; expected at most 3, the context of 'tiny'; train a shorter"):
        load_prefix(tmp_path / "p", base_for(prefix, max_tokens=3))


# Damage


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], data: bytes | None = None) -> None:
    """Change the header (and tensors) as somebody would who knows how the hashes are made."""
    header = json.loads((folder / HEADER).read_text())
    if data is not None:
        (folder / TENSORS).write_bytes(data)
        header["tensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(header)
    if "header_sha256" in header:
        header["header_sha256"] = BLANK
    text = json.dumps(header)
    (folder / HEADER).write_text(text.replace(BLANK, hashlib.sha256(text.encode()).hexdigest(), 1))


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        del header[path[-1]]

    return change


ROW = {"length": 0, "kv_heads": 2, "key_dim": 8, "value_dim": 6, "mass": False, "gate": None}
GATE = {"pooling": "mean", "hidden": 12}
HEAD = {"kind": "choice", "labels": ["1", "2"], "pooling": "cls", "outputs": 1, "hidden": 12}

HEADERS = {
    "future": (put("format_version", value=3), "has format version 3; expected version 2 or older; update foreword"),
    "version 0": (put("format_version", value=0), "format_version is 0"),
    "version true": (put("format_version", value=True), "format_version is True"),
    "no version": (drop("format_version"), "has no 'format_version'"),
    "no hash": (drop("header_sha256"), "has no 'header_sha256'"),
    "no base": (drop("base"), "has no 'base'"),
    "base a list": (put("base", value=[]), "base is a list; expected a JSON object"),
    "no name": (drop("base", "name"), "has no 'name'"),
    "name a number": (put("base", "name", value=3), "name is a number; expected text"),
    "fingerprint null": (put("base", "fingerprint", value=None), "fingerprint is null; expected text"),
    "base extra": (put("base", "size", value=3), "unknown field 'size'"),
    "extra": (put("licence", value="MIT"), "unknown field 'licence'"),
    "no task": (drop("task"), "has no 'task'"),
    "offset negative": (put("position_offset", value=-1), "position_offset is -1; expected a whole number from 0"),
    "offset a float": (put("position_offset", value=1.0), "position_offset is 1.0"),
    "offset a text": (put("position_offset", value="4"), "position_offset is 4"),
    "metadata a text": (put("metadata", value="x"), "metadata is text; expected a JSON object"),
    "no bytes": (drop("tensors", "bytes"), "has no 'bytes'"),
    "sha256 short": (put("tensors", "sha256", value="ab"), "expected 64 hexadecimal digits"),
    "no sites": (put("sites", value={}), "length 0 at every site"),
    "all empty": (put("sites", value={"decoder.0": ROW}), "length 0 at every site; expected one slot at least"),
    "site name": (put("sites", "decoder.01", value=ROW), "expected names such as 'decoder.0'"),
    "site training": (put("sites", "training.0", value=ROW), "expected names such as 'decoder.0'"),
    "site a list": (put("sites", "decoder.0", value=[]), "decoder.0 is a list"),
    "overlong": (put("sites", "decoder.0", "length", value=65537), "length is 65537; expected a whole number from 0"),
    "no heads": (put("sites", "decoder.0", "kv_heads", value=0), "kv_heads is 0"),
    "no gate": (drop("sites", "decoder.0", "gate"), "has no 'gate'"),
    "no mass": (drop("sites", "decoder.0", "mass"), "has no 'mass'"),
    "mass a text": (put("sites", "decoder.0", "mass", value="yes"), "mass is text; expected true or false"),
    "gate a list": (put("sites", "decoder.0", "gate", value=[]), "gate is a list; expected a JSON object"),
    "pooling unknown": (
        put("sites", "decoder.0", "gate", value={**GATE, "pooling": "max"}), "pooling is 'max'; expected 'token' or"
    ),
    "no hidden units": (put("sites", "decoder.0", "gate", value={**GATE, "hidden": 0}), "hidden is 0"),
    "no head": (drop("head"), "has no 'head'"),
    "head a text": (put("head", value="x"), "head is text"),
    "head kind": (put("head", value={**HEAD, "kind": "x"}), "kind is 'x'; expected 'classification' or 'choice'"),
    "head labels": (put("head", value={**HEAD, "labels": []}), "labels is .*; expected a list of texts"),
    "head outputs": (put("head", value={**HEAD, "outputs": 2}), "outputs is 2; expected 1"),
    "head added": (put("head", value=HEAD), "lacks tensor 'head.bias'"),
    "length wrong": (put("sites", "decoder.0", "length", value=5), r"\[2, 4, 8\]; expected float32 \[2, 5, 8\]"),
    "dim wrong": (put("sites", "decoder.0", "key_dim", value=6), r"\[2, 4, 8\]; expected float32 \[2, 4, 6\]"),
    "site dropped": (drop("sites", "decoder.1"), "has the unknown tensor 'decoder.1.keys'"),
    "site added": (put("sites", "decoder.2", value=ROW), "lacks tensor 'decoder.2.keys'"),
    "mass added": (put("sites", "decoder.0", "mass", value=True), "lacks tensor 'decoder.0.log_mass'"),
    "gate added": (put("sites", "decoder.0", "gate", value=GATE), "lacks tensor 'decoder.0.gate_weight'"),
    "training added": (put("training", value={"w": {"dtype": "float32", "shape": []}}), "lacks tensor 'training.w'"),
    "training dtype": (put("training", value={"w": {"dtype": "complex", "shape": []}}), "dtype is 'complex'"),
    "training shape": (put("training", value={"w": {"dtype": "bool", "shape": [-1]}}), "a list of sizes"),
    "training a list": (put("training", value=[]), "training is a list"),
    "NaN": (put("metrics", value={"bleu": math.nan}), "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_does_not_hold(tmp_path: Path, name: str) -> None:
    change, message = HEADERS[name]
    save_prefix(make(), tmp_path / "p")
    rewrite(tmp_path / "p", change)
    with pytest.raises(PrefixFormatError, match=message) as info:
        load_prefix(tmp_path / "p")
    assert "\n" not in str(info.value) and str(tmp_path / "p") in str(info.value)


TEXTS = {
    "empty": b"",
    "text": b"hello",
    "list": b"[]",
    "number": b"1",
    "latin": b'{"name": "\xfc"}',
    "deep": b"[" * 100_000,
    "pickle": pickle.dumps({"format_version": 1}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_header_that_is_none(tmp_path: Path, name: str) -> None:
    save_prefix(make(), tmp_path / "p")
    (tmp_path / "p" / HEADER).write_bytes(TEXTS[name])
    message = {"pickle": "is a pickle", "list": "is a list", "number": "is a number"}.get(name, "is not JSON")
    for read in (load_prefix, read_header):
        with pytest.raises(PrefixFormatError, match=message):
            read(tmp_path / "p")


def changed(change: Callable[[dict[str, Tensor]], None]) -> bytes:
    tensors = artifact._tensors(make(fill=0.5))
    change(tensors)
    return save(tensors)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "tensors.safetensors"
    data = save({"keys": torch.ones(2)})
    text = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip().ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + text + data[-8:])
    refuse_disguise(path.read_bytes(), path)
    assert load_file(path)["keys"].tolist() == [1.0, 1.0]


TENSOR_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"\0", "is not a safetensors file"),
    "text": (lambda: b"hello" * 99, "is not a safetensors file"),
    "pickle": (lambda: pickle.dumps(Bomb()), "is a pickle or zip file; expected a safetensors file"),
    "zip": (lambda: b"PK\x03\x04" + b"x" * 99, "is a pickle or zip file"),
    "cut": (lambda: changed(lambda t: None)[:-8], "is not a safetensors file"),
    "missing": (lambda: changed(lambda t: t.pop("decoder.1.values")), "lacks tensor 'decoder.1.values'"),
    "extra": (lambda: changed(lambda t: t.update(more=torch.zeros(1))), "has the unknown tensor 'more'"),
    "half": (lambda: changed(lambda t: t.update({"decoder.0.keys": torch.zeros(2, 4, 8).half()})), "is float16"),
    "shape": (
        lambda: changed(lambda t: t.update({"decoder.0.keys": torch.zeros(2, 4, 7)})),
        re.escape("is float32 [2, 4, 7]; expected float32 [2, 4, 8]"),
    ),
    "NaN": (lambda: changed(lambda t: t["decoder.0.keys"].view(-1)[3:4].fill_(math.nan)), "keys .* holds NaN"),
    "inf": (lambda: changed(lambda t: t["decoder.1.values"].view(-1)[0:1].fill_(-math.inf)), "holds infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_tensors_that_do_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = TENSOR_FILES[name]
    save_prefix(make(), tmp_path / "p")
    rewrite(tmp_path / "p", lambda header: None, data())
    with pytest.raises(PrefixFormatError, match=message) as info:
        load_prefix(tmp_path / "p")
    assert "\n" not in str(info.value)
    assert os.listdir(tmp_path) == ["p"]


def test_tensors_changed_behind_the_header(tmp_path: Path) -> None:
    file = tmp_path / "p" / TENSORS
    save_prefix(make(), tmp_path / "p")
    whole = file.read_bytes()
    for data, message in {
        whole[:-4]: f"has {len(whole) - 4} bytes; expected {len(whole)}",
        whole + b"\0": f"has {len(whole) + 1} bytes",
        whole[:-1] + b"\x7f": "has sha256",
        pickle.dumps([0]): "is a pickle",
    }.items():
        file.write_bytes(data)
        with pytest.raises(PrefixFormatError, match=message):
            load_prefix(tmp_path / "p")
    with pytest.raises(PrefixFormatError, match="is a pickle"):
        read_header(tmp_path / "p")
    file.unlink()
    for read in (load_prefix, read_header):
        with pytest.raises(PrefixFormatError, match=r"prefix.safetensors (does not exist|has 0 bytes)"):
            read(tmp_path / "p")


def test_no_prefix_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / HEADER).mkdir(parents=True)
    for name in ("nothing", "file", "folder"):
        with pytest.raises(PrefixFormatError, match="expected a prefix folder with prefix.json and prefix.safetensors"):
            load_prefix(tmp_path / name)


# What is not saved


def bad_prefixes() -> dict[str, tuple[Prefix, str]]:
    site = Site("decoder", 0)
    keys, values = torch.zeros(2, 4, 8), torch.zeros(2, 4, 6)

    def with_site(*parts: Any) -> Prefix:
        return Prefix({site: SiteTensors(*parts)}, "tiny", "")

    return {
        "NaN": (make(fill=math.nan), "holds NaN"),
        "infinity": (make(fill=math.inf), "holds infinity"),
        "mass": (with_site(keys, values, torch.tensor([0.0, 0.0, 0.0, math.inf])), "holds infinity"),
        "training": (make(training_state={"w": torch.tensor(math.nan)}), "training.w .* NaN"),
        "empty": (make(0), "length 0 at every site"),
        "no sites": (Prefix({}, "tiny", ""), "length 0 at every site"),
        "half": (with_site(keys.half(), values), "float16 .* expected float32"),
        "lengths": (with_site(keys, values[:, :3]), "decoder.0.values"),
        "offset": (make(position_offset=-1), "position_offset is -1"),
        "complex": (make(training_state={"w": torch.zeros(1, dtype=torch.complex64)}), "dtype is 'complex64'"),
        "metric": (make(metadata={"metrics": {"bleu": math.nan}}), "metadata.metrics.bleu is nan"),
        "object": (make(metadata={"path": [Path("x")]}), "metadata.path.0 is a PosixPath"),
        "key": (make(metadata={"rows": {1: "x"}}), "metadata.rows has the key 1"),
    }


@pytest.mark.parametrize("name", bad_prefixes())
def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path, name: str) -> None:
    prefix, message = bad_prefixes()[name]
    with pytest.raises(PrefixFormatError, match=message) as info:
        save_prefix(prefix, tmp_path / "p")
    assert "\n" not in str(info.value)
    assert os.listdir(tmp_path) == []


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(PrefixFormatError, match="is a folder that is not a prefix"):
        save_prefix(make(), tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    (tmp_path / "file").write_text("dear")
    with pytest.raises(StorageError):
        save_prefix(make(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    save_prefix(make(), tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "mine"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_keeps_the_old_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    old = make()
    if existing:
        save_prefix(old, tmp_path / "p")
    real, left = os.fsync, 0

    def refuse(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    for calls in range(3):
        left = calls
        with pytest.raises(StorageError, match="No space left on device"):
            save_prefix(make(7), tmp_path / "p")
        if existing:
            assert_equal(load_prefix(tmp_path / "p"), old)
            assert sorted(os.listdir(tmp_path / "p")) == [HEADER, TENSORS]
        else:
            assert os.listdir(tmp_path) == []


# Replacing a prefix while others read, and while the writer is killed

SCRIPT = """
import json, os, signal, sys, time
import torch
from foreword.prefix import Prefix, Site, SiteTensors

def save(folder, fill):
    site = SiteTensors(torch.full((2, 4, 8), fill), torch.full((2, 4, 6), fill))
    Prefix({Site("decoder", 0): site}, "tiny", "").save(folder)

def kill_after(calls):
    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls -= 1
            if calls < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in ("replace", "rename", "fsync", "unlink", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))
"""

KILL_EVERYWHERE = """
# A writer of 1.0 over 0.0, killed before its first call to the disk, before its second, and so on.
for calls in range(60):
    if sys.argv[2] == "over":
        save(sys.argv[1], 0.0)
    child = os.fork()
    if child == 0:
        kill_after(calls)
        save(sys.argv[1], 1.0)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    there = os.path.exists(sys.argv[1])
    keys = Prefix.load(sys.argv[1]).sites[Site("decoder", 0)].keys.unique().tolist() if there else []
    print(json.dumps([code, keys]))
    if code == 0:
        break
    if sys.argv[2] == "new" and there:
        os.rename(sys.argv[1], sys.argv[1] + str(calls))
"""

KEEP_SAVING = """
end = time.monotonic() + 1
while time.monotonic() < end:
    save(sys.argv[1], float(sys.argv[2]))
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("place", ["over", "new"])
def test_a_killed_writer_loses_nothing_and_leaves_no_half_prefix(tmp_path: Path, place: str) -> None:
    process = start(KILL_EVERYWHERE, tmp_path / "p", place)
    output, _ = process.communicate()
    assert process.returncode == 0
    codes, seen = zip(*map(json.loads, output.splitlines()), strict=True)
    assert len(codes) > 6 and set(codes[:-1]) == {-signal.SIGKILL} and codes[-1] == 0
    # The old one (or none) up to one moment, the new one from then on.
    before: list[float] = [0.0] if place == "over" else []
    new = seen.index([1.0])
    assert 0 < new < len(seen) - 1
    assert all(keys == before for keys in seen[:new]) and all(keys == [1.0] for keys in seen[new:])
    assert sorted(os.listdir(tmp_path / "p")) == [HEADER, TENSORS]


def test_readers_see_one_prefix_or_another(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    save_prefix(make(fill=1.0), folder)
    writers = [start(KEEP_SAVING, folder, fill) for fill in (1.0, 2.0)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        numbers = {number for site in load_prefix(folder).sites.values() for number in site.keys.unique().tolist()}
        seen.add(tuple(numbers))
    assert [writer.communicate() and writer.returncode for writer in writers] == [0, 0]
    assert seen == {(1.0,), (2.0,)}
    assert sorted(os.listdir(folder)) == [HEADER, TENSORS]


def test_saving_and_loading_are_quick(tmp_path: Path) -> None:
    """The size of ten slots of SmolLM2-135M; the limits here are loose, for machines that are busy."""
    site = SiteTensors(torch.zeros(3, 10, 64), torch.zeros(3, 10, 64))
    prefix = Prefix({Site("decoder", layer): site for layer in range(30)}, "smollm2-135m", "0f" * 32)
    took = []
    for name in "abc":
        start = time.perf_counter()
        save_prefix(prefix, tmp_path / name)
        middle = time.perf_counter()
        load_prefix(tmp_path / name)
        took.append((middle - start, time.perf_counter() - middle))
    assert min(save_seconds for save_seconds, _ in took) < 0.25
    assert min(load_seconds for _, load_seconds in took) < 0.05


def test_the_page_about_the_format_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "prefix-format.md").read_text(encoding="utf-8")
    example, code = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0] for kind in ("json", "python"))
    header = parse_header(example.encode(), Path("example"))
    assert dump_header({**header, "header_sha256": BLANK}) == example
    prefix = make(mass=True, gate="token")
    save_prefix(prefix, tmp_path / "out" / "e2e")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    for (keys, values), site in zip(names["past"], prefix.sites.values(), strict=True):
        assert torch.equal(keys, site.keys) and torch.equal(values, site.values)
