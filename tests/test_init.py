"""How prefixes are born: the laws of each kind on tiny models of every family, and what is refused."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from foreword.base import BaseModel
from foreword.errors import ConfigError, PrefixMismatch
from foreword.init import INITS, new_prefix
from foreword.prefix import Prefix, Site, SiteShape, SiteTensors
from tiny import TINY, tiny_inputs, tiny_model
from tiny import tiny_base as new_tiny_base

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = "Aromi is a pub by the river that serves fast food."
READERS = tuple(name for name in TINY if name not in ("vit", "whisper"))
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "phi3", "gpt_oss", "deepseek_v3")


@functools.cache
def tiny_base(name: str) -> BaseModel:
    """One base of each family for all tests: none of them changes it."""
    return new_tiny_base(name)


def with_start(base: BaseModel) -> BaseModel:
    """The base with a tokenizer that begins every text with its start token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    plain = base.tokenizer
    copied = PreTrainedTokenizerFast(
        tokenizer_object=type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str()),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    copied.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", copied.bos_token_id)]
    )
    return BaseModel(base.model, copied, base.name)


def assert_same(one: Prefix, other: Prefix) -> None:
    assert list(one.sites) == list(other.sites)
    for site, tensors in one.sites.items():
        assert torch.equal(tensors.keys, other.sites[site].keys)
        assert torch.equal(tensors.values, other.sites[site].values)


@pytest.mark.parametrize("init", ["text", "words", "vocab", "random"])
@pytest.mark.parametrize("name", READERS)
def test_every_kind_on_every_family_that_reads_text(name: str, init: str) -> None:
    base = tiny_base(name)
    prefix = new_prefix(base, 5, init, seed=3)
    assert prefix.geometry == base.geometry
    assert set(prefix.lengths.values()) == {5}
    assert (prefix.base_name, prefix.fingerprint, prefix.position_offset) == (base.name, base.fingerprint, 0)
    assert prefix.metadata["init"] == init and prefix.metadata["seed"] == 3
    for tensors in prefix.sites.values():
        assert tensors.keys.dtype == tensors.values.dtype == torch.float32
        assert bool(tensors.keys.isfinite().all()) and bool(tensors.values.isfinite().all())
        assert bool((tensors.keys.std(1) > 0).any())
    inputs = tiny_inputs(name)
    plain, prefixed = (base.logits(**inputs, prefixes=p) for p in (None, prefix))
    assert bool(prefixed.isfinite().all()) and not torch.equal(plain, prefixed)


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("start", [False, True])
def test_text_in_a_rotary_family_is_the_instruction_in_the_context(name: str, start: bool) -> None:
    base = with_start(tiny_base(name)) if start else tiny_base(name)
    ids = base.encode_prompt(TEXT)[:6]
    assert (ids[0] == base.tokenizer.bos_token_id) is start
    prompt = torch.randint(3, 300, (1, 4), generator=torch.Generator().manual_seed(0))
    whole = torch.cat([torch.tensor([ids]), prompt], dim=1)
    expected = base.logits(whole)[:, len(ids) :]  # 10 tokens: sliding windows of 8 cut the oldest from the last two
    got = base.logits(prompt, prefixes=new_prefix(base, 6, text=TEXT))
    inside = 4 if name not in ("mistral", "gemma2", "gemma3_text", "gpt_oss") else 2
    torch.testing.assert_close(got[:, :inside], expected[:, :inside], rtol=1e-4, atol=1e-4)


def test_text_with_learned_positions_has_those_of_the_text_itself() -> None:
    base = tiny_base("gpt2")
    prefix = new_prefix(base, 6, text=TEXT)
    recorded = base.record(torch.tensor([base.encode_prompt(TEXT)[:6]]))
    for site, (keys, values) in recorded.items():
        torch.testing.assert_close(prefix.sites[site].keys, keys[0])
        torch.testing.assert_close(prefix.sites[site].values, values[0])


@pytest.mark.parametrize("start", [False, True])
def test_a_short_text_is_repeated_without_its_start(start: bool) -> None:
    base = with_start(tiny_base("llama")) if start else tiny_base("llama")
    ids = base.encode_prompt("pub")
    body = ids[1:] if start else ids
    repeated = (ids + body * 12)[:12]
    recorded = base.record(torch.tensor([repeated]), positions=torch.arange(-12, 0)[None])
    prefix = new_prefix(base, 12, text="pub")
    site = Site("decoder", 1)
    torch.testing.assert_close(prefix.sites[site].keys, recorded[site][0][0])


@pytest.mark.parametrize("name", ["bart", "t5", "t5-odd", "pegasus", "mbart"])
def test_encoder_decoder_stacks_read_their_own_side(name: str) -> None:
    base = tiny_base(name)
    prefix = new_prefix(base, 5, text=TEXT)
    ids = base.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    start = base.model.config.decoder_start_token_id
    recorded = base.record(torch.tensor([ids[:5]]), decoder_input_ids=torch.tensor([[start, *ids[:4]]]))
    assert {site.stack for site in prefix.sites} == {"encoder", "decoder", "cross"}
    for site, (keys, values) in recorded.items():
        torch.testing.assert_close(prefix.sites[site].keys, keys[0])
        torch.testing.assert_close(prefix.sites[site].values, values[0])


@pytest.mark.parametrize("init", ["vocab", "random"])
def test_seeded_kinds_repeat_with_the_seed_and_differ_without(init: str) -> None:
    base = tiny_base("llama")
    first, again, other = (new_prefix(base, 5, init, seed=seed) for seed in (1, 1, 2))
    assert_same(first, again)
    site = Site("decoder", 0)
    assert not torch.equal(first.sites[site].values, other.sites[site].values)


