"""Reading: each format is recognised, each kind of bad input is one sentence with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from loram.data.formats import Example
from loram.data.sources import read_source, read_sources
from loram.errors import DataError, OptionError


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"text": "a b"}, "text", {"text": "a b"}),
        ({"prompt": "p", "completion": "c", "id": 3}, "prompt/completion", {"prompt": "p", "completion": "c"}),
        ({"question": "q?", "answer": "a"}, "question/answer", {"prompt": "q?\n", "completion": "a"}),
        ({"messages": CHAT}, "messages", {"messages": tuple(CHAT)}),
    ],
)
def test_every_format_is_recognised(tmp_path: Path, row: Any, name: str, expected: dict[str, Any]) -> None:
    file = jsonl(tmp_path / "a.jsonl", row)
    source = read_source(file)
    assert source.format == name
    assert source.rows == (Example(f"{file}:1", **expected),)


def test_alpaca_has_the_stock_wording_and_wins_over_an_extra_answer_column(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Do", "input": "this", "output": "done", "answer": "x"},
        {"instruction": "Do", "input": "", "output": "done", "answer": "x"},
        {"instruction": "Do", "input": None, "output": "done", "answer": "x"},
    ]
    source = read_source(jsonl(tmp_path / "a.jsonl", *rows))
    with_input, empty, null = source.rows
    assert source.format == "alpaca"
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nDo\n\n"
        "### Input:\nthis\n\n### Response:\n"
    )
    assert (
        empty.prompt
        == null.prompt
        == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nDo\n\n### Response:\n"
        )
    )
    assert {row.completion for row in source.rows} == {"done"}


def test_txt_is_documents_between_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\ntwo\r\n\r\n \r\nthree\n".encode())
    source = read_source(file)
    assert source.format == "documents"
    assert [(row.place, row.text) for row in source.rows] == [(f"{file}:1", "one\ntwo"), (f"{file}:5", "three")]


def test_the_same_rows_come_from_every_container(tmp_path: Path) -> None:
    rows = [{"prompt": 'a "b", c', "completion": "7"}, {"prompt": "é\nf", "completion": "8"}]
    jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "lines.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "array.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "nested.json").write_text(json.dumps({"data": rows}), encoding="utf-8")
    (tmp_path / "a.csv").write_text('prompt,completion\n"a ""b"", c",7\n"é\nf",8\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('prompt\tcompletion\n"a ""b"", c"\t7\n"é\nf"\t8\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "lines.json", "a.jsonl.gz", "array.json", "nested.json", "a.csv", "a.tsv", "a.parquet"):
        source = read_source(tmp_path / name)
        assert [{"prompt": row.prompt, "completion": row.completion} for row in source.rows] == rows, name


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    source = read_source(jsonl(tmp_path / "a.jsonl", {"text": "a\u2028b"}))
    assert source.rows[0].text == "a\u2028b"


def test_columns_are_mapped(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "text": "t"})
    source = read_source(file, "prompt=question, completion=answer")
    assert source.format == "prompt/completion"
    assert source.rows == (Example(f"{file}:1", prompt="q", completion="a"),)


def test_a_folder_gives_its_train_files_else_all_in_order(tmp_path: Path) -> None:
    for name in ("test.jsonl", "b.jsonl", "a.jsonl", ".hidden.jsonl"):
        jsonl(tmp_path / name, {"text": name})
    (tmp_path / "README.md").write_text("no data")
    assert [row.text for row in read_source(tmp_path).rows] == ["a.jsonl", "b.jsonl", "test.jsonl"]
    jsonl(tmp_path / "train-00001.jsonl", {"text": "second"})
    jsonl(tmp_path / "train-00000.jsonl", {"text": "first"})
    assert [row.text for row in read_source(tmp_path).rows] == ["first", "second"]


def test_blank_texts_are_passed_over_and_counted(tmp_path: Path) -> None:
    source = read_source(jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": " \n"}, {"text": ""}))
    assert len(source.rows) == 1
    assert source.blank == 2


BAD: dict[str, tuple[bytes, str]] = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl:2: broken JSON"),
    "broken.json": (b'[{"text": "a"},\n {"text" "b"}]', r"broken\.json:2: broken JSON"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"latin\.jsonl:2: byte 28 \(0xe9\) is not UTF-8"),
    "latin.csv": (b"text\ncaf\xe9\n", r"latin\.csv:2: byte 9"),
    "empty.jsonl": (b"\n\n", r"holds no rows"),
    "empty.csv": (b"text\n", r"holds no rows"),
    "blank.jsonl": (b'{"text": " "}\n', r"holds no rows \(1 blank ones\)"),
    "unknown.jsonl": (
        b'{"foo": "a", "bar": 1}\n',
        r"unknown\.jsonl:1 has the columns foo, bar.*instruction, output.*--columns prompt=",
    ),
    "array.jsonl": (b"[1, 2]\n", r"array\.jsonl:1: a list; expected an object"),
    "number.jsonl": (b'{"prompt": "a", "completion": 3}\n', r"number\.jsonl:1: column 'completion' is a number"),
    "null.jsonl": (b'{"text": "a"}\n{"text": null}\n', r"null\.jsonl:2: column 'text' is a null"),
    "missing.jsonl": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', r":2: no column 'completion'"),
    "gaps.jsonl": (
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": " "}\n',
        r"2 empty completions \(line 2, 3\)",
    ),
    "turns.jsonl": (b'{"messages": []}\n', r"turns\.jsonl:1: messages is empty"),
    "role.jsonl": (b'{"messages": [{"role": "human", "content": "a"}]}\n', r"turn 1: role 'human'; expected one of"),
    "content.jsonl": (b'{"messages": [{"role": "user", "content": ["a"]}]}\n', r"turn 1: column 'content' is a list"),
    "mute.jsonl": (b'{"messages": [{"role": "user", "content": "a"}]}\n', r"mute\.jsonl:1: no assistant turn"),
    "wide.csv": (b"text\na,b\n", r"wide\.csv:2: 2 cells under 1 column names"),
    "fake.parquet": (b"PAR1nothing", r"fake\.parquet is not a readable parquet file"),
    "fake.jsonl.gz": (b"nothing", r"cannot read .*fake\.jsonl\.gz"),
    "weights.pkl": (b"x", r"weights\.pkl is a pickle"),
    "weights.bin": (b"x", r"weights\.bin is a pickle"),
    "notes.doc": (b"x", r"notes\.doc ends in \.doc; expected one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_their_place(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_source(tmp_path / name)


def test_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        read_source(tmp_path / "gone.jsonl")
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no data file.*pickles are never opened"):
        read_source(tmp_path)
    with pytest.raises(OptionError, match="add --data FILE"):
        read_sources(())


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ("prompt", OptionError, "expected e.g. prompt=question"),
        ("promt=question", OptionError, "names 'promt'; what can be mapped"),
        ("prompt=nothing,completion=answer", DataError, "no column nothing .*it has question, answer"),
        ("prompt=question", DataError, "has the columns prompt, which is no format"),
    ],
)
def test_bad_column_maps(tmp_path: Path, columns: str, error: type[Exception], message: str) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(error, match=message):
        read_source(file, columns)
