"""What prefixes are compared with, and prefixes themselves, behind one interface.

    fitted = fit(base, train, dev, MethodConfig.of("adapter", share=0.001), task=task)
    fitted.generate(prompts, max_new_tokens=60)  # of a task with labels: fitted.predict(examples)
    fitted.score(examples), fitted.parameters, fitted.num_bytes

`search_space(method)` is the grid that a method is tuned over on dev rows, as large for each as for any other;
`fit_each` fits all its candidates.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foreword.methods.config import METHODS, SEARCH_SIZE, TEMPLATES, Method, MethodConfig, misfit, search_space

if TYPE_CHECKING:
    from foreword.methods.fitted import Fitted
    from foreword.methods.fitting import fit, fit_each

__all__ = [
    "METHODS",
    "SEARCH_SIZE",
    "TEMPLATES",
    "Fitted",
    "Method",
    "MethodConfig",
    "fit",
    "fit_each",
    "misfit",
    "search_space",
]

_HOMES = {"Fitted": "fitted", "fit": "fitting", "fit_each": "fitting"}  # loaded when used: they need torch


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
