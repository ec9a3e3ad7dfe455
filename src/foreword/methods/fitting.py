"""How each method is fitted: once with `fit`, with several configurations to choose from with `fit_each`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foreword.base import BaseModel
from foreword.begin import begin_objective
from foreword.config import TrainConfig
from foreword.data import Rows
from foreword.errors import ConfigError, RunError, UnsupportedModel
from foreword.methods.adapters import AdapterTuning
from foreword.methods.config import MethodConfig, misfit
from foreword.methods.fitted import Fitted, FittedPrefix, FittedPrompting, FittedTuning
from foreword.methods.loop import Progress, encoded, measure, train_weights
from foreword.methods.prompting import Prompting
from foreword.methods.through_peft import LoraTuning, p_tuning, prompt_tuning
from foreword.methods.triggers import TriggerSearch, TriggerTuning
from foreword.methods.tuning import Tuning
from foreword.methods.virtual import Vectors, VirtualTokens, start_vectors
from foreword.methods.weights import WeightTuning, all_weights, top_weights
from foreword.objectives import Objective, objective_of
from foreword.tasks import Example, Labelled, Split, Tagged, Task
from foreword.together import SomeFailed, train_together
from foreword.train import TrainResult
from foreword.train import train as train_prefix

__all__ = ["fit", "fit_each"]


@dataclass
class _Task:
    """The task of a fit: its rows, and what they are rows of."""

    train: Split
    dev: Split
    instruction: str
    name: str = "fit"
    kind: str = "generation"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("bleu",)
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    reading: dict[str, Any] | None = None

    @classmethod
    def of(cls, train: Split, dev: Split, instruction: str, task: Task | None) -> _Task:
        """These rows of a task; None: prompts with completions."""
        if task is None:
            return cls(train, dev, instruction)
        return cls(
            train, dev, instruction or task.instruction, task.name, task.kind, tuple(task.labels), task.metrics,
            task.max_new_tokens, task.stop, getattr(task, "reading", None),
        )  # fmt: skip

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:  # noqa: ARG002
        return {"train": self.train, "dev": self.dev}[name]


@dataclass(frozen=True)
class _Given:
    """A fit: its base model, task and configuration."""

    base: BaseModel
    task: _Task
    config: MethodConfig
    progress: Progress | None

    def objective(self, view: BaseModel | None = None) -> Objective:
        """What the task asks of the base model, or of a view of it, as training of a prefix asks it."""
        return begin_objective(view or self.base, None, self.task, self.config.training())

    def prompting(self, shots: Sequence[Any] = ()) -> Prompting:
        """How prompts are written, with shots drawn from these examples."""
        return Prompting(self.base, self.config, shots, self.task.instruction, self.task.labels)


def fit(
    base: BaseModel,
    train: Split,
    dev: Split,
    config: MethodConfig,
    *,
    task: Task | None = None,
    instruction: str = "",
    progress: Progress | None = None,
) -> Fitted:
    """Fit a method to the examples of `train`; of what training passes through, the best on `dev` is kept.

    All methods get the same rows in the same batches and lower the same loss: nats per token of the completion or of
    the label's words, on an encoder nats per label of a head that is trained beside. Left out are rows that are too
    long for the context, with what a method writes around them. `task` says what the rows are of (None: prompts with
    completions), `instruction` what it asks for, in other words than its own: prompts are written with it, and prefixes
    and virtual tokens start from it. `progress` gets (stage, done, total). The base model is left as it was, bit for
    bit.

    Raises `ConfigError`, `DataError` (no usable rows), `UnsupportedModel` (a method or a task that the base model is
    not for, or a model whose layers are not known), `MissingPackage` (LoRA, prompt tuning and P-tuning need
    `foreword[peft]`), `RunError` (the loss is not finite).

    >>> from foreword.methods import MethodConfig, fit
    >>> base = BaseModel.load("smollm2-135m")  # doctest: +SKIP
    >>> fitted = fit(base, train, dev, MethodConfig.of("lora", rank=4, epochs=5))  # doctest: +SKIP
    >>> fitted.generate(["name : Aromi | eatType : pub\\n"], max_new_tokens=40)  # doctest: +SKIP
    """
    [found] = fit_each(base, train, dev, [config], task=task, instruction=instruction, progress=progress)
    if isinstance(found, RunError):
        raise found
    return found


def fit_each(
    base: BaseModel,
    train: Split,
    dev: Split,
    configs: Sequence[MethodConfig],
    *,
    task: Task | None = None,
    instruction: str = "",
    progress: Progress | None = None,
) -> Iterator[Fitted | RunError]:
    """Candidates to choose from: what `fit` gives for each of `configs`, or the `RunError` of one whose loss diverged.

    Prefixes train together, in one batch over the one base (`foreword.train_together`), with the results that they get
    alone but rounding; the others are fitted one after the other. Raises what else `fit` raises.
    """
    own = _Task.of(train, dev, instruction, task)
    _check(base, own, configs)
    count = len(configs)
    several = count > 1
    if several and all(config.method in _PREFIXES for config in configs):
        yield from _fit_prefixes([_Given(base, own, config, progress) for config in configs])
        return
    for number, config in enumerate(configs, start=1):
        told = _named(progress, f"candidate {number} of {count}: ") if several and progress else progress
        try:
            found: Fitted | RunError = _fit_one(_Given(base, own, config, told))
        except RunError as error:
            found = error
        yield found


_ROWS = {"generation": Example, "classification": Labelled, "choice": Labelled, "tagging": Tagged}


def _check(base: BaseModel, task: _Task, configs: Sequence[MethodConfig]) -> None:
    """Raise what `fit` says for rows, a task or methods that do not go with each other or with the base model."""
    for split in (task.train, task.dev):
        strange = next((example for example in split.examples if not isinstance(example, _ROWS[task.kind])), None)
        if strange is not None:
            raise ConfigError(
                f"{type(strange).__name__} rows in {split.name}", f"{_ROWS[task.kind].__name__}, of a {task.kind} task",
                "pass the task that they are of",
            )  # fmt: skip
    objective_of(base, task)
    for config in configs:
        strange, expected = misfit(config, [base.family.kind])
        if strange:
            raise UnsupportedModel(f"{strange} on {base.name!r} ({base.family.kind})", expected, "choose another")
    base.fingerprint  # noqa: B018 - taken once, of the weights as they are before any method changes them


def _fit_one(given: _Given) -> Fitted:
    """One fit by itself; its seconds are those of all that it does, whatever the method."""
    start = time.perf_counter()
    fitted = _fit(given)
    fitted.metrics["train_seconds"] = time.perf_counter() - start
    return fitted


def _fit(given: _Given) -> Fitted:
    method = given.config.method
    if method in _PREFIXES:
        return _fit_prefix(given)
    if method in ("zero_shot", "few_shot"):
        return _fit_prompting(given)
    if method == "autoprompt":
        return _fit_triggers(given)
    return _fit_tuning(given, _TUNINGS[method](given))


def _named(progress: Progress, which: str) -> Progress:
    return lambda stage, done, total: progress(which + stage, done, total)


def _fit_tuning(given: _Given, tuning: Tuning) -> Fitted:
    """Train what a tuning has to train, and a head where the task has one, in the shared loop."""
    prompting = given.prompting() if given.config.options.get("template", "none") != "none" else None
    write = None if prompting is None else prompting.fit_example
    plain = given.objective().encode(given.task.train)
    with tuning.applied() as view:
        objective = given.objective(view)
        rows, lengths = encoded(objective, plain, write)
        dev = objective.encode(_written(given.task.dev, prompting))
        metrics = train_weights(
            objective, tuning.parameters(), rows, dev, given.config.training(),
            lengths=lengths, progress=given.progress,
        )  # fmt: skip
        tuning.finish()
    head = None if objective.head is None else objective.head.fold()
    metrics |= _counts(rows, dev)
    return FittedTuning(given.base, given.task, given.config, metrics, tuning, prompting, head)


def _written(split: Split, prompting: Prompting | None) -> Split:
    """The split with its prompts as the model reads them."""
    if prompting is None:
        return split
    return replace(split, examples=[prompting.fit_example(example) for example in split.examples])


def _counts(train: Rows, dev: Rows) -> dict[str, int]:
    return {"train_rows": len(train), "dev_rows": len(dev), "skipped_rows": len(train.skipped) + len(dev.skipped)}


def _virtual(place: str) -> Callable[[_Given], Tuning]:
    def make(given: _Given) -> Tuning:
        options, config = given.config.options, given.config
        length = options["length"]
        first = start_vectors(given.base, length, options["init"], given.task.instruction, config.seed)
        return VirtualTokens(given.base, Vectors(first), length, place, options.get("deep", False))

    return make


_TUNINGS: dict[str, Callable[[_Given], Tuning]] = {
    "full": lambda given: WeightTuning(given.base, all_weights(given.base)),
    "top2": lambda given: WeightTuning(given.base, top_weights(given.base, given.config.options["layers"])),
    "adapter": lambda given: AdapterTuning(given.base, given.config.options["share"], given.config.seed),
    "lora": lambda given: LoraTuning(given.base, given.config),
    "head": lambda given: WeightTuning(given.base, {}),
    "prompt_tuning": lambda given: prompt_tuning(given.base, given.config, given.task.instruction),
    "p_tuning": lambda given: p_tuning(given.base, given.config),
    "embedding": _virtual("front"),
    "infix": _virtual("back"),
}

# What a prefix is trained with beyond the method's own options. P-Tuning v2 starts from no text and has no MLP unless
# asked; APT is a prefix with gates of the text and the layer.
_PREFIXES: dict[str, dict[str, Any]] = {"prefix": {}, "ptuning2": {}, "apt": {"gates": "apt"}}


def _fit_prefix(given: _Given) -> Fitted:
    result = train_prefix(given.base, None, given.task, _options(given), progress=given.progress)
    return _fitted_prefix(given, result)


def _fit_prefixes(given: list[_Given]) -> list[Fitted | RunError]:
    """Several prefixes at once; the seconds of each are its share, by the tokens it read.

    How many a lost one read is not known: it counts as much as the others on average.
    """
    base, progress = given[0].base, given[0].progress
    start = time.perf_counter()
    results: Sequence[TrainResult | RunError]
    try:
        results = train_together(
            base, None, [each.task for each in given], [_options(each) for each in given], progress=progress
        )
    except SomeFailed as error:
        results = error.results
    seconds = time.perf_counter() - start
    found: list[Fitted | RunError] = [
        each if isinstance(each, RunError) else _fitted_prefix(own, each)
        for own, each in zip(given, results, strict=True)
    ]
    whole = [each for each in found if isinstance(each, Fitted)]
    tokens = [each.metrics["tokens"] for each in whole]
    for fitted, read in zip(whole, tokens, strict=True):
        fitted.metrics["train_seconds"] = seconds * len(whole) / len(found) * read / sum(tokens)
    return found


def _options(given: _Given) -> TrainConfig:
    return given.config.training(**given.config.options, **_PREFIXES[given.config.method])


def _fitted_prefix(given: _Given, result: TrainResult) -> FittedPrefix:
    told = ("steps", "planned_steps", "best_step", "tokens", "trained_parameters", "train_rows", "dev_rows",
            "skipped_rows")  # fmt: skip
    metrics = {name: result.metrics[name] for name in told}
    metrics["dev_loss"] = result.metrics["best_dev_loss"]
    return FittedPrefix(given.base, given.task, given.config, metrics, result.prefix)


def _fit_prompting(given: _Given) -> Fitted:
    """Nothing is trained: the dev loss tells templates and numbers of shots apart."""
    objective, task = given.objective(), given.task
    shots = objective.encode(task.train).examples if given.config.options.get("shots") else []
    prompting = given.prompting(shots)
    dev = objective.encode(_written(task.dev, prompting))
    loss = measure(objective, dev, given.config.batch_size, {})
    counts = [prompting.count_shots(e.prompt, prompting.room(e)) for e in task.dev.examples]
    metrics = {
        "dev_loss": loss, "dev_losses": [loss], "steps": 0, "planned_steps": 0, "best_step": 0, "tokens": 0,
        "trained_parameters": 0, "train_rows": len(prompting.shots), "dev_rows": len(dev),
        "skipped_rows": len(dev.skipped), "mean_shots": sum(counts) / len(counts),
    }  # fmt: skip
    return FittedPrompting(given.base, task, given.config, metrics, prompting)


def _fit_triggers(given: _Given) -> Fitted:
    search = TriggerSearch(given.base, given.task, given.config)
    metrics = search.run(given.progress)
    tuning = TriggerTuning(given.base, search.ids, search.place)
    metrics |= _counts(search.train, search.dev)
    return FittedTuning(given.base, given.task, given.config, metrics, tuning)
