"""Masked LoRA in whole models, through peft, against a dense twin: stock weights plus (s·B·A) ∘ M by torch alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from small_models import map_for, randomize
from stock_models import GROUPED, leaves, make, tokens
from torch import Tensor, nn
from torch.func import functional_call

from loram.adapter import load_adapter
from loram.options import TrainOptions
from loram.training.lora import attach_masked, save_adapter, wrap
from loram.training.masked_lora import masked_modules

PREFIX = "base_model.model."
IDS = tokens(3, rows=2, length=12)


def options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{"model": "m", "rank": 3, "alpha": 5.0, "dropout": 0.0, **changes})


def masks_for(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random masks of every decoder Linear, by module."""
    draw = torch.Generator().manual_seed(seed)
    weights = {n: p for n, p in make(name).named_parameters() if n.endswith("_proj.weight")}
    return {key.removesuffix(".weight"): torch.rand(p.shape, generator=draw) < 0.5 for key, p in weights.items()}


def wrapped(name: str, masks: dict[str, Tensor], **changes: Any) -> Any:
    model = wrap(make(name), options(**changes), masks.get)
    randomize(model, 1)
    return model.train()


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def dense_loss(name: str, factors: dict[str, Tensor], masks: dict[str, Tensor], scale: float) -> Tensor:
    """The stock model's loss with every weight W + (s·B·A) ∘ M, a graph of plain torch to A and B."""
    model = make(name).train()
    weights = {key: value.detach() for key, value in model.named_parameters()}
    for key, a in factors.items():
        if ".lora_A." in key:
            module = key.removeprefix(PREFIX).partition(".lora_A")[0]
            delta = scale * (factors[key.replace("lora_A", "lora_B")] @ a)
            mask = masks.get(module)
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + (delta if mask is None else delta * mask)
    found: Any = functional_call(model, weights, (IDS,), {"use_cache": False})
    return loss_of(found.logits)


@pytest.mark.parametrize("name", GROUPED)
def test_loss_and_gradients_are_the_dense_twins(name: str) -> None:
    masks = masks_for(name)
    model = wrapped(name, masks)
    factors = {key: value for key, value in model.named_parameters() if "lora_" in key}
    loss = loss_of(model(input_ids=IDS, use_cache=False).logits)
    loss.backward()
    twins = {key: value.detach().clone().requires_grad_(True) for key, value in factors.items()}
    wanted = dense_loss(name, twins, masks, 5 / 3)
    wanted.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for key, value in factors.items():
        torch.testing.assert_close(value.grad, twins[key].grad, rtol=1e-4, atol=1e-6)
    plain = dense_loss(name, twins, {}, 5 / 3)
    assert (plain - loss).detach().abs() > 1e-3  # the mask matters


def test_recomputing_activations_changes_nothing() -> None:
    """With dropout, too: the same is drawn again."""
    masks, found = masks_for("llama-gqa"), []
    for again in (False, True):
        model = wrapped("llama-gqa", masks, dropout=0.2)
        if again:
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        loss_of(model(input_ids=IDS, use_cache=False).logits).backward()
        found.append([value.grad for key, value in model.named_parameters() if "lora_" in key])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_only_what_has_a_mask_is_masked() -> None:
    masks = masks_for("llama-gqa")
    some = {name: mask for name, mask in masks.items() if ".layers.1." in name}
    model = wrapped("llama-gqa", some, targets=("all-linear", "lm_head", "embed_tokens"))
    assert masked_modules(model) == {PREFIX + name for name in some}
    assert not [name for name in model.state_dict() if "keep_bits" in name]
    assert {type(part).__name__ for part in model.modules() if hasattr(part, "lora_A")} == {
        *("Linear", "MaskedLinear", "Embedding")
    }


def test_patterns_and_rslora_scale_the_masked_product() -> None:
    masks = masks_for("llama-gqa")
    model = wrapped("llama-gqa", masks, rslora=True, rank_pattern=("up_proj=7",), alpha_pattern=("q_proj=2",))
    logits = model(input_ids=IDS, use_cache=False).logits
    twin = make("llama-gqa")
    scales = {"up_proj": 5 / 7**0.5, "q_proj": 2 / 3**0.5}
    with torch.no_grad():
        for module, mask in masks.items():
            layer = model.get_submodule(PREFIX + module)
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            scale = scales.get(module.rpartition(".")[2], 5 / 3**0.5)
            assert layer.scaling["default"] == pytest.approx(scale)
            twin.get_submodule(module).weight += scale * delta * mask
    torch.testing.assert_close(logits, twin(IDS, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_merging_and_unmerging_know_the_mask() -> None:
    masks = masks_for("llama-gqa")
    model = wrapped("llama-gqa", masks).eval()
    before = {name: model.get_submodule(PREFIX + name).base_layer.weight.clone() for name in masks}
    logits = model(input_ids=IDS, use_cache=False).logits
    model.merge_adapter()
    for name, mask in masks.items():
        weight = model.get_submodule(PREFIX + name).base_layer.weight
        assert torch.equal(weight[~mask], before[name][~mask])
        assert (weight[mask] != before[name][mask]).float().mean() > 0.99
    torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, logits, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    for name in masks:
        torch.testing.assert_close(model.get_submodule(PREFIX + name).base_layer.weight, before[name])
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(IDS, use_cache=False).logits, logits, rtol=1e-4, atol=1e-5)


def saved(tmp_path: Path, masks: dict[str, Tensor]) -> tuple[Any, Path]:
    model = wrapped("llama-gqa", masks, targets=("all-linear", "lm_head")).eval()
    save_adapter(model, tmp_path, "small")
    return model, tmp_path


def test_saved_and_attached_again(tmp_path: Path, stock: Callable[[str], Path]) -> None:
    masks = masks_for("llama-gqa")
    model, folder = saved(tmp_path, masks)
    wanted = model(input_ids=IDS, use_cache=False).logits
    adapter = load_adapter(folder)
    assert adapter.masked
    named = map_for(stock("llama-gqa"), {}, masks={f"{name}.weight": mask for name, mask in masks.items()})
    again = attach_masked(make("llama-gqa"), adapter, named.mask_in_small)
    assert not again.training
    assert not any(value.requires_grad for value in again.parameters())
    torch.testing.assert_close(again(input_ids=IDS, use_cache=False).logits, wanted, rtol=0, atol=0)


def test_nothing_but_loram_loads_it(tmp_path: Path) -> None:
    """peft does not know its type; and who does not look at the type finds no factors by their usual names."""
    _, folder = saved(tmp_path, masks_for("llama-gqa"))
    with pytest.raises(KeyError, match="LORAM_MASKED_LORA"):
        PeftConfig.from_pretrained(str(folder))
    with pytest.raises(KeyError, match="LORAM_MASKED_LORA"):
        PeftModel.from_pretrained(make("llama-gqa"), str(folder))
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert {key for key in keys if "lora_" in key} == {f"{PREFIX}lm_head.lora_{part}.weight" for part in "AB"}
    assert len(keys) == 2 + 2 * 3 * len(leaves("llama-gqa"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(make("llama-gqa"), str(folder))


def test_no_mask_no_difference(tmp_path: Path) -> None:
    """Wrapped with masks that are nowhere, everything is as without."""
    plain, masked = (wrap(make("llama-gqa"), options(), masks) for masks in (None, {}.get))
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in masked.named_modules()]
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), masked.parameters(), strict=True))
