"""Choosing tokens: the likeliest of all rows at once, or row by row as each request says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from foreword.engine.request import Sampling, Token

__all__ = ["Chooser", "choose"]

_LIKELY = 1024  # tokens that are looked at before all are sorted


class Chooser:
    """What one request's choices depend on: its options, its generator, and the tokens that it has written."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.counts: Counter[int] = Counter()
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed % 2**63)

    def choose(self, logits: Tensor) -> Token:
        """The next token of one row's logits `[vocab]`, float32 on the CPU."""
        sampling = self.sampling
        raw = logits
        if sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias:
            logits = self._changed(logits)
        if sampling.temperature == 0:
            chosen = int(logits.argmax())
        else:
            chosen = int(torch.multinomial(self._chances(logits), 1, generator=self.generator))
        self.counts[chosen] += 1
        if sampling.logprobs is None:
            return Token(chosen)
        logprobs = raw.log_softmax(-1)
        best = logprobs.topk(min(sampling.logprobs, len(logprobs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Token(chosen, float(logprobs[chosen]), tuple(pairs))

    def _changed(self, logits: Tensor) -> Tensor:
        sampling = self.sampling
        changes = [(token, bias) for token, bias in sampling.logit_bias.items()]
        if sampling.presence_penalty or sampling.frequency_penalty:
            once, each = sampling.presence_penalty, sampling.frequency_penalty
            changes += [(token, -once - each * times) for token, times in self.counts.items()]
        tokens, amounts = torch.tensor([t for t, _ in changes]), torch.tensor([a for _, a in changes])
        return logits.index_add(0, tokens, amounts) if changes else logits

    def _chances(self, logits: Tensor) -> Tensor:
        """Probabilities after temperature, `top_k` and `top_p`: the fewest tokens that have `top_p` together."""
        sampling = self.sampling
        # A temperature near 0 would overflow what is not the likeliest; against the maximum nothing does.
        chances = ((logits - logits.max()).double() / sampling.temperature).softmax(-1)
        if 0 < sampling.top_k < len(chances):
            least = chances.topk(sampling.top_k).values[-1]
            chances = torch.where(chances >= least, chances, 0.0)
        if sampling.top_p < 1:
            chances = chances / chances.sum()
            ordered, order = chances.topk(min(_LIKELY, len(chances)))
            if float(ordered.sum()) < sampling.top_p:  # rarely: nearly all is among the first thousand
                ordered, order = chances.sort(descending=True)
            before = ordered.cumsum(0) - ordered
            chances = torch.zeros_like(chances).index_put_((order,), torch.where(before < sampling.top_p, ordered, 0.0))
        return chances


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Token | None]:
    """The next token of every row of logits `[rows, vocab]`; None for a row whose logits or chances are not finite.

    >>> [token.id for token in choose(torch.tensor([[0.0, 2.0, 1.0]]), [Chooser(Sampling())])]
    [1]
    """
    top, best = logits.max(-1)
    finite, likeliest = top.isfinite().tolist(), best.tolist()
    found: list[Token | None] = []
    for row, chooser in enumerate(choosers):
        if not finite[row]:
            found.append(None)
        elif chooser.sampling.plain:
            found.append(Token(likeliest[row]))
        else:
            try:
                found.append(chooser.choose(logits[row].float().cpu()))
            except RuntimeError:  # options of its own made its chances no chances
                found.append(None)
    return found
