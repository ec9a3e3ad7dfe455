"""`foreword evaluate`: scores of a prefix, or of several seeds, beside the untouched base model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.console import bar, emit, print_skipped, say, table
from foreword.cli.options import (
    Base,
    Device,
    Dtype,
    Json,
    Limit,
    Strict,
    file_flags,
    known_of,
    load_base,
    load_prefixes,
    make_task,
)  # fmt: skip
from foreword.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from foreword.evaluate import Evaluation, Interval
    from foreword.seeds import Spread
    from foreword.tasks import Split, Task

__all__ = ["evaluate", "print_scores", "print_side_by_side"]


@file_flags("test")
def evaluate(
    prefix: Annotated[
        Path | None, typer.Argument(help="A prefix, a run folder, or one of several seeds; none: the base model alone.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="e2e, rte, ... (default: the prefix's own)")] = None,
    base: Base = None,
    split: Annotated[str, typer.Option(help="dev or test.")] = "test",
    limit: Limit = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Also evaluate the untouched base model.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest output. (default: the task's own)")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams; the Prefix-Tuning paper uses 5.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 20,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Scores to print, with commas between: metrics or sets of them (e2e, webnlg, dart, summary, slots); "
            "docs/metrics.md has all. (default: the task's own)"
        ),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Print this many outputs.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write scores and all texts here. (default: a file in the run folder)"),
    ] = None,
    strict: Strict = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
    files: dict[str, Any] | None = None,
) -> None:
    """Write for every row of a split, or predict its labels, and score against its references.

    Of a folder of several seeds each prefix is scored, and how far the scores spread. A run folder keeps the texts:
    evaluation.json are those of the task's own test rows and options, the only ones that foreword compare takes by
    itself; others go to files that are named by what differs.

    foreword evaluate runs/trails --with-base
    foreword evaluate runs/rte
    foreword evaluate runs/e2e --metrics e2e,slots,bertscore:minilm
    """
    from foreword.evaluate import evaluate as run

    _check(prefix, base, split, files or {}, out)
    loaded, prefixes = (
        (load_base(base or "", dtype, device), []) if prefix is None else load_prefixes(prefix, base, dtype, device)
    )
    if out is not None and len(prefixes) > 1:
        raise ConfigError(f"--out {out} for {len(prefixes)} seeds", "no --out", "each run folder keeps its own scores")
    results: list[Evaluation] = []
    trained = [(f"with prefix {name}".strip(), path, each) for name, path, each in prefixes]
    untouched = [("base model", None, None)] if with_base or not prefixes else []
    known = known_of(prefixes[0][2]) if prefixes else {}
    named = None if metrics is None else [name.strip() for name in metrics.split(",")]
    work = make_task(task, files or {}, known, split)
    differs = _differs(work, known.get("task"), limit, beams, max_new_tokens, named)
    if out is None and prefixes:
        own = work.split(split) if files else None
        differs = _beside([path for _, path, _ in prefixes], own, dtype, str(loaded.dtype), differs)
    for name, path, each in [*untouched, *trained]:
        chosen = make_task(task, files or {}, known if each is None else known_of(each), split)
        options: dict[str, Any] = {"num_beams": beams} if chosen.kind == "generation" or beams > 1 else {}
        with bar(name) as progress:
            results.append(
                run(
                    loaded, each, chosen, split, limit=limit, strict=strict, batch_size=batch_size,
                    max_new_tokens=max_new_tokens, metrics=named, progress=progress,
                    unscored=partial(_save, path=path, split=split, differs=[*differs, "unscored"], out=out),
                    **options,
                )
            )  # fmt: skip
    if len({result.data_sha256 for result in results}) > 1:
        raise RunError(f"the seeds in {prefix} read other rows", "one way of reading them", "evaluate each alone")
    if results[-1].skipped_rows:
        print_skipped([each._asdict() for each in chosen.split(split, limit=limit).skipped], split)
    spread = _shown([name for name, _, _ in prefixes], results, show)
    for result, (_, path, _) in zip(results[len(untouched) :] or results, trained or untouched, strict=True):
        _save(result, path, split, differs, out)
    emit({"results": [result.to_dict(outputs=False) for result in results], **spread}, as_json)


def _shown(names: list[str], results: list[Evaluation], rows: int) -> dict[str, Any]:
    """Print the scores: of several seeds their spread, which is returned, else texts and scores side by side."""
    if len(names) > 1:
        return print_spread(names, results)
    print_side_by_side(results, rows)
    print_scores(results)
    return {}


def _check(prefix: Path | None, base: str | None, split: str, files: dict[str, Any], out: Path | None) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    if prefix is None and base is None:
        raise ConfigError("neither a prefix nor --base", "one of them", "see foreword evaluate --help")
    if split not in ("dev", "test"):
        raise ConfigError(f"split {split!r}", "dev or test", "choose one of them")
    if "test" in files and split != "test":
        raise ConfigError(f"--split {split} together with --test", "one of both", "leave --split out")
    if out is not None and out.exists() and not out.is_file():
        raise ConfigError(f"--out {out} is not a plain file", "a file to write or replace", "choose another path")


def _differs(
    task: Task,
    trained: str | None,
    limit: int | None,
    beams: int,
    max_new_tokens: int | None,
    metrics: list[str] | None,
) -> list[str]:
    """In what an evaluation is another one than that of the task of training with its own options, in few words."""
    from foreword.metrics import metric_names

    return [
        *([task.name] if trained not in (None, task.name) else []),
        *([f"limit-{limit}"] if limit is not None else []),
        *([f"beams-{beams}"] if beams > 1 else []),
        *([f"tokens-{max_new_tokens}"] if max_new_tokens not in (None, task.max_new_tokens) else []),
        *(metrics if metrics is not None and metric_names(metrics) != tuple(task.metrics) else []),
    ]


def _beside(folders: list[Path], rows: Split | None, asked: str, dtype: str, differs: list[str]) -> list[str]:
    """What differs from the kept evaluations of runs, own rows and the precision with it, in few words.

    A run does not say which own rows are its test rows: those of its evaluation.json are, and where there is none those
    that are read first, in the precision that the model is stored in.
    """
    from foreword.evaluate import Evaluation
    from foreword.runs import EVALUATION

    kept: list[Evaluation] = []
    for folder in folders:
        with contextlib.suppress(DataError):  # not there, or nothing that would be missed
            kept.append(Evaluation.load(folder / EVALUATION))
    precision = dtype.removeprefix("torch.")
    known = {each.record.get("dtype", precision) for each in kept}
    differs = [*differs, *([precision] if (known != {precision} if kept else asked != "auto") else [])]
    if rows is None or ({each.data_sha256 for each in kept} == {rows.sha256} if kept else not differs):
        return differs
    return [f"{Path(rows.source).stem}-{rows.sha256[:8]}", *differs]


def _save(result: Evaluation, path: Path | None, split: str, differs: list[str], out: Path | None) -> None:
    """Keep scores and texts in `out`, else in a file of the run folder, where it is one."""
    from foreword.evaluate import evaluation_file
    from foreword.runs import is_run

    if out is None and path is not None and is_run(path):
        out = path / evaluation_file(split, differs)
    if out is not None:
        result.save(out)
        say(f"all texts: {out}")


def print_spread(names: list[str], results: list[Evaluation]) -> dict[str, Any]:
    """A table of the scores of several seeds and of what they have in common, which is returned as plain values."""
    from foreword.seeds import spreads

    tested = results[-len(names) :]
    found = spreads(tested)
    rows = [[name, *_written(each.scores)] for name, each in zip(names, tested, strict=True)]
    rows += [["base model", *_written(each.scores)] for each in results[: -len(names)]]
    rows.append(["all seeds", *_written(found)])
    first = tested[0]
    table(f"{first.task} {first.split}, {len(first.outputs)} rows, {first.base}", ["", *found], rows)
    say("95 % bootstrap intervals: of one seed over rows, of all (mean ± standard deviation) over seeds and rows")
    return {"scores": {name: each._asdict() for name, each in found.items()}}


def _written(scores: Mapping[str, Interval | Spread]) -> list[str]:
    from foreword.metrics import number_format

    return [format(score, number_format(name)) for name, score in scores.items()]


def print_scores(results: list[Evaluation]) -> None:
    """A table of scores with their intervals, one column for each evaluation."""
    first = results[0]
    columns = [_written(result.scores) for result in results]
    header = ["", *("base model" if result.prefix is None else f"prefix {result.prefix}" for result in results)]
    rows = [
        *([name, *cells] for name, *cells in zip(first.scores, *columns, strict=True)),
        *_costs(results),
        ["seconds", *(f"{result.seconds:.1f}" for result in results)],
    ]
    skipped = f", {first.skipped_rows} skipped" if first.skipped_rows else ""
    cut = f", {first.cut_rows} cut" if first.cut_rows else ""
    table(f"{first.task} {first.split}, {len(first.outputs)} rows{skipped}{cut}, {first.base}", header, rows)
    say("scores with 95 % bootstrap intervals over rows")


def _costs(results: list[Evaluation]) -> list[list[str]]:
    """What the right answers cost, per token or per label; of texts that were written as perplexity too."""
    if results[0].nats_per_label is not None:
        return [["nats per label", *(f"{result.nats_per_label:.3f}" for result in results)]]
    cells = [f"{each.nats_per_token:.3f}" + _ends(each.nats_interval) for each in results]
    told = [format(each.perplexity, ".2f") for each in results if each.perplexity is not None]
    return [["nats per token", *cells], *([["perplexity", *told]] if told else [])]


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]"


def print_side_by_side(results: list[Evaluation], rows: int) -> None:
    """The first outputs of every evaluation under their prompts."""
    for k, output in enumerate(results[0].outputs[:rows]):
        say(f"prompt     {output.prompt.strip()}")
        for result in results:
            own = result.outputs[k]
            sure = "" if own.probability is None else f" ({100 * own.probability:.0f} %)"
            say(f"{'base model' if result.prefix is None else 'prefix':10} {own.text or '(nothing)'}{sure}")
        say(f"reference  {output.references[0]}")
        say()
