"""Continuous batching: a step writes a token for each running sequence and reads a piece of the prompts of new ones.

Sequences come and go between steps. Each has a row of the cache, which holds its prefix and its text; rows are dense,
those that write before those whose prompt is still read. A step is one forward pass over the tokens of all of them.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foreword.attention import check_prefix
from foreword.base import BaseModel
from foreword.engine.attention import Piece, Ragged
from foreword.engine.cache import SlotCache
from foreword.engine.fitness import check_model
from foreword.engine.packed import packed_logits
from foreword.engine.queue import FairQueue
from foreword.engine.request import Event, Finished, Request, Token
from foreword.engine.sampling import Chooser, choose
from foreword.engine.tiers import PrefixBank, PrefixSource, Resident
from foreword.errors import ConfigError, ForewordError, PrefixMismatch, QueueFull, StoreError
from foreword.prefix import Prefix

__all__ = ["Engine", "EngineOptions"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine takes on.

    `max_running` sequences at once, `max_waiting` requests that wait, `max_tokens` of prompt and answer together (0:
    what the model has, at most 4096), `prefill_tokens` of prompts read in one step beside the sequences that write,
    and bytes of prefixes on the device and, for a GPU, in host memory.
    """

    max_running: int = 32
    max_waiting: int = 256
    max_tokens: int = 0
    prefill_tokens: int = 256
    bank_bytes: int = 512 << 20
    host_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for name, least in (("max_running", 1), ("max_waiting", 1), ("max_tokens", 0), ("prefill_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} {getattr(self, name)}", f"at least {least}", "correct it")


@dataclass(eq=False)
class _Sequence:
    """A request on its way: waiting, its prompt being read, or writing."""

    id: int
    request: Request
    deadline: float | None
    chooser: Chooser
    turn: int = 0  # the how manieth that was given a row
    began: float = 0.0
    resident: Future[Resident] | None = None
    row: int = -1
    offset: int = 0
    whole_prompt: bool = False
    read: int = 0  # tokens of the prompt that are in the cache
    written: list[int] = field(default_factory=list)
    cancelled: bool = False

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return len(self.request.prompt) - self.read


class Engine:
    """Runs requests of many tenants through one frozen base model, each through its own prefix.

    `submit` and `cancel` may be called between steps; `step` does a step and tells what happened. For a thread that
    steps by itself see `EngineRunner`. Raises `UnsupportedModel` for a model whose packed passes are not exact.
    """

    def __init__(
        self,
        base: BaseModel,
        source: PrefixSource,
        options: EngineOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.options = options = options or EngineOptions()
        check_model(base)
        self.base, self._clock = base, clock
        known = base.max_tokens
        self.max_tokens = min(filter(None, (options.max_tokens or 4096, known)))
        self.reset()
        self.bank = PrefixBank(
            source, self._prepare, device_bytes=options.bank_bytes,
            host_bytes=0 if base.device.type == "cpu" else options.host_bytes, on_change=on_change,
        )  # fmt: skip
        self.tokens_read = self.tokens_written = 0
        self._ids, self._turns = itertools.count(), itertools.count()
        self._seconds_each = 1.0  # how long a request runs, lately
        self._vocab = base.model.get_input_embeddings().num_embeddings

    # Coming and going

    def validate(self, request: Request) -> None:
        """Raise `ConfigError` for a request that can never run."""
        longest = len(request.prompt) + request.max_new_tokens
        if longest > self.max_tokens:
            raise ConfigError(
                f"{len(request.prompt)} tokens of prompt and {request.max_new_tokens} to write",
                f"at most {self.max_tokens} together", "shorten the prompt or ask for fewer",
            )  # fmt: skip
        for token in itertools.chain(request.prompt, request.sampling.logit_bias):
            if not 0 <= token < self._vocab:
                raise ConfigError(f"token {token}", f"0 to {self._vocab - 1}", "use this model's tokenizer")

    def check_room(self, coming: int = 0) -> None:
        """Raise `QueueFull` while too many requests wait, with those that are `coming`."""
        waiting = len(self.waiting) + coming
        if waiting >= self.options.max_waiting:
            turns = -(-waiting // self.options.max_running)
            raise QueueFull(waiting, turns * self._seconds_each)

    def submit(self, request: Request, resident: Future[Resident] | None = None, since: float | None = None) -> int:
        """Let a request wait for its turn; its number. `validate` and `check_room` come first.

        `resident` is what `fetch` gave for its prefix, where that was called before, `since` when the request came.
        """
        since = self._clock() if since is None else since
        deadline = None if request.deadline_seconds is None else since + request.deadline_seconds
        sequence = _Sequence(next(self._ids), request, deadline, Chooser(request.sampling), resident=resident)
        self._known[sequence.id] = sequence
        self.waiting.push(request.tenant, sequence)
        return sequence.id

    def cancel(self, number: int) -> None:
        """End a request at the next step; one that has ended is let be."""
        if number in self._known:
            self._known[number].cancelled = True

    @property
    def has_work(self) -> bool:
        """Whether there is anything that has not ended."""
        return bool(self._known)

    @property
    def runnable(self) -> bool:
        """Whether a step would do something now, and not only wait for prefixes to be loaded."""
        return bool(self.rows) or any(
            sequence.cancelled or sequence.resident is None or sequence.resident.done() for sequence in self._near()
        )

    def end_all(self, reason: str, message: str = "") -> list[tuple[int, Event]]:
        """End everything that waits or runs; all events that were not told yet."""
        for sequence in list(self._known.values()):
            self._end(sequence, reason, message)
        return self._untold()

    def reset(self) -> None:
        """Forget everything that waits or runs, whatever state it is in."""
        options, base = self.options, self.base
        self.cache = SlotCache(base.geometry, options.max_running, self.max_tokens, base.dtype, base.device)
        self.waiting: FairQueue[_Sequence] = FairQueue()
        self.rows: list[_Sequence] = []  # by row
        self.writing = 0  # the first rows
        self._known: dict[int, _Sequence] = {}
        self._events: list[tuple[int, Event]] = []

    # A step

    def step(self) -> list[tuple[int, Event]]:
        """One step; its events by request, in order. `Finished` comes last for each request, exactly once."""
        self._drop_ended()
        self._admit()
        pieces = self._pieces()
        if self.writing or pieces:
            self._pass(pieces)
        return self._untold()

    def _untold(self) -> list[tuple[int, Event]]:
        """What has happened; kept until it is asked for, also where a step breaks off."""
        events, self._events = self._events, []
        return events

    def _pass(self, pieces: list[Piece]) -> None:
        """One forward pass, and what its logits mean."""
        done = [self.rows[piece.row] for piece in pieces if piece.tokens == self.rows[piece.row].left]
        writers = [*self.rows[: self.writing], *done]
        try:
            logits = self._forward(pieces)
        except Exception as error:
            _LOG.exception("a step failed")
            failed = [*self.rows[: self.writing], *(self.rows[piece.row] for piece in pieces)]
            self._advance(pieces)  # what was begun is wiped with the rest of its row
            for sequence in failed:
                self._end(sequence, "error", f"the step failed ({type(error).__name__})")
            return
        self._advance(pieces)
        self.tokens_read += sum(piece.tokens for piece in pieces)
        for sequence in done:  # it writes from now on: its row comes behind those that do
            if sequence.row != self.writing:
                row, other = sequence.row, self.rows[self.writing]
                self.cache.swap(row, self.writing)
                self._place(sequence, self.writing)
                self._place(other, row)
            self.writing += 1
        for sequence, token in zip(writers, choose(logits, [each.chooser for each in writers]), strict=True):
            self._take(sequence, token)

    def _drop_ended(self) -> None:
        """End what was cancelled or is too late."""
        now = self._clock()
        for sequence in list(self._known.values()):
            if sequence.cancelled:
                self._end(sequence, "cancelled")
            elif sequence.deadline is not None and now >= sequence.deadline:
                self._end(sequence, "deadline")

    def _admit(self) -> None:
        """Give free rows to those who are next and whose prefix is there; begin to load those of the next ones."""
        for sequence in self._near():
            if sequence.resident is None:
                sequence.resident = self.fetch(sequence.request.prefix)
        while len(self.rows) < self.options.max_running:
            taken = self.waiting.pop(lambda sequence: sequence.resident is not None and sequence.resident.done())
            if taken is None:
                break
            tenant, sequence = taken
            self.waiting.charge(tenant, len(sequence.request.prompt) + sequence.request.max_new_tokens)
            try:
                self._begin(sequence)
            except ForewordError as error:
                self._end(sequence, "gone" if isinstance(error, StoreError) else "error", str(error))
            except Exception as error:
                _LOG.exception("prefix %s could not be read", sequence.request.prefix)
                self._end(sequence, "error", f"its prefix could not be read ({type(error).__name__})")

    def _near(self) -> Iterator[_Sequence]:
        """Those whose turn is near, for whom prefixes are loaded."""
        return itertools.islice(self.waiting, 2 * self.options.max_running)

    def fetch(self, prefix: str | None) -> Future[Resident]:
        """Begin to bring a prefix to the device; may be called from any thread."""
        if prefix is not None:
            return self.bank.fetch(prefix)
        nothing: Future[Resident] = Future()
        nothing.set_result(Resident({}, 0, False))
        return nothing

    def _begin(self, sequence: _Sequence) -> None:
        """Put a sequence into the next row, behind its prefix."""
        sequence.turn, sequence.began = next(self._turns), self._clock()
        sequence.row = len(self.rows)  # from here on it has to leave the running, not the waiting ones
        self.rows.append(sequence)
        assert sequence.resident is not None
        try:
            resident = sequence.resident.result()
        except BaseException:
            self.cache.put(sequence.row, {})
            raise
        self.cache.put(sequence.row, resident.sites)
        sequence.offset, sequence.whole_prompt = resident.position_offset, resident.reads_prompt
        sequence.resident = None  # the row has its own copy
        longest = sequence.offset + len(sequence.request.prompt) + sequence.request.max_new_tokens
        if self.base.family.positions == "learned" and longest > (self.base.max_tokens or longest):
            raise ConfigError(
                f"{longest} positions with those of the prefix", f"at most {self.base.max_tokens}",
                "shorten the prompt or ask for fewer tokens",
            )  # fmt: skip

    def _pieces(self) -> list[Piece]:
        """What is read of prompts in this step: of those first who were first given a row."""
        left = self.options.prefill_tokens
        pieces: list[Piece] = []
        for sequence in sorted(self.rows[self.writing :], key=lambda sequence: sequence.turn):
            if left <= 0 or (sequence.whole_prompt and sequence.left > left and pieces):
                break
            count = sequence.left if sequence.whole_prompt else min(sequence.left, left)
            pieces.append(Piece(sequence.row, count))
            left -= count
        return pieces

    @torch.no_grad()
    def _forward(self, pieces: list[Piece]) -> Tensor:
        """Logits `[writing rows + prompts that are read to their end, vocab]`."""
        ids, positions, wanted = [], [], []
        for row in range(self.writing):
            sequence = self.rows[row]
            ids.append(sequence.written[-1])
            positions.append(sequence.offset + self.cache.texts[row])
            wanted.append(True)
        for row, count in pieces:
            sequence = self.rows[row]
            ids += sequence.request.prompt[sequence.read : sequence.read + count]
            positions += range(sequence.offset + sequence.read, sequence.offset + sequence.read + count)
            wanted += [False] * (count - 1) + [count == sequence.left]
        coming = [*((row, 1) for row in range(self.writing)), *pieces]
        self.cache.reserve(max(self.cache.held(site, row) + count for site in self.cache.keys for row, count in coming))
        return packed_logits(self.base, Ragged(self.cache, self.writing, pieces), ids, positions, wanted)

    def _advance(self, pieces: list[Piece]) -> None:
        """Count what a pass has put into the cache."""
        for row in range(self.writing):
            self.cache.texts[row] += 1
        for piece in pieces:
            self.cache.texts[piece.row] += piece.tokens
            self.rows[piece.row].read += piece.tokens

    def _take(self, sequence: _Sequence, token: Token | None) -> None:
        """What a sequence's next token means for it."""
        if token is None:
            self._end(sequence, "error", "its logits are not finite")
        elif token.id in sequence.request.stop_tokens:
            self._end(sequence, "stop")
        else:
            sequence.written.append(token.id)
            self.tokens_written += 1
            self._events.append((sequence.id, token))
            if len(sequence.written) == sequence.request.max_new_tokens:
                self._end(sequence, "length")

    def _end(self, sequence: _Sequence, reason: str, message: str = "") -> None:
        tenant = sequence.request.tenant
        if sequence.row < 0:
            self.waiting.remove(tenant, sequence)
        else:
            self._release(sequence.row)
            self.waiting.charge(tenant, -(sequence.left + sequence.request.max_new_tokens - len(sequence.written)))
            self.waiting.end(tenant)
        if reason in ("stop", "length"):
            self._seconds_each += 0.1 * (self._clock() - sequence.began - self._seconds_each)
        del self._known[sequence.id]
        self._events.append((sequence.id, Finished(reason, message)))

    def _release(self, row: int) -> None:
        """Give a row back; rows stay dense, those that write first."""
        if row < self.writing:
            self.writing -= 1
            if row != self.writing:
                self.cache.move(self.writing, row)
                self._place(self.rows[self.writing], row)
            row = self.writing
        self.cache.release(row)
        last = self.rows.pop()
        if row < len(self.rows):
            self._place(last, row)

    def _place(self, sequence: _Sequence, row: int) -> None:
        self.rows[row] = sequence
        sequence.row = row

    def _prepare(self, prefix: Prefix) -> Resident:
        """A prefix as rows take it, checked against the base model."""
        check_prefix(self.base.attachment, prefix)
        if max(prefix.lengths.values(), default=0) > self.max_tokens:
            raise PrefixMismatch(
                f"a prefix of {max(prefix.lengths.values())} slots", f"at most {self.max_tokens}, as of prompts",
                "prune it, or raise max_tokens",
            )  # fmt: skip
        device, dtype = self.base.device, self.base.dtype
        sites = {site: tensors.map(lambda t: t.detach().to(device, dtype)) for site, tensors in prefix.sites.items()}
        gates = [tensors.gate.pooling for tensors in sites.values() if tensors.gate is not None]
        return Resident(sites, prefix.position_offset, "prompt" in gates)

    def check(self) -> None:
        """Raise `AssertionError` unless rows, sequences, cache and bank agree; for tests, after every step."""
        self.cache.check()
        self.bank.check()
        assert self.cache.used == len(self.rows) <= self.options.max_running
        for row, sequence in enumerate(self.rows):
            assert sequence.row == row and self._known[sequence.id] is sequence
            held = sequence.read + max(len(sequence.written) - 1, 0)
            assert self.cache.texts[row] == held, f"row {row} holds {self.cache.texts[row]} tokens, not {held}"
            assert (sequence.left == 0 and bool(sequence.written)) == (row < self.writing)
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting) and all(sequence.row < 0 for sequence in waiting)
        assert len(self._known) == len(waiting) + len(self.rows)
