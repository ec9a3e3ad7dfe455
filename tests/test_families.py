"""Every supported family under the whole contract, on tiny random models; the others refused by name."""

from __future__ import annotations

import collections

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from foreword.attention import Attachment, attach, attachment_of, detach
from foreword.conform import CONTRACT, check
from foreword.errors import ConfigError, UnsupportedModel
from foreword.families import FAMILIES, family_of, find_sites
from tiny import REFUSED, TINY, tiny_base, tiny_inputs, tiny_model

# Lines that say nothing about a family: no cache in encoders, no window, no tokens, no limit, no checkpointing.
ENCODERS = {"bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "modernbert", "deberta-v2", "vit"}
SLIDING = {"mistral", "gemma2", "gemma3_text", "gpt_oss", "modernbert"}
PACKING = {
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "deepseek_v3",
}  # fmt: skip


def _not_applicable(name: str) -> set[int]:
    lines = {4} if name in ENCODERS else set()
    lines |= set() if name in SLIDING else {9}
    lines |= {3} if name in ("vit", "whisper") else set()
    lines |= {6} if name == "albert" else set()
    return lines | ({10} if name in ("t5", "t5-odd", "deberta-v2") else set())


@pytest.mark.parametrize("name", TINY)
def test_family_passes_the_whole_contract(name: str):
    report = check(tiny_model(name))
    assert report.passed, "\n" + report.table()
    assert [line.number for line in report.lines] == list(CONTRACT)
    assert {line.number for line in report.lines if line.status == "n/a"} == _not_applicable(name), report.table()
    packing = next(line for line in report.lines if line.number == 3)
    assert (packing.status == "pass" and "no packing" not in packing.detail) == (name in PACKING)


DECODERS = [name for name in TINY if family_of(tiny_model(name).config).kind == "decoder"]
GATED = [(name, kind, "") for name in TINY for kind in ("apt", "static", "mass")]
GATED += [(name, "apt", "cls") for name in sorted(ENCODERS)] + [(name, "apt", "prompt") for name in DECODERS]
GATED += [(name, "apt", "token") for name in sorted(ENCODERS)]


@pytest.mark.parametrize(("name", "gates", "pooling"), GATED)
def test_family_passes_the_whole_contract_with_gates(name: str, gates: str, pooling: str):
    report = check(tiny_model(name), gates=gates, gate_pooling=pooling)
    assert report.passed, "\n" + report.table()
    assert {line.number for line in report.lines if line.status == "n/a"} == _not_applicable(name), report.table()


@pytest.mark.parametrize(("name", "pooling"), [("llama", "mean"), ("llama", "cls"), ("bert", "prompt")])
def test_gates_that_would_read_what_is_to_come_are_refused(name: str, pooling: str):
    with pytest.raises(ConfigError, match=f"gate pooling '{pooling}' in an? "):
        check(tiny_model(name), gates="apt", gate_pooling=pooling)


@pytest.mark.parametrize("gates", ["none", "apt", "static", "mass"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "modernbert", "bart", "deberta-v2", "vit"])
def test_contract_holds_in_bfloat16(name: str, gates: str):
    report = check(tiny_model(name).bfloat16(), gates=gates)
    assert report.passed, "\n" + report.table()
    assert 1e-5 < report.tolerance < 0.1


@pytest.mark.parametrize("gates", ["none", "apt"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bart", "bert"])
def test_contract_holds_with_eager_attention(name: str, gates: str):
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    report = check(model, gates=gates)
    assert report.passed, "\n" + report.table()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deberta-v2", {"pos_att_type": ["c2p"]}),
        ("deberta-v2", {"share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3}),
        ("deberta-v2", {"relative_attention": False, "pos_att_type": [], "position_biased_input": True}),
        ("albert", {"num_hidden_layers": 4, "num_hidden_groups": 2}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("bart", {"encoder_layers": 1, "decoder_layers": 3, "decoder_attention_heads": 2}),
    ],
)
def test_options_of_a_family_pass_the_contract(name: str, options: dict[str, object]):
    report = check(tiny_model(name, **options))
    assert report.passed, "\n" + report.table()


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_by_name(name: str):
    model = tiny_model(name)
    before = set(model.__dict__)
    with pytest.raises(UnsupportedModel, match=name):
        attach(model)
    with pytest.raises(UnsupportedModel, match=name):
        check(model)
    assert set(model.__dict__) == before
    assert attachment_of(model) is None


@pytest.mark.parametrize("name", [name for name in TINY if name != "deberta-v2"])
def test_every_call_of_the_attention_interface_is_one_site(name: str):
    """What calls the interface is found, once per call, in the order of the layers of each stack."""
    model = tiny_model(name)
    called: list[torch.nn.Module] = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        called.append(module)
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("test_probe", probe)
    AttentionMaskInterface.register("test_probe", eager_mask)
    for module in model.modules():
        if hasattr(module, "config"):  # not every transformers lets T5 choose by `set_attn_implementation`
            module.config._attn_implementation_internal = "test_probe"
    with torch.no_grad():
        model(**tiny_inputs(name))
    sites = list(find_sites(model, family_of(model.config)))
    assert collections.Counter(map(id, called)) == collections.Counter(id(module) for _, module in sites)
    for stack in {site.stack for site, _ in sites}:
        layers = [site.layer for site, _ in sites if site.stack == stack]
        assert layers == list(range(len(layers)))
    for stack in {site.stack for site, _ in sites}:
        of_stack = [id(module) for site, module in sites if site.stack == stack]
        assert [id(module) for module in called if id(module) in of_stack] == of_stack


def test_deberta_sites_are_its_attention_modules():
    model = tiny_model("deberta-v2")
    sites = dict(find_sites(model, family_of(model.config)))
    assert [str(site) for site in sites] == ["encoder.0", "encoder.1"]
    assert {type(module).__name__ for module in sites.values()} == {"DisentangledSelfAttention"}


def test_geometry_is_the_keys_own_shape():
    attachments = {name: Attachment(tiny_model(name)) for name in ("llama", "qwen3", "deepseek_v3", "t5-odd")}
    shapes = {name: set(attachment.geometry.values()) for name, attachment in attachments.items()}
    assert shapes == {
        "llama": {(2, 8, 8)},
        "qwen3": {(2, 12, 12)},
        "deepseek_v3": {(4, 16, 12)},
        "t5-odd": {(4, 12, 12)},
    }


def test_every_family_has_a_tiny_model():
    types = {model_type for family in FAMILIES for model_type in family.model_types}
    assert types <= set(TINY)


@pytest.mark.parametrize("name", TINY)
def test_tiny_base_knows_itself(name: str):
    base = tiny_base(name)
    assert base.name == f"tiny-{name}"
    assert len(base.geometry) >= 2
    detach(base.model)
