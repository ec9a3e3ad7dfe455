"""The load generator: the plan is a function of its seed, times are right to the digit, failures are counted."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import selectors
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from foreword.errors import ConfigError, ForewordError, MissingPackage
from foreword.load import Measured, Workload, choose_models, measure, plan, prepare
from foreword.load_client import Planned, Sample, Server, WordSize, payloads
from foreword.load_report import in_flight, latencies, load_png, save_load, summary, token_rate

httpx = pytest.importorskip("httpx")


# --- time that passes only when everybody waits ---------------------------------------------------------------------


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer, so that times are exact and tests take no time."""

    def __init__(self) -> None:
        loop = self
        self.now = 0.0

        class Selector(selectors.DefaultSelector):
            def select(self, timeout: float | None = None) -> Any:
                loop.now += timeout or 0.0
                return super().select(None if timeout is None else 0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now

    def stall(self, seconds: float) -> None:
        """Let time pass in which this process does nothing else."""
        self.now += seconds


def in_virtual_time(work: Callable[[VirtualLoop], Awaitable[Any]]) -> Any:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(asyncio.wait_for(work(loop), None))
    finally:
        loop.close()


def event(text: str = " word", finish: str | None = None, **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": finish}], **more}).encode() + b"\n\n"


def usage(prompt: int, completion: int) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}).encode() + b"\n\n"  # fmt: skip # noqa: E501


DONE = b"data: [DONE]\n\n"
Script = list[tuple[float, bytes | Exception]]


class Stream(httpx.AsyncByteStream):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for delay, data in self.script:
            await asyncio.sleep(delay)
            if isinstance(data, Exception):
                raise data
            yield data


class Fake(httpx.AsyncBaseTransport):
    """Answers completions as `reply(body)` says; remembers what was asked."""

    def __init__(self, reply: Callable[[dict[str, Any]], Any]) -> None:
        self.reply, self.bodies = reply, []

    async def handle_async_request(self, request: Any) -> Any:
        self.bodies.append(json.loads(await request.aread()))
        found = self.reply(self.bodies[-1])
        if asyncio.iscoroutine(found):
            found = await found
        return found if isinstance(found, httpx.Response) else httpx.Response(200, stream=Stream(found))


def complete(script: Any, timeout_seconds: float = 60.0, asked: int = 3, arrival: float | None = None) -> Sample:
    """The sample of one request that is sent one second after the run began."""

    async def work(loop: VirtualLoop) -> Sample:
        transport = Fake(lambda body: script)
        async with Server("http://x", timeout_seconds=timeout_seconds, transport=transport, clock=loop.time) as server:
            await asyncio.sleep(1.0)
            return await server.complete(Planned(0, "base", "a b", asked, arrival), 0.0)

    return in_virtual_time(work)


# --- the plan ------------------------------------------------------------------------------------------------------


def ranges(most: int) -> Any:
    return st.tuples(st.integers(1, most), st.integers(1, most)).map(lambda pair: tuple(sorted(pair)))


workloads = st.builds(
    Workload,
    models=st.integers(1, 9).map(lambda n: tuple(f"base:p{k}" for k in range(n))),
    zipf=st.sampled_from([0.0, 1.1, 3.0]), rate=st.floats(0.01, 1000), requests=st.integers(1, 30),
    prompt_tokens=ranges(40), output_tokens=ranges(40), seed=st.integers(0, 2**64),
)  # fmt: skip


def replaced(workload: Workload, **changes: Any) -> Workload:
    return Workload(**{**vars(workload), **changes})


@given(workloads)
def test_plan_is_a_function_of_options_and_seed(workload: Workload):
    first = list(plan(workload))
    assert first == list(plan(replaced(workload)))
    assert len(first) == workload.requests and [each.number for each in first] == list(range(len(first)))
    for each in first:
        assert each.model in workload.models
        assert workload.prompt_tokens[0] <= len(each.prompt.split()) <= workload.prompt_tokens[1]
        assert workload.output_tokens[0] <= each.max_tokens <= workload.output_tokens[1]
    arrivals = [each.arrival for each in first]
    assert arrivals == sorted(arrivals) and arrivals[0] > 0


