"""Edges of the core: autocast, half precision, second gradients, failures halfway, shared and copied models."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from foreword.attention import attach, attachment_of, detach, prefix_ids
from foreword.errors import ConfigError, DataError, PrefixError, UnsupportedModel
from foreword.kernels import Slots, attend
from foreword.prefix import SiteTensors
from test_base import PROMPTS, random_prefix
from tiny import tiny_base, tiny_inputs, tiny_model

IDS = torch.arange(3, 9)[None]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "t5", "bert", "deberta-v2"])
def test_a_prefix_trains_under_autocast(name: str) -> None:
    prefix = random_prefix(tiny_base(name), 3)
    gradients = []
    for enabled in (False, True):
        model = attach(tiny_model(name), prefix, trainable=True, check_fingerprint=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(**tiny_inputs(name))[0]
        output.float().pow(2).mean().backward()
        module = attachment_of(model).module
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("tokens", [3, 300])
def test_second_gradients_are_refused_not_wrong(tokens: int) -> None:
    query = torch.randn(1, 2, tokens, 4, requires_grad=True)
    slots = Slots(torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4), None)
    out = attend(query, torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4), slots, scaling=0.5)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_position_bias_gets_its_gradient_on_long_texts() -> None:
    query, key, value = (torch.randn(1, 2, 300, 4) for _ in range(3))
    slots = Slots(torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4), None)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        bias = torch.linspace(-1, 1, 300 * 300, dtype=dtype).view(1, 1, 300, 300).requires_grad_()
        cast = Slots(slots.keys.to(dtype), slots.values.to(dtype), None)
        out = attend(query.to(dtype), key.to(dtype), value.to(dtype), cast, scaling=0.5, position_bias=bias)
        gradients.append(torch.autograd.grad(out.pow(2).sum(), bias)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_padding_row_without_prefix_is_finite_in_float16() -> None:
    query, key = torch.full((1, 1, 2, 4), 5.0).half(), torch.full((1, 1, 2, 4), -5.0).half()
    mask = torch.tensor([[False, False], [False, True]])[None, None]
    slots = Slots(torch.zeros_like(key), torch.zeros_like(key), torch.full((1, 1, 1, 2), -math.inf).half())
    assert attend(query, key, torch.randn_like(key), slots, scaling=0.5, mask=mask).isfinite().all()


def test_a_prefix_that_cannot_be_added_leaves_the_bank_as_it_was() -> None:
    base = tiny_base("llama")
    bank = base.attachment.bank
    first, second, long = random_prefix(base, 3), random_prefix(base, 5, seed=1), random_prefix(base, 5, seed=2)
    site = list(long.sites)[-1]
    long.sites[site] = SiteTensors(torch.zeros(2, 5, 9), torch.zeros(2, 5, 8))
    bank.add("first", first)
    bank.add("second", second)
    bank.remove("first")
    with pytest.raises(RuntimeError):
        bank.add("long", long)
    ids = torch.tensor([bank.add("again", first), bank.index("second")])
    mixed = base.model(IDS.repeat(2, 1), prefix_ids=ids).logits
    alone = torch.cat([base.logits(IDS, prefixes=prefix) for prefix in (first, second)])
    torch.testing.assert_close(mixed, alone, rtol=1e-5, atol=1e-4)


def test_prefix_ids_of_another_batch_size_are_an_error() -> None:
    base = tiny_base("llama")
    with base.rows([random_prefix(base, 3), None], 2) as ids, pytest.raises(PrefixError, match="2 rows, 4 were given"):
        base.model(IDS.repeat(4, 1), prefix_ids=ids)


def test_an_offset_counts_from_the_positions_that_opt_takes_from_the_mask() -> None:
    base = tiny_base("opt")
    prefix = random_prefix(base, 3, position_offset=3)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS], dim=1)
    logits = base.logits(padded, (padded > 0).long(), prefixes=prefix)[:, 2:]
    torch.testing.assert_close(logits, base.logits(IDS, prefixes=prefix), rtol=1e-5, atol=1e-4)


def test_an_offset_counts_from_where_roberta_begins_also_for_embeddings() -> None:
    base = tiny_base("roberta")
    embeds = base.model.get_input_embeddings()(IDS)
    with base.rows(random_prefix(base, 3, position_offset=3), 1) as ids:
        logits = base.model(inputs_embeds=embeds, prefix_ids=ids).logits
        torch.testing.assert_close(logits, base.model(IDS, prefix_ids=ids).logits)


def test_an_offset_moves_positions_that_are_given_by_place() -> None:
    base = tiny_base("llama")
    with base.rows(random_prefix(base, 3, position_offset=3), 1) as ids:
        placed = base.model(IDS, torch.ones_like(IDS), torch.arange(6)[None], prefix_ids=ids).logits
        assert torch.equal(placed, base.model(IDS, torch.ones_like(IDS), prefix_ids=ids).logits)


def test_a_model_in_training_reads_no_prefix_where_0_says_so() -> None:
    base = tiny_base("llama")
    model = attach(tiny_model("llama"), random_prefix(base, 3), trainable=True, check_fingerprint=False)
    assert torch.equal(model(IDS, prefix_ids=prefix_ids(model, [None])).logits, base.logits(IDS))
    with pytest.raises(PrefixError, match="prefix_ids contain 1"):
        model(IDS.repeat(2, 1), prefix_ids=torch.tensor([1, 0]))


def test_a_prefix_with_an_offset_is_not_trained_without_it() -> None:
    model = tiny_model("llama")
    prefix = random_prefix(tiny_base("llama"), 3, position_offset=3)
    with pytest.raises(PrefixError, match="position offset 3 to train"):
        attach(model, prefix, trainable=True, check_fingerprint=False)
    assert attachment_of(model) is None


def test_models_that_share_a_configuration_object_are_not_attached_together() -> None:
    first = tiny_model("llama")
    second = type(first)(first.config)
    attach(first)
    with pytest.raises(UnsupportedModel, match="configuration object of an attached model"):
        attach(second)
    detach(first)
    assert attachment_of(attach(second)) is not None


def test_an_attached_model_is_not_copied() -> None:
    model = attach(tiny_model("llama"))
    with pytest.raises(PrefixError, match="cannot be copied"):
        copy.deepcopy(model)
    copy.deepcopy(detach(model))


def test_what_a_model_is_used_to_does_not_mix_into_generation() -> None:
    base = tiny_base("llama")
    texts = base.generate(PROMPTS, max_new_tokens=12)
    stored = base.model.generation_config
    stored.repetition_penalty, stored.no_repeat_ngram_size, stored.suppress_tokens = 5.0, 1, list(range(3, 200))
    assert base.generate(PROMPTS, max_new_tokens=12) == texts
    assert base.model.generation_config is stored


def test_the_decoder_starts_with_token_0_where_the_model_says_so() -> None:
    base = tiny_base("t5")
    texts = base.generate(PROMPTS, max_new_tokens=6)
    base.model.config.decoder_start_token_id, base.model.generation_config.decoder_start_token_id = None, 0
    assert base.generate(PROMPTS, max_new_tokens=6) == texts


@pytest.mark.parametrize(
    ("name", "prompt", "new", "offset"), [("bart", "The " * 100, 3, 0), ("bart", "The", 65, 0), ("gpt2", "The", 60, 9)]
)
def test_generation_past_the_table_of_positions_is_an_error(name: str, prompt: str, new: int, offset: int) -> None:
    base = tiny_base(name)
    with pytest.raises(DataError, match="tokens, .* new ones are asked"):
        base.generate([prompt], random_prefix(base, 3, position_offset=offset), max_new_tokens=new)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"stop": [""]},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "top_p": 2.0},
        {"do_sample": True, "top_k": -1},
    ],
)
def test_generation_options_that_mean_nothing_are_an_error(options: dict) -> None:
    with pytest.raises(ConfigError):
        tiny_base("llama").generate(PROMPTS, max_new_tokens=2, **options)


def test_the_error_of_a_prefix_that_cannot_be_added_comes_through() -> None:
    base = tiny_base("llama")
    prefix = random_prefix(base, 3)
    site = next(iter(prefix.sites))
    prefix.sites[site] = prefix.sites[site]._replace(log_mass=torch.zeros(2))
    with pytest.raises(RuntimeError, match="size"):
        base.logits(IDS, prefixes=prefix)
    assert len(base.attachment.bank) == 0


def test_a_change_of_attention_after_attaching_is_an_error() -> None:
    model = attach(tiny_model("llama"))
    model.set_attn_implementation("eager")
    with pytest.raises(PrefixError, match="attention of the attached model was changed to 'eager'"):
        model(IDS)


def test_deberta_without_prefix_is_itself_in_training_too() -> None:
    outputs = []
    for model in (tiny_model("deberta-v2"), attach(tiny_model("deberta-v2"))):
        torch.manual_seed(0)
        outputs.append(model.train()(**tiny_inputs("deberta-v2")).logits)
    assert torch.equal(*outputs)
