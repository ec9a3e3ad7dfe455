"""What a server does when too much is asked of it, when clients leave, dawdle or lie, and when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_engine import FakeRunner, Live, live, spoken
from foreword.base import BaseModel
from foreword.errors import ConfigError, EngineStopped
from foreword.server.errors import ApiError
from foreword.server.limits import Limits, Slots, TenantState, TokenBucket
from foreword.server.run import listen
from foreword.server.service import ServerOptions
from foreword.server.tenants import AdminKey
from tiny import tiny_base


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base("llama")


@pytest.fixture
def server(base: BaseModel, tmp_path: Path) -> Iterator[Live]:
    with live(base, FakeRunner(max_tokens=100_000), tmp_path / "store") as running:
        yield running


def until(true: Callable[[], Any], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Begin some work; call what is returned for its result."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> Any:
        thread.join(120)
        return found[0]

    return result


@contextlib.contextmanager
def connection(server: Live) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as raw:
        yield raw


def request(body: dict[str, Any] | bytes, path: str = "/v1/completions", **headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


ASKED = {"model": "tiny-llama", "prompt": "A prefix", "max_tokens": 50_000}


# Clients that leave or dawdle


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_who_leaves_frees_its_place(server: Live, stream: bool, begun: bool) -> None:
    if not begun:
        server.runner.hold()
    server.runner.step_seconds = 0.001
    with connection(server) as raw:
        raw.sendall(request({**ASKED, "n": 2, "stream": stream}))
        assert until(lambda: len(server.runner.active) == 2)
        if begun:
            assert until(lambda: server.runner.active[0].written > 5)
    assert server.runner.wait_idle()
    assert [reason for _, reason in server.runner.ended] == ["cancelled", "cancelled"]
    assert until(lambda: server.service.inflight == 0)
    assert until(lambda: not server.service.inflight_by_tenant())
    assert 'finished_reason="cancelled"} 2.0' in server.ask("GET", "/metrics").text


def test_who_leaves_while_waiting_frees_its_place_in_the_line(base: BaseModel, tmp_path: Path) -> None:
    with live(base, FakeRunner(max_tokens=100_000), tmp_path / "store", needs_keys=True) as server:
        server.service.tenants.add("acme", Limits(0, 1, 10))
        key = server.service.tenants.create_key("acme")
        server.runner.hold()
        first = in_background(lambda: server.complete(key, max_tokens=2))
        assert until(lambda: server.runner.active)
        with connection(server) as raw:
            raw.sendall(request(ASKED, Authorization=f"Bearer {key}"))
            assert until(lambda: server.service.inflight_by_tenant() == {"acme": 2})
        assert until(lambda: server.service.inflight_by_tenant() == {"acme": 1})
        server.runner.release()
        assert first().status_code == 200
        assert len(server.runner.requests) == 1


def test_a_slow_reader_keeps_no_place_and_gets_all(server: Live) -> None:
    with connection(server) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(request({**ASKED, "max_tokens": 2000, "stream": True}, Connection="close"))
        assert until(lambda: server.runner.ended)  # the engine has not waited for the reader
        assert server.complete(max_tokens=3).status_code == 200
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        found = b""
        while piece := raw.recv(1 << 16):
            found += piece
    assert found.count(b'"finish_reason":"length"') == 1 and b"data: [DONE]" in found
    text = b"".join(found.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2]).decode()
    said = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert len("".join(each["choices"][0]["text"] for each in said)) > 2000


def test_a_reader_that_takes_nothing_is_left(base: BaseModel, tmp_path: Path) -> None:
    options = {"send_timeout_seconds": 0.3}
    with live(base, FakeRunner(max_tokens=100_000), tmp_path / "store", **options) as server, connection(server) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(request({**ASKED, "max_tokens": 40_000, "stream": True}))
        assert until(lambda: server.service.inflight == 1)
        assert until(lambda: server.service.inflight == 0)
        assert server.runner.wait_idle()
        assert not server.service.inflight_by_tenant()


def test_a_stream_comes_piece_by_piece(server: Live) -> None:
    server.runner.hold()
    body = {**ASKED, "max_tokens": 3, "stream": True}
    with httpx.Client(trust_env=False) as client:
        wait = in_background(
            lambda: client.send(client.build_request("POST", f"{server.url}/v1/completions", json=body), stream=True)
        )
        server.runner.step_seconds = 0.2
        server.runner.release()
        answer = wait()
        times = [time.monotonic() for line in answer.iter_lines() if line.startswith("data: {")]
        answer.close()
    assert times[-1] - times[0] > 0.15


# Bodies


def test_a_body_that_is_too_large_is_refused(base: BaseModel, tmp_path: Path) -> None:
    with live(base, FakeRunner(), tmp_path / "store", max_body_bytes=1000) as server:
        small = {"model": "tiny-llama", "prompt": "x", "user": "y" * 800}
        assert server.ask("POST", "/v1/completions", json=small).status_code == 200
        large = json.dumps({**small, "user": "y" * 2000}).encode()
        for content in (large, iter([large[:600], large[600:]])):  # the second without Content-Length
            answer = server.ask(
                "POST", "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
        with connection(server) as raw:  # one that says that it is large, and has not sent it
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 413")
        assert server.ask("GET", "/health").status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(base: BaseModel, tmp_path: Path) -> None:
    with live(base, FakeRunner(), tmp_path / "store", body_timeout_seconds=0.2) as server, connection(server) as raw:
        raw.sendall(request(ASKED)[:-10])
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")
        assert until(lambda: server.service.inflight == 0)


def test_a_client_may_leave_while_it_sends(server: Live) -> None:
    with connection(server) as raw:
        raw.sendall(request(ASKED)[:-10])
        assert until(lambda: server.service.inflight == 1)
    assert until(lambda: server.service.inflight == 0)
    assert server.complete(max_tokens=2).status_code == 200


# Too much


def test_a_full_queue_is_429_and_passes(server: Live) -> None:
    server.runner.full = True
    answer = server.complete()
    assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
    assert answer.json()["error"] == {
        "message": "The server has too much to do.", "type": "rate_limit_error", "param": None, "code": "queue_full",
    }  # fmt: skip
    assert server.complete(stream=True).status_code == 429
    server.runner.full = False
    assert server.complete(max_tokens=2).status_code == 200
    assert 'foreword_requests_refused_total{reason="queue_full"} 2.0' in server.ask("GET", "/metrics").text
    assert [line["reason"] for line in server.audit()] == ["queue_full"] * 2


def test_a_request_of_which_a_part_finds_no_place_runs_in_no_part(base: BaseModel, tmp_path: Path) -> None:
    with live(base, FakeRunner(most=3), tmp_path / "store") as server:
        server.runner.hold()
        assert server.complete(n=4).status_code == 429
        assert server.runner.wait_idle()
        assert [reason for _, reason in server.runner.ended] == ["cancelled"] * 3


def test_limits_of_a_tenant(base: BaseModel, tmp_path: Path) -> None:
    with live(base, FakeRunner(), tmp_path / "store", needs_keys=True) as server:
        server.service.tenants.add("acme", Limits(requests_per_minute=0, concurrent=2, queued=1))
        key = server.service.tenants.create_key("acme")
        server.runner.hold()
        waiting = [in_background(lambda: server.complete(key, max_tokens=2)) for _ in range(3)]
        assert until(lambda: server.service.inflight_by_tenant() == {"acme": 3})
        assert len(server.runner.active) == 2
        answer = server.complete(key)
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "concurrency_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1
        server.runner.release()
        assert [result().status_code for result in waiting] == [200] * 3
        assert server.runner.most_running == 2
        answer = server.complete(key, n=3)  # would never have a place
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"
        server.service.tenants.change("acme", Limits(requests_per_minute=2))
        assert [server.complete(key, max_tokens=1).status_code for _ in range(3)] == [200, 200, 429]
        answer = server.ask("GET", "/v1/models", key=key)
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 30
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_more_connections_than_the_server_holds_are_503(base: BaseModel, tmp_path: Path) -> None:
    with live(base, FakeRunner(), tmp_path / "store", max_inflight=1) as server:
        server.runner.hold()
        first = in_background(lambda: server.complete(max_tokens=2))
        assert until(lambda: server.runner.active)
        answer = server.complete()
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert server.ask("GET", "/health").status_code == 200
        server.runner.release()
        assert first().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_its_time(base: BaseModel, tmp_path: Path, stream: bool) -> None:
    with live(base, FakeRunner(), tmp_path / "store", request_timeout_seconds=0.3) as server:
        server.runner.hold()
        answer = server.complete(stream=stream)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
        assert server.runner.wait_idle()


def test_who_waits_in_line_has_no_more_time(base: BaseModel, tmp_path: Path) -> None:
    with live(base, FakeRunner(), tmp_path / "store", needs_keys=True, request_timeout_seconds=0.4) as server:
        server.service.tenants.add("acme", Limits(0, 1, 10))
        key = server.service.tenants.create_key("acme")
        server.runner.hold()
        both = [in_background(lambda: server.complete(key)) for _ in range(2)]
        assert [result().status_code for result in both] == [504, 504]
        assert until(lambda: not server.service.inflight_by_tenant()) and len(server.runner.requests) <= 2


def test_a_deadline_within_a_stream_is_told_in_it(base: BaseModel, tmp_path: Path) -> None:
    runner = FakeRunner(step_seconds=0.05)
    with live(base, runner, tmp_path / "store", request_timeout_seconds=1.5) as server:
        lines = server.complete(stream=True, max_tokens=50).text.split("\n\n")
        assert json.loads(lines[-3][6:])["error"]["code"] == "deadline_exceeded"
        assert lines[-2] == "data: [DONE]"


def test_an_engine_that_never_answers_holds_no_request_for_ever(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreword.server.completions._LATE_SECONDS", 0.1)
    with live(base, FakeRunner(), tmp_path / "store", request_timeout_seconds=0.2) as server:
        monkeypatch.setattr(server.runner, "_step", lambda *_, **__: None)
        assert server.complete().status_code == 504
        server.runner.active.clear()


# The parts


def test_slots_are_given_in_order_and_taken_back_whoever_leaves() -> None:
    async def play() -> None:
        slots = Slots(2, 4)
        await slots.take(2)
        first, second = asyncio.create_task(slots.take(1)), asyncio.create_task(slots.take(2))
        await asyncio.sleep(0)
        third = asyncio.create_task(slots.take(1))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as full:
            await slots.take(1)
        assert full.value.status_code == 429 and slots.waiting == 4
        second.cancel()
        await asyncio.sleep(0)
        assert slots.waiting == 2
        slots.give_back(1)
        await asyncio.sleep(0)
        assert first.done() and not third.done()
        slots.give_back(1)
        third.cancel()  # its turn has come, and it has left
        with contextlib.suppress(asyncio.CancelledError):
            await third
        assert (slots.used, slots.waiting) == (1, 0)
        slots.give_back(1)
        with pytest.raises(ApiError) as never:
            await slots.take(3)
        assert never.value.status_code == 400

    asyncio.run(play())


@given(data=st.data())
def test_slots_are_never_more_than_there_are(data: st.DataObject) -> None:
    async def play() -> None:
        slots, tasks, every, inside = Slots(3, 5), [], [], 0

        async def run(count: int) -> None:
            nonlocal inside
            await slots.take(count)
            inside += count
            try:
                await asyncio.sleep(1000)
            finally:
                inside -= count
                slots.give_back(count)

        for _ in range(data.draw(st.integers(1, 25))):
            if tasks and data.draw(st.booleans()):
                tasks.pop(data.draw(st.integers(0, len(tasks) - 1))).cancel()
            else:
                tasks.append(asyncio.create_task(run(data.draw(st.integers(1, 3)))))
                every.append(tasks[-1])
            if data.draw(st.booleans()):
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert inside <= 3 and slots.used <= 3 and 0 <= slots.waiting <= 5
        for task in tasks:
            task.cancel()
        await asyncio.gather(*every, return_exceptions=True)
        assert (slots.used, slots.waiting, inside) == (0, 0, 0)

    asyncio.run(play())


@given(gaps=st.lists(st.floats(0, 30), max_size=200), per_minute=st.integers(1, 100))
def test_no_minute_has_more_than_a_full_bucket_and_what_flows_in(gaps: list[float], per_minute: int) -> None:
    now, passed = [0.0], []
    bucket = TokenBucket(per_minute, lambda: now[0])
    for gap in gaps:
        now[0] += gap
        wait = bucket.take()
        if not wait:
            passed.append(now[0])
        else:
            now[0] += wait * 1.0001
            assert bucket.take() == 0.0
            passed.append(now[0])
    for end in passed:
        assert sum(end - 60 < each <= end for each in passed) <= 2 * per_minute + 1


def test_a_tenant_that_is_sent_away_begins_nothing_more() -> None:
    async def play() -> None:
        state = TenantState(Limits(0, 1, 5))
        gone = ApiError(401, "gone")
        async with state.running(1):
            waits = asyncio.create_task(state.running(1).__aenter__())
            await asyncio.sleep(0)
            state.close(gone)
            with pytest.raises(ApiError, match="gone"):
                await waits
            with pytest.raises(ApiError, match="gone"):
                await state.running(1).__aenter__()
        assert state.idle

    asyncio.run(play())


def test_settings_that_cannot_be_are_refused() -> None:
    for options in ({"max_body_bytes": 0}, {"request_timeout_seconds": 0}, {"send_timeout_seconds": float("nan")}):
        with pytest.raises(ConfigError, match="correct it"):
            ServerOptions(**options)
    with pytest.raises(ConfigError, match="at least 16"):
        AdminKey("short")
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(ConfigError, match="another --port"):
            listen("127.0.0.1", bound.getsockname()[1])


# The end


def test_a_server_that_stops_ends_what_runs_and_takes_nothing_new(server: Live) -> None:
    server.runner.hold()
    running = in_background(lambda: server.complete(max_tokens=25))
    assert until(lambda: server.runner.active)
    server.server.stop()
    answer = server.complete()
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert server.ask("GET", "/ready").status_code == 503
    assert server.ask("GET", "/health").status_code == 200
    assert server.ask("GET", "/version").status_code == 200
    server.runner.release()
    told = running()
    assert told.status_code == 200 and told.json()["usage"]["completion_tokens"] == 25


def test_what_does_not_end_in_the_grace_is_told_so(base: BaseModel, tmp_path: Path) -> None:
    runner = FakeRunner(max_tokens=100_000, step_seconds=0.01)
    with live(base, runner, tmp_path / "store", grace_seconds=0.3) as server:
        stream = in_background(lambda: server.complete(max_tokens=50_000, stream=True))
        whole = in_background(lambda: server.complete(max_tokens=50_000))
        assert until(lambda: len(runner.active) == 2)
        server.server.stop()
        lines = stream().text.split("\n\n")
        assert json.loads(lines[-3][6:])["error"]["code"] == "shutdown" and lines[-2] == "data: [DONE]"
        assert whole().status_code == 503 and whole().json()["error"]["code"] == "shutdown"


def test_an_engine_that_died_ends_the_server(base: BaseModel, tmp_path: Path) -> None:
    store = tmp_path / "store"
    caught: list[BaseException] = []
    with pytest.MonkeyPatch.context() as patch, live(base, FakeRunner(), store) as server:
        patch.setattr(threading, "excepthook", lambda told: caught.append(told.exc_value))
        server.runner.hold()
        waiting = in_background(server.complete)
        assert until(lambda: server.runner.active)
        server.runner.die()
        assert waiting().status_code == 503
        with contextlib.suppress(httpx.TransportError):
            assert server.ask("GET", "/health").status_code == 503
        assert until(lambda: caught)
    assert isinstance(caught[0], EngineStopped)


PROGRAM = """
import sys, pathlib
sys.path.insert(0, {tests!r})
import logging; logging.basicConfig(level=logging.WARNING)
from fake_engine import FakeRunner
from foreword.server.audit import Audit
from foreword.server.run import Server, listen
from foreword.server.service import ServerOptions, Service
from foreword.server.tenants import TenantStore
from foreword.store import PrefixStore
from tiny import tiny_base
folder = pathlib.Path({folder!r})
runner = FakeRunner(max_tokens=100_000, step_seconds=0.02)
store = PrefixStore(folder)
runner.start()
options = ServerOptions(needs_keys=False, grace_seconds={grace})
service = Service(tiny_base("llama"), runner, store, TenantStore(folder), Audit(folder / "audit.jsonl"), options)
bound = listen("127.0.0.1", 0)
Server(service).serve_until_stopped(bound, lambda: print(bound.getsockname()[1], flush=True))
"""


@contextlib.contextmanager
def process(folder: Path, grace: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    program = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(folder), grace=grace)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child, f"http://127.0.0.1:{int(child.stdout.readline())}"
        finally:
            child.kill()


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={**ASKED, **body}, timeout=120, trust_env=False)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_in_good_order(tmp_path: Path, sent: signal.Signals) -> None:
    with process(tmp_path / "store", grace=60) as (child, url):
        running = in_background(lambda: post(url, max_tokens=150, stream=True))
        assert until(lambda: "foreword_num_requests_running 1" in httpx.get(f"{url}/metrics", trust_env=False).text)
        child.send_signal(sent)
        assert until(lambda: httpx.get(f"{url}/ready", trust_env=False).status_code == 503)
        refused = post(url, max_tokens=2)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert '"finish_reason":"length"' in running().text
        assert child.wait(120) == 0
        assert "Traceback" not in child.stderr.read()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with process(tmp_path / "store", grace=1000) as (child, url):
        running = in_background(lambda: post(url))
        assert until(lambda: "foreword_num_requests_running 1" in httpx.get(f"{url}/metrics", trust_env=False).text)
        child.send_signal(signal.SIGTERM)
        assert until(lambda: httpx.get(f"{url}/ready", trust_env=False).status_code == 503)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 128 + signal.SIGTERM
        assert isinstance(running(), httpx.TransportError)


async def flood(server: Live, requests: int) -> list[int]:
    """So many requests at once; their statuses."""
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120, trust_env=False) as client:
        asked = {"model": "tiny-llama", "prompt": "A prefix", "max_tokens": 20}
        answers = await asyncio.gather(*(client.post("/v1/completions", json=asked) for _ in range(requests)))
        return [answer.status_code for answer in answers]


def is_calm(server: Live) -> bool:
    return server.runner.wait_idle() and until(lambda: not server.service.inflight_by_tenant()) and (
        until(lambda: server.service.inflight == 0) and server.complete(max_tokens=2).status_code == 200
    )  # fmt: skip


def test_overload_is_refused_and_forgotten(base: BaseModel, tmp_path: Path) -> None:
    """Many clients at once: each is answered or refused, and nothing is left of it afterwards."""
    with live(base, FakeRunner(spoken([35] * 20), most=4), tmp_path / "store") as server:
        statuses = asyncio.run(flood(server, 300))
        assert set(statuses) <= {200, 429} and statuses.count(200) >= 4
        assert is_calm(server)


@pytest.mark.slow
def test_a_minute_of_overload_takes_no_memory(base: BaseModel, tmp_path: Path) -> None:
    runner = FakeRunner(spoken([35] * 20), most=4, step_seconds=0.01)
    with live(base, runner, tmp_path / "store") as server:
        statuses = Counter(asyncio.run(flood(server, 1000)))
        before, end = psutil.Process().memory_info().rss, time.monotonic() + 60
        while time.monotonic() < end:
            statuses += Counter(asyncio.run(flood(server, 1000)))
        assert set(statuses) == {200, 429} and statuses[429] > statuses[200]
        assert is_calm(server)
        assert psutil.Process().memory_info().rss < before + (50 << 20)
