"""The trails data set: what its card promises about records, references, splits and variety."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

FOLDER = files("foreword") / "datasets" / "trails"
SIZES = {"train": 160, "dev": 40, "test": 40}
FIELDS = (
    "name", "region", "length", "ascent", "difficulty", "surface", "start",
    "duration", "season", "sight", "dogs", "transport", "refreshment",
)  # fmt: skip


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


SPLITS = {split: rows(split) for split in SIZES}
RECORDS = [record for records in SPLITS.values() for record in records]
REFERENCES = [reference for record in RECORDS for reference in record["references"]]
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


def card_row(first_cell: str) -> list[str]:
    """The cells after the first, of the card's table row that begins with `first_cell` in code quotes."""
    (line,) = re.findall(rf"^\| `{first_cell}` \|(.*)\|$", CARD, flags=re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


def states(text: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value.lower())}(?!\w)", text.lower()) is not None


def ngrams(text: str, order: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[start:] for start in range(order)), strict=False))


@pytest.mark.parametrize("split", SIZES)
def test_split_has_its_size_and_ids_in_order(split: str):
    assert [record["id"] for record in SPLITS[split]] == [f"{split}-{n:03d}" for n in range(1, SIZES[split] + 1)]


@pytest.mark.parametrize("split", SIZES)
def test_file_is_clean_utf8_with_one_record_per_line(split: str):
    text = (FOLDER / f"{split}.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("}\n") and "\r" not in text and "\ufffd" not in text
    assert all(character.isprintable() or character == "\n" for character in text)
    assert text.count("\n") == SIZES[split]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["id"])
def test_record_is_well_formed(record: dict[str, Any]):
    assert list(record) == ["id", "fields", "references"]
    fields = record["fields"]
    assert 3 <= len(fields) <= 8 and "name" in fields
    assert list(fields) == [field for field in FIELDS if field in fields]
    first, second = record["references"]
    assert first != second
    for text in [*fields.values(), first, second]:
        assert isinstance(text, str) and text and text == " ".join(text.split())
    assert first[-1] in ".!?" and second[-1] in ".!?"
    assert not any(re.search(r"\b(\w+) \1\b", text) for text in (first, second))


def test_references_state_the_values():
    missing = [
        (record["id"], field)
        for record in RECORDS
        for reference in record["references"]
        for field, value in record["fields"].items()
        if not states(reference, value)
    ]
    assert missing == []


@pytest.mark.parametrize("split", SIZES)
def test_numbers_of_fields_are_spread_evenly(split: str):
    counts = Counter(len(record["fields"]) for record in SPLITS[split])
    assert set(counts) == set(range(3, 9))
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("field", ["name", "region"])
def test_names_and_regions_are_in_one_split_only(field: str):
    values = [record["fields"][field].lower() for record in RECORDS if field in record["fields"]]
    assert len(values) == len(set(values))


def test_references_are_of_readable_length():
    lengths = sorted(len(reference.split()) for reference in REFERENCES)
    assert lengths[0] >= 8 and lengths[-1] <= 60
    assert 22 <= sum(lengths) / len(lengths) <= 35


def test_references_are_varied():
    openings = {ngram[0] for ngram in (ngrams(reference, 3) for reference in REFERENCES)}
    assert len(openings) / len(REFERENCES) > 0.95
    pairs = [pair for reference in REFERENCES for pair in ngrams(reference, 2)]
    assert len(set(pairs)) / len(pairs) > 0.65
    vocabulary = {word for reference in REFERENCES for word in re.findall(r"[a-z']+", reference.lower())}
    assert len(vocabulary) > 2000
    assert {len(re.findall(r"[.!?](?=\s|$)", reference)) for reference in REFERENCES} >= {1, 2, 3}
    names_first = [
        reference.startswith(record["fields"]["name"]) for record in RECORDS for reference in record["references"]
    ]
    assert sum(names_first) / len(names_first) < 0.25


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["id"])
def test_the_two_references_order_the_facts_differently(record: dict[str, Any]):
    values = [value.lower() for value in record["fields"].values()]
    first, second = (sorted(values, key=reference.lower().find) for reference in record["references"])
    assert first != second


def test_no_reference_repeats_another():
    """No two references, of one record or of two, share more than half of their word triples."""
    triples = [set(ngrams(reference, 3)) for reference in REFERENCES]
    for index, one in enumerate(triples):
        for other in triples[:index]:
            assert len(one & other) <= 0.5 * min(len(one), len(other)), " ".join(map(str, one & other))


@pytest.mark.parametrize("field", FIELDS)
def test_card_counts_the_fields(field: str):
    values = [record["fields"][field] for record in RECORDS if field in record["fields"]]
    _, example, count, distinct = card_row(field)
    assert example in values
    assert (int(count), int(distinct)) == (len(values), len(set(values)))


@pytest.mark.parametrize("split", SIZES)
def test_card_counts_the_splits(split: str):
    lengths = [len(reference.split()) for record in SPLITS[split] for reference in record["references"]]
    fields = [len(record["fields"]) for record in SPLITS[split]]
    assert card_row(split) == [
        str(SIZES[split]),
        str(len(lengths)),
        str(sum(lengths)),
        f"{sum(lengths) / len(lengths):.1f} ({min(lengths)} to {max(lengths)})",
        f"{sum(fields) / len(fields):.1f}",
    ]


def test_card_names_the_licence():
    assert "CC0 1.0" in CARD
    assert "To the extent possible under law" in CARD
    assert "https://creativecommons.org/publicdomain/zero/1.0/" in CARD