@given(workloads)
def test_another_rate_or_end_sends_the_same(workload: Workload):
    first = [each._replace(arrival=None) for each in plan(workload)]
    closed = replaced(workload, rate=None, clients=3, requests=None, seconds=5.0)
    assert first == list(itertools.islice(plan(closed), len(first)))
    longer = list(plan(replaced(workload, requests=len(first) + 5)))
    assert list(plan(workload)) == longer[: len(first)]


def test_another_seed_sends_something_else():
    base = Workload(("a", "b"), rate=1.0, requests=20)
    one, two = (list(plan(replaced(base, seed=seed))) for seed in (0, 1))
    for part in ("model", "prompt", "max_tokens", "arrival"):
        assert [getattr(each, part) for each in one] != [getattr(each, part) for each in two]


def test_arrivals_are_poisson_and_end_with_the_time():
    arrivals = [each.arrival for each in plan(Workload(("a",), rate=50.0, seconds=200.0, prompt_tokens=(1, 1)))]
    gaps = np.diff([0.0, *arrivals])
    assert max(arrivals) < 200.0
    assert abs(len(arrivals) - 10_000) < 4 * 100  # the standard deviation of a Poisson count of 10,000
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.05)  # exponential
    counts = np.histogram(arrivals, bins=200)[0]
    assert np.var(counts) / np.mean(counts) == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize("exponent", [0.0, 1.1, 2.0])
def test_models_are_as_frequent_as_zipf_says(exponent: float):
    models, draws = tuple(f"p{k}" for k in range(20)), 20_000
    workload = Workload(models, zipf=exponent, clients=1, requests=draws, prompt_tokens=(1, 1))
    found = Counter(each.model for each in plan(workload))
    weights = np.array([1 / k**exponent for k in range(1, 21)])
    for name, share in zip(models, weights / weights.sum(), strict=True):
        assert abs(found[name] - draws * share) < 4.5 * np.sqrt(draws * share * (1 - share))


def test_words_make_the_tokens_asked_for():
    size = WordSize(tokens_per_word=1.5, extra=1.0)
    workload = Workload(("a",), clients=1, requests=50, prompt_tokens=(31, 31))
    assert {len(each.prompt.split()) for each in plan(workload, size)} == {20}
    assert size.words(1) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"models": ()}, {"rate": None}, {"clients": 2}, {"requests": None}, {"rate": 0.0}, {"rate": float("nan")},
        {"rate": float("inf")}, {"rate": None, "clients": 0}, {"requests": 0}, {"seconds": 0.0}, {"zipf": -1.0},
        {"prompt_tokens": (0, 4)}, {"output_tokens": (5, 4)},
    ],
)  # fmt: skip
def test_impossible_workload_is_refused(changes: dict[str, Any]):
    with pytest.raises(ConfigError):
        Workload(**{"models": ("a",), "rate": 1.0, "requests": 5, **changes})


# --- the client ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 200), max_size=12))
@example([1] * 200)
def test_lines_are_read_however_they_are_cut(cuts: list[int]):
    whole = b': comment\n\ndata: {"a": 1}\r\n\r\ndata:{"b": "data: \xc3\xa9"}\n\nevent: x\ndata: [DONE]\n\n'
    found, rest, place = [], b"", 0
    for cut in [*cuts, len(whole)]:
        part, rest = payloads(rest, whole[place : place + cut])
        found, place = found + part, place + cut
    assert found == [b'{"a": 1}', b'{"b": "data: \xc3\xa9"}', b"[DONE]"] and rest == b""


def test_times_are_those_of_the_stream():
    script = [(0.5, event()), (0.25, event()), (0.125, event(finish="length")), (0.1, usage(7, 3)), (0.025, DONE)]
    sample = complete(script)
    assert sample.ok and sample.sent == 1.0
    assert sample.ttft == pytest.approx(0.5) and sample.gaps == pytest.approx([0.25, 0.125])
    assert sample.end_to_end == pytest.approx(1.0)
    assert (sample.tokens, sample.prompt_tokens, sample.finish) == (3, 7, "length")


def test_latency_counts_from_the_planned_arrival():
    sample = complete([(0.5, event(finish="stop")), (0.0, DONE)], arrival=0.25)
    assert (sample.sent, sample.planned) == (1.0, 0.25)
    assert sample.ttft == pytest.approx(1.25) and sample.end_to_end == pytest.approx(1.25)


