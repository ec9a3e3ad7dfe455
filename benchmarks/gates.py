"""What gates cost: training steps of the same prefix without gates and with each kind, side by side.

    python benchmarks/gates.py            # about 4 minutes on 2 cores
    python benchmarks/gates.py --quick    # a smoke test with few steps; its figures mean little

All kinds take turns on the same batch in one process, in an order that moves on from batch to batch, so that noise of
the machine meets all alike; the ratio is the median over batches of a kind's seconds by those without gates. A step is
what `foreword.train` does in one: forward, backward, clipping and AdamW. The last line is JSON; its
`ratio_step_seconds_apt` is the largest of the measured bases and dtypes, which stand beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

import torch

import foreword as fw
from foreword.begin import begin_module, begin_objective, parameter_groups
from foreword.data import epoch_batches
from foreword.frozen import frozen_training
from foreword.tasks import get_task

KINDS = ("none", "apt", "static", "mass")
# base, task, rows of a step, slots
CASES = (("smollm2-135m", "e2e", 8, 10), ("minilm", "sst2", 32, 16))
DTYPES = ("float32", "bfloat16")


class Side:
    """A prefix with one kind of gates, in training."""

    def __init__(self, base: fw.BaseModel, task: Any, kind: str, length: int) -> None:
        config = fw.TrainConfig(gates=kind, length=length)
        self.objective = begin_objective(base, None, task, config)
        self.module = begin_module(base, None, task, config)
        groups = parameter_groups(self.module, self.objective.head, config)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, config.learning_rate)

    def step(self, rows: Any, batch: list[int]) -> float:
        """Seconds of one optimizer step."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss, units = self.objective.loss(rows, batch, self.module())
        (loss / units).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return time.perf_counter() - start


def measure(base_name: str, task_name: str, batch: int, length: int, dtype: str, steps: int) -> dict[str, Any]:
    base = fw.BaseModel.load(base_name, dtype=dtype)
    task = get_task(task_name)
    sides = {kind: Side(base, task, kind, length) for kind in KINDS}
    rows = sides["none"].objective.encode(task.split("train", limit=batch * (steps + 2)))
    batches = epoch_batches(rows.lengths, batch, seed=0, epoch=0)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with frozen_training(base.model):
        for number, numbers in enumerate(batches):
            turn = number % len(KINDS)
            for kind in KINDS[turn:] + KINDS[:turn]:
                took = sides[kind].step(rows, numbers)
                if number >= 2:  # the first ones warm up
                    seconds[kind].append(took)
    plain = seconds["none"]
    ratios = {kind: statistics.median(a / b for a, b in zip(seconds[kind], plain, strict=True)) for kind in KINDS}
    return {
        "base": base_name, "task": task_name, "dtype": dtype, "batch": batch, "length": length, "steps": len(plain),
        "seconds": {kind: statistics.median(each) for kind, each in seconds.items()}, "ratios": ratios,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, for a smoke test")
    parser.add_argument("--steps", type=int, default=16, help="measured batches of each base and dtype")
    arguments = parser.parse_args()
    steps = 2 if arguments.quick else arguments.steps
    found = []
    for case in CASES:
        for dtype in DTYPES:
            found.append(measure(*case, dtype, steps))
            row = found[-1]
            told = "  ".join(f"{kind} {row['seconds'][kind]:.3f} s ({row['ratios'][kind]:.2f})" for kind in KINDS)
            print(f"{row['base']:13} {dtype:9} {told}", flush=True)
    report = {
        "ratio_step_seconds_apt": round(max(row["ratios"]["apt"] for row in found), 3),
        **{f"ratio_{row['base']}_{row['dtype']}": round(row["ratios"]["apt"], 3) for row in found},
        "ratio_step_seconds_static": round(max(row["ratios"]["static"] for row in found), 3),
        "ratio_step_seconds_mass": round(max(row["ratios"]["mass"] for row in found), 3),
        "steps": steps, "threads": torch.get_num_threads(), "python": sys.version.split()[0],
        "torch": version("torch"), "transformers": version("transformers"), "machine": platform.machine(),
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
