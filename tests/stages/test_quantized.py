"""What follows on a quantized model: train, recover, verify, project, eval, merge; pruned or whole, in 4 or 8 bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

import loram
from loram.artifact import read_manifest
from loram.errors import KindError, OptionError
from loram.modeling import load_model
from loram.options import TrainOptions
from loram.training.lora import wrap

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
WEIGHTS = "adapter_model.safetensors"
CASES = pytest.mark.parametrize("case", ["small-nf4", "whole-nf4", "small-int8"])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """large, data, and small models: pruned or whole, in 4 or 8 bit."""
    folder = tmp_path_factory.mktemp("quantized")
    shutil.copytree(FIXTURE, folder / "large")
    rows = [{"prompt": f"And the LORD said {number} ", "completion": "unto Moses"} for number in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut: dict[str, Any] = {"method": "random", "keep_first": 1, "keep_last": 1}
    loram.prune(folder / "large", out=folder / "small-nf4", quantize="nf4", **cut)
    loram.prune(folder / "large", out=folder / "small-int8", quantize="int8", **cut)
    loram.quantize(folder / "large", out=folder / "whole-nf4")
    for case in ("small-nf4", "whole-nf4", "small-int8"):
        train(folder, case, folder / f"{case}-adapter")
    return folder


def train(work: Path, case: str, out: Path, **changes: Any) -> Any:
    plain = {"steps": 4, "lr": 2e-3, "dtype": "fp32", "batch": 4, "dropout": 0.0}
    return loram.train(work / case, data=work / "data.jsonl", out=out, **{**plain, **changes})


@CASES
def test_the_adapter_becomes_the_originals(case: str, work: Path, tmp_path: Path) -> None:
    result: Any = loram.recover(work / f"{case}-adapter", out=tmp_path / "adapter")
    checked: Any = loram.verify(tmp_path / "adapter", numeric=True)
    assert checked.ok, checked.summary()
    assert "identity" in {check.name for check in checked.checks}
    small, recovered = load_file(work / f"{case}-adapter" / WEIGHTS), load_file(tmp_path / "adapter" / WEIGHTS)
    manifest = read_manifest(tmp_path / "adapter")
    assert manifest is not None
    kind = case.rpartition("-")[2]
    assert manifest.compression == (("axes", kind) if case.startswith("small") else (kind,))
    if case.startswith("whole"):
        assert all(torch.equal(recovered[key], value) for key, value in small.items())
    loram.project(tmp_path / "adapter", work / case, out=tmp_path / "back")
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == small.keys()
    assert all(torch.equal(back[key], value) for key, value in small.items())
    loram.merge(result.path, out=tmp_path / "merged")
    merged, large = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", work / "large"))
    assert {key: (value.dtype, value.shape) for key, value in merged.items()} == {
        key: (value.dtype, value.shape) for key, value in large.items()
    }


def test_the_ladder_has_the_quantized_model_on_its_rungs(work: Path, tmp_path: Path) -> None:
    loram.recover(work / "whole-nf4-adapter", out=tmp_path / "adapter")
    found: Any = loram.evaluate(
        work / "large", data=work / "data.jsonl", adapter=tmp_path / "adapter", compare=True, dtype="fp32", limit=8
    )
    losses = {row.name: row.loss for row in found.ladder.rows}
    assert list(losses) == ["base", "small", "small + adapter", "large + recovered"]
    assert losses["base"] != losses["small"]
    assert abs(losses["base"] - losses["small"]) < 0.5
    assert losses["large + recovered"] < losses["base"]
    alone: Any = loram.evaluate(
        work / "whole-nf4", data=work / "data.jsonl", adapter=work / "whole-nf4-adapter", dtype="bf16", limit=8
    )
    assert abs(alone.loss.mean - losses["small + adapter"]) < 0.05


@CASES
def test_training_changes_lora_alone(case: str, work: Path, tmp_path: Path) -> None:
    """And gradients reach it through recomputed layers: the same adapter, to the bit, with checkpointing."""
    before = (work / case / "model.safetensors").read_bytes()
    again = train(work, case, tmp_path / "again", checkpointing=True)
    assert again.run.loss_last < again.run.loss_first
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (work / f"{case}-adapter" / WEIGHTS).read_bytes()
    assert (work / case / "model.safetensors").read_bytes() == before


def test_lora_is_fp32_and_the_rest_frozen(work: Path) -> None:
    options = TrainOptions(model=str(work / "small-nf4"), data=("d",), out="o")
    model: Any = wrap(load_model(work / "small-nf4", dtype="bf16"), options)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert set(trained.values()) == {torch.float32}
    assert all("lora_" in name for name in trained)
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) == len(trained) // 2
    rest = {p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name}
    assert rest == {torch.bfloat16}


def test_an_evaluation_in_the_middle_changes_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    train(work, "small-nf4", tmp_path / "watched", eval_data=[str(work / "data.jsonl")], eval_every=1)
    assert (tmp_path / "watched" / WEIGHTS).read_bytes() == (work / "small-nf4-adapter" / WEIGHTS).read_bytes()


def test_where_16_bit_is_needed(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for case in ("small-nf4", "whole-nf4"):
        with pytest.raises(KindError, match="`loram prune` works on the large model"):
            loram.prune(work / case, out=out)
    loram.recover(work / "whole-nf4-adapter", out=tmp_path / "adapter")
    with pytest.raises(KindError, match=r"is quantized \(bitsandbytes\); merging would round the update away"):
        loram.merge(tmp_path / "adapter", base=work / "whole-nf4", out=out)
    with pytest.raises(OptionError, match="--compile"):
        train(work, "whole-nf4", out, compile=True)
    assert not out.exists()
