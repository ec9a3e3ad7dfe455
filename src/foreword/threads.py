"""OpenMP threads, of which every thread of Python that computes has a team of its own."""

from __future__ import annotations

import ctypes

import torch

__all__ = ["release_team"]

_PAUSE_SOFT = 1


def release_team() -> None:
    """End the OpenMP threads of the calling thread; the next parallel operation begins new ones.

    A team waits for its next operation awake only as long as all teams of the process fit on the processors (libgomp,
    `gomp_throttled_spin_count_var`). Beside a second team, even one that idles, it falls asleep after each of the
    thousands of operations of a step. Where the OpenMP library cannot do it, nothing happens.
    """
    try:
        pause = ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (AttributeError, OSError):
        return
    pause(_PAUSE_SOFT)
