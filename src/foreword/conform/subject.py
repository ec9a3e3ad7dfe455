"""The model under test: random inputs and prefixes of its own kind, and the ways to run it that the lines need."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from foreword.attention import Attachment
from foreword.families import find_sites
from foreword.gates import GateOptions
from foreword.prefix import Gate, Prefix, Site, Sites, SiteTensors

__all__ = ["Checks", "Inputs", "NotApplicable", "Subject", "rows"]

Inputs = dict[str, Tensor]
Hook = Callable[[str, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]


class NotApplicable(Exception):
    """A line that says nothing about this model, and why."""


class Checks:
    """What one line compared: the largest error, which comparisons failed, and what could not be compared."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.error: float | None = None
        self.failed: list[str] = []
        self.notes: list[str] = []

    def equal(self, what: str, got: Tensor, want: Tensor, *, exact: bool = False, scale: float | None = None) -> None:
        """Compare two tensors; `exact` means bit for bit. `scale` is the largest expected value unless given."""
        if got.shape != want.shape:
            self.failed.append(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            self.error = math.inf
            return
        got, want = got.detach().float().cpu(), want.detach().float().cpu()
        if scale is None:
            scale = float(want.abs().max()) if want.numel() else 1.0
        error = float((got - want).abs().max()) / (scale or 1.0) if want.numel() else 0.0
        error = math.inf if math.isnan(error) else error
        self.worst(what, error, 0.0 if exact else self.tolerance)

    def worst(self, what: str, error: float, limit: float) -> None:
        """Take an error into account."""
        self.error = max(self.error or 0.0, error)
        if error > limit:
            self.failed.append(f"{what}: error {error:.1e}")

    def differs(self, got: Tensor, want: Tensor) -> bool:
        """Whether two tensors differ by more than rounding."""
        return bool((got - want).abs().max() > self.tolerance * want.abs().max())

    def true(self, what: str, holds: bool) -> None:
        """Take a plain fact into account."""
        self.error = self.error or 0.0
        if not holds:
            self.failed.append(what)

    def note(self, text: str) -> None:
        """Remember what could not be compared."""
        if text not in self.notes:
            self.notes.append(text)


class Subject:
    """An attached, frozen model in eval mode with its family, and a generator of everything random.

    Its prefixes have the gates of `gates`.
    """

    def __init__(self, model: Any, attachment: Attachment, seed: int = 0, gates: GateOptions | None = None) -> None:
        self.model, self.attachment, self.config = model, attachment, model.config
        self.gates = gates or GateOptions()
        self.family, self.geometry = attachment.family, attachment.geometry
        self.kind = self.family.kind
        self.generator = torch.Generator().manual_seed(seed)
        self.signature = inspect.signature(type(model).forward).parameters
        self.reads_text = model.main_input_name not in ("pixel_values", "input_features")
        self.stacks = [stack for stack in ("encoder", "decoder") if Site(stack, 0) in self.geometry]
        self._statistics: Sites | None = None

    @property
    def window(self) -> int | None:
        """Tokens that a sliding-window layer sees, its own included; None without such layers."""
        if getattr(self.config, "local_attention", None):
            return int(self.config.sliding_window) + 1
        types = getattr(self.config, "layer_types", None) or ()
        size = getattr(self.config, "sliding_window", None)
        sliding = not types or "sliding_attention" in types
        used = getattr(self.config, "use_sliding_window", True)
        return int(size) if size and sliding and used else None

    @property
    def tokens(self) -> int:
        """A length of text that every window holds."""
        return min(self.window or 8, 8)

    def random(self, *shape: int) -> Tensor:
        """Normal noise in the model's dtype."""
        return torch.randn(*shape, generator=self.generator).to(self.model.device, self.model.dtype)

    def ids(self, batch: int, tokens: int) -> Tensor:
        """Random token ids that are neither padding nor another of the first, special, ids."""
        vocab = self.config.vocab_size
        low = min(vocab // 4, 200)
        special = {getattr(self.config, f"{name}_token_id", None) for name in ("pad", "eos", "bos", "decoder_start")}
        ids = torch.randint(low, vocab, (batch, tokens), generator=self.generator)
        for token in special:
            if isinstance(token, int):
                ids[ids == token] = low + 1 if low != token else low + 2
        return ids.to(self.model.device)

    def inputs(self, batch: int = 2, tokens: int | None = None, targets: int | None = None) -> Inputs:
        """Random inputs; `tokens` of what is read (sounds and images are as large as the model wants them)."""
        tokens = tokens or self.tokens
        given: Inputs = {}
        if self.reads_text:
            given["input_ids"] = self.ids(batch, tokens)
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        elif self.model.main_input_name == "pixel_values":
            size = self.config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            return {"pixel_values": self.random(batch, self.config.num_channels, height, width)}
        else:
            frames = 2 * self.config.max_source_positions
            given["input_features"] = self.random(batch, self.config.num_mel_bins, frames)
        if self.kind == "encoder-decoder":
            given["decoder_input_ids"] = self.ids(batch, targets or max(1, self.tokens - 2))
        return given

    def output(self, inputs: Mapping[str, Any], **more: Any) -> Any:
        """The model's output object."""
        if self.kind != "encoder":
            more = {"use_cache": False, **more}
        return self.model(**inputs, **more)

    def logits(self, inputs: Mapping[str, Any], **more: Any) -> Tensor:
        """The head's logits, or the last hidden state of a model without a head."""
        output = self.output(inputs, **more)
        return cast(Tensor, output["logits"] if "logits" in output else output["last_hidden_state"])

    def with_sites(self, sites: Sites, inputs: Mapping[str, Any], **more: Any) -> Tensor:
        """Logits while all rows read `sites`."""
        with self.attachment.bound(sites):
            return self.logits(inputs, **more)

    def sites(self, length: int, *, ragged: bool = False, gated: bool = True) -> Sites:
        """A random prefix with the mean and spread of this model's own keys and values, and random gates.

        A ragged one has fewer slots from layer to layer.
        """
        if self._statistics is None:
            with torch.no_grad(), self.attachment.recording() as recorded:
                self.output(self.inputs(2, self.tokens))
            self._statistics = {site: SiteTensors(*pair) for site, pair in recorded.items()}

        def sample(like: Tensor, slots: int) -> Tensor:
            flat = like.float().transpose(0, 1).flatten(1, 2)
            noise = torch.randn(flat.shape[0], slots, flat.shape[2], generator=self.generator).to(flat.device)
            return flat.mean(1, keepdim=True) + noise * flat.std(1, keepdim=True)

        lengths = {site: max(1, length - site.layer % 3) if ragged else length for site in self.geometry}
        sites: Sites = {}
        for site, length in lengths.items():
            keys, values = (sample(like, length) for like in self._statistics[site][:2])
            sites[site] = SiteTensors(keys, values)
        return {site: self._gated(site, tensors) for site, tensors in sites.items()} if gated else sites

    def _gated(self, site: Site, tensors: SiteTensors) -> SiteTensors:
        """The same slots under random gates of the kind that is checked."""

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.generator).to(tensors.keys.device)

        if self.gates.kind == "mass":
            return tensors._replace(log_mass=nn.functional.logsigmoid(noise(tensors.length)))
        if self.gates.kind == "static":
            factor = torch.sigmoid(noise(tensors.length))[None, :, None]
            return tensors._replace(keys=tensors.keys * factor, values=tensors.values * factor)
        if self.gates.kind == "apt":
            hidden = self.attachment.hidden_sizes[site]
            weight = 2 * noise(hidden, tensors.length) / hidden**0.5
            return tensors._replace(gate=Gate(weight, self.gates.pooling_at(site, {s.stack for s in self.geometry})))
        return tensors

    def open(self, sites: Sites) -> Sites:
        """The same function under gates that are there but change nothing: α is 1/2 of what is doubled, g is 1."""
        opened = {}
        for site, tensors in sites.items():
            zeros = tensors.keys.new_zeros
            if self.gates.kind == "mass":
                tensors = tensors._replace(log_mass=zeros(tensors.length))
            elif self.gates.kind == "apt":
                pooling = self.gates.pooling_at(site, {s.stack for s in self.geometry})
                gate = Gate(zeros(self.attachment.hidden_sizes[site], tensors.length), pooling)
                tensors = SiteTensors(2 * tensors.keys, 2 * tensors.values, None, gate)
            opened[site] = tensors
        return opened

    @contextlib.contextmanager
    def resident(self, owners: Sequence[Sites | None]) -> Iterator[Tensor]:
        """Inside, the prefixes are in the bank; yields their `prefix_ids` `[rows]`, 0 for None."""
        names: list[str] = []
        bank, indices = self.attachment.bank, []
        try:
            for sites in owners:
                if sites is not None:
                    names.append(f"conform:{len(names)}")
                    indices.append(bank.add(names[-1], Prefix(sites, "", "")))
                else:
                    indices.append(0)
            yield torch.tensor(indices, device=self.model.device)
        finally:
            for name in names:
                bank.remove(name)

    @contextlib.contextmanager
    def first_layers(self, hook: Hook) -> Iterator[None]:
        """Inside, `hook(stack, args, kwargs)` sees, and may replace, what enters a stack's first layer."""
        modules = {site.stack: module for site, module in find_sites(self.model, self.family) if site.layer == 0}
        names = {module: name for name, module in self.model.named_modules()}
        handles = []
        for stack in self.stacks:
            found = re.match(r"(.*?(?:^|\.)\d+)\.", names[modules[stack]])
            assert found is not None
            layer, seen = self.model.get_submodule(found.group(1)), [False]

            def once(
                _: nn.Module, args: Any, kwargs: Any, stack: str = stack, seen: list[bool] = seen
            ) -> tuple[Any, Any] | None:
                if seen[0]:  # a layer that is shared comes again, further up
                    return None
                seen[0] = True
                return hook(stack, args, kwargs)

            handles.append(layer.register_forward_pre_hook(once, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def captured(self) -> Iterator[dict[str, list[Tensor]]]:
        """Inside, the tensors that enter each stack's first layer are kept, the hidden states first."""
        kept: dict[str, list[Tensor]] = {}

        def keep(stack: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[stack] = list(_tensors((args, dict(sorted(kwargs.items())))))
            kept[stack].sort(key=lambda tensor: not tensor.is_floating_point() or tensor.dim() != 3)

        with self.first_layers(keep):
            yield kept

    def replaced(self, hidden: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """Inside, the first layer of each named stack is given these hidden states instead of its own."""

        def replace(stack: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            if stack not in hidden:
                return None
            if args:
                return (hidden[stack], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden[stack]}

        return self.first_layers(replace)


def rows(inputs: Inputs, index: int) -> Inputs:
    """One row of a batch."""
    return {name: value[index : index + 1] for name, value in inputs.items()}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _tensors(value)
