"""How a prefix is born: from a text, from words, from the vocabulary, at random, or from another prefix.

All but `random` take keys and values that the model itself gives to tokens, so that training starts inside the
region that the model's attention knows. `docs/initialisation.md` has the measurements behind the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foreword.errors import ConfigError, PrefixMismatch
from foreword.prefix import Prefix, Site, Sites, SiteTensors

if TYPE_CHECKING:
    from foreword.base import BaseModel

__all__ = ["DEFAULT_TEXT", "DEFAULT_WORDS", "INITS", "new_prefix"]

DEFAULT_TEXT = "Write the text that belongs to the following input, fluently and with all of its facts."
DEFAULT_WORDS = "the of and to in is that for it with as on by this be at from are or an was have not they but"

# What `random` takes the model's statistics from.
_SAMPLE = (
    "The train to the coast leaves at half past nine from the second platform, and it is rarely late.",
    "Water boils at a lower temperature in the mountains because the air presses on it with less weight.",
    "She asked whether the report was finished; he said that two of the five tables were still missing.",
    "name : Harbour Museum | kind : museum | town : Lindau | opened : 1931 | entry : free on Sundays",
    "To make the dough, mix 500 g of flour with a pinch of salt, then add the yeast and lukewarm water.",
    "In 1869 the committee met three times, yet no decision about the new bridge was written down.",
)


def new_prefix(
    base: BaseModel,
    length: int = 10,
    init: str = "text",
    *,
    text: str | None = None,
    seed: int = 0,
    source: Prefix | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Prefix:
    """A new prefix of `length` slots at every site of `base`; its keys and values are float32, on the CPU.

    * `text`: the keys and values of the first `length` tokens of `text`, an instruction, after the start token
      where the tokenizer has one; a shorter text is repeated. Slot 0 is the first token, the model's attention
      sink. In rotary families the tokens are run at positions -length to -1: the prefix then equals the
      instruction in the context, exactly. Where positions are learned there are none below 0, so the tokens
      are run at 0 to length-1, which the text that comes after has as well; where they are relative, the slots
      have no position. An encoder reads the text as its input; of an encoder-decoder the encoder and cross
      stacks get what the text gives as the encoder's input, the decoder stack what it gives as its output so far.
    * `words`: the same with single words, those in `text` or else frequent ones: the paper's initialisation (to
      which `MLPPrefix` fits its MLP).
    * `vocab`: the same with random tokens that are not special.
    * `random`: normal, with the mean and standard deviation that each channel of each head has over the tokens
      of a few sentences, or over those of the model inputs `inputs` `[batch, ...]`. The only one for models
      that read no text, which need `inputs`.
    * `prefix`: the slots of `source`, cut to `length` or filled up with those that `text` gives.

    Raises `ConfigError`, or `PrefixMismatch` for a `source` of other geometry. Source: Prefix-Tuning, arXiv
    2101.00190, section 7.4 and figure 5.

    >>> import transformers
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> from foreword.base import BaseModel
    >>> base = BaseModel(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    >>> prefix = new_prefix(base, 3, "random", inputs={"input_ids": torch.tensor([[1, 2, 3, 4, 5]])})
    >>> prefix.length, prefix.sites[Site("decoder", 0)].keys.shape
    (3, torch.Size([2, 3, 4]))
    """
    _check_length(base, length)
    if init not in INITS:
        raise ConfigError(f"init {init!r}", f"one of {', '.join(INITS)}", "choose one of them")
    if text is not None and not text.strip():
        raise ConfigError("an empty text to start from", "at least one word", "leave it out or write one")
    if (init == "prefix") != (source is not None):
        raise ConfigError(
            f"init {init!r} {'without' if source is None else 'with'} a source prefix",
            "a source with init 'prefix', and with no other", "pass both or none",
        )  # fmt: skip
    needs_text = init in _IDS or (source is not None and min(source.lengths.values(), default=0) < length)
    if needs_text and not _reads_text(base):
        raise ConfigError(
            f"init {init!r} for {base.name!r}, which reads no text", "'random' with inputs",
            "pass init='random' and inputs, such as pixel_values of a few images",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    if init == "random":
        sites = _random(base, length, generator, inputs)
    elif source is not None:
        sites = _from_prefix(base, length, source, text)
    else:
        sites = _run(base, _IDS[init](base, length, text, generator))
    metadata = {"init": init, "text": _said(init, text), "seed": seed}
    offset = 0 if source is None else source.position_offset
    return Prefix(sites, base.name, base.fingerprint, offset, {k: v for k, v in metadata.items() if v is not None})


def _said(init: str, text: str | None) -> str | None:
    """The text that the slots come from, None where they come from no text."""
    defaults = {"text": DEFAULT_TEXT, "words": DEFAULT_WORDS, "prefix": None}
    return text or defaults[init] if init in defaults else None


def _check_length(base: BaseModel, length: int) -> None:
    limit = base.max_tokens
    if length < 1:
        raise ConfigError(f"prefix length {length}", "at least 1", "choose a length such as 10")
    if limit is not None and length > limit:
        raise ConfigError(
            f"prefix length {length}", f"at most {limit}, the context length of {base.name!r}", "choose a shorter one"
        )


def _reads_text(base: BaseModel) -> bool:
    return bool(base.model.main_input_name == "input_ids")


def _text_ids(base: BaseModel, length: int, text: str | None, _: torch.Generator) -> list[int]:
    """The first `length` tokens of a text, which is repeated, without its start, until there are enough."""
    return _fill(base, length, _encode(base, text or DEFAULT_TEXT))


def _words_ids(base: BaseModel, length: int, text: str | None, _: torch.Generator) -> list[int]:
    """The tokens of words, each as it is within a sentence."""
    words = (text or DEFAULT_WORDS).split()
    return _fill(base, length, list(chain.from_iterable(_encode(base, f" {word}") for word in words)))


def _vocab_ids(base: BaseModel, length: int, _: str | None, generator: torch.Generator) -> list[int]:
    tokenizer = base.tokenizer
    known = min(len(tokenizer), base.model.config.vocab_size)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = [token for token in range(known) if token not in special]
    drawn = torch.randint(len(ordinary), (length,), generator=generator)
    return _fill(base, length, [ordinary[place] for place in drawn.tolist()])


_IDS: dict[str, Callable[[Any, int, str | None, torch.Generator], list[int]]] = {
    "text": _text_ids,
    "words": _words_ids,
    "vocab": _vocab_ids,
}
INITS: tuple[str, ...] = (*_IDS, "random", "prefix")


def _encode(base: BaseModel, text: str) -> list[int]:
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _fill(base: BaseModel, length: int, ids: list[int]) -> list[int]:
    """`length` tokens: those that the tokenizer begins every text with, then `ids`, again and again."""
    if not ids:
        raise ConfigError("a text without tokens to start from", "at least one token", "write another text")
    whole = base.tokenizer("x")["input_ids"]
    special = set(base.tokenizer.all_special_ids)
    start = next((place for place, token in enumerate(whole) if token not in special), len(whole))
    return [*whole[:start], *islice(cycle(ids), length)][:length]


def _run(base: BaseModel, ids: list[int]) -> Sites:
    """The keys and values that the model gives these tokens, one slot each."""
    tokens = torch.tensor([ids], device=base.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if base.family.positions == "rotary":
        inputs["positions"] = torch.arange(-len(ids), 0, device=base.device)[None]
    if base.family.kind == "encoder-decoder":
        begin = base.model.config.decoder_start_token_id
        text = [token for token in ids if token not in base.tokenizer.all_special_ids]
        inputs["decoder_input_ids"] = tokens.new_tensor([[begin, *islice(cycle(text or ids), len(ids) - 1)]])
    recorded = base.record(**inputs)
    first = {site: [part[0].float().cpu().clone() for part in recorded[site]] for site in base.geometry}
    return {site: SiteTensors(keys, values) for site, (keys, values) in first.items()}


def _random(base: BaseModel, length: int, generator: torch.Generator, inputs: Mapping[str, Tensor] | None) -> Sites:
    """Normal slots with the statistics of the model's own keys and values, `[kv_heads, prefix, dim]`."""
    seen: dict[Site, tuple[list[Tensor], list[Tensor]]] = {site: ([], []) for site in base.geometry}
    for given in [inputs] if inputs is not None else _sample_inputs(base):
        for site, parts in base.record(**given).items():
            for kept, part in zip(seen[site], parts, strict=True):
                # The first token is the attention sink: its keys and values are unlike all others.
                kept.append(part[:, :, 1:].transpose(0, 1).flatten(1, 2).float().cpu())

    def draw(kept: list[Tensor]) -> Tensor:
        all_tokens = torch.cat(kept, dim=1)
        mean, deviation = all_tokens.mean(1, keepdim=True), all_tokens.std(1, keepdim=True, correction=0)
        return mean + deviation * torch.randn(len(mean), length, mean.shape[2], generator=generator)

    return {site: SiteTensors(draw(keys), draw(values)) for site, (keys, values) in seen.items()}


def _sample_inputs(base: BaseModel) -> list[dict[str, Tensor]]:
    """The sample sentences as model inputs, one by one, so that no padding gets into the statistics."""
    if not _reads_text(base):
        raise ConfigError(
            f"init 'random' without inputs for {base.name!r}, which reads no text", "inputs",
            "pass inputs, such as pixel_values of a few images",
        )  # fmt: skip
    limit = base.max_tokens or 10**9
    batches = []
    for sentence in _SAMPLE:
        ids = torch.tensor([base.tokenizer(sentence)["input_ids"][:limit]], device=base.device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if base.family.kind == "encoder-decoder":
            start = ids.new_full((1, 1), base.model.config.decoder_start_token_id)
            given["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], dim=1)
        batches.append(given)
    return batches


def _from_prefix(base: BaseModel, length: int, source: Prefix, text: str | None) -> Sites:
    if source.geometry != base.geometry:
        raise PrefixMismatch(
            f"a source prefix for {source.base_name!r} of other geometry than {base.name!r}", "the same geometry",
            "choose a prefix of this base model or another init",
        )  # fmt: skip
    shortest = min(source.lengths.values())
    filler = _run(base, _text_ids(base, length, text, torch.Generator())) if shortest < length else source.sites
    return {site: _joined(source.sites[site], filler[site], length) for site in base.geometry}


def _joined(first: SiteTensors, filler: SiteTensors, length: int) -> SiteTensors:
    """The first `length` slots of a site, filled up with those of the filler that come after."""

    def join(start: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([start[:, :length].detach().float().cpu(), rest[:, start.shape[1] : length]], dim=1)

    named = {"keys": join(first.keys, filler.keys), "values": join(first.values, filler.values)}
    if first.log_mass is not None:
        named["log_mass"] = join(first.log_mass[None], torch.zeros(1, length))[0]  # new slots have mass 1
    if first.gate is not None:
        weight = first.gate.weight
        named["gate_weight"] = join(weight[None], weight.new_zeros(1, len(weight), length, device="cpu"))[0]
    return first.with_named(named)
