"""The run folder by itself: whose it is, what a crash leaves, what it refuses."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from foreword.errors import RunError, StorageError
from foreword.runs import RunFolder, State, find_prefix, peak_memory_bytes, provenance

IDENTITY = {"epochs": 3, "data": {"train": "ab", "dev": "cd"}}


def state(number: float) -> State:
    return State({"module.keys": torch.full((2, 3), number)}, {"position": {"step": number}})


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path, IDENTITY)
    folder.begin({"command": ["x"]})
    return folder


def test_state_and_metrics_there_and_back(tmp_path: Path) -> None:
    with begun(tmp_path / "run") as folder:
        folder.log(step=1, loss=2.5)
        folder.save_state(state(1))
        folder.log(step=2, loss=2.0)
        assert folder.summary() is None
    with RunFolder(tmp_path / "run", IDENTITY) as folder:
        kept = folder.begin({"command": ["y"]})
        assert kept is not None
        assert torch.equal(kept.tensors["module.keys"], torch.full((2, 3), 1.0))
        assert kept.values["position"] == {"step": 1}
        # The line after the state is gone, and the record is that of the first start.
        folder.log(step=2, loss=2.0)
        assert (folder.path / "metrics.jsonl").read_text().splitlines() == [
            '{"step": 1, "loss": 2.5}', '{"step": 2, "loss": 2.0}',
        ]  # fmt: skip
        assert json.loads((folder.path / "config.json").read_text())["command"] == ["x"]
        folder.finish({"steps": 2})
    with RunFolder(tmp_path / "run", IDENTITY) as folder:
        assert folder.summary() == {"status": "finished", "steps": 2}


def test_without_a_state_a_run_begins_anew(tmp_path: Path) -> None:
    with begun(tmp_path / "run") as folder:
        folder.log(step=1)
    with RunFolder(tmp_path / "run", IDENTITY) as folder:
        assert folder.begin({}) is None
        assert (folder.path / "metrics.jsonl").read_bytes() == b""


def test_another_run_is_refused_and_overwritten_on_demand(tmp_path: Path) -> None:
    with begun(tmp_path / "run") as folder:
        folder.save_state(state(1))
        (folder.path / "prefix").mkdir()
    other = {"epochs": 5, "data": {"train": "ab", "dev": "xx"}, "seed": 1}
    with pytest.raises(RunError) as error:
        RunFolder(tmp_path / "run", other)
    assert str(error.value) == (
        f"{tmp_path / 'run'} holds another run: epochs 3 (now 5), data.dev 'cd' (now 'xx'), seed None (now 1); "
        "expected the same options, base model and data; choose another --out, or --overwrite it"
    )
    assert (tmp_path / "run" / "state.safetensors").exists()
    with RunFolder(tmp_path / "run", other, overwrite=True) as folder:
        assert folder.begin({}) is None
        assert not folder.prefix.exists()


def test_what_is_no_run_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name in ("file", "folder"):
        for overwrite in (False, True):
            with pytest.raises(RunError, match="choose another --out"):
                RunFolder(tmp_path / name, IDENTITY, overwrite=overwrite)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["thesis.txt"]


def test_a_folder_in_which_nothing_began_disappears(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", IDENTITY).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"garbage", b'\x10\0\0\0\0\0\0\0{"a": 1}        '])
def test_a_damaged_state_is_one_line(tmp_path: Path, damage: bytes) -> None:
    with begun(tmp_path / "run") as folder:
        folder.save_state(state(1))
    (tmp_path / "run" / "state.safetensors").write_bytes(damage)
    with RunFolder(tmp_path / "run", IDENTITY) as folder, pytest.raises(RunError, match="is damaged") as error:
        folder.begin({})
    assert "\n" not in str(error.value)


def test_a_state_of_the_future_and_lost_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with begun(tmp_path / "run") as folder:
        folder.log(step=1)
        folder.save_state(state(1))
        (folder.path / "metrics.jsonl").write_bytes(b"")
    with RunFolder(tmp_path / "run", IDENTITY) as folder, pytest.raises(RunError, match="shorter than"):
        folder.begin({})
    monkeypatch.setattr("foreword.runs._FORMAT", 2)
    with RunFolder(tmp_path / "run", IDENTITY) as folder, pytest.raises(RunError, match="format 1; expected format 2"):
        folder.begin({})


def test_a_full_disk_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with begun(tmp_path / "run") as folder:
        folder.save_state(state(1))
        before = sorted(folder.path.iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageError, match="No space left on device"):
                folder.save_state(state(2))
        assert sorted(folder.path.iterdir()) == before
    with RunFolder(tmp_path / "run", IDENTITY) as folder:
        kept = folder.begin({})
        assert kept is not None
        assert kept.values["position"] == {"step": 1}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_under_the_metrics(tmp_path: Path) -> None:
    with begun(tmp_path / "run") as folder, open("/dev/full", "ab", buffering=0) as full:
        folder._metrics, kept = full, folder._metrics
        assert kept is not None
        kept.close()
        with pytest.raises(StorageError, match="metrics.jsonl .No space left on device.; expected a writable place"):
            folder.log(step=1)


def hold(path: Path, pipe: Connection) -> None:
    with RunFolder(path, IDENTITY):
        pipe.send(os.getpid())
        pipe.recv()


def test_one_process_per_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "run", there))
    process.start()
    pid = here.recv()
    with pytest.raises(RunError) as error:
        RunFolder(tmp_path / "run", IDENTITY)
    assert str(error.value) == (
        f"process {pid} is working in {tmp_path / 'run'}; expected one process per run folder; "
        "wait for it or choose another --out"
    )
    process.kill()  # the lock goes with its holder
    process.join()
    RunFolder(tmp_path / "run", IDENTITY).close()


def test_find_prefix(tmp_path: Path) -> None:
    with begun(tmp_path / "run") as folder:
        with pytest.raises(RunError, match="has no prefix yet"):
            find_prefix(tmp_path / "run")
        folder.prefix.mkdir()
    assert find_prefix(tmp_path / "run") == tmp_path / "run" / "prefix"
    assert find_prefix(tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_provenance() -> None:
    known = provenance("cpu")
    assert json.loads(json.dumps(known)) == known
    assert known["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert peak_memory_bytes(torch.device("cpu")) > 50e6
