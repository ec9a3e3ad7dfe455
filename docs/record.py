"""Run a command and keep its output as a picture: `python docs/record.py docs/demo.svg foreword demo`."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys

from rich.console import Console
from rich.text import Text

WIDTH = 100


def main() -> int:
    """Write the picture; the exit status is that of the command."""
    path, *command = sys.argv[1:]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text(f"$ {shlex.join(command)}\n" + "".join(lines)))
    console.save_svg(path, title=shlex.join(command))
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
