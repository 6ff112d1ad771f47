"""What recover --calibrate records: the scales are in B and nowhere else, and verify finds what was changed since."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from planting import PLANTED, WEIGHTS
from safetensors.torch import load_file

import loram
from loram.artifact import read_json, read_manifest, write_json
from loram.hub.contents import manifest_file
from loram.modeling import load_model
from loram.stages.recover import RecoverResult

pytestmark = pytest.mark.usefixtures("in_fp32")


def test_the_scales_are_in_b_and_nowhere_else(calibrated: RecoverResult, planted: Path, tmp_path: Path) -> None:
    loram.recover(planted / "wrong", out=tmp_path / "plain")
    before, after = load_file(tmp_path / "plain" / WEIGHTS), load_file(planted / "found" / WEIGHTS)
    assert before.keys() == after.keys()
    thirds = {0: "first", 1: "first", 2: "middle", 3: "last"}
    for key, value in before.items():
        part = "attention" if "self_attn" in key else "mlp"
        scale = calibrated.to_json()["scales"][f"{part}.{thirds[int(key.split('.')[4])]}"]
        assert torch.equal(after[key], value * scale if "lora_B" in key else value), key
    for name in ("adapter_config.json",):
        assert read_json(planted / "found" / name) == read_json(tmp_path / "plain" / name)


def test_verify_passes_and_stock_peft_loads(calibrated: RecoverResult, planted: Path) -> None:
    checked: Any = loram.verify(planted / "found", numeric=True)
    assert checked.ok, checked.summary()
    scales = next(check for check in checked.checks if check.name == "scales")
    assert "as the small adapter's updates" in scales.detail
    PeftModel.from_pretrained(load_model(planted / "large"), str(planted / "found"))


def test_the_card_names_the_scales_and_no_place_of_this_machine(calibrated: RecoverResult, planted: Path) -> None:
    pushed: Any = loram.push(planted / "found", to="me/found", base_id="acme/tiny", license="mit", dry_run=True)
    body = pushed.to_json()
    assert f"{PLANTED} {calibrated.to_json()['scales'][PLANTED]:g}" in body["card"]
    manifest = read_manifest(planted / "found")
    assert manifest is not None
    sent = manifest_file(manifest, None, [])
    assert isinstance(sent.source, bytes)
    assert str(planted) not in body["card"] + sent.source.decode()
    assert "scales" in sent.source.decode()


def tampered(planted: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(planted / "found", out)
    body = read_json(out / "loram.json")
    change(body["calibration"])
    for parent in body["parents"]:
        parent["location"] = str(planted / "wrong")
    body["base"]["location"] = str(planted / "large")
    write_json(out / "loram.json", body)
    return out


def set_scale(factor: float) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["scales"].update({PLANTED: record["scales"][PLANTED] * factor})


def test_a_tampered_scale_fails(calibrated: RecoverResult, planted: Path, tmp_path: Path) -> None:
    same: Any = loram.verify(tampered(planted, tmp_path / "same", lambda record: None), numeric=True)
    assert same.ok, same.summary()
    other: Any = loram.verify(tampered(planted, tmp_path / "other", set_scale(1.02)), numeric=True)
    failed = {check.name: check.detail for check in other.checks if not check.ok}
    assert set(failed) == {"scales", "identity"}
    assert "was changed" in failed["scales"]
    assert other.exit_code == 6
    slightly: Any = loram.verify(tampered(planted, tmp_path / "slightly", set_scale(1.0005)))
    assert [check.name for check in slightly.checks if not check.ok] == ["scales"]


def test_a_tampered_scale_fails_without_the_small_adapter_too(
    calibrated: RecoverResult, planted: Path, tmp_path: Path
) -> None:
    for name, factor in (("same", 1.0), ("other", 1.1)):
        folder = tampered(planted, tmp_path / name, set_scale(factor))
        body = read_json(folder / "loram.json")
        for parent in body["parents"]:
            parent["location"] = "../gone"
        write_json(folder / "loram.json", body)
        checked: Any = loram.verify(folder, small=planted / "small", numeric=True)
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
    change: Callable[[dict[str, Any]], Any], calibrated: RecoverResult, planted: Path, tmp_path: Path
) -> None:
    checked: Any = loram.verify(tampered(planted, tmp_path / "x", change))
    failed = {check.name: check.detail for check in checked.checks if not check.ok}
    assert "the record of --calibrate is damaged" in failed["scales"]
