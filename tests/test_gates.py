"""Gates: the paper's equations and parameter counts, causality, pooling, folding, gates of many kinds in one batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import foreword as fw
from foreword.attention import Attachment
from foreword.base import BaseModel
from foreword.errors import ConfigError, PrefixError, PrefixMismatch
from foreword.gates import GateInput, GateOptions, Gates, gate_of, masked_mean, pool
from foreword.init import new_prefix
from foreword.parametrization import parametrize
from foreword.prefix import Gate, Prefix, Site, Sites, SiteTensors
from tiny import tiny_base, tiny_inputs, tiny_model

SITE = Site("encoder", 0)
ABLATIONS = {
    "apt": GateOptions("apt"),
    "without layer gates": GateOptions("apt", layers=False),
    "without slot gates": GateOptions("apt", slots=False),
    "static": GateOptions("static"),
    "static without layer gates": GateOptions("static", layers=False),
    "started at 1": GateOptions("apt", layer_start=1.0),
}


def prefix_for(base: BaseModel, length: int = 4, seed: int = 0) -> Prefix:
    return new_prefix(base, length, "random", seed=seed)


def with_gates(base: BaseModel, prefix: Prefix, pooling: str, seed: int = 0) -> Prefix:
    """The same prefix with random gates of its own."""
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for site, tensors in prefix.sites.items():
        hidden = base.hidden_sizes[site]
        weight = 2 * torch.randn(hidden, tensors.length, generator=generator) / hidden**0.5
        sites[site] = tensors._replace(gate=Gate(weight, pooling))
    return replace(prefix, sites=sites)


def moved(module: Any, seed: int = 0) -> Any:
    """The module with all its parameters moved, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


# The paper


def test_parameter_counts_are_the_papers() -> None:
    """BERT-base, l = 20: per layer 2·l·d of the prefix, l·d of W and one λ; without α, λ or h as much less."""
    layers, heads, dim, length, hidden = 12, 12, 64, 20, 768
    site = SiteTensors(torch.zeros(heads, length, dim), torch.zeros(heads, length, dim))
    sites = {Site("encoder", layer): site for layer in range(layers)}
    sizes = dict.fromkeys(sites, hidden)
    prefix = Prefix(sites, "bert-base", "")

    def count(options: GateOptions) -> int:
        module = parametrize(prefix, gates=options, hidden_sizes=sizes)
        return sum(parameter.numel() for parameter in module.parameters())

    plain = layers * 2 * length * hidden
    assert count(GateOptions()) == plain
    assert count(GateOptions("apt")) == plain + layers * (length * hidden + 1) == 552_972
    assert count(GateOptions("apt", slots=False)) == plain + layers
    assert count(GateOptions("apt", layers=False)) == plain + layers * length * hidden
    assert count(GateOptions("static")) == plain + layers * (length + 1)
    assert count(GateOptions("mass")) == plain + layers * length


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "modernbert", "deberta-v2", "electra"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooled_gates_are_factors_on_keys_and_values(name: str, pooling: str) -> None:
    """Equation 4, naively: α, computed here from what enters each layer's attention, multiplied into K and V."""
    base = tiny_base(name)
    prefix = with_gates(base, prefix_for(base), pooling)
    inputs = tiny_inputs(name, batch=1)
    with torch.no_grad(), base.attachment.bound(prefix.sites), base.attachment.recording_gates() as gates:
        want = base.model(**inputs)[0]
    plain: Sites = {}
    for site, tensors in prefix.sites.items():
        alpha = gates[site][0, 0][:, None]
        plain[site] = SiteTensors(tensors.keys * alpha, tensors.values * alpha)
    entered: list[Tensor] = []
    modules = [m for m in base.model.modules() if "_foreword" in m.__dict__ and m is not base.model]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for module in modules
    ]
    with torch.no_grad(), base.attachment.bound(plain):
        got = base.model(**inputs)[0]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    for hidden, (site, tensors) in zip(entered, prefix.sites.items(), strict=True):
        assert tensors.gate is not None
        h = hidden[0, 0] if pooling == "cls" else hidden[0].mean(0)
        torch.testing.assert_close(gates[site][0, 0], torch.sigmoid(h @ tensors.gate.weight), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
@pytest.mark.parametrize("kind", ["direct", "mlp"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_training_begins_at_the_ungated_function(name: str, kind: str, options: GateOptions) -> None:
    base = tiny_base(name)
    prefix = prefix_for(base)
    module = parametrize(prefix, kind, hidden=16, gates=options, hidden_sizes=base.hidden_sizes)
    assert module.gates is not None and any(p.requires_grad for p in module.gates.parameters())
    inputs = tiny_inputs(name)
    with torch.no_grad():
        with base.attachment.bound(prefix.sites):
            want = base.model(**inputs)[0]
        with base.attachment.bound(module()):
            got = base.model(**inputs)[0]
    if kind == "direct" and options.kind == "static":
        assert torch.equal(got, want)  # factors of a half and of two are exact
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# Causality


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "opt"])
def test_token_gates_are_causal(name: str) -> None:
    """No later token changes what came before; a gate that reads the whole text does, and this test would see it."""
    base = tiny_base(name)
    inputs = tiny_inputs(name, batch=1, tokens=8)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 5:] = (changed["input_ids"][:, 5:] + 7) % 290 + 3
    for pooling, causal in (("token", True), ("mean", False)):
        sites = with_gates(base, prefix_for(base), pooling).sites
        with torch.no_grad(), base.attachment.bound(sites):
            before, after = base.model(**inputs)[0][:, :5], base.model(**changed)[0][:, :5]
        # the experts of a mixture sum in another order when other tokens come to them
        assert torch.allclose(before, after, atol=1e-5, rtol=1e-5) == causal


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_of_token_gates_are_causal(name: str) -> None:
    """The derivative of an early logit in the embedding of a later token is 0."""
    base = tiny_base(name)
    ids = tiny_inputs(name, batch=1, tokens=8)["input_ids"]
    embeddings = base.model.get_input_embeddings()(ids).detach().requires_grad_()
    with base.attachment.bound(with_gates(base, prefix_for(base), "token").sites):
        logits = base.model(inputs_embeds=embeddings)[0]
    (gradient,) = torch.autograd.grad(logits[:, :5].square().sum(), embeddings)
    assert bool((gradient[:, 5:] == 0).all()) and bool((gradient[:, :5] != 0).any())


