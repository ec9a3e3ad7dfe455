"""Packages that Foreword can do without: imported when first needed, with a clear error when absent."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from foreword.errors import MissingPackage

__all__ = ["optional"]


def optional(module: str, extra: str) -> Any:
    """The imported `module`; `MissingPackage` names the extra of `foreword` that brings it.

    >>> optional("json", "data").dumps([1])
    '[1]'
    >>> optional("no_such_module", "data")
    Traceback (most recent call last):
    foreword.errors.MissingPackage: package 'no_such_module' is not installed; run pip install 'foreword[data]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there and one of its own dependencies is not
        name = module.partition(".")[0]
        raise MissingPackage(
            f"package {name!r} is not installed", action=f"run pip install 'foreword[{extra}]'"
        ) from None
    except ImportError as error:  # installed, and yet not to be had
        reason = str(error).partition("\n")[0]
        raise MissingPackage(
            f"package {module.partition('.')[0]!r} cannot be imported ({reason})",
            action=f"run pip install --force-reinstall 'foreword[{extra}]'",
        ) from None
