"""Serving many prefixes at once, beside the plain ways: what the engine gains, and what a prefix costs.

    python benchmarks/serve.py            # about 10 minutes on 2 cores
    python benchmarks/serve.py --quick    # a smoke test; its figures mean little

Sides take turns in one process, in an order that moves on from round to round, on the same prompts and with as many new
tokens; a ratio is the median over rounds. Tokens per second count what is written, with the reading of prompts in the
time. The last line is one JSON document:

* `ratio_vs_no_prefix`: 32 requests through 32 prefixes, against the same requests through none (above 0.95 is wanted);
  `_from_disk` the same with none of the prefixes in memory
* `ratio_vs_peft_switching`: against PEFT prefix tuning that sets each request's adapter and generates (8)
* `ratio_vs_generate`: against `transformers` `generate` on one static batch of the base model alone (1.3)
* `cold_ttft_p95_extra_ms`: the 95th percentile of the time to the first token of a prefix that is on the disk alone,
  less that of one in memory (20); `_busy` the same while eight others write
* `startup_seconds_10k_prefixes`: from the start of `foreword serve` until it is ready (5)
* `ratio_past_bank_size`: four times as many prefixes by turns as the bank has room for, against room for all
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import foreword as fw
from foreword.engine import EngineOptions, EngineRunner, Event, Finished, Request, Token
from foreword.store import PrefixStore
from foreword.threads import release_team

BASE, LENGTH = "smollm2-135m", 10
# Registered prefixes, concurrent requests, tokens of a prompt and of an answer, rounds, first tokens that are timed.
FULL = {"registered": 10_000, "requests": 32, "prompt": 64, "new": 64, "rounds": 3, "firsts": 60, "alone": 4}
QUICK = {"registered": 100, "requests": 8, "prompt": 16, "new": 8, "rounds": 1, "firsts": 6, "alone": 2}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def random_prefix(base: fw.BaseModel, seed: int) -> fw.Prefix:
    """A prefix of random numbers on the scale of the model's own keys and values."""
    from foreword.init import new_prefix

    return new_prefix(base, LENGTH, "random", seed=seed)


def filled_store(root: Path, base: fw.BaseModel, count: int) -> PrefixStore:
    """A store with so many different prefixes, p0 and on; what is there already stays."""
    store = PrefixStore(root)
    here = {stored.name for stored in store.list(limit=None)}
    first = random_prefix(base, 0)
    for number in range(count):
        if f"p{number}" not in here:
            sites = {site: t._replace(keys=t.keys + number) for site, t in first.sites.items()}
            store.put(replace(first, sites=sites), f"p{number}")
        if number % 1000 == 999:
            note(f"{number + 1} prefixes in the store")
    return store


# The sides


class Served:
    """The engine, with requests of `new` tokens through given prefixes, all at once."""

    def __init__(self, base: fw.BaseModel, store: PrefixStore, bank_bytes: int = 512 << 20, rows: int = 32) -> None:
        options = EngineOptions(max_running=rows, max_waiting=1024, bank_bytes=bank_bytes)
        self.runner = EngineRunner(base, store, options)
        self.runner.start()

    def seconds(self, prompts: list[tuple[int, ...]], new: int, keys: list[str | None]) -> float:
        ends = [threading.Event() for _ in prompts]
        failed: list[str] = []

        def listener(place: int) -> Callable[[Event], None]:
            def on_event(event: Event) -> None:
                if isinstance(event, Finished):
                    if event.reason != "length":
                        failed.append(f"{event.reason}: {event.message}")
                    ends[place].set()

            return on_event

        release_team()  # of the sides that ran in this thread before
        start = time.perf_counter()
        for place, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            self.runner.submit(Request(prompt, new, key), listener(place))
        for end in ends:
            end.wait()
        taken = time.perf_counter() - start
        if failed:
            raise SystemExit(f"a request failed: {failed[0]}")
        return taken

    def first_token(self, prompt: tuple[int, ...], key: str) -> float:
        """Seconds until the first token of one request."""
        first = threading.Event()
        start = time.perf_counter()
        seen: list[float] = []

        def on_event(event: Event) -> None:
            if isinstance(event, Token) and not seen:
                seen.append(time.perf_counter() - start)
            if isinstance(event, Finished):
                first.set()

        self.runner.submit(Request(prompt, 1, key), on_event)
        first.wait()
        return seen[0]

    def close(self) -> None:
        self.runner.stop(0)


