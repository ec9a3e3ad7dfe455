"""A user's own files: formats, templates, rows that cannot be used, and errors of one line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import ConfigError, DataError, ForewordError
from foreword.tasks import FileTask, SkippedRow, get_task
from foreword.tasks.template import Template

ROWS = [
    {"question": "What is\nsought?", "answer": 'A "word", or two.'},
    {"question": "Où ?", "answer": "Là."},
    {"question": "Tab\there?", "answer": "Yes\tindeed."},
]
DOCS = Path(__file__).parent.parent / "docs" / "data.md"


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[dict[str, str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tsv(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    return write_csv(path, rows, "\t")


def write_parquet(path: Path, rows: Sequence[Any]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(list(rows)), path)
    return path


WRITERS: dict[str, Callable[..., Path]] = {
    "jsonl": write_jsonl, "ndjson": write_jsonl, "csv": write_csv, "tsv": write_tsv, "parquet": write_parquet
}  # fmt: skip


def qa(path: Path, **options: Any) -> FileTask:
    return FileTask(test=path, prompt_column="question", completion_column="answer", **options)


def one_line(error: pytest.ExceptionInfo[ForewordError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("extension", WRITERS)
def test_all_formats_read_the_same(tmp_path: Path, extension: str) -> None:
    split = qa(WRITERS[extension](tmp_path / f"rows.{extension}", ROWS)).split("test")
    assert [(e.prompt, e.completion) for e in split] == [(r["question"] + "\n", r["answer"]) for r in ROWS]
    assert [e.references for e in split] == [(r["answer"],) for r in ROWS]
    assert split.skipped == [] and split.source == f"rows.{extension}"
    first = 2 if extension in ("csv", "tsv") else 1
    assert [e.row for e in split] == [first, first + 1, first + 2]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_bytes(b'\xef\xbb\xbfquestion,answer\r\n"two\r\nlines",yes\r\n\r\nplain,no\r\n')
    lines.write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "b"}\r\n\r\n{"question": "c", "answer": "d"}\r\n')
    assert [(e.prompt, e.completion, e.row) for e in qa(table).split("test")] == [
        ("two\r\nlines\n", "yes", 2), ("plain\n", "no", 4)
    ]  # fmt: skip
    assert [(e.completion, e.row) for e in qa(lines).split("test")] == [("b", 1), ("d", 3)]


def test_templates(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"question": "Who {x}?", "customer rating": "low", "answer": " Me. "}])
    task = FileTask(
        test=path, template="Q: {question} ({customer rating}) {{ok}}\\nA:  ", completion_template="<{answer}>"
    )
    (example,) = task.split("test")
    assert example.prompt == "Q: Who {x}? (low) {ok}\nA:\n"
    assert example.completion == "< Me. >"
    assert example.references == ("< Me. >",)


@given(st.lists(st.tuples(st.text(), st.from_regex(r"[^{}\\:!]+", fullmatch=True)), min_size=1), st.text())
def test_a_template_puts_every_column_where_it_stands(parts: list[tuple[str, str]], end: str) -> None:
    parts = [(literal.replace("\\", ""), column) for literal, column in parts]
    end = end.replace("\\", "")
    double = {"{": "{{", "}": "}}"}
    text = "".join("".join(double.get(c, c) for c in literal) + "{" + column + "}" for literal, column in parts)
    template = Template.parse(text + "".join(double.get(c, c) for c in end))
    values = {column: f"<{column}>" for _, column in parts}
    assert template.render(values) == "".join(literal + f"<{column}>" for literal, column in parts) + end


@pytest.mark.parametrize(
    "text", ["{question", "question}", "{}", "no column", "{question!r}", "{question:>9}", "{question:{width}}", "{!r}"]
)
def test_bad_templates_are_refused(tmp_path: Path, text: str) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS)
    with pytest.raises(ConfigError) as error:
        FileTask(test=path, template=text)
    assert "template" in one_line(error) and "expected columns in braces" in str(error.value)


SKIPPED = [
    ('{"question": "a"}', "no column 'answer' (columns here: question)"),
    ('{"question": "a", "answer": " "}', "column 'answer' is empty"),
    ('{"question": "a", "answer": null}', "column 'answer' is empty"),
    ('{"question": 7, "answer": "b"}', "column 'question' is a number, not text"),
    ('{"question": true, "answer": "b"}', "column 'question' is true or false, not text"),
    ('{"question": "a", "answer": ["b"]}', "column 'answer' is a list, not text"),
    ('{"question": "a", "answer": {}}', "column 'answer' is an object, not text"),
    ('{"question": "\\ud800", "answer": "b"}', "column 'question' holds half a character (a lone surrogate)"),
    ('{"question": "a" "answer"}', "not valid JSON (Expecting ',' delimiter, column 18)"),
    ('["a", "b"]', "not a JSON object"),
    ("[" * 100_000, "not usable JSON"),
    ('{"question": ' + "1" * 5000 + "}", "not usable JSON"),
]


@pytest.mark.parametrize(("line", "reason"), SKIPPED, ids=[reason[:30] for _, reason in SKIPPED])
def test_rows_that_cannot_be_used(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n\n' + line + "\n" + '{"question": "c", "answer": "d"}')
    split = qa(path).split("test")
    assert [e.completion for e in split] == ["b", "d"]
    assert [e.row for e in split] == [1, 4]
    (skipped,) = split.skipped
    assert skipped.row == 3 and skipped.reason.startswith(reason)
    with pytest.raises(DataError) as error:
        qa(path).split("test", strict=True)
    assert one_line(error).startswith(f"row 3 of x.jsonl: {reason}")
    assert len(qa(path).split("test", limit=1, strict=True)) == 1


def test_csv_rows_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('question,answer\na,b\nonly one\na,b,c\n"a"x,b\n ,b\n"multi\nline",d\nlast\n')
    split = qa(path).split("test")
    assert [(e.row, e.completion) for e in split] == [(2, "b"), (7, "d")]
    assert split.skipped == [
        SkippedRow(3, "1 fields, the header has 2"),
        SkippedRow(4, "3 fields, the header has 2"),
        SkippedRow(5, "not valid CSV (',' expected after '\"')"),
        SkippedRow(6, "column 'question' is empty"),
        SkippedRow(8, "1 fields, the header has 2"),
    ]


def test_a_quote_that_is_never_closed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('question,answer\na,b\n"c,d\ne,f\n')
    with pytest.raises(DataError, match=r"row 3 of x\.csv: a quoted field from line 3 on is never closed") as error:
        qa(path).split("test")
    one_line(error)


def test_unknown_columns_are_listed(tmp_path: Path) -> None:
    for extension in ("csv", "parquet"):  # before any row is read
        path = WRITERS[extension](tmp_path / f"a.{extension}", ROWS)
        with pytest.raises(DataError, match="no column 'reply' in a.*; expected one of its columns: question, answer"):
            FileTask(test=path, prompt_column="question", completion_column="reply")
        with pytest.raises(DataError, match="no column 'context'"):
            FileTask(test=path, template="{context} {question}", completion_column="answer")
    task = FileTask(test=write_jsonl(tmp_path / "a.jsonl", ROWS), prompt_column="q", completion_column="answer")
    with pytest.raises(DataError, match="no column 'q' in a.jsonl; expected one of its columns: question, answer"):
        task.split("test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl holds no rows"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"question,answer\n", "a.csv holds no rows"),
        ("a.csv", b"question,answer,answer\n", "column 'answer' more than once"),
        ("a.jsonl", b'{"question": "a", "answer": ""}\n', r"can be used \(1 skipped; row 1: column 'answer'"),
        ("a.jsonl", '{"question": "a"}\n{"question": "é"}\n'.encode("latin-1"), "not UTF-8 at line 2, byte 15"),
        ("a.csv", "question,answer\na,é\n".encode("latin-1"), "not UTF-8 at line 2, byte 3"),
        ("a.csv", "question,answer\n".encode("utf-16"), "not UTF-8 at line 1, byte 1"),
        ("a.parquet", b"not parquet", "a.parquet cannot be read"),
        ("a.parquet", b"", "a.parquet cannot be read"),
        ("a.xlsx", b"", r"a.xlsx; expected an extension of .jsonl, .ndjson, .csv, .tsv, .parquet"),
        ("a", b"", "expected an extension"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ForewordError, match=message) as error:
        qa(path).split("test")
    one_line(error)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        qa(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is not a file"):
        qa(tmp_path / "folder.csv")
    with pytest.raises(ConfigError, match="no file"):
        FileTask()
    with pytest.raises(ConfigError, match="both a prompt column and a template"):
        FileTask(test=tmp_path / "a.csv", prompt_column="a", template="{a}")
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match="split 'train' without a file"):
        qa(path).split("train")
    with pytest.raises(ConfigError, match="dev_fraction"):
        qa(path, dev_fraction=1.0)
    with pytest.raises(ConfigError, match="references without a column"):
        qa(path, references=[])


def test_references(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "refs": ["x ", "y", ""], "b": "z"}, {"prompt": "c", "refs": "only", "b": None}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    split = FileTask(test=path, references="refs").split("test")
    assert [(e.completion, e.references) for e in split] == [("x", ("x", "y")), ("only", ("only",))]
    split = FileTask(test=path, references=["refs", "b"], completion_column="b").split("test")
    assert [(e.completion, e.references) for e in split] == [("z", ("x", "y", "z"))]
    assert split.skipped == [SkippedRow(2, "column 'b' is empty")]
    bad = write_jsonl(tmp_path / "b.jsonl", [rows[0], {"prompt": "a", "refs": []}, {"prompt": "a", "refs": [1]}])
    assert FileTask(test=bad, references="refs").split("test").skipped == [
        SkippedRow(2, "no references in column 'refs'"),
        SkippedRow(3, "an item of column 'refs' is a number, not text"),
    ]
    train = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}])
    task = FileTask(train=train, dev=path, references="refs")
    assert task.split("train").examples[0].references == ("b",)
    lists = write_parquet(tmp_path / "d.parquet", [{"prompt": "a", "refs": ["x", "y"]}])
    assert FileTask(test=lists, references="refs").split("test").examples[0].references == ("x", "y")


def test_dev_is_cut_from_train_by_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i // 2}", "completion": f"c{i}"} for i in range(100)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    task = FileTask(train=path, dev_fraction=0.2, seed=3)
    train, dev = task.split("train"), task.split("dev")
    assert len(train) == 80 and len(dev) == 20
    assert not {e.prompt for e in train} & {e.prompt for e in dev}
    assert sorted(e.row for e in [*train, *dev]) == list(range(1, 101))
    assert [e.row for e in train] == sorted(e.row for e in train)
    assert task.split("train", limit=7).examples == train.examples[:7]
    assert task.split("dev").sha256 == dev.sha256
    assert FileTask(train=path, dev_fraction=0.2, seed=4).split("dev").sha256 != dev.sha256
    more = write_jsonl(tmp_path / "b.jsonl", [*reversed(rows)])
    assert {e.prompt for e in FileTask(train=more, dev_fraction=0.2, seed=3).split("dev")} == {e.prompt for e in dev}
    with pytest.raises(DataError, match="'dev' without a file"):
        FileTask(train=path, dev_fraction=0).split("dev")
    assert len(FileTask(train=path, dev_fraction=0).split("train")) == 100
    with pytest.raises(DataError, match="one prompt only"):
        FileTask(train=write_jsonl(tmp_path / "c.jsonl", rows[:2])).split("train")


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    first = qa(write_jsonl(tmp_path / "a.jsonl", ROWS)).split("test")
    same = qa(write_parquet(tmp_path / "b.parquet", ROWS)).split("test")
    fewer = qa(write_jsonl(tmp_path / "c.jsonl", ROWS)).split("test", limit=2)
    assert first.sha256 == same.sha256 != fewer.sha256
    assert re.fullmatch("[0-9a-f]{64}", first.sha256)
    assert str(tmp_path) not in first.source


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n' * 10 + b"\xff\xff")  # the end cannot be read
    assert len(qa(path).split("test", limit=10)) == 10
    with pytest.raises(DataError, match="not UTF-8 at line 11"):
        qa(path).split("test")


def test_get_task_knows_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    task = get_task("files", test=path, prompt_column="question", completion_column="answer", metrics=["exact_match"])
    assert task.name == "files" and task.metrics == ("exact_match",)
    with pytest.raises(ConfigError, match="option 'colour' of task 'files'"):
        get_task("files", colour="red")


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=8))
def test_any_text_survives_jsonl_and_csv(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    """What was written is read, but for white space at the ends and rows that are empty."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"question": "q" + q.replace("\0", ""), "answer": "a" + a.replace("\0", "")} for q, a in pairs]
    expected = [(row["question"].rstrip() + "\n", row["answer"].strip()) for row in rows]
    for path in (write_jsonl(folder / "a.jsonl", rows), write_csv(folder / "a.csv", rows)):
        assert [(e.prompt, e.completion) for e in qa(path).split("test")] == expected


def test_the_examples_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks named after a file are written, Python blocks are run in order and their last comment is the output."""
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?:`([\w.]+)`:\n\n)?```(\w*)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict[str, Any] = {}
    ran = 0
    for file, language, text in blocks:
        if file:
            Path(file).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(text, namespace)
            expected = "".join(line[2:] + "\n" for line in text.splitlines() if line.startswith("# "))
            assert capsys.readouterr().out == expected
            ran += 1
    assert ran >= 5
