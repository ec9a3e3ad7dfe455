"""Virtual tokens: trained vectors in the place of word embeddings, before the prompt or between prompt and completion.

A virtual token has an id of its own behind the vocabulary, so that batches, masks, positions, caches and the limits of
length treat it as any token; only the embedding layer knows that its vector is a trained one. Unlike a prefix it uses
up a position of the context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from foreword.base import BaseModel
from foreword.errors import ConfigError, UnsupportedModel
from foreword.init import DEFAULT_TEXT, DEFAULT_WORDS
from foreword.methods.tuning import Tuning, sublayers
from foreword.prefix import Site

__all__ = ["Extended", "Vectors", "VirtualTokens", "start_vectors", "vocabulary", "word_vectors"]


class Extended(BaseModel):
    """A view of a base model that reads more tokens with every prompt: `front` before it, `back` behind it.

    A start token stays the first of all: it is the attention sink.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> Extended(BaseModel(LlamaForCausalLM(LlamaConfig(**sizes))), front=[6], back=[7]).extended([1, 2, 3])
    [6, 1, 2, 3, 7]
    """

    def __init__(self, base: BaseModel, front: Sequence[int] = (), back: Sequence[int] = ()) -> None:
        # All that a base model is stays one and the same, the attachment too.
        self.__dict__.update(base.__dict__)
        self.front, self.back = list(front), list(back)

    def extended(self, ids: Sequence[int]) -> list[int]:
        """Token ids of a prompt with the tokens that go with it."""
        tokenizer = self._tokenizer
        start = tokenizer is not None and tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        return [*ids[:start], *self.front, *ids[start:], *self.back]

    def encode_prompt(self, prompt: str) -> list[int]:
        return self.extended(super().encode_prompt(prompt))

    def encode(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        ids, targets = super().encode(prompt, completion)
        # Of a decoder the prompt came by `encode_prompt` and is extended already.
        return (ids if self.family.kind == "decoder" else self.extended(ids)), targets


class Vectors(nn.Module):
    """Vectors `[length, embedding]` that are themselves the parameter."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self) -> Tensor:
        return self.vectors


