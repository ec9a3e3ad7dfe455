"""DeBERTa-v2, whose disentangled attention does not go through the attention interface of transformers.

Its scores are content-to-content plus two position terms, all divided by sqrt(head_dim · terms). A prefix has
content but no position, so its slots get the content-to-content score alone, scaled alike, in the same softmax.
Source: DeBERTa, arXiv 2006.03654, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Attend", "adapted_forward"]


class Attend(Protocol):
    """What computes the attention once queries, keys, values and position scores are known.

    query, key, value `[batch, heads, tokens, head_dim]`, mask bool (True = seen) `[batch, 1, tokens, tokens]`,
    position_bias `[batch, heads, tokens, tokens]` or None, to be added to `scaling · query · key` of the text only.
    Returns `[batch, heads, tokens, head_dim]`.
    """

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        *,
        scaling: float,
        position_bias: Tensor | None,
        dropout: float,
    ) -> Tensor: ...


def adapted_forward(module: Any, attend: Attend) -> Callable[..., tuple[Tensor, None]]:
    """The forward of a `DisentangledSelfAttention` with its softmax given to `attend`.

    Queries, keys, values and position scores are the module's own. The attention weights are not returned:
    `attend` need not form them. Where no prefix is in use, call the module's own forward instead; this one
    equals it within rounding.
    """
    terms = 1 + sum(term in module.pos_att_type for term in ("c2p", "p2c"))

    def split(joined: Tensor) -> Tensor:
        heads: int = module.num_attention_heads
        return joined.view(-1, heads, *joined.shape[1:])

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        heads = module.num_attention_heads
        source = hidden_states if query_states is None else query_states
        query = module.transpose_for_scores(module.query_proj(source), heads)
        key = module.transpose_for_scores(module.key_proj(hidden_states), heads)
        value = module.transpose_for_scores(module.value_proj(hidden_states), heads)
        bias = None
        if module.relative_attention:
            embeddings = module.pos_dropout(rel_embeddings)
            bias = module.disentangled_attention_bias(query, key, relative_pos, embeddings, terms)
            bias = split(bias) if isinstance(bias, Tensor) else None
        out = attend(
            module,
            split(query),
            split(key),
            split(value),
            attention_mask.bool(),
            scaling=(query.shape[-1] * terms) ** -0.5,
            position_bias=bias,
            dropout=module.dropout.p if module.training else 0.0,
        )
        return out.transpose(1, 2).flatten(2), None

    return forward
