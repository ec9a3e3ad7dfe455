"""Parts of one pool of rows: who is held out depends on the content of a row and a seed, not on the order of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["held_out", "in_order"]


def in_order(keys: Iterable[str], seed: int) -> list[str]:
    """The different keys in an order that depends on nothing but the seed and each key.

    >>> in_order("abcabc", seed=1) == in_order("cab", seed=1)
    True
    """
    return sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode("utf-8", "surrogatepass")).digest())


def held_out(keys: Iterable[str], fraction: float, seed: int) -> set[str]:
    """A fraction of the keys, at least one; which ones, a hash of seed and key says.

    A key stays on its side when others are added, but for a few at the border.

    >>> len(held_out(map(str, range(50)), 0.1, seed=0))
    5
    """
    order = in_order(keys, seed)
    return set(order[: max(1, round(fraction * len(order)))])