def generate_seconds(base: fw.BaseModel, prompts: list[tuple[int, ...]], new: int) -> float:
    """`transformers` on one static batch, the model as it is without us."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=base.model.config.eos_token_id,
    )
    ids = torch.tensor(prompts)
    with base.attachment.suspended(), torch.no_grad():
        start = time.perf_counter()
        written = base.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        taken = time.perf_counter() - start
    assert written.shape[1] == ids.shape[1] + new
    return taken


class Switched:
    """PEFT prefix tuning with an adapter for each prefix; requests one after the other."""

    def __init__(self, dtype: str, count: int) -> None:
        from peft import PrefixTuningConfig, TaskType, get_peft_model

        from foreword.attention import detach

        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=LENGTH)
        self.model = get_peft_model(detach(fw.BaseModel.load(BASE, dtype=dtype).model), config, adapter_name="p0")
        for number in range(1, count):
            self.model.add_adapter(f"p{number}", config)
        self.model.eval()

    @torch.no_grad()
    def seconds(self, prompts: list[tuple[int, ...]], new: int) -> float:
        start = time.perf_counter()
        for number, prompt in enumerate(prompts):
            self.model.set_adapter(f"p{number}")
            ids = torch.tensor([prompt])
            written = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            assert written.shape[1] == ids.shape[1] + new
        return time.perf_counter() - start


# What is measured


def throughput(base: fw.BaseModel, store: PrefixStore, dtype: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Tokens per second of every side, and the ratios of ours with prefixes to the others, by rounds."""
    count, new = sizes["requests"], sizes["new"]
    generator = random.Random(0)
    prompts = [tuple(generator.choices(range(100, 40_000), k=sizes["prompt"])) for _ in range(count)]
    keys: list[str | None] = [store.resolve(f"p{number}", [""]).object_id for number in range(count)]  # type: ignore[union-attr]
    switched, few = Switched(dtype, sizes["alone"]), prompts[: sizes["alone"]]
    rates: dict[str, list[float]] = {}

    def measure(turn: int, sides: dict[str, Callable[[], float]]) -> None:
        names = list(sides)
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            rate = sides[name]()
            if turn >= 0:
                rates.setdefault(name, []).append(rate)

    for turn in range(-1, sizes["rounds"]):
        served = Served(base, store, rows=count)
        served.seconds(prompts, new, keys)  # what a start costs is measured elsewhere

        def from_disk(served: Served = served) -> float:
            for key in keys:
                served.runner.evict(str(key))
            return count * new / served.seconds(prompts, new, keys)

        measure(turn, {
            "prefixes": lambda served=served: count * new / served.seconds(prompts, new, keys),
            "no_prefix": lambda served=served: count * new / served.seconds(prompts, new, [None] * count),
            "from_disk": from_disk,
        })  # fmt: skip
        served.close()  # the others run without the engine's faster layers
        measure(turn, {
            "generate": lambda: count * new / generate_seconds(base, prompts, new),
            "peft": lambda: len(few) * new / switched.seconds(few, new),
        })  # fmt: skip
        note(f"{dtype} round {turn + 1} of {sizes['rounds']}")
    medians = {name: statistics.median(each) for name, each in rates.items()}

    def ratio(ours: str, theirs: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))

    ratios = {name: ratio("prefixes", name) for name in ("no_prefix", "generate", "peft")}
    return {"tokens_per_second": medians, "ratio": {**ratios, "from_disk": ratio("from_disk", "no_prefix")}}


def first_tokens(base: fw.BaseModel, store: PrefixStore, sizes: dict[str, int], busy: bool) -> dict[str, float]:
    """Milliseconds to the first token, from memory and from the disk."""
    served = Served(base, store)
    generator = random.Random(1)
    prompt = tuple(generator.choices(range(100, 40_000), k=16))
    keys = [store.resolve(f"p{number}", [""]).object_id for number in range(sizes["firsts"])]  # type: ignore[union-attr]
    stop = threading.Event()

    def occupy() -> None:
        while not stop.is_set():
            served.seconds([prompt] * 8, 64, [None] * 8)

    others = threading.Thread(target=occupy)
    if busy:
        others.start()
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for key in [keys[0], *keys]:
        for kind in ("cold", "warm"):
            if kind == "cold":
                served.runner.evict(key)
            times[kind].append(1000 * served.first_token(prompt, key))
            time.sleep(0.05 * generator.random())
    stop.set()
    if busy:
        others.join()
    served.close()
    found = {}
    for kind, each in times.items():
        cuts = statistics.quantiles(each[1:], n=20)
        found |= {f"{kind}_p50_ms": statistics.median(each[1:]), f"{kind}_p95_ms": cuts[18]}
    return {**found, "p95_extra_ms": found["cold_p95_ms"] - found["warm_p95_ms"]}


