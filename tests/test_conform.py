"""The contract can fail: whatever is broken on purpose, the line that guards it says so."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

import foreword.bank
import foreword.interface
import foreword.parametrization
from foreword import kernels
from foreword.attention import Attachment, attach, attachment_of
from foreword.bank import PerRow, PerToken
from foreword.conform import CONTRACT, Line, Report, check
from foreword.errors import ConfigError, PrefixError
from foreword.kernels import Slots
from foreword.prefix import Prefix, SiteTensors
from tiny import tiny_base, tiny_inputs, tiny_model


def _failed(name: str = "llama", gates: str = "none", **options: object) -> set[int]:
    report = check(tiny_model(name, **options), gates=gates)
    return {line.number for line in report.lines if line.status == "fail"}


def _break_attend(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """`change(query, key, value, slots, options)` returns other arguments for the real function."""
    real = kernels.attend

    def broken(query, key, value, slots, **options):
        query, key, value, slots, options = change(query, key, value, slots, options)
        return real(query, key, value, slots, **options)

    monkeypatch.setattr(foreword.interface, "attend", broken)


def test_a_dropped_prefix_is_seen(monkeypatch: pytest.MonkeyPatch):
    def drop(q, k, v, slots, options):
        return q, k, v, Slots(slots.keys[:, :, :0], slots.values[:, :, :0], None), options

    _break_attend(monkeypatch, drop)
    assert {2, 7, 8, 10} <= _failed()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_ignored_gate_is_seen(monkeypatch: pytest.MonkeyPatch, name: str):
    def forget(q, k, v, slots, options):
        return q, k, v, slots._replace(gate=None), options

    _break_attend(monkeypatch, forget)
    assert {2, 7, 8} <= _failed(name, gates="apt")


def test_a_gate_on_values_alone_is_seen(monkeypatch: pytest.MonkeyPatch):
    def forget(q, k, v, slots, options):
        if slots.gate is not None:
            values = slots.values * slots.gate.transpose(2, 3)[:, :, :, :1]
            slots = slots._replace(values=values, gate=None)
        return q, k, v, slots, options

    _break_attend(monkeypatch, forget)
    assert {2, 8} <= _failed("bert", gates="apt")


def test_gates_of_another_row_are_seen(monkeypatch: pytest.MonkeyPatch):
    real = foreword.bank.PerRow._gate

    def swapped(self, stack, rows, width, given, site):
        return real(self, stack, rows.flip(0), width, given, site)

    monkeypatch.setattr(foreword.bank.PerRow, "_gate", swapped)
    assert 5 in _failed("bert", gates="apt")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gates_that_read_padding_are_seen(monkeypatch: pytest.MonkeyPatch, name: str):
    real = Attachment._prompt

    def forget(self, given, args, kwargs):
        found, *rest = real(self, given, args, kwargs)
        return None if given is None else found, *rest

    monkeypatch.setattr(Attachment, "_prompt", forget)
    report = check(tiny_model(name), lines=[4], gates="apt", gate_pooling="prompt")
    assert report.lines[0].detail.startswith("dynamic cache, row 0")
    assert "row 2" not in report.lines[0].detail.split(";")[1]


def test_a_wrong_scale_is_seen(monkeypatch: pytest.MonkeyPatch):
    def scale(q, k, v, slots, options):
        return q, k, v, slots._replace(keys=slots.keys * 1.01), options

    _break_attend(monkeypatch, scale)
    assert 2 in _failed()


def test_an_ignored_slot_bias_is_seen(monkeypatch: pytest.MonkeyPatch):
    def forget(q, k, v, slots, options):
        return q, k, v, slots._replace(bias=None), options

    _break_attend(monkeypatch, forget)
    assert {5, 8} <= _failed()


def test_a_forgotten_text_mask_is_seen(monkeypatch: pytest.MonkeyPatch):
    def forget(q, k, v, slots, options):
        return q, k, v, slots, {**options, "mask": None}

    _break_attend(monkeypatch, forget)
    assert {3, 4} <= _failed()


def test_a_detached_prefix_is_seen(monkeypatch: pytest.MonkeyPatch):
    def detach(q, k, v, slots, options):
        return q, k, v, slots._replace(values=slots.values.detach()), options

    _break_attend(monkeypatch, detach)
    assert _failed() == {7}


def test_a_row_that_reads_its_neighbour_is_seen(monkeypatch: pytest.MonkeyPatch):
    real = PerRow.slots

    def leak(self, site, query, given):
        self.rows = self.rows.roll(1) if site.layer == 1 else self.rows
        return real(self, site, query, given)

    monkeypatch.setattr(PerRow, "slots", leak)
    assert _failed() == {4, 5}


def test_packed_texts_that_read_each_others_prefix_are_seen(monkeypatch: pytest.MonkeyPatch):
    real = PerToken.slots

    def leak(self, site, query, given):
        slots = real(self, site, query, given)
        return slots if slots is None else slots._replace(bias=None)

    monkeypatch.setattr(PerToken, "slots", leak)
    assert _failed() == {3}


def test_a_prefix_that_takes_positions_is_seen(monkeypatch: pytest.MonkeyPatch):
    def shift(self, ids, args, kwargs):
        if self._bound is None or not self._bound.sites or "position_ids" in kwargs:
            return args, kwargs
        return args, {**kwargs, "position_ids": torch.arange(5, 5 + kwargs["input_ids"].shape[1])[None]}

    monkeypatch.setattr(Attachment, "_shift_positions", shift)
    assert 10 in _failed("gpt2")
    assert 10 in _failed("llama")


def test_a_prefix_behind_the_window_is_seen(monkeypatch: pytest.MonkeyPatch):
    def evict(q, k, v, slots, options):
        hidden = torch.zeros(q.shape[2], slots.keys.shape[2])
        hidden[6:] = float("-inf")  # tokens past the window no longer see the prefix
        bias = hidden if slots.bias is None else slots.bias + hidden
        return q, k, v, slots._replace(bias=bias[None, None] if bias.dim() == 2 else bias), options

    _break_attend(monkeypatch, evict)
    assert 9 in _failed("mistral")


def test_a_softcap_that_spares_the_prefix_is_seen(monkeypatch: pytest.MonkeyPatch):
    def bend(q, k, v, slots, options):
        return q, k, v, slots, {**options, "softcap": None}

    _break_attend(monkeypatch, bend)
    assert {2, 9} <= _failed("gemma2")


def test_a_sink_that_is_counted_twice_is_seen(monkeypatch: pytest.MonkeyPatch):
    def twice(q, k, v, slots, options):
        return q, k, v, slots, {**options, "sinks": options["sinks"] + 0.693}

    _break_attend(monkeypatch, twice)
    assert 2 in _failed("gpt_oss")


def test_a_position_bias_that_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch):
    """Line 2 reads relative models without their bias; a row without a prefix beside another tells."""

    def lose(q, k, v, slots, options):
        return q, k, v, slots, {**options, "position_bias": None}

    _break_attend(monkeypatch, lose)
    assert 5 in _failed("t5")
    assert 5 in _failed("deberta-v2")


def test_a_fold_that_rounds_is_seen(monkeypatch: pytest.MonkeyPatch):
    real = foreword.parametrization.PrefixModule.fold

    def rounded(self, keep_training_state=False):
        prefix = real(self, keep_training_state)
        prefix.sites = {site: tensors.map(lambda t: t.bfloat16().float()) for site, tensors in prefix.sites.items()}
        return prefix

    monkeypatch.setattr(foreword.parametrization.PrefixModule, "fold", rounded)
    assert _failed() == {8}


def test_layers_recomputed_without_the_prefix_are_seen(monkeypatch: pytest.MonkeyPatch):
    import contextlib

    monkeypatch.setattr(Attachment, "_recomputed_alike", lambda self: contextlib.nullcontext())
    assert _failed("deberta-v2") == {6}


def test_a_changed_model_is_seen(monkeypatch: pytest.MonkeyPatch):
    real = foreword.interface.sdpa_attention_forward

    def careless(module, query, key, value, mask, **options):
        return real(module, query * 1.0001, key, value, mask, **options)

    monkeypatch.setattr(foreword.interface, "sdpa_attention_forward", careless)
    assert 1 in _failed()


def test_an_error_fails_its_line_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def refuse(self, site, query, given):
        raise RuntimeError("broken on purpose\nand more")

    monkeypatch.setattr(PerRow, "slots", refuse)
    report = check(tiny_model("llama"), lines=[2, 5, 7])
    assert [line.status for line in report.lines] == ["pass", "fail", "pass"]
    assert report.lines[1].detail == "RuntimeError: broken on purpose"
    assert not report.passed


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    inputs = tiny_inputs("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward, implementation = model.forward, model.config._attn_implementation
    check(model)
    assert attachment_of(model) is None
    assert model.forward == forward
    assert model.config._attn_implementation == implementation
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(**inputs).logits.requires_grad


def test_resident_prefixes_stay_resident():
    base = tiny_base("llama")
    sites = {site: SiteTensors(torch.ones(h, 2, k), torch.ones(h, 2, v)) for site, (h, k, v) in base.geometry.items()}
    prefix = Prefix(sites, base.name, base.fingerprint)
    base.attachment.bank.add("mine", prefix)
    base.attachment.default = 1
    ids = tiny_inputs("llama")["input_ids"]
    before = base.model(ids).logits
    assert check(base, lines=[1, 4, 5]).passed
    assert list(base.attachment.bank.names) == ["mine"]
    assert torch.equal(base.model(ids).logits, before)


def test_a_prefix_in_training_is_not_disturbed():
    base = tiny_base("llama")
    sites = {site: SiteTensors(torch.ones(h, 2, k), torch.ones(h, 2, v)) for site, (h, k, v) in base.geometry.items()}
    model = attach(tiny_model("llama"), Prefix(sites, "", base.fingerprint), trainable=True)
    with pytest.raises(PrefixError, match="being trained"):
        check(model)


def test_lines_are_chosen_and_progress_is_told():
    told: list[tuple[int, int]] = []
    report = check(tiny_model("bert"), lines=(5, 1), progress=lambda done, total: told.append((done, total)))
    assert [line.number for line in report.lines] == [1, 5]
    assert told == [(0, 2), (1, 2), (2, 2)]
    with pytest.raises(ConfigError, match="from 1 to 10"):
        check(tiny_model("bert"), lines=[11])


def test_seeds_draw_other_texts_with_the_same_verdict():
    reports = [check(tiny_model("llama"), lines=[2, 5], seed=seed) for seed in (0, 0, 7)]
    assert reports[0] == reports[1]
    assert all(report.passed for report in reports)
    assert reports[0].lines != reports[2].lines


def test_the_report_is_text_table_and_data():
    lines = (
        Line(1, "first", "pass", 0.0, ""),
        Line(4, "fourth", "n/a", None, "an encoder"),
        Line(5, "fifth", "fail", 0.25, "row 1: error 2.5e-01"),
    )
    report = Report("tiny", "float32", 1e-5, lines)
    text = report.table()
    assert " 5  fail  2.5e-01  fifth" in text
    assert "an encoder" in text
    assert text.endswith("1 passed, 1 failed, 1 not applicable")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["passed"] is False
    assert data["lines"][1] == {"number": 4, "title": "fourth", "status": "n/a", "error": None, "detail": "an encoder"}
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(report)
    assert "fifth" in console.export_text()


def test_every_line_of_the_contract_is_numbered():
    assert list(CONTRACT) == list(range(1, 11))
