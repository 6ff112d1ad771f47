"""Kept gain and its error against brute force, and a page that says what was run and what was not."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import transfer
from benchmarks.cells import RESULTS
from benchmarks.grid import ELSEWHERE, RATES, Cell, grid
from benchmarks.kept_gain import Records, Rows, is_current, kept_gain
from benchmarks.pictures import LEFT, Bar, Line, bars, lines, spread


def rows(seed: int, scale: float = 1.0) -> Rows:
    drawn = random.Random(seed)
    return Rows(tuple(scale * drawn.uniform(20, 90) for _ in range(12)), tuple(range(40, 52)))


def test_kept_gain_of_the_ends() -> None:
    base, ceiling = rows(0, 2.0), rows(1)
    assert kept_gain(base, ceiling, ceiling) == pytest.approx((1.0, 0.0))
    assert kept_gain(base, ceiling, base) == pytest.approx((0.0, 0.0))
    twice = Rows(tuple(2 * value for value in base.nll), base.tokens)
    assert kept_gain(base, ceiling, twice)[0] < 0


def test_the_error_is_the_jackknife() -> None:
    """Against the definition, written out on lists."""
    base, ceiling, found = rows(0, 2.0), rows(1), rows(2, 1.3)

    def loss(of: Rows, rows_: list[int]) -> float:
        return sum(of.nll[i] for i in rows_) / sum(of.tokens[i] for i in rows_)

    def share(rows_: list[int]) -> float:
        return (loss(base, rows_) - loss(found, rows_)) / (loss(base, rows_) - loss(ceiling, rows_))

    everything = list(range(12))
    parts = [share([i for i in everything if i != out]) for out in everything]
    variance = 11 / 12 * sum((part - sum(parts) / 12) ** 2 for part in parts)
    assert kept_gain(base, ceiling, found) == pytest.approx((share(everything), variance**0.5))


def test_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="same rows"):
        kept_gain(rows(0), rows(1), Rows((1.0,), (1,)))


def record(cell: Cell, scale: float) -> dict[str, Any]:
    """What run_cell would write."""
    stages = [
        {
            "stage": name,
            "options": {key: value for key, value in options.items() if value is not None},
            "seconds": 60.0,
            "cpu": 60.0,
            "result": {"bytes": {"before": 30, "small": 10}} if name == "quantize" else {},
        }
        for name, options in cell.stages()
    ]
    found = rows(cell.seed, scale)
    body = {"loss": found.loss(), "rows": {"nll": found.nll, "tokens": found.tokens}, "stages": stages}
    body["reduction"] = {"large": 140, "small": 100, "reduction": 1.4} if cell.ratio else {}
    return json.loads(json.dumps(body))  # type: ignore[no-any-return]


def write(folder: Path, cell: Cell, scale: float) -> None:
    (folder / f"{cell.id}.json").write_text(json.dumps(record(cell, scale)), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records in which half of the gain is kept by a cut and three quarters by bits."""
    model, task = transfer.MODEL, transfer.TASK
    write(tmp_path, Cell(model, task, "base"), 2.0)
    write(tmp_path, Cell(model, task, "ceiling", lr=RATES[1]), 1.2)
    write(tmp_path, Cell(model, task, "ceiling", lr=RATES[0]), 1.0)
    write(tmp_path, Cell(model, task, "refit", "0.5", (4, 2)), 1.5)
    write(tmp_path, Cell(model, task, "refit", "0.5", (4, 2), measured="small"), 1.75)
    write(tmp_path, Cell(model, task, "refit", "0.5", (4, 2), lr=RATES[1]), 1.9)
    write(tmp_path, Cell(model, task, "refit-nf4", "0.5", (4, 2)), 1.25)
    return tmp_path