def test_tokens_are_counted_by_the_server_or_else_by_pieces():
    half = event()[:20]
    pieces = [
        (0.1, event("")), (0.1, event(" a") + event(" b")), (0.1, half), (0.1, event()[20:]), (0, event("", "stop")),
        (0, DONE),
    ]  # fmt: skip
    assert complete(pieces).tokens == 4  # a token without whole characters counts, an end without text does not
    assert complete(pieces).gaps == pytest.approx([0.1, 0.0, 0.2])
    assert complete([*pieces[:-1], (0, usage(2, 9)), (0, DONE)]).tokens == 9


def test_an_answer_without_a_token_is_an_answer():
    sample = complete([(0.5, event("", "stop")), (0.0, DONE)])
    assert sample.ok and sample.tokens == 0 and sample.ttft is None and sample.end_to_end == pytest.approx(0.5)


def test_a_server_that_leaves_out_the_last_line_has_answered():
    assert complete([(0.5, event(finish="stop"))]).ok


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (httpx.Response(429, json={"error": {"message": "slow down"}}), "http 429"),
        (httpx.Response(503, text="gone"), "http 503"),
        ([(0.1, event())], "disconnect"),
        ([(0.1, event()), (0.1, httpx.ReadError("reset"))], "disconnect"),
        ([(0.1, event()), (0.1, httpx.RemoteProtocolError("peer closed"))], "disconnect"),
        ([(0.1, httpx.ConnectError("refused"))], "no connection"),
        ([(0.1, b'data: {"error": {"message": "bad prefix", "code": 500}}\n\n'), (0, DONE)], "error in the stream"),
        ([(0.1, b'data: {"error": "bad prefix"}\n\n'), (0, DONE)], "error in the stream"),
        ([(0.1, b"data: {nonsense\n\n")], "malformed stream"),
        ([(0.1, b"data: [1]\n\n")], "malformed stream"),
        ([(0.1, b'data: {"choices": [3]}\n\n')], "malformed stream"),
        ([(0.1, event()), (99.0, event())], "timeout"),
    ],
)
def test_failures_are_told_apart(script: Any, kind: str):
    sample = complete(script, timeout_seconds=5.0)
    assert not sample.ok and sample.error == kind and sample.ended is not None
    if kind == "timeout":
        assert sample.end_to_end == pytest.approx(5.0)
    if kind == "http 429":
        assert sample.message == "slow down"


# --- the driving ---------------------------------------------------------------------------------------------------


def drive(reply: Callable[[VirtualLoop, dict[str, Any]], Any], **options: Any) -> Measured:
    workload = Workload(**{"models": ("base",), "output_tokens": (1, 1), **options})

    async def work(loop: VirtualLoop) -> Measured:
        transport = Fake(lambda body: reply(loop, body))
        async with Server("http://x", transport=transport, clock=loop.time) as server:
            return await measure(server, workload)

    return in_virtual_time(work)


def answer(seconds: float) -> Script:
    return [(seconds, event(finish="length")), (0.0, DONE)]


def test_requests_are_sent_when_planned():
    measured = drive(lambda loop, body: answer(0.5), rate=3.0, requests=40)
    planned = [each.arrival for each in plan(Workload(("base",), rate=3.0, requests=40, output_tokens=(1, 1)))]
    assert [sample.sent for sample in measured.samples] == pytest.approx(planned)
    assert [sample.ttft for sample in measured.samples] == pytest.approx([0.5] * 40)
    assert measured.seconds == pytest.approx(planned[-1] + 0.5)


def test_a_queue_in_the_server_does_not_slow_the_arrivals():
    """A server that works on one request at a time and gets twice what it can do: latencies grow, as they must."""
    locks: list[asyncio.Lock] = []

    async def one_at_a_time(loop: VirtualLoop, body: dict[str, Any]) -> Script:
        locks.append(locks[0] if locks else asyncio.Lock())
        async with locks[0]:
            await asyncio.sleep(1.0)
        return answer(0.0)

    measured = drive(one_at_a_time, rate=2.0, requests=30)
    free, wanted = 0.0, []
    for each in plan(Workload(("base",), rate=2.0, requests=30, output_tokens=(1, 1))):
        free = max(free, each.arrival) + 1.0
        wanted.append(free - each.arrival)
    assert [sample.end_to_end for sample in measured.samples] == pytest.approx(wanted)
    assert wanted[-1] > 5.0


