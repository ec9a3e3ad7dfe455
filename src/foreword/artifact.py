"""A prefix on disk: a folder of `prefix.safetensors` (the numbers) and `prefix.json` (everything else).

`docs/prefix-format.md` describes both for other implementers. Reading believes nothing: every field, every
tensor and the hashes of both files are checked, and a fault is one line. Nothing is ever unpickled.

Writing over a prefix cannot lose it, whenever the writer is killed. A new folder is built beside its place and
renamed. In an existing one the new header is first written as `prefix.json.next`, then the new tensors are renamed
into place, then the new header. A header names the sha256 of its tensors, so a reader that finds `prefix.json`
not matching knows that the second rename is still to come, and takes `prefix.json.next`: at any moment exactly
the old or the new prefix is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from foreword.errors import PrefixFormatError, PrefixMismatch
from foreword.gates import check_poolings
from foreword.header import (
    BLANK_HASH,
    FORMAT_VERSION,
    MAX_HEADER_BYTES,
    MAX_LENGTH,
    RETRAIN,
    Expected,
    dump_header,
    expected_tensors,
    parse_header,
    refuse_disguise,
)
from foreword.prefix import Gate, Head, Prefix, Site, Sites, SiteTensors
from foreword.storage import atomic_folder, locked, remove_leftovers, storage_errors, write_atomic

if TYPE_CHECKING:
    from foreword.base import BaseModel

__all__ = ["FORMAT_VERSION", "HEADER", "MAX_LENGTH", "TENSORS", "load_prefix", "read_header", "save_prefix"]

TENSORS = "prefix.safetensors"
HEADER = "prefix.json"

_NEXT = "prefix.json.next"
# Writing


def save_prefix(prefix: Prefix, path: str | Path) -> None:
    """Write the folder `path`, whole or not at all; a prefix that is there is replaced.

    Raises `PrefixFormatError` for a prefix that could not be loaded again (NaN, no slots, metadata that is not
    JSON) and for a folder that holds something else, `StorageError` where the disk refuses.

    >>> import tempfile
    >>> site = SiteTensors(torch.zeros(2, 4, 8), torch.ones(2, 4, 8))
    >>> folder = Path(tempfile.mkdtemp()) / "e2e"
    >>> save_prefix(Prefix({Site("decoder", 0): site}, "tiny", "0f" * 32), folder)
    >>> load_prefix(folder).length
    4
    """
    path = Path(path)
    tensors = _tensors(prefix)
    data = save(tensors)
    header = _header(prefix, tensors, data)
    # What is written must be readable: the reader's own checks, before the disk is touched.
    _check_numbers(tensors, path)
    text = dump_header(header)
    parse_header(text.encode(), path)
    with storage_errors(path):
        existing = path.is_dir() and any(path.iterdir())
        if existing and not (path / HEADER).is_file():
            raise PrefixFormatError(
                f"{path} is a folder that is not a prefix", "a new path or a prefix", "choose another path"
            )
    if not existing:
        with atomic_folder(path) as folder:
            (folder / TENSORS).write_bytes(data)
            (folder / HEADER).write_bytes(text.encode())
        return
    with storage_errors(path), locked(path):
        _roll_forward(path)
        for name in (_NEXT, TENSORS):
            remove_leftovers(path / name)
        try:
            write_atomic(path / _NEXT, text)
            write_atomic(path / TENSORS, data)
        finally:
            _roll_forward(path)


def _roll_forward(path: Path) -> None:
    """Finish the replacement that was begun, or undo it: afterwards `prefix.json` stands alone."""
    if not (path / _NEXT).exists():
        return
    with contextlib.suppress(PrefixFormatError):
        _read_as(path, _NEXT, tensors=True)
        os.replace(path / _NEXT, path / HEADER)
        return
    (path / _NEXT).unlink()


def _tensors(prefix: Prefix) -> dict[str, Tensor]:
    tensors = prefix.tensors()
    if prefix.head is not None:
        tensors |= {"head.weight": prefix.head.weight, "head.bias": prefix.head.bias}
    for name, tensor in (prefix.training_state or {}).items():
        tensors[f"training.{name}"] = tensor
    # Own memory for every tensor: views of one storage cannot be written side by side.
    return {name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def _header(prefix: Prefix, tensors: dict[str, Tensor], data: bytes) -> dict[str, Any]:
    sites = {str(site): _site_row(parts) for site, parts in prefix.sites.items()}
    head = None if prefix.head is None else _head_row(prefix.head)
    for name, expected in expected_tensors(sites, head, None).items():
        _check_tensor(name, tensors[name], expected, "the prefix")
    training = None
    if prefix.training_state is not None:
        training = {name: _describe(tensor) for name, tensor in prefix.training_state.items()}
    metadata = _json_value(prefix.metadata, "metadata")
    return {
        "format_version": FORMAT_VERSION,
        "header_sha256": BLANK_HASH,
        "tensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "base": {"name": prefix.base_name, "fingerprint": prefix.fingerprint},
        "position_offset": prefix.position_offset,
        "sites": sites,
        "head": head,
        "training": training,
        "task": metadata.pop("task", None),
        "metrics": metadata.pop("metrics", None),
        "provenance": metadata.pop("provenance", None),
        "metadata": metadata,
    }


def _site_row(parts: SiteTensors) -> dict[str, Any]:
    kv_heads, key_dim, value_dim = parts.shape
    gate = None if parts.gate is None else {"pooling": parts.gate.pooling, "hidden": parts.gate.weight.shape[0]}
    return {
        "length": parts.length, "kv_heads": kv_heads, "key_dim": key_dim, "value_dim": value_dim,
        "mass": parts.log_mass is not None, "gate": gate,
    }  # fmt: skip


def _head_row(head: Head) -> dict[str, Any]:
    outputs, hidden = head.weight.shape
    return {
        "kind": head.kind,
        "labels": list(head.labels),
        "pooling": head.pooling,
        "outputs": outputs,
        "hidden": hidden,
    }


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _json_value(value: Any, where: str) -> Any:
    """`value` as JSON gives it back; refuses what JSON would change or cannot hold."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise PrefixFormatError(f"{where} has the key {key!r}", "text keys", "rename it")
        return {key: _json_value(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item, f"{where}.{i}") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise PrefixFormatError(f"{where} is {value}", "a finite number", "leave it out or use None")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PrefixFormatError(
        f"{where} is a {type(value).__name__}", "text, numbers, lists and dictionaries", "convert it or leave it out"
    )


# Reading


def load_prefix(path: str | Path, base: BaseModel | None = None) -> Prefix:
    """Read a prefix folder; with `base`, also check that the prefix was made for it and is not too long.

    Raises `PrefixFormatError` for anything that is not a whole, untouched prefix of a known format version,
    `PrefixMismatch` for another base model.
    """
    path = Path(path)
    header, data = _read(path)
    tensors = _load_tensors(path, header, data)
    sites: Sites = {}
    for name, row in header["sites"].items():
        gate = None if row["gate"] is None else Gate(tensors[f"{name}.gate_weight"], row["gate"]["pooling"])
        keys, values = tensors[f"{name}.keys"], tensors[f"{name}.values"]
        sites[Site.parse(name)] = SiteTensors(keys, values, tensors.get(f"{name}.log_mass"), gate)
    training, head = header["training"], header["head"]
    prefix = Prefix(
        sites,
        base_name=header["base"]["name"],
        fingerprint=header["base"]["fingerprint"],
        position_offset=header["position_offset"],
        metadata=_metadata(header),
        training_state=None if training is None else {name: tensors[f"training.{name}"] for name in training},
    )
    if head is not None:
        labels = tuple(head["labels"])
        prefix.head = Head(head["kind"], labels, head["pooling"], tensors["head.weight"], tensors["head.bias"])
    if base is not None:
        prefix.check_base(base.name, base.fingerprint, base.geometry, base.hidden_sizes)
        check_poolings(prefix.sites)
        if base.max_tokens is not None and prefix.length > base.max_tokens:
            raise PrefixMismatch(
                f"prefix in {path} has {prefix.length} slots",
                f"at most {base.max_tokens}, the context of {base.name!r}",
                "train a shorter prefix",
            )
    return prefix


def read_header(path: str | Path) -> dict[str, Any]:
    """The checked fields of `prefix.json`, without loading the tensors (their size is checked, not their hash).

    Raises `PrefixFormatError`.
    """
    path = Path(path)
    return _read(path, tensors=(path / _NEXT).exists())[0]


def _metadata(header: dict[str, Any]) -> dict[str, Any]:
    named = {key: header[key] for key in ("task", "metrics", "provenance") if header[key] is not None}
    return {**named, **header["metadata"]}


def _read(path: Path, tensors: bool = True, attempts: int = 3) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes of the tensors that belong to it.

    A writer may be at work, or have been killed: see the top of this file.
    """
    try:
        return _read_as(path, HEADER, tensors)
    except PrefixFormatError:
        with contextlib.suppress(PrefixFormatError):
            return _read_as(path, _NEXT, tensors)
        if attempts == 1 or not path.is_dir():
            raise
    return _read(path, tensors, attempts - 1)


def _read_as(path: Path, name: str, tensors: bool) -> tuple[dict[str, Any], bytes]:
    raw = _read_file(path / name, MAX_HEADER_BYTES)
    header = parse_header(raw, path / name)
    claim = header["tensors"]
    file = path / TENSORS
    data = _read_file(file, claim["bytes"]) if tensors else b""
    size = len(data) if tensors else file.stat().st_size if file.is_file() else -1
    if size != claim["bytes"]:
        refuse_disguise(_read_file(file, 8), file)
        raise PrefixFormatError(f"{file} has {max(size, 0)} bytes", str(claim["bytes"]), RETRAIN)
    if tensors and (actual := hashlib.sha256(data).hexdigest()) != claim["sha256"]:
        refuse_disguise(data, file)
        raise PrefixFormatError(f"{file} has sha256 {actual[:12]}…", f"{claim['sha256'][:12]}…", RETRAIN)
    return header, data


def _read_file(file: Path, limit: int) -> bytes:
    """The file, or one byte more than `limit` of it."""
    if not file.is_file():
        what = "is not a file" if file.exists() else "does not exist"
        raise PrefixFormatError(f"{file} {what}", f"a prefix folder with {HEADER} and {TENSORS}", "check the path")
    try:
        with open(file, "rb") as stream:
            return stream.read(limit + 1)
    except OSError as error:
        raise PrefixFormatError(f"cannot read {file} ({error.strerror})", "a readable file", "check it") from error


# Tensors


def _load_tensors(path: Path, header: dict[str, Any], data: bytes) -> dict[str, Tensor]:
    file = path / TENSORS
    refuse_disguise(data, file)
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise PrefixFormatError(f"{file} is not a safetensors file", "the tensors of a prefix", RETRAIN) from error
    expected = expected_tensors(header["sites"], header["head"], header["training"])
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "lacks" if name in expected else "has the unknown"
        raise PrefixFormatError(f"{file} {problem} tensor {name!r}", f"the tensors that {HEADER} lists", RETRAIN)
    for name, wanted in expected.items():
        _check_tensor(name, tensors[name], wanted, str(file))
    _check_numbers(tensors, file)
    return tensors


def _check_tensor(name: str, tensor: Tensor, expected: Expected, where: str) -> None:
    got = Expected(tensor.dtype, tuple(tensor.shape))
    if got != expected:
        texts = [f"{str(e.dtype).removeprefix('torch.')} {list(e.shape)}" for e in (got, expected)]
        raise PrefixFormatError(f"{name} in {where} is {texts[0]}", texts[1], RETRAIN)


def _check_numbers(tensors: dict[str, Tensor], where: Path) -> None:
    """Refuse NaN and infinity; a mass of zero, -inf, is a number."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.isfinite().all():
            continue
        removed = tensor == -math.inf
        if not name.startswith("training.") and name.endswith(".log_mass") and (tensor.isfinite() | removed).all():
            continue
        kind = "NaN" if tensor.isnan().any() else "infinity"
        raise PrefixFormatError(f"{name} of {where} holds {kind}", "finite numbers", "train it again, more slowly")
