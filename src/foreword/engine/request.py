"""What is asked of an engine and what it answers: token ids in, token ids out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from foreword.errors import ConfigError

_MOST = 1000.0  # of what is added to a logit; more would be no other choice

__all__ = ["Event", "Finished", "Request", "Sampling", "Token"]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Temperature 0 takes the likeliest.

    Penalties are subtracted from the logits of tokens that were generated before: `presence_penalty` once,
    `frequency_penalty` for each time. `logit_bias` is added to the logits of its tokens. `seed` makes the choice
    repeatable, whatever else is in the batch. `logprobs` is how many alternatives come with each token, None for no
    log-probabilities at all.

    >>> Sampling(temperature=-1.0)
    Traceback (most recent call last):
    foreword.errors.ConfigError: temperature -1.0; expected a finite number of at least 0; correct it
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature {self.temperature}", "a finite number of at least 0", "correct it")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p}", "above 0 and at most 1", "correct it")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k}", "at least 0", "correct it")
        given = [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        for name, value in [*given, *(("logit_bias", bias) for bias in self.logit_bias.values())]:
            if not abs(value) <= _MOST:
                raise ConfigError(f"{name} {value}", f"-{_MOST:g} to {_MOST:g}", "correct it")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ConfigError(f"seed {self.seed!r}", "a whole number", "correct it")
        if self.logprobs is not None and self.logprobs < 0:
            raise ConfigError(f"logprobs {self.logprobs}", "at least 0", "correct it")

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken as it is, with nothing told about it."""
        penalties = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.temperature == 0 and not penalties and self.logprobs is None


@dataclass(frozen=True)
class Request:
    """A prompt to continue through a prefix, None for the base model alone.

    `prefix` is a key of the engine's source. Tenants share the engine fairly. It ends at one of `stop_tokens`, which
    is not reported, after `max_new_tokens`, or `deadline_seconds` after it was submitted.

    >>> Request((1, 2, 3), max_new_tokens=4).sampling.temperature
    0.0
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    prefix: str | None = None
    tenant: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    deadline_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("an empty prompt", "at least one token", "send some text")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {self.max_new_tokens}", "at least 1", "correct it")


class Token(NamedTuple):
    """One generated token; log-probabilities, where they are asked for, are those of the model before any option."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class Finished(NamedTuple):
    """The end of a request, its last event.

    `reason` is `stop`, `length`, `cancelled`, `deadline`, `shutdown`, `gone` (its prefix was removed) or `error`;
    `message` says more of the last two.
    """

    reason: str
    message: str = ""


Event: TypeAlias = Token | Finished
