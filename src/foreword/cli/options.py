"""Options that several commands share, and the flags made from `TrainConfig`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from foreword.config import TrainConfig
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.base import BaseModel
    from foreword.prefix import Prefix
    from foreword.tasks import Task

__all__ = [
    "Base", "Completion", "CompletionTemplate", "Device", "Dtype", "Json", "Limit", "PromptColumn", "References",
    "Strict", "Template", "TestFile", "config_flags", "load_base", "load_prefix", "make_task",
]  # fmt: skip

Base = Annotated[
    str | None,
    typer.Option("--base", "-b", help="Base model: smollm2-135m, minilm, a folder or a Hugging Face model id."),
]
Device = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, ... (default: cuda if there is one)")
]
Dtype = Annotated[str, typer.Option(help="Precision of the base model: auto (as stored), float32 or bfloat16.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line, the last one.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first rows of the split only.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used, not skip it.")]
TestFile = Annotated[Path | None, typer.Option("--test", help="Your test rows: JSONL, CSV, TSV or parquet.")]
PromptColumn = Annotated[str | None, typer.Option(help="The column with the prompt, in your own files.")]
Completion = Annotated[str | None, typer.Option("--completion-column", help="The column with the completion.")]
Template = Annotated[str | None, typer.Option(help='The prompt made of columns: "Question: {question}".')]
CompletionTemplate = Annotated[str | None, typer.Option(help="The completion made of columns.")]
References = Annotated[list[str] | None, typer.Option(help="A column with references to score against; repeatable.")]


def make_task(name: str | None, default: str | None = None, **files: Any) -> Task:
    """The named task, or one of the user's own files; exactly one of both."""
    from foreword.tasks import get_task

    given = {option: value for option, value in files.items() if value not in (None, [], ())}
    if given and name not in (None, "files"):
        raise ConfigError(
            f"task {name!r} together with --{next(iter(given)).replace('_', '-')}", "one of both", "leave one out"
        )
    if given:
        references = given.get("references")
        if references is not None and len(references) == 1:
            given["references"] = references[0]
        return get_task("files", **given)
    chosen = name or default
    if chosen is None:
        raise ConfigError(
            "no task and no file of your own",
            "a task name, or rows with --train or --test",
            "name one; --help lists all",
        )
    return get_task(chosen)


def load_base(name: str, dtype: str = "auto", device: str | None = None) -> BaseModel:
    """Load a base model, with progress bars for what is fetched and unpacked."""
    from foreword.base import BaseModel
    from foreword.cli.console import stages

    _check_device(device)
    with stages() as progress:
        progress(f"loading {name}", 0, 1)
        base = BaseModel.load(name, dtype=dtype, device=device, progress=progress)
        progress(f"loading {name}", 1, 1)
        return base


def _check_device(device: str | None) -> None:
    """Refuse, before anything is loaded, a device that this machine does not have."""
    if device in (None, "cpu"):
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        here = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
        raise ConfigError(f"device {device!r}", " or ".join(here), "choose one of them") from None


def load_prefix(path: Path, base: str | None, dtype: str, device: str | None) -> tuple[BaseModel, Prefix]:
    """A prefix (a prefix folder, or the best of a run folder) and its base model, which `base` may name anew."""
    from foreword.artifact import read_header
    from foreword.prefix import Prefix
    from foreword.runs import find_prefix

    folder = find_prefix(path)
    loaded = load_base(base or read_header(folder)["base"]["name"], dtype, device)
    return loaded, Prefix.load(folder, loaded)


def config_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one flag for every field of `TrainConfig`; it gets the given ones as `settings`."""
    hints = get_type_hints(TrainConfig)
    flags = {field.name: _flag(field, hints[field.name]) for field in dataclasses.fields(TrainConfig)}
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]

    def wrapped(**values: Any) -> None:
        settings = {name: values.pop(name) for name in flags}
        command(settings={name: value for name, value in settings.items() if value is not None}, **values)

    own_hints = get_type_hints(command, include_extras=True)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[p.name]) for p in own]
    parameters += flags.values()
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__doc__ = command.__doc__
    return wrapped


def _flag(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    kind = next((arg for arg in get_args(hint) if arg is not type(None)), hint)
    default = field.default
    choices = " ({})".format(", ".join(filter(None, field.metadata["choices"]))) if field.metadata["choices"] else ""
    shown = choices + (f" (default: {default})" if default not in (None, dataclasses.MISSING, "") else "")
    name = "--" + field.name.replace("_", "-")
    declaration = f"{name}/--no-{name[2:]}" if kind is bool else name
    option = typer.Option(
        declaration, help=field.metadata["help"] + shown, show_default=False, rich_help_panel="Configuration"
    )
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
