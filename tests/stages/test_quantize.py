"""quantize: what bitsandbytes and transformers would have saved themselves, written without loading the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import write_small_folder
from stock_models import GROUPED, random_kept, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import loram
from loram.artifact import find_location, read_json, read_manifest, sha256_file
from loram.checkpoint import SINGLE, describe_base
from loram.errors import CheckpointError, InputError, KindError, MismatchError, OptionError
from loram.modeling import load_model, load_small
from loram.options import PruneOptions, QuantizeOptions
from loram.pruning_map import read_map
from loram.quantization import STORAGES, storage
from loram.stages.prune import prune
from loram.stages.quantize import QuantizeResult, quantize

TYPES = pytest.mark.parametrize("kind", STORAGES)
TIED = "llama-mha"


def run(model: Path, out: Path, kind: str = "nf4", **more: Any) -> QuantizeResult:
    return quantize(QuantizeOptions(model=str(model), out=str(out), type=kind, **more))


def by_bitsandbytes(model: Path, out: Path, kind: str, dtype: torch.dtype) -> Path:
    """The same model quantized while it is loaded, and saved by transformers."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    options: dict[str, Any] = {"load_in_4bit": True, **nf4} if kind == "nf4" else {"load_in_8bit": True}
    config: Any = BitsAndBytesConfig
    load_small(model, quantization_config=config(**options)).save_pretrained(out)
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / SINGLE)


def in_bf16(model: Path, out: Path) -> Path:
    load_model(model, dtype="bf16").save_pretrained(out)
    return out


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(found[key], value), key


