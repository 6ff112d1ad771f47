"""recover --calibrate: a planted error is found, what is written is what was measured, and nothing is half done."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import write_adapter, write_small_folder

import loram
from loram.artifact import read_json, read_manifest, write_json
from loram.errors import DataError, InputError, Interrupted, KindError, MismatchError, OptionError
from loram.evaluation.losses import RowLosses
from loram.hub.contents import manifest_file
from loram.modeling import load_model
from loram.options import RecoverOptions
from loram.stages import scaling
from loram.stages.recover import RecoverResult

ROOT = Path(__file__).parents[2]
WEIGHTS = "adapter_model.safetensors"
PLANTED = "mlp.middle"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """large, small, trained (small adapter), wrong (the same, the MLPs of one third three times too large)."""
    folder = tmp_path_factory.mktemp("calibrate")
    shutil.copytree(ROOT / "tests" / "fixtures" / "tiny-llama-kjv", folder / "large")
    for name in ("train", "test"):
        shutil.copyfile(ROOT / "docs" / "examples" / f"{name}.jsonl", folder / f"{name}.jsonl")
    cut: dict[str, Any] = {"ratio": 0.25, "keep_first": 1, "keep_last": 1, "samples": 16, "length": 64}
    loram.prune(folder / "large", out=folder / "small", calibration=[folder / "train.jsonl", "builtin"], **cut)
    plain: dict[str, Any] = {"steps": 60, "lr": 3e-3, "max_length": 64, "dropout": 0.0, "dtype": "fp32"}
    loram.train(folder / "small", data=folder / "train.jsonl", out=folder / "trained", **plain)
    plant(folder / "trained", folder / "wrong")
    return folder


def plant(trained: Path, out: Path, by: float = 3.0) -> None:
    shutil.copytree(trained, out)
    tensors = load_file(out / WEIGHTS)
    for key, value in tensors.items():
        if "layers.2.mlp" in key and "lora_B" in key:
            value.mul_(by)
    save_file(tensors, out / WEIGHTS)


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "resolve_dtype", lambda name: "fp32")


def calibrated(work: Path, out: Path, adapter: str = "wrong", **changes: Any) -> RecoverResult:
    plain = {"calibrate": work / "test.jsonl", "max_length": 64, "calibrate_rows": 16, "evaluations": 30, "out": out}
    found: Any = loram.recover(work / adapter, **{**plain, **changes})
    return found


@pytest.fixture(scope="module")
def found(work: Path) -> Iterator[RecoverResult]:
    """One calibration of `wrong`, in work/found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "resolve_dtype", lambda name: "fp32")
        yield calibrated(work, work / "found")


def test_a_planted_error_is_found_and_undone(found: RecoverResult, work: Path) -> None:
    body = found.to_json()
    assert 0.2 < body["scales"][PLANTED] < 0.5
    for split in ("choose", "check"):
        assert body["loss"][split]["after"] < body["loss"][split]["before"] - 0.02
        assert body["loss"][split]["rows"] == 8
    assert f"{PLANTED} 0." in str(found)
    manifest = read_manifest(work / "found")
    assert manifest is not None
    assert manifest.calibration is not None
    assert manifest.calibration["scales"] == body["scales"]
    assert len(set(manifest.calibration["rows"])) == 16
    assert manifest.options["evaluations"] == 30


def test_the_scales_are_in_b_and_nowhere_else(found: RecoverResult, work: Path, tmp_path: Path) -> None:
    loram.recover(work / "wrong", out=tmp_path / "plain")
    before, after = load_file(tmp_path / "plain" / WEIGHTS), load_file(work / "found" / WEIGHTS)
    assert before.keys() == after.keys()
    thirds = {0: "first", 1: "first", 2: "middle", 3: "last"}
    for key, value in before.items():
        part = "attention" if "self_attn" in key else "mlp"
        scale = found.to_json()["scales"][f"{part}.{thirds[int(key.split('.')[4])]}"]
        assert torch.equal(after[key], value * scale if "lora_B" in key else value), key
    for name in ("adapter_config.json",):
        assert read_json(work / "found" / name) == read_json(tmp_path / "plain" / name)


