"""Generated text as it grows: pieces that are safe to show, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

__all__ = ["Streamer", "cut_at"]


class Streamer(BaseStreamer):
    """Hands over text as soon as its characters are whole and cannot begin a stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, row: int, stop: Sequence[str], on_text: Callable[[int, str], None]
    ) -> None:
        self.tokenizer, self.row, self.stop, self.on_text = tokenizer, row, stop, on_text
        self.ids: list[int] = []
        self.printed = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        self._hand_over(last=False)

    def end(self) -> None:
        self._hand_over(last=True)

    def _hand_over(self, last: bool) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:  # a character whose bytes are not all there yet
            return
        whole = cut_at(text, self.stop)
        held = 0 if last else max((len(mark) for mark in self.stop), default=1) - 1
        ready = len(whole) if len(whole) < len(text) else len(text) - held
        if ready > self.printed:
            self.on_text(self.row, whole[self.printed : ready])
            self.printed = ready


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string.

    >>> cut_at("one line\\nand more", ["\\n", "."])
    'one line'
    """
    ends = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text