@TYPES
@pytest.mark.parametrize("name", [*GROUPED, TIED])
def test_a_plain_model_is_stored_as_transformers_saves_it(
    name: str, kind: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    result = run(stock(name), tmp_path / "ours", kind)
    theirs = by_bitsandbytes(stock(name), tmp_path / "theirs", kind, torch.float32)
    assert_same(weights(tmp_path / "ours"), weights(theirs))
    assert read_json(tmp_path / "ours" / "config.json") == read_json(theirs / "config.json")
    assert result.to_json()["bytes"] == {
        "before": sum(value.nbytes for value in weights(stock(name)).values()),
        "small": sum(value.nbytes for value in weights(theirs).values()),
    }
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    expected = AutoModelForCausalLM.from_pretrained(theirs)
    assert torch.equal(ours(tokens()).logits, expected(tokens()).logits)


@TYPES
@pytest.mark.parametrize("name", ["llama-gqa", "phi3-gqa"])
def test_a_small_model_of_many_widths_in_bf16(
    name: str, kind: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    large = in_bf16(stock(name), tmp_path / "large")
    small = write_small_folder(large, random_kept(name, 4), tmp_path / "small")
    run(small, tmp_path / "ours", kind)
    theirs = by_bitsandbytes(small, tmp_path / "theirs", kind, torch.bfloat16)
    assert_same(weights(tmp_path / "ours"), weights(theirs))
    config = read_json(tmp_path / "ours" / "config.json")
    assert config.pop("quantization_config") == read_json(theirs / "config.json")["quantization_config"]
    assert config == read_json(small / "config.json")
    assert torch.equal(
        load_small(tmp_path / "ours")(tokens()).logits, load_small(theirs, dtype="auto")(tokens()).logits
    )


def test_the_second_load_never_quantizes(
    stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes as bnb

    run(stock("llama-gqa"), tmp_path / "nf4")
    run(stock("llama-gqa"), tmp_path / "int8", "int8")

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("quantized again")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", forbidden)
    monkeypatch.setattr(bnb.functional, "int8_vectorwise_quant", forbidden)
    for kind in STORAGES:
        assert load_model(tmp_path / kind).num_parameters()
    with pytest.raises(AssertionError, match="quantized again"):
        bnb.functional.quantize_4bit()


@TYPES
def test_a_small_model_stays_the_one_it_was(kind: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    small = write_small_folder(stock("llama-gqa"), random_kept("llama-gqa", 1), tmp_path / "small")
    result = run(small, tmp_path / "deeper" / "out", kind)
    before, after = read_manifest(small), read_manifest(tmp_path / "deeper" / "out")
    assert before is not None
    assert after is not None
    assert (after.kind, after.stage, after.compression) == ("small-model", "quantize", ("axes", kind))
    assert after.pruning_map_sha256 == before.pruning_map_sha256 == read_map(tmp_path / "deeper" / "out").sha256
    assert [(parent.kind, parent.digest) for parent in after.parents] == [("small-model", before.digest())]
    assert after.base is not None
    found = find_location(after.base.location, tmp_path / "deeper" / "out")
    assert found is not None
    assert found.samefile(stock("llama-gqa"))
    assert after.files[SINGLE] == sha256_file(tmp_path / "deeper" / "out" / SINGLE)
    assert result.cut


def test_a_plain_model_becomes_a_small_one_of_which_nothing_was_cut(
    stock: Callable[[str], Path], tmp_path: Path
) -> None:
    large = stock("llama-gqa")
    result = run(large, tmp_path / "out", base_id="org/large")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.kind, manifest.family, manifest.compression) == ("small-model", "llama", ("nf4",))
    assert manifest.base is not None
    assert manifest.base.id == "org/large"
    assert manifest.base.weights_fingerprint == describe_base(large).weights_fingerprint
    assert read_map(tmp_path / "out").axes == {}
    assert read_map(tmp_path / "out").sha256 == manifest.pruning_map_sha256
    assert "recovers as it is" in result.summary()
    assert result.next_command == f"loram train {tmp_path / 'out'} --data FILE -o ADAPTER"


@TYPES
@pytest.mark.parametrize("name", ["llama-gqa", "phi3-gqa", TIED])
def test_prune_quantize_is_the_short_way(name: str, kind: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    cut = {"model": str(stock(name)), "method": "random", "keep_first": 1, "keep_last": 0}
    prune(PruneOptions(**cut, out=str(tmp_path / "small")))
    run(tmp_path / "small", tmp_path / "two-steps", kind)
    prune(PruneOptions(**cut, out=str(tmp_path / "one-step"), quantize=kind))
    for file in (SINGLE, "config.json", "pruning_map.safetensors"):
        assert (tmp_path / "one-step" / file).read_bytes() == (tmp_path / "two-steps" / file).read_bytes()
    assert {file.name for file in (tmp_path / "one-step").iterdir()} == {
        file.name for file in (tmp_path / "small").iterdir()
    }
    manifest = read_manifest(tmp_path / "one-step")
    assert manifest is not None
    assert manifest.compression == ("axes", kind)
    assert not list(tmp_path.glob("*.partial"))


def test_from_python(stock: Callable[[str], Path], tmp_path: Path) -> None:
    result = loram.quantize(stock("llama-gqa"), out=tmp_path / "out")
    assert json.loads(json.dumps(result.to_json()))["path"] == str(tmp_path / "out")


def test_a_dry_run_writes_nothing(stock: Callable[[str], Path], tmp_path: Path) -> None:
    result = run(stock("llama-gqa"), tmp_path / "out", dry_run=True)
    assert result.small < result.before
    assert not list(tmp_path.iterdir())


def test_an_interrupted_call_leaves_nothing_at_out(
    stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loram.stages.quantize as stage

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "stored_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(stock("llama-gqa"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    run(stock("llama-gqa"), tmp_path / "out")
    assert load_model(tmp_path / "out").num_parameters()


def test_what_is_quantized_already_is_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    run(stock("llama-gqa"), tmp_path / "once")
    with pytest.raises(KindError, match=r"is quantized already \(bitsandbytes\); give the 16-bit model"):
        run(tmp_path / "once", tmp_path / "twice")
    (tmp_path / "once" / "loram.json").unlink()
    with pytest.raises(KindError, match="is quantized already"):
        run(tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_is_refused(tensor: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(stock("llama-gqa"), tmp_path / "bad")
    state = weights(tmp_path / "bad")
    state[tensor].view(-1)[5] = torch.nan
    save_file(state, tmp_path / "bad" / SINGLE, {"format": "pt"})
    with pytest.raises(MismatchError, match=f"{tensor} holds NaN or Inf"):
        run(tmp_path / "bad", tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["bad"]


def test_what_is_no_whole_model_is_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    small = write_small_folder(stock("llama-gqa"), random_kept("llama-gqa", 1), tmp_path / "small")
    (small / "loram.json").unlink()
    with pytest.raises(InputError, match=r"is a small model without its loram\.json"):
        run(small, tmp_path / "out")
    shutil.copytree(stock("llama-gqa"), tmp_path / "cut-off")
    with open(tmp_path / "cut-off" / SINGLE, "r+b") as file:
        file.truncate(60_000)
    with pytest.raises(CheckpointError, match="is truncated"):
        run(tmp_path / "cut-off", tmp_path / "out")
    (small / "loram.json").write_text(json.dumps({"schema": 1, "kind": "adapter", "stage": "recover"}))
    with pytest.raises(KindError, match="is a adapter; `loram quantize` works on a small model"):
        run(small, tmp_path / "out")


def test_an_unknown_type_and_a_missing_library(
    stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=r"--type is 'nf5'; expected one of nf4, int8; did you mean nf4\?"):
        QuantizeOptions(model="m", out="o", type="nf5")
    run(stock("llama-gqa"), tmp_path / "nf4")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(OptionError, match=r"need bitsandbytes; pip install 'loram\[quant\]'"):
        storage.bitsandbytes_functions()
    with pytest.raises(OptionError, match=r"loram\[quant\]"):
        run(stock("llama-gqa"), tmp_path / "out")
    with pytest.raises(OptionError, match=r"loram\[quant\]"):
        load_model(tmp_path / "nf4")
    with pytest.raises(OptionError, match=r"loram\[quant\]"):
        prune(PruneOptions(model=str(stock("llama-gqa")), out=str(tmp_path / "out"), quantize="nf4"))
    assert not (tmp_path / "out").exists()