def test_a_client_that_is_late_does_not_hide_it():
    """The client stops for ten seconds: what it sends late is late for whoever would have sent it."""

    def reply(loop: VirtualLoop, body: dict[str, Any]) -> Script:
        if not stalled:
            stalled.append(True)
            loop.stall(10.0)
        return answer(0.1)

    stalled: list[bool] = []
    measured = drive(reply, rate=5.0, requests=100)
    numbers = summary(measured)
    waited = [sample for sample in measured.samples if sample.sent - sample.planned > 1.0]
    assert len(waited) > 30
    assert all(sample.end_to_end == pytest.approx(sample.ended - sample.planned) for sample in measured.samples)
    assert numbers["ttft_seconds"]["mean"] > 1.0 and numbers["sending_late_seconds"]["p99"] > 8.0
    assert numbers["latency_from"] == "planned arrival"


def test_a_closed_loop_keeps_its_clients_busy():
    measured = drive(lambda loop, body: answer(0.5), clients=4, requests=20)
    _, counts = in_flight(measured.samples, measured.seconds)
    assert max(counts) == 4 and measured.seconds == pytest.approx(2.5)
    assert Counter(round(sample.sent, 6) for sample in measured.samples) == dict.fromkeys((0, 0.5, 1, 1.5, 2), 4)
    assert summary(measured)["latency_from"] == "sending" and summary(measured)["sending_late_seconds"] is None


def test_a_closed_loop_ends_with_the_time_and_waits_for_what_runs():
    measured = drive(lambda loop, body: answer(0.75), clients=2, seconds=2.0)
    assert [sample.sent for sample in measured.samples] == pytest.approx([0, 0, 0.75, 0.75, 1.5, 1.5])
    assert all(sample.ok for sample in measured.samples) and measured.seconds == pytest.approx(2.25)


def test_a_server_that_is_gone_is_not_hammered():
    measured = drive(lambda loop, body: [(0.0, httpx.ConnectError("refused"))], clients=1, seconds=1.0)
    assert len(measured.samples) <= 11 and summary(measured)["failed"] == {"no connection": len(measured.samples)}


@pytest.mark.parametrize("how", [{"rate": 200.0}, {"clients": 3}])
@pytest.mark.skipif(os.name != "posix", reason="loops take signals on POSIX only")
def test_ctrl_c_gives_what_was_measured_so_far(how: dict[str, Any]):
    def reply(body: dict[str, Any]) -> Script:
        served.append(body)
        if len(served) == 10:
            signal.raise_signal(signal.SIGINT)
        return answer(0.0 if len(served) < 8 else 60.0)

    async def work() -> Measured:
        async with Server("http://x", transport=Fake(reply)) as server:
            return await measure(server, Workload(("base",), requests=500, **how))

    served: list[Any] = []
    measured = asyncio.run(work())
    numbers = summary(measured)
    assert measured.stopped and numbers["ok"] == 7 and numbers["unfinished"] == numbers["sent"] - 7 > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_sent_is_the_plan():
    transport = Fake(lambda body: answer(0.0))
    workload = Workload(("base:a", "base:b"), clients=3, requests=30)

    async def work(loop: VirtualLoop) -> None:
        async with Server("http://x", "secret", transport=transport, clock=loop.time) as server:
            await server.probe("base")
            await measure(server, workload)

    in_virtual_time(work)
    sent = [(body["model"], body["prompt"], body["max_tokens"]) for body in transport.bodies[1:]]
    assert sorted(sent) == sorted((each.model, each.prompt, each.max_tokens) for each in plan(workload))
    assert all(body["stream"] and body["ignore_eos"] and body["stream_options"] for body in transport.bodies)


@pytest.mark.parametrize("unknown", [["ignore_eos"], ["ignore_eos", "stream_options"]])
def test_fields_that_a_server_refuses_are_left_out(unknown: list[str]):
    def reply(body: dict[str, Any]) -> Any:
        bad = [name for name in unknown if name in body]
        return httpx.Response(400, json={"error": {"message": f"unknown field {bad}"}}) if bad else answer(0.0)

    async def work(loop: VirtualLoop) -> Measured:
        async with Server("http://x", transport=Fake(reply), clock=loop.time) as server:
            await server.probe("base")
            return await measure(server, Workload(("base",), clients=1, requests=2, output_tokens=(4, 4)))

    numbers = summary(in_virtual_time(work))
    assert (numbers["ok"], numbers["output_lengths_forced"], numbers["ended_early"]) == (2, False, 2)


