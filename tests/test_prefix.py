"""The mathematics of a prefix on plain tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import PrefixMismatch
from foreword.prefix import Prefix, Site, SiteShape, SiteTensors, compact, merge_attention, prefix_attention

SITE = Site("decoder", 0)


def random_case(seed: int, slots: int = 3, keys: int = 5, groups: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "query": draw(2, 2 * groups, 4, 8),
        "key": draw(2, 2, keys, 8),
        "value": draw(2, 2, keys, 6),
        "prefix_keys": draw(1, 2, slots, 8),
        "prefix_values": draw(1, 2, slots, 6),
    }


def part(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query @ key.transpose(2, 3)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 6))
def test_merging_two_key_sets_equals_one_softmax(seed: int, left: int, right: int) -> None:
    case = random_case(seed, slots=left, keys=right, groups=1)
    query, key, value = case["query"][:1], case["key"][:1], case["value"][:1]
    both_keys = torch.cat([case["prefix_keys"], key], 2)
    both_values = torch.cat([case["prefix_values"], value], 2)
    expected, expected_lse = part(query, both_keys, both_values)
    parts = (*part(query, case["prefix_keys"], case["prefix_values"]), *part(query, key, value))
    out, lse = merge_attention(*parts)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    swapped, _ = merge_attention(*parts[2:], *parts[:2])
    torch.testing.assert_close(swapped, out)


def test_a_set_without_mass_leaves_the_other_bit_for_bit() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    merged, total = merge_attention(out, lse, *nothing)
    assert torch.equal(merged, out) and torch.equal(total, lse)
    merged, total = merge_attention(*nothing, *nothing)
    assert torch.equal(merged, nothing[0]) and torch.equal(total, nothing[1])


@given(st.integers(0, 1000))
def test_a_slot_with_mass_zero_is_a_slot_removed(seed: int) -> None:
    case = random_case(seed)
    bias = torch.tensor([0.0, -math.inf, 0.5], dtype=torch.float64).reshape(1, 1, 1, 3)
    gated = prefix_attention(**case, scaling=0.3, prefix_bias=bias)
    keep = torch.tensor([True, False, True])
    case["prefix_keys"], case["prefix_values"] = case["prefix_keys"][:, :, keep], case["prefix_values"][:, :, keep]
    removed = prefix_attention(**case, scaling=0.3, prefix_bias=bias[..., keep])
    torch.testing.assert_close(gated, removed)


def test_no_slots_is_the_plain_softmax() -> None:
    case = random_case(0, slots=0, groups=1)
    expected = (case["query"] @ case["key"].transpose(2, 3) * 0.3).softmax(-1) @ case["value"]
    torch.testing.assert_close(prefix_attention(**case, scaling=0.3), expected)


def test_sinks_take_mass_and_give_nothing() -> None:
    case = random_case(0)
    sinks = torch.full((4,), -math.inf, dtype=torch.float64)
    torch.testing.assert_close(
        prefix_attention(**case, scaling=0.3, sinks=sinks), prefix_attention(**case, scaling=0.3)
    )
    heavy = prefix_attention(**case, scaling=0.3, sinks=sinks.fill_(50.0))
    assert heavy.abs().max() < 1e-9


def test_the_reference_passes_gradcheck() -> None:
    case = random_case(0)
    tensors = tuple(t.requires_grad_() for t in case.values())

    def function(*args: torch.Tensor) -> torch.Tensor:
        return prefix_attention(*args, scaling=0.3, softcap=5.0)

    assert torch.autograd.gradcheck(function, tensors)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    case = random_case(0, slots=0)
    bias = torch.full((1, 1, 1, 5), -math.inf, dtype=torch.float64)
    assert torch.equal(prefix_attention(**case, scaling=1.0, text_bias=bias), torch.zeros(2, 4, 4, 6).double())


def some_prefix(length: int = 4, mass: bool = True) -> Prefix:
    log_mass = torch.zeros(length) if mass else None
    return Prefix({SITE: SiteTensors(torch.randn(2, length, 8), torch.randn(2, length, 8), log_mass)}, "tiny", "f" * 64)


def test_keeping_all_slots_is_the_identity() -> None:
    prefix = some_prefix()
    kept = compact(prefix.sites, {SITE: torch.ones(4, dtype=torch.bool)})
    named = prefix.sites[SITE].named()
    assert all(torch.equal(tensor, named[name]) for name, tensor in kept[SITE].named().items())


def test_counts() -> None:
    prefix = some_prefix()
    assert prefix.length == 4 and prefix.num_parameters == 2 * 2 * 4 * 8 + 4 and prefix.num_bytes == 4 * 132
    assert prefix.geometry == {SITE: SiteShape(2, 8, 8)}


def test_folding_drops_the_training_state_and_shares_nothing() -> None:
    prefix = some_prefix()
    prefix.training_state = {"weight": torch.ones(1)}
    folded = prefix.fold()
    assert folded.training_state is None and prefix.training_state is not None
    folded.sites[SITE].keys.zero_()
    assert prefix.sites[SITE].keys.abs().sum() > 0


@pytest.mark.parametrize(
    ("fingerprint", "geometry", "message"),
    [
        ("e" * 64, {SITE: SiteShape(2, 8, 8)}, "weights ffffffffffff"),
        ("f" * 64, {SITE: SiteShape(2, 16, 16)}, "2 kv_heads of 8/8 at decoder.0"),
        ("f" * 64, {}, "expected one of its sites"),
    ],
)
def test_another_base_is_refused(fingerprint: str, geometry: dict[Site, SiteShape], message: str) -> None:
    with pytest.raises(PrefixMismatch, match=message) as caught:
        some_prefix().check_base("other", fingerprint, geometry)
    assert "\n" not in str(caught.value)
