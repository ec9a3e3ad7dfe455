"""Training speed of Foreword beside PEFT's prefix tuning: same model, rows, batches and optimizer.

    python benchmarks/train.py            # about 10 minutes on 2 cores
    python benchmarks/train.py --quick    # a smoke test with few steps; its figures mean little

Each side runs in a process of its own, so that peak memory is its own; the processes take turns step by step, so
that noise of the machine meets both alike. The last line is JSON.

* tokens per second: text tokens without padding, median step of each side.
* matrix-product limit: the time of the products that a step of a frozen model cannot do without, measured on the same
  shapes in the same dtype by the faster of the two plain ways of torch: every linear layer forward, and backward in its
  input alone, and the head forward and backward at completion tokens. Attention's own small products are left out.
* seconds to loss: PEFT with its defaults and the settings of its prefix-tuning example (learning rate 1e-2, five
  epochs, linear schedule, batch 8) gives a final dev loss; `foreword.train` with its defaults runs until its dev loss
  is as low. Both count the seconds of their steps, not those of measuring.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

BASE, LENGTH, BATCH = "smollm2-135m", 10, 8
DTYPES = ("float32", "bfloat16")
PEFT_EPOCHS, PEFT_LEARNING_RATE = 5, 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, for a smoke test")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each side and dtype")
    parser.add_argument("--rows", type=int, default=100, help="training rows of the run to a loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.rows = 2, 16
    if arguments.worker:
        WORKERS[arguments.worker](arguments)
        return
    results: dict[str, Any] = {"speed": {dtype: compare_speed(dtype, arguments) for dtype in DTYPES}}
    results["to_loss"] = compare_to_loss(arguments)
    report(results, arguments)


# The parent: two workers that take turns


class Worker:
    """A side in its own process, which does one thing for each line it is sent and answers with a line of JSON."""

    def __init__(self, name: str, dtype: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", name, "--dtype", dtype]
        command += ["--rows", str(arguments.rows), "--seed", str(arguments.seed), "--steps", str(arguments.steps)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"answer"'):
                return json.loads(line)["answer"]
        raise SystemExit(f"a worker stopped with status {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare_speed(dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternating steps of both sides on identical batches, the matrix-product limit between them."""
    sides = {name: Worker(name, dtype, arguments) for name in ("peft", "foreword")}
    # A process of its own, so that what the limit allocates is not counted as our peak memory.
    limiter = Worker("foreword", dtype, arguments)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    limits: list[float] = []
    tokens: list[int] = []
    for step in range(-2, arguments.steps):
        for name, worker in sides.items():
            answer = worker.ask(step=step)
            if step >= 0:
                seconds[name].append(answer["seconds"])
        if step >= 0:
            tokens.append(answer["tokens"])
            limits.append(limiter.ask(limit=step)["seconds"])
        note(f"{dtype} step {step + 1} of {arguments.steps}")
    memory = {name: worker.ask(memory=True)["bytes"] for name, worker in sides.items()}
    for worker in (*sides.values(), limiter):
        worker.close()
    rate = {name: statistics.median(t / s for t, s in zip(tokens, seconds[name], strict=True)) for name in sides}
    pairs = zip(seconds["peft"], seconds["foreword"], strict=True)
    return {
        "tokens_per_second": rate,
        "seconds_per_step": {name: statistics.median(seconds[name]) for name in sides},
        "ratio": statistics.median(theirs / ours for theirs, ours in pairs),
        "limit_seconds": statistics.median(limits),
        "share_of_limit": statistics.median(x / s for x, s in zip(limits, seconds["foreword"], strict=True)),
        "peak_memory_bytes": memory,
    }


