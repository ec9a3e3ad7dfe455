"""Studies live: worker processes and Ray, killed at any moment, give what one process gives, and nothing twice."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.studying import ROOT, calls, tiny_study, write_study

from foreword.errors import ConfigError, StorageError
from foreword.experiments import Job, execute, jobs_of, load_study, read_record, read_result, state_of
from foreword.experiments.executors import InProcess
from foreword.experiments.workers import LocalWorkers

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the package ray")


def make_jobs(tmp_path: Path, out: str = "out", **files: str) -> list[Job]:
    folder = tmp_path / "study"
    study = load_study(folder if folder.exists() else write_study(folder, "seed = 0\n", **files))
    return jobs_of(study, tmp_path / out)


def values(jobs: list[Job]) -> list[Any]:
    """What came out, but for times and processes."""
    kept = ("value", "scores", "nats_per_token", "dev_nats_per_token", "parameters", "chosen")
    results = [read_result(job.folder) or {} for job in jobs]
    texts = [Path(job.folder, "texts.jsonl") for job in jobs]
    return [
        [{key: result.get(key) for key in kept}, path.exists() and path.read_text()]
        for result, path in zip(results, texts, strict=True)
    ]


def start(*words: object) -> subprocess.Popen[str]:
    """The command line as a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "src")])
    # A shell that runs the tests in the background lets them ignore Ctrl-C, which children would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "foreword", "study", *map(str, words)],
            env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, json.loads(out.strip().splitlines()[-1]) if out.strip() else {}, err


def wait_until(seconds: float = 30.0) -> Iterator[None]:
    """Come back now and then; fail when it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)
    pytest.fail(f"not within {seconds} s")


def real_files(tmp_path: Path) -> dict[str, str]:
    """A study file with a training of a tiny model."""
    (tmp_path / "tiny").mkdir()
    config = {**tiny_study(tmp_path / "tiny"), "method": "prefix", "rows": 10, "epochs": 2}
    return {"real": "".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items())}


def check_deaths(jobs: list[Job]) -> None:
    """Run `b` died once and was made then, `c` dies always, `d` raises; all others were made once."""
    known = {job.name: read_record(job.folder) for job in jobs}
    assert {name: each["status"] for name, each in known.items() if each["status"] != "done"} == {
        "c": "failed", "d": "failed",
    }  # fmt: skip
    assert [each["status"] for each in known["b"]["attempts"]] == ["failed", "done"]
    assert known["b"]["attempts"][0]["error"].startswith("the worker died")
    assert len(known["c"]["attempts"]) == len(known["d"]["attempts"]) == 2
    assert all(len(calls(job.folder)) == 1 for job in jobs if job.name not in "bcd")
    assert str(os.getpid()) not in {pid for job in jobs for pid in calls(job.folder)}


DEADLY = {"a": "", "b": "behave='die once'", "c": "behave='die'", "d": "behave='raise'", "e": "x = 1", "f": "x = 2"}


def test_workers_give_what_one_process_gives_and_survive_their_deaths(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, "shared", **DEADLY, **real_files(tmp_path))
    heard: list[str] = []
    backend = LocalWorkers(2, threads=1, progress=lambda stage, *_: heard.append(stage))
    assert execute(jobs, backend) == {"done": 5, "failed": 2}
    check_deaths(jobs)
    assert read_record(jobs[1].folder)["attempts"][0]["error"] == "the worker died (SIGKILL)"
    assert len({pid for job in jobs for pid in calls(job.folder)}) >= 4  # two, and new ones for those that died
    assert "a: working" in heard and any(stage.startswith("real: ") for stage in heard)
    harmless = [job for job in make_jobs(tmp_path, "alone") if job.name not in "bcd"]
    assert execute(harmless, InProcess()) == {"done": 4}
    assert values(harmless) == values([job for job in jobs if job.name not in "bcd"])


def test_workers_without_a_run_end_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is killed gives nothing back, and Python says so at the end: leaked semaphores."""
    workers = LocalWorkers(1, threads=1)
    workers.submit(*make_jobs(tmp_path, a=""))
    assert workers.next()[1].status == "done"
    process = workers._workers[0].process
    for name in ("terminate", "kill"):
        monkeypatch.setattr(process, name, lambda: pytest.fail("killed"))
    ended: list[int | None] = []
    monkeypatch.setattr(process, "close", lambda: ended.append(process.exitcode))
    workers.close()
    assert ended == [0]


