"""Options that several commands share, and the flags made from `TrainConfig`."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Callable, Mapping
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
    "OWN_TASKS",
    "Base",
    "Device",
    "Dtype",
    "Json",
    "Limit",
    "Store",
    "Strict",
    "config_flags",
    "file_flags",
    "file_words",
    "known_of",
    "load_base",
    "load_prefix",
    "load_prefixes",
    "make_task",
]

Base = Annotated[
    str | None,
    typer.Option("--base", "-b", help="Base model: smollm2-135m, minilm, a folder or a Hugging Face model id."),
]
Device = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, ... (default: cuda if there is one)")
]
Dtype = Annotated[str, typer.Option(help="Precision of the base model: auto (as stored), float32 or bfloat16.")]
Store = Annotated[
    Path | None,
    typer.Option("--store", help="The store's folder. (default: $FOREWORD_STORE, else ~/.local/share/foreword/store)"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line, the last one.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first rows of the split only.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used, not skip it.")]

# A user's own rows: name -> (type, help), and which task each option belongs to; the others belong to several.
_FILES: dict[str, tuple[Any, str]] = {
    "train": (Path, "Your rows: JSONL, CSV, TSV or parquet, or CoNLL text with a tag for each word."),
    "dev": (Path, "Your dev rows. (default: a tenth of --train)"),
    "test": (Path, "Your test rows, in the same form."),
    "prompt_column": (str, "The column with the prompt."),
    "completion_column": (str, "The column with the completion."),
    "template": (str, 'The prompt made of columns: "Question: {question}".'),
    "completion_template": (str, "The completion made of columns."),
    "references": (list[str], "A column with references to score against; repeatable."),
    "text_column": (str, "The column with the text to be labelled."),
    "text_pair_column": (str, "The column with the second text of a pair."),
    "label_column": (str, "The column with the label."),
    "label_words": (list[str], "A label as a decoder writes it, in the order of the labels; repeatable."),
    "words_column": (str, "The column with the list of words to be tagged."),
    "tags_column": (str, "The column with the list of their tags."),
}
OWN_TASKS = {
    "files": ("prompt_column", "completion_column", "completion_template", "references"),
    "labelled": ("text_column", "text_pair_column", "label_column", "label_words"),
    "conll": ("words_column", "tags_column"),
}
_USUAL = {"labelled": ("text", "label"), "conll": ("tokens", "tags")}
_EITHER = (
    ("prompt_column", "template"), ("completion_column", "completion_template"),
    ("text_column", "template"), ("text_pair_column", "template"),
)  # fmt: skip
_CONLL = (".conll", ".bio", ".iob", ".iob2", ".txt")


def known_of(prefix: Prefix) -> dict[str, Any]:
    """What a prefix says of the task that it was trained for, and whether it answers in words of a decoder."""
    return {**prefix.metadata, "words": prefix.head is None}


def make_task(
    name: str | None, files: dict[str, Any], known: Mapping[str, Any] | None = None, split: str = "test"
) -> Task:
    """The named task, or one of the user's own files; exactly one of both.

    `known` is what a prefix says of the task that it was trained for: it is taken where none is named, with its labels,
    and rows are read the same way. `split` are the rows that are wanted.
    """
    from foreword.tasks import get_task, reading_of

    known = known or {}
    default, labels = known.get("task"), tuple(known.get("labels", ()))
    reading, remembered = reading_of(known)
    given = {option: value for option, value in files.items() if value not in (None, [], ())}
    if given and name is not None and name not in OWN_TASKS:
        raise ConfigError(
            f"task {name!r} together with --{next(iter(given)).replace('_', '-')}", "one of both", "leave one out"
        )
    if given:
        own = name or _own_task(given, reading or default, bool(labels))
        if own == "labelled" and reading != own and name is None and labels and known.get("words"):
            raise ConfigError(
                f"rows of your own for a prefix that was trained for task {default!r}",
                "the way in which it is to read them", "say --task labelled, with --template as the task reads rows",
            )  # fmt: skip
        if own == reading:
            given = {**_remembered(remembered, given), **given}
        references = given.get("references")
        if isinstance(references, list) and len(references) == 1:
            given["references"] = references[0]
        # Labels of a prefix are its labels, in their order, whatever labels another file has.
        if labels and own == "labelled" and (own == reading or "train" not in given):
            given["labels"] = labels
        if labels and own == "conll" and (own == reading or "train" not in given):
            given["types"] = tuple(label[2:] for label in labels if label.startswith("B-"))
        return get_task(own, **given)
    chosen = name or default
    if chosen in OWN_TASKS:
        raise ConfigError(
            f"task {chosen!r} and no file of your own",
            "the rows that it is about",
            "name them with " + (f"--{split}" if split == "test" else f"--{split}, or --train to hold some out"),
        )
    if chosen is None:
        raise ConfigError(
            "no task and no file of your own",
            "a task name, or rows with --train or --test",
            "name one; --help lists all",
        )
    return get_task(chosen)


def _remembered(row_options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """How a prefix reads rows, but for what another given option takes the place of."""
    from foreword.tasks.tables import first_columns

    replaced = {name for pair in _EITHER if any(name in given for name in pair) for name in pair}
    there = [first_columns(Path(given[split])) for split in ("dev", "test") if split in given]
    references = row_options.get("references", [])
    wanted = {references} if isinstance(references, str) else set(references)
    if not all(columns.issuperset(wanted) for columns in there):
        replaced.add("references")  # then the completions are what is scored against
    return {name: value for name, value in row_options.items() if name not in replaced}


def file_words(files: dict[str, Any]) -> str:
    """The options for a user's own rows as they are typed, for a command that is to be run on the same rows."""
    words = [
        f" --{name.replace('_', '-')} {shlex.quote(str(each))}"
        for name, value in files.items()
        for each in (value if isinstance(value, list | tuple) else [value])
    ]
    return "".join(words)