def past_the_bank(base: fw.BaseModel, store: PrefixStore, sizes: dict[str, int]) -> dict[str, float]:
    """Requests by turns over many prefixes, with a bank for a quarter of them and with one for all."""
    count, new = 4 * sizes["requests"], sizes["new"] // 2
    generator = random.Random(2)
    prompts = [tuple(generator.choices(range(100, 40_000), k=sizes["prompt"])) for _ in range(count)]
    keys: list[str | None] = [store.resolve(f"p{number}", [""]).object_id for number in range(count)]  # type: ignore[union-attr]
    each = LENGTH * sum(shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in base.geometry.values())
    num_bytes = each * base.dtype.itemsize
    rates: dict[str, list[float]] = {"small": [], "large": []}
    small, large = Served(base, store, count // 4 * num_bytes), Served(base, store, 2 * count * num_bytes)
    for turn in range(-1, max(1, sizes["rounds"] - 2)):
        for name, served in (("small", small), ("large", large))[:: 1 if turn % 2 else -1]:
            rate = count * new / served.seconds(prompts, new, keys)
            if turn >= 0:
                rates[name].append(rate)
        note(f"bank round {turn + 1}")
    stats = small.runner.stats().bank
    small.close(), large.close()
    ratio = statistics.median(a / b for a, b in zip(rates["small"], rates["large"], strict=True))
    return {
        "ratio": ratio,
        "bank_bytes": stats.num_bytes,
        "bank_budget": count // 4 * num_bytes,
        "misses": stats.misses,
    }


def startup(root: Path) -> dict[str, float]:
    """Seconds until `foreword serve` is ready, and its memory then."""
    command = [sys.executable, "-m", "foreword", "serve", "--base", BASE, "--store", str(root), "--port", "0", "--open"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.]+:\d+", line)))
            while True:
                try:
                    with urllib.request.urlopen(f"{address}/ready", timeout=5) as answer:
                        if answer.status == 200:
                            break
                except OSError:
                    time.sleep(0.02)
            seconds = time.perf_counter() - start
            status = Path(f"/proc/{process.pid}/status")
            found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
        finally:
            process.terminate()
    return {"seconds": seconds, "resident_bytes": 1024 * int(found[1]) if found else 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--store", type=Path, help="keep the registered prefixes here (default: a temporary folder)")
    parser.add_argument("--skip", default="", help="parts to leave out: throughput, first, bank, startup")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = QUICK if arguments.quick else FULL
    skip = set(filter(None, arguments.skip.split(",")))
    root = arguments.store or Path(tempfile.mkdtemp(prefix="foreword-serve-"))
    result: dict[str, Any] = {}
    try:
        base = fw.BaseModel.load(BASE, dtype="float32", device="cpu")
        store = filled_store(root, base, sizes["registered"] if "startup" not in skip else 4 * sizes["requests"] + 64)
        if "throughput" not in skip:
            dtypes = arguments.dtypes.split(",")
            by_dtype = {
                dtype: throughput(fw.BaseModel.load(BASE, dtype=dtype, device="cpu"), store, dtype, sizes)
                for dtype in dtypes
            }
            lowest = {
                name: min(each["ratio"][name] for each in by_dtype.values())
                for name in ("no_prefix", "peft", "generate", "from_disk")
            }
            result |= {
                "ratio_vs_no_prefix": lowest["no_prefix"], "ratio_vs_peft_switching": lowest["peft"],
                "ratio_vs_generate": lowest["generate"], "ratio_vs_no_prefix_from_disk": lowest["from_disk"],
                "throughput": by_dtype,
            }  # fmt: skip
        if "first" not in skip:
            for busy in (False, True):
                found = first_tokens(base, store, sizes, busy)
                name = "cold_ttft_p95_extra_ms" + ("_busy" if busy else "")
                result |= {name: found["p95_extra_ms"], f"first_tokens{'_busy' if busy else ''}": found}
        if "bank" not in skip:
            found = past_the_bank(base, store, sizes)
            result |= {"ratio_past_bank_size": found["ratio"], "past_the_bank": found}
        if "startup" not in skip:
            found = startup(root)
            result |= {"startup_seconds_10k_prefixes": found["seconds"], "startup": found}
    finally:
        if arguments.store is None:
            shutil.rmtree(root, ignore_errors=True)
    machine = {"python": platform.python_version(), "threads": torch.get_num_threads(), "machine": platform.machine()}
    machine |= {name: version(name) for name in ("torch", "transformers", "peft")}
    print(json.dumps({**result, "sizes": sizes, **machine}))


if __name__ == "__main__":
    main()
