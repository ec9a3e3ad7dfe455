"""Every fast way to attend equals the reference `prefix_attention`, in output and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foreword.kernels import Slots, attend, joined_attention, merged_attention, short_attention
from foreword.prefix import prefix_attention

SCALING = 0.3
LOWEST = torch.finfo(torch.float32).min


class Case(NamedTuple):
    """Inputs of an attention: query, key, value, prefix keys and values, text bias, slot bias, slot gate."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_keys: Tensor
    prefix_values: Tensor
    text_bias: Tensor | None
    slot_bias: Tensor | None
    slot_gate: Tensor | None = None

    @property
    def slots(self) -> Slots:
        return Slots(self.prefix_keys, self.prefix_values, self.slot_bias, self.slot_gate)

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None and tensor.requires_grad]


def make(
    batch: int = 2,
    kv_heads: int = 2,
    groups: int = 2,
    tokens: int = 5,
    keys: int = 5,
    slots: int = 3,
    *,
    own_rows: bool = False,
    text_bias: Tensor | None = None,
    slot_bias: Tensor | None = None,
    gate: str = "none",
    dtype: torch.dtype = torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(batch + 10 * tokens + 100 * slots)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, 4, generator=generator).to(dtype).requires_grad_()

    rows = batch if own_rows else 1
    return Case(
        leaf(batch, kv_heads * groups, tokens), leaf(batch, kv_heads, keys), leaf(batch, kv_heads, keys),
        leaf(rows, kv_heads, slots), leaf(rows, kv_heads, slots), text_bias, slot_bias,
        make_gate(gate, batch, tokens, slots, dtype),
    )  # fmt: skip


GATES = ["none", "slot", "row", "token"]


def make_gate(kind: str, batch: int, tokens: int, slots: int, dtype: torch.dtype) -> Tensor | None:
    """A factor per slot that is the same for all rows, or the row's own, or each token's own; one of them is 0."""
    if kind == "none":
        return None
    shape = {"slot": (1, 1, 1, slots), "row": (batch, 1, 1, slots), "token": (batch, 1, tokens, slots)}[kind]
    gate = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(slots), dtype=torch.float64).to(dtype)
    gate[..., 0] = 0
    return gate.requires_grad_()


def causal(tokens: int, keys: int) -> Tensor:
    """Additive causal mask `[1, 1, tokens, keys]`; the last token sees all keys."""
    seen = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)
    return torch.zeros(1, 1, tokens, keys).masked_fill(~seen, LOWEST)


def reference(case: Case) -> Tensor:
    return prefix_attention(
        case.query, case.key, case.value, case.prefix_keys, case.prefix_values,
        scaling=SCALING, text_bias=case.text_bias, prefix_bias=case.slot_bias, prefix_gate=case.slot_gate,
    )  # fmt: skip


def short(case: Case) -> Tensor:
    return short_attention(case.query, case.key, case.value, case.slots, case.text_bias, SCALING)


def joined(case: Case) -> Tensor:
    return joined_attention(case.query, case.key, case.value, case.slots, case.text_bias, SCALING)


def merged(case: Case) -> Tensor:
    return merged_attention(case.query, case.key, case.value, case.slots, case.text_bias, SCALING, False)


KERNELS = [short, joined, merged]


def check(kernel: Callable[[Case], Tensor], case: Case, expected: Tensor | None = None) -> None:
    """Output and all gradients of a kernel are those of the reference."""
    expected = reference(case) if expected is None else expected
    got = kernel(case)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for theirs, ours in zip(
        torch.autograd.grad(expected, case.leaves, direction), torch.autograd.grad(got, case.leaves, direction),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 2), groups=st.integers(1, 3), tokens=st.integers(1, 9),
    past=st.integers(0, 4), slots=st.integers(1, 6), own_rows=st.booleans(), masked=st.booleans(),
    gate=st.sampled_from(GATES),
)  # fmt: skip
def test_equals_the_reference(
    kernel: Callable[[Case], Tensor], batch: int, kv_heads: int, groups: int, tokens: int, past: int, slots: int,
    own_rows: bool, masked: bool, gate: str,
) -> None:  # fmt: skip
    bias = causal(tokens, tokens + past) if masked else None
    case = make(batch, kv_heads, groups, tokens, tokens + past, slots, own_rows=own_rows, text_bias=bias, gate=gate)
    check(kernel, case)


