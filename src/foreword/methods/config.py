"""The options of the compared methods: what all share, what is a method's own, and the grid each is tuned over.

Every grid has `SEARCH_SIZE` candidates, so that tuning on the dev rows costs each method the same number of runs and
none is compared untuned. Published settings are in Prefix-Tuning, arXiv 2101.00190, table 5; Lester et al. 2021, arXiv
2104.08691; Hu et al. 2021, arXiv 2106.09685; the ranges here are theirs, moved to AdamW and to small models.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from foreword.config import TrainConfig
from foreword.errors import ConfigError

__all__ = ["METHODS", "SEARCH_SIZE", "TEMPLATES", "Method", "MethodConfig", "misfit", "search_space"]

SEARCH_SIZE = 4

# How an instruction goes with a prompt where nothing is trained. All end a line where the completion begins: it has
# tokens of its own, which a space before it would be merged with in solved examples.
TEMPLATES: dict[str, str] = {
    "first": "{instruction}\n\n{prompt}",
    "labelled": "{instruction}\n\nInput: {prompt}Output:\n",
    "last": "{prompt}{instruction}\n",
    "headed": "### Instruction:\n{instruction}\n\n### Input:\n{prompt}\n### Response:\n",  # as Alpaca is asked
    "chat": "{instruction}\n\n{prompt}",  # as a user's turn of the tokenizer's chat template
}


class _Option(NamedTuple):
    """One option of a method: its default, whose type is its type, and what is allowed."""

    default: Any
    low: float = 0.0
    high: float = float("inf")
    choices: tuple[str, ...] = ()


_WRITERS = ("decoder", "encoder-decoder")
_ALL = (*_WRITERS, "encoder")


class Method(NamedTuple):
    """A method: its name in tables, its learning rates and which of them is the default, its options and its grid.

    `grid` lists the candidates as replaced values; empty: one candidate for each of `rates`. `bases` are the kinds of
    base models that it works on; most write something around a prompt, which encoders have none of.
    """

    title: str
    rates: tuple[float, ...] = ()
    rate: float = 0.0
    options: dict[str, _Option] = {}  # noqa: RUF012 - read only
    grid: tuple[dict[str, Any], ...] = ()
    bases: tuple[str, ...] = _WRITERS


_LENGTH = _Option(10, 1)
_PLACES = ("front", "back")
_STARTS = ("text", "words", "vocab", "random")
_BORN = _Option("text", choices=_STARTS)
_SOFT = (3e-3, 1e-2, 3e-2, 1e-1)
_MODULES = (1e-4, 3e-4, 1e-3, 3e-3)
_PREFIX = (1e-3, 2e-3, 5e-3, 1e-2)
_HEAD = 5e-3
_PARAMETRIZED = {"parametrization": _Option("direct", choices=("direct", "mlp")), "hidden_size": _Option(512, 1)}
# Weights may be trained with the instruction written before each prompt, as Prefix-Tuning's section 6.3 does where data
# is scarce: a prefix starts from the instruction, and so knows it without.
_INSTRUCTED = {"template": _Option("none", choices=("none", *TEMPLATES))}
_WRITTEN = {"template": _Option("first", choices=tuple(TEMPLATES))}
# Many base models have no chat template: it is tried where it is asked for.
_ALWAYS = tuple(name for name in TEMPLATES if name != "chat")

METHODS: dict[str, Method] = {
    "full": Method("Full fine-tuning", (1e-5, 5e-5, 1e-4, 2e-4), 5e-5, _INSTRUCTED, bases=_ALL),
    "top2": Method("FT-Top2", (5e-5, 1e-4, 3e-4, 1e-3), 3e-4, {"layers": _Option(2, 1), **_INSTRUCTED}, bases=_ALL),
    "adapter": Method("Adapter", _MODULES, 1e-3, {"share": _Option(0.03, 1e-9, 1.0), **_INSTRUCTED}, bases=_ALL),
    "lora": Method(
        "LoRA", _MODULES, 1e-3,
        {
            "rank": _Option(8, 1), "alpha": _Option(16, 1), "targets": _Option("default", choices=("default", "all")),
            **_INSTRUCTED,
        },
        bases=_ALL,
    ),
    "head": Method(
        "Head alone", grid=tuple({"head_learning_rate": rate} for rate in (_HEAD, 1e-2, 2e-3, 2e-2)),
        bases=("encoder",),
    ),
    "prompt_tuning": Method(
        "Prompt tuning", _SOFT, 3e-2, {"length": _LENGTH, "init": _Option("vocab", choices=("text", "vocab", "random"))}
    ),
    "p_tuning": Method(
        "P-tuning", _MODULES, 1e-3,
        {"length": _LENGTH, "hidden_size": _Option(128, 1), "encoder": _Option("mlp", choices=("mlp", "lstm"))},
    ),
    "autoprompt": Method(
        "AutoPrompt",
        options={"length": _Option(5, 1), "candidates": _Option(10, 1), "place": _Option("front", choices=_PLACES)},
        grid=tuple({"length": length, "place": place} for length in (5, 10) for place in _PLACES),
    ),
    "zero_shot": Method("Zero-shot", options=_WRITTEN, grid=tuple({"template": name} for name in _ALWAYS)),
    "few_shot": Method(
        "Few-shot in context", options={"shots": _Option(4, 1), **_WRITTEN},
        grid=tuple({"shots": shots} for shots in (1, 2, 4, 8)),
    ),
    "prefix": Method("Prefix-Tuning", _PREFIX, 5e-3, {"length": _LENGTH, "init": _BORN, **_PARAMETRIZED}, bases=_ALL),
    "embedding": Method("Embedding-only", _SOFT, 3e-2, {"length": _LENGTH, "init": _BORN}),
    "infix": Method("Infix-Tuning", (1e-3, 3e-3, 1e-2, 3e-2), 1e-2, {
        "length": _LENGTH, "init": _BORN, "deep": _Option(True),
    }),
    "ptuning2": Method("P-Tuning v2", (2e-3, 5e-3, 1e-2, 2e-2), 5e-3, {
        "length": _LENGTH, "init": _Option("random", choices=_STARTS), **_PARAMETRIZED,
    }, bases=_ALL),
    "apt": Method("APT", _PREFIX, 5e-3, {"length": _LENGTH, "init": _BORN}, bases=_ALL),
}  # fmt: skip


@dataclass(frozen=True)
class MethodConfig:
    """How a method is fitted. Raises `ConfigError` for an unknown name or a value out of its range.

    `learning_rate` 0 is the method's default; methods that train nothing at that rate know no other. `epochs`,
    `max_steps`, `batch_size`, `micro_batch_size`, `warmup_ratio`, `eval_every`, `patience` and `seed` mean what they
    mean in `TrainConfig`, and so do `head_learning_rate`, which is the same for all methods, and `max_tokens` on
    encoders; `options` are the method's own, filled up with their defaults.

    >>> MethodConfig("adapter", epochs=5).options
    {'share': 0.03, 'template': 'none'}
    >>> MethodConfig.of("lora", rank=4, seed=1).options["rank"]
    4
    >>> MethodConfig.of("lora", rnk=4)
    Traceback (most recent call last):
    foreword.errors.ConfigError: option 'rnk' of method 'lora'; expected 'rank'; correct its spelling
    """

    method: str
    learning_rate: float = 0.0
    epochs: int = 10
    max_steps: int = 0
    batch_size: int = 10
    micro_batch_size: int = 0
    warmup_ratio: float = 0.05
    eval_every: int = 0
    patience: int = 3
    head_learning_rate: float = _HEAD
    max_tokens: int = 128
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = _known(self.method)
        for name, value in self.options.items():
            if name not in known.options:
                raise _misspelt(self.method, name, known.options)
            _check(self.method, name, known.options[name], value)
        filled = {name: self.options.get(name, option.default) for name, option in known.options.items()}
        object.__setattr__(self, "options", filled)
        if self.learning_rate and not known.rates:
            raise ConfigError(
                f"learning_rate {self.learning_rate} for method {self.method!r}",
                "none: it trains nothing at that rate", "leave it out",
            )  # fmt: skip
        object.__setattr__(self, "learning_rate", float(self.learning_rate or known.rate))
        self.training()

    @classmethod
    def of(cls, method: str, **values: Any) -> MethodConfig:
        """The same from flat values: shared ones and the method's own side by side."""
        own = {each.name for each in fields(cls)} - {"method", "options"}
        known = _known(method)
        for name in values:
            if name not in own and name not in known.options:
                raise _misspelt(method, name, [*known.options, *sorted(own)])
        shared = {name: value for name, value in values.items() if name in own}
        return cls(method, **shared, options={name: values[name] for name in values if name not in own})

    def to_dict(self) -> dict[str, Any]:
        """All values, flat; `MethodConfig.of(**values)` reads them back."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "options"}
        return {**plain, **self.options}

    def training(self, **options: Any) -> TrainConfig:
        """The same as options of Foreword's own training, which chooses by the loss on all dev rows here."""
        others = ("method", "learning_rate", "options")
        given: dict[str, Any] = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name not in others
        }
        if self.learning_rate:
            given["learning_rate"] = self.learning_rate
        return TrainConfig(**{**given, "dev_limit": 0, "select": "loss", **options})


