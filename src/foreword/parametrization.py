"""What is trained of a prefix: its keys and values themselves, or the weights of an MLP that makes them, and gates.

A `PrefixModule` maps its parameters to `Sites`; `fold()` replaces it by its output. Folding changes no bit of
the function: it keeps what `forward()` returns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foreword.errors import ConfigError, PrefixFormatError
from foreword.gates import GateOptions, Gates
from foreword.prefix import Prefix, Site, Sites, SiteShape, SiteTensors, group_sites

__all__ = ["DirectPrefix", "MLPPrefix", "PrefixModule", "parametrize"]

HIDDEN = 512


class PrefixModule(nn.Module, ABC):
    """A prefix with parameters. `forward()` gives its sites, differentiable in them; `prefix` is where it began.

    `gates`, where there are some, are trained with it and multiplied into the sites.
    """

    kind: str
    gates: Gates | None

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        if not prefix.length:
            raise ConfigError("a prefix of length 0 to train", "at least one slot", "choose a greater length")
        self.prefix = prefix
        self.gates = None

    def options(self) -> dict[str, Any]:
        """What `parametrize` needs, besides the tensors, to make this module again."""
        return {"kind": self.kind} if self.gates is None else {"kind": self.kind, "gates": self.gates.options()}

    @abstractmethod
    def ungated(self) -> Sites:
        """The keys and values as they are now, before any gate."""

    def forward(self) -> Sites:
        """The sites as they are now."""
        sites = self.ungated()
        return sites if self.gates is None else self.gates(sites)

    def fold(self, keep_training_state: bool = False) -> Prefix:
        """The prefix that this module is now, free of it.

        `keep_training_state` also keeps what the keys and values do not tell, so that `parametrize` of the folded
        prefix goes on where this module stands.
        """
        with torch.no_grad():
            sites = {site: tensors.map(lambda t: t.detach().float().clone()) for site, tensors in self().items()}
        state = self.training_state() if keep_training_state else {}
        metadata = {**self.prefix.metadata, "parametrization": self.options()}
        metadata.pop("gates", None)
        if self.gates is not None:
            metadata["gates"] = {**self.gates.options(), "values": self.gates.values()}
        return replace(self.prefix, sites=sites, metadata=metadata, training_state=state or None)

    def training_state(self) -> dict[str, Tensor]:
        """The tensors that the folded prefix does not hold."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}


class DirectPrefix(PrefixModule):
    """Keys and values as parameters: one stacked tensor `[layers, kv_heads, prefix, dim]` each per group of like sites.

    With `freeze_first_slot` the first slot, which a text initialisation makes the attention sink, stays as it is.

    >>> site = SiteTensors(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
    >>> module = DirectPrefix(Prefix({Site("decoder", i): site for i in range(3)}, "tiny", ""))
    >>> {name: tuple(p.shape) for name, p in module.named_parameters()}
    {'decoder_keys': (3, 2, 4, 8), 'decoder_values': (3, 2, 4, 8)}
    """

    kind = "direct"

    def __init__(self, prefix: Prefix, freeze_first_slot: bool = False) -> None:
        super().__init__(prefix)
        self.freeze_first_slot = freeze_first_slot
        if freeze_first_slot and min(prefix.lengths.values()) < 2:
            raise ConfigError(
                f"the first slot is frozen in a prefix of length {min(prefix.lengths.values())}",
                "at least 2 slots at every site", "choose a greater length or leave the first slot free",
            )  # fmt: skip
        of = prefix.sites
        self.groups = group_sites(of, lambda site: (of[site].shape, of[site].length, of[site].log_mass is None))
        for name, sites in self.groups:
            tensors = [prefix.sites[site] for site in sites]
            for part, stacked in (
                ("keys", torch.stack([t.keys for t in tensors])),
                ("values", torch.stack([t.values for t in tensors])),
            ):
                stacked = stacked.detach().float()
                if freeze_first_slot:
                    self.register_buffer(f"{name}_first_{part}", stacked[:, :, :1].clone())
                    stacked = stacked[:, :, 1:]
                self.register_parameter(f"{name}_{part}", nn.Parameter(stacked.clone()))
            _register_masses(self, name, tensors)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "freeze_first_slot": self.freeze_first_slot}

    def ungated(self) -> Sites:
        made: Sites = {}
        for name, sites in self.groups:
            keys, values = self._stacked(f"{name}_", "keys"), self._stacked(f"{name}_", "values")
            masses = _masses(self, name, len(sites))
            for site, key, value, mass in zip(sites, keys.unbind(0), values.unbind(0), masses, strict=True):
                made[site] = SiteTensors(key, value, mass)
        return {site: made[site] for site in self.prefix.sites}

    def _stacked(self, name: str, part: str) -> Tensor:
        trained: Tensor = getattr(self, name + part)
        if not self.freeze_first_slot:
            return trained
        return torch.cat([getattr(self, f"{name}first_{part}"), trained], dim=2)

    def training_state(self) -> dict[str, Tensor]:
        """Nothing without gates: the keys and values are the parameters."""
        return {} if self.gates is None else super().training_state()


