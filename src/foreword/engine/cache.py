"""Keys and values of the running sequences, each in a row of its own: its prefix's slots, then its text.

Rows are dense: the first rows of the tensors are in use, so that a step reads views and copies nothing. What a row held
is overwritten with zeros when it is given back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foreword.prefix import Geometry, Site, Sites

__all__ = ["SlotCache"]

_STEP = 64  # positions that a row grows by


class SlotCache:
    """Rows `[rows, kv_heads, positions, dim]` of keys and values at every site, which grow up to `longest` positions.

    `slots[site][row]` counts the prefix's slots at a site, `texts[row]` the tokens of text: a row's position p at a
    site holds a slot below `slots`, else token p - slots. `masses` and `weights` hold what a row's gates are.

    >>> from foreword.prefix import SiteShape
    >>> cache = SlotCache({Site("decoder", 0): SiteShape(1, 4, 4)}, rows=2, longest=100)
    >>> cache.put(0, {}), cache.used
    (None, 1)
    """

    def __init__(
        self,
        geometry: Geometry,
        rows: int,
        longest: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows, self.longest, self.positions, self.used = rows, longest, 0, 0
        self.device, self.dtype = torch.device(device), dtype
        self.keys: dict[Site, Tensor] = {}
        self.values: dict[Site, Tensor] = {}
        for site, shape in geometry.items():
            self.keys[site] = torch.zeros(rows, shape.kv_heads, 0, shape.key_dim, dtype=dtype, device=device)
            self.values[site] = torch.zeros(rows, shape.kv_heads, 0, shape.value_dim, dtype=dtype, device=device)
        self.slots: dict[Site, list[int]] = {site: [0] * rows for site in geometry}
        self.texts = [0] * rows
        self.masses: list[dict[Site, Tensor]] = [{} for _ in range(rows)]
        self.poolings: list[dict[Site, str]] = [{} for _ in range(rows)]
        self.weights: dict[Site, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, used or not; memory that was never written may not be resident."""
        return sum(t.nbytes for part in (self.keys, self.values, self.weights) for t in list(part.values()))

    def put(self, row: int, sites: Sites) -> None:
        """Begin a row, the next one that is free, with the slots of a prefix."""
        assert row == self.used, "rows are taken in order"
        self.used += 1
        self.reserve(max((tensors.length for tensors in sites.values()), default=0))
        for site, tensors in sites.items():
            length = tensors.length
            if not length:
                continue
            self.slots[site][row] = length
            self.keys[site][row, :, :length] = tensors.keys.to(self.device, self.dtype)
            self.values[site][row, :, :length] = tensors.values.to(self.device, self.dtype)
            if tensors.log_mass is not None:
                self.masses[row][site] = tensors.log_mass.to(self.device, torch.float32)
            if tensors.gate is not None:
                self._put_gate(row, site, tensors.gate.weight, tensors.gate.pooling)

    def reserve(self, positions: int) -> None:
        """Make room for so many positions in every row; what is there stays."""
        if positions <= self.positions:
            return
        wanted = max(positions, min(2 * self.positions, self.longest))
        wanted = -(-wanted // _STEP) * _STEP
        grown: list[dict[Site, Tensor]] = []
        for part in (self.keys, self.values):
            grown.append({})
            for site, before in part.items():
                shape = (*before.shape[:2], wanted, before.shape[3])
                grown[-1][site] = torch.zeros(shape, dtype=self.dtype, device=self.device)
                for row in range(self.used):
                    held = self.held(site, row)
                    grown[-1][site][row, :, :held] = before[row, :, :held]
        # Only when all is there: where memory runs out, what was there before stays as it was.
        (self.keys, self.values), self.positions = grown, wanted

    def held(self, site: Site, row: int) -> int:
        """Positions of a row that hold something at a site."""
        return self.slots[site][row] + self.texts[row]

    def release(self, row: int) -> None:
        """Forget a row and leave zeros in its place; the last row in use takes it."""
        last = self.used - 1
        if row != last:
            self.move(last, row)
        else:
            self._wipe(row)
        self.used = last

    def move(self, source: int, target: int) -> None:
        """Let a row's content take the place of another's, and leave zeros where it was."""
        self._wipe(target)
        for site in self.keys:
            held = self.held(site, source)
            for part in (self.keys, self.values):
                part[site][target, :, :held] = part[site][source, :, :held]
            self.slots[site][target] = self.slots[site][source]
            if site in self.weights:
                self.weights[site][target] = self.weights[site][source]
        self.texts[target] = self.texts[source]
        self.masses[target], self.poolings[target] = self.masses[source], self.poolings[source]
        self._wipe(source)

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        for site in self.keys:
            held = max(self.held(site, one), self.held(site, other))
            tensors = [part[site][:, :, :held] for part in (self.keys, self.values)]
            for tensor in [*tensors, *([self.weights[site]] if site in self.weights else [])]:
                tensor[[one, other]] = tensor[[other, one]]
            slots = self.slots[site]
            slots[one], slots[other] = slots[other], slots[one]
        lists: tuple[list[Any], ...] = (self.texts, self.masses, self.poolings)
        for each in lists:
            each[one], each[other] = each[other], each[one]

    def check(self) -> None:
        """Raise `AssertionError` unless all that no row holds is zero, and counts fit; for tests."""
        for site, keys in self.keys.items():
            for row in range(self.rows):
                held = self.held(site, row)
                assert held <= self.positions, f"row {row} holds {held} of {self.positions} positions"
                assert row < self.used or held == 0, f"row {row} is not in use and holds {held}"
                for part in (keys, self.values[site]):
                    assert not part[row, :, held:].any(), f"row {row} has something behind its end at {site}"
                slots = self.slots[site][row]
                if site in self.weights:
                    gated = slots if site in self.poolings[row] else 0
                    assert not self.weights[site][row, :, gated:].any(), f"row {row} has a gate without a slot"
        for row in range(self.used, self.rows):
            assert not self.masses[row] and not self.poolings[row], f"row {row} is not in use and has gates"

    def _put_gate(self, row: int, site: Site, weight: Tensor, pooling: str) -> None:
        hidden, length = weight.shape
        known = self.weights.get(site)
        width = max(length, 0 if known is None else known.shape[2])
        if known is None or width > known.shape[2]:
            self.weights[site] = torch.zeros(self.rows, hidden, width, dtype=self.dtype, device=self.device)
            if known is not None:
                self.weights[site][:, :, : known.shape[2]] = known
        self.weights[site][row, :, :length] = weight.to(self.device, self.dtype)
        self.poolings[row][site] = pooling

    def _wipe(self, row: int) -> None:
        for site in self.keys:
            held = self.held(site, row)
            self.keys[site][row, :, :held] = 0
            self.values[site][row, :, :held] = 0
            self.slots[site][row] = 0
            if site in self.weights and site in self.poolings[row]:
                self.weights[site][row] = 0
        self.texts[row] = 0
        self.masses[row], self.poolings[row] = {}, {}