def search_space(method: str, **shared: Any) -> list[MethodConfig]:
    """The candidates that a method is tuned over on dev rows: `SEARCH_SIZE` for every method, its defaults first.

    Learning rates come by their places from the default in the list, the higher first, so that the first few are a
    smaller search.
    `shared` are values that all candidates have, such as `epochs` or a method's `share`; they win over the grid's, so
    that sharing what the grid varies leaves fewer candidates.

    >>> [config.learning_rate for config in search_space("prefix", epochs=5)]
    [0.005, 0.01, 0.002, 0.001]
    >>> {len(search_space(name)) for name in METHODS}
    {4}
    """
    known = _known(method)
    middle = known.rates.index(known.rate) if known.rates else 0
    rates = [known.rates[n] for n in sorted(range(len(known.rates)), key=lambda n: (abs(n - middle), -n))]
    default = {name: option.default for name, option in known.options.items()}
    grid = sorted(known.grid, key=lambda candidate: {**default, **candidate} != default)
    found: list[MethodConfig] = []
    for candidate in grid or [{"learning_rate": rate} for rate in rates]:
        config = MethodConfig.of(method, **{**candidate, **shared})
        if config not in found:
            found.append(config)
    return found


def misfit(config: MethodConfig, kinds: Iterable[str]) -> tuple[str, str]:
    """What of a configuration fits no base model of these kinds, and what would; empty if all fits one of them.

    >>> misfit(MethodConfig("few_shot"), ["encoder"])
    ("method 'few_shot'", 'one of full, top2, adapter, lora, head, prefix, ptuning2, apt')
    """
    kinds = set(kinds)
    if not kinds & {*METHODS[config.method].bases}:
        return f"method {config.method!r}", "one of " + ", ".join(n for n, m in METHODS.items() if kinds & {*m.bases})
    template = config.options.get("template", "none")
    if template != "none" and kinds == {"encoder"}:
        return f"template {template!r}", "none: there is no prompt to write it around"
    return "", ""


def _known(method: str) -> Method:
    if method not in METHODS:
        raise ConfigError(f"method {method!r}", f"one of {', '.join(METHODS)}", "name one of them")
    return METHODS[method]


def _misspelt(method: str, name: str, known: Iterable[str]) -> ConfigError:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    expected = repr(close[0]) if close else f"one of {', '.join(names) or 'none'}"
    return ConfigError(f"option {name!r} of method {method!r}", expected, "correct its spelling")


def _check(method: str, name: str, option: _Option, value: Any) -> None:
    wanted = type(option.default)
    right = type(value) is wanted or (wanted is float and type(value) is int)
    what = f"{name} = {value!r} for method {method!r}"
    if not right:
        raise ConfigError(what, f"a value like {option.default!r}", f"correct {name}")
    if option.choices and value not in option.choices:
        raise ConfigError(what, f"one of {', '.join(option.choices)}", f"correct {name}")
    if isinstance(value, int | float) and not option.low <= value <= option.high:
        raise ConfigError(what, f"at least {option.low:g} and at most {option.high:g}", f"correct {name}")
