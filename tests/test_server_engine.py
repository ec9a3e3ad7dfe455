"""The server with the real engine: OpenAI's client gets what `BaseModel.generate` gives, whatever else runs."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fake_engine import Live, live
from foreword.base import BaseModel
from foreword.engine import EngineOptions, EngineRunner
from foreword.prefix import Prefix
from foreword.store import PrefixStore
from serving import prefixes_for
from tiny import save_tiny, tiny_base

ASKED = {"model": "tiny", "prompt": "The foreword comes", "max_tokens": 16}
STOPS: list[list[str]] = [[], ["e"], [" t", "zz"]]
PROMPTS = ["name : Aromi", "The foreword comes", "A prefix is", "Many hands make light work"]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base("llama", max_position_embeddings=128)


@pytest.fixture(scope="module")
def prefixes(base: BaseModel) -> dict[str, Prefix]:
    return prefixes_for(base, 64, gates=True)


@pytest.fixture
def server(base: BaseModel, prefixes: dict[str, Prefix], tmp_path: Path) -> Iterator[Live]:
    """All prefixes, a bank that holds some of them, and a batch that holds fewer sequences than are asked."""
    root = tmp_path / "store"
    store = PrefixStore(root)
    for name, prefix in prefixes.items():
        store.put(prefix, name)
    some = 8 * max(prefix.num_bytes for prefix in prefixes.values())
    runner = EngineRunner(base, store, EngineOptions(max_running=6, prefill_tokens=5, bank_bytes=some))
    with live(base, runner, root) as running:
        yield running


def expected(base: BaseModel, prompt: str, prefix: Prefix | None, tokens: int, stop: list[str]) -> str:
    (text,) = base.generate([prompt], prefix, max_new_tokens=tokens, stop=stop)
    return text


async def ask(client: openai.AsyncOpenAI, name: str, prompt: str, tokens: int, stop: list[str], stream: bool) -> str:
    asked: dict[str, Any] = {
        "model": f"tiny-llama:{name}" if name else "tiny-llama", "prompt": prompt, "max_tokens": tokens,
        "temperature": 0, "stop": stop or None, "seed": 1,
    }  # fmt: skip
    if not stream:
        return (await client.completions.create(**asked)).choices[0].text
    return "".join([each.choices[0].text async for each in await client.completions.create(**asked, stream=True)])


def test_many_prefixes_at_once_each_as_if_alone(server: Live, base: BaseModel, prefixes: dict[str, Prefix]) -> None:
    """64 prefixes and the base model, more than the bank and the batch hold; some clients leave in the middle."""
    chance = random.Random(0)
    plans = [
        (name, chance.choice(PROMPTS), chance.randint(1, 24), chance.choice(STOPS), chance.random() < 0.5)
        for name in [*prefixes, *[""] * 6, *list(prefixes)[:10]]
    ]  # fmt: skip
    wanted = [expected(base, prompt, prefixes.get(name), *rest) for name, prompt, *rest, _ in plans]

    async def play() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
            leaving = [asyncio.create_task(ask(client, name, PROMPTS[1], 80, [], True)) for name in list(prefixes)[:8]]
            answers = [asyncio.create_task(ask(client, *plan)) for plan in plans]
            await asyncio.sleep(0.2)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            return await asyncio.gather(*answers)

    for plan, got, want in zip(plans, asyncio.run(play()), wanted, strict=True):
        assert got == want, plan
    assert len(set(wanted)) > 40  # the control: prefixes do differ in what they write
    stats = server.runner.stats()
    assert (stats.running, stats.waiting) == (0, 0) and stats.bank.evictions > 0
    server.runner.engine.check()


def test_a_replaced_prefix_is_the_new_one_from_then_on(
    server: Live, base: BaseModel, prefixes: dict[str, Prefix], tmp_path: Path
) -> None:
    def written(prefix: Prefix) -> str:
        return expected(base, PROMPTS[0], prefix, 12, [])

    def asked() -> str:
        return server.complete(model="tiny-llama:p0", prompt=PROMPTS[0], max_tokens=12, temperature=0).json()[
            "choices"
        ][0]["text"]

    old, new = written(prefixes["p0"]), written(prefixes["p3"])
    assert old != new and asked() == old
    prefixes["p3"].save(tmp_path / "p3")
    assert server.admin("POST", "/prefixes", json={"name": "p0", "path": str(tmp_path / "p3")}).json()["version"] == 2
    assert asked() == new
    assert server.admin("POST", "/prefixes/p0/unload").status_code == 200
    assert server.admin("POST", "/prefixes/p0/load").status_code == 200
    assert asked() == new


def test_a_damaged_prefix_harms_nobody_else(server: Live, base: BaseModel, prefixes: dict[str, Prefix]) -> None:
    stored = server.service.store.resolve("p1", [""])
    path = server.service.store.path(stored.object_id) / "prefix.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 0xFF
    path.write_bytes(damaged)
    answer = server.complete(model="tiny-llama:p1", max_tokens=3)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "generation_failed"
    assert str(path.parent) not in answer.text
    told = server.complete(model="tiny-llama:p2", prompt=PROMPTS[2], max_tokens=9, temperature=0).json()
    assert told["choices"][0]["text"] == expected(base, PROMPTS[2], prefixes["p2"], 9, [])


def test_a_prefix_that_is_removed_while_a_request_waits_is_a_missing_one(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, may_load = server.service.store, threading.Event()
    load = source.load

    def late(key: str) -> Prefix:
        may_load.wait(30)
        return load(key)

    monkeypatch.setattr(server.runner.engine.bank._source, "load", late)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, model="tiny-llama:p7", max_tokens=3)
        while not server.runner.stats().waiting:
            time.sleep(0.01)
        assert server.admin("DELETE", "/prefixes/p7").status_code == 200
        may_load.set()
        answer = asked.result()
    assert (answer.status_code, answer.json()) == (404, server.complete(model="tiny-llama:p7").json())


def test_log_probabilities_are_those_of_the_model(server: Live, base: BaseModel, prefixes: dict[str, Prefix]) -> None:
    import torch

    asked = {"model": "tiny-llama:p4", "prompt": PROMPTS[2], "max_tokens": 3, "logprobs": 2, "temperature": 0}
    told = server.complete(**asked).json()["choices"][0]["logprobs"]
    ids = base.encode_prompt(PROMPTS[2])
    logits = base.logits(torch.tensor([ids]), prefixes=prefixes["p4"])[0, -1]
    best = logits.log_softmax(-1).topk(2)
    names = [server.service.codec.piece(token)[0] for token in best.indices.tolist()]
    assert told["tokens"][0] == names[0]
    assert told["top_logprobs"][0] == pytest.approx(dict(zip(names, best.values.tolist(), strict=True)), abs=1e-4)


def test_a_seed_makes_a_sampled_answer_repeatable(server: Live) -> None:
    asked = {"model": "tiny-llama:p5", "prompt": PROMPTS[0], "max_tokens": 20, "n": 3, "temperature": 1.5}

    def texts(seed: int) -> list[str]:
        return [choice["text"] for choice in server.complete(**asked, seed=seed).json()["choices"]]

    assert texts(7) == texts(7) and len(set(texts(7))) == 3
    assert texts(8)[0] == texts(7)[1]  # a choice's seed is the request's and its number


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_command_from_its_start_to_its_end(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "tiny")
    command = "import typer; from foreword.cli.serve import serve; typer.run(serve)"
    words = [
        "--base",
        model,
        "--store",
        str(tmp_path / "store"),
        "--port",
        "0",
        "--open",
        "--device",
        "cpu",
        "--grace",
        "5",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "FOREWORD_ADMIN_KEY": "the key of this test"},
    ) as child:  # fmt: skip
        try:
            first, second = child.stdout.readline(), child.stdout.readline()
            (url,) = re.findall(r"http://127\.0\.0\.1:\d+", first)
            assert " serves tiny and 0 prefixes at " in first and second.startswith(
                f"try it  curl {url}/v1/completions"
            )
            if shutil.which("curl") is None:
                second = f"try it  echo '{httpx.post(f'{url}/v1/completions', json=ASKED, trust_env=False).text}'"
            shown = subprocess.run(
                second.removeprefix("try it  "), shell=True, capture_output=True, check=True, timeout=60
            )
            assert b'"finish_reason"' in shown.stdout
            key = {"Authorization": "Bearer the key of this test"}
            assert httpx.get(f"{url}/admin/stats", headers=key, trust_env=False).json()["engine"]["tokens_written"] > 0
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0
            assert "Traceback" not in child.stderr.read()
        finally:
            child.kill()
