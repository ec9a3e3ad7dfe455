"""The mathematics of a prefix, on plain tensors: what it holds, how it attends, how it is folded and cut.

Shapes are in axis words. `kv_heads` are the model's key/value heads, `prefix` counts slots, `slots` counts
the slots of all prefixes that one call reads. Logits and masses are natural logarithms; -inf means removed.

Nothing here knows `transformers`; `foreword.attention` brings these functions into a model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from foreword.errors import PrefixMismatch

if TYPE_CHECKING:
    from foreword.base import BaseModel

__all__ = [
    "POOLINGS",
    "Gate",
    "Geometry",
    "Head",
    "Prefix",
    "Site",
    "SiteShape",
    "SiteTensors",
    "Sites",
    "SiteGroup",
    "compact",
    "group_sites",
    "merge_attention",
    "prefix_attention",
]


class Site(NamedTuple):
    """One attention module's use: the stack it belongs to and its layer.

    >>> str(Site("cross", 3)), Site.parse("decoder.0")
    ('cross.3', Site(stack='decoder', layer=0))
    """

    stack: str
    layer: int

    def __str__(self) -> str:
        return f"{self.stack}.{self.layer}"

    @classmethod
    def parse(cls, name: str) -> Site:
        stack, _, layer = name.rpartition(".")
        return cls(stack, int(layer))


class SiteGroup(NamedTuple):
    """Sites of one stack that are alike, so that their tensors can be stacked; the name is the stack's."""

    name: str
    sites: list[Site]


def group_sites(sites: Iterable[Site], like: Callable[[Site], object]) -> list[SiteGroup]:
    """Sites of one stack that are `like` each other, in order; the name of a stack's second group ends in 2.

    >>> [group.name for group in group_sites([Site("decoder", k) for k in range(3)], lambda site: site.layer > 1)]
    ['decoder', 'decoder2']
    """
    groups: dict[tuple[str, object], SiteGroup] = {}
    for site in sites:
        key = site.stack, like(site)
        if key not in groups:
            number = 1 + sum(stack == site.stack for stack, _ in groups)
            groups[key] = SiteGroup(site.stack if number == 1 else f"{site.stack}{number}", [])
        groups[key].sites.append(site)
    return list(groups.values())


class SiteShape(NamedTuple):
    """What a site's keys and values look like; keys and values differ in width where attention is latent."""

    kv_heads: int
    key_dim: int
    value_dim: int


# What an input-dependent gate reads: each token by itself, the first token, all tokens, or the prompt's alone.
POOLINGS = ("token", "cls", "mean", "prompt")


class Gate(NamedTuple):
    """APT's token gate at one site: α = sigmoid(h · weight) in [0, 1], a factor on the keys and values of each slot.

    `weight` is `[hidden, prefix]`. h is what enters the site's attention module: each token by itself (`token`, the
    only one that is causal), or one vector for the row: its first token (`cls`), the mean of its tokens (`mean`), or
    the mean of its prompt's tokens (`prompt`, for decoders). Source: APT, arXiv 2305.15212, eq. 3.
    """

    weight: Tensor
    pooling: str


