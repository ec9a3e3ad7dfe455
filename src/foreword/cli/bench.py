"""`foreword bench serve`: load a server and say how fast it answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.console import emit, note, say, table
from foreword.cli.options import Json
from foreword.errors import ConfigError, ForewordError, MissingPackage

if TYPE_CHECKING:
    from foreword.load import Measured, Workload
    from foreword.load_client import WordSize

__all__ = ["app", "serve"]

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure a server."""


@app.command("serve")
def serve(
    url: Annotated[str, typer.Option(help="The server, any that is OpenAI-compatible.")] = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(envvar="FOREWORD_KEY", help="The API key.", show_envvar=True)] = None,
    models: Annotated[str | None, typer.Option(help="Models by name: base,base:p1,base:p2.")] = None,
    prefixes: Annotated[int | None, typer.Option(min=1, help="So many of the prefixes that the server lists.")] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="The base model alone.")] = False,
    mix: Annotated[
        str, typer.Option(help="How often each model is asked: uniform or zipf[:EXPONENT], the first the most.")
    ] = "uniform",
    rate: Annotated[
        str, typer.Option(help="Requests per second, arriving at random (Poisson), or closed:C, C clients in a loop.")
    ] = "closed:8",
    requests: Annotated[int | None, typer.Option(help="End after so many requests. (default: 100)")] = None,
    seconds: Annotated[float | None, typer.Option(help="Send nothing new after so many seconds.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Length of prompts, LOW:HIGH or one number.")] = "32:128",
    output_tokens: Annotated[str, typer.Option(help="Length of answers, LOW:HIGH or one number.")] = "16:64",
    seed: Annotated[int, typer.Option(help="What is sent is a function of the options and the seed.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds until a request counts as failed.")] = 120.0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("load"),
    as_json: Json = False,
) -> None:
    """Load a server: throughput, time to the first token and between tokens, errors; as a table, JSON and PNG.

    At a rate, latency counts from the planned arrival, also where the server or the client is behind. Ctrl-C reports
    what was measured so far.

    foreword bench serve --prefixes 32 --mix zipf --rate 4 --requests 200

    foreword bench serve --models smollm2-135m,smollm2-135m:e2e --rate closed:32 --seconds 60
    """
    import asyncio
    import gc

    from foreword.load import Workload

    chosen = {
        "names": [name.strip() for name in (models or "").split(",") if name.strip()],
        "prefixes": prefixes,
        "base_only": base_only,
    }
    if sum((bool(chosen["names"]), prefixes is not None, base_only)) != 1:
        raise ConfigError(
            "models chosen in no way or in several", "one of --models, --prefixes and --base-only", "choose one"
        )
    per_second, clients = _rate(rate)
    settings: dict[str, Any] = {
        "zipf": _mix(mix), "rate": per_second, "clients": clients,
        "requests": 100 if requests is None and seconds is None else requests, "seconds": seconds,
        "prompt_tokens": _range("--prompt-tokens", prompt_tokens),
        "output_tokens": _range("--output-tokens", output_tokens), "seed": seed,
    }  # fmt: skip
    if not 0 < timeout < float("inf"):
        raise ConfigError(f"--timeout {timeout}", "seconds above 0", "change it")
    Workload(models=("-",), **settings)  # refuse settings before anything is asked of the server
    try:
        record, workload, size, measured = asyncio.run(_run(url, key, timeout, chosen, settings))
    finally:
        gc.unfreeze()
    _report(out, record, workload, size, measured, as_json)


async def _run(
    url: str, key: str | None, timeout: float, chosen: dict[str, Any], settings: dict[str, Any]
) -> tuple[dict[str, Any], Workload, WordSize | None, Measured]:
    """Choose the models, and load the server; also what the run was made with."""
    import gc

    from foreword.cli.console import bar
    from foreword.load import Workload, measure, prepare
    from foreword.load_client import Server

    async with Server(url, key, timeout_seconds=timeout) as server:
        models, size = await prepare(server, **chosen)
        record = {
            "url": server.url,
            "timeout_seconds": timeout,
            "server_version": await server.version(),
            **_provenance(key),
        }
        gc.collect()
        gc.freeze()  # what the imports left need not be looked through while times are taken
        workload = Workload(models=models, **settings)
        with bar("requests" if workload.requests else "seconds") as advance:

            def progress(done: int, passed: float) -> None:
                if workload.requests:
                    advance(done, workload.requests)
                else:
                    advance(int(passed), int(workload.seconds or 0))

            measured = await measure(server, workload, size, progress=progress)
    return record, workload, size, measured


def _provenance(key: str | None) -> dict[str, Any]:
    """Versions, command and machine, without the key."""
    from importlib.metadata import version

    from foreword.runs import provenance

    record = provenance("client only")
    record["versions"]["httpx"] = version("httpx")
    if key:
        hidden = {key: "***", f"--key={key}": "--key=***"}
        record["command"] = [hidden.get(word, word) for word in record["command"]]
    return record