class MLPPrefix(PrefixModule):
    """The paper's reparametrization: an embedding per slot, and an MLP that makes all its keys and values.

    For each stack (encoder-decoders have three): Embedding `[prefix, width]` → Linear(width, hidden) → Tanh →
    Linear(hidden, keys and values of all layers), with width = kv_heads · key_dim, the model's own width where
    heads are not grouped. All sites of a stack have the same length.

    It starts at the given prefix. The paper gets there by hundreds of Adam steps on the squared error; here the
    last layer is solved for in closed form: its bias is the mean slot, its weight the one nearest to a random
    start that gives the rest. This needs `hidden` ≥ 2 · length: closer to the length, float32 loses the fit.

    Source: Prefix-Tuning, arXiv 2101.00190, section 4.3 and `PrefixTuning.control_trans` of its code.

    >>> site = SiteTensors(torch.ones(2, 4, 8), torch.ones(2, 4, 8))
    >>> module = MLPPrefix(Prefix({Site("decoder", 0): site}, "tiny", ""), hidden=9)
    >>> sum(p.numel() for p in module.parameters()) == 4 * 16 + (16 * 9 + 9) + (9 * 32 + 32)
    True
    """

    kind = "mlp"

    def __init__(self, prefix: Prefix, hidden: int = HIDDEN, seed: int = 0) -> None:
        super().__init__(prefix)
        if hidden < 2 * prefix.length:
            raise ConfigError(
                f"hidden size {hidden} for {prefix.length} slots", f"at least {2 * prefix.length}",
                "raise the hidden size or shorten the prefix",
            )  # fmt: skip
        self.hidden = hidden
        self.stacks: dict[str, list[Site]] = {}
        for site in prefix.sites:
            self.stacks.setdefault(site.stack, []).append(site)
        generator = torch.Generator().manual_seed(seed)
        for stack, sites in self.stacks.items():
            lengths = sorted({prefix.lengths[site] for site in sites})
            if len(lengths) > 1:
                raise ConfigError(
                    f"{stack} sites of lengths {', '.join(map(str, lengths))} under one MLP", "one length for all",
                    "use the direct parametrization",
                )  # fmt: skip
            tensors = [prefix.sites[site] for site in sites]
            self.add_module(stack, _fitted(_flatten(tensors), prefix.sites[sites[0]].shape, hidden, generator))
            _register_masses(self, stack, tensors)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "hidden": self.hidden}

    def ungated(self) -> Sites:
        made: Sites = {}
        geometry = self.prefix.geometry
        for stack, sites in self.stacks.items():
            flat = self.get_submodule(stack)()
            masses = _masses(self, stack, len(sites))
            made.update(_unflatten(flat, sites, [geometry[site] for site in sites], masses))
        return {site: made[site] for site in self.prefix.sites}


class _MLP(nn.Module):
    """One stack's embedding and MLP; its output is `[prefix, all keys and values of a slot]`."""

    def __init__(self, embedding: Tensor, into: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)
        self.into_weight, self.into_bias = nn.Parameter(into[0]), nn.Parameter(into[1])
        self.out_weight, self.out_bias = nn.Parameter(out[0]), nn.Parameter(out[1])

    def forward(self) -> Tensor:
        # In full precision also where the model runs in bfloat16, so that folding changes nothing.
        with torch.autocast(self.embedding.device.type, enabled=False):
            hidden = torch.tanh(nn.functional.linear(self.embedding, self.into_weight, self.into_bias))
            made = nn.functional.linear(hidden, self.out_weight, self.out_bias)
        return made


