"""The command line as its users meet it: whole commands, their output, their errors, and the live process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foreword.cli import main
from tiny import save_tiny

ROWS = [
    {"question": f"What comes after {k}?", "answer": f"After {k} comes {k + 1}.", "also": f"It is {k + 1}."}
    for k in range(24)
]
SMALL = ["--epochs", "6", "--length", "3", "--batch-size", "6", "--learning-rate", "0.1"]
COLUMNS = ["--prompt-column", "question", "--completion-column", "answer"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def trained(model: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny model."""
    out = tmp_path_factory.mktemp("runs") / "answers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["foreword", "train", "--base", model, "--train", rows, *COLUMNS, *SMALL, "-o", str(out)]
        )
        with pytest.raises(SystemExit) as exit_:
            main()
    assert exit_.value.code == 0
    return out


def last_json(out: str) -> dict:
    return json.loads(out.strip().splitlines()[-1])


def test_a_run_folder_says_everything(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["versions"]["torch"] and config["command"]
    assert json.loads((trained / "summary.json").read_text())["status"] == "finished"
    assert len((trained / "metrics.jsonl").read_text().splitlines()) > 4


def test_the_same_command_returns_the_finished_run(run, trained: Path, model: str, rows: str) -> None:
    before = (trained / "prefix" / "prefix.safetensors").read_bytes()
    status, out, _ = run("train", "--base", model, "--train", rows, *COLUMNS, *SMALL, "-o", str(trained), "--json")
    assert status == 0 and last_json(out)["folder"] == str(trained)
    assert (trained / "prefix" / "prefix.safetensors").read_bytes() == before


def test_other_options_in_the_same_folder_are_refused(run, trained: Path, model: str, rows: str) -> None:
    status, _, err = run("train", "--base", model, "--train", rows, *COLUMNS, *SMALL, "-o", str(trained), "--seed", "5")
    assert status == 1 and "seed" in err and "--overwrite" in err.splitlines()[-1]


def test_a_toml_file_is_the_same_as_flags(run, tmp_path: Path, trained: Path, model: str, rows: str) -> None:
    config = tmp_path / "run.toml"
    config.write_text("epochs = 6\nlength = 3\nbatch_size = 6\nlearning_rate = 0.5\n")
    arguments = ["train", "--base", model, "--train", rows, *COLUMNS, "-c", str(config), "--learning-rate", "0.1"]
    status, _, _ = run(*arguments, "-o", str(tmp_path / "run"))
    assert status == 0
    same = [(folder / "prefix" / "prefix.safetensors").read_bytes() for folder in (trained, tmp_path / "run")]
    assert same[0] == same[1]


def test_evaluate_beside_the_base(run, trained: Path, rows: str, tmp_path: Path) -> None:
    saved = tmp_path / "scores.json"
    status, out, _ = run(
        "evaluate", str(trained), "--test", rows, *COLUMNS, "--references", "answer", "--references", "also",
        "--limit", "5", "--max-new-tokens", "12", "--with-base", "--json", "--out", str(saved),
    )  # fmt: skip
    assert status == 0 and "base model" in out
    base, prefix = last_json(out)["results"]
    assert base["prefix"] is None and prefix["rows"] == 5 and set(prefix["scores"]) == {"bleu", "chrf++"}
    assert prefix["nats_per_token"] < base["nats_per_token"]
    assert len(json.loads(saved.read_text())["outputs"]) == 5


def test_evaluate_with_chosen_metrics(run, trained: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["evaluate", str(trained), "--test", rows, *COLUMNS, "--limit", "5", "--max-new-tokens", "4", "--json"]
    command += ["--out", str(trained.parent / "chosen.json"), "--metrics"]
    status, out, _ = run(*command, "nist, summary")
    assert status == 0 and set(last_json(out)["results"][0]["scores"]) == {"nist", "rouge_1", "rouge_2", "rouge_l"}
    assert re.search(r"nist +\W* *\d\.\d\d \[\d\.\d\d, \d\.\d\d\]", out)
    status, _, err = run(*command, "blue")
    assert status == 1 and "metric 'blue'; expected one of bleu, nist" in err and "or a set: e2e, webnlg" in err
    monkeypatch.setenv("PATH", "")
    status, out, err = run(*command, "meteor")
    assert status == 1 and "'java' is not installed" in err and "prompt" not in out


def test_generate_streams_one_and_batches_many(run, trained: Path) -> None:
    status, streamed, _ = run("generate", "-p", str(trained), "What comes after 3?", "--max-new-tokens", "8")
    assert status == 0
    status, batched, _ = run(
        "generate", "-p", str(trained), "What comes after 3?", "What?", "--max-new-tokens", "8", "--json"
    )
    assert status == 0 and last_json(batched)["outputs"][0].strip() == streamed.strip()


def test_generate_reads_standard_input(run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n\nWho?\n"))
    status, out, _ = run("generate", "-p", str(trained), "--max-new-tokens", "4", "--json")
    assert status == 0 and last_json(out)["prompts"] == ["What?", "Who?"]


def test_show_and_fold(run, trained: Path, tmp_path: Path) -> None:
    status, out, _ = run("show", str(trained), "--json")
    assert status == 0 and "3 slots at 2 layers" in out
    status, out, _ = run("fold", str(trained), "--out", str(tmp_path / "folded"), "--json")
    assert status == 0 and last_json(out)["num_bytes"] == 4 * 2 * 2 * 2 * 3 * 8
    assert run("show", str(tmp_path / "folded"))[0] == 0


def test_training_goes_on_from_a_prefix(run, trained: Path, model: str, rows: str, tmp_path: Path) -> None:
    status, _, _ = run(
        "train",
        "--base",
        model,
        "--train",
        rows,
        *COLUMNS,
        *SMALL,
        "--from",
        str(trained),
        "-o",
        str(tmp_path / "more"),
    )
    assert status == 0

    def best(folder: Path) -> float:
        return json.loads((folder / "summary.json").read_text())["best_dev_loss"]

    assert best(tmp_path / "more") < best(trained)


def test_check_prints_the_contract(run, model: str) -> None:
    status, out, _ = run("check", model, "--json")
    assert status == 0 and last_json(out)["passed"] is True
    assert all(f"{k}" in out for k in range(1, 11))


def test_models(run) -> None:
    status, out, _ = run("models", "--json")
    assert status == 0 and last_json(out)["packaged"] == ["smollm2-135m", "minilm"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["generate", "hello"], 1, "neither --prefix nor --base"),
        (["evaluate"], 1, "neither a prefix nor --base"),
        (["show", "nowhere"], 1, "nowhere"),
        (["train", "no-such-task"], 1, "no-such-task"),
        (["train"], 1, "no task"),
        (["train", "trails", "--epochs", "0"], 1, "epochs"),
        (["train", "trails", "--base", "nobody/nothing"], 1, "cannot be loaded"),
        (["train", "--no-such-flag"], 2, "--no-such-flag"),
        (["no-such-command"], 2, "no-such-command"),
    ],
)
def test_errors_are_one_line(run, arguments: list[str], status: int, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == status and message in err
    if status == 1:
        assert err.strip().splitlines()[-1].startswith("error: ")
        assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/config.json"))


@pytest.mark.parametrize("arguments", [["--help"], ["study", "status", "mine"], ["study", "show", "mine"]])
def test_what_needs_no_model_loads_no_torch(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "experiments" / "mine").mkdir(parents=True)
    (tmp_path / "experiments" / "mine" / "defaults.toml").write_text(
        "task = 'trails'\nmethod = 'prefix'\ntuning = 2\nmetrics = 'bleu bertscore:minilm'\n"
    )
    code = f"import sys; sys.argv = {['foreword', *arguments]}\nfrom foreword.cli import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)


def test_the_reference_of_the_commands_is_current() -> None:
    script = Path(__file__).parents[1] / "docs" / "build_cli.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True, capture_output=True)


def test_ctrl_c_stops_cleanly_and_the_same_command_resumes(model: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "foreword", "train", "--base", model, "--train", rows, *COLUMNS, "--length", "3",
        "--epochs", "400", "--patience", "0", "--batch-size", "2", "-o", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 90
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size > 2000):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("stopped after step") and err.endswith("; the same command resumes\n")
    steps = len(metrics.read_text().splitlines())
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    while time.monotonic() < deadline and len(metrics.read_text().splitlines()) <= steps + 5:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    numbers = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"gradient_norm"' in line]
    assert numbers == sorted(set(numbers)) and numbers[0] == 1
