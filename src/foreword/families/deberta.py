"""DeBERTa-v2, whose disentangled attention does not go through the attention interface of transformers.

Its scores are content-to-content plus two position terms, all divided by sqrt(head_dim · terms). A prefix has
content but no position, so its slots get the content-to-content score alone, scaled alike, in the same softmax.
Source: DeBERTa, arXiv 2006.03654, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor

__all__ = ["Attend", "adapted_forward"]


class Attend(Protocol):
    """What computes the attention once queries, keys, values and position scores are known.

    query, key, value `[batch, heads, tokens, head_dim]`, mask bool (True = seen) `[batch, 1, tokens, tokens]`,
    position_bias() `[batch, heads, tokens, tokens]` or None, to be added to `scaling · query · key` of the text only.
    Returns `[batch, heads, tokens, head_dim]`, or None for "no prefix is read here".
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        mask: Tensor,
        position_bias: Callable[[], Tensor | None],
        dropout: float = 0.0,
    ) -> Tensor | None:
        """The attention's output, or None."""
        ...


def adapted_forward(module: Any, attend: Attend) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The forward of a `DisentangledSelfAttention` with its softmax given to `attend`.

    Queries, keys, values and position scores are the module's own. Where `attend` returns None, the module's own
    forward runs instead, so that nothing changes without a prefix, bit for bit. With a prefix no attention
    weights are returned: `attend` need not form them.
    """
    original = module.forward
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
    ) -> tuple[Tensor, Tensor | None]:
        heads, source = module.num_attention_heads, hidden_states if query_states is None else query_states
        query = module.transpose_for_scores(module.query_proj(source), heads)
        key = module.transpose_for_scores(module.key_proj(hidden_states), heads)
        value = module.transpose_for_scores(module.value_proj(hidden_states), heads)

        def position_bias() -> Tensor | None:
            if not module.relative_attention:
                return None
            embeddings = module.pos_dropout(rel_embeddings)
            bias = module.disentangled_attention_bias(query, key, relative_pos, embeddings, terms)
            return split(bias) if isinstance(bias, Tensor) else None

        scaling = (query.shape[-1] * terms) ** -0.5
        dropout = module.dropout.p if module.training else 0.0
        out = attend(split(query), split(key), split(value), scaling, attention_mask.bool(), position_bias, dropout)
        if out is None:
            arguments = (hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings)
            return cast("tuple[Tensor, Tensor | None]", original(*arguments))
        return out.transpose(1, 2).flatten(2), None

    return forward
