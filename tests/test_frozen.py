"""Inside `frozen_training` loss and gradients are those outside; outside, the model is the one it was."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreword.base import BaseModel
from foreword.frozen import frozen_training, packed_weights
from foreword.parallel import checkpoint_layers
from foreword.prefix import Sites, SiteTensors
from tiny import tiny_base, tiny_model

LAYERED = ["llama", "mistral", "qwen2", "qwen3"]
OTHERS = ["gpt2", "gemma2", "gemma3_text", "gpt_neox", "opt", "phi3", "gpt_oss", "bart", "t5"]


def make_batch(base: BaseModel) -> dict[str, Tensor]:
    """Three rows of unlike length, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        (torch.randint(3, 300, (n,), generator=generator).tolist(), torch.randint(3, 300, (m,), generator=generator))
        for n, m in ((3, 5), (9, 7), (1, 2))
    ]
    return base.collate([(prompt, completion.tolist()) for prompt, completion in rows])


def make_sites(base: BaseModel, only: int | None = None) -> Sites:
    generator = torch.Generator().manual_seed(1)
    return {
        site: SiteTensors(
            torch.randn(shape.kv_heads, 3, shape.key_dim, generator=generator).requires_grad_(),
            torch.randn(shape.kv_heads, 3, shape.value_dim, generator=generator).requires_grad_(),
        )
        for site, shape in base.geometry.items()
        if only is None or site.layer == only
    }


def step(base: BaseModel, only: int | None = None) -> tuple[float, Tensor]:
    """The loss and the gradient of all slots."""
    sites = make_sites(base, only)
    loss, tokens = base.completion_loss(make_batch(base), sites)
    leaves = [tensor for each in sites.values() for tensor in (each.keys, each.values)]
    gradients = torch.autograd.grad(loss / tokens, leaves)
    return loss.item() / tokens, torch.cat([gradient.flatten() for gradient in gradients]).double()


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def forwards(model: nn.Module) -> dict[str, Any]:
    return {name: module.__dict__.get("forward") for name, module in model.named_modules()}


def is_fast(model: nn.Module) -> bool:
    return any(function.__module__ == "foreword.frozen" for function in forwards(model).values() if function)


def with_tokens(name: str, **overrides: Any) -> BaseModel:
    return BaseModel(tiny_model(name, **overrides), tiny_base("llama").tokenizer, name)


@pytest.mark.parametrize("name", LAYERED + OTHERS)
@pytest.mark.parametrize("only", [None, 1], ids=["all layers", "upper layer"])
def test_loss_and_gradients_are_those_outside(name: str, only: int | None) -> None:
    base = tiny_base(name)
    loss, gradient = step(base, only)
    with frozen_training(base.model):
        assert is_fast(base.model)
        fast_loss, fast_gradient = step(base, only)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert distance(fast_gradient, gradient) <= 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_either_attention_implementation(implementation: str) -> None:
    base = with_tokens("llama", attn_implementation=implementation)
    loss, gradient = step(base)
    with frozen_training(base.model):
        fast_loss, fast_gradient = step(base)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert distance(fast_gradient, gradient) <= 1e-5


