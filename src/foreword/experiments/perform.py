"""What one run of a study does: draw the rows, tune and fit a method, write or predict for the test rows, score.

The configuration is flat. These keys say what is compared on what; all others are options of the method, as
`foreword.methods.MethodConfig` explains them:

    method            one of `foreword.methods.METHODS`
    base, dtype       the base model and its precision
    task, task_*      the task and its options: task_transfer = "within-news" is its option `transfer`
    instruction       what the task asks for, in other words than the task's own
    rows, fraction    so many training rows, with 0.3 times as many for dev, or a share of them; else all
    rows_per_label    so many training rows of each label, and as many for dev
    sample, seed      seeds of the drawn rows and of training
    dev_limit         so many of the dev rows, always the same ones (0: all)
    tuning            so many candidates of the method's search space, the best by dev loss; 0: its defaults
    tests             tasks whose test rows are read, such as "webnlg-seen webnlg-unseen"; "": the task's own
    test_limit        so many of the test rows, always the same ones (0: all)
    metrics           names of metrics or of sets of them, separated by spaces; "": the task's own
    beams, test_batch_size

Labels are predicted, all else is written. Test rows that are too long for the base model once a method adds its tokens
are left out and counted: the same ones of all runs whose methods add at most `_ROOM` tokens. Nothing else of
`foreword.experiments` is read here: this file is part of the code version of a result.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foreword.errors import ConfigError, DataError, RunError
from foreword.metrics import check_metrics
from foreword.storage import file_sha256, write_atomic
from foreword.tasks import AnyExample, Example, Labelled, Split, Tagged, Task, draw_rows, drawn, get_task

if TYPE_CHECKING:
    from foreword.base import BaseModel
    from foreword.methods import Fitted, MethodConfig

__all__ = ["PROTOCOL", "TEXTS", "check", "data_of", "perform"]

Progress = Callable[[str, int, int], None]

TEXTS = "texts.jsonl"  # beside the result: one line for each test row
PROTOCOL: dict[str, Any] = {
    "method": "", "base": "smollm2-135m", "dtype": "auto", "task": "", "instruction": "", "rows": 0, "fraction": 1.0,
    "rows_per_label": 0, "sample": 0, "seed": 0, "dev_limit": 0, "tuning": 0, "tests": "", "test_limit": 0,
    "metrics": "", "beams": 1, "test_batch_size": 20,
}  # fmt: skip
_TASK_OPTION = "task_"
_ROOM = 64  # tokens that each test row leaves for what methods read with a prompt, whatever this run's method reads
_NO_TOKENS = ("prefix", "ptuning2", "apt")  # methods whose `length` takes no room from the context
_AT_LEAST = {"beams": 1, "test_batch_size": 1}
_BASES = ("decoder", "encoder-decoder", "encoder")
_BASES_FOR = {"generation": _BASES[:2], "tagging": _BASES[2:]}  # kinds of base models that do a kind of task


def check(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a configuration that cannot be performed; nothing is loaded or read.

    >>> check({"method": "prefix", "task": "e2e", "rows": "many"})
    Traceback (most recent call last):
    foreword.errors.ConfigError: rows = 'many'; expected a whole number of at least 0; correct rows
    """
    for key, default in PROTOCOL.items():
        _check_value(key, config.get(key, default), default)
    protocol, tasks = _protocol(config), _tasks(config)
    if not 0 < protocol["fraction"] <= 1 or (protocol["rows"] and protocol["fraction"] != 1):
        raise ConfigError(f"fraction = {protocol['fraction']}", "above 0 and at most 1, without rows", "correct it")
    if protocol["rows_per_label"] and (protocol["rows"] or protocol["fraction"] != 1):
        raise ConfigError("rows_per_label with rows or fraction", "one way of drawing rows", "leave the others out")
    own = tasks[""]
    _source(own, protocol)
    if own.kind != "generation" and protocol["beams"] > 1:
        raise ConfigError(f"beams = {protocol['beams']} for task {own.name!r}", "1: labels are predicted", "correct it")
    for task in tasks.values():
        if protocol["tests"] and (task.kind, tuple(task.labels)) != (own.kind, tuple(own.labels)):
            raise ConfigError(
                f"tests = {task.name!r} ({task.kind}) for task {own.name!r} ({own.kind})", "the same kind and labels",
                "choose another test",
            )  # fmt: skip
        _metrics(protocol, task)
    _check_base(protocol["base"], own, _candidates(config))


