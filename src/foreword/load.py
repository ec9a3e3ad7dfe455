"""Load for an OpenAI-compatible server: what is sent and when, and the sending of it.

The plan is a pure function of a `Workload`: two runs send the same requests. At an open rate, requests are sent at
planned arrival times, however slow the answers are, and latency counts from the planned time: a server that falls
behind cannot hide it by being asked later (coordinated omission). A closed loop has no planned times; there, latency
counts from when a request is sent, and a slow server is asked less.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreword.errors import ConfigError
from foreword.load_client import WORDS, Planned, Sample, Server, WordSize

__all__ = ["Measured", "Workload", "choose_models", "measure", "plan", "prepare"]

_PAUSE_SECONDS = 0.1  # after a refused connection: a server that is gone is not to be asked as fast as it refuses


@dataclass(frozen=True)
class Workload:
    """What a server is to be loaded with; exactly one of `rate` and `clients`.

    `models` are chosen by `zipf`: the k-th is 1/k**zipf as likely as the first, 0 means all alike. `rate`: Poisson
    arrivals per second; `clients`: so many at a time, each sends when its last answer is complete. It ends after
    `requests` or when `seconds` are over (what runs then is waited for). `prompt_tokens` and `output_tokens` are
    ranges, both ends possible. Raises `ConfigError`.

    >>> Workload(("base:e2e", "base:rte"), rate=4.0, requests=100).output_tokens
    (16, 64)
    """

    models: tuple[str, ...]
    zipf: float = 0.0
    rate: float | None = None
    clients: int | None = None
    requests: int | None = None
    seconds: float | None = None
    prompt_tokens: tuple[int, int] = (32, 128)
    output_tokens: tuple[int, int] = (16, 64)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("no models", "at least one", "name them")
        if (self.rate is None) == (self.clients is None):
            raise ConfigError("a rate and clients together, or neither", "one of them", "choose one")
        if self.requests is None and self.seconds is None:
            raise ConfigError("a load without an end", "a number of requests or of seconds", "give one")
        limits = {"rate": self.rate, "clients": self.clients, "requests": self.requests, "seconds": self.seconds}
        for name, value in limits.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} {value}", "a number above 0", "change it")
        if not 0 <= self.zipf < math.inf:
            raise ConfigError(f"zipf exponent {self.zipf}", "a number from 0", "change it")
        for name, (low, high) in (("prompt tokens", self.prompt_tokens), ("output tokens", self.output_tokens)):
            if not 1 <= low <= high:
                raise ConfigError(f"{name} {low}:{high}", "LOW:HIGH with 1 <= LOW <= HIGH", "change it")


def plan(workload: Workload, size: WordSize | None = None) -> Iterator[Planned]:
    """The requests of a workload, in the order of their sending; without end in a closed loop of some seconds.

    Models, prompts, lengths and arrival times are drawn apart from each other: a run at another rate sends the same.

    >>> [(each.model, each.prompt) for each in plan(Workload(("base",), clients=1, requests=1, prompt_tokens=(3, 3)))]
    [('base', 'our made then')]
    """
    arrivals, models, lengths, words = (
        random.Random(f"{workload.seed}/{what}") for what in ("arrivals", "models", "lengths", "words")
    )
    size = size or WordSize()
    likely = list(itertools.accumulate(k**-workload.zipf for k in range(1, len(workload.models) + 1)))
    arrival: float | None = None
    for number in itertools.count() if workload.requests is None else range(workload.requests):
        if workload.rate is not None:
            arrival = (arrival or 0.0) + arrivals.expovariate(workload.rate)
            if workload.seconds is not None and arrival >= workload.seconds:
                return
        count = size.words(lengths.randint(*workload.prompt_tokens))
        yield Planned(
            number, models.choices(workload.models, cum_weights=likely)[0], " ".join(words.choices(WORDS, k=count)),
            lengths.randint(*workload.output_tokens), arrival,
        )  # fmt: skip


def choose_models(
    cards: Sequence[Mapping[str, Any]] | None,
    names: Sequence[str] = (),
    prefixes: int | None = None,
    base_only: bool = False,
) -> tuple[str, ...]:
    """The models to load: those named, so many prefixes of those that the server lists, or its base model.

    A prefix is a card with a `parent`. `cards` are None where the server lists none; then names are taken as they
    are. Raises `ConfigError` for a name that is not listed, or too few prefixes.

    >>> cards = [{"id": "base"}, {"id": "base:b", "parent": "base"}, {"id": "base:a", "parent": "base"}]
    >>> choose_models(cards, prefixes=2), choose_models(cards, base_only=True)
    (('base:a', 'base:b'), ('base',))
    """
    if sum((bool(names), prefixes is not None, base_only)) != 1:
        raise ConfigError(
            "no models, or several ways to choose them", "one of them", "name models, or a number, or base"
        )
    if names and cards is None:
        return tuple(names)
    listed = {str(card["id"]): card.get("parent") for card in cards or ()}
    missing = [name for name in names if name not in listed]
    if missing:
        some = ", ".join(sorted(listed)[:3]) + (", …" if len(listed) > 3 else "")
        raise ConfigError(
            f"no model {missing[0]!r}", f"one that the server lists ({some})", "check the name and the key"
        )
    if names:
        return tuple(names)
    found = sorted(name for name, parent in listed.items() if bool(parent) != base_only)
    wanted = 1 if prefixes is None else prefixes
    if wanted < 1 or len(found) < wanted:
        kind = "base models" if base_only else "prefixes"
        raise ConfigError(
            f"{wanted} {kind} of {len(found)} that the server lists", "1 or more that are there", "change it"
        )
    return tuple(found[:wanted])


async def prepare(
    server: Server, names: Sequence[str] = (), prefixes: int | None = None, base_only: bool = False
) -> tuple[tuple[str, ...], WordSize | None]:
    """The models to load, as `choose_models`, and the size of words there; one request settles what the server takes.

    That request goes to the base model where it is listed, so that no prefix is loaded by it. Raises `ConfigError`.
    """
    cards = await server.models()
    models = choose_models(cards, names, prefixes, base_only)
    parents = {card["id"]: card.get("parent") for card in cards or ()}
    parent = parents.get(models[0])
    first = str(parent) if parent in parents else models[0]
    await server.probe(first)
    return models, await server.word_size(first)


@dataclass(frozen=True)
class Measured:
    """A run: its samples in the order of their sending, how long it took, the client's processor seconds per second.

    `stopped`: by Ctrl-C, before its end. `forced`: whether the server took the field that forces output lengths.
    """

    samples: Sequence[Sample]
    seconds: float
    cpu_share: float
    stopped: bool = False
    forced: bool = False


async def measure(
    server: Server,
    workload: Workload,
    size: WordSize | None = None,
    *,
    progress: Callable[[int, float], None] | None = None,
) -> Measured:
    """Load the server, until the plan is at its end or Ctrl-C stops it.

    `progress(requests, seconds)` hears of each request that ended.
    """
    samples: list[Sample] = []
    start, cpu = server.clock(), time.process_time()

    def now() -> float:
        return server.clock() - start

    ended = itertools.count(1)

    async def send(request: Planned) -> Sample:
        sample = await server.complete(request, start, samples)
        if progress is not None:
            progress(next(ended), now())
        return sample

    requests = plan(workload, size)
    work = asyncio.ensure_future(
        _at_rate(requests, send, now) if workload.clients is None else _closed(requests, send, now, workload)
    )
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        work.cancel()

    with _on_interrupt(stop):
        try:
            await work
        except asyncio.CancelledError:
            if not stopped:
                raise
    seconds = now()
    share = (time.process_time() - cpu) / seconds if seconds > 0 else 0.0
    return Measured(samples, seconds, share, stopped, "ignore_eos" in server.extra)


async def _at_rate(
    requests: Iterator[Planned], send: Callable[[Planned], Awaitable[Any]], now: Callable[[], float]
) -> None:
    """Send each request at its time, whatever became of those before."""
    tasks: list[asyncio.Future[Any]] = []
    try:
        for request in requests:
            await asyncio.sleep(max(0.0, (request.arrival or 0.0) - now()))
            tasks.append(asyncio.ensure_future(send(request)))
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _closed(
    requests: Iterator[Planned],
    send: Callable[[Planned], Awaitable[Sample]],
    now: Callable[[], float],
    workload: Workload,
) -> None:
    """Clients that take the next request when their last one has ended, until the time is over."""
    limit = math.inf if workload.seconds is None else workload.seconds

    async def client() -> None:
        for request in requests:
            if (await send(request)).error == "no connection":
                await asyncio.sleep(_PAUSE_SECONDS)
            if now() >= limit:
                return

    await asyncio.gather(*(client() for _ in range(workload.clients or 1)))


@contextlib.contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call `stop` meanwhile; where a loop cannot (Windows, not the main thread), it stays as it is."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)