def test_what_is_reported_is_the_loss_of_what_was_written(found: RecoverResult, work: Path) -> None:
    """eval, by stock PEFT, on the 16 rows that were drawn of 24: the sum of both splits."""
    manifest = read_manifest(work / "found")
    assert manifest is not None
    assert manifest.calibration is not None
    from loram.data.sources import read_source
    from loram.stages.calibration_rows import row_digest

    lines = (work / "test.jsonl").read_text().splitlines()
    rows = {row_digest(row): line for row, line in zip(read_source(work / "test.jsonl").rows, lines, strict=True)}
    used = manifest.calibration["rows"]
    (work / "used.jsonl").write_text("\n".join(rows[digest] for digest in used))
    measured: Any = loram.evaluate(
        work / "large", adapter=work / "found", data=work / "used.jsonl", max_length=64, dtype="fp32"
    )
    told = found.to_json()["loss"]
    total = sum(split["after"] * split["tokens"] for split in told.values())
    assert measured.loss.mean == pytest.approx(total / sum(split["tokens"] for split in told.values()), rel=1e-5)


def test_verify_passes_and_stock_peft_loads(found: RecoverResult, work: Path) -> None:
    checked: Any = loram.verify(work / "found", numeric=True)
    assert checked.ok, checked.summary()
    scales = next(check for check in checked.checks if check.name == "scales")
    assert "as the small adapter's updates" in scales.detail
    PeftModel.from_pretrained(load_model(work / "large"), str(work / "found"))


def test_the_card_names_the_scales_and_no_place_of_this_machine(found: RecoverResult, work: Path) -> None:
    pushed: Any = loram.push(work / "found", to="me/found", base_id="acme/tiny", license="mit", dry_run=True)
    body = pushed.to_json()
    assert f"{PLANTED} {found.to_json()['scales'][PLANTED]:g}" in body["card"]
    manifest = read_manifest(work / "found")
    assert manifest is not None
    sent = manifest_file(manifest, None, [])
    assert isinstance(sent.source, bytes)
    assert str(work) not in body["card"] + sent.source.decode()
    assert "scales" in sent.source.decode()


def tampered(work: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(work / "found", out)
    body = read_json(out / "loram.json")
    change(body["calibration"])
    for parent in body["parents"]:
        parent["location"] = str(work / "wrong")
    body["base"]["location"] = str(work / "large")
    write_json(out / "loram.json", body)
    return out


def set_scale(factor: float) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["scales"].update({PLANTED: record["scales"][PLANTED] * factor})


def test_a_tampered_scale_fails(found: RecoverResult, work: Path, tmp_path: Path) -> None:
    same: Any = loram.verify(tampered(work, tmp_path / "same", lambda record: None), numeric=True)
    assert same.ok, same.summary()
    other: Any = loram.verify(tampered(work, tmp_path / "other", set_scale(1.02)), numeric=True)
    failed = {check.name: check.detail for check in other.checks if not check.ok}
    assert set(failed) == {"scales", "identity"}
    assert "was changed" in failed["scales"]
    assert other.exit_code == 6
    slightly: Any = loram.verify(tampered(work, tmp_path / "slightly", set_scale(1.0005)))
    assert [check.name for check in slightly.checks if not check.ok] == ["scales"]


def test_a_tampered_scale_fails_without_the_small_adapter_too(found: RecoverResult, work: Path, tmp_path: Path) -> None:
    for name, factor in (("same", 1.0), ("other", 1.1)):
        folder = tampered(work, tmp_path / name, set_scale(factor))
        body = read_json(folder / "loram.json")
        for parent in body["parents"]:
            parent["location"] = "../gone"
        write_json(folder / "loram.json", body)
        checked: Any = loram.verify(folder, small=work / "small", numeric=True)
        failed = [check.name for check in checked.checks if not check.ok]
        assert failed == ([] if factor == 1 else ["scales"])


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("norms"),
        lambda record: record.update(scales={"mlp.middle": "x"}),
        lambda record: record["scales"].update({PLANTED: float("nan")}),
        lambda record: record.update(family="none"),
    ],
)
def test_a_damaged_record_fails(
    change: Callable[[dict[str, Any]], Any], found: RecoverResult, work: Path, tmp_path: Path
) -> None:
    checked: Any = loram.verify(tampered(work, tmp_path / "x", change))
    failed = {check.name: check.detail for check in checked.checks if not check.ok}
    assert "the record of --calibrate is damaged" in failed["scales"]


