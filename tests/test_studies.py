"""Studies: files become runs, runs become results, each once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.studying import calls, write_study

from foreword.errors import ConfigError, MissingPackage, RunError, StorageError
from foreword.experiments import (
    Job,
    Study,
    execute,
    jobs_made_with,
    jobs_of,
    list_studies,
    load_study,
    other_results,
    read_record,
    read_result,
    select,
    settings,
    state_of,
)
from foreword.experiments.executors import InProcess
from foreword.experiments.plan import expand
from foreword.experiments.records import attempt, bury, key_of
from foreword.experiments.versions import code_version, git_state, is_code, resolve

plain = st.one_of(st.booleans(), st.integers(-3, 3), st.floats(-2, 2).map(lambda x: round(x, 1)), st.sampled_from("ab"))
keys = st.sampled_from(["rows", "seed", "sample", "method", "length", "x"])
lists = st.lists(plain, min_size=1, max_size=3, unique_by=json.dumps)
tables = st.dictionaries(keys, st.one_of(plain, lists), max_size=5)


def as_toml(values: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def texts(study: Study) -> list[str]:
    return [json.dumps(run.config, sort_keys=True) for run in study.runs]


@given(tables, tables)
def test_a_file_gives_every_combination_of_its_lists_once(defaults: dict[str, Any], values: dict[str, Any]) -> None:
    whole = {**defaults, **values}
    runs = list(expand(whole, "a.toml"))
    size = 1
    for value in whole.values():
        size *= len(value) if isinstance(value, list) else 1
    found = Counter(json.dumps(run.config, sort_keys=True) for run in runs)
    assert len(runs) == size and set(found.values()) == {1}
    for run in runs:
        assert run.config.keys() == whole.keys()
        assert all(
            json.dumps(run.config[key]) in map(json.dumps, value if isinstance(value, list) else [value])
            for key, value in whole.items()
        )


@given(st.dictionaries(keys, plain), st.randoms(use_true_random=False))
def test_a_key_does_not_depend_on_the_order_and_on_all_else(values: dict[str, Any], chance: Any) -> None:
    items = list(values.items())
    chance.shuffle(items)
    key = key_of(values, "f", "code", "data")
    assert key_of(dict(items), "f", "code", "data") == key
    others = [
        key_of({**values, "more": 1}, "f", "code", "data"), key_of(values, "g", "code", "data"),
        key_of(values, "f", "other", "data"), key_of(values, "f", "code", "other"),
    ]  # fmt: skip
    assert len({key, *others}) == 5


def test_values_that_python_calls_equal_are_different_runs() -> None:
    assert len({key_of({"x": value}, "", "", "") for value in (1, 1.0, True, "1")}) == 4
    assert len(list(expand({"x": [1, 1.0, True, "1"]}, "a.toml"))) == 4


def test_files_win_over_defaults_and_the_command_line_over_both(tmp_path: Path) -> None:
    folder = write_study(
        tmp_path / "mine", "rows = [50, 100]\nseed = 0\n", one="method = 'a'", two="method = 'b'\nrows = 7"
    )
    study = load_study(folder)
    assert (study.name, study.description) == ("mine", "for tests")
    assert [run.name for run in study.runs] == ["one,rows=50", "one,rows=100", "two"]
    assert study.runs[2].config == {"rows": 7, "seed": 0, "method": "b"}
    assert {run.config["rows"] for run in load_study(folder, {"rows": 5}).runs} == {5}
    with pytest.raises(ConfigError, match=r"two\.toml: run two is the same as one of one\.toml"):
        load_study(folder, {"rows": 5, "method": "c"})


def test_defaults_alone_are_a_study(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "mine", "seed = [0, 1]\n"))
    assert [run.name for run in study.runs] == ["defaults,seed=0", "defaults,seed=1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows = [50, 50]", r"bad\.toml: rows has a value twice"),
        ("rows = []", r"bad\.toml: rows = \[\]; expected a text, a finite number"),
        ("rows = [[1], [2]]", r"bad\.toml: rows = \[1\]"),
        ("rows = nan", r"bad\.toml: rows = nan"),
        ("rows = 2026-11-25", r"bad\.toml: rows = datetime"),
        ("[rows]\nmany = 1", r"bad\.toml: rows = \{'many': 1\}"),
        ("rows = ", r"bad\.toml is no TOML"),
        ("[study]\ndescription = 'x'", r"bad\.toml: study = "),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_study(write_study(tmp_path / "mine", "", bad=text))
    assert "\n" not in str(error.value)


def test_a_head_with_something_else_is_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "mine")
    (folder / "defaults.toml").write_text("[study]\nretries = 3\n")
    with pytest.raises(ConfigError, match=r"defaults\.toml: study\.retries = 3"):
        load_study(folder)


def test_a_configuration_that_cannot_be_performed_is_refused_before_anything_runs(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path / "mine", bad="method = 'magic'"))
    with pytest.raises(ConfigError, match=r"bad\.toml: method = 'magic'; expected a method"):
        jobs_of(study, tmp_path / "out")


def test_own_studies_win_over_built_in_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "low-data-small" in list_studies()
    write_study(tmp_path / "experiments" / "low-data-small", "seed = 3\n")
    write_study(tmp_path / "experiments" / "other")
    monkeypatch.chdir(tmp_path)
    assert load_study("low-data-small").runs[0].config == {"seed": 3}
    assert set(list_studies()) > {"other", "low-data"}
    with pytest.raises(ConfigError, match="study 'nothing'; expected a folder with defaults.toml, or ablations, "):
        load_study("nothing")
    (tmp_path / "experiments" / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"experiments/empty has no defaults\.toml"):
        load_study("experiments/empty")


def test_runs_are_chosen_by_method_file_or_name(tmp_path: Path) -> None:
    runs = load_study(write_study(tmp_path / "s", "seed=[0,1]\n", a="method='lora'", b="method='lora'\nrank=8")).runs
    assert len(select(runs)) == len(select(runs, ["lora"])) == 4
    assert [run.name for run in select(runs, ["b"])] == ["b,seed=0", "b,seed=1"]
    assert [run.name for run in select(runs, ["a,seed=1", "b,seed=0"])] == ["a,seed=1", "b,seed=0"]
    with pytest.raises(ConfigError, match="no run 'full'; expected the name of a run, or one of lora"):
        select(runs, ["full"])


def test_settings_are_toml_or_text() -> None:
    assert settings(["a=1", "b=x y", "c=[1, 2]", "d=true", 'e="1"', "f=a=b"]) == {
        "a": 1, "b": "x y", "c": [1, 2], "d": True, "e": "1", "f": "a=b",
    }  # fmt: skip
    for wrong in ("a", "=1", "a=[]", "a={b = 1}"):
        with pytest.raises(ConfigError, match="--set"):
            settings([wrong])


def make_jobs(tmp_path: Path, defaults: str = "seed = [0, 1, 2]\n", **files: str) -> list[Job]:
    return jobs_of(load_study(write_study(tmp_path / "study", defaults, **files)), tmp_path / "out")


def test_a_run_is_made_once_and_its_record_says_everything(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    assert [state_of(job.folder) for job in jobs] == ["missing"] * 3
    assert execute(jobs, InProcess()) == {"done": 3}
    record, result = read_record(jobs[1].folder), read_result(jobs[1].folder)
    assert result is not None and result["config"] == {"seed": 1} and 0 <= result["value"] < 1
    assert Path(jobs[1].folder).name == record["key"] == jobs[1].key
    assert (
        record["status"] == "done"
        and record["config"] == {"seed": 1}
        and record["code"] == code_version(jobs[1].perform)
    )
    assert record["versions"]["torch"] and record["machine"] and record["device"] == "cpu" and record["seconds"] >= 0
    assert record["command"].endswith("--only defaults,seed=1")
    assert execute(jobs, InProcess()) == {"done": 3}
    assert [len(calls(job.folder)) for job in jobs] == [1, 1, 1]


def test_other_code_data_or_configuration_has_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(tmp_path, "data = 'a'\n")
    execute(jobs, InProcess())
    other = jobs_of(load_study(tmp_path / "study", {"data": "b"}), tmp_path / "out")
    monkeypatch.setattr("foreword.experiments.grid.code_version", lambda _: "other code")
    later = jobs_of(load_study(tmp_path / "study"), tmp_path / "out")
    assert [state_of(job.folder) for job in (*jobs, *other, *later)] == ["done", "missing", "missing"]
    assert other_results(tmp_path / "out", later[0].code) == 1 and other_results(tmp_path / "out", jobs[0].code) == 0
    assert execute(later, InProcess()) == {"failed": 1}  # this process has the code that it has
    assert "expected code other co" in read_record(later[0].folder)["attempts"][0]["error"]


def test_a_failing_run_is_tried_again_recorded_and_stops_no_other(tmp_path: Path) -> None:
    jobs = make_jobs(
        tmp_path, "seed = 0\n", a="behave = 'raise'", b="behave = 'raise once'", c="behave = 'refuse'",
        d="behave = 'leave'", e="behave = 'nan'", f="",
    )  # fmt: skip
    heard: list[tuple[str, str]] = []
    counts = execute(jobs, InProcess(), retries=2, report=lambda job, end: heard.append((job.name, end.status)))
    assert counts == {"failed": 4, "done": 2}
    assert {job.name: len(calls(job.folder)) for job in jobs} == {"a": 3, "b": 2, "c": 1, "d": 3, "e": 3, "f": 1}
    assert [state_of(job.folder) for job in jobs] == ["failed", "done", "failed", "failed", "failed", "done"]
    attempts = {job.name: read_record(job.folder)["attempts"] for job in jobs}
    assert [each["status"] for each in attempts["b"]] == ["failed", "done"]
    assert "something broke" in attempts["a"][-1]["error"] and "studying.py" in attempts["a"][-1]["traceback"]
    assert "rows = 0" in attempts["c"][0]["error"] and "traceback" not in attempts["c"][0]
    assert heard.count(("a", "failed")) == 3 and heard[-1] == ("e", "failed")
    execute(jobs, InProcess(), retries=0)  # the same command later: what failed is tried anew
    assert {job.name: len(calls(job.folder)) for job in jobs} == {"a": 4, "b": 2, "c": 2, "d": 4, "e": 4, "f": 1}


def test_a_run_that_was_cut_off_is_missing_and_made_anew(tmp_path: Path) -> None:
    (job,) = make_jobs(tmp_path, "seed = 0\n")
    folder = Path(job.folder)
    folder.mkdir(parents=True)
    (folder / "lock").write_text("999999")  # of a process that is no more
    (folder / "run.json").write_text(json.dumps({"status": "running", "attempts": [{"status": "running"}]}))
    (folder / ".result.json.0123456789ab.tmp").write_text('{"value":')
    assert state_of(folder) == "missing"
    assert attempt(job).status == "done"
    assert [each["status"] for each in read_record(folder)["attempts"]] == ["interrupted", "done"]
    assert sorted(path.name for path in folder.iterdir()) == ["calls", "lock", "result.json", "run.json"]


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path: Path) -> None:
    import fcntl

    (job,) = make_jobs(tmp_path, "seed = 0\n")
    Path(job.folder).mkdir(parents=True)
    with open(Path(job.folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state_of(job.folder) == "running"
        assert execute([job], InProcess()) == {"busy": 1}
        assert bury(job, "died").status == "busy"
    assert calls(job.folder) == [] and state_of(job.folder) == "missing"


def test_a_dead_worker_is_recorded(tmp_path: Path) -> None:
    (job,) = make_jobs(tmp_path, "seed = 0\n")
    outcome = bury(job, "the worker died (SIGKILL)")
    assert (outcome.status, outcome.error, outcome.again) == ("failed", "the worker died (SIGKILL)", True)
    assert state_of(job.folder) == "failed"
    assert execute([job], InProcess()) == {"done": 1}
    assert bury(job, "too late").status == "done"


def test_damaged_records_are_named(tmp_path: Path) -> None:
    (job,) = make_jobs(tmp_path, "seed = 0\n")
    Path(job.folder).mkdir(parents=True)
    Path(job.folder, "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json cannot be read .*remove"):
        read_record(job.folder)


@pytest.mark.parametrize("name", ["no_such_module:f", "math:nothing", "math", ":f", "foreword.nothing:f"])
def test_a_function_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="module:function that can be imported"):
        resolve(name)


def test_the_code_version_follows_what_runs_read(tmp_path: Path) -> None:
    for name in ("train.py", "cli/train.py", "experiments/plan.py", "experiments/perform.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    versions = []
    for name in ("", "cli/train.py", "experiments/plan.py", "experiments/perform.py", "train.py"):
        if name:
            (tmp_path / name).write_text("two")
        code_version.cache_clear()
        versions.append(code_version("", tmp_path))
    code_version.cache_clear()
    assert versions[0] == versions[1] == versions[2] and len(set(versions[2:])) == 3
    assert code_version("tests.studying:perform") != code_version("foreword.experiments.perform:perform")


def test_the_versions_of_packages_and_the_package_of_ones_own_function_are_in_the_code_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    for name in ("__init__", "study", "helper"):
        (tmp_path / "own" / f"{name}.py").write_text("def perform(*_): return {}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code_version.cache_clear()
    before = code_version("own.study:perform")
    assert is_code(before, "own.study:perform")
    (tmp_path / "own" / "helper.py").write_text("def perform(*_): return {1: 1}\n")
    assert code_version("own.study:perform") == before and not is_code(before, "own.study:perform")
    (tmp_path / "own" / "helper.py").write_text("def perform(*_): return {}\n")
    assert is_code(before, "own.study:perform")
    monkeypatch.setattr("foreword.experiments.versions.version", lambda name: "0.0.1")
    assert not is_code(before, "own.study:perform")


def test_a_run_whose_code_changed_meanwhile_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(tmp_path)
    monkeypatch.setattr("foreword.experiments.records.is_code", lambda code, perform: False)
    assert execute(jobs[:1], InProcess()) == {"failed": 1}
    assert state_of(jobs[0].folder) == "failed" and read_result(jobs[0].folder) is None
    assert "changed during the run" in read_record(jobs[0].folder)["attempts"][0]["error"]


def test_the_name_of_a_run_wins_over_that_of_a_method() -> None:
    short, long = (
        next(iter(expand({"method": "prefix", "length": length}, file)))
        for length, file in ((5, "prefix.toml"), (9, "prefix-long.toml"))
    )
    assert select([short, long], ["prefix"]) == [short]
    assert select([long], ["prefix"]) == [long] and select([short, long], ["prefix-long"]) == [long]


def test_locks_that_a_file_system_lacks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    jobs = make_jobs(tmp_path)
    execute(jobs[:1], InProcess())
    (Path(jobs[0].folder) / "result.json").unlink()

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match="cannot be locked .*expected a file system with locks; choose another"):
        state_of(jobs[0].folder)


def test_results_of_other_code_are_found_for_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_jobs(tmp_path)
    execute(old[:2], InProcess())
    study, out = load_study(tmp_path / "study"), tmp_path / "out"
    monkeypatch.setattr("foreword.experiments.grid.code_version", lambda _: "f" * 64)
    assert [state_of(job.folder) for job in jobs_of(study, out)] == ["missing"] * 3
    found = jobs_made_with(old[0].code[:8], study, out, name="mine")
    assert [state_of(job.folder) for job in found] == ["done", "done", "missing"]
    assert [job.folder for job in found[:2]] == [job.folder for job in old[:2]]
    assert {job.code for job in found} == {old[0].code} and "study run mine" in found[0].command
    with pytest.raises(ConfigError, match=f"--code none, 0 versions in .*; expected one of {old[0].code[:8]}"):
        jobs_made_with("none", study, out)
    shutil.copytree(old[0].folder, out / "copy")
    with pytest.raises(ConfigError, match="was made with different data"):
        jobs_made_with(old[0].code, study, out)


def test_a_dirty_tree_is_recorded(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    assert git_state(package) is None
    git("init")
    (package / "a.py").write_text("one")
    assert git_state(package) is None  # in a checkout, but no part of it
    git("add", ".")
    git("commit", "-m", "one")
    clean = git_state(package)
    assert clean is not None and len(clean["commit"]) == 40 and not clean["dirty"]
    (tmp_path / "elsewhere.txt").write_text("not the code")
    assert git_state(package) == clean
    (package / "a.py").write_text("two")
    dirty = git_state(package)
    assert dirty == {"commit": clean["commit"], "dirty": True, "changed": ["package/a.py"]}


def test_a_dirty_tree_is_in_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"commit": "c" * 40, "dirty": True, "changed": ["src/foreword/train.py"]}
    monkeypatch.setattr("foreword.experiments.grid.git_state", lambda: state)
    jobs = make_jobs(tmp_path)
    execute(jobs, InProcess())
    assert all(read_record(job.folder)["git"] == state for job in jobs)


def test_ray_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from foreword.experiments.cluster import RayTasks

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"foreword\[ray\]"):
        RayTasks("local")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere", "127.0.0.1:port", "127.0.0.1:99999"]
)
def test_a_cluster_that_does_not_answer_is_named(address: str) -> None:
    from foreword.experiments.cluster import RayTasks

    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=f"--ray {address} .*; expected auto, local or HOST:PORT of a cluster"):
        RayTasks(address)


def last_json(out: str) -> dict[str, Any]:
    return json.loads(out.strip().splitlines()[-1])


def test_the_commands(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(Path("experiments/mine"), "seed = [0, 1]\n", a="method='a'", b="method='b'\nbehave='raise'")
    status, out, _ = run("study", "list", "--json")
    assert status == 0 and "low-data-small" in out and "mine" in [each["name"] for each in last_json(out)["studies"]]
    status, out, _ = run("study", "show", "mine", "--json")
    assert status == 0 and [each["name"] for each in last_json(out)["runs"]] == [
        "a,seed=0",
        "a,seed=1",
        "b,seed=0",
        "b,seed=1",
    ]
    status, out, _ = run("study", "status", "mine", "--json")
    assert status == 0 and last_json(out)["missing"] == 4
    command = next(each["command"] for each in last_json(out)["cells"] if each["name"] == "a,seed=1")
    assert f"missing  {command}" in out and not Path("runs").exists()
    status, out, err = run(*command.split()[1:], "--json")
    assert status == 0 and last_json(out)["done"] == 1 and "done    1/1 a,seed=1" in err and "bleu 41.5" in err
    status, out, err = run("study", "run", "mine", "--only", "a", "--json")
    assert status == 0 and last_json(out)["done"] == 2 and "1 of 2 runs are in runs/studies/mine; 1 to make" in err
    status, out, err = run("study", "run", "mine", "--limit", "1", "--retries", "0", "--json")
    assert status == 1 and (last_json(out)["failed"], last_json(out)["missing"]) == (1, 1)
    assert "failed  b,seed=0: RuntimeError: something broke" in err
    status, out, _ = run("study", "status", "mine", "--only", "a", "--json")
    assert status == 0 and "other code" not in out and last_json(out)["done"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nothing"], "study 'nothing'"),
        (["status", "mine", "--only", "c"], "no run 'c'"),
        (["run", "mine", "--set", "seed"], "--set seed; expected KEY=VALUE"),
        (["run", "mine", "--gpus", "1"], "--gpus without --ray"),
        (["run", "mine", "--out", "file"], "--out file is a file"),
    ],
)
def test_wrong_commands(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    write_study(Path("experiments/mine"), "seed = [0, 1]\n")
    status, _, err = run("study", *words)
    assert status == 1 and message in err and len(err.strip().splitlines()) == 1


def test_stopped_by_ctrl_c(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tests.studying

    monkeypatch.chdir(tmp_path)
    write_study(Path("experiments/mine"), "seed = [0, 1, 2]\n")
    real = tests.studying.perform

    def stopping(config: dict[str, Any], *others: Any) -> dict[str, Any]:
        if config["seed"] == 1:
            raise KeyboardInterrupt
        return real(config, *others)

    monkeypatch.setattr(tests.studying, "perform", stopping)
    status, _, err = run("study", "run", "mine")
    assert status == 130 and err.strip().splitlines()[-1] == "stopped; 1 of 3 runs are done; the same command goes on"
    monkeypatch.setattr(tests.studying, "perform", real)
    assert run("study", "run", "mine")[0] == 0


def test_listing_studies_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from foreword.experiments import list_studies, load_study\n" \
        "for name in list_studies(): load_study(name)\n" \
        "print(sorted({'torch', 'transformers', 'ray', 'numpy'} & set(sys.modules)))"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
