"""The fast ways to attend over prefix slots and text; each equals `foreword.prefix.prefix_attention`.

Which one is taken is decided by `attend`, from the shapes and the device alone:

* `short_attention`   one explicit softmax with a hand-written backward; few tokens, any device
* `merged_attention`  the fused CPU kernel over the text, the prefix beside it, merged by log-sum-exp
* `joined_attention`  prefix and text concatenated for PyTorch's fused attention; long texts elsewhere
* `prefix_attention`  the reference; softcap, sinks and dropout, which the others leave to it
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foreword.prefix import prefix_attention

__all__ = ["Slots", "attend", "joined_attention", "merged_attention", "short_attention"]

# Up to this many scores per row and head an explicit softmax beats the fused kernels (benchmarks/attention.py).
SHORT_SCORES = 256 * 256


class Slots(NamedTuple):
    """What the rows of one call read at one site.

    keys, values `[batch or 1, kv_heads, slots, dim]`; bias broadcastable to `[batch, heads, tokens, slots]`, -inf
    where a slot is not the row's; gate `[batch or 1, 1, tokens or 1, slots]`, a factor on each slot's key and value.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    gate: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Slots:
        """The same slots with `function` applied to every tensor."""
        return Slots(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]


def _in_autocast_dtype(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function that, under autocast, works in autocast's dtype throughout, as PyTorch's own attention does."""

    @functools.wraps(attend)
    def attend_cast(query: Tensor, key: Tensor, value: Tensor, slots: Slots, **options: Any) -> Tensor:
        device = query.device.type
        if not torch.is_autocast_enabled(device) or query.dtype == torch.float64:
            return attend(query, key, value, slots, **options)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            slots = slots.map(lambda tensor: tensor.to(dtype))
            return attend(query.to(dtype), key.to(dtype), value.to(dtype), slots, **options)

    return attend_cast


@_in_autocast_dtype
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    *,
    scaling: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over the rows' prefix slots and the text, the fastest exact way; `[batch, heads, tokens, value_dim]`.

    `mask` is the model's own, bool (True = seen) or additive, `[batch or 1, heads or 1, tokens, keys]`; None
    with `is_causal` means causal. The mask, `position_bias` and the window that the mask holds concern the
    text only: slots are always seen.
    """
    tokens = query.shape[2]
    is_causal = is_causal and mask is None and tokens > 1
    if is_causal and key.shape[2] > tokens:  # an empty static cache: its tail holds nothing yet
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        position_bias = None if position_bias is None else position_bias[..., :tokens]
    plain = softcap is None and sinks is None and dropout == 0.0
    short = tokens * key.shape[2] <= SHORT_SCORES
    learns_bias = position_bias is not None and position_bias.requires_grad
    fused = query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and not learns_bias
    if plain and not short and fused:
        text_bias = _text_bias(query, key, mask, is_causal and position_bias is not None, position_bias)
        return merged_attention(query, key, value, slots, text_bias, scaling, is_causal and position_bias is None)
    text_bias = _text_bias(query, key, mask, is_causal, position_bias)
    if not plain:
        return prefix_attention(
            query, key, value, *slots[:2], scaling=scaling, text_bias=text_bias, prefix_bias=slots.bias,
            prefix_gate=slots.gate, softcap=softcap, sinks=sinks, dropout=dropout,
        )  # fmt: skip
    if short:
        return short_attention(query, key, value, slots, text_bias, scaling)
    return joined_attention(query, key, value, slots, text_bias, scaling)


def _text_bias(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, position_bias: Tensor | None
) -> Tensor | None:
    """Mask and position bias as one additive tensor in the query's dtype.

    Finite everywhere, also after scores are added in half precision, so that a padding row that sees nothing is
    no NaN; only foreign slots get -inf.
    """
    lowest = torch.finfo(query.dtype).min / 2
    bias = None
    if mask is None and is_causal:
        tokens, keys = query.shape[2], key.shape[2]
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        if mask.dtype == torch.bool:
            bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, lowest)
        else:
            bias = mask[..., : key.shape[2]].to(query.dtype).clamp_min(lowest)
    if position_bias is not None:
        position_bias = position_bias.to(query.dtype)
        bias = position_bias if bias is None else (position_bias + bias).clamp_min(lowest)
    return bias


