"""The base model: scoring, generating, mixed rows, the bank, and its errors."""

from __future__ import annotations

import pytest
import torch

from foreword.attention import attach, attachment_of, detach, prefix_ids
from foreword.bank import Bank
from foreword.base import BaseModel
from foreword.errors import ConfigError, DataError, ModelNotFound, PrefixError, PrefixMismatch, UnsupportedModel
from foreword.fingerprint import fingerprint
from foreword.prefix import Prefix, SiteTensors
from tiny import save_tiny, tiny_base, tiny_model

PROMPTS = ["The foreword", "A prefix is a short", "name :"]


def random_prefix(base: BaseModel, length: int, seed: int = 0, position_offset: int = 0) -> Prefix:
    generator = torch.Generator().manual_seed(seed)
    sites = {
        site: SiteTensors(
            torch.randn(shape.kv_heads, length, shape.key_dim, generator=generator),
            torch.randn(shape.kv_heads, length, shape.value_dim, generator=generator),
        )
        for site, shape in base.geometry.items()
    }
    return Prefix(sites, base.name, base.fingerprint, position_offset)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss", "bart", "t5", "mbart"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_mixed_rows_generate_what_each_does_alone(name: str, options: dict[str, int]) -> None:
    base = tiny_base(name)
    prefixes = [random_prefix(base, 3), None, random_prefix(base, 5, seed=1)]
    together = base.generate(PROMPTS, prefixes, max_new_tokens=6, **options)
    alone = [
        base.generate([prompt], prefix, max_new_tokens=6, **options)[0]
        for prompt, prefix in zip(PROMPTS, prefixes, strict=True)
    ]
    assert together == alone
    assert len(base.attachment.bank) == 0


def test_streamed_pieces_make_the_whole_text() -> None:
    base = tiny_base("llama")
    prefix = random_prefix(base, 3)
    pieces: list[tuple[int, str]] = []
    streamed = base.generate(PROMPTS, prefix, max_new_tokens=12, on_text=lambda row, text: pieces.append((row, text)))
    assert ["".join(text for row, text in pieces if row == k) for k in range(3)] == streamed
    assert streamed == base.generate(PROMPTS, prefix, max_new_tokens=12)


def test_stop_strings_are_cut_off_streamed_or_not() -> None:
    base = tiny_base("llama")
    (whole,) = base.generate(PROMPTS[:1], max_new_tokens=12)
    stop = whole[3:5]
    (cut,) = base.generate(PROMPTS[:1], max_new_tokens=12, stop=[stop])
    pieces: list[str] = []
    base.generate(PROMPTS[:1], max_new_tokens=12, stop=[stop], on_text=lambda _, text: pieces.append(text))
    assert cut == whole[: whole.find(stop)] == "".join(pieces)