# --- which models --------------------------------------------------------------------------------------------------

CARDS = [{"id": "base", "parent": None}, *({"id": f"base:p{k}", "parent": "base"} for k in (2, 0, 1))]


def test_models_are_chosen_in_a_fixed_order():
    assert choose_models(CARDS, prefixes=2) == ("base:p0", "base:p1")
    assert choose_models(CARDS, base_only=True) == ("base",)
    assert choose_models(CARDS, names=["base:p2", "base"]) == ("base:p2", "base")
    assert choose_models(None, names=["unlisted"]) == ("unlisted",)


@pytest.mark.parametrize(
    ("cards", "options", "said"),
    [
        (CARDS, {"names": ["base:p9"]}, "no model 'base:p9'"), (CARDS, {"prefixes": 4}, "4 prefixes of 3"),
        (CARDS[:1], {"prefixes": 1}, "1 prefixes of 0"), (None, {"prefixes": 1}, "1 prefixes of 0"),
        (CARDS, {}, "choose"), (CARDS, {"prefixes": 1, "base_only": True}, "choose"), ([], {"base_only": True}, "0"),
    ],
)  # fmt: skip
def test_models_that_are_not_there_are_refused(cards: Any, options: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        choose_models(cards, **options)


# --- the report ----------------------------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """Five requests of a run of 4 seconds: three whole, one refused, one that the run did not wait for."""
    return [
        Sample(0, "a", 0.0, 0.25, 3, [1.0, 1.5, 2.0], 2.0, finish="length", prompt_tokens=10, counted=3),
        Sample(1, "b", 0.5, 0.5, 4, [1.0, 1.25], 1.5, finish="stop", prompt_tokens=20, counted=2),
        Sample(2, "a", 1.0, 1.0, 2, [], 3.0, finish="stop", prompt_tokens=30, counted=0),
        Sample(3, "a", 2.0, 2.0, 8, [2.5], 3.0, error="http 503", message="full"),
        Sample(4, "b", 3.5, 3.5, 8, [3.75]),
    ]


def test_numbers_are_those_of_the_samples():
    numbers = summary(Measured(samples(), 4.0, 0.25, stopped=True))
    assert (numbers["sent"], numbers["ok"], numbers["unfinished"], numbers["failed"]) == (5, 3, 1, {"http 503": 1})
    assert (numbers["output_tokens"], numbers["output_tokens_per_second"]) == (5, 1.25)
    assert numbers["requests_per_second"] == 0.75 and numbers["prompt_tokens_mean"] == 20
    assert numbers["ttft_seconds"] == pytest.approx({"count": 2, "mean": 0.75, "p50": 0.75, "p95": 0.975, "p99": 0.995})
    assert latencies(samples()) == {"ttft": [1.0, 0.5], "itl": [0.5, 0.5, 0.25], "end_to_end": [2.0, 1.0, 2.0]}
    assert numbers["itl_seconds"]["p95"] == pytest.approx(np.percentile([0.5, 0.5, 0.25], 95))
    assert (numbers["ended_early"], numbers["tokens_counted_by"]) == (2, "server")
    assert numbers["sending_late_seconds"]["mean"] == pytest.approx(0.05)


def test_a_run_without_answers_has_no_latencies():
    numbers = summary(Measured([], 0.0, 0.0))
    assert numbers["ttft_seconds"]["p99"] is None and numbers["output_tokens_per_second"] is None


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20), st.booleans()), max_size=30))
def test_requests_in_flight_end_at_none(spans: list[tuple[float, float, bool]]):
    found = [Sample(k, "a", None, sent, 1, ended=sent + took if ends else None) for k, (sent, took, ends) in enumerate(spans)]  # fmt: skip # noqa: E501
    times, counts = in_flight(found, 100.0)
    assert times == sorted(times) and times[0] == 0.0 and min(counts) >= 0 and counts[-1] == 0
    if times and found:
        middle = 25.0
        at = counts[np.searchsorted(times, middle, side="right") - 1]
        assert at == sum(s.sent <= middle < (100.0 if s.ended is None else s.ended) for s in found)


