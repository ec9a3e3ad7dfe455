"""The command line: parse, call, print. Each command is in the file of its name; nothing heavy is imported for help."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from foreword.cli import (
    admin,
    bench,
    check,
    compare,
    demo,
    evaluate,
    explain,
    generate,
    models,
    predict,
    prefixes,
    probe,
    prune,
    serve,
    similarity,
    store,
    study,
    tenant,
    train,
)
from foreword.cli.console import note
from foreword.errors import ForewordError

__all__ = ["app", "main"]


class _Stopped(Exception):
    """Ctrl-C, with what the stopped command has to say."""


class _Commands(TyperGroup):
    """The commands; typer would turn Ctrl-C into an exit status and lose its message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Stopped(str(stop) or "stopped") from None


app = typer.Typer(
    cls=_Commands,
    name="foreword",
    help="Train, evaluate and serve prefixes: small key/value blocks in front of a frozen language model's attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("show")(prefixes.show)
app.command("fold")(prefixes.fold)
app.command("probe")(probe.probe)
app.command("prune")(prune.prune)
app.command("explain")(explain.explain)
app.command("compare")(compare.compare)
app.command("similarity")(similarity.similarity)
app.command("check")(check.check)
app.command("models")(models.models)
app.command("demo")(demo.demo)
app.command("serve")(serve.serve)
app.add_typer(store.store, name="store")
app.add_typer(tenant.tenant, name="tenant")
app.add_typer(admin.admin, name="admin")
app.add_typer(bench.app, name="bench")
app.add_typer(study.study, name="study")


def _version(wanted: bool) -> None:
    if wanted:
        import foreword

        typer.echo(f"foreword {foreword.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Train, evaluate and serve prefixes: small key/value blocks in front of a frozen language model's attention."""


def main() -> None:
    """Run the command line; errors that a user can mend are one line, and the exit status is not 0.

    1: an error with its reason; 2: wrong usage; 130: stopped by Ctrl-C.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        status = app(standalone_mode=False)
    except ForewordError as error:
        note(f"error: {error}")
        status = 1
    except (_Stopped, KeyboardInterrupt, typer.Abort) as stop:
        note(str(stop) or "stopped")
        status = 130
    except BrokenPipeError:  # the reader of a pipe went away: `foreword show ... | head`
        _drop_output()
        status = 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        note(f"error: cannot write the output ({error.strerror}); expected a place with enough space; free some space")
        _drop_output()
        status = 1
    except Exception as error:
        if not hasattr(error, "show"):
            raise
        error.show()  # a usage error of typer
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def _drop_output() -> None:
    """Send what is still in the buffer of standard output nowhere: it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