def _check_base(base: str, task: Task, candidates: Sequence[MethodConfig]) -> None:
    """Raise `ConfigError` for a task or a method that the base model, as far as it is known, is not for."""
    from foreword.methods import misfit
    from foreword.packaged import packaged_models

    packaged = packaged_models().get(base)
    known = _BASES if packaged is None else (packaged.kind,)
    kinds = [kind for kind in known if kind in _BASES_FOR.get(task.kind, _BASES)]
    if not kinds:
        expected = f"a base model that is {' or '.join(_BASES_FOR[task.kind])}"
        raise ConfigError(f"task = {task.name!r} ({task.kind}) on {base!r} ({known[0]})", expected, "correct base")
    for candidate in candidates:
        strange, expected = misfit(candidate, kinds)
        if strange:
            raise ConfigError(f"{strange} for task {task.name!r} on {base!r}", expected, "choose another")


def data_of(config: Mapping[str, Any]) -> str:
    """The hash of the rows that a run draws from and is tested on, and of a base model that is a folder here.

    Raises `DataError` where they are not to be had.
    """
    protocol = _protocol(config)
    own, tests = _names(config)
    limits = {"train": 0, "dev": protocol["dev_limit"], "test": protocol["test_limit"]}
    wanted = [(own, "train")] + ([] if protocol["rows"] else [(own, "dev")]) + [(test, "test") for test in tests]
    options = json.dumps(_task_options(config), sort_keys=True)
    found = [_split_hash(name, options, split, limits[split]) for name, split in wanted]
    return hashlib.sha256("\n".join([*found, _files_hash(protocol["base"])]).encode()).hexdigest()


