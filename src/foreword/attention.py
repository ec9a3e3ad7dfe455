"""Brings prefixes into a `transformers` model: attach and detach.

A forward pass carries one `Pass` (see `foreword.bank`) in the argument `prefix_ids` to every attention module, where
the attention function of `foreword.interface` reads it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foreword.bank import NO_PREFIX, Bank, Call, Pass, Shared
from foreword.errors import PrefixError, PrefixMismatch, UnsupportedModel
from foreword.families import Family, adapter_of, family_of, find_sites
from foreword.families.inputs import default_positions, smallest_inputs
from foreword.fingerprint import fingerprint
from foreword.gates import check_poolings
from foreword.interface import ATTRIBUTE, EAGER, SDPA, Binding, attend_adapted, seen_tokens
from foreword.parametrization import PrefixModule, parametrize
from foreword.prefix import Geometry, Prefix, Site, Sites, SiteShape

__all__ = ["Attachment", "attach", "attachment_of", "detach", "prefix_ids"]


class Attachment:
    """What Foreword holds on an attached model: its sites, its bank, and what the next forward pass reads.

    Made by `attach`; undone by `detach`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.family: Family = family_of(model.config)
        self.default = 0
        self.module: PrefixModule | None = None
        self.recorded: dict[Site, tuple[Tensor, Tensor]] | None = None
        self.seen_gates: dict[Site, Tensor] | None = None
        self.hidden_sizes: dict[Site, int] = {}
        self._bound: Call | None = None
        self._current: Pass | None = None
        self._undo: list[Callable[[], None]] = []
        try:
            self._bind_modules()
            self._switch_attention()
            self._wrap_forward()
            self.geometry: Geometry = self._measure()
        except BaseException:
            self.undo()
            raise
        self.bank = Bank(self.geometry, model.dtype, model.device)

    def resolve(self, prefix_ids: Tensor | Pass | None) -> Pass:
        """The pass that an attention module is in: its argument, else the running one, else one of its own."""
        if prefix_ids is not None and not isinstance(prefix_ids, Tensor):
            return prefix_ids
        if prefix_ids is None and self._current is not None:
            return self._current
        return Pass(self.call(prefix_ids))

    def call(self, prefix_ids: Tensor | None) -> Call:
        """What a forward pass with these ids reads: bound sites, the trained module, the named rows, or the default."""
        if prefix_ids is not None and not hasattr(self, "bank"):
            raise PrefixError("no prefix is attached", "a prefix for every id", "attach prefixes first")
        if self._bound is not None:
            return self._bound
        if self.module is not None and (prefix_ids is None or bool(prefix_ids.all())):
            return Shared(self.module())
        if prefix_ids is None:
            return Shared(self.bank.entry(self.default)) if self.default else NO_PREFIX
        return self.bank.call(prefix_ids)

    @contextlib.contextmanager
    def bound(self, sites: Sites | Call) -> Iterator[None]:
        """Inside, all rows read `sites`, differentiably, or every pass reads what a call says."""
        before, self._bound = self._bound, Shared(sites) if isinstance(sites, dict) else sites
        try:
            yield
        finally:
            self._bound = before

    @contextlib.contextmanager
    def recording(self) -> Iterator[dict[Site, tuple[Tensor, Tensor]]]:
        """Inside, no prefix is read, and the text's keys and values `[batch, kv_heads, tokens, dim]` are kept."""
        before, self.recorded = self.recorded, {}
        try:
            with self.bound({}):
                yield self.recorded
        finally:
            self.recorded = before

    @contextlib.contextmanager
    def recording_gates(self) -> Iterator[dict[Site, Tensor]]:
        """Inside, the gates α `[batch or 1, tokens or 1, prefix]` that a pass reads are kept, by site."""
        before, self.seen_gates = self.seen_gates, {}
        try:
            yield self.seen_gates
        finally:
            self.seen_gates = before

    def __deepcopy__(self, _: dict[int, Any]) -> Attachment:
        raise PrefixError(
            f"an attached {type(self.model).__name__} cannot be copied",
            "a model without prefixes",
            "detach it first, then attach it and the copy",
        )

    def undo(self) -> None:
        """Restore the model exactly."""
        while self._undo:
            self._undo.pop()()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, the model is what it was before it was attached; not for a prefix in training."""
        self.undo()
        try:
            yield
        finally:
            self._bind_modules()
            self._switch_attention()
            self._wrap_forward()

    def _set(self, target: Any, name: str, value: Any) -> None:
        """Set an instance attribute and remember how to take it back."""
        missing = object()
        before = target.__dict__.get(name, missing)
        target.__dict__[name] = value

        def restore() -> None:
            if before is missing:
                target.__dict__.pop(name, None)
            else:
                target.__dict__[name] = before

        self._undo.append(restore)

    def _bind_modules(self) -> None:
        served: dict[nn.Module, list[Site]] = {}
        for site, module in find_sites(self.model, self.family):
            served.setdefault(module, []).append(site)
        if not served:
            raise UnsupportedModel(
                f"no attention site found in {type(self.model).__name__}",
                f"modules like {list(self.family.places.values())}",
                "pass the model itself, not a part or a wrapper of it",
            )
        adapter = adapter_of(self.family)
        for module, sites in served.items():
            binding = Binding(self, sites)
            self._set(module, ATTRIBUTE, binding)
            self._undo.append(module.register_forward_pre_hook(binding, with_kwargs=True).remove)
            if adapter is not None:
                self._set(module, "forward", adapter(module, functools.partial(attend_adapted, module)))
        self._set(self.model, ATTRIBUTE, Binding(self, []))
        self._bindings = [module.__dict__[ATTRIBUTE] for module in served]

    def _switch_attention(self) -> None:
        self._configs: list[Any] = []
        if self.family.own_adapter:
            return
        configs = {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}
        for config in configs.values():
            implementation = config._attn_implementation
            if implementation in (SDPA, EAGER):
                raise UnsupportedModel(
                    f"{type(self.model).__name__} has the configuration object of an attached model, or a copy of it",
                    "a configuration of its own",
                    "detach that model first",
                )
            eager = implementation == "eager" or not self.model._supports_sdpa
            if eager and getattr(config, "reorder_and_upcast_attn", False):
                raise UnsupportedModel("this GPT-2 reorders and upcasts its attention", "a model that does not")
            self._set(config, "_attn_implementation_internal", EAGER if eager else SDPA)
            self._configs.append(config)

    def _check_switched(self) -> None:
        """Raise `PrefixError` if somebody has since given the model another attention, which reads no prefix."""
        for config in self._configs:
            if config._attn_implementation not in (SDPA, EAGER):
                raise PrefixError(
                    f"the attention of the attached model was changed to {config._attn_implementation!r}",
                    "the attention that it was attached with",
                    "choose the attention before attaching",
                )

    def _wrap_forward(self) -> None:
        original = self.model.forward

        @functools.wraps(original)
        def forward(
            *args: Any, prefix_ids: Tensor | None = None, prompt_mask: Tensor | None = None, **kwargs: Any
        ) -> Any:
            self._check_switched()
            call = self.call(prefix_ids)
            running = Pass(call, *self._prompt(prompt_mask, args, kwargs)) if call.reads_prompt else Pass(call)
            args, kwargs = self._shift_positions(prefix_ids, args, kwargs)
            for binding in self._bindings:
                binding.turn = 0
            before, self._current = self._current, running
            try:
                if self.family.own_adapter:
                    with self._recomputed_alike():
                        return original(*args, **kwargs)
                output = original(*args, prefix_ids=running, **kwargs)
                if running.kept:  # a cache that the model made itself goes on with the prompt's gates too
                    _keep_with(output, running.kept)
                return output
            finally:
                self._current = before

        signature = inspect.signature(original)
        parameters = list(signature.parameters.values())
        place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        parameters[place:place] = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
            for name in ("prefix_ids", "prompt_mask")
        ]
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        self._set(self.model, "forward", forward)

    def _prompt(
        self, given: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, dict[Site, Tensor] | None, bool]:
        """The prompt's tokens bool `[batch, tokens]`, what is kept of the prompt, and whether a cache stands for it.

        Without `prompt_mask` the prompt is all that the pass which begins a cache reads, but its padding.
        """
        if self.family.kind != "decoder":
            return None, None, False
        inputs = self._arguments(args, kwargs)
        cache = inputs.get("past_key_values")
        kept: dict[Site, Tensor] = {} if cache is None else cache.__dict__.setdefault(ATTRIBUTE, {})
        goes_on = cache is not None and bool(cache.get_seq_length())
        if not goes_on and given is None:
            given = _unpadded(inputs)
        return None if given is None else given.bool(), kept, goes_on

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The forward's arguments by name."""
        names = inspect.signature(self.model.forward).parameters
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def reading_alike(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """The same layer, which reads what the running forward pass reads also when a backward computes it again."""
        running = self._current

        def again(*inputs: Any, **options: Any) -> Any:
            before, self._current = self._current, running
            try:
                return layer(*inputs, **options)
            finally:
                self._current = before

        return again

    @contextlib.contextmanager
    def _recomputed_alike(self) -> Iterator[None]:
        """Inside, checkpointed layers are set up to read the same when a later backward recomputes them."""
        layers = [m for m in self.model.modules() if "_gradient_checkpointing_func" in m.__dict__]
        functions = [layer.__dict__["_gradient_checkpointing_func"] for layer in layers]

        def checkpointed(function: Callable[..., Any], layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return function(self.reading_alike(layer), *args, **kwargs)

        try:
            for layer, function in zip(layers, functions, strict=True):
                layer.__dict__["_gradient_checkpointing_func"] = functools.partial(checkpointed, function)
            yield
        finally:
            for layer, function in zip(layers, functions, strict=True):
                layer.__dict__["_gradient_checkpointing_func"] = function

    def _shift_positions(
        self, ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward's arguments with text positions moved by the prefix's position offset, where it is not 0."""
        if self._bound is not None or not hasattr(self, "bank"):
            return args, kwargs
        device = self.model.device
        rows = torch.tensor([self.default], device=device) if ids is None else ids.to(device)
        offsets = self.bank.offsets(rows)
        if offsets is None:
            return args, kwargs
        given = self._arguments(args, kwargs)
        positions = given.get("position_ids")
        if positions is None:
            positions = default_positions(self.model, given)
        return (), {**given, "position_ids": positions + (offsets if offsets.dim() == 2 else offsets[:, None])}

    def _measure(self) -> Geometry:
        """The shapes at every site, from two tokens through the model; proves that every site is reached."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with torch.no_grad(), self.recording() as recorded:
                self.model(**smallest_inputs(self.model, self.family.kind))
        finally:
            for module, mode in modes:
                module.training = mode
        sites = [site for binding in self._bindings for site in binding.sites]
        missing = [str(site) for site in sites if site not in recorded]
        if missing:
            raise UnsupportedModel(
                f"{type(self.model).__name__} does not pass {', '.join(missing)} through the attention interface",
                "a model of transformers with that interface",
            )
        order = sorted(sites, key=lambda site: (list(self.family.places).index(site.stack), site.layer))
        shapes = {site: (key.shape, value.shape) for site, (key, value) in recorded.items()}
        return {site: SiteShape(shapes[site][0][1], shapes[site][0][3], shapes[site][1][3]) for site in order}


def _unpadded(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a forward's arguments are no padding, `[batch, tokens]`; None: all.

    `generate` makes masks of attention, one for each kind of layer, where the cache has a fixed size.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, Mapping):
        mask = next((each for each in mask.values() if each is not None), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask
    given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    seen = seen_tokens(mask)
    return None if seen is None else seen[:, : given.shape[1]]


def _keep_with(output: Any, kept: dict[Site, Tensor]) -> None:
    cache = output.get("past_key_values") if isinstance(output, dict) else None
    if cache is not None:
        cache.__dict__[ATTRIBUTE] = kept


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, None when it is not attached."""
    binding = model.__dict__.get(ATTRIBUTE)
    return None if binding is None else binding.attachment


def attach(
    model: PreTrainedModel,
    prefixes: Prefix | Mapping[str, Prefix] | None = None,
    *,
    trainable: bool = False,
    default: str | None = None,
    check_fingerprint: bool = True,
) -> PreTrainedModel:
    """Put prefixes before a model's attention, in place; the model stays the `PreTrainedModel` that it is.

    A single prefix is read by all rows. Of several, named ones, `default` is read by all rows, and `prefix_ids`
    (int `[batch]`, or `[batch, tokens]` for packed rows; see `prefix_ids()`) chooses in `forward` and `generate`.
    With `trainable` (a single prefix) the base is frozen, the prefix becomes parameters of the model, and
    `save_pretrained` writes the prefix folder. `detach` restores the model exactly.

    Raises `UnsupportedModel`, `PrefixMismatch` or `PrefixError`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from foreword.prefix import Prefix, Site, SiteTensors
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> prefix = Prefix({Site("decoder", 0): SiteTensors(torch.ones(2, 3, 4), torch.ones(2, 3, 4))}, "tiny", "")
    >>> model = attach(model, {"polite": prefix}, check_fingerprint=False)
    >>> model(torch.tensor([[1, 2]]), prefix_ids=prefix_ids(model, ["polite"])).logits.shape
    torch.Size([1, 2, 8])
    >>> model = detach(model)
    """
    if attachment_of(model) is not None:
        raise PrefixError(
            "the model is attached already", "a model without prefixes", "call foreword.detach(model) first"
        )
    if trainable and not isinstance(prefixes, Prefix):
        raise PrefixError("trainable=True without a single prefix", "one Prefix", "pass the prefix to train")
    named: dict[str, Prefix] = {"default": prefixes} if isinstance(prefixes, Prefix) else dict(prefixes or {})
    attachment = Attachment(model)
    try:
        for prefix in named.values():
            check_prefix(attachment, prefix, check_fingerprint)
        if trainable:
            _make_trainable(attachment, named["default"])
        else:
            for name, prefix in named.items():
                attachment.bank.add(name, prefix)
            attachment.default = attachment.bank.index("default" if isinstance(prefixes, Prefix) else default)
    except BaseException:
        attachment.undo()
        raise
    return model


def check_prefix(attachment: Attachment, prefix: Prefix, check_fingerprint: bool = True) -> None:
    """Raise `PrefixMismatch` unless the prefix belongs to the attached model."""
    model = attachment.model
    known = fingerprint(model) if check_fingerprint else prefix.fingerprint
    name = model.config.name_or_path or type(model).__name__
    prefix.check_base(name, known, attachment.geometry, attachment.hidden_sizes)
    check_poolings(prefix.sites)
    if prefix.position_offset and attachment.family.kind == "encoder-decoder":
        raise PrefixMismatch(
            f"the prefix has position offset {prefix.position_offset}, the model is an encoder-decoder",
            "position offset 0",
            "train the prefix with its native offset",
        )


def _make_trainable(attachment: Attachment, prefix: Prefix) -> None:
    if prefix.position_offset:
        raise PrefixError(
            f"a prefix with position offset {prefix.position_offset} to train",
            "position offset 0",
            "start from a native prefix",
        )
    model = attachment.model
    for parameter in model.parameters():
        _freeze(attachment, parameter)
    module = parametrize(prefix).to(model.device)
    attachment.module = module
    model.add_module("foreword_prefix", module)
    attachment._undo.append(lambda: model._modules.pop("foreword_prefix"))

    def save_pretrained(save_directory: Any, *_: Any, **__: Any) -> None:
        module.fold().save(save_directory)

    attachment._set(model, "save_pretrained", save_pretrained)


def _freeze(attachment: Attachment, parameter: nn.Parameter) -> None:
    before = parameter.requires_grad
    parameter.requires_grad_(False)
    attachment._undo.append(lambda: cast(None, parameter.requires_grad_(before)))


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take all prefixes off a model and restore it exactly; a model that is not attached is left as it is."""
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.undo()
    return model


def prefix_ids(model: nn.Module, names: Iterable[str | None]) -> Tensor:
    """The `prefix_ids` `[batch]` of an attached model for the named prefixes, one per row; None reads no prefix."""
    attachment = attachment_of(model)
    if attachment is None:
        raise PrefixError("the model is not attached", "an attached model", "call foreword.attach(model, prefixes)")
    return torch.tensor([attachment.bank.index(name) for name in names], device=attachment.model.device)
