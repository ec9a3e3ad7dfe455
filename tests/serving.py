"""What tests of the engine share: prefixes of every kind for a tiny model, a source of them, and the plain way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from foreword.base import BaseModel
from foreword.engine import Engine, Event, Finished, Request, Token
from foreword.errors import StoreError
from foreword.init import new_prefix
from foreword.prefix import Gate, Prefix

__all__ = ["DECODERS", "Source", "alone", "drain", "prefixes_for", "prompt", "written"]

DECODERS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi3", "gpt_oss",
    "deepseek_v3",
)  # fmt: skip


class Source:
    """Prefixes by key; a load can be made to fail or to wait."""

    def __init__(self, prefixes: Mapping[str, Prefix]) -> None:
        self.prefixes = dict(prefixes)
        self.loads: list[str] = []
        self.before: Callable[[str], None] = lambda key: None

    def load(self, key: str) -> Prefix:
        self.loads.append(key)
        self.before(key)
        if key not in self.prefixes:
            raise StoreError(f"no object {key}", "one that is stored", "add it")
        return self.prefixes[key]


def prefixes_for(base: BaseModel, count: int, gates: bool = False, seed: int = 0) -> dict[str, Prefix]:
    """Prefixes of different content, of different length from layer to layer, some with masses and, if so, gates."""
    found = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        prefix = new_prefix(base, 2 + number % 4, "random", seed=1000 * seed + number)
        sites = {}
        for place, (site, tensors) in enumerate(prefix.sites.items()):
            keep = tensors.length - (place + number) % 2
            scale = 3.0  # so that a wrong one shows in the first tokens
            tensors = tensors._replace(keys=scale * tensors.keys[:, :keep], values=scale * tensors.values[:, :keep])
            if number % 3 == 1:
                tensors = tensors._replace(log_mass=torch.randn(keep, generator=generator))
            if gates and number % 3 == 2:
                hidden = base.hidden_sizes[site]
                weight = 2 * torch.randn(hidden, keep, generator=generator) / hidden**0.5
                tensors = tensors._replace(gate=Gate(weight, "token" if number % 2 else "prompt"))
            sites[site] = tensors
        found[f"p{number}"] = replace(prefix, sites=sites)
    return found


def prompt(seed: int, length: int, vocab: int = 300) -> tuple[int, ...]:
    """Random token ids that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocab, (length,), generator=generator).tolist())


def alone(base: BaseModel, request: Request, prefix: Prefix | None) -> list[int]:
    """What `BaseModel.generate` writes for a request by itself."""
    config = base._generation_config(max_new_tokens=request.max_new_tokens, num_beams=1, do_sample=False)
    (ids,) = base._generate_rows([list(request.prompt)], [prefix], config, {})
    for place, token in enumerate(ids):
        if token in request.stop_tokens:
            return ids[:place]
    return ids


def drain(engine: Engine, check: bool = True, steps: int = 10_000) -> dict[int, list[Event]]:
    """Step until nothing is left; all events by request."""
    events: dict[int, list[Event]] = {}
    for _ in range(steps):
        if not engine.has_work:
            return events
        for number, event in engine.step():
            events.setdefault(number, []).append(event)
        if check:
            engine.check()
        if not engine.runnable and engine.has_work:
            time.sleep(0.001)
    raise AssertionError("the engine does not come to an end")


def written(events: Sequence[Event]) -> list[int]:
    """The tokens among events, which end in `Finished`."""
    assert isinstance(events[-1], Finished) and all(isinstance(event, Token) for event in events[:-1])
    return [event.id for event in events[:-1] if isinstance(event, Token)]
