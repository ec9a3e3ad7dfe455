"""Bottleneck adapters after every attention and MLP sublayer, sized by a share of the base model's parameters.

Source: Houlsby et al. 2019, arXiv 1902.00751, section 2.1 and figure 2. Own modules, put on by hooks: PEFT has none of
this kind, and the `adapters` library pins an older transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foreword.base import BaseModel
from foreword.methods.tuning import Tuning, sublayers

__all__ = ["AdapterTuning", "Bottleneck", "bottleneck_size"]


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))), `[..., hidden]`: the identity to begin with.

    >>> x = torch.randn(2, 8)
    >>> torch.equal(Bottleneck(8, 3, torch.Generator().manual_seed(0))(x), x)
    True
    """

    def __init__(self, hidden: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, size, device="meta"), nn.Linear(size, hidden, device="meta")
        self.to_empty(device="cpu")
        with torch.no_grad():
            self.down.weight.normal_(0, 0.02, generator=generator)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        added = self.up(nn.functional.gelu(self.down(hidden.to(self.up.weight.dtype))))
        return hidden + added.to(hidden.dtype)


def bottleneck_size(share: float, parameters: int, hidden: int, places: int) -> int:
    """The width, at least 1, at which adapters in so many places come closest to a share of so many parameters.

    One adapter has 2·hidden·width + width + hidden parameters.

    >>> bottleneck_size(0.03, 134_515_008, 576, 60)  # SmolLM2-135M
    58
    """
    each = share * parameters / places
    return max(1, round((each - hidden) / (2 * hidden + 1)))


class AdapterTuning(Tuning):
    """An adapter on what each attention and each MLP adds to the residual stream."""

    def __init__(self, base: BaseModel, share: float, seed: int) -> None:
        found = sublayers(base)
        self.base = base
        self.places = {**found.attention, **found.mlp}
        hidden = next(iter(base.hidden_sizes.values()))
        count = sum(parameter.numel() for parameter in base.model.parameters())
        self.size = bottleneck_size(share, count, hidden, len(self.places))
        generator = torch.Generator().manual_seed(seed)
        self.adapters = {name: Bottleneck(hidden, self.size, generator).to(base.device) for name in self.places}

    @contextlib.contextmanager
    def applied(self) -> Iterator[BaseModel]:
        handles = [module.register_forward_hook(_adapting(self.adapters[name])) for name, module in self.places.items()]
        try:
            yield self.base
        finally:
            for handle in handles:
                handle.remove()

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{part}": parameter.detach()
            for name, adapter in self.adapters.items()
            for part, parameter in adapter.named_parameters()
        }


def _adapting(adapter: Bottleneck) -> Callable[..., Any]:
    """A forward hook: some modules give their output alone, some as the first of several."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)

    return hook
