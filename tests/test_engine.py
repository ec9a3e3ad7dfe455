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
from foreword.errors import ConfigError, EngineStopped, QueueFull, UnsupportedModel
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
                assert reason in ("gone", "cancelled") and not found
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
        assert isinstance(event, Finished) and event.reason == ("gone" if key == "missing" else "error")
        assert event.message
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


# What a reading of the code found


def test_a_growth_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama", max_position_embeddings=400)
    engine = engine_for(base, Source({}))
    first = engine.submit(Request(prompt(1, 3), 4))
    assert written(drain(engine)[first]) == alone(base, Request(prompt(1, 3), 4), None)
    zeros, calls = torch.zeros, iter(range(100))

    def out_of_memory(*shape: Any, **options: Any) -> torch.Tensor:
        if len(shape) == 1 and len(shape[0]) == 4 and shape[0][2] > 64 and next(calls) == 2:
            raise MemoryError
        return zeros(*shape, **options)

    with monkeypatch.context() as patch:
        patch.setattr("foreword.engine.cache.torch.zeros", out_of_memory)
        failed = engine.submit(Request(prompt(1, 90), 3))
        assert drain(engine)[failed][-1] == Finished("error", "the step failed (MemoryError)")
    again = Request(prompt(1, 90), 3)
    number = engine.submit(again)
    assert written(drain(engine)[number]) == alone(base, again, None)


def test_rows_keep_what_they_hold_when_the_cache_grows() -> None:
    base = tiny_base("llama", max_position_embeddings=400)
    prefixes = prefixes_for(base, 6, gates=True)
    engine = engine_for(base, Source(prefixes), prefill_tokens=40)
    requests = {}
    for number, key in enumerate([*prefixes, None, *prefixes]):
        length, new = 5 + 37 * number % 230, 30 + 11 * number % 90
        request = Request(prompt(number, length), new, key, stop_tokens=base.end_tokens)
        requests[engine.submit(request)] = request
    found = drain(engine)
    for number, request in requests.items():
        assert written(found[number]) == alone(base, request, prefixes.get(request.prefix or ""))
    assert engine.cache.positions > 256


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefixes_in_the_convention_of_peft_shift_positions(name: str) -> None:
    """Also a mass and a gate at one site, and a site without slots."""
    base = tiny_base(name)
    made = prefixes_for(base, 3, gates=True)["p2"]
    sites = {site: t._replace(log_mass=torch.randn(t.length)) for site, t in made.sites.items()}
    last = list(sites)[-1]
    empty = sites[last]._replace(
        keys=sites[last].keys[:, :0], values=sites[last].values[:, :0], log_mass=None, gate=None
    )
    prefixes = {
        "offset": replace(made, sites=sites, position_offset=4),
        "empty": replace(made, sites={**sites, last: empty}),
    }
    engine = engine_for(base, Source(prefixes))
    numbers = {key: engine.submit(Request(prompt(3, 8), 10, key)) for key in [*prefixes, None]}
    found = drain(engine)
    for key, number in numbers.items():
        assert written(found[number]) == alone(base, Request(prompt(3, 8), 10), prefixes.get(key or ""))


def test_learned_positions_end_where_the_table_ends() -> None:
    base = tiny_base("gpt2")
    shifted = replace(prefixes_for(base, 1)["p0"], position_offset=4)
    engine = engine_for(base, Source({"p0": shifted}))
    number = engine.submit(Request(prompt(1, 50), 12, "p0"))
    (event,) = drain(engine)[number]
    assert event.reason == "error" and "66 positions with those of the prefix" in event.message  # type: ignore[union-attr]


def test_a_prefix_that_is_longer_than_a_prompt_may_be_is_refused() -> None:
    base = tiny_base("llama")
    prefix = prefixes_for(base, 1)["p0"]
    long = {
        site: t._replace(keys=t.keys.repeat(1, 60, 1), values=t.values.repeat(1, 60, 1))
        for site, t in prefix.sites.items()
    }
    engine = engine_for(base, Source({"long": replace(prefix, sites=long)}))
    number = engine.submit(Request(prompt(1, 3), 3, "long"))
    (event,) = drain(engine)[number]
    assert "a prefix of 120 slots; expected at most 64" in event.message  # type: ignore[union-attr]
    assert engine.cache.positions == 0


