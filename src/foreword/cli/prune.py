"""`foreword prune`: a smaller prefix, made of the slots that matter most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from foreword.cli.console import bar, emit, note, say, table
from foreword.cli.options import (
    OWN_TASKS,
    Base,
    Device,
    Dtype,
    Json,
    Strict,
    file_flags,
    known_of,
    load_prefixes,
    make_task,
)
from foreword.config import TrainConfig
from foreword.errors import ConfigError

if TYPE_CHECKING:
    from foreword.base import BaseModel
    from foreword.evaluate import Evaluation
    from foreword.prefix import Prefix
    from foreword.probe import Probe
    from foreword.tasks import Task

__all__ = ["prune", "score_change"]


@file_flags("train", "dev", "test")
def prune(
    path: Annotated[Path, typer.Argument(help="A prefix folder, a run folder, or one of several seeds.")],
    keep: Annotated[float | None, typer.Option(help="The share of the parameters to keep, such as 0.5.")] = None,
    budget_parameters: Annotated[int | None, typer.Option(min=1, help="Keep at most so many parameters.")] = None,
    by: Annotated[str, typer.Option(help="Rank slots by importance or by gates.")] = "importance",
    least: Annotated[int, typer.Option(min=0, help="Slots to keep at every layer; 0: whole layers may go.")] = 0,
    task: Annotated[str | None, typer.Option("--task", "-t", help="e2e, rte, ... (default: the prefix's own)")] = None,
    base: Base = None,
    split: Annotated[str, typer.Option(help="dev, test or train: what to probe and to score on.")] = "dev",
    limit: Annotated[int | None, typer.Option(min=2, help="Rows to read. (default: the probe's, else 200)")] = None,
    score: Annotated[bool, typer.Option("--evaluate/--no-evaluate", help="Score before and after.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The prefix folder. (default: pruned in the run folder)")
    ] = None,
    strict: Strict = False,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
    files: dict[str, Any] | None = None,
) -> None:
    """Keep the best slots of a prefix, of all layers together; a layer may lose all of its slots.

    Ranks by what foreword probe found, and probes first where it did not. Then train the pruned prefix again.

    foreword prune runs/rte --keep 0.5
    foreword train rte --base minilm --from runs/rte/pruned --retrain continue
    """
    from foreword.probe import RANKINGS, beside
    from foreword.prune import parameter_budget
    from foreword.prune import prune as run

    if by not in RANKINGS:
        raise ConfigError(f"--by {by}", " or ".join(RANKINGS), "choose one of them")
    loaded, prefixes = load_prefixes(path, base, dtype, device)
    results: list[dict[str, Any]] = []
    folder = out or beside(path, "pruned")
    for name, place, prefix in prefixes:
        parameter_budget(prefix, keep, budget_parameters)
        rows = _Rows(task, files or {}, split, limit, strict)
        probed, chosen = rows.probed(loaded, prefix, place, name, score)
        pruned = run(prefix, probed.scores(by), keep=keep, budget_parameters=budget_parameters, by=by, least=least)
        pruned.save(folder / name)
        _print_lengths(prefix, pruned, f"{name} slots that stay, by {by}".strip())
        changes = []
        if chosen is not None and score:
            changes = score_change(loaded, prefix, pruned, chosen, split, probed.limit, "pruned")
        lengths = {str(site): length for site, length in pruned.lengths.items()}
        results.append({
            "path": str(folder / name), "lengths": lengths,
            "parameters": [prefix.num_parameters, pruned.num_parameters],
            "results": [change.to_dict(outputs=False) for change in changes],
        })  # fmt: skip
    say(f"written    {folder}")
    say(f"next       {_next(prefixes[0][2], len(prefixes), task, loaded.name, folder)}")
    emit(results[0] if len(results) == 1 else {"results": results}, as_json)


def _next(prefix: Prefix, seeds: int, task: str | None, base: str, folder: Path) -> str:
    """The command that trains again: on the rows, few or all, and with the seeds that the prefix was trained with."""
    known = task or prefix.metadata.get("task") or "TASK"
    rows = f"{known} --train ROWS" if known in OWN_TASKS else known
    training = prefix.metadata.get("training") or {}
    drawn = ""
    for option in ("shots", "rows", "fraction", "sample_seed", "seed"):
        usual = getattr(TrainConfig, option)
        if training.get(option, usual) != usual:
            drawn += f" --{option.replace('_', '-')} {training[option]}"
    several = f" --seeds {seeds}" if seeds > 1 else ""
    again = folder.with_name(f"{folder.name}-retrained")
    return f"foreword train {rows} --base {base} --from {folder} --retrain continue{drawn}{several} --out {again}"


class _Rows(NamedTuple):
    """Which rows are probed and scored."""

    task: str | None
    files: dict[str, Any]
    split: str
    limit: int | None
    strict: bool

    def probed(self, base: BaseModel, prefix: Prefix, place: Path, name: str, score: bool) -> tuple[Probe, Task | None]:
        """What a probe finds, or an earlier one found; and the task, where it is needed."""
        from foreword.probe import beside, saved_probe
        from foreword.probe import probe as run
        from foreword.start import drawn_as

        task = self.task or prefix.metadata.get("task")
        probed = saved_probe(beside(place, "probe"), prefix, task, self.split, self.limit)
        chosen = None
        if probed is None or score:
            chosen = make_task(self.task, self.files, known_of(prefix), self.split)
            chosen = chosen if self.files else drawn_as(prefix, chosen)
        if probed is None:
            assert chosen is not None
            with bar(f"probing {name}".strip()) as progress:
                probed = run(
                    base, prefix, chosen, self.split, limit=self.limit or 200, strict=self.strict, progress=progress
                )
            probed.save(beside(place, "probe"))
        for line in probed.warnings():
            note(f"warning: {line}")
        return probed, chosen


def _print_lengths(before: Prefix, after: Prefix, title: str) -> None:
    rows = [[str(site), length, after.lengths[site]] for site, length in before.lengths.items()]
    table(title, ["", "before", "after"], rows)
    share = 100 * after.num_parameters / before.num_parameters
    say(f"parameters {before.num_parameters:,} before, {after.num_parameters:,} after ({share:.1f} %)")


def score_change(
    base: BaseModel, before: Prefix, after: Prefix, task: Task, split: str, limit: int | None, what: str
) -> list[Evaluation]:
    """Score a prefix before and after a change, and print the scores and their difference."""
    from foreword.evaluate import evaluate

    results = []
    for each in (before, after):
        with bar("before" if each is before else "after") as progress:
            results.append(evaluate(base, each, task, split, limit=limit, progress=progress))
    _print_change(results, what)
    return results


def _print_change(results: list[Evaluation], what: str) -> None:
    before, after = results
    rows: list[list[Any]] = [
        [name, str(score), str(after.scores[name]), f"{after.scores[name].value - score.value:+.1f}"]
        for name, score in before.scores.items()
    ]
    costs = [each.nats_per_token if each.nats_per_label is None else each.nats_per_label for each in results]
    unit = "token" if before.nats_per_label is None else "label"
    if costs[0] is not None and costs[1] is not None:
        rows.append([f"nats per {unit}", f"{costs[0]:.3f}", f"{costs[1]:.3f}", f"{costs[1] - costs[0]:+.3f}"])
    table(f"{before.task} {before.split}, {len(before.outputs)} rows", ["", "before", what, "change"], rows)
