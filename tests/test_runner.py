"""The engine in its thread: many clients at once, cancelling, stopping, and listeners that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from tests.serving import Source, alone, prefixes_for, prompt, written
from tests.tiny import tiny_base

from foreword.engine import EngineOptions, EngineRunner, EngineStopped, Event, Finished, QueueFull, Request, Token
from foreword.errors import ConfigError


class Inbox:
    """A listener that keeps events and tells when the last has come."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended, self.begun = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set(), "an event came after the last"
        self.events.append(event)
        self.begun.set()
        if isinstance(event, Finished):
            self.ended.set()

    def wait(self) -> list[Event]:
        assert self.ended.wait(30), "no end has come"
        return self.events

    def reason(self) -> str:
        last = self.wait()[-1]
        assert isinstance(last, Finished)
        return last.reason


@pytest.fixture
def runner() -> Iterator[EngineRunner]:
    base = tiny_base("llama")
    options = EngineOptions(max_running=4, max_waiting=64, prefill_tokens=6)
    made = EngineRunner(base, Source(prefixes_for(base, 6, gates=True)), options)
    made.start()
    yield made
    made.stop(5)


def test_many_threads_get_what_each_gets_alone(runner: EngineRunner) -> None:
    base, prefixes = tiny_base("llama"), prefixes_for(tiny_base("llama"), 6, gates=True)
    keys = [None, *prefixes]
    requests = [Request(prompt(k, 2 + k % 9), 3 + k % 7, keys[k % 7], tenant=str(k % 2)) for k in range(40)]
    inboxes = [Inbox() for _ in requests]

    def client(first: int) -> None:
        for number in range(first, len(requests), 4):
            runner.submit(requests[number], inboxes[number])

    threads = [threading.Thread(target=client, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request, inbox in zip(requests, inboxes, strict=True):
        prefix = None if request.prefix is None else prefixes[request.prefix]
        assert written(inbox.wait()) == alone(base, request, prefix)
    stats = runner.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.tokens_written == sum(request.max_new_tokens for request in requests)
    assert stats.tokens_read == sum(len(request.prompt) for request in requests)


def test_cancelling_ends_a_request_and_frees_its_row(runner: EngineRunner) -> None:
    inbox = Inbox()
    ticket = runner.submit(Request(prompt(1, 3), 60), inbox)
    assert inbox.begun.wait(10)
    ticket.cancel()
    assert inbox.reason() in ("cancelled", "length")
    ticket.cancel()  # late, and let be
    again = Inbox()
    runner.submit(Request(prompt(1, 3), 2), again)
    assert again.reason() == "length"


def test_a_listener_that_fails_loses_its_own_request_alone(runner: EngineRunner) -> None:
    def broken(_: Event) -> None:
        raise RuntimeError("a client's fault")

    runner.submit(Request(prompt(1, 3), 50), broken)
    inbox = Inbox()
    runner.submit(Request(prompt(1, 3), 5), inbox)
    assert written(inbox.wait()) == alone(tiny_base("llama"), Request(prompt(1, 3), 5), None)
    assert runner.alive


def test_what_cannot_run_is_refused_at_once(runner: EngineRunner) -> None:
    with pytest.raises(ConfigError):
        runner.submit(Request((1,) * 60, 60), Inbox())
    assert runner.stats().waiting == 0


def test_the_queue_is_bounded() -> None:
    base, gate = tiny_base("llama"), threading.Event()
    source = Source(prefixes_for(base, 1))
    source.before = lambda key: (gate.wait(10), None)[1]
    runner = EngineRunner(base, source, EngineOptions(max_running=1, max_waiting=3))
    runner.start()
    inboxes = [Inbox() for _ in range(3)]
    for inbox in inboxes:
        runner.submit(Request((5,), 2, "p0"), inbox)
    with pytest.raises(QueueFull):
        runner.submit(Request((5,), 2, "p0"), Inbox())
    gate.set()
    assert all(inbox.reason() == "length" for inbox in inboxes)
    runner.stop()


@pytest.mark.parametrize(("grace", "reasons"), [(30, ["length"] * 2), (0, ["shutdown"] * 2)])
def test_stopping_finishes_what_runs_within_the_grace_and_takes_nothing_new(grace: float, reasons: list[str]) -> None:
    base = tiny_base("llama")
    runner = EngineRunner(base, Source({}), EngineOptions(max_running=1))
    runner.start()
    inboxes = [Inbox() for _ in range(3)]
    for inbox in inboxes:
        runner.submit(Request(prompt(1, 3), 60), inbox)
    runner.stop(grace)
    assert [inbox.reason() for inbox in inboxes][1:] == reasons
    assert not runner.alive
    with pytest.raises(EngineStopped):
        runner.submit(Request((5,), 2), Inbox())


def test_an_engine_that_fails_outside_of_a_pass_tells_all_and_goes_on(
    runner: EngineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = Inbox()
    with monkeypatch.context() as patch:
        patch.setattr(runner.engine, "_pieces", lambda: 1 / 0)
        runner.submit(Request(prompt(1, 3), 5), inbox)
        assert inbox.reason() == "error"
    again = Inbox()
    runner.submit(Request(prompt(1, 3), 5), again)
    assert [event for event in again.wait() if isinstance(event, Token)]
    runner.engine.check()


def test_an_engine_that_cannot_end_what_it_has_begins_anew(
    runner: EngineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    inboxes = [Inbox() for _ in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(runner.engine, "_pieces", lambda: 1 / 0)
        patch.setattr(runner.engine, "_release", lambda row: 1 / 0)
        for inbox in inboxes:
            runner.submit(Request(prompt(1, 3), 5), inbox)
        assert [inbox.reason() for inbox in inboxes] == ["error"] * 3
    again = Inbox()
    runner.submit(Request(prompt(1, 3), 5), again)
    assert written(again.wait()) == alone(tiny_base("llama"), Request(prompt(1, 3), 5), None)


def test_deadlines_end_what_waits_for_its_prefix() -> None:
    base, gate = tiny_base("llama"), threading.Event()
    source = Source(prefixes_for(base, 1))
    source.before = lambda key: (gate.wait(10), None)[1]
    runner = EngineRunner(base, source)
    runner.start()
    inbox, begun = Inbox(), time.monotonic()
    runner.submit(Request((5,), 2, "p0", deadline_seconds=0.2), inbox)
    assert inbox.wait() == [Finished("deadline")] and time.monotonic() - begun < 8
    gate.set()
    runner.stop()
