"""From the runs of a study to jobs: each with the address of its result and the command that makes it alone."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from foreword.errors import ConfigError
from foreword.experiments.plan import Run, Study
from foreword.experiments.records import RESULT, Job, key_of, read_record
from foreword.experiments.versions import code_version, git_state, resolve

__all__ = ["command_of", "jobs_made_with", "jobs_of", "module_of"]


def jobs_of(
    study: Study, out: str | Path, runs: Iterable[Run] | None = None, *, sets: Iterable[str] = (), name: str = ""
) -> list[Job]:
    """The jobs of the given runs (None: all) with their results in `out`; nothing is made yet.

    The module of `study.perform` may have a function `check(config)`, which raises `ConfigError` for a configuration
    that cannot be performed, and a function `data_of(config)`, which gives the hash of the data that is read. `sets`
    and `name` are how the study was called, for the commands. Raises `ConfigError` with file and run, `DataError`.
    """
    module = module_of(study)
    code, git = code_version(study.perform), git_state()
    jobs = []
    for run in study.runs if runs is None else runs:
        _check(module, study, run)
        data = module.data_of(run.config) if hasattr(module, "data_of") else ""
        folder = Path(out).resolve() / key_of(run.config, study.perform, code, data)
        command = command_of(name or study.name, out, run, sets)
        jobs.append(Job(run.name, run.config, study.perform, code, data, str(folder), command, git))
    return jobs


def jobs_made_with(
    code: str, study: Study, out: str | Path, runs: Iterable[Run] | None = None, *, sets: Iterable[str] = (),
    name: str = "",
) -> list[Job]:  # fmt: skip
    """The same for results in `out` that other code has made, a version of it or its beginning.

    For a report of results that are older than a change of Foreword; what is missing cannot be made with it. Raises
    `ConfigError` unless exactly one version begins so, and for a run that was made with different data.
    """
    version, records = _records_of(Path(out).resolve(), code)
    jobs = []
    for run in study.runs if runs is None else runs:
        made = [each for each in records if each[1]["perform"] == study.perform and each[1]["config"] == run.config]
        if len(made) > 1:
            raise ConfigError(f"{run.name} was made with different data in {out}", "one", "choose another --out")
        missing: tuple[Path, dict[str, Any]] = (
            Path(out).resolve() / key_of(run.config, study.perform, version, ""), {"data": "", "git": None}
        )  # fmt: skip
        folder, record = made[0] if made else missing
        command = command_of(name or study.name, out, run, sets)
        data, git = record["data"], record["git"]
        jobs.append(Job(run.name, run.config, study.perform, version, data, str(folder), command, git))
    return jobs


def _records_of(out: Path, code: str) -> tuple[str, list[tuple[Path, dict[str, Any]]]]:
    """The one code version that begins so, and the folders with its results."""
    records = [(path.parent, read_record(path.parent)) for path in sorted(out.glob(f"*/{RESULT}"))]
    versions = sorted({str(record["code"]) for _, record in records})
    chosen = [version for version in versions if version.startswith(code)]
    if len(chosen) != 1:
        listed = ", ".join(version[:8] for version in versions) or "none"
        raise ConfigError(f"--code {code}, {len(chosen)} versions in {out}", f"one of {listed}", "name one")
    return chosen[0], [(folder, record) for folder, record in records if record["code"] == chosen[0]]


def module_of(study: Study) -> ModuleType:
    """The module of the function that performs the runs; `ConfigError` if there is none."""
    return sys.modules[resolve(study.perform).__module__]


def command_of(name: str, out: str | Path, run: Run, sets: Iterable[str] = ()) -> str:
    """What to type to make one run alone.

    >>> command_of("lengths", "runs/lengths", Run("prefix,length=5", {}, "prefix.toml"), ["base=minilm"])
    'foreword study run lengths --out runs/lengths --set base=minilm --only prefix,length=5'
    """
    words = ["foreword", "study", "run", name, "--out", str(out)]
    for each in sets:
        words += ["--set", each]
    return shlex.join([*words, "--only", run.name])


def _check(module: ModuleType, study: Study, run: Run) -> None:
    check: Any = getattr(module, "check", None)
    if check is None:
        return
    try:
        check(run.config)
    except ConfigError as error:
        raise ConfigError(f"{study.folder / run.file}: {error.got}", error.expected, error.action) from None