def _joined_bias(slots: Slots, text_bias: Tensor | None, text: Tensor) -> Tensor | None:
    """Slot bias and text bias side by side, `[batch or 1, heads or 1, tokens or 1, slots + keys]`."""
    if slots.bias is None and text_bias is None:
        return None
    width = slots.keys.shape[2]
    left = text.new_zeros(1, 1, 1, width) if slots.bias is None else slots.bias.to(text.dtype)
    right = text.new_zeros(1, 1, 1, text.shape[2]) if text_bias is None else text_bias
    outer = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
    return torch.cat([left.expand(*outer, -1), right.expand(*outer, -1)], dim=-1)


def _join(slots: Tensor, text: Tensor) -> Tensor:
    return torch.cat([slots.expand(text.shape[0], -1, -1, -1), text], dim=2)


def joined_attention(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots, text_bias: Tensor | None, scaling: float
) -> Tensor:
    """Prefix and text concatenated for `scaled_dot_product_attention`, always with an explicit mask."""
    groups = query.shape[1] // key.shape[1]
    bias = _joined_bias(slots, text_bias, key)
    if slots.gate is not None and slots.gate.shape[2] > 1:
        return _joined_by_token(query, key, value, slots, slots.gate, bias, scaling)
    if slots.gate is not None:  # one gate for all queries of a row: on keys and values
        factor = slots.gate.transpose(2, 3)
        slots = Slots(slots.keys * factor, slots.values * factor, slots.bias)
    keys = _join(slots.keys, key).repeat_interleave(groups, 1)
    values = _join(slots.values, value).repeat_interleave(groups, 1)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling)


def _joined_by_token(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots, gate: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """The same where every query has its own gates, still by PyTorch's fused kernels.

    One more dimension per slot carries what differs from query to query: the query's holds its gated score with the
    slot, which the slot's key picks out, and the slot's value hands back the weight that the slot got.
    """
    batch, heads = query.shape[:2]
    groups, width, dim = heads // key.shape[1], slots.keys.shape[2], value.shape[-1]
    prefix_keys, prefix_values = (t.repeat_interleave(groups, 1) for t in (slots.keys, slots.values))
    scores = (query @ prefix_keys.transpose(2, 3)) * gate
    chosen = torch.eye(width, dtype=key.dtype, device=key.device).expand(batch, heads, width, width)
    pad = torch.nn.functional.pad
    queries = torch.cat([query, scores], dim=-1)
    keys = torch.cat([pad(chosen, (key.shape[-1], 0)), pad(key.repeat_interleave(groups, 1), (0, width))], dim=2)
    values = torch.cat([pad(chosen, (dim, 0)), pad(value.repeat_interleave(groups, 1), (0, width))], dim=2)
    out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scaling)
    return out[..., :dim] + (out[..., dim:] * gate) @ prefix_values


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots, text_bias: Tensor | None, scaling: float
) -> Tensor:
    """One explicit softmax over prefix and text, grouped by key/value head so that no head is copied."""
    bias = _joined_bias(slots, text_bias, key)
    keys, values = _join(slots.keys, key), _join(slots.values, value)
    out: Tensor = _ShortAttention.apply(query, keys, values, bias, slots.gate, scaling)
    return out


