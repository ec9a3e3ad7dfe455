"""Lines 4, 6, 7 and 8 of the contract: generation, gradients, training steps and folding."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from foreword.conform.subject import Checks, Inputs, NotApplicable, Subject, rows
from foreword.parametrization import parametrize
from foreword.prefix import Prefix, Sites, SiteTensors, compact

__all__ = ["checkpointing", "decoding", "folding", "one_step"]

NEW_TOKENS = 6


def decoding(subject: Subject, checks: Checks) -> None:
    """Line 4: greedy steps and beams with a cache equal recomputing the whole row, in a batch of mixed prefixes."""
    if subject.kind == "encoder":
        raise NotApplicable("an encoder writes nothing and keeps no cache")
    owners: list[Sites | None] = [subject.sites(3), None, subject.sites(5, ragged=True)]
    inputs = _prompts(subject, len(owners))
    with _own_generation(subject), subject.resident(owners) as ids:
        for cache in ("dynamic", "static"):
            options = {"cache_implementation": "static"} if cache == "static" else {}
            if options and not _runs(subject, inputs, options):
                checks.note("the model itself has no static cache")
                continue
            made = _generate(subject, inputs, prefix_ids=ids, output_logits=True, **options)
            _compare_steps(subject, checks, f"{cache} cache", made, inputs, owners)
        beams = {"num_beams": 3, "length_penalty": 0.0, "output_scores": True}
        together = _generate(subject, inputs, prefix_ids=ids, **beams)
        _compare_beams(subject, checks, together, inputs, owners)
        for row, sites in enumerate(owners):
            with subject.attachment.bound(sites or {}):
                alone = _generate(subject, _unpadded(inputs, row), **beams)
            best = together.sequences_scores[row : row + 1]
            checks.equal(f"beams of row {row} alone", alone.sequences_scores, best, scale=_scale(made))


def _prompts(subject: Subject, batch: int) -> Inputs:
    """Prompts of different length: padded left for decoders, right for encoders."""
    size = subject.tokens
    inputs = subject.inputs(batch, size, 1)
    inputs.pop("decoder_input_ids", None)
    if subject.reads_text:
        # The padded row is one that has a prefix, whose gates must not read the padding.
        mask = torch.arange(size)[None] < torch.tensor([size - 2 * (row == 0) for row in range(batch)])[:, None]
        mask = mask.flip(1) if subject.kind == "decoder" else mask
        inputs["attention_mask"] = mask.long().to(subject.model.device)
        inputs["input_ids"] = inputs["input_ids"].masked_fill(~mask.to(subject.model.device), _pad(subject))
    return inputs


def _pad(subject: Subject) -> int:
    return int(getattr(subject.config, "pad_token_id", None) or 0)


def _unpadded(inputs: Inputs, row: int) -> Inputs:
    one = rows(inputs, row)
    if "attention_mask" in one:
        seen = one["attention_mask"][0].bool()
        one = {name: value[:, seen] if value.dim() == 2 else value for name, value in one.items()}
    return one


@contextlib.contextmanager
def _own_generation(subject: Subject) -> Iterator[None]:
    """Inside, the model has no generation habits of its own, and no end token."""
    stored = subject.model.generation_config
    subject.model.generation_config = type(stored)(pad_token_id=_pad(subject))
    try:
        yield
    finally:
        subject.model.generation_config = stored


def _start(subject: Subject) -> int:
    start = getattr(subject.config, "decoder_start_token_id", None)
    return int(start if start is not None else _pad(subject))


def _generate(subject: Subject, inputs: Inputs, **options: Any) -> Any:
    """`generate` of transformers itself, also where a model (Whisper) wraps it."""
    mixin = next(cls for cls in type(subject.model).__mro__ if cls.__name__ == "GenerationMixin")
    if subject.kind == "encoder-decoder":
        options["decoder_start_token_id"] = _start(subject)
    return mixin.generate(  # type: ignore[attr-defined]
        subject.model, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True,
        disable_compile=True, **options,
    )  # fmt: skip


def _runs(subject: Subject, inputs: Inputs, options: dict[str, Any]) -> bool:
    """Whether the untouched model can generate so."""
    with subject.attachment.suspended():
        try:
            _generate(subject, inputs, **options)
        except Exception:  # whatever it is, it is the model's own
            return False
    return True


def _recomputed(subject: Subject, inputs: Inputs, row: int, written: Tensor, sites: Sites | None) -> Tensor:
    """The logits `[steps, vocab]` that chose each written token, from one pass without a cache."""
    one = _unpadded(inputs, row)
    if subject.kind == "decoder":
        prompt = one["input_ids"].shape[1]
        ids = torch.cat([one["input_ids"], written[None, :-1]], 1)
        mask = torch.arange(ids.shape[1], device=ids.device)[None] < prompt
        one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_mask": mask}
    else:
        start = torch.full_like(written[None, :1], _start(subject))
        one["decoder_input_ids"] = torch.cat([start, written[None, :-1]], 1)
    return subject.with_sites(sites or {}, one)[0, -len(written) :]


def _compare_steps(
    subject: Subject, checks: Checks, what: str, made: Any, inputs: Inputs, owners: list[Sites | None]
) -> None:
    logits = torch.stack(made.logits, 1)
    written = made.sequences[:, -NEW_TOKENS:]
    for row, sites in enumerate(owners):
        checks.equal(f"{what}, row {row}", logits[row], _recomputed(subject, inputs, row, written[row], sites))
        checks.true(f"{what}, row {row}: the likeliest token", bool((logits[row].argmax(-1) == written[row]).all()))


def _compare_beams(subject: Subject, checks: Checks, made: Any, inputs: Inputs, owners: list[Sites | None]) -> None:
    """The score of every best beam against the likelihood of its tokens."""
    written = made.sequences[:, -NEW_TOKENS:]
    for row, sites in enumerate(owners):
        logits = _recomputed(subject, inputs, row, written[row], sites).float()
        score = logits.log_softmax(-1).gather(1, written[row][:, None]).sum()
        checks.equal(f"beams, row {row}", made.sequences_scores[row], score, scale=float(logits.abs().max()))


def _scale(made: Any) -> float:
    """The size of the logits that scores are sums of."""
    return float(torch.stack(made.logits).abs().max())


def _leaves(sites: Sites) -> Sites:
    return {site: tensors.map(lambda t: t.detach().clone().requires_grad_()) for site, tensors in sites.items()}


def _loss(subject: Subject, sites: Sites, inputs: Inputs, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A loss to which every logit contributes, and the weights of the logits in it."""
    with torch.enable_grad(), subject.attachment.bound(sites):
        logits = subject.logits(inputs).float()
        weight = torch.randn(logits.shape, generator=subject.generator).to(logits) if weight is None else weight
        return (logits * weight).mean(), weight


