"""Brings prefixes into a `transformers` model: the attention function, its registration, attach and detach.

A forward pass carries one `Call` (see `foreword.bank`) in the argument `prefix_ids` to every attention module;
there `_forward` reads the module's slots and attends over slots and text together. Without slots the model's
own attention runs, untouched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from foreword.bank import NO_PREFIX, Bank, Call, Shared
from foreword.errors import PrefixError, PrefixMismatch, UnsupportedModel
from foreword.families import Family, adapter_of, family_of, find_sites
from foreword.families.inputs import default_positions, smallest_inputs
from foreword.fingerprint import fingerprint
from foreword.kernels import Slots, attend
from foreword.parametrization import PrefixModule, parametrize
from foreword.prefix import Geometry, Prefix, Site, Sites, SiteShape

__all__ = ["Attachment", "attach", "attachment_of", "detach", "prefix_ids"]

# The names under which models find our function; each keeps the mask format and the text attention of its twin.
_SDPA, _EAGER = "foreword", "foreword_eager"
_ATTRIBUTE = "_foreword"


class _Binding:
    """What an attention module of an attached model knows: its attachment and the sites it serves in turn."""

    def __init__(self, attachment: Attachment, sites: list[Site]) -> None:
        self.attachment, self.sites, self.turn = attachment, sites, 0

    def slots(self, query: Tensor, key: Tensor, value: Tensor, prefix_ids: Tensor | Call | None = None) -> Slots | None:
        """The slots that the module reads in this turn, None for none; its keys and values are recorded if wanted."""
        site = self.sites[self.turn % len(self.sites)]
        self.turn += 1
        if self.attachment.recorded is not None:
            self.attachment.recorded[site] = (key.detach(), value.detach())
        return self.attachment.resolve(prefix_ids).slots(site, query)


def _text_attention(module: nn.Module, eager: bool) -> Callable[..., Any]:
    """The attention that the model would run without us."""
    if not eager:
        return sdpa_attention_forward
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return cast(Callable[..., Any], function)
    raise UnsupportedModel(f"{type(module).__name__} has no eager attention", "a transformers attention module")


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    eager: bool,
    prefix_ids: Tensor | Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; `[batch, tokens, heads, value_dim]` and the weights, if the text's own."""
    binding = module.__dict__.get(_ATTRIBUTE)
    if binding is None:
        raise UnsupportedModel(
            f"{type(module).__name__} is no attention site of an attached model",
            "modules that were there when the model was attached",
            "attach the model again after changing it; give it a configuration of its own if it shares one",
        )
    slots = binding.slots(query, key, value, prefix_ids)
    if slots is None:
        return cast(
            "tuple[Tensor, Tensor | None]",
            _text_attention(module, eager)(module, query, key, value, attention_mask, **kwargs),
        )
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scaling = kwargs.get("scaling")
    out = attend(
        query,
        key,
        value,
        slots,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=attention_mask,
        is_causal=bool(is_causal) and not eager,
        position_bias=kwargs.get("position_bias"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        dropout=kwargs.get("dropout") or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_SDPA, functools.partial(_forward, eager=False))
AttentionInterface.register(_EAGER, functools.partial(_forward, eager=True))
AttentionMaskInterface.register(_SDPA, sdpa_mask)
AttentionMaskInterface.register(_EAGER, eager_mask)


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
        self._bound: Call | None = None
        self._current: Call | None = None
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

    def resolve(self, prefix_ids: Tensor | Call | None) -> Call:
        """The call that an attention module reads: its argument, else the running pass, else the default."""
        if prefix_ids is not None and not isinstance(prefix_ids, Tensor):
            return prefix_ids
        if prefix_ids is None and self._current is not None:
            return self._current
        return self.call(prefix_ids)

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
    def bound(self, sites: Sites) -> Iterator[None]:
        """Inside, all rows read `sites`, differentiably."""
        before, self._bound = self._bound, Shared(sites)
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
            binding = _Binding(self, sites)
            self._set(module, _ATTRIBUTE, binding)
            if adapter is not None:
                self._set(module, "forward", adapter(module, functools.partial(_adapted, module)))
        self._set(self.model, _ATTRIBUTE, _Binding(self, []))
        self._bindings = [module.__dict__[_ATTRIBUTE] for module in served]

    def _switch_attention(self) -> None:
        self._configs: list[Any] = []
        if self.family.own_adapter:
            return
        configs = {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}
        for config in configs.values():
            implementation = config._attn_implementation
            if implementation in (_SDPA, _EAGER):
                raise UnsupportedModel(
                    f"{type(self.model).__name__} has the configuration object of an attached model, or a copy of it",
                    "a configuration of its own",
                    "detach that model first",
                )
            eager = implementation == "eager" or not self.model._supports_sdpa
            if eager and getattr(config, "reorder_and_upcast_attn", False):
                raise UnsupportedModel("this GPT-2 reorders and upcasts its attention", "a model that does not")
            self._set(config, "_attn_implementation_internal", _EAGER if eager else _SDPA)
            self._configs.append(config)

    def _check_switched(self) -> None:
        """Raise `PrefixError` if somebody has since given the model another attention, which reads no prefix."""
        for config in self._configs:
            if config._attn_implementation not in (_SDPA, _EAGER):
                raise PrefixError(
                    f"the attention of the attached model was changed to {config._attn_implementation!r}",
                    "the attention that it was attached with",
                    "choose the attention before attaching",
                )

    def _wrap_forward(self) -> None:
        original = self.model.forward

        @functools.wraps(original)
        def forward(*args: Any, prefix_ids: Tensor | None = None, **kwargs: Any) -> Any:
            self._check_switched()
            call = self.call(prefix_ids)
            args, kwargs = self._shift_positions(prefix_ids, args, kwargs)
            for binding in self._bindings:
                binding.turn = 0
            before, self._current = self._current, call
            try:
                if self.family.own_adapter:
                    with self._recomputed_alike(call):
                        return original(*args, **kwargs)
                return original(*args, prefix_ids=call, **kwargs)
            finally:
                self._current = before

        signature = inspect.signature(original)
        ids = inspect.Parameter("prefix_ids", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
        parameters = list(signature.parameters.values())
        place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        parameters.insert(place, ids)
        forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        self._set(self.model, "forward", forward)

    @contextlib.contextmanager
    def _recomputed_alike(self, call: Call) -> Iterator[None]:
        """Inside, checkpointed layers are set up to read `call` again when a later backward recomputes them."""
        layers = [m for m in self.model.modules() if "_gradient_checkpointing_func" in m.__dict__]
        functions = [layer.__dict__["_gradient_checkpointing_func"] for layer in layers]

        def checkpointed(function: Callable[..., Any], layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def again(*inputs: Any, **options: Any) -> Any:
                before, self._current = self._current, call
                try:
                    return layer(*inputs, **options)
                finally:
                    self._current = before

            return function(again, *args, **kwargs)

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
        names = inspect.signature(self.model.forward).parameters
        given = {**dict(zip(names, args, strict=False)), **kwargs}
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


def _adapted(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor,
    position_bias: Callable[[], Tensor | None],
    dropout: float = 0.0,
) -> Tensor | None:
    """What a family's own adapter calls; None when no prefix is read, so that it runs the original."""
    slots = module.__dict__[_ATTRIBUTE].slots(query, key, value)
    if slots is None:
        return None
    bias = position_bias()
    return attend(query, key, value, slots, scaling=scaling, mask=mask, position_bias=bias, dropout=dropout)


def attachment_of(model: nn.Module) -> Attachment | None:
    """The attachment of a model, None when it is not attached."""
    binding = model.__dict__.get(_ATTRIBUTE)
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
    prefix.check_base(model.config.name_or_path or type(model).__name__, known, attachment.geometry)
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