class _ShortAttention(torch.autograd.Function):
    """softmax(gate ⊙ q kᵀ · scaling + bias) (gate ⊙ v), keeping the weights for the backward.

    The gate `[batch or 1, 1, tokens or 1, slots]` is that of the first keys, the prefix's; the text's is 1.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, gate: Tensor | None, scaling: float
    ) -> Tensor:
        batch, heads, tokens, dim = query.shape
        kv_heads, width = keys.shape[1], keys.shape[2]
        groups = heads // kv_heads
        q = query.reshape(batch * kv_heads, groups * tokens, dim)
        k, v = keys.reshape(batch * kv_heads, width, -1), values.reshape(batch * kv_heads, width, -1)
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling).view(batch, kv_heads, groups, tokens, width)
        if gate is not None:
            scores[..., : gate.shape[-1]] *= gate.unsqueeze(2)
        if bias is not None:
            scores += _group_heads(bias, kv_heads, groups)
        weights = torch.softmax(scores, dim=-1)  # in float32 inside, also for half types
        out = torch.bmm(_gated(weights, gate).view(batch * kv_heads, groups * tokens, width), v)
        ctx.save_for_backward(q, k, v, weights, out, gate)
        ctx.scaling, ctx.bias_shape = scaling, None if bias is None else bias.shape
        ctx.shapes = query.shape, keys.shape, values.shape
        return out.view(batch, heads, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, out, gate = ctx.saved_tensors
        query_shape, keys_shape, values_shape = ctx.shapes
        grad = grad_out.reshape(out.shape)
        grad_query = grad_keys = grad_values = grad_bias = grad_gate = None
        flat = weights.view(q.shape[0], q.shape[1], -1)
        if ctx.needs_input_grad[2]:
            grad_values = torch.bmm(_gated(weights, gate).view(flat.shape).transpose(1, 2), grad).view(values_shape)
        if any(ctx.needs_input_grad[i] for i in (0, 1, 3, 4)):
            delta = (grad * out).sum(-1, keepdim=True)
            grad_scores = torch.bmm(grad, v.transpose(1, 2))
            if gate is not None:  # through the gated values
                slots, shape = gate.shape[-1], weights.shape
                by_value = grad_scores[..., :slots] * flat[..., :slots] if ctx.needs_input_grad[4] else None
                grad_scores.view(shape)[..., :slots] *= gate.unsqueeze(2)
            grad_scores.sub_(delta).mul_(flat)
            if ctx.needs_input_grad[3]:
                # a copy where nothing is summed: the scores go on to be scaled in place
                grad_bias = _ungroup(grad_scores.view(weights.shape), ctx.bias_shape).clone()
            grad_scores.mul_(ctx.scaling)
            if gate is not None:  # through the gated scores
                if by_value is not None:
                    by_value += grad_scores[..., :slots] * torch.bmm(q, k[:, :slots].transpose(1, 2))
                    grad_gate = _ungroup(by_value.view(*shape[:-1], slots), gate.shape)
                grad_scores.view(shape)[..., :slots] *= gate.unsqueeze(2)
            if ctx.needs_input_grad[0]:
                grad_query = torch.bmm(grad_scores, k).view(query_shape)
            if ctx.needs_input_grad[1]:
                grad_keys = torch.bmm(grad_scores.transpose(1, 2), q).view(keys_shape)
        return grad_query, grad_keys, grad_values, grad_bias, grad_gate, None


def _gated(weights: Tensor, gate: Tensor | None) -> Tensor:
    """The weights `[batch, kv_heads, groups, tokens, slots + keys]` with the slots' multiplied by the gate."""
    if gate is None:
        return weights
    gated = weights.clone()
    gated[..., : gate.shape[-1]] *= gate.unsqueeze(2)
    return gated


def _group_heads(bias: Tensor, kv_heads: int, groups: int) -> Tensor:
    """`[batch, heads or 1, tokens, keys]` as `[batch, kv_heads or 1, groups or 1, tokens, keys]`."""
    return bias.unsqueeze(2) if bias.shape[1] == 1 else bias.unflatten(1, (kv_heads, groups))


def _ungroup(grad: Tensor, shape: torch.Size) -> Tensor:
    """A gradient `[batch, kv_heads, groups, tokens, keys]` summed to the bias's own shape."""
    return grad.flatten(1, 2).sum_to_size(shape)