def test_what_a_step_has_told_is_not_lost_when_it_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(tiny_base("llama"), Source({}))
    first, second = (engine.submit(Request(prompt(1, 3), 9)) for _ in range(2))
    engine.step()
    engine.cancel(first)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_pieces", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    found = dict(engine.end_all("error"))
    assert found == {first: Finished("cancelled"), second: Finished("error")}


def test_retry_after_is_how_long_requests_run_not_how_long_they_wait() -> None:
    clock = Clock()
    engine = Engine(tiny_base("llama"), Source({}), EngineOptions(max_running=1, max_waiting=20), clock=clock)
    for _ in range(20):
        engine.submit(Request((5,), 2))
    while len(engine.waiting) > 10:
        clock.now += 0.5  # a step; two for each request
        engine.step()
    for _ in range(10):
        engine.submit(Request((5,), 2))
    with pytest.raises(QueueFull) as caught:
        engine.check_room()
    assert 5 <= caught.value.retry_after_seconds <= 40


def test_options_that_leave_no_chance_end_their_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    engine = engine_for(base, Source({}))
    odd = engine.submit(Request(prompt(1, 3), 4, sampling=Sampling(temperature=1.0)))
    plain = engine.submit(Request(prompt(1, 3), 4))
    monkeypatch.setattr("foreword.engine.sampling.Chooser._chances", lambda self, logits: logits * math.nan)
    found = drain(engine)
    assert found[odd][-1] == Finished("error", "its logits are not finite")
    assert written(found[plain]) == alone(base, Request(prompt(1, 3), 4), None)
    with pytest.raises(ConfigError, match="logit_bias 1e\\+39; expected -1000 to 1000"):
        Sampling(logit_bias={1: 1e39})
    with pytest.raises(ConfigError, match="seed 1.5"):
        Sampling(seed=1.5)  # type: ignore[arg-type]


def test_nobody_saves_up_service_behind_a_long_request() -> None:
    from foreword.engine.queue import FairQueue

    queue: FairQueue[str] = FairQueue()
    queue.push("long", "x")
    assert queue.pop(lambda _: True) == ("long", "x")
    queue.charge("long", 10)
    for turn in range(100):
        queue.push("busy", f"b{turn}")
        assert queue.pop(lambda _: True) == ("busy", f"b{turn}")
        queue.charge("busy", 1000)
        queue.end("busy")
        queue.push("busy", "next") if turn == 99 else None
    for turn in range(20):
        queue.push("long", f"l{turn}")
        queue.push("new", f"n{turn}")
    taken = []
    for _ in range(9):
        found = queue.pop(lambda _: True)
        assert found is not None
        taken.append(found[0])
        queue.charge(found[0], 1000)
    assert "busy" in taken[:3], "who had been away is served before all others"


def test_a_prompt_that_is_being_read_is_not_overtaken_for_ever() -> None:
    base = tiny_base("llama")
    engine = engine_for(base, Source({}), max_running=3, prefill_tokens=8, max_waiting=500)
    early = [engine.submit(Request(prompt(k, 8), 1)) for k in range(3)]
    events: dict[int, list[Event]] = {}
    for _ in range(12):
        engine.submit(Request(prompt(9, 8), 1))
        for number, event in engine.step():
            events.setdefault(number, []).append(event)
        engine.check()
    assert all(number in events for number in early)


def test_who_waits_for_a_load_does_not_keep_the_engine_busy() -> None:
    base, gate = tiny_base("llama"), threading.Event()
    source = Source(prefixes_for(base, 1))
    source.before = lambda key: (gate.wait(10), None)[1]
    engine = engine_for(base, source, max_running=1)
    for _ in range(6):
        engine.submit(Request(prompt(1, 3), 2, "p0"))
    engine.step()
    assert engine.has_work and not engine.runnable
    gate.set()
    drain(engine)


def test_loads_can_be_cancelled_by_nobody_and_end_when_the_bank_closes() -> None:
    base, gate = tiny_base("llama"), threading.Event()
    source = Source(prefixes_for(base, 6))
    source.before = lambda key: (gate.wait(10), None)[1]
    engine = engine_for(base, source)
    futures = [engine.bank.fetch(f"p{k}") for k in range(6)]
    assert not futures[0].cancel()
    engine.bank.close()
    for future in futures:
        with pytest.raises(EngineStopped):
            future.result(5)
    with pytest.raises(EngineStopped):
        engine.bank.fetch("p0")
    gate.set()
