"""What a study is: a folder of TOML files, and the runs that these stand for.

    experiments/STUDY/defaults.toml    what all runs have in common, and a table [study] that describes it
    experiments/STUDY/prefix.toml      what is different: a value, or a list of values to be tried one after the other

Every file but the defaults gives one run for each combination of its lists and those of the defaults that it does not
override. A run is a flat table of plain values; what they mean is said by the function that performs it.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from foreword.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["DEFAULTS", "PERFORM", "Run", "Study", "Value", "expand", "list_studies", "load_study", "select", "settings"]

Value: TypeAlias = str | int | float | bool

DEFAULTS = "defaults.toml"
PERFORM = "foreword.experiments.perform:perform"
_BUILT_IN = Path(__file__).with_name("studies")
_OWN = Path("experiments")  # in the folder that one works in
_HEAD = "study"
_SAID = {"description": "", "perform": PERFORM}


@dataclass(frozen=True)
class Run:
    """One cell of a study: its name, its configuration, and the file that it comes from.

    >>> run = Run("prefix,rows=50", {"method": "prefix", "rows": 50}, "prefix.toml")
    >>> run.config["rows"]
    50
    """

    name: str
    config: dict[str, Value]
    file: str


@dataclass(frozen=True)
class Study:
    """A study with its runs, in the order of the files' names; `perform` is "module:function" that makes a run."""

    name: str
    folder: Path
    description: str
    perform: str
    defaults: dict[str, Value | list[Value]]
    runs: tuple[Run, ...]


def list_studies(own: str | Path = _OWN) -> dict[str, Path]:
    """The folders of all studies by name: those in `own`, and the built-in ones that have no namesake there.

    >>> "low-data-small" in list_studies()
    True
    """
    found = {}
    for place in (_BUILT_IN, Path(own)):
        found.update({path.parent.name: path.parent for path in sorted(place.glob(f"*/{DEFAULTS}"))})
    return dict(sorted(found.items()))


def load_study(
    name: str | Path, overrides: Mapping[str, Value | list[Value]] | None = None, own: str | Path = _OWN
) -> Study:
    """The study of that name, or in that folder; `overrides` win over all of its files.

    Raises `ConfigError` with the file and the key: for what is no TOML, no plain value, or the same run twice.

    >>> study = load_study("low-data-small", {"rows": 50})
    >>> sorted({run.config["rows"] for run in study.runs})
    [50]
    """
    folder = _folder(name, own)
    head, defaults = _defaults(folder / DEFAULTS)
    files = sorted(path for path in folder.glob("*.toml") if path.name != DEFAULTS)
    differences = {path.name: _values(path, _read(path)) for path in files} or {DEFAULTS: {}}
    given = {key: _plain("--set", key, value) for key, value in (overrides or {}).items()}
    runs = [
        run for file, values in differences.items() for run in expand({**defaults, **values, **given}, file, folder)
    ]
    _check_different(runs, folder)
    return Study(folder.resolve().name, folder, defaults=defaults, runs=tuple(runs), **head)


def expand(values: Mapping[str, Value | list[Value]], file: str, folder: Path = Path()) -> Iterator[Run]:
    """The runs of one file: every combination of its lists, the last list changing fastest.

    >>> [run.name for run in expand({"rows": [50, 100], "method": "lora", "seed": [0, 1]}, "lora.toml")]
    ['lora,rows=50,seed=0', 'lora,rows=50,seed=1', 'lora,rows=100,seed=0', 'lora,rows=100,seed=1']
    """
    lists = {key: value for key, value in values.items() if isinstance(value, list)}
    for key, value in lists.items():
        if len(set(map(_text, value))) < len(value):
            raise ConfigError(f"{folder / file}: {key} has a value twice", "different values", "remove one of them")
    for chosen in itertools.product(*lists.values()):
        axes = dict(zip(lists, chosen, strict=True))
        name = ",".join([Path(file).stem, *(f"{key}={_shown(value)}" for key, value in axes.items())])
        plain = {key: value for key, value in values.items() if not isinstance(value, list)}
        yield Run(name, {**plain, **axes}, file)


