"""The engine against one text at a time: same tokens in any company, and nothing of anybody is left behind."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.serving import DECODERS, Source, alone, drain, prefixes_for, prompt, written
from tests.tiny import tiny_base

from foreword.bank import AttentionOptions
from foreword.base import BaseModel
from foreword.engine import Engine, EngineOptions, Event, Finished, Request, Sampling, Token
from foreword.engine.attention import attend_rows
from foreword.engine.tiers import Resident
from foreword.errors import ConfigError, QueueFull, UnsupportedModel
from foreword.prefix import Prefix, prefix_attention


def engine_for(base: BaseModel, source: Source, **options: int) -> Engine:
    return Engine(base, source, EngineOptions(**{"max_running": 4, "prefill_tokens": 5, **options}))


@pytest.mark.parametrize("name", DECODERS)
def test_mixed_batches_write_what_each_writes_alone(name: str) -> None:
    """More requests than rows, prompts in pieces, prefixes of every kind, past the window of a sliding layer."""
    base = tiny_base(name)
    prefixes = prefixes_for(base, 6, gates=True)
    engine = engine_for(base, Source(prefixes))
    keys = [*prefixes, None]
    requests = {}
    for number in range(14):
        key = keys[number % len(keys)]
        tenant, ends = str(number % 3), base.end_tokens
        request = Request(prompt(number, 1 + 3 * number % 17), 3 + number % 11, key, tenant, stop_tokens=ends)
        requests[engine.submit(request)] = request
    found = drain(engine)
    for number, request in requests.items():
        prefix = None if request.prefix is None else prefixes[request.prefix]
        assert written(found[number]) == alone(base, request, prefix), f"request {number} through {request.prefix}"
        reason = "length" if len(written(found[number])) == request.max_new_tokens else "stop"
        assert found[number][-1] == Finished(reason)
    assert not engine.cache.used


def test_the_test_would_see_a_wrong_prefix() -> None:
    base = tiny_base("llama")
    prefixes = prefixes_for(base, 6, gates=True)
    texts = [tuple(alone(base, Request(prompt(1, 9), 8), prefix)) for prefix in [*prefixes.values(), None]]
    assert len(set(texts)) == 7


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, False), (None, True)])
def test_attention_of_rows_is_the_reference(gated: bool, softcap: float | None, sinks: bool) -> None:
    rows, heads, kv_heads, tokens, slots, texts, dim = 3, 6, 2, 4, 3, 5, 8
    query = torch.randn(rows, heads, tokens, dim)
    keys, values = (torch.randn(rows, kv_heads, slots + texts, dim) for _ in range(2))
    seen = torch.zeros(rows, 1, tokens, slots + texts)
    seen[..., -1] = -math.inf
    gate = torch.rand(rows, 1, tokens, slots) if gated else None
    sink = torch.randn(heads) if sinks else None
    found = attend_rows(query, keys, values, seen, gate, AttentionOptions(0.3, None, softcap, sink))
    wanted = prefix_attention(
        query, keys[:, :, slots:], values[:, :, slots:], keys[:, :, :slots], values[:, :, :slots], scaling=0.3,
        text_bias=seen[..., slots:], prefix_gate=gate, softcap=softcap, sinks=sink,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted)


# Random schedules


class Schedules(RuleBasedStateMachine):
    """Requests come, are cancelled and end in any order, prefixes are replaced and evicted, the bank is too small.

    Whatever happens, each writes the beginning of what it writes alone, through the prefix that it came with.
    """

    base = tiny_base("llama")
    versions = prefixes_for(base, 8, gates=True)
    known: ClassVar[dict[tuple[Any, ...], list[int]]] = {}  # what each writes alone

    @initialize(rows=st.integers(1, 5), budget=st.sampled_from([0, 3_000, 1 << 20]), chunk=st.integers(1, 9))
    def begin(self, rows: int, budget: int, chunk: int) -> None:
        self.source = Source(self.versions)
        options = EngineOptions(max_running=rows, max_waiting=12, prefill_tokens=chunk, bank_bytes=budget)
        self.engine = Engine(self.base, self.source, options)
        self.requests: dict[int, Request] = {}
        self.events: dict[int, list[Event]] = {}
        self.cancelled: set[int] = set()

    @rule(
        key=st.sampled_from([None, *(f"p{n}" for n in range(8)), "missing"]), seed=st.integers(0, 3),
        length=st.integers(1, 14), new=st.integers(1, 9), tenant=st.sampled_from("abc"),
    )  # fmt: skip
    def submit(self, key: str | None, seed: int, length: int, new: int, tenant: str) -> None:
        request = Request(prompt(seed, length), new, key, tenant)
        try:
            self.engine.check_room()
        except QueueFull:
            assert len(self.engine.waiting) == 12
            return
        number = self.engine.submit(request)
        self.requests[number], self.events[number] = request, []

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.requests)))
        self.engine.cancel(number)
        self.cancelled.add(number)

    @rule(key=st.sampled_from([f"p{n}" for n in range(8)]))
    def evict(self, key: str) -> None:
        self.engine.bank.evict(key)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            for number, event in self.engine.step():
                self.events[number].append(event)
            self.engine.check()

    @invariant()
    def nothing_comes_after_the_end(self) -> None:
        for events in getattr(self, "events", {}).values():
            assert all(isinstance(event, Token) for event in events[:-1])

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for number, events in drain(self.engine).items():
            self.events[number] += events
        self.engine.bank.close()
        for number, request in self.requests.items():
            reason = self.events[number][-1].reason  # type: ignore[union-attr]
            found = written(self.events[number])
            if request.prefix == "missing":
                assert reason in ("error", "cancelled") and not found
                continue
            key = request.prompt, request.max_new_tokens, request.prefix
            if key not in self.known:
                self.known[key] = alone(self.base, request, self.versions.get(request.prefix or ""))
            whole = self.known[key]
            assert found == whole[: len(found)], f"{request.prefix} wrote something else"
            assert reason == ("length" if len(found) == len(whole) else "cancelled")
            assert reason == "length" or number in self.cancelled
        assert not self.engine.cache.used and not any(part.any() for part in self.engine.cache.keys.values())


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=25, stateful_step_count=25)


# Isolation


def test_nothing_of_a_request_is_left_in_the_row_of_the_next() -> None:
    """Paired: with the wiping left out, the check of the cache sees it."""
    base, prefixes = tiny_base("llama"), prefixes_for(tiny_base("llama"), 3)
    engine = engine_for(base, Source(prefixes), max_running=1)
    for key in (*prefixes, None):
        engine.submit(Request(prompt(5, 7), 4, key))
        drain(engine)
        assert not any(part[row].any() for part in engine.cache.keys.values() for row in range(1))
    engine.cache._wipe = lambda row: engine.cache.texts.__setitem__(row, 0)  # type: ignore[method-assign]
    engine.submit(Request(prompt(5, 7), 4, "p0"))
    with pytest.raises(AssertionError, match="row 0"):
        drain(engine)


def test_equal_texts_through_different_prefixes_are_not_mixed() -> None:
    base, prefixes = tiny_base("llama"), prefixes_for(tiny_base("llama"), 6, gates=True)
    engine = engine_for(base, Source(prefixes), max_running=8)
    text = prompt(1, 9)
    numbers = {engine.submit(Request(text, 8, key)): key for key in [*prefixes, None, *prefixes]}
    found = drain(engine)
    texts = {key: tuple(written(found[number])) for number, key in numbers.items()}
    for number, key in numbers.items():
        assert tuple(written(found[number])) == texts[key]
    assert len(set(texts.values())) == 7


def test_a_running_request_keeps_the_prefix_that_it_came_with() -> None:
    """A replaced or removed prefix is another key, or none: who runs has a copy of his own."""
    base, prefixes = tiny_base("llama"), prefixes_for(tiny_base("llama"), 2)
    source = Source(prefixes)
    engine = engine_for(base, source)
    request = Request(prompt(1, 4), 12, "p0")
    number = engine.submit(request)
    events = engine.step() + engine.step()
    while not engine.rows:
        events += engine.step()
    source.prefixes["p0"] = prefixes["p1"]
    engine.bank.evict("p0")
    later = engine.submit(request)
    found = drain(engine)
    first = [event.id for each, event in events if each == number and isinstance(event, Token)]
    assert first + written(found[number]) == alone(base, request, prefixes["p0"])
    assert written(found[later]) == alone(base, request, prefixes["p1"])


def test_a_load_that_fails_ends_its_own_request_alone() -> None:
    base, prefixes = tiny_base("llama"), prefixes_for(tiny_base("llama"), 2)
    other = tiny_base("qwen2")
    source = Source({**prefixes, "foreign": next(iter(prefixes_for(other, 1).values()))})

    def crash(key: str) -> None:
        if key == "crash":
            raise RuntimeError("the disk is gone")

    source.before = crash
    engine = engine_for(base, source)
    keys = ["p0", "missing", "crash", "foreign", "p1"]
    numbers = {key: engine.submit(Request(prompt(1, 4), 5, key)) for key in keys}
    found = drain(engine)
    for key in ("missing", "crash", "foreign"):
        (event,) = found[numbers[key]]
        assert isinstance(event, Finished) and event.reason == "error" and event.message
        assert "disk" not in event.message  # what a stranger's error says is for the log
    for key in ("p0", "p1"):
        assert written(found[numbers[key]]) == alone(base, Request(prompt(1, 4), 5), prefixes[key])


def test_logits_that_are_not_finite_end_their_own_request_alone() -> None:
    base, prefixes = tiny_base("llama"), prefixes_for(tiny_base("llama"), 2)
    broken = replace(
        prefixes["p0"], sites={site: t._replace(values=t.values * math.inf) for site, t in prefixes["p0"].sites.items()}
    )
    engine = engine_for(base, Source({**prefixes, "p0": broken}))
    numbers = [engine.submit(Request(prompt(1, 4), 5, key)) for key in ("p0", "p1", None)]
    found = drain(engine)
    assert found[numbers[0]] == [Finished("error", "its logits are not finite")]
    for number, prefix in ((numbers[1], prefixes["p1"]), (numbers[2], None)):
        assert written(found[number]) == alone(base, Request(prompt(1, 4), 5), prefix)


def test_a_pass_that_fails_ends_what_was_in_it_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    engine = engine_for(base, Source({}))
    first = engine.submit(Request(prompt(1, 3), 5))
    with monkeypatch.context() as patch:
        patch.setattr("foreword.engine.engine.packed_logits", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        (ended,) = engine.step()
    assert ended == (first, Finished("error", "the step failed (MemoryError)"))
    engine.check()
    second = engine.submit(Request(prompt(1, 3), 5))
    assert written(drain(engine)[second]) == alone(base, Request(prompt(1, 3), 5), None)


# The bank


def test_the_bank_keeps_to_its_budget_and_forgets_the_least_recent() -> None:
    base = tiny_base("llama")
    prefixes = prefixes_for(base, 4)
    sizes = {key: prefix.num_bytes for key, prefix in prefixes.items()}
    source = Source(prefixes)
    engine = engine_for(base, source, bank_bytes=sizes["p0"] + sizes["p1"])
    for key in ("p0", "p1", "p0", "p2", "p0", "p1"):
        engine.submit(Request(prompt(1, 3), 2, key))
        drain(engine)
    assert source.loads == ["p0", "p1", "p2", "p1"] or source.loads == ["p0", "p1", "p2", "p0", "p1"]
    stats = engine.bank.stats()
    assert stats.num_bytes <= sizes["p0"] + sizes["p1"] and stats.evictions >= 1
    assert stats.hits + stats.misses == 6


def test_a_prefix_is_loaded_once_for_all_who_wait_and_nobody_else_waits() -> None:
    base, prefixes = tiny_base("llama"), prefixes_for(tiny_base("llama"), 2)
    source, gate = Source(prefixes), threading.Event()
    source.before = lambda key: None if key != "p0" else (gate.wait(10), None)[1]
    engine = engine_for(base, source)
    slow = [engine.submit(Request(prompt(1, 3), 2, "p0")) for _ in range(3)]
    quick = engine.submit(Request(prompt(1, 3), 2, "p1"))
    events: dict[int, list[Event]] = {}
    while quick not in events or not isinstance(events[quick][-1], Finished):
        for number, event in engine.step():
            events.setdefault(number, []).append(event)
    assert not any(number in events for number in slow)
    gate.set()
    found = drain(engine)
    assert all(written(found[number]) == written(found[slow[0]]) for number in slow)
    assert source.loads.count("p0") == 1


def test_an_evicted_prefix_is_not_brought_back_by_a_load_that_was_under_way() -> None:
    base, prefixes = tiny_base("llama"), prefixes_for(tiny_base("llama"), 1)
    source, gate = Source(prefixes), threading.Event()
    source.before = lambda key: (gate.wait(10), None)[1]
    engine = engine_for(base, source)
    number = engine.submit(Request(prompt(1, 3), 2, "p0"))
    engine.step()
    engine.bank.evict("p0")
    gate.set()
    assert written(drain(engine)[number]) == alone(base, Request(prompt(1, 3), 2), prefixes["p0"])
    assert engine.bank.stats().entries == 0


# Limits, deadlines, fairness, choices


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_deadlines_end_what_runs_and_what_waits() -> None:
    base, clock = tiny_base("llama"), Clock()
    engine = Engine(base, Source({}), EngineOptions(max_running=1), clock=clock)
    runs = engine.submit(Request(prompt(1, 3), 20, deadline_seconds=5.0))
    waits = engine.submit(Request(prompt(1, 3), 20, deadline_seconds=3.0))
    stays = engine.submit(Request(prompt(1, 3), 2))
    engine.step()
    clock.now = 4.0
    assert (waits, Finished("deadline")) in engine.step()
    clock.now = 5.0
    assert (runs, Finished("deadline")) in engine.step()
    assert drain(engine)[stays][-1] == Finished("length")


def test_a_tenant_with_many_requests_does_not_hold_up_another() -> None:
    base = tiny_base("llama")
    engine = engine_for(base, Source({}), max_running=2)
    many = [engine.submit(Request(prompt(1, 3), 5, tenant="many")) for _ in range(20)]
    few = [engine.submit(Request(prompt(1, 3), 5, tenant="few")) for _ in range(2)]
    order = [number for number, events in drain(engine).items() if events]
    assert max(order.index(number) for number in few) < 6 < order.index(many[-1])
    assert not engine.waiting._served


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prompt": (1,) * 60, "max_new_tokens": 9},
            "60 tokens of prompt and 9 to write; expected at most 64 together",
        ),
        ({"prompt": (1, 300), "max_new_tokens": 9}, "token 300; expected 0 to 299"),
        ({"prompt": (-1,), "max_new_tokens": 9}, "token -1"),
        ({"sampling": Sampling(logit_bias={999: 1.0})}, "token 999"),
    ],
)
def test_requests_that_can_never_run_are_refused(given: dict[str, Any], message: str) -> None:
    engine = engine_for(tiny_base("llama"), Source({}))
    with pytest.raises(ConfigError, match=message):
        engine.validate(Request(**{"prompt": (1,), "max_new_tokens": 2, **given}))


def test_a_full_queue_says_when_to_come_back() -> None:
    engine = engine_for(tiny_base("llama"), Source({}), max_waiting=2)
    for _ in range(2):
        engine.submit(Request((5,), 2))
    with pytest.raises(QueueFull) as caught:
        engine.check_room()
    assert caught.value.retry_after_seconds >= 1


def test_models_that_cannot_be_served_exactly_are_refused() -> None:
    for name in ("bert", "bart"):
        with pytest.raises(UnsupportedModel, match="expected a decoder"):
            engine_for(tiny_base(name), Source({}))
    base = tiny_base("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UnsupportedModel, match="longest text in the batch"):
        engine_for(base, Source({}))


def test_choices_follow_the_seed_whatever_else_runs() -> None:
    base = tiny_base("llama")
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=40, seed=7)
    lonely = engine_for(base, Source({}))
    number = lonely.submit(Request(prompt(1, 5), 10, sampling=sampling))
    wanted = written(drain(lonely)[number])
    busy = engine_for(base, Source({}))
    others = [busy.submit(Request(prompt(k, 4), 9, sampling=Sampling(temperature=2.0))) for k in range(5)]
    number = busy.submit(Request(prompt(1, 5), 10, sampling=sampling))
    found = drain(busy)
    assert written(found[number]) == wanted and len(found) == len(others) + 1
    number = lonely.submit(Request(prompt(1, 5), 10, sampling=replace(sampling, seed=8)))
    assert written(drain(lonely)[number]) != wanted


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.floats(0.1, 3), st.floats(0.05, 1), st.integers(0, 12))
def test_nothing_outside_of_top_p_and_top_k_is_chosen(
    logits: list[float], temperature: float, top_p: float, top_k: int
) -> None:
    from foreword.engine.sampling import Chooser

    chooser = Chooser(Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=0))
    row = torch.tensor(logits)
    chances = (row.double() / temperature).softmax(-1)
    chosen = chooser.choose(row).id
    above = chances[chances > chances[chosen]]
    if top_k:
        assert len(above) < top_k
    assert float(above.sum()) < top_p + 1e-9


def test_penalties_biases_and_logprobs() -> None:
    from foreword.engine.sampling import Chooser

    logits = torch.tensor([1.0, 3.0, 2.9, 0.0])
    plain = Chooser(Sampling(logprobs=2)).choose(logits)
    assert plain.id == 1 and [token for token, _ in plain.alternatives] == [1, 2]
    assert plain.logprob == pytest.approx(float(logits.log_softmax(-1)[1]))
    often = Chooser(Sampling(frequency_penalty=0.06))
    assert [often.choose(logits).id for _ in range(3)] == [1, 1, 2]
    once = Chooser(Sampling(presence_penalty=0.2))
    assert [once.choose(logits).id for _ in range(4)] == [1, 2, 1, 1]
    assert Chooser(Sampling(logit_bias={3: 10.0})).choose(logits).id == 3


def test_residents_know_their_size() -> None:
    prefix: Prefix = prefixes_for(tiny_base("llama"), 2)["p1"]
    assert Resident(prefix.sites, 0, False).num_bytes == prefix.num_bytes
