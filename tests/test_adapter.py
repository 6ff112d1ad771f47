"""Adapters: peft's folders read and written, every scale folded, everything that is no plain LoRA refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, load_file, save_file
from small_models import write_adapter
from stock_models import make, raw_config
from torch import Tensor

from loram.adapter import (
    Adapter,
    LoraPair,
    check_finite,
    check_modules,
    expected_modules,
    load_adapter,
    pattern_value,
    target_names,
)
from loram.errors import AdapterError, CheckpointError, InputError, MismatchError
from loram.families import FAMILIES

NAME = "llama-gqa"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"targets": ["q_proj", "down_proj"]},
    "rslora": {"targets": ["q_proj", "up_proj"], "use_rslora": True, "r": 3, "lora_alpha": 7},
    "patterns": {
        "targets": ["q_proj", "down_proj", "o_proj"],
        "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"o_proj": 3, r".*\.2\.mlp\.down_proj": 5},
    },
    "rslora and patterns": {"targets": ["q_proj", "o_proj"], "use_rslora": True, "rank_pattern": {"o_proj": 9}},
    "regular expression": {"targets": r".*\.(1|2)\..*(q_proj|down_proj)"},
    "embedding": {"targets": ["embed_tokens", "v_proj"]},
    "head": {"targets": ["lm_head", "v_proj"]},
    "some layers": {"targets": ["gate_proj"], "layers_to_transform": [0, 2]},
    "excluded": {"targets": ["gate_proj", "k_proj"], "exclude_modules": r".*\.1\..*k_proj"},
}


def written(stock: Callable[[str], Path], out: Path, kind: str) -> Path:
    options = dict(KINDS[kind])
    return write_adapter(stock(NAME), out, options.pop("targets"), 1, **options)


def deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW per module, as stock peft computes it on the stock model."""
    loaded = PeftModel.from_pretrained(make(NAME), str(folder))
    found = {}
    for name, module in loaded.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in module.scaling:
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_peft_computes(kind: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = load_adapter(written(stock, tmp_path / "a", kind))
    expected = deltas(tmp_path / "a")
    assert adapter.pairs.keys() == expected.keys()
    assert list(adapter.pairs) == sorted(adapter.pairs)
    for module, pair in adapter.pairs.items():
        delta = pair.scale * (pair.b @ pair.a)
        assert torch.allclose(delta.T if pair.embedding else delta, expected[module], rtol=1e-6, atol=1e-7), module
        assert pair.weight_shape == tuple(expected[module].shape)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_it_is_the_same_update_with_one_rank_and_alpha(
    kind: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = load_adapter(written(stock, tmp_path / "a", kind))
    portable = adapter.portable()
    assert portable.uniform
    assert {pair.rank for pair in portable.pairs.values()} == {portable.rank} == {adapter.rank}
    (tmp_path / "b").mkdir()
    portable.save(tmp_path / "b", "org/large")
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/large"
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert isinstance(config["target_modules"], list)
    before, after = deltas(tmp_path / "a"), deltas(tmp_path / "b")
    assert before.keys() == after.keys(), "peft must adapt the same modules, no more and no fewer"
    for module, delta in before.items():
        assert ((delta - after[module]).norm() / delta.norm()).item() < 1e-6, module


@pytest.mark.parametrize("kind", KINDS)
def test_saved_as_it_was_every_bit_stays(kind: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = load_adapter(written(stock, tmp_path / "a", kind))
    (tmp_path / "b").mkdir()
    adapter.save(tmp_path / "b", "org/large")
    before, after = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = load_adapter(tmp_path / "b")
    assert {m: p.scale for m, p in again.pairs.items()} == {m: p.scale for m, p in adapter.pairs.items()}
    assert deltas(tmp_path / "b").keys() == adapter.pairs.keys()


def test_a_uniform_adapter_is_portable_to_the_bit(stock: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = load_adapter(written(stock, tmp_path / "a", "plain"))
    assert adapter.uniform
    for module, pair in adapter.portable().pairs.items():
        assert torch.equal(pair.a, adapter.pairs[module].a)
        assert torch.equal(pair.b, adapter.pairs[module].b)
    assert not load_adapter(written(stock, tmp_path / "b", "rslora")).uniform
    assert not load_adapter(written(stock, tmp_path / "c", "patterns")).uniform


def test_base_weights_that_peft_saved_along_are_dropped(stock: Callable[[str], Path], tmp_path: Path) -> None:
    import peft

    adapted = peft.get_peft_model(make(NAME), peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=True)
    smuggled = [key for key in load_file(tmp_path / WEIGHTS) if "lora_" not in key]
    assert smuggled
    adapter = load_adapter(tmp_path)
    assert sorted(adapter.dropped) == sorted(key.removeprefix("base_model.model.") for key in smuggled) or sorted(
        adapter.dropped
    ) == sorted(smuggled)
    adapter.save(tmp_path, "org/large")
    assert all("lora_" in key for key in load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3; loram works on LORA"),
        ({"use_dora": True}, "is a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "carries whole modules"),
        ({"bias": "lora_only"}, "carries trained biases"),
        ({"lora_bias": True}, "carries trained biases"),
        ({"layer_replication": [[0, 1]]}, "replicates layers"),
        ({"r": 0}, "r is 0; expected a positive number"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    changes: dict[str, Any], message: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    written(stock, tmp_path, "plain")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


def test_a_pickle_or_an_incomplete_folder_is_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    written(stock, tmp_path, "plain")
    tensors = load((tmp_path / WEIGHTS).read_bytes())  # load_file would map the file that is overwritten here
    torch.save(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="is a pickle, not safetensors"):
        load_adapter(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="the folder is incomplete"):
        load_adapter(tmp_path)
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle, which loram never reads"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(AdapterError, match="no JSON object"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(InputError, match="is not valid JSON"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_config.json"):
        load_adapter(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_adapter(tmp_path / "gone")


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load((folder / WEIGHTS).read_bytes())
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


KEY = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop(f"{KEY}.lora_A.weight"), MismatchError, "has lora_B but not the other factor"),
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), MismatchError, "has lora_A but not the other factor"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(3, 48)}), MismatchError, "with r = 4"),
        (
            lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(3, 48), f"{KEY}.lora_B.weight": torch.ones(48, 3)}),
            MismatchError,
            "with r = 4",
        ),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4)}), MismatchError, r"expected A \(r, in\)"),
        (lambda t: t.update({f"{KEY}.lora_magnitude": torch.ones(4)}), AdapterError, "no lora_A or lora_B"),
        (lambda t: t.clear(), AdapterError, "holds no lora_A and lora_B"),
    ],
)
def test_factors_that_contradict_each_other_are_refused(
    edit: Callable[[dict[str, Tensor]], None],
    error: type[Exception],
    message: str,
    stock: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    edited(written(stock, tmp_path, "plain"), edit)
    with pytest.raises(error, match=message):
        load_adapter(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_nan_and_inf_are_found_with_their_module(value: float, factor: str) -> None:
    pair = {"a": torch.ones(2, 3), "b": torch.ones(4, 2)}
    pair[factor][1, 1] = value
    adapter = Adapter({"r": 2, "lora_alpha": 2}, {"model.x": LoraPair(pair["a"], pair["b"], 1.0)})
    with pytest.raises(MismatchError, match=rf"model.x.lora_{factor.upper()} holds NaN or Inf"):
        check_finite(adapter, "folder")


def test_modules_are_compared_with_the_models() -> None:
    adapter = Adapter({"r": 2, "lora_alpha": 2}, {"x": LoraPair(torch.ones(2, 3), torch.ones(4, 2), 1.0)})
    check_modules(adapter, lambda _: (4, 3), {"x"}, "folder")
    with pytest.raises(MismatchError, match=r"lacks y \(1 modules missing\)"):
        check_modules(adapter, lambda _: (4, 3), {"x", "y"}, "folder")
    with pytest.raises(MismatchError, match=r"updates a weight of shape \(4, 3\), the model's is \(3, 4\)"):
        check_modules(adapter, lambda _: (3, 4), {"x"}, "folder")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "regular expression"])
def test_the_modules_a_config_names_are_those_peft_adapts(
    kind: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = load_adapter(written(stock, tmp_path, kind))
    family = FAMILIES["llama"]
    assert expected_modules(adapter.config, family, family.geometry(raw_config(stock(NAME)))) == set(adapter.pairs)


def test_patterns_are_matched_as_peft_does() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {"down_proj": 1, "layers.1.self_attn.q_proj": 2, r".*\.2\.mlp\.up_proj": 3, "proj": 4}
    modules = [
        f"model.layers.{n}.{m}" for n in (1, 2, 11) for m in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")
    ]
    for module in [*modules, "proj", "my_proj", "down_proj"]:
        assert pattern_value(patterns, module, 0) == patterns.get(get_pattern_key(patterns, module), 0), module


def test_target_names_stay_or_become_full_names() -> None:
    assert target_names(["a.q", "a.v"], {"target_modules": ["v", "q"]}) == ["q", "v"]
    assert target_names(["b.q", "a.v"], {"target_modules": r".*\.(q|v)"}) == ["a.v", "b.q"]