def _fitted(target: Tensor, shape: SiteShape, hidden: int, generator: torch.Generator) -> _MLP:
    """An MLP whose output is `target` `[prefix, out]`; its first layers are random, as in PyTorch's own modules."""
    length, out = target.shape
    width = shape.kv_heads * shape.key_dim

    def uniform(*size: int, fan_in: int) -> Tensor:
        return (2 * torch.rand(size, generator=generator) - 1) / math.sqrt(fan_in)

    embedding = torch.randn(length, width, generator=generator)
    into = uniform(hidden, width, fan_in=width), uniform(hidden, fan_in=width)
    weight = uniform(out, hidden, fan_in=hidden)

    wanted = target.detach().cpu().double()
    activations = torch.tanh(embedding.double() @ into[0].double().T + into[1].double())
    bias = wanted.mean(0)
    # The last layer takes the mean slot as its bias; the pseudo-inverse gives the nearest weight that does the rest.
    missing = wanted - bias - activations @ weight.double().T
    weight = weight.double() + (torch.linalg.pinv(activations) @ missing).T
    return _MLP(embedding, into, (weight.float(), bias.float())).to(target.device)


def _flatten(tensors: Sequence[SiteTensors]) -> Tensor:
    """All keys and values of a stack, slot by slot: `[prefix, layers · kv_heads · (key_dim + value_dim)]`."""
    parts = [part.transpose(0, 1).flatten(1) for site in tensors for part in (site.keys, site.values)]
    return torch.cat(parts, dim=1)


def _unflatten(
    flat: Tensor, sites: Sequence[Site], shapes: Sequence[SiteShape], masses: Sequence[Tensor | None]
) -> Sites:
    """The inverse of `_flatten`."""
    widths = [shape.kv_heads * dim for shape in shapes for dim in (shape.key_dim, shape.value_dim)]
    parts = iter(torch.split(flat, widths, dim=1))
    made: Sites = {}
    for site, shape, mass in zip(sites, shapes, masses, strict=True):
        keys, values = (next(parts).reshape(len(flat), shape.kv_heads, -1).transpose(0, 1) for _ in range(2))
        made[site] = SiteTensors(keys, values, mass)
    return made


def _register_masses(module: nn.Module, name: str, tensors: Sequence[SiteTensors]) -> None:
    """Keep masses as a buffer `[layers, prefix]`: they are not trained here. A site without has mass 1, log mass 0."""
    if all(t.log_mass is None for t in tensors):
        return
    masses = [t.keys.new_zeros(t.length) if t.log_mass is None else t.log_mass for t in tensors]
    module.register_buffer(f"{name}_log_mass", torch.stack(masses).detach().float().clone())


def _masses(module: nn.Module, name: str, layers: int) -> Sequence[Tensor | None]:
    masses: Tensor | None = getattr(module, f"{name}_log_mass", None)
    return [None] * layers if masses is None else masses.unbind(0)


def parametrize(
    prefix: Prefix,
    kind: str | None = None,
    *,
    hidden: int | None = None,
    freeze_first_slot: bool | None = None,
    seed: int = 0,
    gates: GateOptions | None = None,
    hidden_sizes: Mapping[Site, int] | None = None,
) -> PrefixModule:
    """A module that starts at `prefix`: "direct" or "mlp" (`hidden` units, random parts from `seed`).

    With `gates` it is trained with gates, and still starts at the function of `prefix`, except that new mass gates
    start at g = 0.98, where they can move. Gates that read the text need `hidden_sizes`, the base model's. A prefix
    with a training state goes on from it, in its own kind and size, and one whose gates read the text goes on with
    them; asking for others is a `ConfigError`. Other gates are part of its keys, values and masses. What is not asked
    for is as the prefix was trained last, else direct, 512 hidden units, no frozen slot, no gates.

    >>> site = SiteTensors(torch.ones(2, 4, 8), torch.ones(2, 4, 8))
    >>> module = parametrize(Prefix({Site("decoder", 0): site}, "tiny", ""), "mlp", hidden=16)
    >>> folded = module.fold(keep_training_state=True)
    >>> again = parametrize(folded)
    >>> again.kind, bool((again()[Site("decoder", 0)].keys == folded.sites[Site("decoder", 0)].keys).all())
    ('mlp', True)
    """
    state = prefix.training_state
    before: dict[str, Any] = prefix.metadata.get("parametrization") or {}
    if state is not None and before.get("kind") != "mlp" and "gates" not in before:
        raise PrefixFormatError(
            f"a training state of parametrization {before.get('kind')!r}", "'mlp'", "fold the prefix first"
        )
    made = _gates(prefix, gates, hidden_sizes)
    if state is not None:
        _check_same({"kind": kind, "hidden": hidden if before.get("kind") == "mlp" else None}, before)
    elif before.get("kind") == "mlp":
        before = {}  # folded: nothing of the MLP is left
    kind = kind or before.get("kind", "direct")
    start = prefix if made is None else _before_gates(prefix, made)
    module: PrefixModule
    if kind == "direct":
        frozen = before.get("freeze_first_slot", False) if freeze_first_slot is None else freeze_first_slot
        if frozen and made is not None:
            raise ConfigError(
                "a frozen first slot under gates, which would move it", "one of both", "leave the first slot free"
            )
        module = DirectPrefix(start, frozen)
    elif kind != "mlp":
        raise ConfigError(f"parametrization {kind!r}", "'direct' or 'mlp'", "choose one of them")
    elif freeze_first_slot:
        raise ConfigError("a frozen first slot under an MLP", "the direct parametrization", "leave the first slot free")
    else:
        module = MLPPrefix(start, hidden or before.get("hidden", HIDDEN), seed)
    module.prefix, module.gates = prefix, made
    if state is not None:
        _load(module, state)
    return module


