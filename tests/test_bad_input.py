"""What goes wrong at users, through the command line: one line that says got, expected and do; nothing half-written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import foreword as fw
from foreword.cli import main
from tiny import save_tiny

COLUMNS = ["--prompt-column", "question", "--completion-column", "answer"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def prefix(model: str, tmp_path: Path) -> Path:
    folder = tmp_path / "prefix"
    fw.Prefix.new(fw.BaseModel.load(model), length=3).save(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{k}?", "answer": f"{k}."}) + "\n" for k in range(20)))
    return str(path)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call the command line, which must refuse; the error: one line of three parts, the last of standard error."""

    def call(*arguments: str) -> str:
        capsys.readouterr()  # what the fixtures printed
        monkeypatch.setattr(sys, "argv", ["foreword", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("run folder")]
        assert exit_.value.code == 1 and not out and len(lines) == 1
        assert re.fullmatch(r"error: .+; expected .+; .+", lines[0])
        return lines[0]

    return call


def _edit_header(folder: Path, **fields: object) -> None:
    """Change fields of the header and give it the hash that fits, as a careful forger does."""
    header = {**json.loads((folder / "prefix.json").read_text()), **fields, "header_sha256": "0" * 64}
    text = json.dumps(header)
    (folder / "prefix.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))


def _write_tensors(folder: Path, data: bytes) -> None:
    (folder / "prefix.safetensors").write_bytes(data)
    _edit_header(folder, tensors={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})


def _truncate(folder: Path) -> None:
    file = folder / "prefix.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _tamper(folder: Path) -> None:
    file = folder / "prefix.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "prefix.safetensors")
    tensors["decoder.1.keys"][0, 1, 2] = torch.nan
    _write_tensors(folder, save(tensors))


def _disguise(folder: Path) -> None:
    (folder / "prefix.safetensors").write_bytes(pickle.dumps([0]))


def _disguise_well(folder: Path) -> None:
    _write_tensors(folder, pickle.dumps([0]))


def _no_slots(folder: Path) -> None:
    header = json.loads((folder / "prefix.json").read_text())
    _edit_header(folder, sites={name: {**row, "length": 0} for name, row in header["sites"].items()})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "bytes; expected"),
        (_tamper, "has sha256"),
        (lambda folder: (folder / "prefix.json").write_text("{"), "is not JSON"),
        (_nan, "holds NaN"),
        (_disguise, "is a pickle"),
        (_disguise_well, "is a pickle"),
        (lambda folder: _edit_header(folder, format_version=9), "has format version 9; expected version 2 or older"),
        (_no_slots, "length 0 at every site"),
    ],
)
@pytest.mark.parametrize("command", ["show", "generate"])
def test_a_prefix_that_is_not_whole(refused, prefix: Path, command: str, damage, message: str) -> None:
    damage(prefix)
    arguments = ["show", str(prefix)] if command == "show" else ["generate", "-p", str(prefix), "hello"]
    assert message in refused(*arguments)


def test_another_base(refused, prefix: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=1)
    assert "with weights" in refused("generate", "-p", str(prefix), "-b", other, "hello")


@pytest.mark.parametrize(("length", "message"), [("0", "at least 1"), ("65", "at most 64")])
def test_lengths_that_cannot_be(refused, model: str, rows: str, tmp_path: Path, length: str, message: str) -> None:
    out = tmp_path / "run"
    line = refused("train", "-b", model, "--train", rows, *COLUMNS, "--length", length, "-o", str(out))
    assert message in line and not out.exists()


def test_a_saved_prefix_that_is_too_long(refused, model: str, prefix: Path, tmp_path: Path) -> None:
    whole = fw.Prefix.load(prefix)
    sites = {site: type(t)(t.keys.repeat(1, 30, 1), t.values.repeat(1, 30, 1)) for site, t in whole.sites.items()}
    fw.Prefix(sites, whole.base_name, whole.fingerprint).save(tmp_path / "long")
    assert "90 slots; expected at most 64" in refused("generate", "-p", str(tmp_path / "long"), "hello")


