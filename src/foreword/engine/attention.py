"""Attention of many sequences packed into one pass, over the keys and values that each has in its row of the cache.

A pass holds one token of every sequence that is writing, then pieces of prompts, one after the other without padding:
what is linear in a model sees tokens alone. Here every token finds its own row again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foreword.bank import AttendingCall, AttentionOptions
from foreword.engine.cache import SlotCache
from foreword.prefix import Site

__all__ = ["Piece", "Ragged", "attend_rows"]


class Piece(NamedTuple):
    """The next `tokens` of a row's prompt, those after the `texts` that the cache has of it."""

    row: int
    tokens: int


class _Plan(NamedTuple):
    """Where the tokens of a pass go, and what the writing rows see, at sites whose rows have as many slots each.

    rows, positions int `[tokens]`; widths: the positions that writing rows are read up to, and of every piece; hidden
    `[writing, 1, 1, width]` and one `[1, 1, count, width]` for each piece: 0 where a token sees a position, else -inf.
    """

    rows: Tensor
    positions: Tensor
    width: int
    seen: Tensor | None
    pieces: list[Tensor]


class Ragged(AttendingCall):
    """One pass: a token each of the first `writing` rows of a cache, then pieces of prompts of later rows."""

    def __init__(self, cache: SlotCache, writing: int, pieces: Sequence[Piece] = ()) -> None:
        self.cache, self.writing, self.pieces = cache, writing, list(pieces)
        self.rows = [*range(writing), *(piece.row for piece in self.pieces for _ in range(piece.tokens))]
        steps = [0] * writing + [step for piece in self.pieces for step in range(piece.tokens)]
        self.texts = [cache.texts[row] + step for row, step in zip(self.rows, steps, strict=True)]
        self._plans: dict[tuple[tuple[int, ...], int | None], _Plan] = {}
        self.windows: dict[Site, int | None] = {}
        used = slice(cache.used)
        self._has_masses, self._has_gates = any(cache.masses[used]), any(cache.poolings[used])

    def attend(
        self, site: Site, query: Tensor, key: Tensor, value: Tensor, hidden: Callable[[], Tensor],
        options: AttentionOptions,
    ) -> Tensor:  # fmt: skip
        """Keep the tokens' keys and values, and attend over slots and text; shapes have `batch` 1."""
        cache, writing = self.cache, self.writing
        self.windows[site] = options.window
        plan = self._plan(site, options.window, query.dtype)
        keys, values = cache.keys[site], cache.values[site]
        keys[plan.rows, :, plan.positions] = key[0].transpose(0, 1).to(keys.dtype)
        values[plan.rows, :, plan.positions] = value[0].transpose(0, 1).to(values.dtype)
        parts = []
        if writing:
            assert plan.seen is not None
            own = query[0, :, :writing].transpose(0, 1)[:, :, None]
            width = plan.width
            seen = self._with_masses(site, plan.seen, range(writing))
            gate = self._writing_gate(site, hidden, width)
            out = attend_rows(own, keys[:writing, :, :width], values[:writing, :, :width], seen, gate, options)
            parts.append(out[:, :, 0].transpose(0, 1))
        start = writing
        for piece, seen in zip(self.pieces, plan.pieces, strict=True):
            tokens, row, width = slice(start, start + piece.tokens), piece.row, seen.shape[-1]
            gate = self._piece_gate(site, hidden, piece, tokens)
            here = slice(row, row + 1)
            seen = self._with_masses(site, seen, [row])
            out = attend_rows(query[:, :, tokens], keys[here, :, :width], values[here, :, :width], seen, gate, options)
            parts.append(out[0])
            start = tokens.stop
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[None]

    def _plan(self, site: Site, window: int | None, dtype: torch.dtype) -> _Plan:
        """The plan of a site; sites with like slots share one."""
        slots = self.cache.slots[site]
        key = tuple(slots[: self.cache.used]), window
        if key not in self._plans:
            device = self.cache.device
            positions = [slots[row] + text for row, text in zip(self.rows, self.texts, strict=True)]
            seen, pieces = None, []
            if self.writing:
                n = self.writing
                seen = _seen(slots[:n], self.texts[:n], window, device, dtype)[:, None, None]
            start = self.writing
            for piece in self.pieces:
                texts = self.texts[start : start + piece.tokens]
                pieces.append(_seen([slots[piece.row]] * piece.tokens, texts, window, device, dtype)[None, None])
                start += piece.tokens
            self._plans[key] = _Plan(
                torch.tensor(self.rows, device=device), torch.tensor(positions, device=device),
                0 if seen is None else seen.shape[-1], seen, pieces,
            )  # fmt: skip
        return self._plans[key]

    def _with_masses(self, site: Site, seen: Tensor, rows: Sequence[int]) -> Tensor:
        """What rows see, with the log masses of their slots added."""
        if not self._has_masses or not any(site in self.cache.masses[row] for row in rows):
            return seen
        seen = seen.expand(len(rows), -1, -1, -1).clone()
        for place, row in enumerate(rows):
            mass = self.cache.masses[row].get(site)
            if mass is not None:
                seen[place, ..., : len(mass)] += mass.to(seen.dtype)
        return seen

    def _writing_gate(self, site: Site, hidden: Callable[[], Tensor], width: int) -> Tensor | None:
        """The gates of the writing rows `[writing, 1, 1, slots]`, 1 where a row has none; None if no row has any."""
        n, cache = self.writing, self.cache
        if not self._has_gates:
            return None
        gated = [cache.poolings[row].get(site) == "token" for row in range(n)]
        if not any(gated):
            return None
        weights = cache.weights[site][:n, :, :width]
        alpha = torch.sigmoid(torch.bmm(hidden()[0, :n, None].to(weights.dtype), weights))
        lengths = [slots if has else 0 for slots, has in zip(cache.slots[site], gated, strict=False)]
        place = torch.arange(weights.shape[2], device=cache.device)
        mine = place < torch.tensor(lengths, device=cache.device)[:, None, None]
        return torch.where(mine, alpha, 1.0)[:, None]

    def _piece_gate(self, site: Site, hidden: Callable[[], Tensor], piece: Piece, tokens: slice) -> Tensor | None:
        """The gates of a piece `[1, 1, count, slots]`, None if it has none.

        Gates that read the prompt are the same from here on: they go into the row's keys and values.
        """
        cache, row = self.cache, piece.row
        pooling = cache.poolings[row].get(site)
        if pooling is None or (pooling == "prompt" and cache.texts[row]):
            return None
        slots = cache.slots[site][row]
        weight, read = cache.weights[site][row, :, :slots], hidden()[0, tokens]
        if pooling == "token":
            return torch.sigmoid(read.to(weight.dtype) @ weight)[None, None]
        alpha = torch.sigmoid(read.mean(0).to(weight.dtype) @ weight)[:, None]
        cache.keys[site][row, :, :slots] *= alpha
        cache.values[site][row, :, :slots] *= alpha
        return None


