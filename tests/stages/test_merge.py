"""merge: bit for bit what peft's merge_and_unload gives, everything else of the folder left as it was."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import write_adapter, write_small_folder
from stock_models import GROUPED, VARIANTS, leaves, make, raw_config
from transformers import AutoModelForCausalLM

from loram.artifact import read_manifest
from loram.errors import AdapterError, CheckpointError, InputError, KindError, MismatchError, OptionError
from loram.options import MergeOptions
from loram.stages.merge import merge

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def options(adapter: Path, base: Path, out: Path, **changes: Any) -> MergeOptions:
    return MergeOptions(**{"adapter": str(adapter), "base": str(base), "out": str(out), **changes})


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The same merge by peft, in the base's dtype."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return dict(merged.state_dict())


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("model*.safetensors")) for key, value in load_file(file).items()}


def header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[: 8 + struct.unpack("<Q", data[:8])[0]]


def written(name: str, folder: Path, dtype: str, **save: Any) -> Path:
    make(name).to(DTYPES[dtype]).save_pretrained(folder, **save)
    return folder


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [*GROUPED, "llama-mha", "qwen2-mha"])
def test_bits_are_pefts_and_the_rest_is_untouched(name: str, dtype: str, sharded: bool, tmp_path: Path) -> None:
    base = written(name, tmp_path / "base", dtype, **({"max_shard_size": "20KB"} if sharded else {}))
    targets = [leaf for leaf in leaves(name) if leaf not in ("k_proj", "up_proj")]
    adapter = write_adapter(base, tmp_path / "adapter", targets, 4)
    merge(options(adapter, base, tmp_path / "merged"))
    expected, found, before = by_peft(base, adapter), stored(tmp_path / "merged"), stored(base)
    assert found.keys() == before.keys()
    touched = {key for key in found if any(f".{target}.weight" in key for target in targets)}
    for key, value in found.items():
        assert value.dtype == before[key].dtype
        assert torch.equal(value, expected[key]), key
        assert torch.equal(value, before[key]) == (key not in touched), key
    shards = sorted(file.name for file in base.glob("*.safetensors"))
    assert (len(shards) > 1) == sharded
    assert shards == sorted(file.name for file in (tmp_path / "merged").glob("*.safetensors"))
    for shard in shards:
        assert header(tmp_path / "merged" / shard) == header(base / shard)
    if sharded:
        both = [json.loads((folder / INDEX).read_text())["weight_map"] for folder in (base, tmp_path / "merged")]
        assert both[0] == both[1]
    assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("exact", [True, False])
def test_many_tiles_give_the_same_bits_as_one(exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """320 channels and 1024 words: tiles of 128 rows, and a rest that joins the one before it.

    Both ways of adding are taken: in one step with the product, and after it, as on a BLAS that rounds otherwise.
    """
    if not exact:
        monkeypatch.setattr("loram.merging.sums_exactly", lambda *_: False)
    base = shutil.copytree(FIXTURE, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", ["q_proj", "o_proj", "up_proj", "down_proj"], 5, r=8)
    monkeypatch.setattr("loram.stored.CHUNK", 1)
    merge(options(adapter, base, tmp_path / "merged"))
    expected = by_peft(base, adapter)
    assert all(torch.equal(value, expected[key]) for key, value in stored(tmp_path / "merged").items())


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "r": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"extra": ["embed_tokens"]},
        {"extra": ["lm_head"]},
    ],
    ids=str,
)
def test_every_kind_of_lora(lora: dict[str, Any], tmp_path: Path) -> None:
    base = written("llama-gqa", tmp_path / "base", "fp32")
    targets = ["q_proj", "v_proj", *lora.pop("extra", [])] if "extra" in lora else ["q_proj", "v_proj"]
    adapter = write_adapter(base, tmp_path / "adapter", targets, 6, **lora)
    merge(options(adapter, base, tmp_path / "merged"))
    expected = by_peft(base, adapter)
    assert all(torch.equal(value, expected[key]) for key, value in stored(tmp_path / "merged").items())


@pytest.mark.parametrize("name", GROUPED)
def test_merged_and_unmerged_say_the_same(name: str, tmp_path: Path, stock: Callable[[str], Path]) -> None:
    adapter = write_adapter(stock(name), tmp_path / "adapter", list(leaves(name)), 7)
    merge(options(adapter, stock(name), tmp_path / "merged"))
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids, use_cache=False).logits
        two = PeftModel.from_pretrained(make(name), str(adapter))(ids, use_cache=False).logits
    assert ((one - two).abs().max() / two.abs().max()).item() < 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_another_dtype_is_the_fp32_sum_cast_once(dtype: str, tmp_path: Path, stock: Callable[[str], Path]) -> None:
    base = stock("llama-gqa")
    adapter = write_adapter(base, tmp_path / "adapter", ["q_proj"], 8)
    merge(options(adapter, base, tmp_path / "merged", dtype=dtype))
    expected = by_peft(base, adapter)
    for key, value in stored(tmp_path / "merged").items():
        assert torch.equal(value, expected[key].to(DTYPES[dtype])), key
    found = raw_config(tmp_path / "merged")
    assert found.get("dtype", found.get("torch_dtype")) == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == DTYPES[dtype]


def test_the_folder_is_a_model_with_its_tokenizer(tmp_path: Path) -> None:
    base = shutil.copytree(FIXTURE, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "training_args.bin").write_bytes(b"PK")
    adapter = write_adapter(base, tmp_path / "adapter", ["q_proj"], 8)
    result = merge(options(adapter, base, tmp_path / "merged"))
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert "training_args.bin" not in names
    manifest = read_manifest(tmp_path / "merged")
    assert manifest is not None
    assert manifest.kind == "merged-model"
    assert result.to_json()["peak_bytes"] > 0
    dry = merge(options(adapter, base, tmp_path / "dry", dry_run=True))
    assert dry.path is None
    assert not (tmp_path / "dry").exists()


# ---- refused ----


def refused(error: type[Exception], message: str, adapter: Path, base: Path | None, out: Path) -> None:
    with pytest.raises(error, match=message):
        merge(MergeOptions(adapter=str(adapter), base=None if base is None else str(base), out=str(out)))
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()


def test_bases_that_cannot_take_the_adapter_are_refused(tmp_path: Path, stock: Callable[[str], Path]) -> None:
    base, out = stock("llama-gqa"), tmp_path / "merged"
    adapter = write_adapter(base, tmp_path / "adapter", ["q_proj", "down_proj"], 1)
    refused(MismatchError, "the base has", adapter, stock("mistral-gqa"), out)
    small = write_small_folder(base, {1: ([0], [1, 2])}, tmp_path / "small")
    refused(KindError, "is a small model; merge into the large one", adapter, small, out)
    refused(InputError, "does not exist", adapter, tmp_path / "gone", out)
    quantized = shutil.copytree(base, tmp_path / "quantized")
    config = raw_config(base) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (quantized / "config.json").write_text(json.dumps(config))
    refused(KindError, r"is quantized \(bitsandbytes\).*give the 16-bit one", adapter, quantized, out)
    tensors = {key: value.clone() for key, value in load_file(base / SINGLE).items()}
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(48, 48, dtype=torch.int8)
    save_file(tensors, quantized / SINGLE)
    (quantized / "config.json").write_text(json.dumps(raw_config(base)))
    refused(CheckpointError, "is stored as torch.int8", adapter, quantized, out)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.full((48, 48), float("inf"))
    save_file(tensors, quantized / SINGLE)
    refused(MismatchError, r"q_proj.weight \+ update is NaN or Inf", adapter, quantized, out)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_end_is_not_merged(target: str, tmp_path: Path, stock: Callable[[str], Path]) -> None:
    adapter = write_adapter(stock("mistral-mha"), tmp_path / "adapter", ["q_proj", target], 1)
    refused(AdapterError, "ties it to the other end", adapter, stock("mistral-mha"), tmp_path / "merged")


def test_adapters_of_another_kind_or_nowhere_are_refused(tmp_path: Path, stock: Callable[[str], Path]) -> None:
    adapter = write_adapter(stock("llama-gqa"), tmp_path / "adapter", ["q_proj"], 1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/gone"}))
    refused(OptionError, "add --base FOLDER", adapter, None, tmp_path / "merged")
    (adapter / "loram.json").write_text(json.dumps({"schema": 1, "kind": "small-adapter", "stage": "train"}))
    refused(KindError, "run `loram recover", adapter, stock("llama-gqa"), tmp_path / "merged")
    assert set(VARIANTS) >= set(GROUPED)
