"""The HTTP server: the OpenAI API over an engine, with tenants, limits, metrics and an admin API.

Only this package knows HTTP and text; `foreword.engine` has token ids alone. What it needs beyond the core comes with
`pip install 'foreword[serve]'`; `require` says so where it is missing.
"""

from __future__ import annotations

from foreword.optional import optional

__all__ = ["require"]


def require() -> None:
    """Raise `MissingPackage` unless the packages of the server are there; call it before its modules are imported."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        optional(module, "serve")