@pytest.mark.parametrize("options", [{"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}])
def test_biases_and_heads_of_their_own(options: dict[str, Any]) -> None:
    base = with_tokens("llama", **options)
    loss, gradient = step(base)
    with frozen_training(base.model):
        fast_loss, fast_gradient = step(base)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert distance(fast_gradient, gradient) <= 1e-5


@pytest.mark.parametrize("name", LAYERED)
def test_half_precision_errs_no_more_than_the_model_does(name: str) -> None:
    exact = tiny_base(name)
    exact_loss, exact_gradient = step(exact)
    base = BaseModel(tiny_model(name).bfloat16(), exact.tokenizer, name)
    exact.model.bfloat16().float()  # the same weights, rounded
    exact_loss, exact_gradient = step(exact)
    _, gradient = step(base)
    with frozen_training(base.model):
        fast_loss, fast_gradient = step(base)
    assert fast_loss == pytest.approx(exact_loss, rel=0.02)
    assert distance(fast_gradient, exact_gradient) <= 1.5 * distance(gradient, exact_gradient)


def test_the_model_is_restored_exactly() -> None:
    base = tiny_base("llama")
    model = base.model
    state = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    modules, before, fingerprint = list(model.modules()), forwards(model), base.fingerprint
    logits = base.logits(torch.tensor([[5, 6, 7]]))
    with contextlib.suppress(KeyboardInterrupt), frozen_training(model):
        assert is_fast(model)
        step(base)
        raise KeyboardInterrupt
    assert forwards(model) == before
    assert list(model.modules()) == modules
    for name, parameter in model.named_parameters():
        assert parameter is state[name][0] and torch.equal(parameter, state[name][1])
    assert base.fingerprint == fingerprint
    assert torch.equal(base.logits(torch.tensor([[5, 6, 7]])), logits)


@pytest.mark.parametrize("name", [*LAYERED, "gpt2"])
def test_generating_inside(name: str) -> None:
    base = tiny_base(name)
    expected = base.generate(["The foreword", "A"], max_new_tokens=8)
    with frozen_training(base.model):
        assert base.generate(["The foreword", "A"], max_new_tokens=8) == expected
        assert base.generate(["The foreword", "A"], max_new_tokens=8, num_beams=2)


def test_entering_twice_changes_nothing() -> None:
    base = tiny_base("llama")
    before = forwards(base.model)
    with frozen_training(base.model):
        inside = forwards(base.model)
        with frozen_training(base.model):
            assert forwards(base.model) == inside
        assert forwards(base.model) == inside
    assert forwards(base.model) == before


@pytest.mark.parametrize("own_switch", [True, False], ids=["the model's switch", "foreword's switch"])
@pytest.mark.parametrize("name", LAYERED)
def test_gradient_checkpointing_inside(name: str, own_switch: bool) -> None:
    base = tiny_base(name)
    loss, gradient = step(base)
    with frozen_training(base.model):
        if own_switch:
            base.model.activation_checkpointing_enable()
            base.model.train()
            fast_loss, fast_gradient = step(base)
            base.model.activation_checkpointing_disable()
            base.model.eval()
        else:
            restore = checkpoint_layers(base.model)
            fast_loss, fast_gradient = step(base)
            restore()
    assert not is_fast(base.model)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert distance(fast_gradient, gradient) <= 1e-5


def test_trainable_weights_are_left_alone() -> None:
    model = tiny_model("llama").requires_grad_(True)
    with frozen_training(model):
        assert not is_fast(model)


def test_a_layer_with_one_trainable_weight_is_left_alone() -> None:
    model = tiny_model("llama").requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    ids = torch.tensor([[5, 6, 7]])
    (expected,) = torch.autograd.grad(model(ids).logits.sum(), weight)
    with frozen_training(model):
        assert "forward" not in model.model.layers[0].__dict__ and "forward" in model.model.layers[1].__dict__
        (got,) = torch.autograd.grad(model(ids).logits.sum(), weight)
    assert distance(got, expected) <= 1e-5


def test_hooks_on_parts_of_a_layer_still_run() -> None:
    model = tiny_model("llama").requires_grad_(False)
    seen: list[int] = []
    with frozen_training(model):
        model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
        model(torch.tensor([[5, 6, 7]]))
    assert seen == [1]


def test_attentions_and_hidden_states_are_still_recorded() -> None:
    model = tiny_model("llama", attn_implementation="eager").requires_grad_(False)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids, output_attentions=True, output_hidden_states=True)
    with frozen_training(model):
        got = model(ids, output_attentions=True, output_hidden_states=True)
    for name in ("attentions", "hidden_states"):
        assert len(got[name]) == len(expected[name])
        for ours, theirs in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    model = tiny_model("llama").requires_grad_(False).to(dtype)
    with frozen_training(model):
        assert not is_fast(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_nothing_changes() -> None:
    model = tiny_model("llama").requires_grad_(False).cuda()
    with frozen_training(model):
        assert not is_fast(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_packed_weights_change_no_more_than_rounding_and_nothing_afterwards(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name).to(dtype).requires_grad_(False)
    ids = torch.arange(3, 40)[None]
    before = [set(module.__dict__) for module in model.modules()]
    with torch.no_grad():
        wanted = model(ids).logits
        with frozen_training(model), packed_weights(model):
            found = model(ids).logits
            held = [module for module in model.modules() if "_foreword_packed" in module.__dict__]
        linears = sum(type(module) is nn.Linear for module in model.modules())
        fused = model.config.num_hidden_layers * (3 if name in ("llama", "qwen2", "qwen3") else 0)
        assert len(held) == linears - fused, "q, k, v are one product, gate and up another"
        scale = float(wanted.abs().max())
        assert float((found - wanted).abs().max()) <= (1e-5 if dtype == torch.float32 else 3e-2) * scale
        assert torch.equal(model(ids).logits, wanted)
    assert [set(module.__dict__) for module in model.modules()] == before
    with frozen_training(model), packed_weights(model):  # what learns goes the way that has gradients
        inputs = torch.randn(1, 5, 32, dtype=dtype, requires_grad=True)
        linear = next(m for m in model.modules() if type(m) is nn.Linear and m.in_features == 32)
        linear(inputs).sum().backward()
    assert inputs.grad is not None