def compare_to_loss(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of training until PEFT's final dev loss, in bfloat16 as the model is stored."""
    theirs = Worker("peft", "bfloat16", arguments)
    peft = theirs.ask(train=True)
    theirs.close()
    note(f"PEFT: dev loss {peft['dev_loss']:.3f} after {peft['seconds']:.0f} s")
    ours = Worker("foreword", "bfloat16", arguments)
    foreword = ours.ask(train=True, target=peft["dev_loss"])
    ours.close()
    note(f"Foreword: dev loss {foreword['dev_loss']:.3f} after {foreword['seconds']:.0f} s")
    return {"peft": peft, "foreword": foreword, "ratio": foreword["seconds"] / peft["seconds"]}


# The workers


def serve(answers: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    for line in sys.stdin:
        print(json.dumps({"answer": answers(json.loads(line))}), flush=True)


def memory() -> dict[str, Any]:
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def load(dtype: str) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from foreword.base import BaseModel

    disable_progress_bar()
    return BaseModel.load(BASE, dtype=dtype, device="cpu")


def batches(base: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Batches of E2E rows of like length, the same for both sides."""
    from foreword.tasks import get_task

    rows = get_task("e2e").split("train", limit=400).examples
    encoded = sorted((base.encode(row.prompt, row.completion) for row in rows), key=lambda pair: -sum(map(len, pair)))
    groups = [encoded[start : start + BATCH] for start in range(0, len(encoded), BATCH)]
    middle = len(groups) // 2
    order = [middle + (k + 1) // 2 * (-1) ** k for k in range(arguments.steps)]
    return [base.collate(groups[k % len(groups)]) for k in order]


def foreword_worker(arguments: argparse.Namespace) -> None:
    import torch

    from foreword.frozen import frozen_training
    from foreword.init import new_prefix
    from foreword.parametrization import parametrize

    base = load(arguments.dtype)
    prepared = batches(base, arguments)

    def steps() -> Callable[[dict[str, Any]], float]:
        text = "Describe the restaurant in one or two fluent sentences that state all of the given facts."
        module = parametrize(new_prefix(base, LENGTH, "text", text=text, seed=arguments.seed))
        optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3, weight_decay=0.0)

        def step(batch: dict[str, Any]) -> float:
            start = time.perf_counter()
            nats, tokens = base.completion_loss(batch, module())
            (nats / tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - start

        return step

    step = steps()

    def answers(question: dict[str, Any]) -> dict[str, Any]:
        if "memory" in question:
            return memory()
        if "limit" in question:
            return {"seconds": matrix_product_seconds(base.model, prepared[question["limit"]])}
        if "train" in question:
            return foreword_to_loss(base, arguments, question["target"])
        batch = prepared[question["step"] % len(prepared)]
        return {"seconds": step(batch), "tokens": int(batch["attention_mask"].sum())}

    with frozen_training(base.model):  # as `foreword.train` does, around all steps
        serve(answers)


def matrix_product_seconds(model: Any, batch: dict[str, Any]) -> float:
    """The products of one step on this batch's shapes: the sum over layers of the best of five repetitions."""
    import torch

    tokens = batch["input_ids"].numel()
    completion = int((batch["labels"][:, 1:] != -100).sum())
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    shapes = Counter((tokens, layer.out_features, layer.in_features) for layer in layers)
    shapes[completion, head.out_features, head.in_features] += 1
    total = 0.0
    for (rows, out, into), count in shapes.items():
        weight = torch.randn(out, into, dtype=model.dtype)
        inputs, grad = torch.randn(rows, into, dtype=model.dtype), torch.randn(rows, out, dtype=model.dtype)
        transposed = weight.t().contiguous()
        forward = min(best(lambda: inputs @ weight.t()), best(lambda: inputs @ transposed))  # noqa: B023
        backward = min(best(lambda: grad @ weight), best(lambda: grad @ transposed.t()))  # noqa: B023
        total += count * (forward + backward)
    return total


def best(run: Callable[[], Any], repetitions: int = 5) -> float:
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def foreword_to_loss(base: Any, arguments: argparse.Namespace, target: float) -> dict[str, Any]:
    """`foreword.train` with its defaults, stopped when the dev loss is reached."""
    from foreword.config import TrainConfig
    from foreword.train import train

    class Reached(Exception):
        pass

    config = TrainConfig(train_limit=arguments.rows, dev_limit=40, eval_every=5, patience=0, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"

        def lines() -> Iterator[dict[str, Any]]:
            return map(json.loads, (out / "metrics.jsonl").read_text().splitlines())

        def watch(stage: str, *_: int) -> None:
            started = stage.startswith("training") and (out / "metrics.jsonl").exists()
            if started and any(line.get("dev_nats_per_token", 1e9) <= target for line in lines()):
                raise Reached

        with contextlib.suppress(Reached):
            train(base, None, "e2e", config, out=out, progress=watch)
        seconds, loss = 0.0, float("inf")
        for line in lines():
            if "dev_nats_per_token" not in line:
                seconds += line["seconds"]
            else:
                loss = line["dev_nats_per_token"]
                if loss <= target:
                    break
    return {"seconds": seconds, "dev_loss": loss, "step": line["step"]}


def peft_worker(arguments: argparse.Namespace) -> None:
    import torch
    from peft import PrefixTuningConfig, TaskType, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    from foreword.attention import detach

    base = load(arguments.dtype)
    prepared = batches(base, arguments)
    torch.manual_seed(arguments.seed)
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=LENGTH)
    model = get_peft_model(detach(base.model), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3, weight_decay=0.0)

    def step(batch: dict[str, Any], optimizer: Any) -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    def train() -> dict[str, Any]:
        from foreword.tasks import get_task

        rows = {
            name: get_task("e2e").split(name, limit=n).examples for name, n in (("train", arguments.rows), ("dev", 40))
        }
        encoded = {name: [base.encode(row.prompt, row.completion) for row in part] for name, part in rows.items()}
        generator = torch.Generator().manual_seed(arguments.seed)
        steps_per_epoch = -(-len(encoded["train"]) // BATCH)
        adam = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=PEFT_LEARNING_RATE)
        schedule = get_linear_schedule_with_warmup(adam, 0, PEFT_EPOCHS * steps_per_epoch)
        seconds = 0.0
        for _ in range(PEFT_EPOCHS):
            order = torch.randperm(len(encoded["train"]), generator=generator).tolist()
            for start in range(0, len(order), BATCH):
                batch = base.collate([encoded["train"][row] for row in order[start : start + BATCH]])
                seconds += step(batch, adam)
                schedule.step()
        nats = tokens = 0.0
        with torch.no_grad():
            for start in range(0, len(encoded["dev"]), BATCH):
                batch = base.collate(encoded["dev"][start : start + BATCH])
                count = int((batch["labels"][:, 1:] != -100).sum())
                nats, tokens = nats + float(model(**batch).loss) * count, tokens + count
        return {"seconds": seconds, "dev_loss": nats / tokens, "step": PEFT_EPOCHS * steps_per_epoch}

    def answers(question: dict[str, Any]) -> dict[str, Any]:
        if "memory" in question:
            return memory()
        if "train" in question:
            return train()
        batch = prepared[question["step"] % len(prepared)]
        return {"seconds": step(batch, optimizer), "tokens": int(batch["attention_mask"].sum())}

    serve(answers)


WORKERS = {"foreword": foreword_worker, "peft": peft_worker}


# The report


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{BASE}, E2E rows, batch {BATCH}, prefix length {LENGTH}", title_justify="left")
    for name in ("", "PEFT", "Foreword", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    for dtype, speed in results["speed"].items():
        rate, step = speed["tokens_per_second"], speed["seconds_per_step"]
        table.add_row(
            f"tokens per second, {dtype}", f"{rate['peft']:.0f}", f"{rate['foreword']:.0f}", f"{speed['ratio']:.2f}"
        )
        table.add_row(f"seconds per step, {dtype}", f"{step['peft']:.2f}", f"{step['foreword']:.2f}", "")
        table.add_row(
            f"share of the matrix-product limit, {dtype}", f"{speed['limit_seconds'] / step['peft']:.0%}",
            f"{speed['share_of_limit']:.0%}", "",
        )  # fmt: skip
        peak = speed["peak_memory_bytes"]
        table.add_row(
            f"peak memory in GB, {dtype}", f"{peak['peft'] / 1e9:.2f}", f"{peak['foreword'] / 1e9:.2f}",
            f"{peak['foreword'] / peak['peft']:.2f}",
        )  # fmt: skip
    to_loss = results["to_loss"]
    table.add_row(
        f"seconds to dev loss {to_loss['peft']['dev_loss']:.3f}", f"{to_loss['peft']['seconds']:.0f}",
        f"{to_loss['foreword']['seconds']:.0f}", f"{to_loss['ratio']:.2f}",
    )  # fmt: skip
    Console(width=100).print(table)
    speed = results["speed"]
    peaks = [speed[dtype]["peak_memory_bytes"] for dtype in DTYPES]
    packages = ("torch", "transformers", "peft", "foreword")
    print(json.dumps({
        "ratio_tokens_per_second_float32": round(speed["float32"]["ratio"], 3),
        "ratio_tokens_per_second_bfloat16": round(speed["bfloat16"]["ratio"], 3),
        "ratio_peak_memory": round(max(peak["foreword"] / peak["peft"] for peak in peaks), 3),
        "ratio_seconds_to_loss": round(to_loss["ratio"], 3),
        "share_of_matmul_limit_float32": round(speed["float32"]["share_of_limit"], 3),
        "share_of_matmul_limit_bfloat16": round(speed["bfloat16"]["share_of_limit"], 3),
        "details": results,
        "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]),
        "seed": arguments.seed, "quick": arguments.quick,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