def _gates(prefix: Prefix, asked: GateOptions | None, hidden_sizes: Mapping[Site, int] | None) -> Gates | None:
    """The gates that a prefix is trained with: its own, else those that are asked for."""
    own = _own_gates(prefix)
    wanted = None if asked is None or asked.kind == "none" else asked
    if own is not None and wanted is not None:
        stacks = {site.stack for site in prefix.sites}
        different = own.differences(wanted, prefix.sites, stacks)
        if different:
            raise ConfigError(
                f"gates with {different[1]} for a prefix that has gates of its own", different[0],
                "leave them out, or fold the prefix's gates first",
            )  # fmt: skip
    options = own or wanted
    if options is None:
        return None
    sizes = dict(hidden_sizes or {})
    sizes |= {site: t.gate.weight.shape[0] for site, t in prefix.sites.items() if t.gate is not None}
    missing = [str(site) for site in prefix.sites if site not in sizes]
    if missing and options.kind == "apt" and options.slots:
        raise ConfigError(
            f"apt gates without the hidden size at {missing[0]}", "hidden_sizes of the base model",
            "pass hidden_sizes=base.hidden_sizes",
        )  # fmt: skip
    return Gates(prefix.sites, options, sizes)


def _own_gates(prefix: Prefix) -> GateOptions | None:
    """The gates that a prefix would go on with: those of its training state, or those that its sites still have."""
    if prefix.training_state is not None:
        kept = (prefix.metadata.get("parametrization") or {}).get("gates")
        return None if kept is None else GateOptions(**kept)
    gated = [tensors.gate for tensors in prefix.sites.values() if tensors.gate is not None]
    if not gated:
        return None
    recorded = prefix.metadata.get("gates")
    return (
        GateOptions("apt", pooling=gated[0].pooling)
        if recorded is None
        else GateOptions(**{name: value for name, value in recorded.items() if name != "values"})
    )


def _before_gates(prefix: Prefix, gates: Gates) -> Prefix:
    """The prefix that, multiplied by the gates as they begin, is `prefix`.

    What a training state will be loaded into has a mass of its own only if the state says so; else it is the gates'.
    """
    state = prefix.training_state
    own_mass = state is None or any(name.endswith("_log_mass") for name in state)
    sites = {}
    for site, tensors in prefix.sites.items():
        factor = gates.start_factor(tensors.gate is not None)
        keys, values = tensors.keys / factor, tensors.values / factor
        sites[site] = SiteTensors(keys, values, tensors.log_mass if own_mass else None)
    return replace(prefix, sites=sites)


def _check_same(asked: dict[str, Any], before: dict[str, Any]) -> None:
    for name, value in asked.items():
        if value is not None and value != before.get(name):
            raise ConfigError(
                f"parametrization with {name} {value!r}", f"{before.get(name)!r}, as the prefix was trained so far",
                "leave it out, or fold the prefix to start a new one",
            )  # fmt: skip


def _load(module: PrefixModule, state: dict[str, Tensor]) -> None:
    own = module.state_dict()
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in state.items()}:
        raise PrefixFormatError(
            "the training state does not fit the prefix's keys and values", "the state they were folded from",
            "fold the prefix to start a new one",
        )  # fmt: skip
    module.load_state_dict(state)
