"""The exactness contract as a function: ten properties of prefixes, checked on a model as it is.

Every line runs random texts and random prefixes, of the mean and spread of the model's own keys and values,
through the model. "Equal" means within 1e-5 of the largest expected value in float32. In half precision it means
within three times the largest error that the untouched model itself has against float32, seen on eight texts: two
ways of rounding the same sums differ by twice their error, and the largest one is an estimate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from foreword.attention import Attachment, attachment_of
from foreword.base import BaseModel
from foreword.conform import deciding, reading
from foreword.conform.report import Line, Report
from foreword.conform.subject import Checks, NotApplicable, Subject
from foreword.errors import ConfigError, PrefixError
from foreword.gates import GateOptions

__all__ = ["CONTRACT", "Line", "Report", "check"]

TOLERANCE = 1e-5

CONTRACT: dict[int, tuple[str, Callable[[Subject, Checks], None]]] = {
    1: ("an empty prefix changes no logit, bit for bit", reading.empty_prefix),
    2: ("a prefix made of text X, then Y, equals X + Y", reading.text_as_prefix),
    3: ("padded equals unpadded; packed equals separate", reading.padding_and_packing),
    4: ("decoding with a cache equals recomputing, beams and static cache too", deciding.decoding),
    5: ("a batch of mixed prefixes equals each row alone", reading.mixed_batch),
    6: ("gradients with checkpointing equal plain ones", deciding.checkpointing),
    7: ("one step moves every prefix tensor and no base weight", deciding.one_step),
    8: ("folded equals unfolded; mass 0 equals the slot removed", deciding.folding),
    9: ("past a sliding window the prefix is still seen", reading.sliding_window),
    10: ("full context still fits: a prefix costs no position", reading.full_context),
}


def check(
    target: BaseModel | Any,
    *,
    lines: Iterable[int] | None = None,
    seed: int = 0,
    gates: str = "none",
    gate_pooling: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check the exactness contract on a model: a `BaseModel`, a `transformers` model, or a name to load (float32).

    `lines` chooses among the ten; `seed` draws other texts and prefixes; `gates` (none, apt, static, mass) and what apt
    gates read (`gate_pooling`) say which prefixes are used; `progress` is called with (lines done, lines in all). A
    line that fails, or breaks off with an error, is reported, not raised. The model is left as it was. Raises
    `UnsupportedModel` for a model that cannot be prefixed, `ConfigError` for gates that it cannot have.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> report = check(LlamaForCausalLM(LlamaConfig(**sizes)), lines=[1, 5])
    >>> report.passed, [line.status for line in report.lines]
    (True, ['pass', 'pass'])
    """
    chosen = sorted(CONTRACT if lines is None else set(lines))
    if not CONTRACT.keys() >= set(chosen):
        raise ConfigError(f"lines {chosen}", f"numbers from 1 to {len(CONTRACT)}", "leave the others out")
    options = GateOptions(gates, pooling=gate_pooling)
    base = BaseModel.load(target, dtype="float32") if isinstance(target, str) else target
    name = base.name if isinstance(base, BaseModel) else base.config.name_or_path or type(base).__name__
    model: Any = base.model if isinstance(base, BaseModel) else base
    found = []
    with _prepared(model) as attachment:
        for site in attachment.geometry:
            options.pooling_at(site, {each.stack for each in attachment.geometry})
        tolerance = _tolerance(Subject(model, attachment, seed))
        for done, number in enumerate(chosen):
            if progress is not None:
                progress(done, len(chosen))
            found.append(_line(number, Subject(model, attachment, seed + number, options), tolerance))
    if progress is not None:
        progress(len(chosen), len(chosen))
    return Report(name, str(model.dtype).removeprefix("torch."), tolerance, tuple(found))


@contextlib.contextmanager
def _prepared(model: Any) -> Iterator[Attachment]:
    """Inside, the model is attached, frozen and in eval mode, without a default prefix."""
    before = attachment_of(model)
    if before is not None and before.module is not None:
        raise PrefixError("the model's prefix is being trained", "a model that is not", "detach it first")
    modes = [(module, module.training) for module in model.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attachment = before or Attachment(model)
    default, attachment.default = attachment.default, 0
    try:
        model.eval().requires_grad_(False)
        yield attachment
    finally:
        attachment.default = default
        for module, mode in modes:
            module.training = mode
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)
        if before is None:
            attachment.undo()


def _line(number: int, subject: Subject, tolerance: float) -> Line:
    title, function = CONTRACT[number]
    checks = Checks(tolerance)
    try:
        # Not inference mode: some lines need gradients, which they switch on.
        with torch.no_grad():
            function(subject, checks)
    except NotApplicable as reason:
        return Line(number, title, "n/a", None, str(reason))
    except Exception as error:  # a contract that breaks off is broken
        message = str(error).strip().partition("\n")[0]
        return Line(number, title, "fail", checks.error, f"{type(error).__name__}: {message}")
    if checks.failed:
        more = f" and {len(checks.failed) - 3} more" if len(checks.failed) > 3 else ""
        return Line(number, title, "fail", checks.error, "; ".join(checks.failed[:3]) + more)
    return Line(number, title, "pass", checks.error, "; ".join(checks.notes))


def _tolerance(subject: Subject) -> float:
    """1e-5 in float32; in half precision three times the untouched model's own error against float32."""
    if subject.model.dtype not in (torch.float16, torch.bfloat16):
        return TOLERANCE
    inputs = subject.inputs(8)
    trial = Checks(0.0)
    with torch.no_grad(), subject.attachment.suspended():
        rough = subject.logits(inputs)
        with _in_float32(subject.model):
            full = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
            trial.equal("", rough, subject.logits(full))
    return max(TOLERANCE, 3 * (trial.error or 0.0))


@contextlib.contextmanager
def _in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the weights are the same numbers in float32."""
    held = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    try:
        for tensor, data in held:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data