def test_random_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    new_prefix(tiny_base("gpt2"), 5, "random")
    assert torch.equal(torch.get_rng_state(), state)


def test_random_has_the_models_own_statistics() -> None:
    base = tiny_base("llama")
    inputs = tiny_inputs("llama", batch=4, tokens=30)
    prefix = new_prefix(base, 64, "random", inputs=inputs)
    many = [new_prefix(base, 64, "random", inputs=inputs, seed=seed) for seed in range(30)]
    for site, parts in base.record(**inputs).items():
        for place, part in enumerate(parts):
            drawn = torch.cat([(p.sites[site].keys, p.sites[site].values)[place] for p in many], dim=1)
            own = part[:, :, 1:].transpose(0, 1).flatten(1, 2)
            deviation = own.std(1)
            assert bool(((drawn.mean(1) - own.mean(1)).abs() < 0.15 * deviation).all())
            assert bool(((drawn.std(1) / deviation - 1).abs() < 0.15).all())
    assert prefix.length == 64


def test_vocab_draws_no_special_token(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    seen: list[torch.Tensor] = []
    record: Callable[..., Any] = base.record

    def watched(input_ids: torch.Tensor, **inputs: Any) -> Any:
        seen.append(input_ids)
        return record(input_ids, **inputs)

    monkeypatch.setattr(base, "record", watched)
    for seed in range(5):
        new_prefix(base, 60, "vocab", seed=seed)
    ids = torch.cat(seen)
    assert not set(ids.flatten().tolist()) & set(base.tokenizer.all_special_ids)
    assert len(set(ids.flatten().tolist())) > 100


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_models_that_read_no_text_take_random_with_inputs(name: str) -> None:
    base = tiny_base(name)
    prefix = new_prefix(base, 3, "random", inputs=tiny_inputs(name))
    assert prefix.geometry == base.geometry
    assert new_prefix(base, 2, "prefix", source=prefix).length == 2
    for init in ("text", "words", "vocab"):
        with pytest.raises(ConfigError, match="reads no text"):
            new_prefix(base, 3, init)
    with pytest.raises(ConfigError, match="without inputs"):
        new_prefix(base, 3, "random")
    with pytest.raises(ConfigError, match="reads no text"):
        new_prefix(base, 4, "prefix", source=prefix)


def test_from_a_prefix_cuts_and_fills() -> None:
    base = tiny_base("llama")
    source = new_prefix(base, 6, "random")
    source.position_offset = 2
    shorter, same, longer = (new_prefix(base, n, "prefix", source=source, text=TEXT) for n in (4, 6, 9))
    text = new_prefix(base, 9, text=TEXT)
    assert_same(same, source)
    assert longer.position_offset == 2
    for site, tensors in source.sites.items():
        assert torch.equal(shorter.sites[site].keys, tensors.keys[:, :4])
        assert torch.equal(longer.sites[site].keys[:, :6], tensors.keys)
        assert torch.equal(longer.sites[site].values[:, 6:], text.sites[site].values[:, 6:])
    longer.sites[Site("decoder", 0)].keys.zero_()
    assert bool(source.sites[Site("decoder", 0)].keys.any())


def test_from_a_prefix_keeps_masses_and_uneven_lengths() -> None:
    base = tiny_base("llama")
    source = new_prefix(base, 6, "random")
    first, second = source.sites
    source.sites[first] = source.sites[first]._replace(log_mass=torch.full((6,), -1.0))
    source.sites[second] = source.sites[second].map(lambda t: t[:, :2])
    grown = new_prefix(base, 8, "prefix", source=source)
    assert set(grown.lengths.values()) == {8}
    assert grown.sites[first].log_mass is not None
    assert grown.sites[first].log_mass.tolist() == [-1.0] * 6 + [0.0] * 2  # type: ignore[union-attr]
    assert grown.sites[second].log_mass is None


def test_a_source_of_other_geometry_is_refused() -> None:
    source = new_prefix(tiny_base("qwen3"), 3)
    with pytest.raises(PrefixMismatch, match="other geometry than 'tiny-llama'"):
        new_prefix(tiny_base("llama"), 3, "prefix", source=source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "prefix length 0; expected at least 1"),
        ({"length": -3}, "prefix length -3; expected at least 1"),
        ({"length": 65}, "prefix length 65; expected at most 64"),
        ({"init": "zeros"}, "init 'zeros'; expected one of text, words, vocab, random, prefix"),
        ({"text": " "}, "an empty text"),
        ({"init": "prefix"}, "init 'prefix' without a source"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        new_prefix(tiny_base("llama"), **options)
    assert "\n" not in str(caught.value)


def test_a_source_with_another_kind_is_refused() -> None:
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match="with a source prefix"):
        new_prefix(base, 3, "text", source=new_prefix(base, 3))


@pytest.mark.parametrize("init", [init for init in INITS if init != "prefix"])
def test_without_a_tokenizer(init: str) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        new_prefix(BaseModel(tiny_model("llama")), 3, init)


def test_longest_prefix_fits() -> None:
    base = tiny_base("gpt2")
    prefix = new_prefix(base, 64, text=TEXT)
    assert prefix.length == 64


def test_prefix_new_passes_the_options_on() -> None:
    base = tiny_base("llama")
    assert_same(Prefix.new(base, 4, "text", text=TEXT), new_prefix(base, 4, text=TEXT))
    shape = SiteShape(*next(iter(base.geometry.values())))
    assert isinstance(next(iter(Prefix.new(base, 4).sites.values())), SiteTensors)
    assert Prefix.new(base, 4).geometry[Site("decoder", 0)] == shape