def checkpointing(subject: Subject, checks: Checks) -> None:
    """Line 6: gradients with recomputed layers equal those with kept ones, in training mode, dropout included."""
    if not getattr(subject.model, "supports_gradient_checkpointing", False):
        raise NotApplicable("the model has no gradient checkpointing")
    inputs, sites = subject.inputs(), subject.sites(4)
    with torch.no_grad():
        weight = _loss(subject, sites, inputs)[1]
    modes = [(module, module.training) for module in subject.model.modules()]
    subject.model.train()
    try:
        want = _gradients(subject, _leaves(sites), inputs, weight)
        for reentrant in (False, True):
            with _recomputing(subject.model, reentrant):
                got = _gradients(subject, _leaves(sites), inputs, weight)
            for site, tensors in want.items():
                for name, gradient in tensors.items():
                    what = f"{name} at {site}, {'' if reentrant else 'non-'}reentrant"
                    checks.equal(what, got[site][name], gradient)
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _recomputing(model: Any, reentrant: bool) -> Iterator[None]:
    """Inside, layers keep no activations; by the name that this transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
    layers = [module for module in model.modules() if "_gradient_checkpointing_func" in module.__dict__]
    functions = [layer.__dict__["_gradient_checkpointing_func"] for layer in layers]
    try:
        for layer, function in zip(layers, functions, strict=True):
            layer.__dict__["_gradient_checkpointing_func"] = functools.partial(_requiring, function)
        yield
    finally:
        for layer, function in zip(layers, functions, strict=True):
            layer.__dict__["_gradient_checkpointing_func"] = function
        getattr(model, f"{name}_checkpointing_disable")()


def _requiring(checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
    """A checkpointed layer; reentrant checkpointing asks for one input with a gradient, and a frozen base has none."""
    if args and torch.is_tensor(args[0]) and not args[0].requires_grad:  # the hidden states
        args = (args[0].detach().requires_grad_(), *args[1:])
    return checkpoint(layer, *args)


def _gradients(subject: Subject, sites: Sites, inputs: Inputs, weight: Tensor) -> dict[Any, dict[str, Tensor]]:
    """The gradient at every site, under the same dropout each time."""
    devices = [subject.model.device] if subject.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(1)
        _loss(subject, sites, inputs, weight)[0].backward()
    empty = torch.zeros(())
    return {
        site: {name: _grad(tensor, empty) for name, tensor in tensors.named().items()}
        for site, tensors in sites.items()
    }


def _grad(tensor: Tensor, empty: Tensor) -> Tensor:
    return empty if tensor.grad is None else tensor.grad


def one_step(subject: Subject, checks: Checks) -> None:
    """Line 7: after one step every key, value and gate of every slot has moved, and no weight of the base has."""
    inputs, sites = subject.inputs(), _leaves(subject.sites(4))
    state = {**dict(subject.model.named_parameters()), **dict(subject.model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    started = {site: tensors.map(lambda t: t.detach().clone()) for site, tensors in sites.items()}
    base = [p for p in subject.model.parameters() if p.requires_grad]
    _loss(subject, sites, inputs)[0].backward()
    leaves = [tensor for site in sites.values() for tensor in site.named().values()]
    groups: list[dict[str, Any]] = [{"params": [tensor], "lr": _rate(tensor)} for tensor in leaves]
    torch.optim.SGD([*groups, {"params": base}] if base else groups, lr=0.1).step()
    for site, tensors in sites.items():
        for name, then in started[site].named().items():
            moved = tensors.named()[name].detach().ne(then)
            if name != "log_mass":
                moved = moved.any(0 if name == "gate_weight" else -1)
            moved = moved.float()
            checks.worst(f"{name} at {site}: share of slots that stayed", float(1 - moved.mean()), 0.0)
    for name, tensor in state.items():
        checks.true(f"{name} stays", torch.equal(tensor.detach(), before[name]))
        tensor.grad = None


def _rate(tensor: Tensor) -> float:
    """A step of a tenth of the tensor's own size, so that its small gradients show in float32 too."""
    if tensor.grad is None or not float(tensor.grad.abs().max()):
        return 1.0
    return 0.1 * float(tensor.detach().abs().max() / tensor.grad.abs().max())


