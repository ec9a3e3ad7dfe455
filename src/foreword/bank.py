"""The prefixes resident on a device, and how the rows of one forward pass read them.

A `Call` is decided once per forward pass and read at every site: by all rows alike (`Shared`), by each row its
own (`PerRow`), or by each token its own (`PerToken`, for packed rows). Index 0 is "no prefix" everywhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from foreword.errors import PrefixError
from foreword.gates import GateInput, gate_of, pool
from foreword.kernels import Slots
from foreword.prefix import Geometry, Prefix, Site, Sites, SiteTensors

__all__ = [
    "NO_PREFIX", "AttendingCall", "AttentionOptions", "Bank", "Call", "Pass", "PerRow", "PerToken", "Shared",
    "Stacked",
]  # fmt: skip


class Call(Protocol):
    """What one forward pass reads."""

    def slots(self, site: Site, query: Tensor, given: GateInput) -> Slots | None:
        """The slots that `query` `[batch, heads, tokens, key_dim]` reads at a site, gated by `given`; None for none."""
        ...

    @property
    def reads_prompt(self) -> bool:
        """Whether any of its gates reads the prompt."""
        ...


class AttentionOptions(NamedTuple):
    """What a model asks of its attention at one site, beside the mask."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class AttendingCall(ABC):
    """A call that attends by itself, over keys and values that it keeps from pass to pass (`foreword.engine`)."""

    reads_prompt = False  # no pass has to say what its prompt is

    def slots(self, site: Site, query: Tensor, given: GateInput) -> Slots | None:  # noqa: ARG002 - as a `Call`
        """Never asked for: slots stand among the keys that it keeps."""
        raise AssertionError("a call that attends by itself has no slots apart")

    @abstractmethod
    def attend(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor, hidden: Callable[[], Tensor],
        options: AttentionOptions,
    ) -> Tensor:  # fmt: skip
        """The output `[batch, heads, tokens, value_dim]` for queries `[batch, heads, tokens, key_dim]` of a site.

        `hidden()` is what enters the attention module, `[batch, tokens, hidden]`.
        """


@dataclass(frozen=True)
class Pass:
    """One forward pass: what it reads, and what gates that read the prompt need (see `foreword.gates.GateInput`).

    No tuple, so that nobody who walks through a module's arguments takes it apart.
    """

    call: Call
    prompt: Tensor | None = None
    kept: dict[Site, Tensor] | None = None
    goes_on: bool = False


class Shared:
    """All rows read the same sites; differentiable in them."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites

    def slots(self, site: Site, query: Tensor, given: GateInput) -> Slots | None:
        tensors = self.sites.get(site)
        if tensors is None or tensors.length == 0:
            return None
        bias = None if tensors.log_mass is None else tensors.log_mass[None, None, None, :]
        gate = None if tensors.gate is None else gate_of(tensors.gate, given, site)[:, None]
        return _like(query, tensors.keys[None], tensors.values[None], bias, gate)

    @property
    def reads_prompt(self) -> bool:
        return any(tensors.gate is not None and tensors.gate.pooling == "prompt" for tensors in self.sites.values())


NO_PREFIX = Shared({})


class PerRow:
    """Every row reads its own prefix: `rows` int `[batch]` are places in the stacks of all sites."""

    def __init__(self, stacks: Mapping[Site, _Stack], rows: Tensor) -> None:
        self.stacks, self.rows = stacks, rows

    def slots(self, site: Site, query: Tensor, given: GateInput) -> Slots | None:
        if len(self.rows) != len(query):
            raise PrefixError(
                f"prefix_ids name the prefixes of {len(self.rows)} rows, {len(query)} were given",
                "one id for each row",
                "pass prefix_ids of the length of the batch",
            )
        if site not in self.stacks:
            return None
        stack = self.stacks[site].to(query.device)
        rows = self.rows.to(query.device)
        width = int(stack.lengths[rows].max()) if rows.device.type == "cpu" else stack.width
        if width == 0:
            return None
        keys, values = stack.keys[rows, :, :width], stack.values[rows, :, :width]
        gate = self._gate(stack, rows, width, given, site)
        return _like(query, keys, values, stack.bias[rows, None, None, :width], gate)

    @property
    def reads_prompt(self) -> bool:
        return any("prompt" in stack.poolings.values() for stack in self.stacks.values())

    def _gate(self, stack: _Stack, rows: Tensor, width: int, given: GateInput, site: Site) -> Tensor | None:
        """Every row's gates `[batch, 1, tokens or 1, slots]`, 1 for rows without; None if no row has any."""
        each = [stack.poolings.get(row, "") for row in rows.tolist()] if stack.poolings else []
        gate = None
        for pooling in sorted(set(each) - {""}):
            assert stack.gates is not None
            found = torch.sigmoid(pool(given, pooling, site) @ stack.gates[rows, :, :width].to(given.hidden))
            mine = torch.tensor([own == pooling for own in each], device=found.device)[:, None, None]
            gate = torch.where(mine, found, 1.0 if gate is None else gate)
        return None if gate is None else gate[:, None]


