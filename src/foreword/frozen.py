"""Faster training steps of a frozen model on CPU, with the same results.

Inside `frozen_training` the weights can have no gradient, and that is worth much: a decoder layer of the Llama kind
runs as three nodes of the autograd graph (norm, projections and rotation; attention; output projection and MLP) whose
hand-written backwards take the gradient to the activations alone, keep few tensors and make few passes over memory;
in float32 its products, and those of every other frozen linear module, go to oneDNN, which is faster than the default
and wants no packed copy of a weight. What is not known is left as it is. Sources and measurements:
`docs/training-speed.md`.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from foreword.interface import Binding

__all__ = ["frozen_training", "packed_weights"]

# Layers whose mathematics `_forward` knows: RMS norm, rotary attention, gated SiLU, two residuals.
_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_DTYPES = (torch.float32, torch.bfloat16)


@contextlib.contextmanager
def frozen_training(model: nn.Module) -> Iterator[None]:
    """Inside, forward and backward of a frozen model are faster on CPU and equal up to rounding; outside as before.

    Parameters and modules stay the objects they are; only some modules' `forward` is exchanged. Parts of the model
    that are trainable, sharded, hooked, elsewhere than on CPU or of an unknown kind are left alone, as is every
    call with a key/value cache. Enter it before anything else wraps the layers, and leave it after.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model, ids = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False), torch.tensor([[1, 2, 3]])
    >>> before = model(ids).logits
    >>> with frozen_training(model):
    ...     torch.allclose(model(ids).logits, before, atol=1e-5)
    True
    """
    exchanged: list[nn.Module] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, exchanged)
        for layer in model.modules():
            if _is_known(layer):
                _exchange(layer, _LayerForward(layer), exchanged)
        for module in model.modules():
            if _is_linear(module):
                _exchange(module, _linear_forward(module), exchanged)
        if exchanged:
            stack.enter_context(_kept_memory())
        yield


# Where a module keeps weights a second time, laid out for products with few rows.
_PACKED = "_foreword_packed"
_FEW_ROWS = 32
_MOST_PACKED_BYTES = 4 << 30


@contextlib.contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, linear maps of a frozen model on CPU also hold their weights as oneDNN multiplies them with few rows.

    For passes without gradients. It takes as much memory as these weights again; models with more than 4 GB of them are
    left as they are. Enter it inside of `frozen_training`.
    """
    linears = {m: None for m in model.modules() if type(m) is nn.Linear and _is_frozen(m)}
    if not _has_onednn() or sum(linear.weight.nbytes for linear in linears) > _MOST_PACKED_BYTES:
        yield
        return
    holders: list[nn.Module] = []
    exchanged: list[nn.Module] = []
    try:
        for layer in model.modules():
            if isinstance(layer.__dict__.get("forward"), _LayerForward):
                for module, parts in _side_by_side(layer):
                    _pack(module, parts, holders)
                    for part in parts:
                        linears.pop(part, None)
        for linear in linears:
            _pack(linear, (linear,), holders)
            if "forward" not in linear.__dict__:
                _exchange(linear, _linear_forward(linear), exchanged)
        yield
    finally:
        _restore(exchanged)
        for holder in holders:
            holder.__dict__.pop(_PACKED, None)


def _pack(holder: nn.Module, linears: tuple[Any, ...], holders: list[nn.Module]) -> None:
    """Let a module hold the weights of linear maps of the same inputs, packed as one."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    if biases and len(biases) < len(linears):
        biases = [
            linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in linears
        ]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _FEW_ROWS)
    holder.__dict__[_PACKED] = _Weight(packed, torch.cat(biases) if biases else None)
    holders.append(holder)


def _exchange(module: nn.Module, forward: Callable[..., Any], exchanged: list[nn.Module]) -> None:
    module.__dict__["forward"] = forward
    exchanged.append(module)


def _restore(exchanged: list[nn.Module]) -> None:
    for module in exchanged:
        module.__dict__.pop("forward", None)


# Memory between steps

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_users: list[str] = []  # contexts that are open, one inside the other


@contextlib.contextmanager
def _kept_memory() -> Iterator[None]:
    """Inside, glibc keeps what a step frees for the next one, which is spared tens of thousands of page faults.

    Afterwards the memory is given back, and the thresholds are those that glibc itself ends at when large blocks
    have been freed. Other allocators are left alone.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):
        yield
        return
    _users.append("frozen_training")
    try:
        if len(_users) == 1:
            mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        yield
    finally:
        _users.pop()
        if not _users:
            mallopt(_M_MMAP_THRESHOLD, 32 << 20)
            mallopt(_M_TRIM_THRESHOLD, 64 << 20)
            trim(0)


# What is known


