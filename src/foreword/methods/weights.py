"""Fine-tuning of the base model's own weights: all of them, or those of the top layers.

Sources: Prefix-Tuning, arXiv 2101.00190, section 5.2 (FINETUNE and FT-TOP2).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from torch import Tensor, nn

from foreword.base import BaseModel
from foreword.errors import ConfigError
from foreword.methods.tuning import Tuning, sublayers

__all__ = ["WeightTuning", "all_weights", "top_weights"]

_FINAL_NORM = re.compile(r"(?:norm|ln_f|layer_norm|final_norm|final_layer_norm|final_layernorm)$")


class WeightTuning(Tuning):
    """Other values for some of a model's weights.

    The tuned values are tensors of their own, which `applied()` puts in the place of the base's: nothing is copied
    back, so nothing can differ afterwards. They cost as much memory as the weights they replace; training them takes
    four times as much again (see `train_weights`): full fine-tuning of a float32 model needs six times its weights in
    all, of a bfloat16 model twelve times (the twins are float32).
    """

    def __init__(self, base: BaseModel, weights: dict[str, nn.Parameter]) -> None:
        self.base, self.weights = base, weights
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}

    @contextlib.contextmanager
    def applied(self) -> Iterator[BaseModel]:
        before = {name: weight.data for name, weight in self.weights.items()}
        try:
            for name, weight in self.weights.items():
                weight.data = self.values[name]
            yield self.base
        finally:
            for name, weight in self.weights.items():
                weight.data = before[name]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    def tensors(self) -> dict[str, Tensor]:
        return self.values


def all_weights(base: BaseModel) -> dict[str, nn.Parameter]:
    """Every weight, once; tied ones under their first name."""
    return dict(base.model.named_parameters())


def top_weights(base: BaseModel, layers: int) -> dict[str, nn.Parameter]:
    """The weights of the last layers, of a decoder where there is one, and of the norm after them; not the embeddings.

    Raises `ConfigError` for more layers than there are.
    """
    stack = sublayers(base).layers["encoder" if base.family.kind == "encoder" else "decoder"]
    if layers > len(stack):
        raise ConfigError(f"top {layers} layers", f"at most {len(stack)}, those of {base.name!r}", "choose fewer")
    holder = stack[-1][0].rpartition(".")[0].rpartition(".")[0]  # of the list of layers
    norms = [
        (f"{holder}.{name}" if holder else name, module)
        for name, module in base.model.get_submodule(holder).named_children()
        if _FINAL_NORM.match(name)
    ]
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in [*stack[-layers:], *norms]
        for name, parameter in module.named_parameters()
    }
