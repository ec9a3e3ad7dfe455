"""What a load run says: its numbers, its rows for JSON, and a picture of latencies and of the run over time."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foreword.load import Measured
from foreword.load_client import Sample
from foreword.optional import optional
from foreword.storage import write_atomic

__all__ = ["BUSY", "in_flight", "latencies", "load_png", "number", "save_load", "summary", "token_rate"]

BUSY = 0.7  # a client that uses more of a core than this may itself be what limits the run

_FORMAT = 1
_BINS = 60
_TTFT, _ITL, _PLAIN = "#1b6ca8", "#c8511b", "#3a3f45"


def latencies(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Seconds to the first token, between tokens and to the end, of the requests that were answered whole."""
    whole = [sample for sample in samples if sample.ok]
    return {
        "ttft": [sample.ttft for sample in whole if sample.ttft is not None],
        "itl": [gap for sample in whole for gap in sample.gaps],
        "end_to_end": [sample.end_to_end for sample in whole if sample.end_to_end is not None],
    }


def summary(measured: Measured) -> dict[str, Any]:
    """The numbers of a run. Tokens and latencies are those of the requests that were answered whole.

    `ended_early`: answers shorter than asked. `sending_late_seconds`: how far the client itself was behind its plan,
    None in a closed loop. Raises nothing; what cannot be known is None.

    >>> sample = Sample(0, "base", planned=0.0, sent=0.5, asked=2, times=[1.0, 1.5], ended=2.0)
    >>> numbers = summary(Measured([sample], seconds=2.0, cpu_share=0.1))
    >>> numbers["output_tokens_per_second"], numbers["ttft_seconds"]["p95"], numbers["sending_late_seconds"]["mean"]
    (1.0, 1.0, 0.5)
    """
    samples, seconds = measured.samples, measured.seconds
    whole = [sample for sample in samples if sample.ok]
    failed = Counter(sample.error for sample in samples if sample.error is not None)
    tokens = sum(sample.tokens for sample in whole)
    prompts = [sample.prompt_tokens for sample in whole if sample.prompt_tokens is not None]
    at_rate = any(sample.planned is not None for sample in samples)
    late = [sample.sent - sample.planned for sample in samples if sample.planned is not None]
    counted = sum(sample.counted is not None for sample in whole)
    return {
        "sent": len(samples),
        "ok": len(whole),
        "failed": dict(failed.most_common()),
        "unfinished": sum(sample.ended is None for sample in samples),
        "stopped": measured.stopped,
        "seconds": seconds,
        "requests_per_second": len(whole) / seconds if seconds > 0 else None,
        "output_tokens_per_second": tokens / seconds if seconds > 0 else None,
        "output_tokens": tokens,
        "tokens_counted_by": "server" if whole and counted == len(whole) else "client" if not counted else "both",
        "prompt_tokens_mean": sum(prompts) / len(prompts) if prompts else None,
        "output_lengths_forced": measured.forced,
        "ended_early": sum(sample.tokens < sample.asked for sample in whole),
        "latency_from": "planned arrival" if at_rate else "sending",
        **{f"{name}_seconds": _spread(values) for name, values in latencies(samples).items()},
        "sending_late_seconds": _spread(late) if at_rate else None,
        "client_cpu_share": measured.cpu_share,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and percentiles, interpolated linearly; None without values."""
    if not values:
        return {"count": 0, "mean": None, "p50": None, "p95": None, "p99": None}
    p50, p95, p99 = (float(value) for value in np.percentile(values, (50, 95, 99)))
    return {"count": len(values), "mean": float(np.mean(values)), "p50": p50, "p95": p95, "p99": p99}


def in_flight(samples: Sequence[Sample], seconds: float) -> tuple[list[float], list[int]]:
    """When the number of requests at the server changes, and what it is from then on; begins at 0 seconds.

    >>> in_flight([Sample(0, "b", None, 0.5, 1, ended=2.0), Sample(1, "b", None, 1.0, 1, ended=1.5)], 2.0)
    ([0.0, 0.5, 1.0, 1.5, 2.0], [0, 1, 2, 1, 0])
    """
    changes = Counter({0.0: 0})
    for sample in samples:
        changes[sample.sent] += 1
        changes[seconds if sample.ended is None else sample.ended] -= 1
    times = sorted(changes)
    return times, np.cumsum([changes[when] for when in times]).tolist()


def token_rate(samples: Sequence[Sample], seconds: float) -> tuple[list[float], list[float]]:
    """Tokens per second over a run: the edges of at most 60 bins of a round width, and the rate in each.

    Pieces of text share the tokens that the server counted; failed requests count with what they brought.

    >>> token_rate([Sample(0, "b", None, 0.0, 3, times=[0.01, 0.02, 0.15], ended=0.2)], 0.2)
    ([0.0, 0.1, 0.2], [20.0, 10.0])
    """
    width = next(
        (unit * 10.0**power for power in range(-1, 6) for unit in (1, 2, 5) if seconds / (unit * 10.0**power) <= _BINS),
        seconds,
    )
    count = max(1, int(np.ceil(seconds / width - 1e-9)))
    edges = [*(round(width * k, 9) for k in range(count)), max(seconds, 1e-9)]
    times = [when for sample in samples for when in sample.times]
    weights = [sample.tokens / len(sample.times) for sample in samples for _ in sample.times]
    tokens, _ = np.histogram(times, bins=edges, weights=weights)
    return edges, (tokens / np.diff(edges)).tolist()


def number(value: float) -> str:
    """A number of three digits, or a whole one.

    >>> number(0.01234), number(12345.6)
    ('0.0123', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save_load(folder: Path, document: Mapping[str, Any], measured: Measured) -> None:
    """Write `load.json`: what `document` says, and a row for every request. Raises `StorageError`."""
    lines = ",\n".join(json.dumps(_row(sample), ensure_ascii=False) for sample in measured.samples)
    head = json.dumps({"format": _FORMAT, **document}, ensure_ascii=False, indent=1, default=str)
    write_atomic(folder / "load.json", f'{head[:-2]},\n "requests": [\n{lines}\n]}}\n')


def _row(sample: Sample) -> dict[str, Any]:
    return {
        "number": sample.number,
        "model": sample.model,
        "planned_seconds": _rounded(sample.planned),
        "sent_seconds": _rounded(sample.sent),
        "ended_seconds": _rounded(sample.ended),
        "ttft_seconds": _rounded(sample.ttft),
        "end_to_end_seconds": _rounded(sample.end_to_end),
        "prompt_tokens": sample.prompt_tokens,
        "asked_tokens": sample.asked,
        "tokens": sample.tokens,
        "finish": sample.finish,
        "error": sample.error if sample.ended is not None else "unfinished",
        "message": sample.message,
        "text_seconds": [_rounded(when) for when in sample.times],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def load_png(path: Path, measured: Measured, title: str = "") -> None:
    """Write an image of three panels: latencies as cumulative shares, requests in flight, tokens per second.

    Raises `MissingPackage` without matplotlib, `StorageError`.
    """
    figure_module, ticker = optional("matplotlib.figure", "plot"), optional("matplotlib.ticker", "plot")
    figure = figure_module.Figure(figsize=(9, 10), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    shares, flight, rate = figure.subplots(3, height_ratios=(1.3, 1, 1))
    _draw_shares(shares, latencies(measured.samples), ticker)
    times, counts = in_flight(measured.samples, measured.seconds)
    flight.fill_between(times, counts, step="post", color=_TTFT, alpha=0.25, linewidth=0)
    flight.step(times, counts, where="post", color=_TTFT, linewidth=1.2)
    flight.set_title("requests in flight", fontsize=11, loc="left")
    flight.yaxis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=6))
    edges, rates = token_rate(measured.samples, measured.seconds)
    rate.stairs(rates, edges, fill=True, color=_ITL, alpha=0.25)
    rate.stairs(rates, edges, color=_ITL, linewidth=1.2)
    mean = summary(measured)["output_tokens_per_second"] or 0.0
    rate.axhline(mean, color=_PLAIN, linewidth=1, linestyle="--", label=f"whole run: {number(mean)}")
    rate.set_title("output tokens per second", fontsize=11, loc="left")
    rate.legend(loc="best", fontsize=9)
    for axes in (flight, rate):
        axes.set_xlim(0, max(measured.seconds, 1e-9))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds since the run began", fontsize=9)
    for axes in (shares, flight, rate):
        axes.grid(color="#d8dce1", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


def _draw_shares(axes: Any, found: Mapping[str, Sequence[float]], ticker: Any) -> None:
    """Cumulative distributions of the two latencies, which differ by orders of magnitude."""
    curves: Iterable[tuple[str, str, str]] = (
        ("itl", "between tokens (ITL)", _ITL), ("ttft", "to the first token (TTFT)", _TTFT),
    )  # fmt: skip
    for name, label, colour in curves:
        values = np.sort(np.asarray(found[name], dtype=float)) * 1000
        if not len(values):
            continue
        # Tokens that come in one piece of the network are 0 apart; a logarithmic axis needs a place for them.
        values = np.maximum(values, 0.01)
        share = np.arange(1, len(values) + 1) / len(values)
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        said = f"{label}: p50 {number(p50)} ms, p95 {number(p95)} ms, p99 {number(p99)} ms"
        axes.step([values[0], *values], [0.0, *share], where="post", color=colour, linewidth=1.6, label=said)
    axes.set_xscale("log")
    axes.grid(axis="x", which="minor", color="#eceef1", linewidth=0.5)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(1.3, 0.5)))  # labels where there is no 10^k
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    for part in (0.5, 0.95):
        axes.axhline(part, color=_PLAIN, linewidth=0.7, linestyle=":")
    axes.set_title("cumulative share of latencies", fontsize=11, loc="left")
    axes.set_xlabel("milliseconds", fontsize=9)
    if any(found[name] for name, _, _ in curves):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=9, frameon=False)
