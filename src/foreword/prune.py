"""Pruning: which slots stay within a budget, how they begin again, and how lengths and gates go to another prefix.

The best slots of the whole prefix stay, whatever layer they are in; a layer may lose all of its slots. What stays is
the same function as the whole prefix with mass 0 on what was cut, exactly. The record of what was cut from where is
kept in `metadata["pruned"]`, so that the slots that stayed can be found again at their birth (`rewound`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foreword.errors import ConfigError, PrefixError, PrefixMismatch
from foreword.gates import GateOptions, Gates
from foreword.init import new_prefix
from foreword.parametrization import PrefixModule, parametrize
from foreword.prefix import Gate, Prefix, Site, SiteTensors, compact

if TYPE_CHECKING:
    from foreword.base import BaseModel

__all__ = ["lengths_from", "parameter_budget", "prune", "rewound", "start_gates_from", "with_lengths"]


def prune(
    prefix: Prefix,
    scores: Mapping[Site, Tensor],
    *,
    keep: float | None = None,
    budget_parameters: int | None = None,
    by: str = "importance",
    least: int = 0,
) -> Prefix:
    """The best slots of a prefix: as many as fit into a share `keep` of its parameters, or into so many parameters.

    `scores` `[prefix]` per site rank all slots of all sites together (see `foreword.probe.Probe.scores`; `by` is their
    name for the record); of equal ones the first stay. Each site keeps its best `least` slots. The slots that stay are
    unchanged, with their gates and masses, and so is the head; a training state is dropped. `keep=1` is the identity.

    Raises `ConfigError` for a budget that cannot be kept, `PrefixMismatch` for scores of another prefix.

    >>> site = Site("decoder", 0)
    >>> tensors = SiteTensors(torch.ones(1, 4, 2), torch.ones(1, 4, 2))
    >>> pruned = prune(Prefix({site: tensors}, "", ""), {site: torch.tensor([0.1, 0.9, 0.2, 0.8])}, keep=0.5)
    >>> pruned.lengths[site], pruned.metadata["pruned"]["kept"]
    (2, {'decoder.0': [1, 3]})
    """
    _check_scores(prefix, scores)
    budget = parameter_budget(prefix, keep, budget_parameters)
    kept = _best(prefix, scores, budget, least)
    cut = _cut(prefix, kept, by)
    cut.metadata["pruned"]["parameters"] = [prefix.num_parameters, cut.num_parameters]
    return cut


def with_lengths(prefix: Prefix, lengths: Mapping[Site, int], by: str = "lengths") -> Prefix:
    """The first slots of every site, so many as `lengths` says: PT-2* of the paper, for a new prefix.

    Raises `PrefixMismatch` for lengths of another geometry, `ConfigError` for slots that are not there.

    >>> site = Site("decoder", 0)
    >>> prefix = Prefix({site: SiteTensors(torch.ones(1, 4, 2), torch.ones(1, 4, 2))}, "", "")
    >>> with_lengths(prefix, {site: 3}).length
    3
    """
    _check_sites(prefix, lengths, "lengths")
    for site, length in lengths.items():
        if not 0 <= length <= prefix.lengths[site]:
            raise ConfigError(
                f"length {length} at {site}", f"0 to {prefix.lengths[site]}", "begin with a longer prefix"
            )
    if not any(lengths.values()):
        raise ConfigError("length 0 at every site", "one slot at least", "choose other lengths")
    return _cut(prefix, {site: list(range(length)) for site, length in lengths.items()}, by)


def lengths_from(scores: Mapping[Site, Tensor], length: int | None = None) -> dict[Site, int]:
    """A length for every site, in the ratio of the mean scores of their slots; the first of all has `length` slots.

    So PT-2* sets variable lengths from learned gates ("the learned ratio"; APT, arXiv 2305.15212, section 4): at most
    as many parameters as `length` slots everywhere. None: as long as the longest site that was scored.

    >>> lengths_from({Site("encoder", 0): torch.tensor([0.2, 0.4]), Site("encoder", 1): torch.tensor([0.9, 0.3])}, 10)
    {Site(stack='encoder', layer=0): 5, Site(stack='encoder', layer=1): 10}
    """
    length = max(map(len, scores.values()), default=0) if length is None else length
    means = {site: float(each.double().mean()) if len(each) else 0.0 for site, each in scores.items()}
    largest = max(means.values(), default=0.0)
    if not largest > 0 or not math.isfinite(largest) or length < 1:
        raise ConfigError(
            f"lengths of up to {length} slots from mean scores of up to {largest:g}", "a positive length and scores",
            "probe a trained prefix",
        )  # fmt: skip
    return {site: math.floor(length * mean / largest + 0.5) for site, mean in means.items()}


def rewound(base: BaseModel, prefix: Prefix) -> Prefix:
    """The slots of a prefix as they were born: those that stayed, the same numbers that training began with.

    Gates that read the text are back at their beginning too, which is the function without gates; fixed gates and the
    head are gone, for training to make them anew. Raises `PrefixError` for a prefix that does not say how it was born
    (its `init`, text and seed), `PrefixMismatch` for another base model. Source: Frankle and Carbin 2019, arXiv
    1803.03635, who train what survives from its first numbers.
    """
    prefix.check_base(base.name, base.fingerprint, base.geometry, base.hidden_sizes)
    said = prefix.metadata
    init, seed = said.get("init"), said.get("seed")
    if init is None or init == "prefix" or seed is None:
        how = "does not say how it was born" if init is None or seed is None else "was born from another prefix"
        raise PrefixError(
            f"a prefix that {how}", "one that Foreword made and trained", "go on with its slots as they are"
        )
    pruned = said.get("pruned") or {}
    before, kept = pruned.get("from") or {}, pruned.get("kept") or {}
    length = max(before.get(str(site), own) for site, own in prefix.lengths.items())
    born = new_prefix(base, length, init, text=said.get("text"), seed=seed)
    sites = {}
    for site, tensors in prefix.sites.items():
        slots = kept.get(str(site), range(tensors.length))
        if len(slots) != tensors.length:
            raise PrefixError(
                f"a record of {len(slots)} slots at {site}, which has {tensors.length}", "one for each", "prune again"
            )
        own = born.sites[site].keep(torch.tensor(list(slots), dtype=torch.long))
        sites[site] = own if tensors.gate is None else _gate_at_start(own, tensors.gate)
    names = ("init", "text", "seed", "pruned", "gates")
    metadata = {name: said[name] for name in names if name in said}
    if "gates" in metadata:
        metadata["gates"] = {name: value for name, value in said["gates"].items() if name != "values"}
    return replace(born, sites=sites, metadata=metadata)


def start_gates_from(module: PrefixModule, source: Prefix) -> None:
    """Let the gates of `module` begin as those that `source` has learned, on whatever task.

    W, α and g are taken over, and λ where the source says it. From then on the keys and values of the module are read
    through these gates. Raises `ConfigError` for gates of another kind or shape (both are named), `PrefixError` for a
    source without gates, `PrefixMismatch` for one of another base model.
    """
    if module.gates is None:
        raise ConfigError("gates of another prefix for one without gates", "gates of the same kind", "choose its gates")
    if source.fingerprint != module.prefix.fingerprint:
        raise PrefixMismatch(
            f"gates that were learned on {source.base_name!r} ({source.fingerprint[:12] or 'unknown'})",
            f"on {module.prefix.base_name!r} ({module.prefix.fingerprint[:12] or 'unknown'})",
            "take those of a prefix of this base model",
        )  # fmt: skip
    other = _learned(source)
    kinds = [_kind(each) for each in (other, module.gates)]
    if kinds[0] != kinds[1]:
        raise ConfigError(f"{kinds[0]} gates to begin from", f"{kinds[1]} gates", "take gates of the same kind")
    module.gates.start_from(other)


# Which slots stay


def _check_sites(prefix: Prefix, given: Mapping[Site, Any], what: str) -> None:
    if given.keys() != prefix.sites.keys():
        one, other = (", ".join(map(str, (min(each), max(each)))) if each else "none" for each in (given, prefix.sites))
        raise PrefixMismatch(
            f"{what} for {len(given)} sites ({one})",
            f"for {len(prefix.sites)} ({other})",
            "take those of this base model",
        )


def _check_scores(prefix: Prefix, scores: Mapping[Site, Tensor]) -> None:
    _check_sites(prefix, scores, "scores")
    for site, each in scores.items():
        if each.shape != (prefix.lengths[site],):
            raise PrefixMismatch(
                f"{len(each)} scores at {site}", f"{prefix.lengths[site]}, one for each slot", "probe this prefix"
            )
        if not each.isfinite().all():
            raise ConfigError(f"scores at {site} that are not finite", "numbers", "probe again in float32")


def parameter_budget(prefix: Prefix, keep: float | None, budget_parameters: int | None) -> int:
    """How many parameters may stay, of a share or a number; `ConfigError` unless exactly one of them says it."""
    if (keep is None) == (budget_parameters is None):
        got = "neither keep nor budget_parameters" if keep is None else "keep together with budget_parameters"
        raise ConfigError(got, "one of both", "say how much is to stay")
    if keep is None:
        return budget_parameters or 0
    if not 0 < keep <= 1:
        raise ConfigError(f"keep {keep}", "more than 0 and at most 1", "such as 0.5")
    return math.floor(keep * prefix.num_parameters + 1e-6)  # 0.3 of 10 slots are 3, whatever a float makes of it


def _best(prefix: Prefix, scores: Mapping[Site, Tensor], budget: int, least: int) -> dict[Site, list[int]]:
    """The slots that stay, by number: the best of each site as far as `least` wants, then the best of all that fit."""
    costs = {site: _slot_parameters(tensors) for site, tensors in prefix.sites.items() if tensors.length}
    ranked = {site: each.double().argsort(descending=True, stable=True).tolist() for site, each in scores.items()}
    kept = {site: set(slots[:least]) for site, slots in ranked.items()}
    spent = sum(len(kept[site]) * cost for site, cost in costs.items())
    needed = max(spent, min(costs.values(), default=1))
    if least < 0:
        raise ConfigError(f"least {least}", "at least 0 slots at every site", "raise it")
    if budget < needed:
        slots = f"{least} slots at every site" if spent else "one slot"
        raise ConfigError(f"a budget of {budget:,} parameters", f"at least {needed:,}, {slots}", "raise it")
    order = sorted(
        ((-float(scores[site][slot]), place, slot, site) for place, site in enumerate(costs) for slot in ranked[site]),
        key=lambda each: each[:3],
    )
    for _, _, slot, site in order:
        if slot not in kept[site] and spent + costs[site] <= budget:
            kept[site].add(slot)
            spent += costs[site]
    return {site: sorted(slots) for site, slots in kept.items()}


def _slot_parameters(tensors: SiteTensors) -> int:
    """The numbers that one slot of a site has, its gate's and mass among them."""
    return sum(tensor.numel() for tensor in tensors.named().values()) // tensors.length


