"""The whole of it: OpenAI's own client, a live server, the real engine and many prefixes, against one at a time."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fake_engine import Live, live
from foreword.engine import EngineOptions, EngineRunner, Request
from foreword.prefix import Prefix
from foreword.server.limits import Limits
from foreword.store import PrefixStore
from serving import prefixes_for
from tiny import tiny_base

# The collector may meet a response stream of the client, in one process with the server, in a thread of the latter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <async_generator object AsyncResponseStream:pytest.PytestUnraisableExceptionWarning"
)

COUNT = 64
WORDS = ("the", "foreword", "comes", "before", "text", "changes", "how", "it", "is", "read", "river", "food", "area")


def text_of(seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choices(WORDS, k=generator.randint(1, 9)))


@pytest.fixture(scope="module")
def prefixes() -> dict[str, Prefix]:
    """Two versions of every name: p0 and on, the first `COUNT` of them, then their successors."""
    return prefixes_for(tiny_base("llama"), 2 * COUNT, gates=True)


@pytest.fixture
def server(prefixes: dict[str, Prefix], tmp_path: Path) -> Iterator[Live]:
    """A store of 64 prefixes and an engine with room for a few of them, prompts in small pieces."""
    base = tiny_base("llama")
    folder = tmp_path / "store"
    with PrefixStore(folder) as store:
        for number in range(COUNT):
            store.put(prefixes[f"p{number}"], f"p{number}", tenant="acme" if number % 2 else "")
        options = EngineOptions(
            max_running=6, max_waiting=500, prefill_tokens=5, bank_bytes=9 * prefixes["p0"].num_bytes
        )
        with live(base, EngineRunner(base, store, options), folder, needs_keys=True) as running:
            running.service.tenants.add("acme", Limits(0, 0, 0))
            running.service.tenants.add("other", Limits(0, 0, 0))
            yield running


def client_of(server: Live, tenant: str) -> openai.AsyncOpenAI:
    key = server.service.tenants.create_key(tenant)
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, http_client=http, timeout=60)


async def ask(client: openai.AsyncOpenAI, model: str, text: str, new: int, stream: bool) -> str:
    options: dict[str, Any] = {"model": model, "prompt": text, "max_tokens": new, "temperature": 0}
    if not stream:
        return (await client.completions.create(**options)).choices[0].text
    pieces = await client.completions.create(stream=True, **options)
    return "".join([chunk.choices[0].text async for chunk in pieces if chunk.choices])


async def leave(client: openai.AsyncOpenAI, model: str, seed: int) -> None:
    """Begin a stream and go away."""
    pieces = await client.completions.create(
        model=model, prompt=text_of(seed), max_tokens=20, temperature=0, stream=True
    )
    async for _ in pieces:
        await pieces.close()
        return


def test_the_real_client_gets_what_each_prefix_writes_alone(server: Live, prefixes: dict[str, Prefix]) -> None:
    """64 prefixes in mixed batches, while others leave, prefixes are evicted, and names get new versions."""
    base = server.service.base
    generator = random.Random(0)
    asked = [(number % (COUNT + 1), number, generator.randint(1, 12)) for number in range(3 * COUNT)]
    swapped = threading.Event()

    def replace() -> None:
        """New versions of half of the names, as the requests come in."""
        for number in range(COUNT // 2):
            server.service.store.put(prefixes[f"p{COUNT + number}"], f"p{number}", "acme" if number % 2 else "")
            server.runner.evict(server.service.store.resolve(f"p{number}", ["acme", ""]).object_id)
            time.sleep(0.002)
        swapped.set()

    async def run() -> list[str]:
        client = client_of(server, "acme")
        gate = asyncio.Semaphore(40)

        async def one(place: int, seed: int, new: int) -> str:
            model = "tiny-llama" if place == COUNT else f"tiny-llama:p{place}"
            async with gate:
                if seed % 7 == 0:
                    await leave(client, model, seed)
                return await ask(client, model, text_of(seed), new, stream=bool(seed % 2))

        async with client:
            return await asyncio.gather(*(one(*each) for each in asked))

    server.service.name = "tiny-llama"
    changer = threading.Thread(target=replace)
    changer.start()
    texts = asyncio.run(run())
    changer.join()
    assert swapped.is_set() and server.runner.stats().bank.evictions > COUNT
    different = 0
    for (place, seed, new), text in zip(asked, texts, strict=True):
        keys = [] if place == COUNT else [f"p{place}", *([f"p{COUNT + place}"] if place < COUNT // 2 else [])]
        possible = [
            base.generate([text_of(seed)], prefix, max_new_tokens=new)[0]
            for prefix in ([prefixes[key] for key in keys] or [None])
        ]
        assert text in possible, f"p{place} wrote something else for request {seed}"
        different += text != base.generate([text_of(seed)], None, max_new_tokens=new)[0]
    assert different > 2 * COUNT, "the test would not see a prefix that is left out"
    assert server.runner.stats().running == 0


def test_a_tenant_gets_no_other_tenants_prefix(server: Live, prefixes: dict[str, Prefix]) -> None:
    """Paired: what the one may use answers as it should, for the other it is not there, byte for byte."""
    name = server.service.name
    own, foreign = (server.service.tenants.create_key(tenant) for tenant in ("acme", "other"))
    body = {"model": f"{name}:p1", "prompt": "the river", "max_tokens": 6, "temperature": 0}
    answer = server.ask("POST", "/v1/completions", key=own, json=body)
    wanted = server.service.base.generate(["the river"], prefixes["p1"], max_new_tokens=6)[0]
    assert answer.json()["choices"][0]["text"] == wanted
    refused = server.ask("POST", "/v1/completions", key=foreign, json=body)
    missing = server.ask("POST", "/v1/completions", key=foreign, json={**body, "model": f"{name}:p9999"})
    assert refused.status_code == missing.status_code == 404
    assert refused.text.replace("p1", "?") == missing.text.replace("p9999", "?")


def test_who_leaves_in_the_middle_frees_the_row(server: Live) -> None:
    key = server.service.tenants.create_key("acme")
    body = {"model": server.service.name, "prompt": "the", "max_tokens": 60, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    for _ in range(5):
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=30, trust_env=False
        ) as answer:
            next(answer.iter_bytes())
    until = time.monotonic() + 10
    while server.runner.stats().running and time.monotonic() < until:
        time.sleep(0.01)
    assert server.runner.stats().running == 0
    server.runner.engine.check()
    assert not any(part.any() for part in server.runner.engine.cache.keys.values())


def test_nothing_of_a_tenant_is_left_in_memory(server: Live) -> None:
    """Paired: before the tenant is removed its keys are found in the bank, afterwards in no tensor of the engine."""
    key, engine = server.service.tenants.create_key("acme"), server.runner.engine
    found = server.service.store.resolve("p1", ["acme"])
    assert found is not None
    site = next(iter(engine.base.geometry))
    marker = server.service.store.load(found.object_id).sites[site].keys.flatten()[:4]

    def places() -> list[str]:
        banked = [entry.sites[site].keys for entry, _ in engine.bank._device.entries.values()]
        held = {"bank": banked, "rows": [engine.cache.keys[site]]}
        windows = [(name, t.flatten().unfold(0, 4, 1)) for name, tensors in held.items() for t in tensors]
        return [name for name, each in windows if (each == marker).all(1).any()]

    assert server.complete(key, model=f"{server.service.name}:p1").status_code == 200
    assert places() == ["bank"]
    assert server.admin("DELETE", "/tenants/acme").status_code == 200
    assert places() == []
    assert server.service.store.resolve("p1", ["acme"]) is None
    assert server.complete(key).status_code == 401


def test_a_request_that_waits_can_still_be_finished_when_its_version_is_replaced(
    server: Live, prefixes: dict[str, Prefix]
) -> None:
    """The version that was current when a request came is what it is answered with."""
    runner, store = server.runner, server.service.store
    old = store.resolve("p0", [""])
    assert old is not None
    from tests.test_runner import Inbox

    inboxes = [Inbox() for _ in range(12)]
    for inbox in inboxes:
        runner.submit(Request((5, 6, 7), 20, old.object_id), inbox)
    store.put(prefixes[f"p{COUNT}"], "p0")
    runner.evict(old.object_id)
    assert [inbox.reason() for inbox in inboxes] == ["length"] * 12
    assert len({tuple(inbox.events) for inbox in inboxes}) == 1
