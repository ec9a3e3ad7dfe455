"""The processes that train together, on accelerate: sums over them, sharing, sharding the base, trackers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn

from foreword.attention import attachment_of
from foreword.errors import ConfigError, ForewordError, MissingPackage, UnsupportedModel

__all__ = ["Processes", "checkpoint_layers", "shard_model"]

T = TypeVar("T")


class Processes:
    """This process and its peers, as `torchrun` or `accelerate launch` started them; alone without these.

    >>> alone = Processes(torch.device("cpu"))
    >>> alone.count, alone.sum([torch.ones(2)])[0].tolist(), alone.from_main(lambda: 3)
    (1, [1.0, 1.0], 3)
    """

    def __init__(self, device: torch.device, tracker: str = "", folder: Path | None = None) -> None:
        # accelerate can be told only once in a process that the CPU is wanted although there is a GPU.
        cpu = device.type == "cpu" and not is_initialized()
        self._accelerator = Accelerator(cpu=cpu, log_with=_known_tracker(tracker, folder), project_dir=folder)
        self._tracks = bool(tracker)
        self.count: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index
        self.is_main = self.rank == 0
        self.device = device if self.count == 1 or device.type == "cpu" else self._accelerator.device
        self.wants_sharding = self._accelerator.distributed_type == DistributedType.FSDP

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor (all of one dtype) summed over the processes, in one exchange."""
        if self.count == 1:
            return list(tensors)
        flat = self._accelerator.reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), "sum")
        parts = cast(Tensor, flat).split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def totals(self, *numbers: float) -> list[float]:
        """Plain numbers summed over the processes."""
        if self.count == 1:
            return list(numbers)
        return self.sum([torch.tensor(numbers, dtype=torch.float64, device=self.device)])[0].tolist()

    def merged(self, values: dict[int, T]) -> dict[int, T]:
        """The entries of all processes, in all of them."""
        if self.count == 1:
            return values
        return dict(gather_object(list(values.items())))

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in all of them; its `ForewordError` is raised in all of them."""
        if self.count == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except ForewordError as error:
                box[1] = error
        broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return cast(T, box[0])

    def start_tracking(self, name: str, options: dict[str, Any]) -> None:
        """Open the tracker for a run."""
        if self._tracks:
            self._accelerator.init_trackers(name, options)

    def track(self, values: dict[str, Any], step: int) -> None:
        """Hand numbers to the tracker."""
        if self._tracks:
            self._accelerator.log(values, step=step)

    def stop_tracking(self) -> None:
        """Close the tracker; the processes stay together."""
        for tracker in self._accelerator.trackers if self._tracks else ():
            tracker.finish()


def shard_model(model: nn.Module, processes: Processes) -> Callable[[], None]:
    """Split a model's weights over the processes, layer by layer (FSDP2). The model stays so.

    The result, to be called at the end, gives back what the last pass has gathered. Raises `ConfigError` for a
    single process, `UnsupportedModel` where the layers are not known.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):
        return model.reshard
    if processes.count == 1:
        raise ConfigError("shard in a single process", "several processes", "start with torchrun or accelerate launch")
    names = set(getattr(model, "_no_split_modules", None) or ())
    counts = Counter(map(id, dict(model.named_parameters(remove_duplicate=False)).values()))
    layers = [
        module
        for module in model.modules()
        # Tied weights, as those of embeddings and a head over the vocabulary, stay together in the outermost group.
        if type(module).__name__ in names and all(counts[id(weight)] == 1 for weight in module.parameters())
    ]
    if not layers:
        raise UnsupportedModel(f"layers of {type(model).__name__} are not known", "a model that can be sharded")
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh).reshard


def checkpoint_layers(model: nn.Module) -> Callable[[], None]:
    """Let every layer forget its activations and compute them again for its backward; the result takes this back.

    The model's own switch works in training mode only, which would also turn on its dropout.
    """
    from torch.utils.checkpoint import checkpoint

    attachment = attachment_of(model)
    layers = [m for m in model.modules() if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)]
    if not layers:
        raise UnsupportedModel(
            f"{type(model).__name__} has no layers to checkpoint", "gradient_checkpointing = false", "lower the batch"
        )

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            again = forward if attachment is None else attachment.reading_alike(forward)
            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return checkpointed

    for layer in layers:
        layer.__dict__["forward"] = wrap(layer.forward)

    def restore() -> None:
        for layer in layers:
            layer.__dict__.pop("forward", None)

    return restore


def _known_tracker(name: str, folder: Path | None) -> str | None:
    """The tracker's name for accelerate; `MissingPackage` if it is not installed."""
    if not name:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in {str(tracker) for tracker in get_available_trackers()}:
        raise MissingPackage(f"tracker {name!r} is not installed", action=f"run pip install {name}")
    if folder is None and LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
        raise ConfigError(f"tracker {name!r} without a run folder", "a place for its files", "pass out")
    return name
