"""data: what it counts and shows, on the committed tokenizer and by hand."""

from __future__ import annotations

import io
import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

import loram
from loram.errors import DataError, HubError, OptionError
from loram.options import DataOptions
from loram.stages.preview import preview

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"


def data_file(folder: Path, *rows: Any) -> str:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "a.jsonl")


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"And the LORD said {number}", "completion": " unto Moses"} for number in range(count)]


def test_counts_and_shown_rows(tmp_path: Path) -> None:
    result = preview(DataOptions(data=data_file(tmp_path, *pairs(9)), model=str(FIXTURE), max_length=64, rows=1))
    body = result.to_json()
    assert (body["format"], body["rows"], body["cut"], body["blank"]) == ("prompt/completion", 9, 0, 0)
    assert set(body["lengths"]) == {"p50", "p90", "p95", "p99", "max"}
    assert body["end"]["token"] == "</s>"
    assert body["end"]["in_loss"] is True
    assert body["packing"]["rows"] == -(-9 // (64 // body["lengths"]["max"]))
    (row,) = body["shown"]
    assert "".join(text for text, _ in row["text"]).endswith("And the LORD said 0 unto Moses</s>")
    assert [text for text, loss in row["text"] if loss] == [" unto Moses</s>"]
    assert "rows     9 usable of 9" in result.summary()
    assert "</s> is inside the loss, and generation ends at it" in result.summary()


def test_what_is_cut_and_what_is_dropped_is_said(tmp_path: Path) -> None:
    rows = [*pairs(3), {"prompt": "a", "completion": "And Moses said unto the LORD " * 20}]
    name = data_file(tmp_path, *rows)
    cut = preview(DataOptions(data=name, model=str(FIXTURE), max_length=32)).summary()
    assert "1 rows are longer than --max-length 32 and were cut" in cut
    dropped = preview(DataOptions(data=name, model=str(FIXTURE), max_length=32, long="drop"))
    assert "rows     3 usable of 4" in dropped.summary()
    assert dropped.to_json()["too_long"] == 1


def test_bad_input_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="add --model FOLDER"):
        preview(DataOptions(data=data_file(tmp_path, *pairs(1))))
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    with pytest.raises(DataError, match="has no chat template"):
        preview(DataOptions(data=data_file(tmp_path, {"conversations": chat}), model=str(FIXTURE)))
    with pytest.raises(HubError):
        preview(DataOptions(data="nobody/nothing", model=str(FIXTURE)))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = entry_points(group="console_scripts", name="loram")
    line = ["data", data_file(tmp_path, *pairs(2)), "--model", str(FIXTURE)]
    assert script.load()(line) == 0
    assert "And the LORD said 0⟦ unto Moses</s>⟧" in capsys.readouterr().out.replace("[[", "⟦").replace("]]", "⟧")
    assert script.load()([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2


def test_colors_where_a_terminal_shows_them(tmp_path: Path) -> None:
    from loram_cli.console import Console

    result = loram.preview(data_file(tmp_path, {"prompt": "[b]x", "completion": " y"}), model=FIXTURE)
    console = Console()
    console.out = RichConsole(file=io.StringIO(), force_terminal=True, soft_wrap=True, highlight=False)
    console.result(result)
    assert "[b]x\x1b[0m\x1b[1;32m y</s>" in console.out.file.getvalue()  # type: ignore[attr-defined]
