"""Prompts that people write: an instruction, or an instruction and solved examples in the context.

Source: Brown et al. 2020, arXiv 2005.14165, section 2 (zero-shot and few-shot).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from foreword.base import BaseModel
from foreword.errors import DataError
from foreword.init import DEFAULT_TEXT
from foreword.methods.config import TEMPLATES, MethodConfig
from foreword.tasks import Example, Labelled

__all__ = ["Prompting"]

_E = TypeVar("_E", Example, Labelled)


class Prompting:
    """How a prompt is written for a base model: by the template (none: as it is), with `shots` before it.

    Shots are drawn from the training examples by the seed. As many of them are written as the context has room for,
    beside the prompt and what comes after; those farthest from the prompt are left out first. Of a task with `labels`
    the right candidate is what is written for a shot.
    """

    def __init__(
        self,
        base: BaseModel,
        config: MethodConfig,
        train: Sequence[Example | Labelled],
        instruction: str,
        labels: Sequence[str] = (),
    ) -> None:
        self.base, self.instruction, self.labels = base, instruction or DEFAULT_TEXT, tuple(labels)
        self.template = config.options["template"]
        count = min(config.options.get("shots", 0), len(train))
        self.shots = random.Random(f"foreword shots {config.seed}").sample(list(train), count)

    def write(self, prompt: str, room: int = 0) -> str:
        """What the model reads for a prompt, with `room` tokens left free for what it writes."""
        for dropped in range(len(self.shots) + 1):
            written = self._write(prompt, self.shots[dropped:])
            if self._fits(written, room):
                return written
        return written  # too long by itself: the base model says so

    def fit_example(self, example: _E) -> _E:
        """The example with its prompt as the model reads it, with room for whatever may follow."""
        return example._replace(prompt=self.write(example.prompt, self.room(example)))

    def count_shots(self, prompt: str, room: int) -> int:
        """How many shots the context has room for."""
        counts = range(len(self.shots), -1, -1)
        return next((n for n in counts if self._fits(self._write(prompt, self.shots[len(self.shots) - n :]), room)), 0)

    def room(self, example: Example | Labelled) -> int:
        """Tokens of the longest that may follow an example's prompt."""
        texts = example.candidates if isinstance(example, Labelled) else (example.completion,)
        return max(len(self.base.encode("", text)[1]) for text in texts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the text that is stored for a task."""
        parts = [
            self.instruction if self.template != "none" else "",
            *(part for shot in self.shots for part in (shot.prompt, self._answer(shot))),
        ]
        return sum(len(part.encode()) for part in parts)

    def _answer(self, example: Example | Labelled) -> str:
        """The right answer to an example, as it is written."""
        if isinstance(example, Labelled):
            return example.candidates[self.labels.index(example.label)]
        return example.completion

    def _fits(self, written: str, room: int) -> bool:
        limit = self.base.max_tokens
        return limit is None or len(self.base.encode_prompt(written)) + room * self._joint <= limit

    @property
    def _joint(self) -> bool:
        return self.base.family.kind == "decoder"

    def _write(self, prompt: str, shots: Sequence[Example | Labelled]) -> str:
        if self.template == "none":
            return prompt
        # An instruction that comes first stands once, before the first shot.
        before, first, asked = TEMPLATES[self.template].rpartition("{instruction}\n\n")
        solved = "".join(f"{self._filled(asked, shot.prompt)}{self._answer(shot)}\n\n" for shot in shots)
        written = self._filled(before + first) + solved + self._filled(asked, prompt)
        return self._chat(written) if self.template == "chat" else written

    def _filled(self, part: str, prompt: str = "") -> str:
        return part.format(instruction=self.instruction, prompt=prompt)

    def _chat(self, written: str) -> str:
        """A user's turn of the tokenizer's chat template, up to where the answer begins."""
        tokenizer = self.base.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(
                f"template 'chat' for {self.base.name!r}, whose tokenizer has no chat template", "one that has",
                "choose another template",
            )  # fmt: skip
        turn = [{"role": "user", "content": written.strip()}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        # Many templates write the start token, which `encode_prompt` adds where the tokenizer does.
        twice = self.base.encode_prompt(text)[:2] == [tokenizer.bos_token_id] * 2
        return text.removeprefix(tokenizer.bos_token) if twice else text
