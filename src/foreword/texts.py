"""Texts and words as the token ids that an encoder reads: cut to a length, pairs marked, word pieces aligned."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor

from foreword.base import BaseModel, pad_rows
from foreword.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Text", "Words", "collate_texts", "encode_texts", "encode_words", "token_limit"]


class Text(NamedTuple):
    """Token ids of a text or a pair, and the segment of each where the model knows any; `cut` if it was longer."""

    ids: list[int]
    segments: list[int]
    cut: bool = False


class Words(NamedTuple):
    """Token ids of a sentence and the place of each word's first piece in it.

    A place is -1 for a word that has no piece (the tokenizer drops some characters) or that was cut off.
    """

    ids: list[int]
    places: list[int]
    cut: bool = False


def token_limit(base: BaseModel, max_tokens: int) -> int | None:
    """The longest text that is read: `max_tokens` (0: any) or what the model allows, None for no limit."""
    limits = [limit for limit in (max_tokens, base.max_tokens) if limit]
    return min(limits, default=None)


def encode_texts(base: BaseModel, texts: Sequence[tuple[str, ...]], max_tokens: int = 0) -> list[Text]:
    """Each text, or pair of texts, with the tokenizer's special tokens; of what is too long the longest text is cut."""
    segmented, limit = _knows_segments(base), token_limit(base, max_tokens)
    found: list[Text] = [Text([], [])] * len(texts)
    for parts in sorted({len(text) for text in texts}):
        if parts not in (1, 2):
            raise DataError(f"{parts} texts to be read together", "one, or a pair", "join them")
        rows = [row for row, text in enumerate(texts) if len(text) == parts]
        for row, text in zip(rows, _tokenized(base.tokenizer, [texts[row] for row in rows], None), strict=True):
            found[row] = text
        long = [row for row in rows if limit is not None and len(found[row].ids) > limit]
        for row, text in zip(long, _tokenized(base.tokenizer, [texts[row] for row in long], limit), strict=True):
            found[row] = text._replace(cut=True)
    return found if segmented else [text._replace(segments=[]) for text in found]


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, ...]], limit: int | None) -> list[Text]:
    if not texts:
        return []
    cut = {} if limit is None else {"truncation": "longest_first", "max_length": limit}
    encoded = tokenizer(*map(list, zip(*texts, strict=True)), **cut)
    segments = encoded.get("token_type_ids") or [[0] * len(ids) for ids in encoded["input_ids"]]
    return [Text(list(ids), list(marks)) for ids, marks in zip(encoded["input_ids"], segments, strict=True)]


def encode_words(base: BaseModel, sentences: Sequence[Sequence[str]], max_tokens: int = 0) -> list[Words]:
    """Each sentence as the running text of its words, which are tokenized one by one; the end of long ones is cut off.

    The pieces are those of the words with a space between, in every tokenizer that never joins words.
    """
    start, end = _around(base.tokenizer)
    limit = token_limit(base, max_tokens)
    room = None if limit is None else max(limit - len(start) - len(end), 0)
    written = [[word if first else f" {word}" for first, word in _numbered(words)] for words in sentences]
    different = sorted({word for words in written for word in words})
    pieces = dict(zip(different, _pieces(base.tokenizer, different), strict=True))
    found = []
    for words in written:
        ids: list[int] = []
        places = []
        for word in words:
            here = len(ids)
            seen = bool(pieces[word]) and (room is None or here < room)
            places.append(len(start) + here if seen else -1)
            ids += pieces[word]
        cut = room is not None and len(ids) > room
        found.append(Words([*start, *ids[:room], *end], places, cut))
    return found


def _numbered(words: Sequence[str]) -> list[tuple[bool, str]]:
    return [(number == 0, word) for number, word in enumerate(words)]


def _pieces(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> list[list[int]]:
    return cast("list[list[int]]", tokenizer(words, add_special_tokens=False)["input_ids"]) if words else []


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    whole = cast("list[int]", tokenizer("x")["input_ids"])
    special = set(tokenizer.all_special_ids)
    inside = [place for place, token in enumerate(whole) if token not in special]
    return (whole[: inside[0]], whole[inside[-1] + 1 :]) if inside else (whole, [])


def collate_texts(base: BaseModel, texts: Sequence[Text | Words]) -> dict[str, Tensor]:
    """Texts as one batch for an encoder, padded on the right, on the CPU."""
    batch = {
        "input_ids": pad_rows([text.ids for text in texts], base.tokenizer.pad_token_id),
        "attention_mask": pad_rows([[1] * len(text.ids) for text in texts], 0),
    }
    segments = [text.segments for text in texts if isinstance(text, Text) and text.segments]
    if len(segments) == len(texts):
        batch["token_type_ids"] = pad_rows(segments, 0)
    return batch


def _knows_segments(base: BaseModel) -> bool:
    known = "token_type_ids" in inspect.signature(type(base.model).forward).parameters
    return known and getattr(base.model.config, "type_vocab_size", 0) > 1