def test_sampling_is_seeded_and_leaves_the_global_generator_alone() -> None:
    base = tiny_base("llama")
    state = torch.get_rng_state()
    runs = [base.generate(PROMPTS, max_new_tokens=8, do_sample=True, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_scores_add_up_to_the_completion_loss(name: str) -> None:
    base = tiny_base(name)
    prefix = random_prefix(base, 3)
    completions = [" comes before the text", " block"]
    scores = base.score(PROMPTS[:2], completions, prefix)
    single = [base.score([p], [c], prefix)[0] for p, c in zip(PROMPTS, completions, strict=False)]
    batch = base.collate([base.encode(*pair) for pair in zip(PROMPTS, completions, strict=False)])
    loss, tokens = base.completion_loss(batch, prefix.sites)
    assert tokens == sum(score.tokens for score in scores)
    assert sum(score.nats for score in scores) == pytest.approx(loss.item(), rel=1e-5)
    assert [s.nats for s in scores] == pytest.approx([s.nats for s in single], rel=1e-5)


def test_the_completion_loss_is_that_of_transformers() -> None:
    base = tiny_base("llama")
    batch = base.collate([base.encode(PROMPTS[0], " comes"), base.encode(PROMPTS[1], " block of keys")])
    loss, tokens = base.completion_loss(batch, {})
    expected = base.model(**batch).loss
    assert loss.item() / tokens == pytest.approx(expected.item(), rel=1e-5)


def test_a_position_offset_moves_the_text() -> None:
    base = tiny_base("llama")
    native, shifted = random_prefix(base, 3), random_prefix(base, 3, position_offset=3)
    ids = torch.arange(3, 9)[None]
    moved = base.logits(ids, prefixes=native, position_ids=torch.arange(6)[None] + 3)
    assert torch.equal(base.logits(ids, prefixes=shifted), moved)
    both = base.logits(ids.repeat(2, 1), prefixes=[shifted, None])
    torch.testing.assert_close(both, torch.cat([moved, base.logits(ids)]))


def test_an_encoder_decoder_takes_no_offset() -> None:
    base = tiny_base("t5")
    with pytest.raises(PrefixMismatch, match="position offset 3"):
        base.generate(PROMPTS, random_prefix(base, 3, position_offset=3))


def test_the_bank_reuses_places_and_keeps_neighbours() -> None:
    base = tiny_base("llama")
    bank = Bank(base.geometry)
    prefixes = [random_prefix(base, length, seed=length) for length in (2, 5, 3)]
    for name, prefix in zip("abc", prefixes, strict=True):
        bank.add(name, prefix)
    before = [t.keys.clone() for t in bank.entry(bank.index("c")).values()]
    bank.remove("b")
    assert bank.add("d", prefixes[0]) == 2
    assert all(torch.equal(a, b.keys) for a, b in zip(before, bank.entry(bank.index("c")).values(), strict=True))
    with pytest.raises(PrefixError, match="no prefix named 'b'"):
        bank.index("b")
    with pytest.raises(PrefixError, match="'d' is already attached"):
        bank.add("d", prefixes[0])
    with pytest.raises(PrefixError, match="contain 7"):
        bank.call(torch.tensor([0, 7]))


def test_the_bank_keeps_what_it_was_given() -> None:
    base = tiny_base("llama")
    prefix = random_prefix(base, 3)
    bank = Bank(base.geometry)
    index = bank.add("a", prefix)
    site = next(iter(prefix.sites))
    before = bank.entry(index)[site].keys.clone()
    prefix.sites[site].keys.zero_()
    assert torch.equal(bank.entry(index)[site].keys, before)


def test_a_thousand_prefixes_stay_apart() -> None:
    base = tiny_base("llama")
    bank = base.attachment.bank
    for k in range(1000):
        bank.add(str(k), random_prefix(base, 1 + k % 4, seed=k))
    ids = torch.arange(3, 9)[None].repeat(3, 1)
    rows = [bank.index("3"), 0, bank.index("999")]
    mixed = base.model(ids, prefix_ids=torch.tensor(rows)).logits
    alone = [base.model(ids[:1], prefix_ids=torch.tensor([row])).logits for row in rows]
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-5, atol=1e-4)


def test_fingerprints_tell_weights_apart_and_not_dtypes_or_heads() -> None:
    model, same, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.k_proj.weight[0, 0] += 0.5
    assert fingerprint(model) == fingerprint(same.bfloat16()) == fingerprint(tiny_model("llama").model)
    assert fingerprint(model) != fingerprint(other)


def test_attach_by_name_and_detach() -> None:
    base = tiny_base("llama")
    prefix = random_prefix(base, 3)
    model = tiny_model("llama")
    ids = torch.arange(3, 9)[None]
    plain = model(ids).logits
    attach(model, {"a": prefix, "b": random_prefix(base, 2, seed=1)}, default="a")
    assert torch.equal(model(ids, prefix_ids=prefix_ids(model, [None])).logits, plain)
    torch.testing.assert_close(model(ids).logits, model(ids, prefix_ids=prefix_ids(model, ["a"])).logits)
    assert not torch.equal(model(ids, prefix_ids=prefix_ids(model, ["b"])).logits, model(ids).logits)
    detach(model)
    assert attachment_of(model) is None and torch.equal(model(ids).logits, plain)
    with pytest.raises(PrefixError, match="not attached"):
        prefix_ids(model, ["a"])


def test_errors_are_one_line_and_say_what_to_do() -> None:
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match="2 prefixes for 3 rows"):
        base.generate(PROMPTS, [None, None])
    with pytest.raises(DataError, match="64 tokens in all"):
        base.generate(PROMPTS, max_new_tokens=64)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        base.generate(["a", ""], max_new_tokens=2)
    with pytest.raises(ConfigError, match="3 prompts and 1 completions"):
        base.score(PROMPTS, ["x"])
    with pytest.raises(DataError, match="row 0 has .* tokens; expected at most 64"):
        base.score(["a"], ["many words " * 40])
    with pytest.raises(ConfigError, match="streaming with beams"):
        base.generate(PROMPTS, num_beams=2, on_text=lambda row, text: None)
    with pytest.raises(UnsupportedModel, match="generates nothing"):
        tiny_base("bert").generate(PROMPTS)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        BaseModel(tiny_model("llama")).generate(PROMPTS)
    with pytest.raises(ModelNotFound, match="cannot be loaded") as caught:
        BaseModel.load("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="dtype 'int3'"):
        BaseModel.load("smollm2-135m", dtype="int3")


def test_a_loaded_folder_is_the_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_model("llama")
    base = BaseModel.load(save_tiny("llama", tmp_path_factory.mktemp("model")), dtype="float32", device="cpu")
    ids = torch.arange(3, 9)[None]
    assert torch.equal(base.logits(ids), model(ids).logits)
    assert base.max_tokens == 64 and base.fingerprint == fingerprint(model)
