"""Several prefixes trained together beside one after another: same base model, rows, batches and process.

    python benchmarks/together.py             # about 20 minutes on 2 cores
    python benchmarks/together.py --quick     # a smoke test with one round; its figures mean little

Both sides train the same runs, few-row samples of E2E with rows, order and seed of their own as in the low-data study:
some steps of each, and the loss on its dev rows at the end. The sides take turns, and who begins alternates, so that
noise of the machine meets both alike. What both have trained must be equal but rounding: `largest_difference` of keys
and values tells (AdamW makes a whole step of a gradient that is rounding alone), and that of the dev loss. The last
line is JSON; `ratio_seconds_together` is together over one after another, the median of all rounds and the larger of
the dtypes. Target: at most 1.0 on 2 CPU cores, at most 0.5 on a GPU. Of the details, `ratio_step_seconds` counts the
optimizer steps alone, and `ratio_cpu_seconds` the processor's seconds, which others' work disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from foreword.base import BaseModel
from foreword.config import TrainConfig
from foreword.prefix import Prefix
from foreword.runs import peak_memory_bytes
from foreword.tasks import get_task
from foreword.together import train_together
from foreword.train import TrainResult, train

BASE = "smollm2-135m"
MEASURES = ("seconds", "cpu_seconds", "step_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of one step, for a smoke test")
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--batch", type=int, default=10, help="rows of each prefix in a step")
    parser.add_argument("--rows", type=int, default=100, help="training rows of each prefix")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each prefix in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pass-rows", type=int, default=0, help="rows of a pass of all runs; 0: as foreword does")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 1
    report({dtype: compare(dtype, arguments) for dtype in arguments.dtype}, arguments)


def compare(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both sides in turn, after a short one that warms up."""
    base, task = BaseModel.load(BASE, dtype=dtype, device=arguments.device), get_task("e2e")
    options = {"rows": arguments.rows, "batch_size": arguments.batch, "max_steps": arguments.steps}
    configs = [TrainConfig(**options, seed=seed) for seed in range(arguments.prefixes)]
    passes = [TrainConfig(**options, seed=c.seed, micro_batch_size=arguments.pass_rows) for c in configs]
    sides: dict[str, Callable[[], list[TrainResult]]] = {
        "one_after_another": lambda: [train(base, None, task, config) for config in configs],
        "together": lambda: train_together(base, None, task, passes),
    }
    train(base, None, task, TrainConfig(max_steps=1, train_limit=arguments.batch, dev_limit=1))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    peaks, differences, losses = {}, [], []
    for number in range(arguments.rounds):
        sets = {}
        for name in sorted(sides, reverse=number % 2 == 1):
            found, results = timed(sides[name], base.device)
            rounds[name].append(found)
            sets[name] = results
            peaks.setdefault(name, peak_memory_bytes(base.device))
            note(f"{dtype} round {number + 1} of {arguments.rounds}, {name}: {found['seconds']:.1f} s")
        for one, other in zip(*sets.values(), strict=True):
            differences.append(apart(one.prefix, other.prefix))
            losses.append(abs(one.metrics["best_dev_loss"] - other.metrics["best_dev_loss"]))
    pairs = list(zip(rounds["one_after_another"], rounds["together"], strict=True))
    return {
        **{f"ratio_{what}": statistics.median(b[what] / a[what] for a, b in pairs) for what in MEASURES},
        "seconds": {name: statistics.median(each["seconds"] for each in found) for name, found in rounds.items()},
        "rounds": rounds, "largest_difference": max(differences),
        "largest_difference_dev_loss": max(losses), "peak_memory_bytes_after_first": peaks,
    }  # fmt: skip


def timed(side: Callable[[], list[TrainResult]], device: torch.device) -> tuple[dict[str, float], list[TrainResult]]:
    start, busy = time.perf_counter(), time.process_time()
    results = side()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    steps = sum(result.metrics["train_seconds"] for result in results)
    return {"seconds": seconds, "cpu_seconds": busy, "step_seconds": steps}, results


def apart(one: Prefix, other: Prefix) -> float:
    """The largest difference of two prefixes' numbers."""
    own, theirs = one.tensors(), other.tensors()
    return max(float((own[name] - theirs[name]).abs().max()) for name in own)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    sizes = f"{arguments.prefixes} prefixes, batch {arguments.batch} each, {arguments.steps} steps and the dev loss"
    table = Table(title=f"{BASE}, E2E, {sizes}", title_justify="left")
    for name in ("", "one after another", "together", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    for dtype, found in results.items():
        pair = found["seconds"]
        table.add_row(
            f"seconds, {dtype}", f"{pair['one_after_another']:.1f}", f"{pair['together']:.1f}",
            f"{found['ratio_seconds']:.2f}",
        )  # fmt: skip
    Console(width=100).print(table)
    cuda = arguments.device.startswith("cuda")
    packages = ("torch", "transformers", "foreword")
    print(json.dumps({
        "ratio_seconds_together": round(max(found["ratio_seconds"] for found in results.values()), 3),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(), "base": BASE, "prefixes": arguments.prefixes, "batch": arguments.batch,
        "rows": arguments.rows, "steps": arguments.steps, "rounds": arguments.rounds, "quick": arguments.quick,
        "details": results, "command": " ".join(["python", "benchmarks/together.py", *sys.argv[1:]]),
        "seeds": list(range(arguments.prefixes)),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
