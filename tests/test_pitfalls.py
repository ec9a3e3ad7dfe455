"""The fifteen ways in which prefixes on transformers' attention interface go silently wrong, one test or more each."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AttentionMaskInterface

import foreword.attention
from foreword.attention import attach, attachment_of, prefix_ids
from foreword.conform import check
from foreword.errors import UnsupportedModel
from foreword.kernels import Slots, attend
from foreword.parametrization import parametrize
from foreword.prefix import Prefix, SiteTensors, prefix_attention
from test_attach_transformers import random_prefix
from tiny import tiny_inputs, tiny_model

close = torch.testing.assert_close


def _passes(name: str, *lines: int) -> bool:
    return [line.status for line in check(tiny_model(name), lines=lines).lines] == ["pass"] * len(lines)


def _attention(heads: int = 4, kv_heads: int = 4, tokens: int = 5, keys: int = 5, slots: int = 3):
    """Random query, key, value and slots."""
    text = (torch.randn(2, heads, tokens, 8), torch.randn(2, kv_heads, keys, 8), torch.randn(2, kv_heads, keys, 8))
    return *text, Slots(torch.randn(2, kv_heads, slots, 8), torch.randn(2, kv_heads, slots, 8), None)


def _attached(name: str, **options: object):
    model = tiny_model(name, **options)
    return attach(model, {"a": random_prefix(model), "b": random_prefix(model, 2, 1)}, default="a")


def test_1_our_name_has_a_mask_function_so_padding_and_causality_are_kept():
    model = _attached("llama")
    assert model.config._attn_implementation in AttentionMaskInterface._global_mapping
    inputs = tiny_inputs("llama")
    want = model(**inputs).logits
    changed = inputs["input_ids"].clone()
    changed[:, -1] += 1
    close(model(changed).logits[:, :-1], want[:, :-1], rtol=1e-5, atol=1e-4)
    padded = {name: torch.nn.functional.pad(value, (0, 2)) for name, value in inputs.items()}
    close(model(**padded).logits[:, :-2], want, rtol=1e-5, atol=1e-4)
    assert _passes("llama", 3)


def test_2_a_causal_prefill_without_a_mask_keeps_the_last_tokens():
    query, key, value, slots = _attention()
    got = attend(query, key, value, slots, scaling=0.3, is_causal=True)
    causal = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    close(got, prefix_attention(query, key, value, *slots[:2], scaling=0.3, text_bias=causal))
    query, key, value, slots = _attention(tokens=5, keys=9)  # the tail of a static cache is empty
    got = attend(query, key, value, slots, scaling=0.3, is_causal=True)
    close(got, attend(query, key[:, :, :5], value[:, :, :5], slots, scaling=0.3, is_causal=True))


@pytest.mark.parametrize(("tokens", "keys", "is_causal"), [(1, 9, True), (1, 9, False), (5, 5, False)])
def test_3_no_mask_means_all_keys_when_decoding_and_in_both_directions(tokens: int, keys: int, is_causal: bool):
    query, key, value, slots = _attention(tokens=tokens, keys=keys)
    got = attend(query, key, value, slots, scaling=0.3, is_causal=is_causal)
    close(got, prefix_attention(query, key, value, *slots[:2], scaling=0.3))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_4_the_name_suggests_no_kernel_so_models_without_sdpa_take_it(name: str):
    model = _attached(name)
    implementation = model.config._attn_implementation
    assert not any(kernel in implementation for kernel in ("sdpa", "flash", "flex", "paged"))
    model(**tiny_inputs(name))


def test_5_a_model_that_does_not_call_us_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UnsupportedModel, match="bloom"):
        attach(tiny_model("bloom"))
    monkeypatch.setattr(foreword.attention, "adapter_of", lambda family: None)
    model = tiny_model("deberta-v2")
    with pytest.raises(UnsupportedModel, match=r"encoder\.0, encoder\.1"):
        attach(model)
    assert attachment_of(model) is None


def test_6_a_prefix_has_the_models_key_value_heads():
    query, key, value, slots = _attention(heads=4, kv_heads=2)
    got = attend(query, key, value, slots, scaling=0.3)
    wide = [tensor.repeat_interleave(2, 1) for tensor in (key, value, *slots[:2])]
    close(got, attend(query, wide[0], wide[1], Slots(wide[2], wide[3], None), scaling=0.3))
    assert {shape.kv_heads for shape in attachment_of(_attached("llama")).geometry.values()} == {2}


def test_7_softcap_bends_the_prefix_the_sink_counts_once_and_the_bias_is_the_texts():
    query, key, value, slots = _attention(tokens=1)
    joint_key, joint_value = torch.cat([slots.keys, key], 2), torch.cat([slots.values, value], 2)
    scores = query @ joint_key.transpose(2, 3) * 0.3
    capped = (2 * torch.tanh(scores / 2)).softmax(-1) @ joint_value
    close(attend(query, key, value, slots, scaling=0.3, softcap=2.0), capped)
    sinks = torch.randn(4)
    with_sink = torch.cat([scores, sinks[None, :, None, None].expand(2, 4, 1, 1)], -1).softmax(-1)[..., :-1]
    close(attend(query, key, value, slots, scaling=0.3, sinks=sinks), with_sink @ joint_value)
    bias = torch.randn(1, 4, 1, 5)
    biased = (scores + torch.nn.functional.pad(bias, (3, 0))).softmax(-1) @ joint_value
    close(attend(query, key, value, slots, scaling=0.3, position_bias=bias), biased)
    shapes = set(attachment_of(_attached("deepseek_v3")).geometry.values())
    assert {(shape.key_dim, shape.value_dim) for shape in shapes} == {(16, 12)}
    assert _passes("gpt_oss", 2)
    assert _passes("deepseek_v3", 2, 5)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "modernbert"])
def test_8_sliding_layers_see_the_prefix_from_everywhere(name: str):
    assert _passes(name, 9)


def test_9_a_half_precision_model_reads_a_copy_of_the_float32_prefix():
    model = tiny_model("llama").bfloat16()
    prefix = random_prefix(model)
    attach(model, prefix)
    bank = attachment_of(model).bank
    assert all(tensor.dtype == torch.float32 for site in prefix.sites.values() for tensor in site[:2])
    assert all(tensor.dtype == torch.bfloat16 for site in bank.entry(1).values() for tensor in site[:2])
    assert model(tiny_inputs("llama")["input_ids"]).logits.dtype == torch.bfloat16


def test_10_attention_weights_are_given_whole_or_not_at_all():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    prefix, inputs = random_prefix(model), tiny_inputs("llama")
    want = model(**inputs, output_attentions=True).attentions
    attach(model, {"a": prefix})
    none = model(**inputs, output_attentions=True, prefix_ids=prefix_ids(model, [None, None])).attentions
    assert all(torch.equal(got, weights) for got, weights in zip(none, want, strict=True))
    some = model(**inputs, output_attentions=True, prefix_ids=prefix_ids(model, ["a", "a"])).attentions
    assert all(weights is None for weights in some or ())


def test_11_dropout_in_training_is_the_models_own():
    model = _attached("llama", attention_dropout=0.5).train()
    ids = tiny_inputs("llama")["input_ids"]
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model(ids).logits)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["llama", "deberta-v2", "t5"])
def test_12_checkpointing_recomputes_with_the_prefix(name: str):
    assert _passes(name, 6)


@pytest.mark.parametrize("kind", ["direct", "mlp"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_12_a_reparametrization_trains_through_recomputed_layers(kind: str, reentrant: bool):
    """Reentrant checkpointing backs up layer by layer; leaves cut the reparametrization's graph off from that."""
    model = _attached("llama").requires_grad_(False).train()
    module = parametrize(random_prefix_of(model), kind)
    inputs = tiny_inputs("llama")["input_ids"]
    gradients = []
    for checkpointed in (False, True):
        module.zero_grad()
        if checkpointed:
            new = hasattr(model, "activation_checkpointing_enable")
            getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        sites = module()
        leaves = {site: tensors.map(lambda t: t.detach().requires_grad_()) for site, tensors in sites.items()}
        with attachment_of(model).bound(leaves):
            model(inputs, use_cache=False).logits.square().mean().backward()
        made = [tensor for site in sites.values() for tensor in site[:2]]
        torch.autograd.backward(made, [tensor.grad for site in leaves.values() for tensor in site[:2]])
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    for got, want in zip(gradients[1], gradients[0], strict=True):
        close(got, want)


