"""The attention function that `transformers` calls in an attached model, and what a module of it knows.

`_forward` reads the slots of its module in the running forward pass and attends over slots and text together. Without
slots the model's own attention runs, untouched. The registry is touched nowhere else.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from foreword.bank import AttendingCall, AttentionOptions, Pass
from foreword.errors import PrefixError, UnsupportedModel
from foreword.gates import GateInput
from foreword.kernels import Slots, attend
from foreword.prefix import Site

if TYPE_CHECKING:
    from foreword.attention import Attachment

__all__ = ["ATTRIBUTE", "EAGER", "SDPA", "Binding", "attend_adapted", "seen_tokens"]

# The names under which models find our function; each keeps the mask format and the text attention of its twin.
SDPA, EAGER = "foreword", "foreword_eager"
ATTRIBUTE = "_foreword"


class Binding:
    """What an attention module of an attached model knows: its attachment and the sites it serves in turn.

    As a forward pre-hook of the module it sees what enters it, which gates read.
    """

    def __init__(self, attachment: Attachment, sites: list[Site]) -> None:
        self.attachment, self.sites, self.turn = attachment, sites, 0
        self.hidden: Tensor | Callable[[], Tensor] | None = None

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden = args[0] if args else kwargs["hidden_states"]

    def next(self) -> tuple[Site, Tensor | Callable[[], Tensor] | None]:
        """The site of this turn, and what enters it."""
        site = self.sites[self.turn % len(self.sites)]
        self.turn += 1
        hidden, self.hidden = self.hidden, None
        return site, hidden

    def slots(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        prefix_ids: Tensor | Pass | None = None,
    ) -> Slots | None:
        """The slots that the module reads in this turn, None for none; what is to be recorded is recorded."""
        attachment = self.attachment
        site, hidden = self.next()
        if attachment.recorded is not None:
            attachment.recorded[site] = (key.detach(), value.detach())
            if isinstance(hidden, Tensor):
                attachment.hidden_sizes[site] = hidden.shape[-1]
        running = attachment.resolve(prefix_ids)
        given = GateInput(
            functools.partial(_found, hidden, site), functools.partial(seen_tokens, mask),
            running.prompt, running.kept, running.goes_on,
        )  # fmt: skip
        slots = running.call.slots(site, query, given)
        if attachment.seen_gates is not None and slots is not None and slots.gate is not None:
            attachment.seen_gates[site] = slots.gate.detach()[:, 0]
        return slots


def _found(hidden: Tensor | Callable[[], Tensor] | None, site: Site) -> Tensor:
    """What enters the attention module."""
    if hidden is None:
        raise PrefixError(
            f"the gates at {site} find no hidden states", "an attention module that is called as a module",
            "attach the model again after changing it",
        )  # fmt: skip
    return hidden() if callable(hidden) else hidden


def seen_tokens(mask: Tensor | None) -> Tensor | None:
    """Which keys any query sees under a mask of attention, bool `[batch or 1, keys]`.

    In a pass over a whole text these are all tokens but padding: each sees itself at least.
    """
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.any(-2).any(1)


def _text_attention(module: nn.Module, eager: bool) -> Callable[..., Any]:
    """The attention that the model would run without us."""
    if not eager:
        return sdpa_attention_forward
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return cast(Callable[..., Any], function)
    raise UnsupportedModel(f"{type(module).__name__} has no eager attention", "a transformers attention module")


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    eager: bool,
    prefix_ids: Tensor | Pass | None = None,
    gate_hidden: Callable[[], Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; `[batch, tokens, heads, value_dim]` and the weights, if the text's own.

    `gate_hidden` makes what gates read where the module itself is not called (`foreword.frozen`).
    """
    binding = module.__dict__.get(ATTRIBUTE)
    if binding is None:
        raise UnsupportedModel(
            f"{type(module).__name__} is no attention site of an attached model",
            "modules that were there when the model was attached",
            "attach the model again after changing it; give it a configuration of its own if it shares one",
        )
    if gate_hidden is not None:
        binding.hidden = gate_hidden
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap") if eager else None  # before 5.21 transformers leaves it out of SDPA
    call = binding.attachment.resolve(prefix_ids).call
    if isinstance(call, AttendingCall):
        site, hidden = binding.next()
        options = AttentionOptions(scaling, kwargs.get("sliding_window"), softcap, kwargs.get("s_aux"))
        out = call.attend(site, query, key, value, functools.partial(_found, hidden, site), options)
        return out.transpose(1, 2).contiguous(), None
    slots = binding.slots(query, key, value, attention_mask, prefix_ids)
    if slots is None:
        return cast(
            "tuple[Tensor, Tensor | None]",
            _text_attention(module, eager)(module, query, key, value, attention_mask, **kwargs),
        )
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attend(
        query,
        key,
        value,
        slots,
        scaling=scaling,
        mask=attention_mask,
        is_causal=bool(is_causal) and not eager,
        position_bias=kwargs.get("position_bias"),
        softcap=softcap,
        sinks=kwargs.get("s_aux"),
        dropout=kwargs.get("dropout") or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA, functools.partial(_forward, eager=False))
AttentionInterface.register(EAGER, functools.partial(_forward, eager=True))
AttentionMaskInterface.register(SDPA, sdpa_mask)
AttentionMaskInterface.register(EAGER, eager_mask)


def attend_adapted(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor,
    position_bias: Callable[[], Tensor | None],
    dropout: float = 0.0,
) -> Tensor | None:
    """What a family's own adapter calls; None when no prefix is read, so that it runs the original."""
    slots = module.__dict__[ATTRIBUTE].slots(query, key, value, mask)
    if slots is None:
        return None
    bias = position_bias()
    return attend(query, key, value, slots, scaling=scaling, mask=mask, position_bias=bias, dropout=dropout)