class PerToken:
    """Every token reads its own prefix: `owners` int `[batch, tokens]`, for rows that pack several texts."""

    def __init__(self, bank: Bank, owners: Tensor) -> None:
        self.bank, self.owners = bank, owners
        self.present: list[int] = sorted(set(owners.flatten().tolist()) - {0})
        self.reads_prompt = False  # gates that would are refused

    def slots(self, site: Site, query: Tensor, given: GateInput) -> Slots | None:
        if self.owners.shape[1] != query.shape[2]:
            raise PrefixError(
                f"prefix_ids name the prefixes of {self.owners.shape[1]} tokens, {query.shape[2]} were given",
                "prefix_ids of the shape of input_ids, or one per row",
                "pack only in training or scoring; generate with one prefix per row",
            )
        entries = [(index, self.bank.entry(index).get(site)) for index in self.present]
        read = [(index, tensors) for index, tensors in entries if tensors is not None and tensors.length]
        if not read:
            return None
        owners = self.owners.to(query.device)
        blocks, gates = [], []
        for index, tensors in read:
            mass = tensors.keys.new_zeros(tensors.length) if tensors.log_mass is None else tensors.log_mass
            mine = (owners == index)[:, None, :, None]
            blocks.append(torch.where(mine, mass.to(query.device), -math.inf))
            if tensors.gate is None:
                gates.append(query.new_ones(1, 1, tensors.length).expand(*self.owners.shape, -1))
            elif tensors.gate.pooling == "token":
                gates.append(gate_of(tensors.gate, given, site).to(query.dtype))
            else:
                raise PrefixError(
                    f"packed rows with a prefix whose gates read the {tensors.gate.pooling}", "gates that read tokens",
                    "give each text a row of its own",
                )  # fmt: skip
        keys = torch.cat([tensors.keys for _, tensors in read], dim=1)[None]
        values = torch.cat([tensors.values for _, tensors in read], dim=1)[None]
        gated = any(tensors.gate is not None for _, tensors in read)
        gate = torch.cat(gates, dim=-1)[:, None] if gated else None
        return _like(query, keys, values, torch.cat(blocks, dim=-1), gate)


def _like(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, gate: Tensor | None) -> Slots:
    """Slots on the query's device and in its dtype."""
    return Slots(keys, values, bias, gate).map(lambda tensor: tensor.to(query.device, query.dtype))


