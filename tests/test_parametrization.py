"""Parametrizations: what they start at, what moves, and that folding changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foreword.errors import ConfigError, PrefixFormatError
from foreword.parametrization import DirectPrefix, MLPPrefix, PrefixModule, parametrize
from foreword.prefix import Prefix, Site, Sites, SiteTensors


def make_site(length: int, kv_heads: int = 2, key_dim: int = 4, value_dim: int = 3, seed: int = 0) -> SiteTensors:
    generator = torch.Generator().manual_seed(seed)
    keys = 20 * torch.randn(kv_heads, length, key_dim, generator=generator)
    return SiteTensors(keys, torch.randn(kv_heads, length, value_dim, generator=generator))


def make_prefix(lengths: dict[str, int], masses: bool = False) -> Prefix:
    sites: Sites = {}
    for number, (name, length) in enumerate(lengths.items()):
        site = make_site(length, seed=number)
        sites[Site.parse(name)] = site._replace(log_mass=-torch.rand(length)) if masses else site
    return Prefix(sites, "tiny", "abc", metadata={"task": "e2e"})


EQUAL = {"decoder.0": 4, "decoder.1": 4, "decoder.2": 4}
UNEQUAL = {"decoder.0": 4, "decoder.1": 2, "decoder.2": 4}
THREE = {"encoder.0": 3, "encoder.1": 3, "decoder.0": 5, "decoder.1": 5, "cross.0": 2, "cross.1": 2}


def step(module: PrefixModule) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    loss = sum((part**2).sum() for site in module().values() for part in (site.keys, site.values))
    assert isinstance(loss, Tensor)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def assert_same(one: Sites, other: Sites) -> None:
    assert list(one) == list(other)
    for site in one:
        for a, b in zip(one[site], other[site], strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.parametrize("lengths", [EQUAL, UNEQUAL, THREE])
@pytest.mark.parametrize("masses", [False, True])
def test_direct_starts_at_the_prefix_bit_for_bit(lengths: dict[str, int], masses: bool) -> None:
    prefix = make_prefix(lengths, masses)
    assert_same(DirectPrefix(prefix)(), prefix.sites)


@pytest.mark.parametrize("masses", [False, True])
def test_mlp_starts_at_the_prefix(masses: bool) -> None:
    prefix = make_prefix(THREE, masses)
    for site, tensors in MLPPrefix(prefix)().items():
        for made, wanted in zip(tensors, prefix.sites[site], strict=True):
            if made is not None and wanted is not None:
                assert (made - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("length", [1, 10, 64])
def test_mlp_fits_any_length_up_to_half_its_hidden_size(length: int) -> None:
    prefix = make_prefix({"decoder.0": length})
    site = Site("decoder", 0)
    made = MLPPrefix(prefix, hidden=128)()[site]
    assert (made.keys - prefix.sites[site].keys).norm() <= 1e-5 * prefix.sites[site].keys.norm()


def test_mlp_has_the_papers_parameters() -> None:
    module = MLPPrefix(make_prefix(THREE), hidden=10)
    width, slot = 2 * 4, 2 * 2 * (4 + 3)  # kv_heads · key_dim; two layers of keys and values
    expected = sum(length * width + width * 10 + 10 + 10 * slot + slot for length in (3, 5, 2))
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


def test_mlp_is_seeded() -> None:
    prefix = make_prefix(EQUAL)
    weights = [MLPPrefix(prefix, seed=seed).state_dict()["decoder.into_weight"] for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", ["direct", "mlp"])
def test_every_parameter_moves_and_every_slot_with_it(kind: str) -> None:
    prefix = make_prefix(THREE)
    module = parametrize(prefix, kind, hidden=16 if kind == "mlp" else None)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    step(module)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert not torch.equal(parameter, before[name]), name
    for site, tensors in module.fold().sites.items():
        for slot in range(tensors.length):
            assert not torch.equal(tensors.keys[:, slot], prefix.sites[site].keys[:, slot])
            assert not torch.equal(tensors.values[:, slot], prefix.sites[site].values[:, slot])


@pytest.mark.parametrize("lengths", [EQUAL, UNEQUAL])
def test_frozen_first_slot_stays_and_the_others_move(lengths: dict[str, int]) -> None:
    prefix = make_prefix(lengths)
    module = DirectPrefix(prefix, freeze_first_slot=True)
    assert_same(module(), prefix.sites)
    step(module)
    for site, tensors in module.fold().sites.items():
        for now, before in zip(tensors[:2], prefix.sites[site][:2], strict=True):
            assert torch.equal(now[:, :1], before[:, :1])
            assert bool((now[:, 1:] != before[:, 1:]).all())
    assert parametrize(module.fold()).options() == {"kind": "direct", "freeze_first_slot": True}


@given(
    kind=st.sampled_from(["direct", "frozen", "mlp"]),
    layers=st.integers(1, 4),
    length=st.integers(2, 9),
    masses=st.booleans(),
    steps=st.integers(0, 2),
)
def test_folding_changes_no_bit_and_training_goes_on(
    kind: str, layers: int, length: int, masses: bool, steps: int
) -> None:
    prefix = make_prefix({f"decoder.{layer}": length for layer in range(layers)}, masses)
    module: PrefixModule = (
        MLPPrefix(prefix, hidden=16) if kind == "mlp" else DirectPrefix(prefix, freeze_first_slot=kind == "frozen")
    )
    for _ in range(steps):
        step(module)
    folded = module.fold(keep_training_state=True)
    assert_same(folded.sites, module())
    assert module.fold().training_state is None
    again = parametrize(folded)
    assert again.options() == module.options()
    assert_same(again(), module())
    step(module)
    step(again)
    assert_same(again(), module())


def test_folded_prefix_is_free_of_the_module_and_keeps_its_origin() -> None:
    prefix = replace(make_prefix(EQUAL), position_offset=4)
    module = DirectPrefix(prefix)
    folded = module.fold()
    kept = folded.sites[Site("decoder", 1)].keys.clone()
    step(module)
    assert torch.equal(folded.sites[Site("decoder", 1)].keys, kept)
    assert (folded.base_name, folded.fingerprint, folded.position_offset) == ("tiny", "abc", 4)
    assert folded.metadata["task"] == "e2e"
    assert "parametrization" not in prefix.metadata


def test_a_module_leaves_the_given_prefix_alone() -> None:
    prefix = make_prefix(EQUAL)
    before = prefix.fold()
    for kind in ("direct", "mlp"):
        step(parametrize(prefix, kind))
    assert_same(prefix.sites, before.sites)


def test_mlp_output_is_the_same_under_autocast() -> None:
    module = MLPPrefix(make_prefix(EQUAL))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sites = module()
    assert_same(sites, module())


def test_a_folded_mlp_prefix_starts_anew_in_either_kind() -> None:
    folded = MLPPrefix(make_prefix(EQUAL), hidden=16).fold()
    assert parametrize(folded).kind == "direct"
    assert parametrize(folded, "mlp").options() == {"kind": "mlp", "hidden": 512}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lstm"}, "'lstm'"),
        ({"kind": "mlp", "hidden": 7}, "hidden size 7 for 4 slots; expected at least 8"),
        ({"kind": "mlp", "freeze_first_slot": True}, "frozen first slot under an MLP"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parametrize(make_prefix(EQUAL), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_lengths_that_cannot_be_used() -> None:
    with pytest.raises(ConfigError, match="lengths 2, 4 under one MLP; expected one length"):
        MLPPrefix(make_prefix(UNEQUAL))
    with pytest.raises(ConfigError, match="first slot is frozen in a prefix of length 1"):
        DirectPrefix(make_prefix({"decoder.0": 1}), freeze_first_slot=True)
    with pytest.raises(ConfigError, match="length 0"):
        DirectPrefix(make_prefix({"decoder.0": 0}))


def test_another_kind_or_size_than_trained_so_far_is_refused() -> None:
    folded = MLPPrefix(make_prefix(EQUAL), hidden=16).fold(keep_training_state=True)
    with pytest.raises(ConfigError, match="kind 'direct'; expected 'mlp'"):
        parametrize(folded, "direct")
    with pytest.raises(ConfigError, match="hidden 32; expected 16"):
        parametrize(folded, hidden=32)


def test_a_training_state_that_does_not_fit_is_refused() -> None:
    folded = MLPPrefix(make_prefix(EQUAL), hidden=16).fold(keep_training_state=True)
    with pytest.raises(PrefixFormatError, match="does not fit"):
        parametrize(replace(folded, sites=make_prefix({"decoder.0": 4}).sites))
    with pytest.raises(PrefixFormatError, match="parametrization None"):
        parametrize(replace(folded, metadata={}))
