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
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from foreword.errors import PrefixFormatError, PrefixMismatch
from foreword.prefix import Prefix, Site, Sites, SiteTensors
from foreword.storage import atomic_folder, locked, remove_leftovers, storage_errors, write_atomic

if TYPE_CHECKING:
    from foreword.base import BaseModel

__all__ = ["FORMAT_VERSION", "HEADER", "MAX_LENGTH", "TENSORS", "load_prefix", "read_header", "save_prefix"]

FORMAT_VERSION = 1
TENSORS = "prefix.safetensors"
HEADER = "prefix.json"
MAX_LENGTH = 65536

_NEXT = "prefix.json.next"
_MAX_HEADER_BYTES = 1 << 24
_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_SITE_NAME = re.compile(r"(?!training\.)[a-z][a-z0-9_]*\.(0|[1-9][0-9]{0,5})")
_HASH = re.compile(r"[0-9a-f]{64}")
_BLANK = "0" * 64
_RETRAIN = "copy it again from its source or train it again"


class _Expected(NamedTuple):
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


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
    text = _dump(header)
    _parse(text.encode(), path)
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
        header, _ = _read(path)
        if header == _parse((path / _NEXT).read_bytes(), path / _NEXT):
            os.replace(path / _NEXT, path / HEADER)
            return
    (path / _NEXT).unlink()


