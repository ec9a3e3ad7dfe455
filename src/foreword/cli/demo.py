"""`foreword demo`: the whole way once, on the packaged base model and the data set that comes with Foreword."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli.console import bar, emit, say, stages
from foreword.cli.evaluate import print_scores, print_side_by_side
from foreword.cli.options import Json, load_base

if TYPE_CHECKING:
    from foreword.evaluate import Evaluation

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder; a finished run is used again.")] = Path(
        "runs/demo"
    ),
    as_json: Json = False,
) -> None:
    """Train a prefix on the trails data, compare it with the untouched base model, and show both."""
    from foreword.config import TrainConfig
    from foreword.evaluate import evaluate
    from foreword.tasks import get_task
    from foreword.train import train

    start = time.perf_counter()
    task = get_task("trails")
    say("1/3  the base model: smollm2-135m, frozen")
    base = load_base("smollm2-135m")
    say(f"2/3  training a prefix on {len(task.split('train'))} descriptions of hiking trails")
    with stages() as progress:
        result = train(
            base, None, task, TrainConfig(epochs=DEMO_EPOCHS, dev_limit=DEMO_ROWS), out=out, progress=progress
        )
    say(f"3/3  writing about {DEMO_ROWS} trails that it has not seen")
    results: list[Evaluation] = []
    for prefix in (None, result.prefix):
        with bar("base model" if prefix is None else "with prefix") as progress_bar:
            results.append(evaluate(base, prefix, task, limit=DEMO_ROWS, progress=progress_bar))
    say()
    print_side_by_side(results, 3)
    print_scores(results)
    kilobytes = result.prefix.num_bytes / 1e3
    say(f"the prefix: {result.prefix.num_parameters:,} numbers, {kilobytes:.0f} kB, in {out}")
    say(f"the demo took {time.perf_counter() - start:.0f} seconds")
    say()
    say("next, try")
    say(f'  foreword generate --prefix {out} "name : Heron Loop | length : 14 km | start : Hollin Bridge"')
    say(f"  foreword show {out}")
    say("  foreword train --train rows.jsonl --prompt-column question --completion-column answer --out runs/mine")
    say("  foreword check smollm2-135m")
    emit({"folder": str(out), "results": [r.to_dict(outputs=False) for r in results]}, as_json)


DEMO_EPOCHS = 2
DEMO_ROWS = 40
