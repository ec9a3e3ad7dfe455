"""The header of a prefix, `prefix.json`: written with its own hash in it, and read field by field.

`docs/prefix-format.md` describes it. Every field must be there, of its type and in its range, and no other may be; what
it says of the tensors is what `foreword.artifact` then holds them to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foreword.errors import PrefixFormatError
from foreword.prefix import POOLINGS

__all__ = [
    "BLANK_HASH", "FORMAT_VERSION", "MAX_HEADER_BYTES", "MAX_LENGTH", "RETRAIN", "Expected", "dump_header",
    "expected_tensors", "parse_header", "refuse_disguise",
]  # fmt: skip

FORMAT_VERSION = 2
MAX_LENGTH = 65536
MAX_HEADER_BYTES = 1 << 24
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
_SITE_NAME = re.compile(r"(?!training\.|head\.)[a-z][a-z0-9_]*\.(0|[1-9][0-9]{0,5})")
_HASH = re.compile(r"[0-9a-f]{64}")
BLANK_HASH = "0" * 64
RETRAIN = "copy it again from its source or train it again"


class Expected(NamedTuple):
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def dump_header(header: dict[str, Any]) -> str:
    """The header as text, a line for each field and site, with its own hash filled in."""
    lines = []
    for key, value in header.items():
        if key == "sites":
            rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in value.items())
            lines.append(f'  "sites": {{\n{rows}\n  }}')
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    return text.replace(BLANK_HASH, hashlib.sha256(text.encode()).hexdigest(), 1)


def parse_header(raw: bytes, file: Path) -> dict[str, Any]:
    """The fields of a header, checked one by one."""
    refuse_disguise(raw, file)
    if len(raw) > MAX_HEADER_BYTES:
        raise PrefixFormatError(f"{file} has more than {MAX_HEADER_BYTES} bytes", "a smaller header", RETRAIN)
    try:
        header = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PrefixFormatError(f"{file} is not JSON", "the header of a prefix", RETRAIN) from error
    fields = _Fields(header, str(file))
    version = fields.whole("format_version", 1)
    if version > FORMAT_VERSION:
        raise PrefixFormatError(
            f"{file} has format version {version}", f"version {FORMAT_VERSION} or older", "update foreword to read it"
        )
    _check_header_hash(raw, fields)
    if version == 1:
        _raise_to_version_2(fields)
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
    if fields.get("head") is not None:
        _check_head(fields.table("head"))
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
    blank = raw.replace(entry % claimed.encode(), entry % BLANK_HASH.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != claimed:
        raise PrefixFormatError(f"{fields.where} was changed", "the header that was saved", RETRAIN)


def _check_sites(sites: _Fields) -> None:
    lengths = []
    for name in sites.values:
        if not _SITE_NAME.fullmatch(name):
            raise PrefixFormatError(f"{sites.where} has {name!r}", "names such as 'decoder.0'", RETRAIN)
        row = sites.table(name)
        lengths.append(row.whole("length", 0, MAX_LENGTH))
        for key in ("kv_heads", "key_dim", "value_dim"):
            row.whole(key, 1, 1 << 20)
        row.truth("mass")
        if row.get("gate") is not None:
            gate = row.table("gate")
            gate.choice("pooling", POOLINGS)
            gate.whole("hidden", 1, 1 << 20)
            gate.close()
        row.close()
    if not any(lengths):
        raise PrefixFormatError(f"{sites.where}: length 0 at every site", "one slot at least", "train a longer prefix")


def _raise_to_version_2(fields: _Fields) -> None:
    """Version 1 had no head, and of the gates only mass, as `gate` "none" or "mass"."""
    fields.values["head"] = None
    sites = fields.table("sites")
    for name in sites.values:
        row = sites.table(name)
        row.choice("gate", ("none", "mass"))
        row.values["mass"], row.values["gate"] = row.values["gate"] == "mass", None


def _check_head(head: _Fields) -> None:
    kind = head.choice("kind", ("classification", "choice", "tagging"))
    head.choice("pooling", ("token",) if kind == "tagging" else ("cls", "mean"))
    labels = head.get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise PrefixFormatError(f"{head.where}: labels is {str(labels)[:40]}", "a list of texts", RETRAIN)
    outputs = 1 if kind == "choice" else len(labels)
    if head.whole("outputs", 1) != outputs:
        raise PrefixFormatError(f"{head.where}: outputs is {head.values['outputs']}", str(outputs), RETRAIN)
    head.whole("hidden", 1, 1 << 20)
    head.close()


def _check_training(training: _Fields) -> None:
    for name in training.values:
        row = training.table(name)
        if row.text("dtype") not in _DTYPES:
            raise PrefixFormatError(f"{row.where}: dtype is {row.values['dtype']!r}", "a known dtype", RETRAIN)
        shape = row.get("shape")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise PrefixFormatError(f"{row.where}: shape is {shape!r}", "a list of sizes", RETRAIN)
        row.close()


class _Fields:
    """A JSON object whose fields are taken one by one; `close` refuses what was not asked for."""

    def __init__(self, values: Any, where: str) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise PrefixFormatError(f"{where} is {_type(values)}", "a JSON object", RETRAIN)
        self.values: dict[str, Any] = values
        self._asked: set[str] = set()

    def get(self, name: str) -> Any:
        self._asked.add(name)
        if name not in self.values:
            raise PrefixFormatError(f"{self.where} has no {name!r}", "every field of the format", RETRAIN)
        return self.values[name]

    def whole(self, name: str, low: int, high: int | None = None) -> int:
        value = self.get(name)
        if type(value) is not int or value < low or (high is not None and value > high):
            limit = f"a whole number from {low}" + ("" if high is None else f" to {high}")
            raise PrefixFormatError(f"{self.where}: {name} is {str(value)[:40]}", limit, RETRAIN)
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise PrefixFormatError(f"{self.where}: {name} is {_type(value)}", "text", RETRAIN)
        return value

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        value = self.text(name)
        if value not in allowed:
            raise PrefixFormatError(f"{self.where}: {name} is {value[:40]!r}", " or ".join(map(repr, allowed)), RETRAIN)
        return value

    def truth(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise PrefixFormatError(f"{self.where}: {name} is {_type(value)}", "true or false", RETRAIN)
        return value

    def hash(self, name: str) -> str:
        value = self.text(name)
        if not _HASH.fullmatch(value):
            raise PrefixFormatError(f"{self.where}: {name} is {value[:40]!r}", "64 hexadecimal digits", RETRAIN)
        return value

    def table(self, name: str) -> _Fields:
        return _Fields(self.get(name), f"{self.where}: {name}")

    def close(self) -> None:
        for name in self.values.keys() - self._asked:
            raise PrefixFormatError(f"{self.where} has the unknown field {name!r}", "none other", RETRAIN)


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def expected_tensors(
    sites: dict[str, Any], head: dict[str, Any] | None, training: dict[str, Any] | None
) -> dict[str, Expected]:
    """Every tensor that a header announces."""
    expected = {}
    for name, row in sites.items():
        heads, length = row["kv_heads"], row["length"]
        expected[f"{name}.keys"] = Expected(torch.float32, (heads, length, row["key_dim"]))
        expected[f"{name}.values"] = Expected(torch.float32, (heads, length, row["value_dim"]))
        if row["mass"]:
            expected[f"{name}.log_mass"] = Expected(torch.float32, (length,))
        if row["gate"] is not None:
            expected[f"{name}.gate_weight"] = Expected(torch.float32, (row["gate"]["hidden"], length))
    if head is not None:
        expected["head.weight"] = Expected(torch.float32, (head["outputs"], head["hidden"]))
        expected["head.bias"] = Expected(torch.float32, (head["outputs"],))
    for name, row in (training or {}).items():
        expected[f"training.{name}"] = Expected(_DTYPES[row["dtype"]], tuple(row["shape"]))
    return expected


_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def refuse_disguise(data: bytes, file: Path) -> None:
    """Raise `PrefixFormatError` for a pickle or a zip file, whatever it is called."""
    # Two bytes of a pickle may also be the length of a safetensors header: then its other bytes and a brace follow.
    begins_as_safetensors = data[4:9] == b"\0\0\0\0{"
    if data.startswith((b"PK\x03\x04", *_PICKLES)) and not begins_as_safetensors:
        raise PrefixFormatError(
            f"{file} is a pickle or zip file", "a safetensors file", "do not load it: a pickle can run code"
        )
