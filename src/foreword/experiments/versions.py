"""What a result depends on besides its configuration: the code, as it stands in its files, and the packages."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import subprocess
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foreword.errors import ConfigError

__all__ = ["code_version", "git_state", "package_versions", "resolve"]

_PACKAGE = Path(__file__).parents[1]
# What no run reads (an import contract keeps it so): a change there makes no result a different one.
_UNREAD = ("cli/", "engine/", "server/", "experiments/")
_READ = ("experiments/perform.py",)
_PACKAGES = ("foreword", "torch", "transformers", "accelerate", "safetensors", "numpy", "peft", "ray", "sacrebleu")
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
    """The hash of the source files that a run may read, and of the module of `perform` if it is elsewhere.

    Read once for a process: its modules are those of then.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name in _READ or not name.startswith(_UNREAD):
            digest.update(f"{name}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    module = perform.partition(":")[0]
    if module and module.partition(".")[0] != "foreword":
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ConfigError(f"perform = {perform!r}", "module:function that can be imported", "correct it")
        digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()


def git_state(folder: Path = _PACKAGE) -> dict[str, Any] | None:
    """Commit, whether files differ from it, and which; None where the code is no checkout that git tracks."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if not _git(folder, "ls-files", "--", "."):
            return None
        changed = [line[3:] for line in _git(folder, "status", "--porcelain", "--", ".").splitlines()]
        return {"commit": _git(folder, "rev-parse", "HEAD").strip(), "dirty": bool(changed),
                "changed": changed[:_MOST_CHANGES]}  # fmt: skip
    return None


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git(folder: Path, *words: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        ["git", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout
