"""The lean loss equals PyTorch's cross-entropy, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreword.loss import completion_nats


@given(tokens=st.integers(0, 40), vocab=st.integers(1, 50), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_value_and_gradient_are_those_of_cross_entropy(tokens: int, vocab: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(tokens * 100 + vocab)
    logits = (torch.randn(tokens, vocab, generator=generator) * scale).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    got = completion_nats(logits, targets)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got / 7, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected / 7, logits)[0])


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = (torch.randn(33, 500, generator=torch.Generator().manual_seed(0)) * 5).bfloat16().requires_grad_()
    targets = torch.arange(33)
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    got = completion_nats(logits, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_gradient_in_double_precision() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: completion_nats(x, torch.arange(5)), (logits,))


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits_give_finite_nats(shift: float) -> None:
    logits = torch.tensor([[0.0, shift]], requires_grad=True)
    nats = completion_nats(logits, torch.tensor([0]))
    nats.backward()
    assert torch.isfinite(nats) and torch.isfinite(logits.grad).all()  # type: ignore[arg-type]
