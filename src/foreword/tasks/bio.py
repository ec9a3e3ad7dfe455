"""BIO tags: B- begins an entity, I- goes on with it, O is outside (Ramshaw & Marcus 1995, W95-0107)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from foreword.tasks.rows import Unusable

__all__ = ["bio_labels", "check_tags", "entity_types", "to_bio"]

_PREFIXES = {"B": "B", "I": "I", "E": "E", "L": "E", "S": "S", "U": "S"}


def to_bio(tags: Sequence[str]) -> tuple[str, ...]:
    """The tags of a sentence as BIO, whichever of IOB1, BIO, BIOES and BILUO they are; `Unusable` for any other tag.

    An entity goes on where an inner tag follows one of the same type, and a new one begins everywhere else, as in
    seqeval's default mode: an I- without a B- becomes a B-.

    >>> to_bio(["I-LOC", "I-LOC", "B-LOC", "O", "U-PER", "B-ORG", "L-ORG"])
    ('B-LOC', 'I-LOC', 'B-LOC', 'O', 'B-PER', 'B-ORG', 'I-ORG')
    """
    result: list[str] = []
    before = ("O", "")  # prefix and type of the tag before
    for number, tag in enumerate(tags, start=1):
        prefix, _, kind = tag.partition("-")
        if tag == "O":
            before = ("O", "")
            result.append("O")
            continue
        if prefix not in _PREFIXES or not kind:
            raise Unusable(f"tag {tag!r} of word {number} is not BIO (O, B-type or I-type)")
        goes_on = _PREFIXES[prefix] in "IE" and before[0] in "BI" and before[1] == kind
        result.append(("I-" if goes_on else "B-") + kind)
        before = (_PREFIXES[prefix], kind)
    return tuple(result)


def bio_labels(types: Iterable[str]) -> tuple[str, ...]:
    """All tags of some entity types, in their order.

    >>> bio_labels(["LOC", "PER"])
    ('O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER')
    """
    return ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))


def entity_types(labels: Iterable[str]) -> tuple[str, ...]:
    """The entity types of BIO tags, in their order, once for each entity that begins.

    >>> entity_types(["O", "B-LOC", "I-LOC", "B-PER"])
    ('LOC', 'PER')
    """
    return tuple(label[2:] for label in labels if label.startswith("B-"))


def check_tags(words: Sequence[str], tags: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """The tags as BIO; `Unusable` unless there is one for every word and each is one of the labels."""
    if len(words) != len(tags):
        raise Unusable(f"{len(words)} words and {len(tags)} tags")
    result = to_bio(tags)
    for number, tag in enumerate(result, start=1):
        if tag not in labels:
            known = ", ".join(entity_types(labels))
            raise Unusable(f"unknown tag {tags[number - 1]!r} of word {number} (known types: {known})")
    return result
