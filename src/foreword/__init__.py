"""Foreword: train, evaluate and serve prefixes for frozen language models.

The names below are the public interface. Each is loaded when it is first used, so that `import foreword`
costs nothing and needs neither torch nor transformers.

>>> import foreword as fw
>>> fw.TrainConfig.__module__, callable(fw.train)
('foreword.config', True)
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from foreword.errors import (
    ConfigError,
    DataError,
    EngineStopped,
    ForewordError,
    MissingPackage,
    ModelNotFound,
    PrefixError,
    PrefixFormatError,
    PrefixMismatch,
    QueueFull,
    RunError,
    StorageError,
    StoreError,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from foreword.attention import attach, detach, prefix_ids
    from foreword.base import BaseModel
    from foreword.config import TrainConfig
    from foreword.conform import check
    from foreword.evaluate import Evaluation, evaluate
    from foreword.parametrization import parametrize
    from foreword.predict import predict
    from foreword.prefix import Prefix
    from foreword.tasks import get_task
    from foreword.together import train_together
    from foreword.train import TrainResult, train

__version__ = "0.1.0"

__all__ = [
    "BaseModel",
    "ConfigError",
    "DataError",
    "EngineStopped",
    "Evaluation",
    "ForewordError",
    "MissingPackage",
    "ModelNotFound",
    "Prefix",
    "PrefixError",
    "PrefixFormatError",
    "PrefixMismatch",
    "QueueFull",
    "RunError",
    "StorageError",
    "StoreError",
    "TrainConfig",
    "TrainResult",
    "UnsupportedModel",
    "attach",
    "check",
    "detach",
    "evaluate",
    "get_task",
    "parametrize",
    "predict",
    "prefix_ids",
    "train",
    "train_together",
]

_HOMES = {
    "BaseModel": "foreword.base",
    "Evaluation": "foreword.evaluate",
    "Prefix": "foreword.prefix",
    "TrainConfig": "foreword.config",
    "TrainResult": "foreword.train",
    "attach": "foreword.attention",
    "check": "foreword.conform",
    "detach": "foreword.attention",
    "evaluate": "foreword.evaluate",
    "get_task": "foreword.tasks",
    "parametrize": "foreword.parametrization",
    "predict": "foreword.predict",
    "prefix_ids": "foreword.attention",
    "train": "foreword.train",
    "train_together": "foreword.together",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package: a public name wins over the submodule of the same name.

    Importing the submodule `foreword.train` binds it as the attribute `train`; what `foreword.train` means is
    the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