class VirtualTokens(Tuning):
    """Virtual tokens whose vectors `[length, embedding]` a module makes, `front` of the prompt or at its `back`.

    With `deep`, vectors `[layers - 1, length, hidden]`, zero to begin with, are added to what enters every layer but
    the first at these tokens, so that their activations are free in all layers. Sources: Prefix-Tuning, arXiv
    2101.00190, sections 7.2 and 7.3; Lester et al. 2021, arXiv 2104.08691.
    """

    def __init__(
        self, base: BaseModel, vectors: nn.Module, length: int, place: str = "front", deep: bool = False
    ) -> None:
        if place == "back" and base.family.kind != "decoder":
            raise UnsupportedModel(
                f"tokens between prompt and completion of {base.name!r}, a {base.family.kind}", "a decoder",
                "put them in front",
            )  # fmt: skip
        limit = base.max_tokens
        if limit is not None and length >= limit:
            raise ConfigError(
                f"{length} virtual tokens", f"fewer than {limit}, the context length of {base.name!r}", "choose fewer"
            )
        self.base, self.vectors, self.length = base, vectors.to(base.device), length
        first = word_vectors(base).weight.shape[0]
        self.ids = list(range(first, first + length))
        self.view = Extended(base, **{place: self.ids})
        self.layers = [module for _, module in sublayers(base).layers["decoder"]][1:] if deep else []
        self.deltas: nn.Parameter | None = None
        if deep:
            hidden = base.hidden_sizes[Site("decoder", 0)]  # embeddings may be narrower
            self.deltas = nn.Parameter(torch.zeros(len(self.layers), length, hidden, device=base.device))
        self._virtual: Tensor | None = None  # of the running pass: the number of each virtual token, else -1

    @contextlib.contextmanager
    def applied(self) -> Iterator[BaseModel]:
        weight = word_vectors(self.base).weight
        # Stacks may have modules of their own around one tied weight.
        embeddings = [m for m in self.base.model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
        with contextlib.ExitStack() as stack:
            for module in embeddings:
                stack.callback(module.register_forward_pre_hook(self._hide).remove)
                stack.callback(module.register_forward_hook(self._replace).remove)
            for number, layer in enumerate(self.layers):
                hook = self._adding(number)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield self.view

    def parameters(self) -> list[nn.Parameter]:
        return [*self.vectors.parameters(), *([] if self.deltas is None else [self.deltas])]

    def tensors(self) -> dict[str, Tensor]:
        with torch.no_grad():
            named = {"vectors": self.vectors().detach()}
        return named if self.deltas is None else {**named, "layers": self.deltas.detach()}

    def finish(self) -> None:
        """Keep the vectors, not what made them."""
        with torch.no_grad():
            self.vectors = Vectors(self.vectors().clone()).requires_grad_(False)

    def _hide(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The embedding layer is asked for token 0 in the place of virtual ones."""
        ids: Tensor = args[0]
        virtual = ids >= self.ids[0]
        self._virtual = torch.where(virtual, ids - self.ids[0], -1) if bool(virtual.any()) else None
        return (ids.masked_fill(virtual, 0), *args[1:])

    def _replace(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output if self._virtual is None else _placed(output, self._virtual, self.vectors(), add=False)

    def _adding(self, number: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._virtual is None or self.deltas is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = _placed(hidden, self._virtual, self.deltas[number], add=True)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook


def _placed(hidden: Tensor, virtual: Tensor, vectors: Tensor, add: bool) -> Tensor:
    """`hidden` `[batch, tokens, hidden]` with vectors put, or added, where `virtual` `[batch, tokens]` numbers one."""
    there = virtual >= 0
    chosen = vectors[virtual[there]]
    # Summed before rounding, in the precision of what is trained.
    chosen = chosen + hidden[there] if add else chosen
    return hidden.index_put((there,), chosen.to(hidden.dtype))


def word_vectors(base: BaseModel) -> nn.Embedding:
    """The model's layer of word embeddings; `UnsupportedModel` for a model without one."""
    module = base.model.get_input_embeddings()
    if not isinstance(module, nn.Embedding):
        raise UnsupportedModel(
            f"{base.name!r} without a table of word embeddings", "a model that reads tokens",
            "choose another base model or another method",
        )  # fmt: skip
    return module


def vocabulary(base: BaseModel) -> list[int]:
    """The ids of all ordinary tokens: those the tokenizer knows and the model has, but no special ones."""
    tokenizer = base.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = min(len(tokenizer), word_vectors(base).weight.shape[0])
    return [token for token in range(known) if token not in special]


@torch.no_grad()
def start_vectors(base: BaseModel, length: int, init: str, text: str, seed: int) -> Tensor:
    """Vectors `[length, embedding]`, float32, to begin with: of a text's tokens, of words, of drawn tokens, or drawn.

    `text` and `words` repeat until there are enough; `random` has the mean and spread of the word embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    embed, tokenizer = word_vectors(base), base.tokenizer
    ordinary = vocabulary(base)
    if init == "random":
        known = embed(torch.tensor(ordinary, device=base.device)).float().cpu()
        drawn = torch.randn(length, known.shape[1], generator=generator)
        return (known.mean(0) + known.std(0, correction=0) * drawn).to(base.device)
    if init == "vocab":
        ids = [ordinary[place] for place in torch.randint(len(ordinary), (length,), generator=generator).tolist()]
    else:
        written = text or DEFAULT_TEXT if init == "text" else " " + (text or DEFAULT_WORDS)
        found: list[int] = tokenizer(written, add_special_tokens=False)["input_ids"]
        ids = list(islice(cycle(found), length))
    return embed(torch.tensor(ids, device=base.device)).float().clone()