def random_prefix_of(model) -> Prefix:
    """Noise for an attached model."""
    shapes = attachment_of(model).geometry
    sites = {site: SiteTensors(torch.randn(h, 4, k), torch.randn(h, 4, v)) for site, (h, k, v) in shapes.items()}
    return Prefix(sites, "", "")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracer
def test_13_a_traced_model_follows_prefix_ids():
    model, ids = _attached("llama"), tiny_inputs("llama")["input_ids"]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for owners in (["a", "b"], ["b", "a"], ["b", None], ["a", "a"]):
            named = prefix_ids(model, owners)
            close(compiled(ids, prefix_ids=named).logits, model(ids, prefix_ids=named).logits, rtol=1e-5, atol=1e-4)


def test_14_assisted_decoding_writes_what_greedy_decoding_writes():
    model, inputs = _attached("llama"), tiny_inputs("llama", batch=1)
    options = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(**inputs, **options)
    for assistant in (tiny_model("llama", seed=1), _attached("llama")):
        assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), want)
    named = prefix_ids(model, ["b"])
    want = model.generate(**inputs, **options, prefix_ids=named)
    got = model.generate(**inputs, **options, prefix_ids=named, assistant_model=_attached("llama"))
    assert torch.equal(got, want)


def test_15_other_threads_read_the_prefix_too():
    """A worker thread runs the model, or the backward: what a forward pass reads is no thread-local state."""
    model, ids = _attached("llama"), tiny_inputs("llama")["input_ids"]
    want = model(ids, prefix_ids=prefix_ids(model, ["b", None])).logits
    sites = random_prefix_of(model).sites
    with attachment_of(model).bound(sites):
        bound = model(ids).logits
        results: dict[str, torch.Tensor] = {}
        worker = threading.Thread(target=lambda: results.update(bound=model(ids).logits.detach()))
        worker.start()
        worker.join()
    worker = threading.Thread(
        target=lambda: results.update(named=model(ids, prefix_ids=prefix_ids(model, ["b", None])).logits.detach())
    )
    worker.start()
    worker.join()
    assert torch.equal(results["bound"], bound.detach())
    assert torch.equal(results["named"], want.detach())


def test_15_a_backward_in_another_thread_recomputes_with_the_prefix():
    model = _attached("deberta-v2").requires_grad_(False).train()
    new = hasattr(model, "activation_checkpointing_enable")
    sites = random_prefix_of(model).sites
    inputs, gradients = tiny_inputs("deberta-v2"), []
    for threaded in (False, True):
        leaves = {site: tensors.map(lambda t: t.clone().requires_grad_()) for site, tensors in sites.items()}
        if threaded:
            getattr(model, f"{'activation' if new else 'gradient'}_checkpointing_enable")({"use_reentrant": False})
        torch.manual_seed(0)
        with attachment_of(model).bound(leaves):
            loss = model(**inputs).logits.square().mean()
        model(**inputs)  # another pass in between, without this prefix
        if threaded:
            worker = threading.Thread(target=loss.backward)
            worker.start()
            worker.join()
        else:
            loss.backward()
        gradients.append([tensor.grad for site in leaves.values() for tensor in site[:2]])
    for got, want in zip(gradients[1], gradients[0], strict=True):
        close(got, want)
