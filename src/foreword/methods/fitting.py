"""How each method is fitted: once with `fit`, with several configurations to choose from with `fit_each`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from foreword.base import BaseModel
from foreword.config import TrainConfig
from foreword.data import Rows, encode_split
from foreword.errors import ConfigError, RunError, UnsupportedModel
from foreword.methods.adapters import AdapterTuning
from foreword.methods.config import MethodConfig
from foreword.methods.fitted import Fitted, FittedPrefix, FittedPrompting, FittedTuning
from foreword.methods.loop import Progress, measure, plain_lengths, train_weights
from foreword.methods.prompting import Prompting
from foreword.methods.through_peft import LoraTuning, p_tuning, prompt_tuning
from foreword.methods.triggers import TriggerSearch, TriggerTuning
from foreword.methods.tuning import Tuning
from foreword.methods.virtual import Vectors, VirtualTokens, start_vectors
from foreword.methods.weights import WeightTuning, all_weights, top_weights
from foreword.tasks import Example, Split
from foreword.together import SomeFailed, train_together
from foreword.train import TrainResult
from foreword.train import train as train_prefix

__all__ = ["fit", "fit_each"]


@dataclass(frozen=True)
class _Given:
    """A fit: its base model, rows and configuration."""

    base: BaseModel
    train: Split
    dev: Split
    config: MethodConfig
    instruction: str
    progress: Progress | None


def fit(
    base: BaseModel,
    train: Split,
    dev: Split,
    config: MethodConfig,
    *,
    instruction: str = "",
    progress: Progress | None = None,
) -> Fitted:
    """Fit a method to the examples of `train`; of what training passes through, the best on `dev` is kept.

    All methods get the same rows in the same batches and lower the same loss: nats per completion token. Left out are
    rows that are too long for the context, with what a method writes around them. `instruction`
    says what the task is: prompts are written with it, and prefixes and virtual tokens start from it. `progress` gets
    (stage, done, total). The base model is left as it was, bit for bit.

    Raises `ConfigError`, `DataError` (no usable rows), `UnsupportedModel` (an encoder, or a model whose layers are not
    known), `MissingPackage` (LoRA, prompt tuning and P-tuning need `foreword[peft]`), `RunError` (the loss is not
    finite).

    >>> from foreword.methods import MethodConfig, fit
    >>> base = BaseModel.load("smollm2-135m")  # doctest: +SKIP
    >>> fitted = fit(base, train, dev, MethodConfig.of("lora", rank=4, epochs=5))  # doctest: +SKIP
    >>> fitted.generate(["name : Aromi | eatType : pub\\n"], max_new_tokens=40)  # doctest: +SKIP
    """
    [found] = fit_each(base, train, dev, [config], instruction=instruction, progress=progress)
    if isinstance(found, RunError):
        raise found
    return found


def fit_each(
    base: BaseModel,
    train: Split,
    dev: Split,
    configs: Sequence[MethodConfig],
    *,
    instruction: str = "",
    progress: Progress | None = None,
) -> Iterator[Fitted | RunError]:
    """Candidates to choose from: what `fit` gives for each of `configs`, or the `RunError` of one whose loss diverged.

    Prefixes train together, in one batch over the one base (`foreword.train_together`), with the results that they get
    alone but rounding; the others are fitted one after the other. Raises what else `fit` raises.
    """
    _check(base, (train, dev))
    count = len(configs)
    several = count > 1
    if several and all(config.method in _PREFIXES for config in configs):
        yield from _fit_prefixes([_Given(base, train, dev, config, instruction, progress) for config in configs])
        return
    for number, config in enumerate(configs, start=1):
        told = _named(progress, f"candidate {number} of {count}: ") if several and progress else progress
        try:
            found: Fitted | RunError = _fit_one(_Given(base, train, dev, config, instruction, told))
        except RunError as error:
            found = error
        yield found


def _check(base: BaseModel, splits: Sequence[Split]) -> None:
    if base.family.kind == "encoder":
        raise UnsupportedModel(
            f"{base.name!r} is an encoder and writes no completions", "a decoder or encoder-decoder",
            "choose another base model",
        )  # fmt: skip
    for split in splits:
        if any(not isinstance(example, Example) for example in split.examples):
            raise ConfigError(f"labelled rows in {split.name}", "prompts with completions", "choose a generation task")
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
    """Train what a tuning has to train, in the shared loop."""
    prompting = None
    if "template" in given.config.options:
        prompting = Prompting(given.base, given.config, (), given.instruction)
    written = _written(given.train, prompting)
    plain = {id(own): example for own, example in zip(written.examples, given.train.examples, strict=True)}
    with tuning.applied() as view:
        rows, dev = encode_split(view, written), encode_split(view, _written(given.dev, prompting))
        metrics = train_weights(
            view, tuning.parameters(), rows, dev, given.config.training(), progress=given.progress,
            lengths=plain_lengths(given.base, [plain[id(own)] for own in rows.examples]),
        )  # fmt: skip
        tuning.finish()
    return FittedTuning(given.base, given.config, {**metrics, **_counts(rows, dev)}, tuning, prompting)


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
        first = start_vectors(given.base, length, options["init"], given.instruction, config.seed)
        return VirtualTokens(given.base, Vectors(first), length, place, options.get("deep", False))

    return make


_TUNINGS: dict[str, Callable[[_Given], Tuning]] = {
    "full": lambda given: WeightTuning(given.base, all_weights(given.base)),
    "top2": lambda given: WeightTuning(given.base, top_weights(given.base, given.config.options["layers"])),
    "adapter": lambda given: AdapterTuning(given.base, given.config.options["share"], given.config.seed),
    "lora": lambda given: LoraTuning(given.base, given.config),
    "prompt_tuning": lambda given: prompt_tuning(given.base, given.config, given.instruction),
    "p_tuning": lambda given: p_tuning(given.base, given.config),
    "embedding": _virtual("front"),
    "infix": _virtual("back"),
}

# What a prefix is trained with beyond the method's own options. P-Tuning v2 starts from no text and has no MLP unless
# asked; APT is a prefix with gates of the text and the layer.
_PREFIXES: dict[str, dict[str, Any]] = {"prefix": {}, "ptuning2": {}, "apt": {"gates": "apt"}}


@dataclass
class _Rows:
    """The task of a fit, for `foreword.train.train`."""

    train: Split
    dev: Split
    instruction: str
    name: str = "fit"
    kind: str = "generation"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("bleu",)
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()

    def split(self, name: str, limit: int | None = None, strict: bool = False) -> Split:  # noqa: ARG002
        return {"train": self.train, "dev": self.dev}[name]


def _fit_prefix(given: _Given) -> Fitted:
    result = train_prefix(given.base, None, _task(given), _options(given), progress=given.progress)
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
            base, None, [_task(each) for each in given], [_options(each) for each in given], progress=progress
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


def _task(given: _Given) -> _Rows:
    return _Rows(given.train, given.dev, given.instruction)


def _options(given: _Given) -> TrainConfig:
    return given.config.training(**given.config.options, **_PREFIXES[given.config.method])


def _fitted_prefix(given: _Given, result: TrainResult) -> FittedPrefix:
    told = ("steps", "planned_steps", "best_step", "tokens", "trained_parameters", "train_rows", "dev_rows",
            "skipped_rows")  # fmt: skip
    metrics = {name: result.metrics[name] for name in told}
    metrics["dev_loss"] = result.metrics["best_dev_loss"]
    return FittedPrefix(given.base, given.config, metrics, result.prefix)


def _fit_prompting(given: _Given) -> Fitted:
    """Nothing is trained: the dev loss tells templates and numbers of shots apart."""
    prompting = Prompting(given.base, given.config, given.train.examples, given.instruction)
    dev = encode_split(given.base, _written(given.dev, prompting))
    loss = measure(given.base, dev, given.config.batch_size)
    shots = [prompting.count_shots(e.prompt, len(given.base.encode("", e.completion)[1])) for e in given.dev.examples]
    metrics = {
        "dev_loss": loss, "dev_losses": [loss], "steps": 0, "planned_steps": 0, "best_step": 0, "tokens": 0,
        "trained_parameters": 0, "train_rows": len(prompting.shots), "dev_rows": len(dev),
        "skipped_rows": len(dev.skipped), "mean_shots": sum(shots) / len(shots),
    }  # fmt: skip
    return FittedPrompting(given.base, given.config, metrics, prompting)


def _fit_triggers(given: _Given) -> Fitted:
    search = TriggerSearch(given.base, given.train, given.dev, given.config)
    metrics = search.run(given.progress)
    tuning = TriggerTuning(given.base, search.ids, search.place)
    return FittedTuning(given.base, given.config, {**metrics, **_counts(search.train, search.dev)}, tuning)