# What gates read


@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 6), left=st.integers(0, 3), right=st.integers(0, 3),
    pooling=st.sampled_from(["cls", "mean"]),
)  # fmt: skip
def test_padding_is_not_read(batch: int, tokens: int, left: int, right: int, pooling: str) -> None:
    hidden = torch.randn(batch, tokens, 4)
    padded = torch.cat([torch.randn(batch, left, 4), hidden, torch.randn(batch, right, 4)], dim=1)
    mask = torch.zeros(batch, left + tokens + right, dtype=torch.bool)
    mask[:, left : left + tokens] = True
    got, want = pool(GateInput(padded, mask), pooling, SITE), pool(GateInput(hidden), pooling, SITE)
    assert want.shape == (batch, 1, 4)
    torch.testing.assert_close(got, want)


def test_what_is_not_asked_for_is_not_formed() -> None:
    def never() -> Tensor:
        raise AssertionError("asked for")

    gate = Gate(torch.zeros(4, 3), "token")
    assert gate_of(gate, GateInput(torch.ones(2, 5, 4), never), SITE).shape == (2, 5, 3)


def test_prompt_gates_stay_while_text_is_written() -> None:
    """Step by step from a cache, in one pass with the prompt marked, and by `generate`: the same gates."""
    base = tiny_base("llama")
    prefix = with_gates(base, prefix_for(base), "prompt")
    ids = tiny_inputs("llama", batch=2, tokens=9)["input_ids"]
    mask = (torch.arange(9) < 6)[None].expand(2, -1)
    with torch.no_grad(), base.rows(prefix, 2) as rows:
        whole = base.model(ids, prefix_ids=rows, prompt_mask=mask, use_cache=False).logits
        output = base.model(ids[:, :6], prefix_ids=rows, use_cache=True)
        steps = [output.logits]
        for place in range(6, 9):
            output = base.model(
                ids[:, place : place + 1], prefix_ids=rows, past_key_values=output.past_key_values, use_cache=True
            )
            steps.append(output.logits)
        unmarked = base.model(ids, prefix_ids=rows, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(unmarked, whole, atol=1e-3)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_prompt_gates_do_not_read_the_padding_of_prompts(name: str, cache: str | None) -> None:
    """A padded prompt writes what it writes by itself, whichever form of mask `generate` makes for its cache."""
    base = tiny_base(name)
    prefix = with_gates(base, prefix_for(base), "prompt")
    ids = tiny_inputs(name, batch=2, tokens=11)["input_ids"]
    ids[1, :4] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    kind = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    with torch.no_grad(), base.rows(prefix, 2) as rows:
        both = base.model.generate(input_ids=ids, attention_mask=ids.ne(0).long(), prefix_ids=rows, **kind, **options)
        alone = base.model.generate(input_ids=ids[1:, 4:], prefix_ids=rows[1:], **options)
    for got, want in zip(both.logits, alone.logits, strict=True):
        torch.testing.assert_close(got[1:], want, atol=1e-4, rtol=1e-4)


def test_prompt_gates_refuse_a_cache_of_other_rows() -> None:
    base = tiny_base("llama")
    prefix = with_gates(base, prefix_for(base), "prompt")
    ids = tiny_inputs("llama", batch=2)["input_ids"]
    with torch.no_grad():
        cache = base.model(ids, use_cache=True).past_key_values  # read without any prefix
        with base.rows(prefix, 2) as rows, pytest.raises(PrefixError, match="go on from a cache of another prefix"):
            base.model(ids[:, :1], prefix_ids=rows, past_key_values=cache)


def test_prompt_gates_have_gradients_through_the_prompt() -> None:
    base = tiny_base("llama")
    sites = with_gates(base, prefix_for(base), "prompt").sites
    embeddings = base.model.get_input_embeddings()(torch.tensor([[5, 6, 7, 8]])).detach().requires_grad_()
    mask = torch.tensor([[True, True, False, False]])
    with base.attachment.bound(sites):
        last = base.model(inputs_embeds=embeddings, prompt_mask=mask).logits[:, 0].square().sum()
    assert bool((torch.autograd.grad(last, embeddings)[0][0, 1] != 0).any())  # the second token, by the gate alone


def test_packed_rows_refuse_gates_that_read_a_whole_text() -> None:
    base = tiny_base("llama")
    prefixes = [with_gates(base, prefix_for(base), pooling) for pooling in ("prompt", "token")]
    ids = torch.tensor([[5, 6, 7, 8]])
    with base.rows(prefixes, 2) as rows:
        for owners in (rows.repeat_interleave(2), rows[:1].repeat(4)):  # two prefixes, or one for both texts
            with pytest.raises(PrefixError, match="packed rows with a prefix whose gates read the prompt"):
                base.model(ids, prefix_ids=owners[None])
        base.model(ids, prefix_ids=rows[1:].repeat(4)[None])  # each token has a gate of its own


# In the bank


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2", "bart"])
def test_rows_with_gates_of_every_kind_in_one_batch(name: str) -> None:
    base = tiny_base(name)
    plain = [prefix_for(base, length, seed=length) for length in (3, 4, 2, 5)]
    decoder_too = any(site.stack != "encoder" for site in base.geometry)
    poolings = ["token"] * 2 if decoder_too else ["cls", "mean"]
    owners = [
        with_gates(base, plain[0], poolings[0]), None, plain[1], with_gates(base, plain[2], poolings[1]),
        with_gates(base, plain[3], "token"), with_gates(base, plain[0], poolings[0], seed=3),
    ]  # fmt: skip
    inputs = tiny_inputs(name, batch=len(owners))
    inputs["attention_mask"][1::2, -2:] = 0
    together = base.logits(prefixes=owners, **inputs)
    for row, prefix in enumerate(owners):
        alone = base.logits(prefixes=prefix, **{key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_place_in_the_bank_forgets_the_gates_that_it_held() -> None:
    base = tiny_base("bert")
    plain = prefix_for(base)
    inputs = tiny_inputs("bert")
    want = base.logits(prefixes=[plain, None], **inputs)
    base.logits(prefixes=[with_gates(base, plain, "mean"), None], **inputs)
    assert torch.equal(base.logits(prefixes=[plain, None], **inputs), want)


def test_gates_of_another_width_are_refused() -> None:
    base = tiny_base("bert")
    prefix = with_gates(base, prefix_for(base), "mean")
    sites = {site: t._replace(gate=Gate(torch.zeros(7, 4), "mean")) for site, t in prefix.sites.items()}
    with pytest.raises(PrefixMismatch, match="the gate at encoder.0 reads 7 hidden units, 'BertForMaskedLM' has 32"):
        base.logits(prefixes=replace(prefix, sites=sites), **tiny_inputs("bert"))


# Folding and going on


@pytest.mark.parametrize("options", [*ABLATIONS.values(), GateOptions("mass")], ids=[*ABLATIONS, "mass"])
@pytest.mark.parametrize("kind", ["direct", "mlp"])
def test_training_goes_on_where_it_stood(kind: str, options: GateOptions) -> None:
    base = tiny_base("bert")
    module = moved(parametrize(prefix_for(base), kind, hidden=16, gates=options, hidden_sizes=base.hidden_sizes))
    folded = module.fold(keep_training_state=True)
    again = parametrize(folded)
    assert again.gates is not None and again.gates.gate_options == options and again.kind == kind
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for site, tensors in module().items():
        named = folded.sites[site].named()
        assert named.keys() == tensors.named().keys()
        assert all(torch.equal(named[name], tensor.detach()) for name, tensor in tensors.named().items())


def test_static_gates_fold_into_plain_keys_and_values() -> None:
    base = tiny_base("llama")
    module = moved(parametrize(prefix_for(base), gates=GateOptions("static"), hidden_sizes=base.hidden_sizes))
    folded = module.fold()
    assert all(set(tensors.named()) == {"keys", "values"} for tensors in folded.sites.values())
    inputs = tiny_inputs("llama")
    with torch.no_grad(), base.attachment.bound(module()):
        want = base.model(**inputs)[0]
    assert torch.equal(base.logits(prefixes=folded, **inputs), want)
    recorded = folded.metadata["gates"]
    assert recorded["kind"] == "static" and len(recorded["values"]["decoder.0"]["slots"]) == 4
    assert recorded["values"]["decoder.1"]["layer"] == pytest.approx(module.gates.decoder_layers[1].item())


def test_a_folded_prefix_with_gates_is_trained_further_with_them() -> None:
    base = tiny_base("bert")
    module = moved(parametrize(prefix_for(base), gates=GateOptions("apt"), hidden_sizes=base.hidden_sizes))
    folded = module.fold()
    again = parametrize(folded)
    assert again.gates is not None and again.gates.reads_text
    for site, tensors in again().items():
        for name, tensor in tensors.named().items():
            torch.testing.assert_close(tensor, folded.sites[site].named()[name], msg=name)
    with pytest.raises(ConfigError, match="gates with kind static, pooling none for a prefix that has"):
        parametrize(folded, gates=GateOptions("static"))
    same = parametrize(folded, gates=GateOptions("apt", pooling="mean", layer_start=1.0))  # the default, by its name
    assert same.gates is not None and same.gates.gate_options.layer_start == 2.0


def test_a_frozen_slot_is_under_no_gates() -> None:
    base = tiny_base("llama")
    with pytest.raises(ConfigError, match="a frozen first slot under gates, which would move it"):
        parametrize(prefix_for(base), freeze_first_slot=True, gates=GateOptions("static"))


def test_gates_that_a_stack_cannot_have_are_not_attached() -> None:
    base = tiny_base("bert")
    with pytest.raises(PrefixMismatch, match="gate pooling 'prompt' in an encoder; .*|at encoder.0"):
        base.logits(prefixes=with_gates(base, prefix_for(base), "prompt"), **tiny_inputs("bert"))


def test_the_hash_tells_what_gates_read() -> None:
    base = tiny_base("bert")
    prefix = prefix_for(base)
    hashes = {with_gates(base, prefix, pooling).sha256() for pooling in ("cls", "mean", "token")}
    assert len(hashes | {prefix.sha256()}) == 4 and prefix.sha256() == prefix_for(base).sha256()


def test_mass_gates_are_a_mass_between_0_and_1() -> None:
    base = tiny_base("llama")
    module = parametrize(prefix_for(base), gates=GateOptions("mass"))
    masses = [tensors.log_mass for tensors in module().values()]
    assert all(mass is not None and bool(((mass < 0) & (mass > -0.02)).all()) for mass in masses)
    inputs = tiny_inputs("llama")
    with base.attachment.bound(module()):
        base.model(**inputs)[0].square().sum().backward()
    assert all(bool((p.grad != 0).all()) for p in module.gates.parameters())


def test_gates_survive_the_disk(tmp_path: Any) -> None:
    base = tiny_base("bert")
    module = moved(parametrize(prefix_for(base), gates=GateOptions("apt"), hidden_sizes=base.hidden_sizes))
    prefix = module.fold(keep_training_state=True)
    prefix.save(tmp_path / "p")
    loaded = fw.Prefix.load(tmp_path / "p", base)
    inputs = tiny_inputs("bert")
    assert torch.equal(base.logits(prefixes=loaded, **inputs), base.logits(prefixes=prefix, **inputs))
    again = parametrize(loaded)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in module.state_dict().items())


def test_an_attached_model_trains_gates() -> None:
    """`attach(trainable=True)` with a gated prefix: the gates are parameters of the model."""
    base = tiny_base("bert")
    folded = parametrize(prefix_for(base), gates=GateOptions("apt"), hidden_sizes=base.hidden_sizes).fold()
    model = fw.attach(tiny_model("bert"), folded, trainable=True, check_fingerprint=False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name.rpartition(".")[2] for name in trained] == [
        "encoder_keys", "encoder_values", "encoder_slots", "encoder_layers",
    ]  # fmt: skip
    model(**tiny_inputs("bert"))[0].square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in model.parameters() if p.requires_grad)
    fw.detach(model)


def test_detaching_removes_what_gates_listen_with() -> None:
    model = tiny_model("llama")
    attachment = Attachment(model)
    assert any(module._forward_pre_hooks for module in model.modules())
    attachment.undo()
    assert not any(module._forward_pre_hooks for module in model.modules())


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "apd"}, "gates 'apd'; expected one of none, apt, static, mass"),
        ({"kind": "apt", "pooling": "max"}, "gate pooling 'max'; expected one of token, cls, mean, prompt"),
        ({"kind": "apt", "slots": False, "layers": False}, "apt gates without slot and layer gates"),
        ({"kind": "apt", "layer_start": 0.0}, "layer gate start 0.0; expected a finite number other than 0"),
        ({"kind": "apt", "layer_start": float("nan")}, "layer gate start nan"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GateOptions(**options)


def test_gates_want_the_hidden_sizes() -> None:
    with pytest.raises(ConfigError, match="apt gates without the hidden size at decoder.0"):
        parametrize(prefix_for(tiny_base("llama")), gates=GateOptions("apt"))


def test_gates_of_another_geometry_are_no_start() -> None:
    base = tiny_base("bert")
    four, five = (Gates(prefix_for(base, n).sites, GateOptions("apt"), base.hidden_sizes) for n in (4, 5))
    with pytest.raises(ConfigError, match=r"gates of the shapes encoder_slots \[2, 32, 5\].*expected encoder_slots \["):
        four.start_from(five)
    moved(five)
    same = Gates(prefix_for(base, 5).sites, GateOptions("apt"), base.hidden_sizes)
    same.start_from(five)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), five.parameters(), strict=True))


def test_means_keep_their_precision_and_their_range() -> None:
    hidden = torch.randn(2, 300, 16).add(3)
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, 200:] = False
    wanted = torch.stack([hidden[0].mean(0), hidden[1, :200].mean(0)])[:, None]
    found = masked_mean(hidden.bfloat16(), mask)
    exact = torch.stack([hidden[0].bfloat16().float().mean(0), hidden[1, :200].bfloat16().float().mean(0)])[:, None]
    assert float((found.float() / exact - 1).abs().mean()) < 0.002
    torch.testing.assert_close(masked_mean(hidden, mask), wanted)
    assert masked_mean(torch.full((1, 2048, 1), 40.0).half(), torch.ones(1, 2048)).item() == 40.0
