"""How official scripts split text into tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from foreword.optional import optional

__all__ = ["one_line", "ptb_tokens", "split_at_punctuation", "thirteen_a_tokens"]

_CACHED_TEXTS = 50_000  # the references of a test set are asked for by several metrics and for several systems


def one_line(text: str) -> str:
    r"""The text with every run of white space as one space.

    >>> one_line(" a pub\n by  the river ")
    'a pub by the river'
    """
    return " ".join(text.split())


def split_at_punctuation(text: str) -> str:
    """Lower-cased text with spaces around all that is no letter or digit, as the WebNLG 2017 script makes it.

    Source: `metrics.py` of https://gitlab.com/webnlg/webnlg-baseline; text that was split stays as it is.

    >>> split_at_punctuation("Aarhus_Airport's runway (2,702 m)")
    "aarhus_airport ' s runway ( 2 , 702 m )"
    """
    return one_line(" ".join(re.split(r"(\W)", text))).lower()


@lru_cache(maxsize=_CACHED_TEXTS)
def thirteen_a_tokens(text: str) -> tuple[str, ...]:
    """The lower-cased tokens of mteval-v13a, by sacrebleu."""
    return tuple(_thirteen_a()(text.lower()).split())


@lru_cache(maxsize=1)
def _thirteen_a() -> Callable[[str], str]:
    tokenizer: Callable[[str], str] = optional("sacrebleu.tokenizers.tokenizer_13a", "eval").Tokenizer13a()
    return tokenizer


# ---- Penn Treebank tokens, as the COCO caption scripts make them

_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ABBREVIATIONS = {
    "a.m", "co", "col", "corp", "dr", "e.g", "etc", "ft", "gen", "gov", "i.e", "inc", "jr", "ltd", "mr", "mrs", "ms",
    "mt", "no", "p.m", "prof", "rep", "rev", "sen", "sgt", "sr", "st", "u.k", "u.s", "vs",
}  # fmt: skip
_WRITTEN_OTHERWISE = [
    ("£", " # "), ("’", "'"), ("‘", "'"), ("“", " "), ("”", " "), ('"', " "),
    ("–", " -- "), ("—", " -- "), ("…", " ... "),
]  # fmt: skip
_QUOTE = re.compile(r"(?<![A-Za-z0-9])'|'(?=[\s.,!?;:]|$)")
_FULL_STOP = re.compile(r"([^\s.]+(?:\.[^\s.]+)*)\.(?=(\s+|$|[)\"'!?,;:]))")
_LETTERS_WITH_STOPS = re.compile(r"[A-Za-z](\.[A-Za-z])*")
_DASH_BEHIND = re.compile(r"(\w)-(?=\s|$|[.,!?;:])")
_DASH_BEFORE = re.compile(r"(?<=\s)-(?=\w)(?!\d)")


@lru_cache(maxsize=_CACHED_TEXTS)
def ptb_tokens(text: str) -> str:
    """Lower-cased Penn Treebank tokens without punctuation, in place of COCO's Java tokenizer.

    nltk's Treebank tokenizer, with what Stanford's PTBTokenizer 3.4.1 does otherwise to quotes, dashes, pounds and
    full stops; of the texts of the E2E test set one in a thousand gets other tokens.

    >>> ptb_tokens("The Mill (a pub) isn't cheap: £20-25.")
    "the mill -lrb- a pub -rrb- is n't cheap # 20-25"
    """
    for character, written in _WRITTEN_OTHERWISE:
        text = text.replace(character, written)
    text = _QUOTE.sub(" ", text)
    text = _FULL_STOP.sub(_apart_from_abbreviations, text)
    text = _DASH_BEFORE.sub(" - ", _DASH_BEHIND.sub(r"\1 - ", text))
    tokens = (_BRACKETS.get(token, token.lower()) for token in _treebank().tokenize(text))
    return " ".join(token for token in tokens if token not in _PUNCTUATION)


def _apart_from_abbreviations(match: re.Match[str]) -> str:
    """A full stop as a token of its own, unless it belongs to an abbreviation within the text or to letters."""
    word, last = match[1], match[2] == ""
    if _LETTERS_WITH_STOPS.fullmatch(word) or (word.lower() in _ABBREVIATIONS and not last):
        return match[0]
    return f"{word} . "


@lru_cache(maxsize=1)
def _treebank() -> Any:
    return optional("nltk.tokenize.destructive", "eval").NLTKWordTokenizer()