def perform(config: dict[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Make one run; scores by test and metric with 95 % intervals, sizes and times. The texts go into `folder`.

    `train_seconds` are those of the fit that was chosen, `tuning_seconds` those of all candidates. Where a head
    predicts labels, nats are per label, as `unit` says. Raises what `foreword.methods.fit_each` and the metrics raise.
    """
    import torch

    from foreword.methods import fit_each
    from foreword.runs import peak_memory_bytes

    protocol = _protocol(config)
    tasks = _tasks(config)
    base = _base(protocol["base"], protocol["dtype"])
    task = tasks[""]
    source = _source(task, protocol)
    train = source.split("train")
    dev = draw_rows(source.split("dev"), protocol["dev_limit"])
    candidates = _candidates(config)
    added = _added(base, candidates, protocol["instruction"] or task.instruction)
    tests = [_test(base, name, each, protocol, added) for name, each in tasks.items() if name]
    for test in tests:  # what would stop the scoring, such as a missing package, stops the run at once
        check_metrics(test.metrics, test.task)
    start = time.perf_counter()
    fits = fit_each(base, train, dev, candidates, task=task, instruction=protocol["instruction"], progress=progress)
    fitted, tried = _choose(candidates, fits)
    tuning_seconds = time.perf_counter() - start
    answer = _write if task.kind == "generation" else _predict
    outputs, answering = answer(fitted, tests, protocol, progress)
    _keep(tests, outputs, folder)
    return {
        **_score(fitted, tests, outputs, protocol),
        **answering,
        "unit": "label" if fitted.head is not None else "token",
        "dev_nats_per_token": fitted.metrics["dev_loss"],
        "parameters": fitted.parameters,
        "num_bytes": fitted.num_bytes,
        "train_seconds": fitted.metrics["train_seconds"],
        "tuning_seconds": tuning_seconds,
        "chosen": fitted.config.to_dict(),
        "candidates": tried,
        "fit": fitted.metrics,
        "data": {"train": train.sha256, "dev": dev.sha256},
        "rows": {"train": len(train), "dev": len(dev)},
        "base_fingerprint": base.fingerprint,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "process_peak_memory_bytes": peak_memory_bytes(base.device),  # former runs of the process included
    }


def _choose(
    candidates: Sequence[MethodConfig], found: Iterable[Fitted | RunError]
) -> tuple[Fitted, list[dict[str, Any]]]:
    """The fit with the lowest dev loss, the first of equals, the only one kept; and what each candidate came to.

    Raises `RunError` if the loss of none was finite.
    """
    best: Fitted | None = None
    tried = []
    for candidate, each in zip(candidates, found, strict=True):
        tried.append(_told(candidate, each))
        if isinstance(each, RunError):
            error = each
        elif best is None or each.metrics["dev_loss"] < best.metrics["dev_loss"]:
            best = each
    if best is None:
        raise error
    return best, tried


def _told(candidate: MethodConfig, found: Fitted | RunError) -> dict[str, Any]:
    """What a candidate came to."""
    if isinstance(found, RunError):
        return {"config": candidate.to_dict(), "error": str(found)}
    metrics = found.metrics
    return {
        "config": candidate.to_dict(), "dev_nats_per_token": metrics["dev_loss"], "seconds": metrics["train_seconds"],
    }  # fmt: skip


class _Test(NamedTuple):
    """A task whose test rows are read: those that every method can answer, and how many others there are.

    `asked` are the rows as what is written or predicted for them is held against them: prompts and right answers.
    """

    name: str
    task: Task
    rows: Split
    skipped: int
    metrics: tuple[str, ...]
    asked: list[Example]


def _added(base: BaseModel, candidates: Sequence[MethodConfig], instruction: str) -> Callable[[str], int]:
    """How many tokens one of the candidates at most reads with a prompt, virtual ones or an instruction.

    Solved examples are written as far as there is room. For fewer than `_ROOM` it is that many.
    """
    from foreword.methods.prompting import Prompting

    virtual = [each.options.get("length", 0) for each in candidates if each.method not in _NO_TOKENS]
    templates = {each.options.get("template", "none"): each for each in candidates}
    writers = [Prompting(base, each, [], instruction) for name, each in templates.items() if name != "none"]

    def added(prompt: str) -> int:
        tokens = [len(base.encode_prompt(text)) for text in (prompt, *(each.write(prompt) for each in writers))]
        return max(_ROOM, *virtual, max(tokens) - tokens[0])

    return added


def _test(base: BaseModel, name: str, task: Task, protocol: Mapping[str, Any], added: Callable[[str], int]) -> _Test:
    """The rows that leave room for what a method adds. Raises `DataError` if there is none."""
    split = draw_rows(task.split("test"), protocol["test_limit"])
    kept = (_writable if task.kind == "generation" else _labelable)(base, task, split, added)
    if not kept:
        least = min(added(example.prompt) for example in split.examples)
        raise DataError(
            f"no test row of {task.name!r} leaves {least} of the {base.max_tokens} tokens of {base.name!r}",
            "shorter rows", "choose another base model",
        )  # fmt: skip
    rows = replace(split, examples=kept, sha256="")
    asked = [_asked(example) for example in kept]
    return _Test(name, task, rows, len(split) - len(kept), _metrics(protocol, task), asked)


def _writable(base: BaseModel, task: Task, split: Split, added: Callable[[str], int]) -> list[Example]:
    """The rows with room for as many tokens as the task allows, and those that are added."""
    limit, joint = base.max_tokens, base.family.kind == "decoder"
    kept = []
    for example in split.examples:
        prompt, completion = (len(ids) for ids in base.encode(example.prompt, example.completion))
        written = max(completion, task.max_new_tokens)
        longest = prompt + written if joint else max(prompt, written)
        if limit is None or longest + added(example.prompt) <= limit:
            kept.append(example)
    return kept


def _labelable(base: BaseModel, task: Task, split: Split, added: Callable[[str], int]) -> list[Labelled | Tagged]:
    """The rows with room for the longest of their candidates, and for what is added; an encoder cuts long ones."""
    from foreword.objectives import objective_of

    rows = objective_of(base, task).encode(split)
    limit = None if base.family.kind == "encoder" else base.max_tokens
    pairs = zip(rows.examples, rows.lengths, strict=True)
    return [example for example, length in pairs if limit is None or length + added(example.prompt) <= limit]


def _asked(example: AnyExample) -> Example:
    """A row with its right answer as a text: a label, or tags joined by spaces."""
    if isinstance(example, Labelled):
        return Example(example.id, example.prompt, example.label, (example.label,), example.row)
    if isinstance(example, Tagged):
        tags = " ".join(example.tags)
        return Example(example.id, " ".join(example.words), tags, (tags,), example.row)
    return example


def _write(
    fitted: Fitted, tests: Sequence[_Test], protocol: Mapping[str, Any], progress: Progress
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The texts for each test, and what they took; a prompt of several tests is written once."""
    known: dict[str, str] = {}
    seconds = 0.0
    for name, task, rows, *_ in tests:
        prompts = [prompt for prompt in dict.fromkeys(each.prompt for each in rows) if prompt not in known]
        if not prompts:
            continue
        start = time.perf_counter()
        texts = fitted.generate(
            prompts, max_new_tokens=task.max_new_tokens, stop=list(task.stop), num_beams=protocol["beams"],
            batch_size=protocol["test_batch_size"], progress=functools.partial(progress, f"writing {name}"),
        )  # fmt: skip
        seconds += time.perf_counter() - start
        known.update(zip(prompts, (text.strip() for text in texts), strict=True))
    outputs = {test.name: [known[example.prompt] for example in test.rows] for test in tests}
    tokens = sum(len(fitted.base.encode("", text)[1]) for text in known.values())
    return outputs, {"inference_seconds": seconds, "inference_rows": len(known), "inference_tokens": tokens}


def _predict(
    fitted: Fitted, tests: Sequence[_Test], protocol: Mapping[str, Any], progress: Progress
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The labels for each test, and what they took."""
    outputs, start = {}, time.perf_counter()
    for test in tests:
        outputs[test.name] = fitted.predict(
            test.rows.examples, batch_size=protocol["test_batch_size"],
            progress=functools.partial(progress, f"predicting {test.name}"),
        )  # fmt: skip
    seconds = time.perf_counter() - start
    rows = sum(len(labels) for labels in outputs.values())
    return outputs, {"inference_seconds": seconds, "inference_rows": rows, "inference_tokens": 0}


def _keep(tests: Sequence[_Test], outputs: Mapping[str, list[str]], folder: Path) -> None:
    """The texts, one line for each test row, before anything is scored."""
    lines = [
        {"test": test.name, "id": row.id, "prompt": row.prompt, "text": text, "references": row.references}
        for test in tests
        for row, text in zip(test.asked, outputs[test.name], strict=True)
    ]
    write_atomic(folder / TEXTS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _score(
    fitted: Fitted, tests: Sequence[_Test], outputs: Mapping[str, list[str]], protocol: Mapping[str, Any]
) -> dict[str, Any]:
    """The metrics of the texts or labels by test, and what the right ones cost."""
    from foreword.evaluate import score_outputs

    scores, costs = {}, {}
    for test in tests:
        found = score_outputs(test.metrics, outputs[test.name], test.asked)
        scores[test.name] = {metric: score._asdict() for metric, score in found.items()}
        costs[test.name] = fitted.score(test.rows.examples, batch_size=protocol["test_batch_size"])
    return {
        "scores": scores, "nats_per_token": costs, "test_rows": {test.name: len(test.rows) for test in tests},
        "skipped_test_rows": {test.name: test.skipped for test in tests},
    }  # fmt: skip


def _metrics(protocol: Mapping[str, Any], task: Task) -> tuple[str, ...]:
    return check_metrics(protocol["metrics"].split() or task.metrics, task, ready=False)


def _source(task: Task, protocol: Mapping[str, Any]) -> Task:
    """The task with the rows that a run draws."""
    ways = {"shots": protocol["rows_per_label"], "rows": protocol["rows"], "fraction": protocol["fraction"]}
    return drawn(task, {**ways, "sample_seed": protocol["sample"]})


@functools.lru_cache(maxsize=1)
def _base(name: str, dtype: str) -> BaseModel:
    """The base model; a process that makes several runs keeps it."""
    from foreword.base import BaseModel

    return BaseModel.load(name, dtype=dtype, progress=lambda *_: None)  # no bars but those of the study


def _candidates(config: Mapping[str, Any]) -> list[MethodConfig]:
    """What is tried: the method's defaults, or the first candidates of its search space."""
    from foreword.methods import SEARCH_SIZE, MethodConfig, search_space

    protocol = _protocol(config)
    own = {key: value for key, value in config.items() if key not in PROTOCOL and not key.startswith(_TASK_OPTION)}
    shared = {**own, "seed": protocol["seed"]}
    if not protocol["tuning"]:
        return [MethodConfig.of(protocol["method"], **shared)]
    if protocol["tuning"] > SEARCH_SIZE:
        raise ConfigError(f"tuning = {protocol['tuning']}", f"at most {SEARCH_SIZE} candidates", "correct tuning")
    return search_space(protocol["method"], **shared)[: protocol["tuning"]]


def _protocol(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config.get(key, default) for key, default in PROTOCOL.items()}


def _check_value(key: str, value: Any, default: Any) -> None:
    """Raise unless a value is of the kind of its default; a number may not be below 0, or what it needs at least."""
    least = _AT_LEAST.get(key, 0)
    if isinstance(default, str):
        right, expected = isinstance(value, str), "a text"
    elif isinstance(default, float):
        right, expected = type(value) in (int, float), "a number"
    else:
        right, expected = type(value) is int and value >= least, f"a whole number of at least {least}"
    if not right:
        raise ConfigError(f"{key} = {value!r}", expected, f"correct {key}")
    if key in ("method", "task") and not value:
        raise ConfigError(f"no {key}", f"the name of a {key}", f"add {key} = ...")


def _task_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(_TASK_OPTION): config[key] for key in config if key.startswith(_TASK_OPTION)}


def _names(config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The task that is trained on, and those whose test rows are read."""
    protocol = _protocol(config)
    return protocol["task"], protocol["tests"].split() or [protocol["task"]]


def _tasks(config: Mapping[str, Any]) -> dict[str, Task]:
    """The task that is trained on under "", and those that are tested by their names; `test` where it is the same."""
    own, tests = _names(config)
    options = _task_options(config)
    named = {name: get_task(name, **options) for name in tests}
    return {"": get_task(own, **options), **(named if config.get("tests") else {"test": named[own]})}


@functools.lru_cache(maxsize=16)
def _files_hash(base: str) -> str:
    """Of a folder's files; "" for a model of another name, which the fingerprint of its weights tells apart later."""
    if not Path(base).is_dir():
        return ""
    files = sorted(path for path in Path(base).iterdir() if path.is_file())
    return hashlib.sha256("\n".join(f"{path.name} {file_sha256(path)}" for path in files).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _split_hash(task: str, options: str, split: str, limit: int) -> str:
    return draw_rows(get_task(task, **json.loads(options)).split(split), limit).sha256