def test_one_block_at_a_time_finds_the_same(
    found: RecoverResult, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scaling, "fits", lambda folder, dtype: False)
    with caplog.at_level(logging.INFO):
        streamed = calibrated(work, tmp_path / "x").to_json()
    assert "one block at a time" in caplog.text
    whole = found.to_json()
    assert streamed["scales"] == pytest.approx(whole["scales"], abs=0.1)
    for split in ("choose", "check"):
        for when in ("before", "after"):
            assert streamed["loss"][split][when] == pytest.approx(whole["loss"][split][when], abs=2e-3)


class Killed(BaseException):
    pass


def killing(after: int, calls: list[int]) -> Callable[..., RowLosses]:
    """`measure`, which dies after so many calls."""
    from loram.evaluation.losses import measure

    def look(*arguments: Any) -> RowLosses:
        if len(calls) >= after:
            raise Killed
        calls.append(1)
        return measure(*arguments)

    return look


def test_killed_at_any_moment_it_goes_on_and_ends_alike(
    found: RecoverResult, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loram.evaluation import scoring

    out, total = tmp_path / "x", 0
    for after in (1, 9, 14):
        calls: list[int] = []
        monkeypatch.setattr(scoring, "measure", killing(after, calls))
        with pytest.raises(Killed):
            calibrated(work, out)
        assert not out.exists()
        total += len(calls)
    calls = []
    monkeypatch.setattr(scoring, "measure", killing(1000, calls))
    calibrated(work, out)
    assert total == 24
    assert 0 < len(calls) < 45 - 24
    assert (out / WEIGHTS).read_bytes() == (work / "found" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    assert not (out / "checkpoints").exists()


def test_a_signal_ends_it_with_what_to_type(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    def signalled(*arguments: Any) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(scaling, "fits", signalled)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM; go on with `loram recover .*--calibrate"):
        calibrated(work, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert len([*(tmp_path / "x.partial" / "checkpoints").glob("choose-*")]) == 1


def test_where_nothing_helps_all_stay_one(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change lowers the loss on the first split, and raises it on the second."""

    def scored(*arguments: Any) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def opened() -> Iterator[Any]:
            calls: dict[int, float] = {}

            def score(adapter: Any, rows: Any) -> RowLosses:
                first = calls.setdefault(len(rows[0]["input_ids"]) * 0 + id(rows), norm(adapter))
                away = abs(norm(adapter) - first)
                return RowLosses((10.0 + (away if len(calls) == 2 else -away),) * 2, (5, 5))

            yield score

        return opened()

    def norm(adapter: Any) -> float:
        return sum(float(pair.b.norm()) for pair in adapter.pairs.values())

    monkeypatch.setattr(scaling, "resident", scored)
    result = calibrated(work, tmp_path / "x")
    body = result.to_json()
    assert set(body["scales"].values()) == {1.0}
    assert set(body["found"].values()) != {1.0}
    assert "all stay 1" in str(result)
    loram.recover(work / "wrong", out=tmp_path / "plain")
    assert (tmp_path / "x" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


FEW = {"calibrate_rows": 4, "evaluations": 8}


@pytest.mark.parametrize("case", ["depth", "masks", "nf4", "whole"])
def test_on_every_kind_of_small_model(case: str, work: Path, tmp_path: Path) -> None:
    large, data = work / "large", work / "train.jsonl"
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
    result = calibrated(work, tmp_path / "adapter", str(tmp_path / "trained"), large=large, **FEW)
    names = set(result.to_json()["scales"])
    assert names == {
        f"{part}.{third}"
        for part in ("attention", "mlp")
        for third in (("first", "last") if case == "depth" else ("first", "middle", "last"))
    }
    known = {} if case == "whole" else {"numeric": True, "small": small}
    checked: Any = loram.verify(tmp_path / "adapter", large=large, **known)
    assert checked.ok, checked.summary()


def test_every_format_of_train_is_read(work: Path, tmp_path: Path) -> None:
    examples = ROOT / "docs" / "examples"
    data = [examples / name for name in ("chat.jsonl", "sharegpt.jsonl", "questions.csv", "text.jsonl", "alpaca.json")]
    calibrated(work, tmp_path / "x", calibrate=data[2:], calibrate_rows=6, evaluations=8)
    manifest = read_manifest(tmp_path / "x")
    assert manifest is not None
    assert manifest.calibration is not None
    assert 4 <= len(manifest.calibration["rows"]) <= 6


def test_rows_that_were_seen_before_are_named(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    calibrated(work, tmp_path / "x", calibrate="train.jsonl", **FEW)
    assert "what the adapter was trained on" in caplog.text
    loram.train(
        work / "small",
        data=work / "train.jsonl",
        eval_data=work / "test.jsonl",
        out=tmp_path / "watched",
        steps=1,
        max_length=64,
    )
    calibrated(work, tmp_path / "y", str(tmp_path / "watched"), calibrate="test.jsonl", **FEW)
    assert "the held-out data of the training" in caplog.text


def test_eval_says_so_where_rows_are_those_of_the_calibration(
    found: RecoverResult, work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = (work / "test.jsonl").read_text().splitlines()
    (tmp_path / "same.jsonl").write_text("\n".join(reversed(lines)))
    plain: dict[str, Any] = {"adapter": work / "found", "max_length": 64}
    loram.evaluate(work / "large", data=tmp_path / "same.jsonl", **plain)
    assert "16 of these rows" in caplog.text
    caplog.clear()
    loram.evaluate(work / "large", data=work / "train.jsonl", limit=8, **plain)
    assert "of these rows" not in caplog.text


def refused(work: Path, tmp_path: Path, error: type[Exception], message: str, **changes: Any) -> None:
    with pytest.raises(error, match=message):
        calibrated(work, tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.partial").exists()


def test_bad_input(work: Path, tmp_path: Path, found: RecoverResult, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jsonl").touch()
    refused(work, tmp_path, DataError, "empty", calibrate=tmp_path / "empty.jsonl")
    (tmp_path / "few.jsonl").write_text("".join((work / "test.jsonl").read_text().splitlines(True)[:3]) * 4)
    refused(work, tmp_path, DataError, "has 3 rows .* 4 are needed", calibrate=tmp_path / "few.jsonl")
    refused(work, tmp_path, DataError, "does not exist", calibrate=tmp_path / "gone.jsonl")
    refused(work, tmp_path, OptionError, "has a weight", calibrate=f"{work / 'test.jsonl'}=2")
    refused(work, tmp_path, KindError, "an earlier --calibrate", adapter="found")
    refused(work, tmp_path, MismatchError, "give that model", large=work / "small")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    refused(work, tmp_path, OptionError, r"loram\[calibrate\]")


def test_adapters_that_cannot_be_calibrated(work: Path, tmp_path: Path) -> None:
    raw = write_adapter(work / "small", tmp_path / "head", ["embed_tokens"], 1, ensure_weight_tying=True)
    refused(work, tmp_path, MismatchError, "there is nothing to scale", adapter=str(raw), small=work / "small")
    plant(work / "trained", tmp_path / "nan", float("nan"))
    refused(work, tmp_path, MismatchError, "NaN or Inf", adapter=str(tmp_path / "nan"))
    shutil.copytree(work / "trained", tmp_path / "far" / "away" / "trained")
    refused(work, tmp_path, InputError, "give it with --large", adapter=str(tmp_path / "far" / "away" / "trained"))


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


def test_a_dry_run_writes_nothing(work: Path, tmp_path: Path) -> None:
    result = calibrated(work, tmp_path / "x", dry_run=True)
    assert "scales" not in result.to_json()
    assert json.dumps(result.to_json())
    assert not list(tmp_path.iterdir())


def test_in_a_recipe(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "recipe.yaml").write_text(f"""
prune: {{method: random, keep_first: 1, keep_last: 1}}
train: {{steps: 2, batch: 4, max_length: 64}}
recover: {{calibrate: {work / "test.jsonl"}, calibrate_rows: 4, evaluations: 8, max_length: 64}}
verify: {{numeric: true}}
eval: {{max_length: 64, limit: 8}}
""")
    plain: dict[str, Any] = {"model": work / "large", "data": work / "train.jsonl", "out": tmp_path / "run"}
    loram.run(tmp_path / "recipe.yaml", **plain, eval_data=work / "test.jsonl")
    assert "which the run also evaluates on" in caplog.text
    body = read_json(tmp_path / "run" / "run.json")
    stages = {stage["name"]: stage for stage in body["stages"]}
    assert set(stages["recover"]["result"]["loss"]) == {"choose", "check"}
    assert len(stages["recover"]["result"]["scales"]) == 6
    again: Any = loram.run(tmp_path / "recipe.yaml", **plain, eval_data=work / "test.jsonl")
    assert all(stage["skipped"] for stage in again.stages)