def _is_frozen(module: nn.Module) -> bool:
    """Whether all parameters are ordinary ones on CPU without gradients, of one dtype that is known."""
    parameters = list(module.parameters())
    return len({p.dtype for p in parameters}) == 1 and all(
        type(p) is nn.Parameter and not p.requires_grad and p.device.type == "cpu" and p.dtype in _DTYPES
        for p in parameters
    )


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a frozen linear map in float32, with a `forward` that nobody has exchanged."""
    if type(module) not in (nn.Linear, Conv1D) or "forward" in module.__dict__ or not _is_frozen(module):
        return False
    return module.weight.dtype == torch.float32 and _has_onednn()


def _is_known(layer: Any) -> bool:
    """Whether a module is a layer that `_forward` computes: its parts, not only its name."""
    if type(layer).__name__ not in _LAYERS or not type(layer).__module__.startswith("transformers.models."):
        return False
    if any("forward" in module.__dict__ for module in layer.modules()) or not _is_frozen(layer):
        return False
    linears = _linears(layer)
    activation = layer.mlp.act_fn
    return (
        all(type(module) is nn.Linear for module in linears)
        and type(activation).__name__ in ("SiLU", "SiLUActivation")
        and all(hasattr(norm, "variance_epsilon") for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    )


def _linears(layer: Any) -> tuple[nn.Module, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    )  # fmt: skip


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody else listens to a module; what `foreword.attention` listens for is handed to it directly."""
    others = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, Binding)]
    return bool(module._forward_hooks or others or module._backward_hooks)


# A decoder layer


def _side_by_side(layer: Any) -> tuple[tuple[nn.Module, tuple[Any, ...]], ...]:
    """Linear maps of a layer that have the same inputs, with the module that they are in."""
    attention, mlp = layer.self_attn, layer.mlp
    return (attention, (attention.q_proj, attention.k_proj, attention.v_proj)), (mlp, (mlp.gate_proj, mlp.up_proj))


class _LayerForward:
    """The exchanged `forward` of a decoder layer."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.original = layer, layer.forward
        self.eager = getattr(sys.modules[type(layer.self_attn).__module__], "eager_attention_forward", None)
        self.parts = [module for module in layer.modules() if module is not layer]

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        layer, attention = self.layer, self.layer.self_attn
        weight = attention.q_proj.weight
        if (
            past_key_values is not None
            or position_embeddings is None
            or position_embeddings[0].shape[-1] != attention.head_dim
            or hidden_states.dtype != weight.dtype
            or not hidden_states.device == weight.device == position_embeddings[0].device
            or (layer.gradient_checkpointing and layer.training)
            or torch.is_autocast_enabled("cpu")
            or any(_is_hooked(part) for part in self.parts)
        ):
            return cast(
                Tensor,
                self.original(
                    hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                    past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings,
                    **kwargs,
                ),
            )  # fmt: skip
        query, key, value = _Inputs.apply(hidden_states, *position_embeddings, layer)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, self.eager)
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        attended, _ = attend(
            attention, query, key, value, attention_mask,
            dropout=attention.attention_dropout if attention.training else 0.0, scaling=attention.scaling,
            position_ids=position_ids, use_cache=use_cache, gate_hidden=lambda: layer.input_layernorm(hidden_states),
            **({} if window is None else {"sliding_window": window}), **kwargs,
        )  # fmt: skip
        return cast(Tensor, _Outputs.apply(hidden_states, attended, layer))


class _Inputs(torch.autograd.Function):
    """Norm, the three projections, the norms of heads where there are some, and the rotation.

    `[batch, tokens, hidden]` to query, key and value `[batch, heads or kv_heads, tokens, head_dim]`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, cos: Tensor, sin: Tensor, layer: Any) -> tuple[Tensor, ...]:
        attention = layer.self_attn
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        normed, scale = _norm(hidden, layer.input_layernorm)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        query, key, value = (each.view(shape) for each in _linears_of(normed, attention, projections))
        heads: list[Tensor] = []
        if hasattr(attention, "q_norm"):
            before = query, key
            query, query_scale = _norm(query, attention.q_norm)
            key, key_scale = _norm(key, attention.k_norm)
            heads = [*before, query_scale, key_scale]
        ctx.save_for_backward(hidden, scale, cos, sin, *heads)
        ctx.layer = layer
        return _rotate(query.transpose(1, 2), cos, sin), _rotate(key.transpose(1, 2), cos, sin), value.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, scale, cos, sin, *heads = ctx.saved_tensors
        layer, attention = ctx.layer, ctx.layer.self_attn
        query, key = (_rotate(grad, cos, -sin).transpose(1, 2) for grad in grads[:2])
        value = grads[2].transpose(1, 2)
        if heads:
            query = _norm_backward(query, heads[0], heads[2], attention.q_norm)
            key = _norm_backward(key, heads[1], heads[3], attention.k_norm)
        grad = _input_grad(query.flatten(2), attention.q_proj)
        grad = _input_grad(key.flatten(2), attention.k_proj, grad)
        grad = _input_grad(value.flatten(2), attention.v_proj, grad)
        return _norm_backward(grad, hidden, scale, layer.input_layernorm), None, None, None