class SiteTensors(NamedTuple):
    """The prefix at one site: keys `[kv_heads, prefix, key_dim]`, values `[kv_heads, prefix, value_dim]`.

    `log_mass` `[prefix]` is the logarithm of the `mass` gate, added to the slots' attention logits. `gate` depends
    on the text; gates that do not are already multiplied into keys and values.
    """

    keys: Tensor
    values: Tensor
    log_mass: Tensor | None = None
    gate: Gate | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    @property
    def shape(self) -> SiteShape:
        return SiteShape(self.keys.shape[0], self.keys.shape[2], self.values.shape[2])

    def named(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {"keys": self.keys, "values": self.values}
        if self.log_mass is not None:
            named["log_mass"] = self.log_mass
        if self.gate is not None:
            named["gate_weight"] = self.gate.weight
        return named

    def map(self, function: Callable[[Tensor], Tensor]) -> SiteTensors:
        """The same site with `function` applied to every tensor."""
        return self.with_named({name: function(tensor) for name, tensor in self.named().items()})

    def with_named(self, named: Mapping[str, Tensor]) -> SiteTensors:
        """The same site with other tensors under the names of `named()`."""
        gate = None if self.gate is None else Gate(named["gate_weight"], self.gate.pooling)
        return SiteTensors(named["keys"], named["values"], named.get("log_mass"), gate)

    def keep(self, slots: Tensor) -> SiteTensors:
        """Only these slots: bool `[prefix]`, or their numbers."""
        mass = None if self.log_mass is None else self.log_mass[slots]
        gate = None if self.gate is None else Gate(self.gate.weight[:, slots], self.gate.pooling)
        return SiteTensors(self.keys[:, slots], self.values[:, slots], mass, gate)


Geometry = dict[Site, SiteShape]
Sites = dict[Site, SiteTensors]


class Head(NamedTuple):
    """A linear map from an encoder's last hidden states to labels, trained with a prefix and kept beside it.

    weight `[outputs, hidden]`, bias `[outputs]`. `kind` is `classification` (an output per label), `choice` (one
    output, compared between options) or `tagging` (an output per label and token). `pooling` says which vector of a
    row is read: `cls`, `mean`, or `token` for tagging. Source: P-Tuning v2, arXiv 2110.07602.
    """

    kind: str
    labels: tuple[str, ...]
    pooling: str
    weight: Tensor
    bias: Tensor


@dataclass
class Prefix:
    """Keys and values for the attention sites of one base model, with what is known of their origin.

    `sites` are float32. `position_offset` says how far text positions are shifted while the prefix is in
    use: 0 is native, the length is PEFT's convention. `head` reads an encoder's output where the prefix is for
    an understanding task. `training_state` holds what training needs beyond the folded tensors (the
    reparametrization, gates that are multiplied in); `fold()` drops it.

    >>> site = SiteTensors(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
    >>> prefix = Prefix({Site("decoder", 0): site}, base_name="tiny", fingerprint="")
    >>> prefix.length, prefix.num_parameters
    (4, 128)
    """

    sites: Sites
    base_name: str
    fingerprint: str
    position_offset: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    training_state: dict[str, Tensor] | None = None
    head: Head | None = None

    @property
    def lengths(self) -> dict[Site, int]:
        """Slots at every site."""
        return {site: tensors.length for site, tensors in self.sites.items()}

    @property
    def length(self) -> int:
        """Slots at the longest site; 0 for a prefix without sites."""
        return max(self.lengths.values(), default=0)

    @property
    def geometry(self) -> Geometry:
        """The shapes that a base model must have for this prefix."""
        return {site: tensors.shape for site, tensors in self.sites.items()}

    @property
    def num_parameters(self) -> int:
        """Numbers in the folded tensors, the head's not counted."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the folded tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The folded tensors of all sites, as `decoder.0.keys` and so on."""
        return {f"{site}.{name}": tensor for site, each in self.sites.items() for name, tensor in each.named().items()}

    def sha256(self, training: bool = False) -> str:
        """A hash of all that decides what the prefix does: tensors, what gates read, the head.

        With `training` also of what training goes on from.
        """
        named = self.tensors()
        if self.head is not None:
            named |= {"head.weight": self.head.weight, "head.bias": self.head.bias}
        if training:
            named |= {f"training.{name}": tensor for name, tensor in (self.training_state or {}).items()}
        digest = hashlib.sha256()
        for name, tensor in sorted(named.items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        for site, tensors in self.sites.items():
            if tensors.gate is not None:
                digest.update(f"{site} {tensors.gate.pooling}".encode())
        if self.head is not None:
            digest.update(f"{self.head.kind} {self.head.labels} {self.head.pooling}".encode())
        return digest.hexdigest()

    def fold(self) -> Prefix:
        """The same function without the training state: plain keys, values and masses."""
        sites = {site: tensors.map(lambda t: t.detach().clone()) for site, tensors in self.sites.items()}
        return replace(self, sites=sites, metadata=dict(self.metadata), training_state=None)

    def check_base(
        self, base_name: str, fingerprint: str, geometry: Geometry, hidden_sizes: Mapping[Site, int] | None = None
    ) -> None:
        """Raise `PrefixMismatch` unless this prefix, its gates too, was made for the named base model."""
        for site, shape in self.geometry.items():
            if geometry.get(site) != shape:
                expected = f"{_describe(geometry[site])} there" if site in geometry else "one of its sites"
                raise PrefixMismatch(
                    f"prefix for {self.base_name!r} has {_describe(shape)} at {site}, model is {base_name!r}",
                    expected,
                    f"load its base {self.base_name!r} or train a prefix for {base_name!r}",
                )
        for site, tensors in self.sites.items():
            hidden = None if hidden_sizes is None else hidden_sizes[site]
            if tensors.gate is not None and hidden is not None and tensors.gate.weight.shape[0] != hidden:
                raise PrefixMismatch(
                    f"the gate at {site} reads {tensors.gate.weight.shape[0]} hidden units, {base_name!r} has {hidden}",
                    "gates of this geometry",
                    f"load its base {self.base_name!r} or train a prefix for {base_name!r}",
                )
        if self.fingerprint != fingerprint:
            raise PrefixMismatch(
                f"prefix was made for {self.base_name!r} with weights {self.fingerprint[:12] or 'unknown'}",
                f"{base_name!r} with weights {fingerprint[:12]}",
                f"load its base {self.base_name!r} or train a prefix for {base_name!r}",
            )

    @classmethod
    def new(cls, base: BaseModel, length: int = 10, init: str = "text", **options: Any) -> Prefix:
        """A new prefix for `base`, born as `init` says; see `foreword.init.new_prefix` for the options."""
        from foreword.init import new_prefix

        return new_prefix(base, length, init, **options)

    @classmethod
    def load(cls, path: str | Path, base: BaseModel | None = None) -> Prefix:
        """Read a prefix folder; with `base`, also check that it belongs to it."""
        from foreword.artifact import load_prefix

        return load_prefix(path, base)

    def save(self, path: str | Path) -> None:
        """Write a prefix folder, whole or not at all."""
        from foreword.artifact import save_prefix

        save_prefix(self, path)


def _describe(shape: SiteShape) -> str:
    return f"{shape.kv_heads} kv_heads of {shape.key_dim}/{shape.value_dim}"


def compact(sites: Mapping[Site, SiteTensors], keep: Mapping[Site, Tensor]) -> Sites:
    """Cut the slots that `keep` (bool `[prefix]` per site) leaves out; keeping all is the identity.

    A slot whose `log_mass` is -inf can be cut without changing the function.

    >>> site = Site("decoder", 0)
    >>> tensors = SiteTensors(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    >>> compact({site: tensors}, {site: torch.tensor([True, False])})[site].length
    1
    """
    return {site: tensors.keep(keep[site]) for site, tensors in sites.items()}


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint key sets, from the attention over each, and its log-sum-exp.

    Shapes: `out_*` `[batch, heads, tokens, value_dim]`, `lse_*` `[batch, heads, tokens]`. Exact up to
    rounding; the order does not matter. A set of mass zero (-inf) leaves the other as it is, bit for bit.
    Source: Hydragen, arXiv 2402.05099. For training, use a function that carries the gradient of the
    log-sum-exp: that of fused kernels carries none.

    >>> out, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
    >>> merged, total = merge_attention(out, lse, 3 * out, lse)
    >>> merged[0, 0, 0].tolist(), round(total.item(), 4)
    ([2.0, 2.0], 0.6931)
    """
    total = torch.logaddexp(lse_a, lse_b)
    finite = torch.where(total == -math.inf, torch.zeros_like(total), total)
    weight_a = (lse_a - finite).exp().unsqueeze(-1).to(out_a.dtype)
    weight_b = (lse_b - finite).exp().unsqueeze(-1).to(out_b.dtype)
    return out_a * weight_a + out_b * weight_b, total


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    *,
    scaling: float,
    text_bias: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    prefix_gate: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over prefix slots and text in one softmax: the reference that fast paths must equal.

    Shapes: query `[batch, heads, tokens, key_dim]`; key, value `[batch, kv_heads, keys, dim]`; prefix_keys,
    prefix_values `[batch or 1, kv_heads, slots, dim]`; text_bias (mask and position bias, additive)
    broadcastable to `[batch, heads, tokens, keys]`; prefix_bias (log mass, -inf where a slot is not the
    row's) and prefix_gate (α ⊙ [K, V], a factor on each slot's key and value for each query) broadcastable to
    `[batch, heads, tokens, slots]`; sinks `[heads]`, one extra logit per head that takes mass and gives nothing.
    `softcap` bends the scores of text and prefix alike. Returns `[batch, heads, tokens, value_dim]`.
    Sources: Prefix-Tuning, arXiv 2101.00190, eq. 3; APT, arXiv 2305.15212, eq. 4.
    """
    batch, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    prefix_keys = prefix_keys.repeat_interleave(groups, 1).expand(batch, -1, -1, -1)
    prefix_values = prefix_values.repeat_interleave(groups, 1).expand(batch, -1, -1, -1)

    prefix_scores = query @ prefix_keys.transpose(2, 3)
    if prefix_gate is not None:
        prefix_scores = prefix_scores * prefix_gate
    scores = torch.cat([prefix_scores, query @ key.transpose(2, 3)], dim=-1) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    slots = prefix_keys.shape[2]
    prefix_scores, text_scores = scores[..., :slots], scores[..., slots:]
    if prefix_bias is not None:
        prefix_scores = prefix_scores + prefix_bias
    if text_bias is not None:
        text_scores = text_scores + text_bias
    parts = [prefix_scores, text_scores]
    if sinks is not None:
        parts.append(sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(batch, heads, tokens, 1))
    scores = torch.cat(parts, dim=-1)
    # A query that sees nothing at all (padding) gets zeros, not NaN.
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = (scores - top.detach()).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    weights = weights[..., : slots + key.shape[2]].to(value.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
    if prefix_gate is not None:
        weights = torch.cat([weights[..., :slots] * prefix_gate, weights[..., slots:]], dim=-1)
    return weights @ torch.cat([prefix_values, value], dim=2)