def folding(subject: Subject, checks: Checks) -> None:
    """Line 8: a folded reparametrization, a slot of mass 0 cut out, and keeping all slots change nothing."""
    inputs, sites, plain = subject.inputs(), subject.sites(4), subject.sites(4, gated=False)
    for kind in ("direct", "mlp"):
        module = parametrize(
            Prefix(plain, "", ""), kind, gates=subject.gates, hidden_sizes=subject.attachment.hidden_sizes
        ).to(subject.model.device)
        if kind == "direct" and subject.gates.kind in ("apt", "static"):
            want = subject.with_sites(plain, inputs)
            checks.equal("gates as they begin", subject.with_sites(module(), inputs), want)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=subject.generator).to(parameter)
                parameter.add_(noise * 0.1 * parameter.std().nan_to_num(0.0))
        want = subject.with_sites(module(), inputs)
        checks.equal(f"{kind}, folded", subject.with_sites(module.fold().sites, inputs), want, exact=True)
    want = subject.with_sites(sites, inputs)
    everything = {site: torch.ones(tensors.length, dtype=torch.bool) for site, tensors in sites.items()}
    checks.equal("all slots kept", subject.with_sites(compact(sites, everything), inputs), want, exact=True)
    even = {site: keep & (torch.arange(len(keep)) % 2 == 0) for site, keep in everything.items()}
    gated = {site: _masses(tensors, even[site]) for site, tensors in sites.items()}
    removed = subject.with_sites(compact(sites, even), inputs)
    checks.equal("mass 0 and the slot removed", subject.with_sites(gated, inputs), removed)
    checks.true("the removed slots mattered", checks.differs(removed, want))
    gone = {site: _masses(tensors, torch.zeros_like(even[site])) for site, tensors in sites.items()}
    checks.equal("mass 0 everywhere", subject.with_sites(gone, inputs), subject.logits(inputs))
    with subject.resident([gated] * len(want)) as ids:
        checks.equal("mass 0 in the bank", subject.logits(inputs, prefix_ids=ids), removed)


def _masses(tensors: SiteTensors, keep: Tensor) -> SiteTensors:
    mass = tensors.keys.new_zeros(tensors.length) if tensors.log_mass is None else tensors.log_mass
    return tensors._replace(log_mass=mass.masked_fill(~keep.to(mass.device), float("-inf")))