def _cut(prefix: Prefix, kept: Mapping[Site, list[int]], by: str) -> Prefix:
    """Only these slots, with the record of it; what was recorded of earlier cuts is carried on to the birth."""
    before = prefix.metadata.get("pruned") or {}
    earlier = {site: before.get("kept", {}).get(str(site), range(n)) for site, n in prefix.lengths.items()}
    first = {str(site): before.get("from", {}).get(str(site), n) for site, n in prefix.lengths.items()}
    places = {str(site): [earlier[site][slot] for slot in slots] for site, slots in kept.items()}
    sites = compact(prefix.sites, {site: torch.tensor(slots, dtype=torch.long) for site, slots in kept.items()})
    sites = {site: tensors.map(lambda t: t.detach().clone()) for site, tensors in sites.items()}
    metadata = {k: v for k, v in prefix.metadata.items() if k not in ("parametrization", "metrics", "pruned")}
    metadata["pruned"] = {"by": by, "from": first, "kept": places}
    if metadata.get("gates", {}).get("values"):
        values = {site: _cut_values(row, kept[Site.parse(site)]) for site, row in metadata["gates"]["values"].items()}
        metadata["gates"] = {**metadata["gates"], "values": values}
    return replace(prefix, sites=sites, metadata=metadata, training_state=None)