def select(runs: Iterable[Run], only: Iterable[str] = ()) -> list[Run]:
    """The runs whose name is in `only`, or whose method or file is where no run has that name; all if it is empty.

    Raises `ConfigError` for a word that fits none.

    >>> runs = list(expand({"rows": [50, 100], "method": "lora"}, "lora-8.toml"))
    >>> [run.name for run in select(runs, ["lora-8,rows=50"])], len(select(runs, ["lora"]))
    (['lora-8,rows=50'], 2)
    """
    runs, wanted = list(runs), list(only)
    names = {run.name for run in runs}
    words = [{run.name} | ({str(run.config.get("method", "")), Path(run.file).stem} - names) for run in runs]
    for word in wanted:
        if not any(word in each for each in words):
            methods = dict.fromkeys(str(run.config.get("method", Path(run.file).stem)) for run in runs)
            raise ConfigError(f"no run {word!r}", f"the name of a run, or one of {', '.join(methods)}", "correct it")
    return [run for run, each in zip(runs, words, strict=True) if not wanted or each & set(wanted)]


def settings(words: Iterable[str]) -> dict[str, Value | list[Value]]:
    """KEY=VALUE as it is typed: a TOML value, else a text.

    >>> settings(["rows=[50, 100]", "base=minilm", "test_limit=20"])
    {'rows': [50, 100], 'base': 'minilm', 'test_limit': 20}
    """
    found: dict[str, Value | list[Value]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {word}", "KEY=VALUE", "write it so")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        found[key] = _plain("--set", key, value)
    return found


def _folder(name: str | Path, own: str | Path) -> Path:
    """The folder of a study that is named or given as a folder."""
    if (Path(name) / DEFAULTS).is_file():
        return Path(name)
    if Path(name).is_dir() and len(Path(name).parts) > 1:
        raise ConfigError(f"{name} has no {DEFAULTS}", "a folder with one", "write it, or name another folder")
    known = list_studies(own)
    if str(name) not in known:
        raise ConfigError(f"study {str(name)!r}", f"a folder with {DEFAULTS}, or {', '.join(known)}", "name one")
    return known[str(name)]


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror})", "a TOML file", "check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML ({error})", "lines such as rows = [50, 100]", "correct it") from None


def _defaults(path: Path) -> tuple[dict[str, str], dict[str, Value | list[Value]]]:
    """What the table [study] says, and the values."""
    values = _read(path)
    head = values.pop(_HEAD, {})
    if not isinstance(head, dict):
        raise ConfigError(f"{path}: {_HEAD} is no table", f"a table [{_HEAD}]", "correct it")
    for key, value in head.items():
        if key not in _SAID or not isinstance(value, str):
            raise ConfigError(f"{path}: {_HEAD}.{key} = {value!r}", f"texts for {' and '.join(_SAID)}", "correct it")
    return {**_SAID, **head}, _values(path, values)


def _values(path: Path, values: Mapping[str, Any]) -> dict[str, Value | list[Value]]:
    return {key: _plain(path, key, value) for key, value in values.items()}


def _plain(place: str | Path, key: str, value: Any) -> Value | list[Value]:
    """The value, if it is a plain one or a list of such."""
    if isinstance(value, list) and value:
        return [_one(place, key, each) for each in value]
    return _one(place, key, value)


def _one(place: str | Path, key: str, value: Any) -> Value:
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(
            f"{place}: {key} = {value!r}", "a text, a finite number, true or false, or a list of such", f"correct {key}"
        )
    return value


def _check_different(runs: Iterable[Run], folder: Path) -> None:
    """No two runs with the same configuration, and none with the same name."""
    known: dict[str, Run] = {}
    for run in runs:
        for mark in (_text(run.config), run.name):
            if mark in known:
                raise ConfigError(
                    f"{folder / run.file}: run {run.name} is the same as {known[mark].name} of {known[mark].file}",
                    "different runs",
                    "change a value in one of the files",
                )
            known[mark] = run


def _text(value: Any) -> str:
    """A value as text that tells 1, 1.0, true and "1" apart, whatever the order of keys."""
    return json.dumps(value, sort_keys=True)


def _shown(value: Value) -> str:
    """A value in the name of a run: without what a shell would read."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._-+:" else "-" for letter in text)