@pytest.mark.parametrize("gate", ["slot", "row"])
def test_a_gate_multiplies_keys_and_values(gate: str) -> None:
    """The reference itself, against the paper's equation 4: the gate on K and V, before they are concatenated."""
    case = make(own_rows=True, text_bias=causal(5, 5), gate=gate)
    assert case.slot_gate is not None
    factor = case.slot_gate.transpose(2, 3)
    plain = case._replace(
        prefix_keys=case.prefix_keys * factor, prefix_values=case.prefix_values * factor, slot_gate=None
    )
    torch.testing.assert_close(reference(case), reference(plain), atol=2e-6, rtol=1e-5)


def test_each_query_has_its_own_gate() -> None:
    case = make(gate="token")
    assert case.slot_gate is not None
    for token in range(5):
        one = case._replace(
            query=case.query[:, :, token : token + 1], slot_gate=case.slot_gate[:, :, token : token + 1]
        )
        torch.testing.assert_close(reference(case)[:, :, token : token + 1], reference(one), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_and_slots_of_others(kernel: Callable[[Case], Tensor]) -> None:
    padded = causal(5, 5).repeat(2, 1, 1, 1)
    padded[1, :, :, 3:] = LOWEST
    foreign = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.7, 0.0]])[:, None, None]
    check(kernel, make(own_rows=True, text_bias=padded, slot_bias=foreign))


@pytest.mark.parametrize("kernel", KERNELS)
def test_log_mass_has_a_gradient(kernel: Callable[[Case], Tensor]) -> None:
    mass = torch.tensor([0.5, -1.0, 0.0])[None, None, None].requires_grad_()
    check(kernel, make(text_bias=causal(5, 5), slot_bias=mass))


@pytest.mark.parametrize("batch", [1, 2])
def test_position_bias_has_a_gradient(batch: int) -> None:
    bias = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    check(short, make(batch, text_bias=bias))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mass_of_each_query_has_a_gradient(kernel: Callable[[Case], Tensor]) -> None:
    """A bias of the full shape, beside a bias of the full shape: nothing of it is summed."""
    mass = torch.randn(1, 4, 5, 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    check(kernel, make(1, text_bias=torch.zeros(1, 4, 5, 5), slot_bias=mass, gate="token"))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kernel", [short, joined])
def test_gradients_in_double_precision(kernel: Callable[[Case], Tensor], gate: str) -> None:
    mass = torch.tensor([0.5, -1.0], dtype=torch.float64)[None, None, None].requires_grad_()
    case = make(1, 1, 2, 3, 3, 2, text_bias=causal(3, 3).double(), slot_bias=mass, gate=gate, dtype=torch.float64)

    def run(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *more: Tensor) -> Tensor:
        return kernel(Case(query, key, value, keys, values, case.text_bias, *more))

    assert torch.autograd.gradcheck(run, case.leaves)


@pytest.mark.parametrize("gate", GATES)
def test_merged_gradients_equal_in_double_precision(gate: str) -> None:
    case = make(tokens=6, keys=6, gate=gate, dtype=torch.float64)
    lowest = torch.finfo(torch.float64).min
    expected = prefix_attention(
        *case[:5], scaling=SCALING, text_bias=causal(6, 6).double().clamp_min(lowest), prefix_gate=case.slot_gate
    )
    got = merged_attention(*case[:3], case.slots, None, SCALING, True)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), case.leaves), torch.autograd.grad(expected.sum(), case.leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [5, 300], ids=["short", "long"])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive"])
def test_attend_reads_every_form_of_mask(tokens: int, mask: str) -> None:
    case = make(1, 1, 2, tokens, tokens)
    seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    seen[..., : tokens // 2] = True
    if mask == "causal":
        seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    bias = None if mask == "none" else torch.zeros(seen.shape).masked_fill(~seen, LOWEST)
    given_mask = {"bool": seen, "additive": bias}.get(mask)

    def run(case: Case) -> Tensor:
        return attend(
            case.query, case.key, case.value, case.slots, scaling=SCALING, mask=given_mask,
            is_causal=mask == "causal",
        )  # fmt: skip

    check(run, case, reference(case._replace(text_bias=bias)))


def test_an_empty_static_cache_is_not_seen() -> None:
    case = make(tokens=4, keys=9)
    cut = case._replace(key=case.key[:, :, :4], value=case.value[:, :, :4], text_bias=causal(4, 4))

    def run(case: Case) -> Tensor:
        return attend(case.query, case.key, case.value, case.slots, scaling=SCALING, is_causal=True)

    check(run, case, reference(cut))


@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision_is_close_to_float32(kernel: Callable[[Case], Tensor]) -> None:
    exact = make(text_bias=causal(5, 5))
    lowest = causal(5, 5).clamp_min(torch.finfo(torch.bfloat16).min).bfloat16()
    half = make(text_bias=lowest, dtype=torch.bfloat16)
    torch.testing.assert_close(kernel(half).float(), reference(exact), atol=0.05, rtol=0.05)
