"""What a result depends on besides its configuration: the code, as it stands in its files, and the packages."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError

__all__ = ["code_version", "git_state", "is_code", "package_versions", "resolve"]

_PACKAGE = Path(__file__).parents[1]
# What no run reads (an import contract keeps it so): a change there makes no result a different one.
_UNREAD = (
    "cli/", "engine/", "server/", "experiments/", "catalog.py", "charts.py", "compare.py", "explain.py",
    "explain_page.py", "load.py", "load_client.py", "load_report.py", "seeds.py", "similarity.py", "start.py",
    "store.py",
)  # fmt: skip
_READ = ("experiments/perform.py",)
_PACKAGES = ("foreword", "torch", "transformers", "accelerate", "safetensors", "numpy", "peft", "ray", "sacrebleu")
# Another version of these may give other numbers.
_DECISIVE = ("torch", "transformers", "peft", "sacrebleu", "pycocoevalcap", "bert-score", "seqeval")
_MOST_CHANGES = 20


def resolve(name: str) -> Any:
    """The function that "module:function" names; `ConfigError` if there is none.

    >>> resolve("math:sqrt")(9.0)
    3.0
    """
    module, colon, function = name.partition(":")
    try:
        found = getattr(import_module(module), function, None) if colon and module else None
    except ModuleNotFoundError as error:
        if error.name != module and not module.startswith(f"{error.name}."):
            raise  # the module is there, and what it needs is not
        found = None
    if not callable(found):
        raise ConfigError(f"perform = {name!r}", "module:function that can be imported", "correct it")
    return found


@functools.lru_cache(maxsize=8)
def code_version(perform: str = "", package: Path = _PACKAGE) -> str:
    """The hash of the source files that a run may read, of the package of `perform`, and of the decisive versions.

    Read once for a process: its modules are those of then. `is_code` says whether the files are so still.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name in _READ or not name.startswith(_UNREAD):
            digest.update(f"{name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    for path in _own_files(perform):
        digest.update(path.read_bytes())
    found = package_versions(_DECISIVE)
    digest.update(repr(sorted(found.items())).encode())
    return digest.hexdigest()


def is_code(version: str, perform: str) -> bool:
    """Whether the files are still those of that `code_version`: a module may be loaded long after a run began."""
    return code_version.__wrapped__(perform) == version


def _own_files(perform: str) -> list[Path]:
    """The modules beside a function that is not Foreword's: its whole package, else its file."""
    module = perform.partition(":")[0]
    top = module.partition(".")[0]
    if top in ("", "foreword"):
        return []
    found, spec = find_spec(top), find_spec(module)
    if found is None or spec is None or spec.origin is None:
        raise ConfigError(f"perform = {perform!r}", "module:function that can be imported", "correct it")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    return sorted({path for folder in folders for path in folder.rglob("*.py")} | {Path(spec.origin)})


def git_state(folder: Path = _PACKAGE) -> dict[str, Any] | None:
    """Commit, whether files differ from it, and which; None where the code is no checkout that git tracks."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if not _git(folder, "ls-files", "--", "."):
            return None
        changed = [line[3:] for line in _git(folder, "status", "--porcelain", "--", ".").splitlines()]
        return {"commit": _git(folder, "rev-parse", "HEAD").strip(), "dirty": bool(changed),
                "changed": changed[:_MOST_CHANGES]}  # fmt: skip
    return None


def package_versions(names: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """The versions of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git(folder: Path, *words: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        ["git", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout
