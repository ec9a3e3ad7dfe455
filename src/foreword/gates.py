"""Gates: factors that say how much of a prefix is read, per slot and per layer, and what trains them.

APT multiplies each slot's key and value by λ·α. α in [0, 1] is a factor per slot: `sigmoid(h · weight)` of the text's
hidden states h (`apt`), or a number that is learned directly (`static`). λ is a number per layer, of any sign and size.
What does not depend on the text is multiplied into keys and values at once, so that only α(h) is left to the
attention. `mass` gates instead add log g to a slot's attention logit: g = 0 removes it exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreword.errors import ConfigError, PrefixError, PrefixMismatch
from foreword.prefix import POOLINGS, Gate, Site, Sites, SiteTensors, group_sites

__all__ = ["GATE_KINDS", "GateInput", "GateOptions", "Gates", "check_poolings", "gate_of", "masked_mean", "pool"]

GATE_KINDS = ("none", "apt", "static", "mass")

# sigmoid of it is the g of a new mass gate: 0.982, near 1 and yet with a slope to move along
_MASS_START = 4.0


@dataclass(frozen=True)
class GateOptions:
    """Which gates a prefix is trained with.

    `kind` is none, apt, static (the paper's ablation without h) or mass. `slots` and `layers` switch α and λ off (the
    paper's other ablations). `pooling` is what α reads in the stacks that read a whole text at once (encoders: `cls`
    or `mean`) or in causal decoders (`token` or `prompt`); empty: `mean` and `token`. `layer_start` is λ at the
    beginning.
    """

    kind: str = "none"
    slots: bool = True
    layers: bool = True
    pooling: str = ""
    layer_start: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in GATE_KINDS:
            raise ConfigError(f"gates {self.kind!r}", f"one of {', '.join(GATE_KINDS)}", "choose one of them")
        if self.pooling not in ("", *POOLINGS):
            raise ConfigError(f"gate pooling {self.pooling!r}", f"one of {', '.join(POOLINGS)}", "choose one of them")
        if self.kind in ("apt", "static") and not (self.slots or self.layers):
            raise ConfigError(
                f"{self.kind} gates without slot and layer gates", "one of both at least", "say gates 'none'"
            )
        if not (math.isfinite(self.layer_start) and self.layer_start != 0):
            raise ConfigError(f"layer gate start {self.layer_start}", "a finite number other than 0", "such as 2")

    def pooling_at(self, site: Site, stacks: Collection[str]) -> str:
        """What α reads at a site of a model with these stacks."""
        if site.stack == "encoder":
            if self.pooling in ("", "token", "cls", "mean"):
                return self.pooling or "mean"
            raise ConfigError(
                f"gate pooling {self.pooling!r} in an encoder", "cls, mean or token", "prompt is for decoders"
            )
        if "encoder" in stacks:  # what has been written so far has no first token that says anything
            return "token"
        if self.pooling in ("", "token", "prompt"):
            return self.pooling or "token"
        raise ConfigError(
            f"gate pooling {self.pooling!r} in a causal decoder", "token or prompt",
            "the other two would read tokens that are still to come",
        )  # fmt: skip

    def differences(self, other: GateOptions, sites: Iterable[Site], stacks: Collection[str]) -> tuple[str, str] | None:
        """What two sets of options make differently at these sites, as (own, other); None if nothing."""

        def told(options: GateOptions) -> list[str]:
            reads = options.kind == "apt" and options.slots
            poolings = sorted({options.pooling_at(site, stacks) for site in sites}) if reads else []
            return [
                f"kind {options.kind}", f"slot gates {options.slots}", f"layer gates {options.layers}",
                f"pooling {' and '.join(poolings) or 'none'}",
            ]  # fmt: skip

        pairs = [(own, theirs) for own, theirs in zip(told(self), told(other), strict=True) if own != theirs]
        return (", ".join(own for own, _ in pairs), ", ".join(theirs for _, theirs in pairs)) if pairs else None


def check_poolings(sites: Sites) -> None:
    """Raise `PrefixMismatch` for gates that read what their stack cannot give them."""
    stacks = {site.stack for site in sites}
    for site, tensors in sites.items():
        if tensors.gate is not None:
            try:
                GateOptions("apt", pooling=tensors.gate.pooling).pooling_at(site, stacks)
            except ConfigError as error:
                raise PrefixMismatch(f"{error.got}, at {site}", error.expected, "train the prefix anew") from None


class GateInput:
    """What the gates of one site may read; each part is formed when a gate first asks for it.

    `hidden` `[batch, tokens, hidden]` enters the attention module. `text` bool `[batch or 1, tokens]` is False at
    padding, `prompt` at all but the prompt; None: all tokens count. `kept` holds what `prompt` gates read of the
    prompt, by site, for the passes that go on from its cache (`goes_on`).
    """

    def __init__(
        self,
        hidden: Tensor | Callable[[], Tensor],
        text: Tensor | Callable[[], Tensor | None] | None = None,
        prompt: Tensor | None = None,
        kept: dict[Site, Tensor] | None = None,
        goes_on: bool = False,
    ) -> None:
        self._hidden, self._text, self.prompt, self.kept, self.goes_on = hidden, text, prompt, kept, goes_on

    @functools.cached_property
    def hidden(self) -> Tensor:
        return self._hidden() if callable(self._hidden) else self._hidden

    @functools.cached_property
    def text(self) -> Tensor | None:
        return self._text() if callable(self._text) else self._text


def pool(given: GateInput, pooling: str, site: Site) -> Tensor:
    """The h of a pooling, `[batch, tokens, hidden]` for `token`, else `[batch, 1, hidden]`.

    >>> given = GateInput(torch.tensor([[[1.0], [3.0], [9.0]]]), text=torch.tensor([[True, True, False]]))
    >>> pool(given, "mean", Site("encoder", 0)).tolist(), pool(given, "cls", Site("encoder", 0)).tolist()
    ([[[2.0]]], [[[1.0]]])
    """
    hidden = given.hidden
    if pooling == "token":
        return hidden
    if pooling == "prompt":
        return _prompt_mean(given, site)
    if pooling == "cls":
        if given.text is None:
            return hidden[:, :1]
        first = given.text.int().argmax(1).expand(len(hidden))
        return hidden[torch.arange(len(hidden), device=hidden.device), first][:, None]
    return masked_mean(hidden, given.text)


def _prompt_mean(given: GateInput, site: Site) -> Tensor:
    """The mean over the prompt: of this pass, or of the one that filled the cache."""
    if not given.goes_on:
        mean = masked_mean(given.hidden, given.prompt)
        if given.kept is not None:
            given.kept[site] = mean.detach()
        return mean
    kept = (given.kept or {}).get(site)
    if kept is None or len(kept) != len(given.hidden):
        raise PrefixError(
            f"gates that read the prompt go on from a cache of {'another prefix' if kept is None else len(kept)}",
            f"the cache of the prompts of these {len(given.hidden)} rows",
            "begin with the prompt under the same prefix",
        )  # fmt: skip
    return kept


def masked_mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean `[batch, 1, hidden]` of `[batch, tokens, hidden]` over the tokens in `mask` `[batch or 1, tokens]`.

    >>> masked_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])).tolist()
    [[[2.0]]]
    """
    if mask is None:
        return hidden.mean(1, keepdim=True)
    hidden, dtype = (hidden.float() if hidden.dtype == torch.float16 else hidden), hidden.dtype  # its range is small
    weight = mask.to(hidden.device, hidden.dtype)
    # Divided after the sum: 1/300 in bfloat16 would be wrong by 0.4 %, the same way for every token.
    total = (weight[:, None] @ hidden).to(torch.promote_types(hidden.dtype, torch.float32))
    return (total / mask.to(hidden.device).sum(1).clamp_min(1)[:, None, None]).to(dtype)


def gate_of(gate: Gate, given: GateInput, site: Site) -> Tensor:
    """α `[batch, tokens or 1, prefix]` of a site's own gate, in the dtype of the hidden states."""
    return torch.sigmoid(pool(given, gate.pooling, site) @ gate.weight.to(given.hidden))


class Gates(nn.Module):
    """The trained gates of a prefix; a call multiplies them into the sites of their prefix.

    Parameters, per stack of like sites: `…_slots` `[layers, hidden, prefix]` (apt: W), or `[layers, prefix]` (static:
    the logit of α; mass: that of g), and `…_layers` `[layers]` (λ). For BERT-base these are the paper's l·d + 1 per
    layer. W and the logits start at 0, so that α is 1/2 everywhere, and λ at `layer_start`.

    Sites that have a gate begin with its W. `start_factor` is λ·α at the beginning: who divides the keys and values by
    it begins at the function of the sites as they are. With the defaults it is 1.

    >>> site = SiteTensors(torch.ones(1, 3, 4), torch.ones(1, 3, 4))
    >>> gates = Gates({Site("encoder", 0): site}, GateOptions("apt"), {Site("encoder", 0): 8})
    >>> sum(p.numel() for p in gates.parameters()), gates.start_factor()
    (25, 1.0)
    """

    def __init__(self, sites: Sites, options: GateOptions, hidden_sizes: Mapping[Site, int]) -> None:
        super().__init__()
        self.gate_options = options
        stacks = {site.stack for site in sites}
        self.poolings = {site: options.pooling_at(site, stacks) for site in sites} if self.reads_text else {}
        hidden = hidden_sizes if self.reads_text else {}
        with_slots = [site for site, tensors in sites.items() if tensors.length]
        self.stacks = group_sites(with_slots, lambda site: (sites[site].length, hidden.get(site)))
        for name, members in self.stacks:
            length, layers = sites[members[0]].length, len(members)
            device = sites[members[0]].keys.device
            if options.kind == "mass":
                self.register_parameter(f"{name}_slots", _parameter(layers, length, value=_MASS_START, device=device))
                continue
            if options.slots:
                shape = (layers, hidden_sizes[members[0]], length) if self.reads_text else (layers, length)
                slots = _parameter(*shape, value=0.0, device=device)
                for place, site in enumerate(members):
                    own = sites[site].gate
                    if own is not None and self.reads_text:
                        slots.data[place] = own.weight.detach().float()
                self.register_parameter(f"{name}_slots", slots)
            if options.layers:
                self.register_parameter(f"{name}_layers", _parameter(layers, value=options.layer_start, device=device))

    @property
    def reads_text(self) -> bool:
        """Whether α depends on the hidden states."""
        return self.gate_options.kind == "apt" and self.gate_options.slots

    def start_factor(self, has_gate: bool = False) -> float:
        """λ·α before the first step; λ alone at a site that has a gate already."""
        options = self.gate_options
        if options.kind == "mass":
            return 1.0
        return (0.5 if options.slots and not has_gate else 1.0) * (options.layer_start if options.layers else 1.0)

    def options(self) -> dict[str, Any]:
        """What is needed, besides the tensors, to make these gates again."""
        return asdict(self.gate_options)

    def forward(self, sites: Sites) -> Sites:
        gated: Sites = {}
        for name, members in self.stacks:
            slots, layers = getattr(self, f"{name}_slots", None), getattr(self, f"{name}_layers", None)
            for place, site in enumerate(members):
                own = None if slots is None else slots[place]
                scale = None if layers is None else layers[place]
                gated[site] = self._gated(site, sites[site], own, scale)
        return {site: gated.get(site, tensors) for site, tensors in sites.items()}

    def _gated(self, site: Site, tensors: SiteTensors, slots: Tensor | None, scale: Tensor | None) -> SiteTensors:
        if self.gate_options.kind == "mass":
            mass = nn.functional.logsigmoid(slots)  # type: ignore[arg-type]
            return tensors._replace(log_mass=mass if tensors.log_mass is None else mass + tensors.log_mass)
        factor = scale
        if slots is not None and not self.reads_text:
            alpha = torch.sigmoid(slots)[None, :, None]
            factor = alpha if scale is None else alpha * scale
        if factor is not None:
            tensors = tensors._replace(keys=tensors.keys * factor, values=tensors.values * factor)
        if slots is not None and self.reads_text:
            tensors = tensors._replace(gate=Gate(slots, self.poolings[site]))
        return tensors

    @torch.no_grad()
    def values(self) -> dict[str, dict[str, Any]]:
        """The numbers of each site that are multiplied in, for the record: λ, and α or g where they are fixed."""
        found: dict[str, dict[str, Any]] = {}
        for name, members in self.stacks:
            slots, layers = getattr(self, f"{name}_slots", None), getattr(self, f"{name}_layers", None)
            for place, site in enumerate(members):
                row: dict[str, Any] = {}
                if layers is not None:
                    row["layer"] = float(layers[place])
                if slots is not None and not self.reads_text:
                    row["slots"] = torch.sigmoid(slots[place]).tolist()
                found[str(site)] = row
        return found

    @torch.no_grad()
    def start_from(self, other: Gates) -> None:
        """Take over the parameters of other gates of the same geometry; `ConfigError` for another one."""
        own, given = dict(self.named_parameters()), dict(other.named_parameters())
        shapes = [{name: tuple(p.shape) for name, p in each.items()} for each in (own, given)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"gates of the shapes {_shapes(shapes[1])}", _shapes(shapes[0]),
                "take gates of the same kind, length and base model",
            )  # fmt: skip
        for name, parameter in own.items():
            parameter.copy_(given[name])


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "none"


def _parameter(*shape: int, value: float, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, value, dtype=torch.float32, device=device))
