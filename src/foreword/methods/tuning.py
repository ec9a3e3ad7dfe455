"""What is trained beside or instead of a base model's weights, put on it for a while and taken off without a trace."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Container
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor, nn

from foreword.base import BaseModel
from foreword.errors import UnsupportedModel
from foreword.families import find_sites
from foreword.prefix import Site

__all__ = ["Sublayers", "Tuning", "sublayers"]


class Tuning(ABC):
    """Trained numbers on a base model. Inside of `applied()` the model computes with them, outside as before.

    Leaving gives back the base model's weights bit for bit: the very tensors that were there, never recomputed ones.
    """

    @abstractmethod
    def applied(self) -> AbstractContextManager[BaseModel]:
        """Inside, the yielded base model reads and writes as it was tuned to."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What is trained; to be asked for inside of `applied()`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored for a task, by name, once trained."""

    def finish(self) -> None:  # noqa: B027 - most tunings have nothing to drop
        """Called after training, inside of `applied()`: drop what only training needs."""


class Sublayers(NamedTuple):
    """The modules of a model's layers by name.

    `layers` are whole layers, by stack in the order of the model; `attention` and `mlp` are what a layer adds to its
    residual stream, after its own projection back to the hidden size.
    """

    layers: dict[str, list[tuple[str, nn.Module]]]
    attention: dict[str, nn.Module]
    mlp: dict[str, nn.Module]


# The module that projects back to the hidden size: an MLP of its own or, where a layer has none, its second matrix.
_MLP = re.compile(r"(?<!\.attention)\.(?:mlp|fc2|DenseReluDense|ffn\.lin2|ffn_output|output\.dense)$")


def sublayers(base: BaseModel) -> Sublayers:
    """The layers of a model and their sublayers; `UnsupportedModel` where they are not known.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> found = sublayers(BaseModel(LlamaForCausalLM(LlamaConfig(**sizes))))
    >>> list(found.attention), list(found.mlp)
    (['model.layers.0.self_attn'], ['model.layers.0.mlp'])
    """
    family, model = base.family, base.model
    names = {id(module): name for name, module in model.named_modules()}
    layers: dict[str, dict[str, nn.Module]] = {}
    attention: dict[str, nn.Module] = {}
    for site, module in find_sites(model, family):
        name = names[id(module)]
        projection = _projection(name, set(names.values())) if family.kind == "encoder" else name
        attention[projection] = model.get_submodule(projection)
        if site.stack == "cross":
            continue
        layer = _layer_name(name, family.places[site.stack], site)
        layers.setdefault(site.stack, {})[layer] = model.get_submodule(layer)
    within = tuple(f"{layer}." for stack in layers.values() for layer in stack)
    mlp = {name: m for name, m in model.named_modules() if name.startswith(within) and _MLP.search(name)}
    if len(mlp) < sum(len(stack) for stack in layers.values()):
        raise UnsupportedModel(
            f"layers of {type(model).__name__} without a known MLP", "modules named mlp, fc2 or DenseReluDense",
            "choose another base model or another method",
        )  # fmt: skip
    return Sublayers({stack: list(found.items()) for stack, found in layers.items()}, attention, mlp)


def _projection(attention: str, names: Container[str]) -> str:
    """The module that projects an encoder's attention back: in BERT and ALBERT the sum and the norm are behind it."""
    tried = (attention.removesuffix(".self") + ".output.dense", attention + ".dense")
    return next((name for name in tried if name in names), attention)


def _layer_name(attention: str, pattern: str, site: Site) -> str:
    """The name of the layer that an attention module is in: all up to its number."""
    found = re.search(rf"(?:^|\.){pattern}$", attention)
    if found is None:
        raise UnsupportedModel(f"no layer around {attention!r} at {site}", f"a name like {pattern!r}")
    return attention[: found.end(1)]
