"""The options of a training run: their defaults, their ranges, and TOML files of them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["TrainConfig"]


def _option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float | None = None,
    neutral: bool = False,
    special: bool = False,
) -> Any:
    """A field: `low <= value <= high`, `value > above`.

    `neutral` options leave the trained prefix as it is; `special` ones do so at their default.
    """
    metadata = {"help": text, "choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata={**metadata, "neutral": neutral, "special": special})


@dataclass(frozen=True)
class TrainConfig:
    """How a prefix is born and trained. 0 stands for "no limit" where an option says so.

    The defaults suit a prefix that starts from an instruction text and is trained directly. Every field carries
    its explanation in `metadata["help"]`; the flags of `foreword train` are made from them. Raises `ConfigError`
    for a value outside its range.

    >>> TrainConfig(epochs=5).epochs, TrainConfig.from_dict({"length": 6}).length
    (5, 6)
    >>> TrainConfig(schedule="cubic")
    Traceback (most recent call last):
    foreword.errors.ConfigError: schedule = 'cubic'; expected linear, cosine or constant; correct schedule
    """

    length: int = _option(10, "Slots of a new prefix, per layer.", low=1)
    init: str = _option(
        "text",
        "How a new prefix is born: keys and values of a text, of words, of random tokens of the vocabulary, or "
        "random numbers on the model's own scale.",
        choices=("text", "words", "vocab", "random"),
    )
    text: str = _option("", "The text or words of a new prefix. Empty: the task's instruction.")
    length_factor: float = _option(
        1.0, "Multiplies the length; 1.5 gives as many parameters as gates would add.", above=0.0, special=True
    )
    parametrization: str = _option(
        "direct", "Train the keys and values themselves, or an MLP that makes them.", choices=("direct", "mlp")
    )
    hidden_size: int = _option(512, "Width of the MLP's hidden layer.", low=1)
    freeze_first_slot: bool = _option(False, "Keep the first slot, the attention sink, as it was born.")
    gates: str = _option(
        "none",
        "Factors on the slots: of the text and the layer (adaptive prefixes, APT), the same for all texts, or on each "
        "slot's share of the attention (for pruning).",
        choices=("none", "apt", "static", "mass"),
        special=True,
    )
    slot_gates: bool = _option(True, "With gates apt or static: a factor on each slot.", special=True)
    layer_gates: bool = _option(True, "With gates apt or static: a factor on each layer.", special=True)
    gate_pooling: str = _option(
        "",
        "What gates of the text read: each token itself, the first token, the mean of all, or of the prompt. Empty: "
        "mean in encoders, token in decoders.",
        choices=("", "token", "cls", "mean", "prompt"),
        special=True,
    )
    layer_gate_start: float = _option(2.0, "The factor on each layer at the beginning.", special=True)
    head_pooling: str = _option(
        "auto",
        "What the head on an encoder reads of a text: the first token or the mean of all. auto: mean.",
        choices=("auto", "cls", "mean"),
        special=True,
    )
    head_dropout: float = _option(
        0.1, "Share of what the head reads that is dropped in training.", low=0.0, high=0.9, special=True
    )
    max_tokens: int = _option(
        128, "Longest text that an encoder reads; more is cut off. 0: the model's own limit.", low=0, special=True
    )
    epochs: int = _option(10, "Passes over the training rows.", low=1)
    max_steps: int = _option(0, "Optimizer steps, whatever epochs says. 0: as many as the epochs have.", low=0)
    batch_size: int = _option(10, "Rows per optimizer step, over all processes.", low=1)
    micro_batch_size: int = _option(
        0, "Rows per forward pass and process; less saves memory and changes no result. 0: the whole batch.", low=0
    )
    learning_rate: float = _option(5e-3, "Peak learning rate of AdamW.", above=0.0)
    gate_learning_rate: float = _option(
        0.0, "Peak learning rate of the gates. 0: a tenth of learning_rate.", low=0.0, special=True
    )
    head_learning_rate: float = _option(0.0, "Peak learning rate of the head. 0: learning_rate.", low=0.0, special=True)
    beta1: float = _option(0.9, "AdamW's decay of the gradient's mean.", low=0.0, high=0.9999)
    beta2: float = _option(0.999, "AdamW's decay of the squared gradient's mean.", low=0.0, high=0.999999)
    weight_decay: float = _option(0.0, "AdamW's weight decay.", low=0.0)
    warmup_ratio: float = _option(0.05, "Share of the steps that raise the learning rate from 0.", low=0.0, high=1.0)
    schedule: str = _option(
        "linear",
        "How the learning rate falls after the warm-up: to 0 in a line or a cosine, or not at all.",
        choices=("linear", "cosine", "constant"),
    )
    clip: float = _option(1.0, "Largest norm of the gradient. 0: no limit.", low=0.0)
    patience: int = _option(
        3, "Stop after so many measurements on the dev rows in a row without a new best. 0: never.", low=0
    )
    eval_every: int = _option(0, "Steps from one measurement on the dev rows to the next. 0: after every epoch.", low=0)
    select: str = _option(
        "auto",
        "What the best prefix is best in on the dev rows. auto: the task's first metric where labels are predicted, "
        "else the loss.",
        choices=("auto", "loss", "score"),
        special=True,
    )
    shots: int = _option(0, "Train on so many rows of each label, drawn by the seed. 0: all rows.", low=0, special=True)
    rows: int = _option(
        0, "Train on so many rows, drawn by the seed, and measure on 0.3 times as many others. 0: all rows.", low=0,
        special=True,
    )  # fmt: skip
    fraction: float = _option(
        1.0, "Train on this share of the rows, drawn by the seed.", above=0.0, high=1.0, special=True
    )
    sample_seed: int = _option(
        -1, "Seed of drawn rows alone. -1: the same as seed.", low=-1, high=2**63 - 1, special=True
    )
    train_limit: int = _option(0, "Train on the first rows only. 0: all.", low=0)
    dev_limit: int = _option(100, "Measure on the first dev rows only. 0: all.", low=0)
    strict: bool = _option(False, "Stop at the first row that cannot be used, not skip it.")
    seed: int = _option(0, "Seed of the initialisation, of drawn rows and of their order.", low=0, high=2**63 - 1)
    precision: str = _option(
        "auto",
        "Precision of the base model; the prefix is always float32. auto: as stored.",
        choices=("auto", "float32", "bfloat16"),
    )
    gradient_checkpointing: bool = _option(False, "Save memory: compute the activations of each layer twice.")
    shard: bool = _option(False, "Save memory: split the base model's weights over the processes (FSDP2).")
    keep_training_state: bool = _option(False, "Keep the MLP in the trained prefix, so that it can be trained further.")
    checkpoint_seconds: float = _option(
        60.0, "A killed run loses at most this much work. 0: save after every step.", low=0.0, neutral=True
    )
    tracker: str = _option(
        "",
        "Also log to a tracker of accelerate. Empty: only to the run folder.",
        choices=("", "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "trackio", "swanlab"),
        neutral=True,
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = _converted(option, getattr(self, option.name))
            object.__setattr__(self, option.name, value)
            _check_range(option, value)
        ways = {"shots": self.shots > 0, "rows": self.rows > 0, "fraction": self.fraction < 1}
        if sum(ways.values()) > 1:
            given = " and ".join(name for name, used in ways.items() if used)
            raise ConfigError(given, "one way of drawing rows", "leave the others out")

    @property
    def draws_few(self) -> bool:
        """Whether a few rows are drawn, for dev too: then all of these count."""
        return bool(self.shots or self.rows)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The defaults with some values replaced; an unknown name is a `ConfigError` that names the closest."""
        known = [option.name for option in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                expected = f"{close[0]!r}" if close else f"one of {', '.join(known)}"
                raise ConfigError(f"unknown option {name!r}", expected, "correct its spelling")
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """Read a flat TOML file; `overrides` win over it. Raises `ConfigError`."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"cannot read configuration {path} ({error.strerror})", "a TOML file", "check the path"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no TOML ({error})", "lines such as epochs = 5", "correct it") from None
        try:
            return cls.from_dict({**values, **(overrides or {})})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.got}", error.expected, error.action) from None

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values."""
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        """All options with their explanations; `from_toml` reads it back.

        >>> print(TrainConfig().to_toml().splitlines()[1])
        length = 10
        """
        lines: list[str] = []
        for option in dataclasses.fields(self):
            lines += [f"# {option.metadata['help']}", f"{option.name} = {_toml(getattr(self, option.name))}"]
        return "\n".join(lines) + "\n"

    def decisive(self) -> dict[str, Any]:
        """The options that decide what the trained prefix is.

        >>> "gates" in TrainConfig().decisive(), TrainConfig(gates="apt").decisive()["gates"]
        (False, 'apt')
        """
        fields = [option for option in dataclasses.fields(self) if not option.metadata["neutral"]]
        values = {option.name: getattr(self, option.name) for option in fields}
        return {o.name: values[o.name] for o in fields if not (o.metadata["special"] and values[o.name] == o.default)}


def _converted(option: dataclasses.Field[Any], value: Any) -> Any:
    """The value in the field's type: a whole number may stand for a float, nothing else for anything else."""
    wanted = type(option.default)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise ConfigError(f"{option.name} = {value!r}", words[wanted], f"correct {option.name}")
    return value


def _check_range(option: dataclasses.Field[Any], value: Any) -> None:
    rules, name = option.metadata, option.name
    if isinstance(value, str):
        if rules["choices"] and value not in rules["choices"]:
            *rest, last = (choice or "''" for choice in rules["choices"])
            raise ConfigError(f"{name} = {value!r}", f"{', '.join(rest)} or {last}", f"correct {name}")
        return
    if not math.isfinite(value):
        expected = "a finite number"
    elif rules["above"] is not None and not value > rules["above"]:
        expected = f"more than {rules['above']:g}"
    elif value < rules["low"]:
        expected = f"at least {rules['low']:g}"
    elif value > rules["high"]:
        expected = f"at most {rules['high']:g}"
    else:
        return
    raise ConfigError(f"{name} = {value}", expected, f"correct {name}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(_escape(character) for character in value)
        return f'"{escaped}"'
    return repr(value)


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return f"\\u{ord(character):04x}" if ord(character) < 32 or ord(character) == 127 else character