def table_row(page: str, start: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_says_what_was_run_and_what_was_not(folder: Path) -> None:
    page = transfer.page(folder)
    refit = table_row(page, "| cut by Wanda, refit on half task text | 4/2")
    assert refit[3:7] == ["**50%**", "0%", "1", f"{RATES[0]:g} ({RATES[1]:g})"]  # the better of the two
    assert refit[7:] == ["1.40", "1.40", "1.0"]
    quantized = table_row(page, "| refit on half task text, NF4 | 4/2")
    assert quantized[3] == "**75%**"
    assert quantized[7:] == ["1.40", "4.20", "2.0"]  # a third of the bytes of what the cut left
    assert table_row(page, "| random cut | 4/2")[2] == "not run"
    assert table_row(page, "| the large model (ceiling)")[3] == "not run"  # the third rate
    naive = table_row(page, "| 0.5 | 1.40")
    assert float(naive[2]) > float(naive[3])
    assert naive[4] == "50% ± 0%"
    assert "4 bit without a cut keeps not run, with 0.3 cut besides not run" in page
    assert "the adapter from the small one goes from 50% to 10%" in page
    assert (
        "**The aim** of 90% at ratio 0.5 in 16 bit is missed by 40.0 points: cut by Wanda, refit on half task text, "
        "one seed." in page
    )


def test_other_models_have_their_own_ends_or_are_said_not_to_have_been_run(folder: Path) -> None:
    (gemma, _), (qwen, _), *_ = ELSEWHERE
    for method, scale in (("base", 3.0), ("ceiling", 1.0), ("nf4", 1.5)):
        write(folder, Cell(gemma, transfer.TASK, method), scale)
    write(folder, Cell(qwen, transfer.TASK, "base"), 3.0)
    section = transfer.page(folder).partition("## Other models and data")[2].partition("\n## ")[0]
    found = table_row(section, "| NF4, nothing cut")
    assert found[3] == "**75%**"  # of the gain of its own ceiling over its own base
    assert table_row(section, "| cut by Taylor, steps layer by layer | 4/2")[2] == "not run"
    assert "as it was; the rest was not run. CPU" in section
    assert " Not run. CPU" in section


def test_a_record_of_other_options_does_not_count(folder: Path) -> None:
    cell = Cell(transfer.MODEL, transfer.TASK, "refit", "0.5", (4, 2))
    body = record(cell, 1.5)
    assert is_current(body, cell)
    body["stages"][1]["options"]["steps"] += 1
    assert not is_current(body, cell)
    (folder / f"{cell.id}.json").write_text(json.dumps(body), encoding="utf-8")
    found = Records(cell.model, cell.task, folder).outcome("refit", "0.5", (4, 2))
    assert found is not None
    assert found.rates == (RATES[1],)  # the other rate's record is what is left


def test_committed_records_are_of_this_grid() -> None:
    """Whoever changes the grid runs it again, or removes what it does not hold for any more."""
    for cell in grid():
        file = RESULTS / f"{cell.id}.json"
        if file.is_file():
            assert is_current(json.loads(file.read_text(encoding="utf-8")), cell), cell.id


def test_pictures_are_sound_and_say_their_numbers(folder: Path) -> None:
    for draw in (transfer.kept_picture, transfer.sweep_picture):
        text = draw(Records(transfer.MODEL, transfer.TASK, folder))
        root = ElementTree.fromstring(text)
        described = root.find("{http://www.w3.org/2000/svg}desc")
        assert described is not None
        assert described.text
    assert "refit on half task text: 50%" in transfer.kept_picture(Records(transfer.MODEL, transfer.TASK, folder))


def test_bars_go_left_of_zero_for_harm() -> None:
    text = bars([Bar("good", (0.5, 0.7), 0.1), Bar("bad", (-0.3,), 0.1)], "t")
    good, bad = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', text)
    assert float(bad[0]) + float(bad[1]) == pytest.approx(float(good[0]), abs=0.1)  # both begin at no training
    assert float(good[1]) == pytest.approx(2 * float(bad[1]), rel=0.01)
    assert text.count("<circle") == 2  # one dot a seed, where there are several


def test_lines_keep_their_order_and_labels_apart() -> None:
    text = lines(
        [Line("a", ((0.3, 1.0), (0.9, 2.0)), "large"), Line("b", ((0.3, 1.0), (0.9, 1.0)), "small")], "t", ("x", "y")
    )
    first, second = (points.split() for points in re.findall(r'points="([^"]+)"', text))
    assert first[0] == second[0]
    assert float(first[1].split(",")[1]) < float(second[1].split(",")[1])  # a higher loss is drawn higher
    assert spread([10, 11, 50]) == [10, 26, 50]


def test_no_label_is_cut_off() -> None:
    """A letter of the picture's 14 px is 7 wide at most on average; the labels end 12 before the axis."""
    shown = [transfer.label(row) + " (1/1)" * (row[2] == (1, 1)) for row in transfer.rows(transfer.MODEL)]
    assert max(map(len, shown)) * 7 <= LEFT - 12