@pytest.mark.parametrize("command", ["train", "check", "generate"])
def test_a_model_that_cannot_be_prefixed(refused, rows: str, tmp_path: Path, command: str) -> None:
    mamba, out = save_tiny("mamba", tmp_path / "mamba"), tmp_path / "run"
    arguments = {
        "train": ["train", "-b", mamba, "--train", rows, *COLUMNS, "-o", str(out)],
        "check": ["check", mamba],
        "generate": ["generate", "-b", mamba, "hello"],
    }
    assert "'mamba' is not supported" in refused(*arguments[command]) and not out.exists()


_LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from foreword.cli import main
import torch, transformers, foreword.artifact, foreword.train
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of files are POSIX's")
@pytest.mark.parametrize("command", ["fold", "train"])
def test_a_disk_without_space(model: str, prefix: Path, rows: str, tmp_path: Path, command: str) -> None:
    """A limit on the size of files stands in for the disk: the system itself refuses the write."""
    out = tmp_path / "out" / "place"
    arguments = {
        "fold": ["fold", str(prefix), "-o", str(out)],
        "train": ["train", "-b", model, "--train", rows, *COLUMNS, "--epochs", "1", "--length", "9", "-o", str(out)],
    }
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *arguments[command]], check=False,
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and re.fullmatch(r"error: cannot write .+; expected .+ enough space; .+", last)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("prefix.safetensors.*")) and not (out / "prefix").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_that_cannot_be_written(prefix: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "foreword", "show", str(prefix), "--json"]
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: cannot write the output .+; expected .+; .+\n", done.stderr)


def test_a_hub_that_does_not_answer(refused) -> None:
    line = refused("generate", "-b", "nobody/nothing", "hello")
    assert "'nobody/nothing' cannot be loaded" in line and "check the spelling and the network" in line


def test_a_device_that_is_not_there(refused, model: str) -> None:
    assert "device 'gpu'; expected cpu" in refused("generate", "-b", model, "--device", "gpu", "hello")
    assert "device 'cuda:99'; expected cpu" in refused("generate", "-b", model, "--device", "cuda:99", "hello")


def test_prompts_that_are_no_text(refused, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for errors in ("strict", "surrogateescape"):
        stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "is not UTF-8" in refused("generate", "-b", model)


def test_scores_go_to_a_plain_file(refused, model: str, rows: str, tmp_path: Path) -> None:
    arguments = ["evaluate", "-b", model, "--test", rows, *COLUMNS]
    assert "is not a plain file" in refused(*arguments, "-o", str(tmp_path))
    assert "is not a plain file" in refused(*arguments, "-o", os.devnull)
    assert "split 'train'; expected dev or test" in refused(*arguments, "--split", "train")
    assert "together with --test" in refused(*arguments, "--split", "dev")


def test_the_hint_after_training_fits_the_rows() -> None:
    from foreword.cli.train import _next

    assert _next(Path("run"), "trails") == "foreword evaluate run --with-base"
    assert "--test ROWS" in _next(Path("run"), None)


def test_help_lists_the_choices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["foreword", "train", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "linear, cosine," in re.sub(r"[\s│]+", " ", capsys.readouterr().out)


def test_rows_that_cannot_be_used_are_reported_by_number(
    model: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(rows, "a") as file:
        file.write('{"question": "", "answer": "x"}\n' + "garbage\n" * 6)
    command = ["foreword", "train", "-b", model, "--train", rows, *COLUMNS, "--epochs", "1", "--length", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "-o", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as exit_:
        main()
    err = capsys.readouterr().err
    assert exit_.value.code == 0 and "row 21 of train: column 'question' is empty" in err
    assert "row 22 of train: not valid JSON" in err and "2 more rows of train" in err


def test_the_first_bad_row_stops_a_strict_run(refused, model: str, rows: str, tmp_path: Path) -> None:
    with open(rows, "a") as file:
        file.write("garbage\n")
    out = tmp_path / "run"
    line = refused("train", "-b", model, "--train", rows, *COLUMNS, "--strict", "-o", str(out))
    assert "row 21 of rows.jsonl" in line and not out.exists()
