"""The quality benchmark: cells are chains of public stages, sealed one by one, and go on where they were killed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cells, grid, quality
from benchmarks.cells import Bench, run_cell
from benchmarks.grid import Cell, Task

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "fixtures" / "tiny-llama-kjv"
EXAMPLES = "docs/examples"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The tiny model, and a task of a few steps."""
    task = Task("tiny", "", f"{EXAMPLES}/train.jsonl", f"{EXAMPLES}/test.jsonl", steps=2, max_length=48, limit=4)
    monkeypatch.setitem(grid.TASKS, "tiny", replace(task, samples=4, length=32))
    return Bench(tmp_path / "scratch", {"tiny": str(TINY)}, results=tmp_path / "results")


def cell(method: str, **values: Any) -> Cell:
    return Cell("tiny", "tiny", method, **({"ratio": "0.5", "keep": (1, 1)} | values))


def test_a_cell_keeps_raw_figures_and_no_path(bench: Bench) -> None:
    run_cell(cell("refit"), bench)
    text = bench.record(cell("refit")).read_text(encoding="utf-8")
    body = json.loads(text)
    assert str(ROOT) not in text
    assert [stage["stage"] for stage in body["stages"]] == ["prune", "train", "recover", "eval"]
    assert sum(body["rows"]["nll"]) / sum(body["rows"]["tokens"]) == pytest.approx(body["loss"], abs=1e-5)
    assert len(body["rows"]["nll"]) == 4
    assert body["reduction"]["large"] > body["reduction"]["small"]
    assert all(stage["seconds"] >= 0 for stage in body["stages"])


def test_what_was_done_is_not_done_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill within a cell its finished stages are remembered, and an equal prune serves another cell."""
    first = run_cell(cell("random"), bench)
    for place in bench.scratch.glob("recover-*"):  # as if killed while recovering
        (shutil.rmtree if place.is_dir() else Path.unlink)(place)
    called: list[str] = []
    real = cells.run_function

    def counted(name: str, options: Any) -> Any:
        called.append(name)
        return real(name, options)

    monkeypatch.setattr(cells, "run_function", counted)
    assert run_cell(cell("random"), bench)["rows"] == first["rows"]
    assert called == ["recover"]
    run_cell(cell("random", measured="small"), bench)
    assert called == ["recover", "eval"]
    run_cell(cell("random", seed=1), bench)
    assert called == ["recover", "eval", "prune", "train", "recover", "eval"]


def test_a_method_that_is_not_there_does_not_stop_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(grid.METHODS, "missing", grid.Method("missing", "", {"method": "no-such-method"}))
    base = cell("base", ratio="", keep=None)
    assert quality.run_all([cell("missing"), base], bench, None) == 1
    assert "not run:" in capsys.readouterr().err
    assert not bench.record(cell("missing")).exists()
    assert bench.record(base).is_file()
    written = bench.record(base).stat().st_mtime_ns
    assert quality.run_all([base], bench, None) == 0
    assert bench.record(base).stat().st_mtime_ns == written


def test_places_that_nobody_told(bench: Bench) -> None:
    with pytest.raises(LookupError, match="--place other=FOLDER"):
        bench.model("other")
    with pytest.raises(LookupError, match="--data FOLDER"):
        bench.file("no/such.jsonl")


def test_the_grid_holds_every_cell_once_and_what_the_issue_asks_for() -> None:
    found = grid.grid()
    assert len({each.id for each in found}) == len(found)
    asked = {(each.method, each.keep) for each in found if each.model == "smollm2-135m" and each.ratio == "0.5"}
    methods = ("random", "structured", "refit-general", "refit", "distill", "depth")
    assert {(name, keep) for name in methods for keep in ((4, 2), (1, 1))} <= asked
    assert {("semi", None), ("unstructured", None)} <= asked  # single weights go in every layer
    ceilings = [each for each in found if each.method == "ceiling" and each.model == "smollm2-135m"]
    assert len({each.lr for each in ceilings if each.task == "gsm8k"}) == 3


def test_records_belong_to_the_grid() -> None:
    known = {each.id for each in grid.grid()}
    for file in sorted(cells.RESULTS.glob("*.json")):
        body = json.loads(file.read_text(encoding="utf-8"))
        assert body["cell"] == file.stem
        assert file.stem in known
