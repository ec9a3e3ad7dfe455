"""`foreword generate`: continue prompts through a prefix, or through none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foreword.cli.console import bar, emit, read_texts, say
from foreword.cli.options import Base, Device, Dtype, Json, load_base, load_prefix
from foreword.errors import ConfigError, PrefixError

__all__ = ["generate"]


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; - or none reads one per line.")] = None,
    prefix: Annotated[Path | None, typer.Option("--prefix", "-p", help="A prefix or run folder.")] = None,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 80,
    beams: Annotated[int, typer.Option(min=1, help="Beams; the Prefix-Tuning paper uses 5.")] = 1,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="With --sample; 0 is all.")] = 0,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable. (default: a new line)")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 16,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Continue each prompt; one is streamed, more are batched. Each gets the line end that tasks end prompts with.

    foreword generate --prefix runs/trails "name : Heron Loop | length : 14 km"
    """
    texts = read_texts(prompts, "prompt")
    if prefix is None and base is None:
        raise ConfigError("neither --prefix nor --base", "one of them", "see foreword generate --help")
    loaded, trained = (
        (load_base(base or "", dtype, device), None) if prefix is None else load_prefix(prefix, base, dtype, device)
    )
    if trained is not None and trained.head is not None:
        raise PrefixError(
            "a prefix with a head, which predicts labels", "one that writes text", f"foreword predict --prefix {prefix}"
        )
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": sample, "temperature": temperature,
        "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop or ["\n"], "batch_size": batch_size,
    }  # fmt: skip
    asked = [text if text.endswith("\n") else text + "\n" for text in texts]
    if len(asked) == 1 and beams == 1 and not as_json:
        loaded.generate(asked, trained, on_text=lambda _, piece: print(piece, end="", flush=True), **options)  # noqa: T201
        say()
        return
    with bar("generating") as progress:
        outputs = loaded.generate(asked, trained, progress=progress, **options)
    if not as_json:
        for text in outputs:
            say(text.strip())
    emit({"prompts": texts, "outputs": outputs}, as_json)
