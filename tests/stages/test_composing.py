"""Layers first, then units or weights: one map from the large model to the result, held against stock weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import write_adapter
from stock_models import GROUPED, LAYERS, leaves, make, tokens
from torch import Tensor

import loram.stages.prune as stage
from loram.artifact import read_manifest
from loram.errors import KindError, MismatchError
from loram.modeling import load_small
from loram.options import MergeOptions, PruneOptions, RecoverOptions, VerifyOptions
from loram.pruning_map import PruningMap, read_map
from loram.stages.merge import merge
from loram.stages.prune_random import prune
from loram.stages.recover import recover
from loram.stages.verify import verify

WINDOWS = tokens(21, rows=6, length=24)


@pytest.fixture(autouse=True)
def _windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration without a tokenizer, where the options ask for any."""
    monkeypatch.setattr(stage, "calibration", lambda options, folder: WINDOWS if options.calibration else None)


def options(model: Path, out: Path, **changes: Any) -> PruneOptions:
    values = {"model": str(model), "out": str(out), "ratio": "1/2", "keep_first": 0, "keep_last": 0}
    return PruneOptions(**(values | changes))


def shorter(large: Path, out: Path) -> Path:
    """The large model without one layer, not refitted, so that its weights are the large model's."""
    prune(options(large, out, method="depth", ratio="1/3", refit=False, calibration=["given"]))
    return out


def cut(pruning_map: PruningMap, large: dict[str, Tensor]) -> dict[str, Tensor]:
    """The small model's Linears, gathered from the stock model's tensors."""
    found = {}
    for name, value in large.items():
        module, _, kind = name.rpartition(".")
        small = pruning_map.numbering.to_small(module)
        if small is not None and "proj" in module:
            found[f"{small}.{kind}"] = pruning_map.cut(module, value)
    return found


WAYS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "magnitude": {"method": "structured", "score": "magnitude"},
    "semi": {"method": "semi", "pattern": "2:4", "score": "magnitude", "keep_first": 4, "keep_last": 2, "ratio": "0.5"},
    "depth": {"method": "depth", "refit": False, "calibration": ["given"]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GROUPED)
def test_one_map_from_the_large_model_to_the_result(
    name: str, way: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    large, small, out = stock(name), shorter(stock(name), tmp_path / "shorter"), tmp_path / "small"
    result = prune(options(small, out, **WAYS[way]))
    pruning_map, manifest = read_map(out), read_manifest(out)
    dropped = set(range(LAYERS)) - set(pruning_map.numbering.kept)
    assert len(dropped) == (2 if way == "depth" else 1)
    assert dropped >= set(range(LAYERS)) - set(read_map(small).numbering.kept)
    stored = load_file(out / "model.safetensors")
    expected = cut(pruning_map, dict(make(name).state_dict()))
    assert sorted(expected) == sorted(key for key in stored if "proj" in key)
    assert all(torch.equal(stored[key], value) for key, value in expected.items())
    assert result.large == sum(p.numel() for p in make(name).parameters())
    assert manifest is not None
    assert manifest.base == getattr(read_manifest(small), "base", None)
    assert manifest.compression == ("depth", {"semi": "mask", "depth": "depth"}.get(way, "axes"))
    assert [parent.kind for parent in manifest.parents] == ["small-model"]

    adapter = write_adapter(out, tmp_path / "trained", list(leaves(name)))
    recover(RecoverOptions(adapter=str(adapter), small=str(out), out=str(tmp_path / "adapter")))
    checked = verify(VerifyOptions(adapter=str(tmp_path / "adapter"), small=str(out), large=str(large), numeric=True))
    assert checked.ok, checked.summary()
    assert any(check.name == "identity" for check in checked.checks)
    merge(MergeOptions(adapter=str(tmp_path / "adapter"), base=str(large), out=str(tmp_path / "merged")))


def test_calibrated_and_finished_before(stock: Callable[[str], Path], tmp_path: Path) -> None:
    """The refit is of the small model that is given; the same command once more finds it done."""
    small = shorter(stock("llama-gqa"), tmp_path / "shorter")
    asked = options(small, tmp_path / "small", method="structured", score="wanda", calibration=["given"])
    prune(asked)
    manifest = read_manifest(tmp_path / "small")
    assert manifest is not None
    assert manifest.compression == ("depth", "axes", "refit")
    before = (tmp_path / "small" / "loram.json").read_bytes()
    assert prune(asked).layers is None
    assert (tmp_path / "small" / "loram.json").read_bytes() == before
    assert torch.isfinite(load_small(tmp_path / "small", dtype="fp32")(WINDOWS).logits).all()
    # The same cut of a plain copy of the shorter model, which knows nothing of a larger one.
    plain = tmp_path / "plain"
    shutil.copytree(small, plain)
    for file in ("loram.json", "pruning_map.safetensors"):
        (plain / file).unlink()
    prune(options(plain, tmp_path / "alone", method="structured", score="wanda", calibration=["given"]))
    ours, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "alone"))
    assert ours.keys() == alone.keys()
    assert all(torch.equal(ours[name], alone[name]) for name in alone)
    assert read_map(tmp_path / "small").sha256 == read_map(small).compose(read_map(tmp_path / "alone")).sha256


@pytest.mark.parametrize("first", ["random", "semi"])
def test_layers_go_first(first: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    prune(options(stock("llama-gqa"), tmp_path / "small", **WAYS[first]))
    for way in ("depth", "random"):
        with pytest.raises(KindError, match=r"lost whole layers only: prune .* with --method depth first, and the"):
            prune(options(tmp_path / "small", tmp_path / "smaller", **WAYS[way]))
    assert not (tmp_path / "smaller").exists()


def test_an_exchanged_map_is_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    small = shorter(stock("llama-gqa"), tmp_path / "shorter")
    pruning_map = read_map(small)
    gone = next(iter(set(range(LAYERS)) - set(pruning_map.numbering.kept)))
    other = tuple(sorted({*pruning_map.numbering.kept[1:], gone}))
    PruningMap(pruning_map.family, pruning_map.geometry, {}, layers=other).save(small)
    with pytest.raises(MismatchError, match="the map was exchanged"):
        prune(options(small, tmp_path / "smaller", method="random"))
