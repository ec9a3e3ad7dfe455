"""What Prometheus reads at `/metrics`.

Names mirror those of vLLM with `foreword_` before them. No label holds what a client says, neither prefixes nor
tenants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from foreword.engine import EngineStats

__all__ = ["Metrics"]

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class Metrics:
    """The counters and histograms of one server, and what its engine says when they are read.

    >>> Metrics(lambda: None).refused("rate_limit_exceeded")
    """

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(stats))
        self._first = self._histogram("time_to_first_token_seconds", "From a request to its first token.", _SLOW)
        self._between = self._histogram("inter_token_latency_seconds", "Between a token and the one before.", _FAST)
        self._whole = self._histogram("e2e_request_latency_seconds", "From a request to its last token.", _SLOW)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that were taken.")
        self._generated = self._counter("generation_tokens", "Tokens that were generated.")
        self._finished = self._counter("request_success", "Sequences that ended, by reason.", "finished_reason")
        self._refused = self._counter("requests_refused", "Requests that were refused, by reason.", "reason")

    def taken(self, prompt_tokens: int) -> None:
        """A request was given to the engine."""
        self._prompt.inc(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        """A sequence has its first token, so long after its request."""
        self._first.observe(seconds)

    def tokens(self, count: int, seconds_each: float | None) -> None:
        """More tokens of a sequence, so long after those before; None for the first."""
        self._generated.inc(count)
        if seconds_each is not None:
            for _ in range(count):
                self._between.observe(seconds_each)

    def finished(self, reason: str, seconds: float) -> None:
        """A sequence has ended, so long after its request."""
        self._finished.labels(reason).inc()
        self._whole.observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was refused; the reason is one of the error codes."""
        self._refused.labels(reason).inc()

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"foreword_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"foreword_{name}", text, buckets=buckets, registry=self._registry)


class _EngineMetrics(Collector):
    """The engine's own numbers, read at the moment of the scrape."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        stats = self._stats()
        if stats is None:
            return
        bank = stats.bank
        for name, text, value in (
            ("num_requests_running", "Sequences that have a place in the batch.", stats.running),
            ("num_requests_waiting", "Sequences that wait for a place.", stats.waiting),
            ("kv_cache_bytes", "Bytes of keys and values of running sequences.", stats.cache_bytes),
            ("prefix_bank_entries", "Prefixes on the device.", bank.entries),
            ("prefix_bank_bytes", "Bytes of prefixes on the device.", bank.num_bytes),
            ("prefix_bank_host_entries", "Prefixes in host memory.", bank.host_entries),
            ("prefix_bank_host_bytes", "Bytes of prefixes in host memory.", bank.host_bytes),
        ):
            yield GaugeMetricFamily(f"foreword_{name}", text, value)
        for name, text, value in (
            ("engine_tokens_read", "Tokens of prompts that the engine read.", stats.tokens_read),
            ("engine_tokens_written", "Tokens that the engine generated.", stats.tokens_written),
            ("prefix_bank_hits", "Prefixes that were in the bank when asked for.", bank.hits),
            ("prefix_bank_misses", "Prefixes that had to be loaded.", bank.misses),
            ("prefix_bank_evictions", "Prefixes that made room for others.", bank.evictions),
            ("prefix_bank_failures", "Prefixes that could not be loaded.", bank.failures),
        ):
            yield CounterMetricFamily(f"foreword_{name}", text, value)