def _tensors(prefix: Prefix) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site, parts in prefix.sites.items():
        for part, tensor in zip(("keys", "values", "log_mass"), parts, strict=True):
            if tensor is not None:
                tensors[f"{site}.{part}"] = tensor
    for name, tensor in (prefix.training_state or {}).items():
        tensors[f"training.{name}"] = tensor
    # Own memory for every tensor: views of one storage cannot be written side by side.
    return {name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def _header(prefix: Prefix, tensors: dict[str, Tensor], data: bytes) -> dict[str, Any]:
    sites = {}
    for site, parts in prefix.sites.items():
        kv_heads, key_dim, value_dim = parts.shape
        gate = "none" if parts.log_mass is None else "mass"
        row = {"length": parts.length, "kv_heads": kv_heads, "key_dim": key_dim, "value_dim": value_dim, "gate": gate}
        sites[str(site)] = row
    for name, expected in _expected(sites, None).items():
        _check_tensor(name, tensors[name], expected, "the prefix")
    training = None
    if prefix.training_state is not None:
        training = {name: _describe(tensor) for name, tensor in prefix.training_state.items()}
    metadata = _json_value(prefix.metadata, "metadata")
    return {
        "format_version": FORMAT_VERSION,
        "header_sha256": _BLANK,
        "tensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "base": {"name": prefix.base_name, "fingerprint": prefix.fingerprint},
        "position_offset": prefix.position_offset,
        "sites": sites,
        "training": training,
        "task": metadata.pop("task", None),
        "metrics": metadata.pop("metrics", None),
        "provenance": metadata.pop("provenance", None),
        "metadata": metadata,
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


def _dump(header: dict[str, Any]) -> str:
    """The header as text, a line for each field and site, with its own hash filled in."""
    lines = []
    for key, value in header.items():
        if key == "sites":
            rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            lines.append(f'  "sites": {{\n{rows}\n  }}')
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    return text.replace(_BLANK, hashlib.sha256(text.encode()).hexdigest(), 1)


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
    for name in header["sites"]:
        keys, values = tensors[f"{name}.keys"], tensors[f"{name}.values"]
        sites[Site.parse(name)] = SiteTensors(keys, values, tensors.get(f"{name}.log_mass"))
    training = header["training"]
    prefix = Prefix(
        sites,
        base_name=header["base"]["name"],
        fingerprint=header["base"]["fingerprint"],
        position_offset=header["position_offset"],
        metadata=_metadata(header),
        training_state=None if training is None else {name: tensors[f"training.{name}"] for name in training},
    )
    if base is not None:
        prefix.check_base(base.name, base.fingerprint, base.geometry)
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
    raw = _read_file(path / name, _MAX_HEADER_BYTES)
    header = _parse(raw, path / name)
    claim = header["tensors"]
    file = path / TENSORS
    data = _read_file(file, claim["bytes"]) if tensors else b""
    size = len(data) if tensors else file.stat().st_size if file.is_file() else -1
    if size != claim["bytes"]:
        _refuse_disguise(_read_file(file, 8), file)
        raise PrefixFormatError(f"{file} has {max(size, 0)} bytes", str(claim["bytes"]), _RETRAIN)
    if tensors and (actual := hashlib.sha256(data).hexdigest()) != claim["sha256"]:
        _refuse_disguise(data, file)
        raise PrefixFormatError(f"{file} has sha256 {actual[:12]}…", f"{claim['sha256'][:12]}…", _RETRAIN)
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


def _refuse_disguise(data: bytes, file: Path) -> None:
    if data.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise PrefixFormatError(
            f"{file} is a pickle or zip file", "a safetensors file", "do not load it: a pickle can run code"
        )


def _parse(raw: bytes, file: Path) -> dict[str, Any]:
    """The fields of a header, checked one by one."""
    _refuse_disguise(raw, file)
    if len(raw) > _MAX_HEADER_BYTES:
        raise PrefixFormatError(f"{file} has more than {_MAX_HEADER_BYTES} bytes", "a smaller header", _RETRAIN)
    try:
        header = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PrefixFormatError(f"{file} is not JSON", "the header of a prefix", _RETRAIN) from error
    fields = _Fields(header, str(file))
    version = fields.whole("format_version", 1)
    if version != FORMAT_VERSION:
        raise PrefixFormatError(
            f"{file} has format version {version}", f"version {FORMAT_VERSION}", "update foreword to read it"
        )
    _check_header_hash(raw, fields)
    for name in ("base", "sites", "tensors", "metadata"):
        fields.table(name)
    fields.whole("position_offset", 0, 1 << 31)
    base = fields.table("base")
    base.text("name")
    base.text("fingerprint")
    base.close()
    claim = fields.table("tensors")
    claim.whole("bytes", 1)
    claim.hash("sha256")
    claim.close()
    _check_sites(fields.table("sites"))
    if fields.get("training") is not None:
        _check_training(fields.table("training"))
    for name in ("task", "metrics", "provenance"):
        fields.get(name)
    fields.close()
    return fields.values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_header_hash(raw: bytes, fields: _Fields) -> None:
    claimed = fields.hash("header_sha256")
    entry = b'"header_sha256": "%s"'
    blank = raw.replace(entry % claimed.encode(), entry % _BLANK.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != claimed:
        raise PrefixFormatError(f"{fields.where} was changed", "the header that was saved", _RETRAIN)


def _check_sites(sites: _Fields) -> None:
    lengths = []
    for name in sites.values:
        if not _SITE_NAME.fullmatch(name):
            raise PrefixFormatError(f"{sites.where} has {name!r}", "names such as 'decoder.0'", _RETRAIN)
        row = sites.table(name)
        lengths.append(row.whole("length", 0, MAX_LENGTH))
        for key in ("kv_heads", "key_dim", "value_dim"):
            row.whole(key, 1, 1 << 20)
        if row.text("gate") not in ("none", "mass"):
            raise PrefixFormatError(f"{row.where}: gate is {row.values['gate']!r}", "'none' or 'mass'", _RETRAIN)
        row.close()
    if not any(lengths):
        raise PrefixFormatError(f"{sites.where}: length 0 at every site", "one slot at least", "train a longer prefix")


def _check_training(training: _Fields) -> None:
    for name in training.values:
        row = training.table(name)
        if row.text("dtype") not in _DTYPES:
            raise PrefixFormatError(f"{row.where}: dtype is {row.values['dtype']!r}", "a known dtype", _RETRAIN)
        shape = row.get("shape")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise PrefixFormatError(f"{row.where}: shape is {shape!r}", "a list of sizes", _RETRAIN)
        row.close()


class _Fields:
    """A JSON object whose fields are taken one by one; `close` refuses what was not asked for."""

    def __init__(self, values: Any, where: str) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise PrefixFormatError(f"{where} is {_type(values)}", "a JSON object", _RETRAIN)
        self.values: dict[str, Any] = values
        self._asked: set[str] = set()

    def get(self, name: str) -> Any:
        self._asked.add(name)
        if name not in self.values:
            raise PrefixFormatError(f"{self.where} has no {name!r}", "every field of the format", _RETRAIN)
        return self.values[name]

    def whole(self, name: str, low: int, high: int | None = None) -> int:
        value = self.get(name)
        if type(value) is not int or value < low or (high is not None and value > high):
            limit = f"a whole number from {low}" + ("" if high is None else f" to {high}")
            raise PrefixFormatError(f"{self.where}: {name} is {str(value)[:40]}", limit, _RETRAIN)
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise PrefixFormatError(f"{self.where}: {name} is {_type(value)}", "text", _RETRAIN)
        return value

    def hash(self, name: str) -> str:
        value = self.text(name)
        if not _HASH.fullmatch(value):
            raise PrefixFormatError(f"{self.where}: {name} is {value[:40]!r}", "64 hexadecimal digits", _RETRAIN)
        return value

    def table(self, name: str) -> _Fields:
        return _Fields(self.get(name), f"{self.where}: {name}")

    def close(self) -> None:
        for name in self.values.keys() - self._asked:
            raise PrefixFormatError(f"{self.where} has the unknown field {name!r}", "none other", _RETRAIN)


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


# Tensors


def _expected(sites: dict[str, Any], training: dict[str, Any] | None) -> dict[str, _Expected]:
    """Every tensor that a header announces."""
    expected = {}
    for name, row in sites.items():
        heads, length = row["kv_heads"], row["length"]
        expected[f"{name}.keys"] = _Expected(torch.float32, (heads, length, row["key_dim"]))
        expected[f"{name}.values"] = _Expected(torch.float32, (heads, length, row["value_dim"]))
        if row["gate"] == "mass":
            expected[f"{name}.log_mass"] = _Expected(torch.float32, (length,))
    for name, row in (training or {}).items():
        expected[f"training.{name}"] = _Expected(_DTYPES[row["dtype"]], tuple(row["shape"]))
    return expected


def _load_tensors(path: Path, header: dict[str, Any], data: bytes) -> dict[str, Tensor]:
    file = path / TENSORS
    _refuse_disguise(data, file)
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise PrefixFormatError(f"{file} is not a safetensors file", "the tensors of a prefix", _RETRAIN) from error
    expected = _expected(header["sites"], header["training"])
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "lacks" if name in expected else "has the unknown"
        raise PrefixFormatError(f"{file} {problem} tensor {name!r}", f"the tensors that {HEADER} lists", _RETRAIN)
    for name, wanted in expected.items():
        _check_tensor(name, tensors[name], wanted, str(file))
    _check_numbers(tensors, file)
    return tensors


def _check_tensor(name: str, tensor: Tensor, expected: _Expected, where: str) -> None:
    got = _Expected(tensor.dtype, tuple(tensor.shape))
    if got != expected:
        texts = [f"{str(e.dtype).removeprefix('torch.')} {list(e.shape)}" for e in (got, expected)]
        raise PrefixFormatError(f"{name} in {where} is {texts[0]}", texts[1], _RETRAIN)


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