def merged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    text_bias: Tensor | None,
    scaling: float,
    is_causal: bool,
) -> Tensor:
    """The fused CPU kernel over the text, merged with the prefix branch through their log-sum-exp.

    Memory stays linear in the text. The text's backward gets the *merged* output and log-sum-exp, as in ring
    attention (arXiv 2310.01889), since the log-sum-exp of the kernel itself carries no gradient.
    """
    batch, heads, groups = query.shape[0], query.shape[1], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    prefix_keys = slots.keys.repeat_interleave(groups, 1).expand(batch, heads, -1, -1)
    prefix_values = slots.values.repeat_interleave(groups, 1).expand(batch, heads, -1, -1)
    out: Tensor = _MergedAttention.apply(
        query, key, value, prefix_keys, prefix_values, text_bias, slots.bias, slots.gate, scaling, is_causal
    )
    return out


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_keys: Tensor,
        prefix_values: Tensor,
        text_bias: Tensor | None,
        prefix_bias: Tensor | None,
        gate: Tensor | None,
        scaling: float,
        is_causal: bool,
    ) -> Tensor:
        if text_bias is not None:
            text_bias = text_bias.expand(-1, -1, query.shape[2], -1)
        text_out, text_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=text_bias, scale=scaling
        )
        text_lse = text_lse.to(torch.promote_types(query.dtype, torch.float32))
        scores = _prefix_scores(query, prefix_keys, prefix_bias, gate, scaling)
        prefix_lse = torch.logsumexp(scores, dim=-1)
        lse = torch.logaddexp(text_lse, prefix_lse)
        weights = (scores - lse.unsqueeze(-1)).exp().to(value.dtype)
        weights = weights if gate is None else weights * gate
        out = text_out * (text_lse - lse).exp().unsqueeze(-1).to(value.dtype) + weights @ prefix_values
        ctx.save_for_backward(query, key, value, prefix_keys, prefix_values, text_bias, prefix_bias, gate, out, lse)
        ctx.scaling, ctx.is_causal = scaling, is_causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_keys, prefix_values, text_bias, prefix_bias, gate, out, lse = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out.contiguous(), query, key, value, out, lse, 0.0, ctx.is_causal,
            attn_mask=text_bias, scale=ctx.scaling,
        )  # fmt: skip
        scores = _prefix_scores(query, prefix_keys, prefix_bias, gate, ctx.scaling)
        weights = (scores - lse.unsqueeze(-1)).exp()
        delta = (grad_out * out).sum(-1, keepdim=True)
        by_value = grad_out @ prefix_values.transpose(2, 3)
        grad_scores = weights * ((by_value if gate is None else by_value * gate) - delta)
        grad_bias = None if prefix_bias is None else grad_scores.sum_to_size(prefix_bias.shape)
        grad_scores = grad_scores * ctx.scaling
        grad_gate = None
        if gate is not None:
            raw = query @ prefix_keys.transpose(2, 3)
            grad_gate = (weights * by_value + grad_scores * raw).sum_to_size(gate.shape).to(gate.dtype)
            weights, grad_scores = weights * gate, grad_scores * gate
        grad_scores = grad_scores.to(query.dtype)
        grad_query = grad_query + grad_scores @ prefix_keys
        grad_prefix_keys = grad_scores.transpose(2, 3) @ query
        grad_prefix_values = weights.to(query.dtype).transpose(2, 3) @ grad_out
        grads = (grad_query, grad_key, grad_value, grad_prefix_keys, grad_prefix_values)
        return *grads, None, grad_bias, grad_gate, None, None


def _prefix_scores(
    query: Tensor, prefix_keys: Tensor, prefix_bias: Tensor | None, gate: Tensor | None, scaling: float
) -> Tensor:
    scores = (query @ prefix_keys.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32)) * scaling
    scores = scores if gate is None else scores * gate
    return scores if prefix_bias is None else scores + prefix_bias
