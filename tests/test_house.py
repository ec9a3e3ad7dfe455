"""The rules of the house: what importing costs, what is public, how large files grow, what may not be written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import foreword

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src").rglob("*.py"))


def tracked() -> list[Path]:
    """The files that git tracks; without git (a source archive), all that are no caches or builds."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = [ROOT / name for name in ("src", "tests", "docs", "benchmarks", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return [path for path in [*files, *ROOT.iterdir()] if path.is_file()]


def text_of(path: Path) -> str:
    """The text of a file, empty for binary ones."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


IMPORT_TIME = "import time; start = time.perf_counter(); import foreword; print(time.perf_counter() - start)"


def test_import_takes_less_than_a_third_of_a_second():
    assert min(float(run_python(IMPORT_TIME)) for _ in range(3)) < 0.3


@pytest.mark.parametrize("statement", ["import foreword", "import foreword.cli", "import foreword.config"])
def test_import_loads_no_torch_and_no_transformers(statement: str):
    heavy = "{'torch', 'transformers', 'accelerate', 'numpy', 'pyarrow', 'sacrebleu'}"
    assert run_python(f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("name", foreword.__all__)
def test_public_name_resolves_and_is_explained(name: str):
    assert (getattr(foreword, name).__doc__ or "").strip()


def test_public_names_are_listed():
    assert foreword.__all__ == sorted(set(foreword.__all__))
    assert set(foreword.__all__) <= set(dir(foreword))
    assert not hasattr(foreword, "no_such_name")


def test_public_function_wins_over_the_module_of_its_name():
    imports = "import foreword.train, foreword.evaluate, foreword as fw"
    assert run_python(f"{imports}; print(callable(fw.train), callable(fw.evaluate))") == "True True"
    assert (
        run_python("from foreword.train import TrainResult; import foreword; print(callable(foreword.train))") == "True"
    )


def test_error_classes_are_public():
    from foreword import errors

    assert set(errors.__all__) <= set(foreword.__all__)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_module_is_small_and_says_what_it_holds(path: Path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) < 560
    assert ast.get_docstring(tree), "a module begins with what it holds"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
            assert lines < 70, f"{node.name} has {lines} lines"


def test_files_are_small():
    large = [(path.name, path.stat().st_size) for path in tracked() if path.stat().st_size > 400 * 1024]
    assert large == []


def test_no_words_that_do_not_belong():
    # Written in pieces, so that this file passes its own test.
    words = [r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bXX" + r"X\b", "NotImplemented" + "Error"]
    machines = [f"(?<![A-Za-z0-9_.~-])/{top}/" for top in ("work", "root", "farm")] + ["/tmp/ba" + "sh"]
    registries = [r"pypi\." + "org", r"pythonhosted\." + "org", r"registry\.npmjs\." + "org"]
    forbidden = re.compile("|".join(words + machines + registries))
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}" for path in tracked() for match in forbidden.finditer(text_of(path))
    ]
    assert found == []


def test_version_is_written_once():
    assert 'dynamic = ["version"]' in text_of(ROOT / "pyproject.toml")
    assert f"## {foreword.__version__}" in text_of(ROOT / "CHANGELOG.md")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", foreword.__version__)


@pytest.mark.parametrize("page", [path for path in tracked() if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_in_the_documents_resolve(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page)) + re.findall(r'<img[^>]* src="([^"]+)"', text_of(page))
    missing = [
        link
        for link in links
        if not re.match(r"[a-z]+:|#", link) and not (page.parent / link.partition("#")[0]).exists()
    ]
    assert missing == []


def test_constraints_pin_every_dependency():
    requirement = re.compile(r'^\s+"([a-zA-Z0-9_-]+)[<>=;"]', re.M)
    project = text_of(ROOT / "pyproject.toml")
    core = project[project.index("\ndependencies = [") : project.index("[project.optional-dependencies]")]
    dev = project[project.index("\ndev = [") : project.index("[project.scripts]")]
    pins = {line.partition("==")[0] for line in text_of(ROOT / "constraints.txt").splitlines() if "==" in line}
    assert set(requirement.findall(core + dev)) <= pins
