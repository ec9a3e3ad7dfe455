"""How pieces are told: the objects of OpenAI's completions and chats, whole or as chunks of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from typing_extensions import NotRequired, TypedDict

from foreword.server.completions import Piece, Shown
from foreword.server.text import Codec

__all__ = [
    "ChatAnswer", "ChatFormat", "CompletionAnswer", "CompletionFormat", "ErrorAnswer", "Format", "Head", "Usage",
    "usage_of",
]  # fmt: skip

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class ErrorObject(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """The body of every answer that is an error."""

    error: ErrorObject


class Usage(TypedDict):
    """Counted tokens: prompts once each, and all that was generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Head(TypedDict):
    """What every object of an answer begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: NotRequired[Usage | None]


class CompletionLogprobs(TypedDict):
    """Log-probabilities in the format of completions, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class CompletionAnswer(Head):
    """The answer of `/v1/completions`, or a chunk of it."""

    object: str
    choices: list[CompletionChoice]


class TopLogprob(TypedDict):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that was chosen, and what else was likely."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities in the format of chats."""

    content: list[TokenLogprob]
    refusal: None


class ChatMessage(TypedDict):
    """What the assistant says; in a chunk, what is new of it."""

    role: NotRequired[str]
    content: NotRequired[str | None]
    refusal: NotRequired[None]


class ChatChoice(TypedDict):
    """One answer: `message` if it is whole, `delta` in a chunk."""

    index: int
    message: NotRequired[ChatMessage]
    delta: NotRequired[ChatMessage]
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatAnswer(Head):
    """The answer of `/v1/chat/completions`, or a chunk of it."""

    object: str
    choices: list[ChatChoice]


class Format(Protocol):
    """How an API tells pieces."""

    def chunks(self, piece: Piece) -> list[Any]:
        """The chunks of a stream that tell a piece."""
        ...

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> Any:
        """The answer that tells all sequences, each as one piece."""
        ...

    def usage_chunk(self, usage: Usage) -> Any:
        """The last chunk of a stream, where it is asked for."""
        ...


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Usage with its sum.

    >>> usage_of(3, 4)["total_tokens"]
    7
    """
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }  # fmt: skip


class CompletionFormat:
    """`/v1/completions`. `echoes` are the prompts that come first, where they are asked for."""

    def __init__(self, codec: Codec, head: Head, logprobs: bool, usage: bool, echoes: Sequence[str] = ()) -> None:
        self._codec, self._head, self._logprobs, self._usage, self._echoes = codec, head, logprobs, usage, echoes
        self._begun: set[int] = set()

    def chunks(self, piece: Piece) -> list[CompletionAnswer]:
        first = piece.sequence not in self._begun
        self._begun.add(piece.sequence)
        return [self._answer([self._choice(piece, first)])]

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> CompletionAnswer:
        return self._answer([self._choice(piece, True) for piece in pieces], usage)

    def usage_chunk(self, usage: Usage) -> CompletionAnswer:
        return self._answer([], usage)

    def _answer(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionAnswer:
        answer: CompletionAnswer = {**self._head, "object": "text_completion", "choices": choices}
        if usage is not None or self._usage:
            answer["usage"] = usage
        return answer

    def _choice(self, piece: Piece, first: bool) -> CompletionChoice:
        echo = self._echoes[piece.sequence] if self._echoes and first else ""
        return {
            "index": piece.sequence, "text": echo + piece.text, "finish_reason": piece.finish_reason,
            "logprobs": self._of(piece.shown) if self._logprobs else None,
        }  # fmt: skip

    def _of(self, shown: Sequence[Shown]) -> CompletionLogprobs:
        names = [self._codec.piece(each.token.id)[0] for each in shown]
        chosen = [_finite(each.token.logprob) for each in shown]
        tops = []
        for name, logprob, each in zip(names, chosen, shown, strict=True):
            top = {self._codec.piece(token)[0]: _finite(value) for token, value in each.token.alternatives}
            tops.append({**top, name: logprob})
        offsets = [each.offset for each in shown]
        return {"tokens": names, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}


class ChatFormat:
    """`/v1/chat/completions`."""

    def __init__(self, codec: Codec, head: Head, logprobs: bool, usage: bool) -> None:
        self._codec, self._head, self._logprobs, self._usage = codec, head, logprobs, usage
        self._begun: set[int] = set()

    def chunks(self, piece: Piece) -> list[ChatAnswer]:
        chunks = []
        if piece.sequence not in self._begun:
            self._begun.add(piece.sequence)
            chunks.append(self._chunk(piece.sequence, {"role": "assistant", "content": ""}))
        if piece.text or piece.shown or piece.finish_reason is None:
            chunks.append(self._chunk(piece.sequence, {"content": piece.text}, self._of(piece.shown)))
        if piece.finish_reason is not None:
            chunks.append(self._chunk(piece.sequence, {}, None, piece.finish_reason))
        return chunks

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ChatAnswer:
        choices: list[ChatChoice] = [
            {
                "index": piece.sequence, "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._of(piece.shown), "finish_reason": piece.finish_reason,
            }
            for piece in pieces
        ]  # fmt: skip
        return self._answer("chat.completion", choices, usage)

    def usage_chunk(self, usage: Usage) -> ChatAnswer:
        return self._answer("chat.completion.chunk", [], usage)

    def _answer(self, kind: str, choices: list[ChatChoice], usage: Usage | None = None) -> ChatAnswer:
        answer: ChatAnswer = {**self._head, "object": kind, "choices": choices}
        if usage is not None or self._usage:
            answer["usage"] = usage
        return answer

    def _chunk(
        self, index: int, delta: ChatMessage, logprobs: ChatLogprobs | None = None, reason: str | None = None
    ) -> ChatAnswer:
        choice: ChatChoice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._answer("chat.completion.chunk", [choice])

    def _of(self, shown: Sequence[Shown]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        content: list[TokenLogprob] = [
            {
                **self._top(each.token.id, each.token.logprob),
                "top_logprobs": [self._top(*pair) for pair in each.token.alternatives],
            }
            for each in shown
        ]
        return {"content": content, "refusal": None}

    def _top(self, token: int, logprob: float | None) -> TopLogprob:
        text, raw = self._codec.piece(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float | None) -> float:
    return _LEAST_LOGPROB if logprob is None else max(logprob, _LEAST_LOGPROB)
