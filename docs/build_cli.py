"""Write docs/cli.md from the commands themselves: `python docs/build_cli.py [--check]`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from foreword.cli import app

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

*Generated from the commands; `make docs` writes it anew.* `foreword COMMAND --help` says the same.

Every command takes `--json`, which prints the result as one JSON line, the last one. Exit status: 0 done, 1 an error
(one line on standard error: what was got, what was expected, what to do), 2 wrong usage, 130 stopped by Ctrl-C.
"""


def page() -> str:
    """The whole page."""
    return HEAD + "".join(section(name, command) for name, command in commands(typer.main.get_command(app)))


def commands(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """All commands of a group and of the groups in it, by what is typed."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def section(name: str, command: Any) -> str:
    """One command: what it does, and its arguments and options."""
    summary, _, rest = inspect.cleandoc(command.help or "").partition("\n\n")
    examples = [line for line in rest.splitlines() if line.startswith("foreword ")]
    text = [line for line in rest.splitlines() if not line.startswith("foreword ")]
    usage = " ".join(f"[{p.name.upper()}]" for p in command.params if p.param_type_name == "argument")
    lines = [f"\n## foreword {name}", "", summary.replace("\n", " "), ""]
    if any(text):
        lines += [" ".join(text).strip(), ""]
    lines += ["```sh", f"foreword {name} {usage} [OPTIONS]".replace("  ", " "), *examples, "```", ""]
    lines += ["| option | | default |", "|---|---|---|"]
    lines += [row(param) for param in command.params if param.name != "help"]
    return "\n".join(lines) + "\n"


def row(param: Any) -> str:
    """One line of the table of options."""
    argument = param.param_type_name == "argument"
    flags = param.name.upper() if argument else ", ".join([*param.opts, *param.secondary_opts])
    text, _, default = (param.help or "").partition(" (default: ")
    shown = default.removesuffix(")") if default else param.default
    empty = shown is None or callable(shown) or shown is False or str(shown) in ("", "Sentinel.UNSET")
    return f"| `{flags}` | {text.replace('|', '&#124;')} | {'' if empty else f'`{shown}`'} |"


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    text = page()
    if "--check" in sys.argv:
        current = PAGE.exists() and PAGE.read_text() == text
        print("docs/cli.md is current" if current else "docs/cli.md is not current; run `make docs`")
        return 0 if current else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