def test_workers_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreword.experiments.workers._cores", lambda: 7)
    assert [LocalWorkers(count).threads for count in (1, 2, 3, 9)] == [7, 3, 2, 1]
    (job,) = make_jobs(tmp_path, loads="loads = 'torch'")
    execute([job], LocalWorkers(2))
    assert (read_result(job.folder) or {})["threads"] == "3"
    with pytest.raises(ConfigError, match="0 workers"):
        LocalWorkers(0)


def test_a_record_that_cannot_be_written_ends_the_study(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, a="")
    (tmp_path / "out").write_text("a file where the results belong")
    with pytest.raises(StorageError, match="cannot write"):
        execute(jobs, LocalWorkers(1))


@pytest.mark.parametrize("workers", [(), ("--workers", 2)], ids=["alone", "workers"])
def test_killed_in_the_middle_and_taken_up_again(tmp_path: Path, workers: tuple[object, ...]) -> None:
    files = {f"f{number}": f"x = {number}" for number in range(6)}
    folder = write_study(tmp_path / "study", "seconds = 0.25\n", **files)
    words = ("run", folder, "--out", tmp_path / "out", *workers, "--json")
    jobs = jobs_of(load_study(folder), tmp_path / "out")
    process = start(*words)
    for _ in wait_until():
        states = [state_of(job.folder) for job in jobs]
        at_work = [state == "running" and calls(job.folder) for state, job in zip(states, jobs, strict=True)]
        if states.count("done") >= 2 and any(at_work):
            break
    process.kill()
    process.communicate()
    for _ in wait_until():  # its workers end with it, and their locks with them
        if not any(state_of(job.folder) == "running" for job in jobs):
            break
    done = [job for job in jobs if state_of(job.folder) == "done"]
    assert 2 <= len(done) < 6 and {state_of(job.folder) for job in jobs} == {"done", "missing"}
    before = [(Path(job.folder) / "result.json").stat().st_mtime_ns for job in done]
    status, summary, err = finish(start(*words))
    assert status == 0 and summary["done"] == 6 and f"{len(done)} of 6 runs are in" in err
    assert [(Path(job.folder) / "result.json").stat().st_mtime_ns for job in done] == before
    assert [len(calls(job.folder)) for job in done] == [1] * len(done)
    cut = [read_record(job.folder)["attempts"][0]["status"] for job in jobs if len(calls(job.folder)) > 1]
    assert 1 <= len(cut) <= 2 and set(cut) == {"interrupted"}
    whole = jobs_of(load_study(folder), tmp_path / "whole")
    execute(whole, InProcess())
    assert values(whole) == values(jobs)


def test_ctrl_c_ends_workers_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", "seconds = 60\n", a="x = 1", b="x = 2")
    process = start("run", folder, "--out", tmp_path / "out", "--workers", 2)
    jobs = jobs_of(load_study(folder), tmp_path / "out")
    for _ in wait_until():
        if all(state_of(job.folder) == "running" and calls(job.folder) for job in jobs):
            break
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130 and err.strip().splitlines()[-1] == "stopped; 0 of 2 runs are done; the same command goes on"
    assert "Traceback" not in err and [state_of(job.folder) for job in jobs] == ["missing", "missing"]


@needs_ray
def test_ray_gives_what_one_process_gives_and_survives_a_killed_worker(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", "seed = 0\n", **DEADLY, **real_files(tmp_path))
    words = ("run", folder, "--out", tmp_path / "ray", "--ray", "local", "--workers", 2, "--json")
    status, summary, err = finish(start(*words))
    assert status == 1 and (summary["done"], summary["failed"]) == (5, 2), err
    jobs = jobs_of(load_study(folder), tmp_path / "ray")
    check_deaths(jobs)
    harmless = [job for job in jobs_of(load_study(folder), tmp_path / "alone") if job.name not in "bcd"]
    assert execute(harmless, InProcess()) == {"done": 4}
    assert values(harmless) == values([job for job in jobs if job.name not in "bcd"])