@given(st.floats(0.01, 5000), st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_rates_hold_every_token(seconds: float, places: list[float]):
    found = [Sample(0, "a", None, 0.0, 9, [seconds * place for place in sorted(places)], seconds, counted=9)]
    edges, rates = token_rate(found, seconds)
    assert len(edges) == len(rates) + 1 <= 62 and edges[-1] == pytest.approx(seconds)
    assert float(np.sum(np.diff(edges) * rates)) == pytest.approx(9.0)


def test_rows_are_written_for_every_request(tmp_path: Path):
    measured = Measured(samples(), 4.0, 0.25)
    save_load(tmp_path, {"seed": 0, "summary": summary(measured)}, measured)
    written = json.loads((tmp_path / "load.json").read_text())
    assert written["format"] == 1 and [row["number"] for row in written["requests"]] == [0, 1, 2, 3, 4]
    assert written["requests"][0]["ttft_seconds"] == 1.0 and written["requests"][0]["text_seconds"] == [1.0, 1.5, 2.0]
    assert [row["error"] for row in written["requests"]] == [None, None, None, "http 503", "unfinished"]
    save_load(tmp_path, {"seed": 0}, Measured([], 0.0, 0.0))
    assert json.loads((tmp_path / "load.json").read_text())["requests"] == []


@pytest.mark.parametrize("found", [samples(), samples()[3:], []])
def test_picture_is_drawn(tmp_path: Path, found: list[Sample]):
    pytest.importorskip("matplotlib")
    load_png(tmp_path / "load.png", Measured(found, 4.0 if found else 0.0, 0.25), title="two models")
    data = (tmp_path / "load.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">2I", data[16:24]) == (1080, 1200)


# --- a live server, by the command line ----------------------------------------------------------------------------

FIRST, GAP = 0.05, 0.02


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.headers["authorization"] != "Bearer right":
            self.answer(401, {"error": {"message": "unknown key"}})
        elif self.path == "/v1/models":
            names = ["base:refused", "base:cut", "base:good"]
            self.answer(200, {"data": [{"id": "base"}, *({"id": name, "parent": "base"} for name in names)]})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self.answer(200, {"count": 1 + 2 * len(body["prompt"].split())})
        elif body["model"] == "base:refused":
            self.answer(429, {"error": {"message": "slow down"}})
        elif "ignore_eos" in body:
            self.answer(400, {"error": {"message": "unknown field ignore_eos"}})
        else:
            self.stream(body)

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = body["max_tokens"]
        for k in range(count):
            time.sleep(FIRST if k == 0 else GAP)
            self.chunk(event(finish="length" if k + 1 == count else None))
            if body["model"] == "base:cut" and k == 1:
                self.close_connection = True
                return
        self.chunk(usage(1 + 2 * len(body["prompt"].split()), count) + DONE)
        self.wfile.write(b"0\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


class Live(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = Live(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def bench() -> Callable[..., Any]:
    from typer.testing import CliRunner

    from foreword.cli.bench import app

    return lambda *arguments: CliRunner().invoke(app, ["serve", *map(str, arguments)])


LOAD = ("--key", "right", "--requests", 12, "--rate", "closed:3", "--output-tokens", "4:6", "--prompt-tokens", "21")


def test_command_measures_a_live_server(bench: Any, url: str, tmp_path: Path):
    result = bench("--url", f"{url}/v1", "--models", "base,base:good", *LOAD, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert (numbers["sent"], numbers["ok"], numbers["failed"], numbers["ended_early"]) == (12, 12, {}, 0)
    assert numbers["prompt_tokens_mean"] == 21  # 10 words of two tokens, and one that every text has
    assert FIRST <= numbers["ttft_seconds"]["p50"] < 5 and 0.9 * GAP <= numbers["itl_seconds"]["mean"] < 5
    assert numbers["end_to_end_seconds"]["p50"] >= FIRST + 3 * GAP and 0 < numbers["client_cpu_share"] < 5
    assert "upper limit" in result.stdout and "of a core" in result.stdout and "sized by the server" in result.stdout
    written = json.loads((tmp_path / "load.json").read_text())
    assert written["url"] == url and written["seed"] == 0 and "httpx" in written["versions"] and written["machine"]
    assert len(written["requests"]) == 12 and written["options"]["clients"] == 3
    sent = [(row["number"], row["model"], row["asked_tokens"]) for row in written["requests"]]
    options = {**written["options"], "models": ("base", "base:good")}
    options.pop("words_sized_by")
    workload = Workload(**{name: tuple(v) if isinstance(v, list) else v for name, v in options.items()})
    assert sent == [(each.number, each.model, each.max_tokens) for each in plan(workload)]


def test_command_counts_failures(bench: Any, url: str, tmp_path: Path):
    result = bench("--url", url, "--prefixes", 3, *LOAD, "--mix", "zipf:0.5", "--out", tmp_path, "--json")
    numbers = json.loads(result.stdout.splitlines()[-1])
    wanted = Counter(each.model for each in plan(Workload(("cut", "good", "refused"), zipf=0.5, clients=3, requests=12)))  # fmt: skip # noqa: E501
    assert min(wanted.values()) > 0
    assert numbers["ok"] == wanted["good"]
    assert numbers["failed"] == {"disconnect": wanted["cut"], "http 429": wanted["refused"]}
    assert "http 429" in result.stdout and "disconnect" in result.stdout


def test_command_fails_where_nothing_was_answered(bench: Any, url: str, tmp_path: Path):
    result = bench("--url", url, "--models", "base:refused", *LOAD, "--out", tmp_path)
    assert isinstance(result.exception, ForewordError) and "12 http 429: slow down" in str(result.exception)
    assert len(json.loads((tmp_path / "load.json").read_text())["requests"]) == 12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "base", "--key", "wrong"], "refuses the key (401: unknown key)"),
        (["--models", "base"], "refuses the key (401"),
        (["--models", "base:nothing", "--key", "right"], "no model 'base:nothing'"),
        (["--prefixes", "9", "--key", "right"], "9 prefixes of 3"),
        (["--models", "base", "--output-tokens", "9:3"], "output tokens 9:3"),
        (["--models", "base", "--prompt-tokens", "few"], "--prompt-tokens few"),
        (["--models", "base", "--prompt-tokens", "0:3"], "prompt tokens 0:3"),
        (["--models", "base", "--rate", "fast"], "--rate fast"), (["--models", "base", "--rate", "0"], "rate 0"),
        (["--models", "base", "--rate", "closed:0"], "--rate closed:0"),
        (["--models", "base", "--mix", "pareto"], "--mix pareto"), (["--models", "base", "--mix", "zipf:x"], "--mix"),
        (["--models", "base", "--seconds", "-1"], "seconds -1"), ([], "--models, --prefixes and --base-only"),
        (["--base-only", "--prefixes", "2"], "--models, --prefixes and --base-only"),
        (["--models", "base", "--timeout", "0"], "--timeout 0"),
    ],
)  # fmt: skip
def test_errors_are_one_line(bench: Any, url: str, tmp_path: Path, arguments: list[str], said: str):
    result = bench("--url", url, "--out", tmp_path / "none", *arguments)
    assert isinstance(result.exception, ConfigError) and said in str(result.exception)
    assert "\n" not in str(result.exception) and not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "127.0.0.1:9", "http:///v1", "http://127.0.0.1:99999", "ftp://x"]
)
def test_a_server_that_is_not_there_is_one_line(bench: Any, url: str, tmp_path: Path):
    result = bench("--url", url, "--models", "base", "--out", tmp_path)
    assert isinstance(result.exception, ConfigError) and "\n" not in str(result.exception)


def test_a_key_that_no_header_can_hold_is_refused():
    with pytest.raises(ConfigError, match="key"):
        Server("http://127.0.0.1:8000", "schlüssel€")


def test_the_base_is_asked_first_so_that_no_prefix_is_loaded(url: str):
    async def work() -> Any:
        async with Server(url, "right") as server:
            return await prepare(server, prefixes=1), await server.version()

    assert asyncio.run(work()) == ((("base:cut",), WordSize(2.0, 1.0)), None)


def test_no_httpx_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(MissingPackage, match=r"foreword\[serve\]"):
        Server("http://127.0.0.1:8000")
