"""recover --calibrate: a planted error is found, what is written is what was measured, bad input is refused."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from planting import FEW, PLANTED, WEIGHTS, calibrate, plant, refused
from small_models import write_adapter, write_small_folder

import loram
from loram.artifact import read_json, read_manifest
from loram.data.sources import read_source
from loram.errors import InputError, KindError, MismatchError, OptionError
from loram.evaluation.losses import RowLosses
from loram.options import RecoverOptions
from loram.stages import scaling
from loram.stages.calibration_rows import row_digest
from loram.stages.recover import RecoverResult

pytestmark = pytest.mark.usefixtures("in_fp32")


def test_a_planted_error_is_found_and_undone(calibrated: RecoverResult, planted: Path) -> None:
    body = calibrated.to_json()
    assert 0.2 < body["scales"][PLANTED] < 0.5
    for split in ("choose", "check"):
        assert body["loss"][split]["after"] < body["loss"][split]["before"] - 0.02
        assert body["loss"][split]["rows"] == 8
    assert f"{PLANTED} 0." in str(calibrated)
    manifest = read_manifest(planted / "found")
    assert manifest is not None
    assert manifest.calibration is not None
    assert manifest.calibration["scales"] == body["scales"]
    assert len(set(manifest.calibration["rows"])) == 16
    assert manifest.options["evaluations"] == 30


def test_what_is_reported_is_the_loss_of_what_was_written(
    calibrated: RecoverResult, planted: Path, tmp_path: Path
) -> None:
    """eval, by stock PEFT, on the 16 rows that were drawn of 24: the sum of both splits."""
    manifest = read_manifest(planted / "found")
    assert manifest is not None
    assert manifest.calibration is not None
    lines = (planted / "test.jsonl").read_text().splitlines()
    rows = {row_digest(row): line for row, line in zip(read_source(planted / "test.jsonl").rows, lines, strict=True)}
    used = manifest.calibration["rows"]
    (tmp_path / "used.jsonl").write_text("\n".join(rows[digest] for digest in used))
    measured: Any = loram.evaluate(
        planted / "large", adapter=planted / "found", data=tmp_path / "used.jsonl", max_length=64, dtype="fp32"
    )
    told = calibrated.to_json()["loss"]
    total = sum(split["after"] * split["tokens"] for split in told.values())
    assert measured.loss.mean == pytest.approx(total / sum(split["tokens"] for split in told.values()), rel=1e-5)


def test_one_block_at_a_time_finds_the_same(
    calibrated: RecoverResult,
    planted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(scaling, "fits", lambda folder, dtype: False)
    with caplog.at_level(logging.INFO):
        streamed = calibrate(planted, tmp_path / "x").to_json()
    assert "one block at a time" in caplog.text
    whole = calibrated.to_json()
    assert streamed["scales"] == pytest.approx(whole["scales"], abs=0.1)
    for split in ("choose", "check"):
        for when in ("before", "after"):
            assert streamed["loss"][split][when] == pytest.approx(whole["loss"][split][when], abs=2e-3)


def test_where_nothing_helps_all_stay_one(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change lowers the loss on the first split, and raises it on the second."""

    def scored(*arguments: Any) -> Any:
        @contextmanager
        def opened() -> Iterator[Any]:
            calls: dict[int, float] = {}

            def score(adapter: Any, rows: Any) -> RowLosses:
                first = calls.setdefault(id(rows), norm(adapter))
                away = abs(norm(adapter) - first)
                return RowLosses((10.0 + (away if len(calls) == 2 else -away),) * 2, (5, 5))

            yield score

        return opened()

    def norm(adapter: Any) -> float:
        return sum(float(pair.b.norm()) for pair in adapter.pairs.values())

    monkeypatch.setattr(scaling, "resident", scored)
    result = calibrate(planted, tmp_path / "x")
    body = result.to_json()
    assert set(body["scales"].values()) == {1.0}
    assert set(body["found"].values()) != {1.0}
    assert "all stay 1" in str(result)
    loram.recover(planted / "wrong", out=tmp_path / "plain")
    assert (tmp_path / "x" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("case", ["depth", "masks", "nf4", "whole"])
def test_on_every_kind_of_small_model(case: str, planted: Path, tmp_path: Path) -> None:
    large, data = planted / "large", planted / "train.jsonl"
    small = tmp_path / "small"
    if case == "depth":
        write_small_folder(large, {}, small, layers=(0, 3))
    elif case == "masks":
        loram.prune(large, out=small, method="semi", score="magnitude")
    elif case == "nf4":
        loram.prune(large, out=small, method="random", keep_first=1, keep_last=1, quantize="nf4")
    else:
        shutil.copytree(large, small)
    if not (small / "tokenizer.json").exists():
        for file in large.glob("*token*"):
            shutil.copyfile(file, small / file.name)
    loram.train(small, data=data, out=tmp_path / "trained", steps=2, batch=4, lr=3e-3, max_length=64)
    result = calibrate(planted, tmp_path / "adapter", str(tmp_path / "trained"), large=large, **FEW)
    names = set(result.to_json()["scales"])
    assert names == {
        f"{part}.{third}"
        for part in ("attention", "mlp")
        for third in (("first", "last") if case == "depth" else ("first", "middle", "last"))
    }
    known = {} if case == "whole" else {"numeric": True, "small": small}
    checked: Any = loram.verify(tmp_path / "adapter", large=large, **known)
    assert checked.ok, checked.summary()


def test_in_a_recipe(planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "recipe.yaml").write_text(f"""
prune: {{method: random, keep_first: 1, keep_last: 1}}
train: {{steps: 2, batch: 4, max_length: 64}}
recover: {{calibrate: {planted / "test.jsonl"}, calibrate_rows: 4, evaluations: 8, max_length: 64}}
verify: {{numeric: true}}
eval: {{max_length: 64, limit: 8}}
""")
    plain: dict[str, Any] = {"model": planted / "large", "data": planted / "train.jsonl", "out": tmp_path / "run"}
    loram.run(tmp_path / "recipe.yaml", **plain, eval_data=planted / "test.jsonl")
    assert "which the run also evaluates on" in caplog.text
    body = read_json(tmp_path / "run" / "run.json")
    stages = {stage["name"]: stage for stage in body["stages"]}
    assert set(stages["recover"]["result"]["loss"]) == {"choose", "check"}
    assert len(stages["recover"]["result"]["scales"]) == 6
    again: Any = loram.run(tmp_path / "recipe.yaml", **plain, eval_data=planted / "test.jsonl")
    assert all(stage["skipped"] for stage in again.stages)


def test_a_dry_run_writes_nothing(planted: Path, tmp_path: Path) -> None:
    result = calibrate(planted, tmp_path / "x", dry_run=True)
    assert "scales" not in result.to_json()
    assert json.dumps(result.to_json())
    assert not list(tmp_path.iterdir())


def test_what_else_is_needed(
    planted: Path, tmp_path: Path, calibrated: RecoverResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(planted, tmp_path, KindError, "an earlier --calibrate", adapter="found")
    refused(planted, tmp_path, MismatchError, "give that model", large=planted / "small")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    refused(planted, tmp_path, OptionError, r"loram\[calibrate\]")


def test_adapters_that_cannot_be_calibrated(planted: Path, tmp_path: Path) -> None:
    raw = write_adapter(planted / "small", tmp_path / "head", ["embed_tokens"], 1, ensure_weight_tying=True)
    refused(planted, tmp_path, MismatchError, "there is nothing to scale", adapter=str(raw), small=planted / "small")
    plant(planted / "trained", tmp_path / "nan", float("nan"))
    refused(planted, tmp_path, MismatchError, "NaN or Inf", adapter=str(tmp_path / "nan"))
    shutil.copytree(planted / "trained", tmp_path / "far" / "away" / "trained")
    refused(planted, tmp_path, InputError, "give it with --large", adapter=str(tmp_path / "far" / "away" / "trained"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibrate_rows": 3}, "it must be 4 or more"),
        ({"evaluations": 7}, "it must be 8 or more"),
        ({"batch": 0}, "it must be 1 or more"),
        ({"calibrate": (), "evaluations": 9}, "--evaluations is for --calibrate"),
        ({"calibrate": (), "columns": "prompt=q"}, "--columns is for --calibrate"),
    ],
)
def test_impossible_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RecoverOptions(**{"adapter": "a", "out": "b", "calibrate": ("c",), **changes})