class _Outputs(torch.autograd.Function):
    """Output projection, residual, norm, gated MLP, residual; `[batch, tokens, hidden]`.

    Of the MLP only the two inputs of the gate are kept.
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, attended: Tensor, layer: Any) -> Tensor:
        attended = attended.reshape(*residual.shape[:2], -1)
        hidden = _linear(attended, layer.self_attn.o_proj, residual)
        normed, scale = _norm(hidden, layer.post_attention_layernorm)
        gate, up = _linears_of(normed, layer.mlp, (layer.mlp.gate_proj, layer.mlp.up_proj))
        ctx.save_for_backward(hidden, scale, gate, up)
        ctx.layer = layer
        return _linear(nn.functional.silu(gate).mul_(up), layer.mlp.down_proj, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, scale, gate, up = ctx.saved_tensors
        layer, mlp, attention = ctx.layer, ctx.layer.mlp, ctx.layer.self_attn
        inner = _input_grad(grad, mlp.down_proj)
        grad_up = nn.functional.silu(gate).mul_(inner)
        grad_gate = torch.ops.aten.silu_backward(inner.mul_(up), gate)
        normed = _input_grad(grad_up, mlp.up_proj, _input_grad(grad_gate, mlp.gate_proj))
        grad = _norm_backward(normed, hidden, scale, layer.post_attention_layernorm, grad)
        attended = None
        if ctx.needs_input_grad[1]:
            attended = _input_grad(grad, attention.o_proj).view(*grad.shape[:2], -1, attention.head_dim)
        return grad, attended, None


# Its parts


def _norm(inputs: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, and the scale of each vector in float32."""
    length = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(inputs.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return (inputs * scale).to(inputs.dtype).mul_(norm.weight), scale


def _norm_backward(grad: Tensor, inputs: Tensor, scale: Tensor, norm: Any, residual: Tensor | None = None) -> Tensor:
    """The gradient of `_norm` in its inputs, plus that of a residual beside it."""
    inputs = inputs.float()
    inner = grad * norm.weight
    inner = inner.float()
    along = (inner * inputs).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(inputs.shape[-1])
    inner.mul_(scale).addcmul_(inputs, along, value=-1.0)
    if residual is not None:
        inner.add_(residual)
    return inner.to(grad.dtype)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of `[batch, heads, tokens, head_dim]`, contiguous; the reverse with -sin.

    Cosine and sine `[batch or 1, tokens, head_dim]` repeat after half of the dimensions.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    half = heads.shape[-1] // 2
    out = heads.new_empty(heads.shape)
    torch.mul(heads, cos, out=out)
    out[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1.0)
    out[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return out


# Frozen linear maps


class _Weight(NamedTuple):
    """A linear map: weight `[out, in]` (of a GPT-2 `Conv1D` a transposed view) and bias."""

    weight: Tensor
    bias: Tensor | None


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(inputs: Tensor, linear: Any, onto: Tensor | None = None) -> Tensor:
    """The linear map, added to `onto` (of the output's shape) if given."""
    weight, bias = linear.weight, linear.bias
    packed = None if torch.is_grad_enabled() else getattr(linear, _PACKED, None)
    if packed is not None or (inputs.dtype == torch.float32 and _has_onednn()):
        weight = weight if packed is None else packed.weight
        if onto is None:
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], ""))
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise.binary(inputs, onto, weight, bias, "add"))
    if onto is None:
        return nn.functional.linear(inputs, weight, bias)
    out = torch.addmm(onto.flatten(0, -2), inputs.flatten(0, -2), weight.t()).view(onto.shape)
    return out if bias is None else out.add_(bias)


def _linears_of(inputs: Tensor, module: nn.Module, linears: tuple[Any, ...]) -> Sequence[Tensor]:
    """Linear maps of the same inputs; one product if their module holds them packed."""
    packed = module.__dict__.get(_PACKED)
    if packed is None:
        return [_linear(inputs, linear) for linear in linears]
    together = torch.ops.mkldnn._linear_pointwise(inputs, packed.weight, packed.bias, "none", [], "")
    return cast(Tensor, together).split([len(linear.weight) for linear in linears], dim=-1)


def _input_grad(grad: Tensor, linear: Any, onto: Tensor | None = None) -> Tensor:
    """The gradient of the linear map in its inputs, added to `onto` if given."""
    return _linear(grad, _Weight(linear.weight.t(), None), onto)


class _Linear(torch.autograd.Function):
    """A frozen linear map; nothing is kept but the weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: _Weight) -> Tensor:
        ctx.weight = weight
        return _linear(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _input_grad(grad, ctx.weight), None


def _linear_forward(module: Any) -> Callable[[Tensor], Tensor]:
    """The exchanged `forward` of an `nn.Linear` or a `Conv1D`."""
    original = module.forward

    def forward(input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        weight = module.weight
        if input.dtype != weight.dtype or input.device != weight.device or torch.is_autocast_enabled("cpu"):
            return cast(Tensor, original(input))
        if not torch.is_grad_enabled() and _PACKED in module.__dict__:
            return _linear(input, module)
        weight = weight.t() if type(module) is Conv1D else weight
        return cast(Tensor, _Linear.apply(input, _Weight(weight, module.bias)))

    return forward
