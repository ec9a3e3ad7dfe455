"""Text to token ids and back: prompts, chats, single tokens, and text that grows token by token.

What a `Detokenizer` hands over, put together, is what decoding all tokens at once gives; what `StopStrings` hands over
is what `foreword.streaming.cut_at` leaves of the whole text. Nothing that is handed over is ever taken back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from foreword.base import BaseModel
from foreword.errors import DataError

__all__ = ["Codec", "Detokenizer", "StopStrings"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN = "\ufffd"
_MOST_BYTES = 4  # of a character in UTF-8


class _Decode(Protocol):
    def __call__(self, ids: Sequence[int]) -> str: ...


class Codec:
    """The tokenizer of a base model, as a server needs it.

    >>> codec = Codec(base)  # doctest: +SKIP
    >>> codec.decode(codec.encode("A foreword."))  # doctest: +SKIP
    'A foreword.'
    """

    def __init__(self, base: BaseModel) -> None:
        self._base, self._tokenizer = base, base.tokenizer
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.vocabulary_size = base.model.get_input_embeddings().num_embeddings
        self._byte_ids = {
            token: bytes([int(match[1], 16)]) for name, token in vocabulary.items() if (match := _BYTE.fullmatch(name))
        }
        added = self._tokenizer.added_tokens_decoder
        special = {token for token, each in added.items() if each.special}
        self._textless = frozenset(special | (set(range(self.vocabulary_size)) - {*vocabulary.values(), *added}))
        self._anchor = self.encode("a", special=False)[-1:]
        self._anchor_text = self.decode(self._anchor)
        self.piece = lru_cache(maxsize=65536)(self._piece)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; with `special` as a prompt begins, for instance with a start token."""
        if special:
            return self._base.encode_prompt(text)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises `DataError` where the tokenizer has no chat template, or its template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            action = "use /v1/completions with the prompt as text"
            raise DataError("this model's tokenizer has no chat template", action=action)
        try:
            text: Any = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # what a template raises is its own affair
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise DataError(f"the chat template refuses these messages ({reason})") from error
        return self.encode(str(text), special=False)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; special tokens are left out unless they are asked for."""
        text: Any = self._tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return str(text)

    def detokenizer(self) -> Detokenizer:
        """A new one, for one sequence."""
        return Detokenizer(self.decode, frozenset(self._byte_ids), self._textless)

    def _piece(self, token: int) -> tuple[str, bytes]:
        """What a token is by itself: as text (`bytes:\\xe4` for a part of a character) and as bytes."""
        if token in self._byte_ids:
            raw = self._byte_ids[token]
        else:
            text = self.decode([*self._anchor, token], special=True)[len(self._anchor_text) :]
            if _UNKNOWN not in text:
                return text, text.encode()
            name: Any = self._tokenizer.convert_ids_to_tokens(token)
            alphabet = _byte_alphabet()
            if not all(character in alphabet for character in name):
                return text, text.encode()
            raw = bytes(alphabet[character] for character in name)
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + k): byte for k, byte in enumerate(others)}


class Detokenizer:
    """Text that grows by tokens; characters are handed over when all their bytes are there.

    `decode` gives the text of token ids. Tokens are decoded behind those of the piece before, since decoders treat the
    beginning of a text differently. `byte_ids` are tokens that stand for one byte: a row of them is decoded as one when
    it ends, because one wrong byte spoils the row. `skipped` have no text.

    >>> letters = Detokenizer(lambda ids: bytes(ids).decode("utf-8", "replace"))
    >>> letters.push(104), letters.push(0xC3), letters.push(0xA9), letters.flush()
    ('h', '', 'é', '')
    """

    def __init__(
        self, decode: _Decode, byte_ids: frozenset[int] = frozenset(), skipped: frozenset[int] = frozenset()
    ) -> None:
        self._decode, self._byte_ids, self._skipped = decode, byte_ids, skipped
        self._ids: list[int] = []
        self._read = 0  # the first of the ids are known as text; they are there for what comes after them
        self._known = ""

    def push(self, token: int) -> str:
        """One more token; the text that is whole now."""
        if token in self._skipped:
            return ""
        self._ids.append(token)
        if token in self._byte_ids:
            return ""
        text = self._decode(self._ids)
        if text.endswith(_UNKNOWN):
            return self._split(text)
        return self._hand_over(text, self._read)

    def flush(self) -> str:
        """The text that is left at the end, whole or not."""
        if len(self._ids) == self._read:
            return ""
        return self._hand_over(self._decode(self._ids), len(self._ids))

    def _hand_over(self, text: str, keep_from: int) -> str:
        new = text[len(self._known) :]
        if new:
            self._ids = self._ids[keep_from:]
            self._read, self._known = len(self._ids), self._decode(self._ids)
        return new

    def _split(self, text: str) -> str:
        """Hand over what comes before the last bytes, where more of them are wrong than could become a character.

        At a place between two characters the text is the sum of its parts, inside one it is not: the part of a
        character that is torn is itself an unknown one. So nothing that is still to come can change what is before.
        """
        if len(self._ids) - self._read <= _MOST_BYTES:
            return ""
        for place in range(len(self._ids) - 1, self._read, -1):
            before = self._decode(self._ids[:place])
            if before + self._decode(self._ids[place:]) == text:
                self._ids = self._ids[place:]
                new, self._read, self._known = before[len(self._known) :], 0, ""
                return new
        return ""


class StopStrings:
    """Text that grows, cut before the first stop string; what could become one is held back.

    `stopped` says whether one was found; everything after it is dropped.

    >>> ends = StopStrings(["END"])
    >>> ends.push("the E"), ends.push("ast "), ends.push("EN"), ends.push("D and"), ends.stopped
    ('the ', 'East ', '', '', True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self.stopped = tuple(stop), False
        self._firsts = frozenset(each[0] for each in stop)
        self._most = max(map(len, stop), default=1) - 1
        self._held = ""

    def push(self, piece: str) -> str:
        """More text; what can be shown of it and of what was held back."""
        if self.stopped:
            return ""
        text = self._held + piece
        end, begun = self._first(text), self._begun(text)
        if end is not None and (begun is None or end <= begun):
            self.stopped, self._held = True, ""
            return text[:end]
        # One that began earlier may still come true, and would cut earlier.
        ready = len(text) if begun is None else begun
        self._held = text[ready:]
        return text[:ready]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        end = self._first(held)
        if end is not None:
            self.stopped = True
            return held[:end]
        return held

    def _first(self, text: str) -> int | None:
        """Where the first whole stop string begins."""
        return min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=None)

    def _begun(self, text: str) -> int | None:
        """Where the first stop string begins that the text ends in the middle of."""
        for place in range(max(0, len(text) - self._most), len(text)):
            if text[place] not in self._firsts:
                continue
            rest = text[place:]
            if any(len(rest) < len(stop) and stop.startswith(rest) for stop in self._stop):
                return place
        return None
