"""Examples to batches: nothing lost, nothing twice, the same again, and what cannot be used is reported."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.data import encode_split, epoch_batches, micro_batches, ordered_batches, tight_batches
from foreword.errors import DataError
from foreword.tasks import Example, SkippedRow, Split
from tiny import tiny_base

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=300)


def split(*pairs: tuple[str, str]) -> Split:
    examples = [Example(f"x-{i}", prompt, text, (text,), 10 * i) for i, (prompt, text) in enumerate(pairs)]
    return Split("train", examples, [SkippedRow(5, "empty")], source="rows.jsonl")


@given(lengths, st.integers(1, 20), st.integers(0, 2**63), st.integers(0, 50))
def test_an_epoch_has_every_row_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths, size, seed, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // size)
    assert sum(len(batch) != size for batch in batches) <= 1
    assert batches == epoch_batches(lengths, size, seed, epoch)


@given(lengths, st.integers(1, 20))
def test_ordered_batches_begin_with_the_longest(lengths: list[int], size: int) -> None:
    rows = [row for batch in ordered_batches(lengths, size) for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)


@given(st.lists(st.integers(), unique=True, min_size=1, max_size=40), st.integers(0, 9), st.integers(1, 6))
def test_processes_share_a_batch(batch: list[int], size: int, processes: int) -> None:
    parts = [micro_batches(batch, size, process, processes) for process in range(processes)]
    assert sorted(row for part in parts for rows in part for row in rows) == sorted(batch)
    assert len({len(part) for part in parts}) == 1
    assert size == 0 or max(len(rows) for part in parts for rows in part) <= size
    assert any(part[-1] for part in parts)


def test_buckets_save_padding_and_epochs_differ() -> None:
    lengths = [10 + (37 * i) % 200 for i in range(1000)]
    batches = epoch_batches(lengths, 10, 0, 0)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.25 * sum(lengths)
    assert {frozenset(batch) for batch in batches}.isdisjoint(map(frozenset, epoch_batches(lengths, 10, 0, 1)))
    assert batches != epoch_batches(lengths, 10, 1, 0)
    means = [sum(lengths[row] for row in batch) for batch in batches]
    assert means != sorted(means)


def test_batches_are_the_same_everywhere() -> None:
    # Python promises the sequence of random.Random for a given seed; a run may move between machines.
    assert epoch_batches(range(1, 9), 3, seed=7, epoch=2) == [[0, 1, 2], [3, 4, 5], [7, 6]]


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_rows_too_long_are_reported(name: str) -> None:
    base = tiny_base(name)
    long = "many words " * 40
    rows = encode_split(base, split(("a\n", "b"), (long, "b"), ("c\n", long), ("", "d")))
    assert len(rows) == 1
    reported = {skipped.row: skipped.reason for skipped in rows.skipped}
    assert reported[5] == "empty"
    assert "longer than the model allows (64)" in reported[10]
    assert "longer than the model allows (64)" in reported[20]
    with pytest.raises(DataError, match=r"row 10 of rows\.jsonl: \d+ tokens are longer"):
        encode_split(base, split(("a\n", "b"), (long, "b")), strict=True)


def test_a_row_that_just_fits_is_used() -> None:
    base = tiny_base("llama")
    prompt, completion = "x" * 40, ""
    while sum(map(len, base.encode(prompt, completion))) < 64:
        completion += "q"
    assert len(encode_split(base, split((prompt, completion)))) == 1
    with pytest.raises(DataError, match=r"no usable row in rows[.]jsonl, 2 skipped"):
        encode_split(base, split((prompt, completion + "q")))


def test_progress_and_lengths() -> None:
    seen: list[tuple[int, int]] = []
    rows = encode_split(tiny_base("llama"), split(("a\n", "b"), ("cc\n", "dd")), progress=lambda *p: seen.append(p))
    assert seen == [(1, 2), (2, 2)]
    assert rows.lengths == [len(prompt) + len(completion) for prompt, completion in rows.encoded]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 20), st.integers(0, 30), st.integers(0, 4)
)  # fmt: skip
def test_tight_batches_cost_least(lengths: list[int], overhead: int, most_tokens: int, most_rows: int) -> None:
    """Against every way to cut the sorted rows."""

    def padded(batch: list[int]) -> int:
        return len(batch) * max(lengths[row] for row in batch)

    def allowed(batch: list[int]) -> bool:
        few = not most_rows or len(batch) <= most_rows
        return few and (not most_tokens or padded(batch) <= most_tokens or len(batch) == 1)

    found = tight_batches(lengths, overhead, most_tokens, most_rows)
    order = [row for batch in found for row in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    assert all(map(allowed, found))
    costs = []
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        places = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), len(order)]
        batches = [order[a:b] for a, b in itertools.pairwise(places)]
        if all(map(allowed, batches)):
            costs.append(sum(padded(batch) + overhead for batch in batches))
    assert sum(padded(batch) + overhead for batch in found) == min(costs)