def _cut_values(row: dict[str, Any], slots: list[int]) -> dict[str, Any]:
    return {**row, "slots": [row["slots"][slot] for slot in slots]} if "slots" in row else row


# Gates


def _gate_at_start(born: SiteTensors, gate: Gate) -> SiteTensors:
    """Slots under a gate that is a half for every text, twice as large: the same function."""
    weight = torch.zeros(gate.weight.shape)
    return born._replace(keys=2 * born.keys, values=2 * born.values, gate=Gate(weight, gate.pooling))


def _kind(gates: Gates) -> str:
    pooling = sorted(set(gates.poolings.values()))
    return " ".join([*pooling, gates.gate_options.kind])


def _learned(source: Prefix) -> Gates:
    """The gates that a prefix has learned: of its training state, else of its sites and of what it says of them."""
    if source.training_state is not None:
        kept = parametrize(source).gates
        if kept is not None:
            return kept
    recorded = source.metadata.get("gates")
    gated = [tensors.gate for tensors in source.sites.values() if tensors.gate is not None]
    if not recorded and not gated:
        raise PrefixError("a prefix without gates to begin from", "one with gates", "take another prefix")
    given: dict[str, Any] = recorded or {"kind": "apt", "pooling": gated[0].pooling, "layers": False}
    options = GateOptions(**{name: value for name, value in given.items() if name != "values"})
    sizes = {site: t.gate.weight.shape[0] for site, t in source.sites.items() if t.gate is not None}
    gates = Gates(source.sites, options, sizes)
    with torch.no_grad():
        for name, members in gates.stacks:
            for place, site in enumerate(members):
                row = (given.get("values") or {}).get(str(site)) or {}
                if "layer" in row:
                    getattr(gates, f"{name}_layers")[place] = row["layer"]
                if "slots" in row:
                    getattr(gates, f"{name}_slots")[place] = torch.logit(torch.tensor(row["slots"]), eps=1e-6)
    return gates