def _seen(
    slots: Sequence[int], texts: Sequence[int], window: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Which positions tokens see, `[tokens, width]`: all slots, and the text up to each, within the window."""
    first = torch.tensor(slots, device=device)[:, None]
    last = first + torch.tensor(texts, device=device)[:, None]
    place = torch.arange(int(last.max()) + 1, device=device)
    seen = place <= last
    if window is not None:
        seen &= (place < first) | (place > last - window)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, gate: Tensor | None, options: AttentionOptions
) -> Tensor:
    """Attention of rows over their positions, slots first; equals `foreword.prefix.prefix_attention`.

    Shapes: query `[rows, heads, tokens, key_dim]`, keys and values `[rows, kv_heads, width, dim]`, seen (added to the
    scores) `[rows, 1, tokens, width]`, gate `[rows, 1, tokens, slots]` for the first positions.
    """
    rows, heads, tokens, dim = query.shape
    kv_heads, width = keys.shape[1], keys.shape[2]
    groups = heads // kv_heads
    # Heads that share keys as queries side by side: five times as fast in bfloat16 as the kernel's own grouping.
    grouped = query.reshape(rows, kv_heads, groups * tokens, dim)
    if gate is None and options.softcap is None and options.sinks is None:
        mask = seen.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(len(seen), 1, groups * tokens, width)
        if tokens == 1 and query.device.type == "cpu" and query.dtype == torch.float32:
            return _attend_one(grouped, keys, values, mask, options.scaling).view(rows, heads, tokens, -1)
        fused = torch.nn.functional.scaled_dot_product_attention
        return fused(grouped, keys, values, attn_mask=mask, scale=options.scaling).reshape(rows, heads, tokens, -1)
    scores = (grouped @ keys.transpose(2, 3)).view(rows, kv_heads, groups, tokens, width)
    if gate is not None:
        scores[..., : gate.shape[-1]] *= gate.unsqueeze(2)
    scores = scores.float() * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores += seen.unsqueeze(2)
    if options.sinks is not None:
        sinks = options.sinks.float().view(1, kv_heads, groups, 1, 1).expand(rows, -1, -1, tokens, -1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :width].to(values.dtype)
    if gate is not None:
        weights[..., : gate.shape[-1]] *= gate.unsqueeze(2)
    return (weights.view(rows, kv_heads, groups * tokens, width) @ values).reshape(rows, heads, tokens, -1)


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Plain attention of few queries `[rows, kv_heads, queries, key_dim]`: there faster than the kernel's blocks."""
    rows, kv_heads, queries, _ = query.shape
    mask = mask.expand(rows, kv_heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(mask, query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scaling)
    return torch.bmm(torch.softmax(scores, dim=-1), values.flatten(0, 1)).view(rows, kv_heads, queries, -1)
