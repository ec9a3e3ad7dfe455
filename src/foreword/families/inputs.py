"""What a model of any family is given: the smallest inputs that run it, and the positions it would use itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foreword.errors import PrefixError

__all__ = ["default_positions", "smallest_inputs"]


def smallest_inputs(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """The smallest inputs that run a model once: two tokens, one image, or one stretch of silence."""
    config, device = model.config, model.device
    tokens = torch.ones(1, 2, dtype=torch.long, device=device)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, config.num_channels, height, width, dtype=model.dtype, device=device)}
    if model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        features = torch.zeros(1, config.num_mel_bins, frames, dtype=model.dtype, device=device)
        return {"input_features": features, "decoder_input_ids": tokens}
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if kind == "encoder-decoder":
        inputs["decoder_input_ids"] = tokens
    if kind != "encoder":
        inputs["use_cache"] = False
    return inputs


def default_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The position ids that a model would use itself for these forward arguments, `[batch or 1, tokens]`."""
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise PrefixError(
            f"a prefix with a position offset is attached to {type(model).__name__}, which takes no position_ids",
            "a prefix with position offset 0",
            "train the prefix with its native offset",
        )
    ids, cache, mask = inputs.get("input_ids"), inputs.get("past_key_values"), inputs.get("attention_mask")
    tokens = ids.shape[1] if ids is not None else cast(Tensor, inputs.get("inputs_embeds")).shape[1]
    first = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    if first and ids is not None:
        seen = ids.ne(model.config.pad_token_id).long()
        return seen.cumsum(1) * seen + model.config.pad_token_id
    past = 0 if cache is None else cache.get_seq_length()
    if model.config.model_type == "opt" and mask is not None:
        return (mask.cumsum(1) * mask - 1).long()[:, past:]
    return torch.arange(first + past, first + past + tokens, device=model.device)[None]