def _report(
    out: Path, record: dict[str, Any], workload: Workload, size: WordSize | None, measured: Measured, as_json: bool
) -> None:
    """Print and write what was measured; ends with an error where nothing was answered, or with Ctrl-C's status."""
    from foreword.load_report import BUSY, load_png, save_load, summary

    numbers = summary(measured)
    _print_numbers(numbers)
    for line in _notes(numbers, size):
        say(line)
    if measured.cpu_share > BUSY:
        note(f"warning: the client used {measured.cpu_share:.0%} of a core; it may be the limit, not the server")
    options = {**dataclasses.asdict(workload), "words_sized_by": "tokenize" if size else "words"}
    save_load(out, {**record, "options": options, "seed": workload.seed, "summary": numbers}, measured)
    written = ["load.json"]
    try:
        load_png(out / "load.png", measured, _title(workload))
        written.append("load.png")
    except MissingPackage as missing:
        note(f"no image: {missing}")
    say(f"{out}: {', '.join(written)}")
    emit({"folder": str(out), **numbers}, as_json)
    if measured.stopped:
        raise KeyboardInterrupt(f"stopped after {numbers['sent']} requests; what was measured so far is in {out}")
    if not numbers["ok"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in numbers["failed"].items())
        said = next((sample.message for sample in measured.samples if sample.message), "")
        raise ForewordError(f"no request was answered ({kinds}{said and ': '}{said})", "answers", "check the server")


def _print_numbers(numbers: dict[str, Any]) -> None:
    """The two tables."""
    from foreword.load_report import number

    rows: list[list[Any]] = [["sent", numbers["sent"]], ["ok", numbers["ok"]], *map(list, numbers["failed"].items())]
    if numbers["unfinished"]:
        rows.append(["unfinished", numbers["unfinished"]])
    table("requests", ["", "number"], rows)
    kinds = {"ttft": "to the first token (TTFT)", "itl": "between tokens (ITL)", "end_to_end": "end to end"}
    columns = ("mean", "p50", "p95", "p99")
    spreads = [(label, numbers[f"{name}_seconds"]) for name, label in kinds.items()]
    table(
        f"milliseconds, from the {numbers['latency_from']}",
        ["latency", *columns],
        [
            [label, *("–" if spread[c] is None else number(1000 * spread[c]) for c in columns)]
            for label, spread in spreads
        ],
    )


def _notes(numbers: dict[str, Any], size: WordSize | None) -> list[str]:
    """What has to be said beside the tables."""
    from foreword.load_report import number

    per_second, tokens = numbers["requests_per_second"] or 0.0, numbers["output_tokens_per_second"] or 0.0
    lines = [
        f"throughput      {number(tokens)} output tokens/s, {number(per_second)} requests/s, over "
        f"{numbers['seconds']:.1f} seconds (tokens counted by the {numbers['tokens_counted_by']})"
    ]
    if numbers["sending_late_seconds"] is not None and numbers["sent"]:
        late = numbers["sending_late_seconds"]
        lines.append(f"sending         {1000 * late['mean']:.3g} ms after the plan, p99 {1000 * late['p99']:.3g} ms")
    given = "forced by ignore_eos" if numbers["output_lengths_forced"] else "an upper limit, as ignore_eos is refused"
    lines.append(
        f"output length   {given}; {numbers['ended_early']} of {numbers['ok']} answers were shorter than asked"
    )
    mean = numbers["prompt_tokens_mean"]
    lines.append(
        f"prompt length   sized by {'the server' if size else 'words'}"
        + ("" if mean is None else f"; {mean:.4g} tokens on average by the server's count")
    )
    lines.append(f"client          {numbers['client_cpu_share']:.1%} of a core")
    return lines


def _title(workload: Workload) -> str:
    many = f"{len(workload.models)} models" if len(workload.models) > 1 else workload.models[0]
    mix = f"zipf {workload.zipf:g}" if workload.zipf else "uniform"
    how = f"{workload.clients} clients" if workload.clients else f"{workload.rate:g} requests per second"
    return f"{many}{f', {mix}' if len(workload.models) > 1 else ''}, {how}"


def _mix(text: str) -> float:
    """The exponent of a mix: 0 is uniform."""
    name, _, exponent = text.partition(":")
    if text == "uniform":
        return 0.0
    if name == "zipf":
        return _number("--mix", text, exponent or "1.1", "uniform or zipf[:EXPONENT]")
    raise ConfigError(f"--mix {text}", "uniform or zipf[:EXPONENT]", "change it")


def _rate(text: str) -> tuple[float | None, int | None]:
    """Requests per second, or the clients of a closed loop."""
    name, colon, count = text.partition(":")
    wanted = "requests per second, or closed:C"
    if colon and name == "closed":
        clients = _number("--rate", text, count, wanted)
        if clients != int(clients) or clients < 1:
            raise ConfigError(f"--rate {text}", "closed:C with 1 client or more", "change it")
        return None, int(clients)
    return _number("--rate", text, text, wanted), None


def _range(option: str, text: str) -> tuple[int, int]:
    low, colon, high = text.partition(":")
    try:
        return int(low), int(high if colon else low)
    except ValueError:
        raise ConfigError(f"{option} {text}", "LOW:HIGH or one number", "change it") from None


def _number(option: str, text: str, value: str, wanted: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{option} {text}", wanted, "change it")
    return number
