"""What differs between model families: where their attention sites are and how positions are given.

A model type that is not listed here is refused by name, so that no model ever runs silently unprefixed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from foreword.errors import UnsupportedModel
from foreword.families.deberta import Attend, adapted_forward
from foreword.prefix import Site

__all__ = ["FAMILIES", "Family", "adapter_of", "family_of", "find_sites", "position_limit"]


@dataclass(frozen=True)
class Family:
    """A group of model types whose attention modules are found in the same places.

    `places` maps a stack to the pattern of its attention modules' names; its group is the layer number.
    `positions` is "rotary" (any integer works, negative too), "learned" (a table), or "relative" (none given).
    `shared_layers` marks models that run one module for several layers, `own_adapter` those whose attention
    does not go through the attention interface.
    """

    name: str
    model_types: tuple[str, ...]
    kind: str
    places: dict[str, str]
    positions: str = "rotary"
    shared_layers: bool = False
    own_adapter: bool = False


_DECODER = {"decoder": r"layers\.(\d+)\.self_attn"}
_BERT = {"encoder": r"encoder\.layer\.(\d+)\.attention\.self"}
_BART = {
    "encoder": r"encoder\.layers\.(\d+)\.self_attn",
    "decoder": r"decoder\.layers\.(\d+)\.self_attn",
    "cross": r"decoder\.layers\.(\d+)\.encoder_attn",
}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama-like",
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss", "deepseek_v3"),
        "decoder",
        _DECODER,
    ),
    Family("gpt2", ("gpt2",), "decoder", {"decoder": r"h\.(\d+)\.attn"}, "learned"),
    Family("gpt-neox", ("gpt_neox",), "decoder", {"decoder": r"layers\.(\d+)\.attention"}),
    Family("opt", ("opt",), "decoder", _DECODER, "learned"),
    Family("bert-like", ("bert", "roberta", "xlm-roberta", "electra"), "encoder", _BERT, "learned"),
    Family("distilbert", ("distilbert",), "encoder", {"encoder": r"layer\.(\d+)\.attention"}, "learned"),
    Family(
        "albert", ("albert",), "encoder",
        {"encoder": r"albert_layer_groups\.(\d+)\.albert_layers\.\d+\.attention"}, "learned", shared_layers=True,
    ),
    Family("modernbert", ("modernbert",), "encoder", {"encoder": r"layers\.(\d+)\.attn"}),
    Family(
        "deberta-v2", ("deberta-v2",), "encoder",
        {"encoder": r"encoder\.layer\.(\d+)\.attention\.self"}, "relative", own_adapter=True,
    ),
    Family("bart-like", ("bart", "mbart", "pegasus"), "encoder-decoder", _BART, "learned"),
    Family(
        "t5", ("t5",), "encoder-decoder",
        {
            "encoder": r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention",
            "decoder": r"decoder\.block\.(\d+)\.layer\.0\.SelfAttention",
            "cross": r"decoder\.block\.(\d+)\.layer\.1\.EncDecAttention",
        },
        "relative",
    ),
    Family("whisper", ("whisper",), "encoder-decoder", _BART, "learned"),
    Family("vit", ("vit",), "encoder", {"encoder": r"layers?\.(\d+)\.attention(?:\.attention)?"}, "learned"),
)  # fmt: skip

_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}

# Attention that is not one softmax over keys, or keys that are not kept: named, so that the refusal can say why.
_REFUSED = {
    "qwen3_next": "its linear-attention layers keep a state, not keys and values",
    "jamba": "its Mamba layers keep a state, not keys and values",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "rwkv": "it has no attention",
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model configuration; `UnsupportedModel` names the model type that is not known."""
    model_type = getattr(config, "model_type", "")
    if model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    reason = f" ({_REFUSED[model_type]})" if model_type in _REFUSED else ""
    raise UnsupportedModel(
        f"model type {model_type or type(config).__name__!r} is not supported{reason}",
        f"one of {', '.join(sorted(_BY_MODEL_TYPE))}",
        "choose such a base model",
    )


def adapter_of(family: Family) -> Callable[[nn.Module, Attend], Callable[..., Any]] | None:
    """The adapted forward of a family's attention modules, None where the attention interface serves."""
    return adapted_forward if family.own_adapter else None


def position_limit(config: PretrainedConfig) -> int | None:
    """How many tokens fit a model's table of positions; None where its configuration names no limit."""
    limit: int | None = getattr(config, "max_target_positions", None) or getattr(
        config, "max_position_embeddings", None
    )
    if limit is not None and "roberta" in config.model_type:
        limit -= config.pad_token_id + 1  # their positions begin behind the padding's
    return limit


def find_sites(model: nn.Module, family: Family) -> Iterator[tuple[Site, nn.Module]]:
    """The attention modules of a model with their sites, stack by stack in the order of the layers.

    A module that serves several layers (ALBERT) comes once for each of them.
    """
    found: dict[Site, nn.Module] = {}
    for stack, pattern in family.places.items():
        regex = re.compile(rf"(?:^|\.){pattern}$")
        for name, module in model.named_modules():
            match = regex.search(name)
            if match and not (stack == "decoder" and family.kind == "decoder" and "encoder" in name):
                found[Site(stack, int(match.group(1)))] = module
    if family.shared_layers:
        config: Any = model.config
        groups, layers = config.num_hidden_groups, config.num_hidden_layers
        found = {Site("encoder", i): found[Site("encoder", int(i / (layers / groups)))] for i in range(layers)}
    return iter(sorted(found.items(), key=lambda item: (list(family.places).index(item[0].stack), item[0].layer)))