def _own_task(given: dict[str, Any], default: str | None, labels: bool) -> str:
    """Which task the given options and files are for."""
    from foreword.tasks.tables import first_columns

    used = {own: next(filter(given.__contains__, options), "") for own, options in OWN_TASKS.items()}
    used = {own: option for own, option in used.items() if option}
    if len(used) > 1:
        first, second = (f"--{option.replace('_', '-')}" for option in list(used.values())[:2])
        raise ConfigError(f"{first} together with {second}", "columns of one kind of rows", "leave one out")
    if used:
        return next(iter(used))
    path = next((Path(given[split]) for split in ("train", "dev", "test") if split in given), Path())
    if path.suffix.lower() in _CONLL:
        return "conll"
    if default in OWN_TASKS:
        return str(default)
    columns = first_columns(path)
    if "prompt" in columns or not (labels or "train" in given):
        return "files"
    return next((own for own, needed in _USUAL.items() if columns.issuperset(needed)), "files")


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


def load_prefixes(
    path: Path, base: str | None, dtype: str, device: str | None
) -> tuple[BaseModel, list[tuple[str, Path, Prefix]]]:
    """The prefix of `path`, or those of a folder of several seeds: each with its seed's folder name, and its path."""
    from foreword.prefix import Prefix
    from foreword.runs import find_prefix
    from foreword.start import seeds_in

    names = [f"seed{seed}" for seed in seeds_in(path)] or [""]
    loaded, first = load_prefix(path / names[0], base, dtype, device)
    rest = [(name, path / name, Prefix.load(find_prefix(path / name), loaded)) for name in names[1:]]
    return loaded, [(names[0], path / names[0], first), *rest]


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
    return _with_flags(command, {f.name: _flag(f, hints[f.name]) for f in dataclasses.fields(TrainConfig)}, "settings")


def file_flags(*splits: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options for a user's own rows, files for these splits; it gets all as `files`."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        wanted = {n: each for n, each in _FILES.items() if n in splits or n not in ("train", "dev", "test")}
        return _with_flags(command, {name: _file_flag(name, *each) for name, each in wanted.items()}, "files")

    return give


def _with_flags(command: Callable[..., None], flags: dict[str, inspect.Parameter], into: str) -> Callable[..., None]:
    """The command with more flags; those that are given reach it as the dictionary `into`."""
    own = [p for p in inspect.signature(command).parameters.values() if p.name != into]

    def wrapped(**values: Any) -> None:
        given = {name: values.pop(name) for name in flags}
        command(**{into: {name: value for name, value in given.items() if value is not None}}, **values)

    own_hints = get_type_hints(command, include_extras=True)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[p.name]) for p in own]
    parameters += flags.values()
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__doc__ = command.__doc__
    return wrapped


def _file_flag(name: str, kind: Any, text: str) -> inspect.Parameter:
    option = typer.Option("--" + name.replace("_", "-"), help=text, rich_help_panel="Your own rows")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


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