class _Stack:
    """All resident prefixes of one site, padded to the longest: `[capacity, kv_heads, width, dim]`.

    `bias` `[capacity, width]` is the log mass, -inf where a prefix has no slot. `gates` `[capacity, hidden, width]`
    are the gates' weights, None until a prefix has some; `poolings` says what those of each prefix read.
    """

    def __init__(self, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(1, kv_heads, 0, key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(1, kv_heads, 0, value_dim, dtype=dtype, device=device)
        self.bias = torch.zeros(1, 0, device=device)
        self.lengths = torch.zeros(1, dtype=torch.long, device=device)
        self.gates: Tensor | None = None
        self.poolings: dict[int, str] = {}

    @classmethod
    def of(cls, members: Sequence[SiteTensors]) -> _Stack:
        """What several prefixes have at one site, in their order; differentiable in them."""
        pad, width = torch.nn.functional.pad, max(tensors.length for tensors in members)
        first = members[0].keys
        stack = cls(*members[0].shape, first.dtype, first.device)
        missing = [width - tensors.length for tensors in members]
        masses = [first.new_zeros(t.length) if t.log_mass is None else t.log_mass for t in members]
        stack.keys = torch.stack([pad(t.keys, (0, 0, 0, more)) for t, more in zip(members, missing, strict=True)])
        stack.values = torch.stack([pad(t.values, (0, 0, 0, more)) for t, more in zip(members, missing, strict=True)])
        stack.bias = torch.stack([pad(m, (0, more), value=-math.inf) for m, more in zip(masses, missing, strict=True)])
        stack.lengths = torch.tensor([tensors.length for tensors in members], device=first.device)
        stack.poolings = {place: t.gate.pooling for place, t in enumerate(members) if t.gate is not None}
        if stack.poolings:
            weights = [None if t.gate is None else pad(t.gate.weight, (0, width - t.length)) for t in members]
            shape = next(weight for weight in weights if weight is not None)
            stack.gates = torch.stack([torch.zeros_like(shape) if weight is None else weight for weight in weights])
        return stack

    @property
    def width(self) -> int:
        return self.keys.shape[2]

    def to(self, device: torch.device) -> _Stack:
        if self.keys.device != device:
            for name in ("keys", "values", "bias", "lengths", "gates"):
                tensor: Tensor | None = getattr(self, name)
                setattr(self, name, None if tensor is None else tensor.to(device))
        return self

    def grow(self, capacity: int, width: int) -> None:
        """Make room; what is there stays where it is."""
        pad = torch.nn.functional.pad
        rows, slots = capacity - self.keys.shape[0], width - self.width
        if rows or slots:
            self.keys = pad(self.keys, (0, 0, 0, slots, 0, 0, 0, rows))
            self.values = pad(self.values, (0, 0, 0, slots, 0, 0, 0, rows))
            self.bias = pad(self.bias, (0, slots, 0, rows), value=-math.inf)
            self.lengths = pad(self.lengths, (0, rows))
            self.gates = None if self.gates is None else pad(self.gates, (0, slots, 0, 0, 0, rows))

    def put(self, index: int, tensors: SiteTensors) -> None:
        """Lay a prefix's tensors into its place, which is large enough."""
        length = tensors.length
        self.keys[index, :, :length] = tensors.keys.to(self.keys)
        self.values[index, :, :length] = tensors.values.to(self.values)
        self.bias[index, :length] = 0.0 if tensors.log_mass is None else tensors.log_mass.to(self.bias)
        if tensors.gate is not None:
            weight = tensors.gate.weight
            if self.gates is None:
                self.gates = self.keys.new_zeros(len(self.keys), weight.shape[0], self.width)
            self.gates[index, :, :length] = weight.to(self.gates)
            self.poolings[index] = tensors.gate.pooling

    def clear(self, index: int) -> None:
        """Leave no slot at a place."""
        self.lengths[index] = 0
        self.bias[index] = -math.inf
        self.poolings.pop(index, None)


class Stacked:
    """The sites of several owners, for passes in which each row reads those of its own; differentiable in all of them.

    >>> from foreword.prefix import SiteTensors
    >>> site = Site("decoder", 0)
    >>> one, two = (SiteTensors(torch.ones(1, length, 4), torch.ones(1, length, 4)) for length in (2, 3))
    >>> call = Stacked([{site: one}, {site: two}]).call([0, 1, 1])
    >>> call.slots(site, torch.ones(3, 1, 5, 4), GateInput(torch.ones(3, 5, 8))).keys.shape
    torch.Size([3, 1, 3, 4])
    """

    def __init__(self, each: Sequence[Sites]) -> None:
        self._stacks: dict[Site, _Stack] = {}
        for site in {site: None for sites in each for site in sites}:
            known = next(sites[site] for sites in each if site in sites)
            none = SiteTensors(known.keys[:, :0].detach(), known.values[:, :0].detach())
            self._stacks[site] = _Stack.of([sites.get(site, none) for sites in each])

    def call(self, owners: Sequence[int]) -> PerRow:
        """What rows with these owners, by their places, read."""
        devices = [stack.keys.device for stack in self._stacks.values()]
        return PerRow(self._stacks, torch.tensor(owners, device=devices[0] if devices else None))


class Bank:
    """Prefixes stacked per site on one device, added and removed without touching the others.

    >>> from foreword.prefix import SiteShape, SiteTensors
    >>> site = Site("decoder", 0)
    >>> bank = Bank({site: SiteShape(1, 4, 4)})
    >>> bank.add("polite", Prefix({site: SiteTensors(torch.ones(1, 3, 4), torch.ones(1, 3, 4))}, "tiny", ""))
    1
    >>> bank.index("polite"), bank.index(None), bank.entry(1)[site].length
    (1, 0, 3)
    """

    def __init__(
        self, geometry: Geometry, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.stacks = {site: _Stack(*shape, dtype, torch.device(device)) for site, shape in geometry.items()}
        self.prefixes: dict[int, Prefix] = {}
        self.names: dict[str, int] = {}
        self._entries: dict[int, Sites] = {0: {}}
        self._offsets = {0: 0}
        self._free: list[int] = []
        self._capacity = 1
        self._dtype, self._device = dtype, torch.device(device)

    def __len__(self) -> int:
        return len(self.prefixes)

    def add(self, name: str, prefix: Prefix) -> int:
        """Make a prefix resident and return its index; a name that is taken is an error."""
        if name in self.names:
            raise PrefixError(
                f"a prefix named {name!r} is already attached", "another name", "remove it first or rename"
            )
        index = self._free[-1] if self._free else len(self.prefixes) + 1
        if index >= self._capacity:
            self._capacity = max(2 * self._capacity, 2)
        for site, stack in self.stacks.items():
            tensors = prefix.sites.get(site)
            length = 0 if tensors is None else tensors.length
            stack.grow(self._capacity, max(stack.width, length))
            stack.clear(index)
            stack.lengths[index] = length
            if tensors is not None and length:
                stack.put(index, tensors)
        self._entries[index] = {
            site: t.map(lambda x: x.detach().to(self._device, self._dtype, copy=True))
            for site, t in prefix.sites.items()
        }
        self._offsets[index] = prefix.position_offset
        self.prefixes[index], self.names[name] = prefix, index
        self._free = self._free[:-1]
        return index

    def remove(self, name: str) -> None:
        """Forget a prefix; its place is reused."""
        index = self.names.pop(name)
        for stack in self.stacks.values():
            stack.clear(index)
        del self.prefixes[index], self._entries[index], self._offsets[index]
        self._free.append(index)

    def index(self, name: str | None) -> int:
        """The index of a name, 0 for None."""
        if name is None:
            return 0
        if name not in self.names:
            known = ", ".join(map(repr, self.names)) or "none"
            raise PrefixError(f"no prefix named {name!r} is attached", f"one of: {known}", "attach it first")
        return self.names[name]

    def entry(self, index: int) -> Sites:
        """One prefix's tensors as they are read, unpadded, in the bank's dtype."""
        return self._entries[index]

    def call(self, prefix_ids: Tensor) -> Call:
        """How rows (`[batch]`) or tokens (`[batch, tokens]`) with these indices read the bank."""
        present = set(prefix_ids.flatten().tolist())
        unknown = present - self._entries.keys()
        if unknown:
            raise PrefixError(
                f"prefix_ids contain {min(unknown)}", f"0 (none) or one of {sorted(self.prefixes)}", "attach it first"
            )
        if len(present) == 1 and not (prefix_ids.dim() == 2 and self._pools(present)):
            (index,) = present
            return Shared(self.entry(index)) if index else NO_PREFIX
        return PerRow(self.stacks, prefix_ids) if prefix_ids.dim() == 1 else PerToken(self, prefix_ids)

    def _pools(self, indices: set[int]) -> bool:
        """Whether any of these prefixes has gates that read more than one token."""
        sites = [tensors for index in indices for tensors in self.entry(index).values()]
        return any(tensors.gate is not None and tensors.gate.pooling != "token" for tensors in sites)

    def offsets(self, prefix_ids: Tensor) -> Tensor | None:
        """The position offsets of these indices, None if all are 0."""
        if not any(self._offsets.values()):
            return None
        table = torch.tensor([self._offsets.get(i, 0) for i in range(max(self._offsets) + 1)])
        return table.to(prefix_ids.device)[prefix_ids]
