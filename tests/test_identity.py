"""The LoRAM identity (design: cut(large) + adapter ≡ zeroed large + recovered adapter), with stock parts as oracle.

Left: our small model with the adapter that peft trained for it. Right: the stock class, its pruned rows and columns
zeroed by stock_models (not by loram), and the recovered folder loaded by stock PeftModel.from_pretrained. Then the
same with recoveries that are wrong in ways people have been wrong: each must be noticed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import write_adapter, write_small_folder
from stock_models import GROUPED, HEADS, VARIANTS, head_dim, kv_heads, leaves, make, masks, random_kept, zero_pruned
from stock_models import tokens as random_tokens
from torch import Tensor, nn

from loram.modeling import load_small
from loram.options import RecoverOptions
from loram.stages.recover import recover

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
NOTICED = 1e-3
"""A broken recovery is off by far more than rounding."""


class Case:
    """One identity: a large model, what is kept, the small model, its adapter, and the recovered one."""

    def __init__(self, name: str, large: Path, work: Path, seed: int = 0, **lora: Any) -> None:
        self.name, self.large = name, large
        self.kept = random_kept(name, seed)
        self.small = write_small_folder(large, self.kept, work / "small")
        targets = lora.pop("targets", list(leaves(name)))
        self.small_adapter = write_adapter(self.small, work / "small-adapter", targets, seed, **lora)
        self.recovered = work / "adapter"
        recover(RecoverOptions(adapter=str(self.small_adapter), small=str(self.small), out=str(self.recovered)))

    def left(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits(PeftModel.from_pretrained(load_small(self.small, dtype="fp32"), str(self.small_adapter)), dtype)

    def right(self, recovered: Path, dtype: torch.dtype = torch.float32) -> Tensor:
        large = make(self.name)
        large.load_state_dict(zero_pruned(self.name, dict(large.state_dict()), self.kept))
        return logits(PeftModel.from_pretrained(large, str(recovered)), dtype)

    def gap(self, recovered: Path, dtype: torch.dtype = torch.float32) -> float:
        """Largest difference of the logits, relative to the largest logit; infinite where peft cannot load."""
        left = self.left(dtype)
        try:
            right = self.right(recovered, dtype)
        except RuntimeError:
            return float("inf")
        return ((left - right).abs().max() / right.abs().max()).item()


class PlainNorm(nn.Module):
    """An RMS norm without the stock one's detour through fp32."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.gain = stock.weight.double() + (1 if type(stock).__name__.startswith("Gemma") else 0)
        self.eps = stock.eps if hasattr(stock, "eps") else stock.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.gain


def logits(model: Any, dtype: torch.dtype) -> Tensor:
    """On random tokens, all arithmetic in `dtype`."""
    model = model.eval().to(dtype)
    if dtype == torch.float64:
        norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
        assert norms
        for name in norms:
            model.set_submodule(name, PlainNorm(model.get_submodule(name)))
    with torch.no_grad():
        found: Tensor = model(input_ids=random_tokens(9), use_cache=False).logits
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_identity(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    case = Case(name, stock(name), tmp_path)
    assert case.gap(case.recovered) < 1e-5
    assert case.gap(case.recovered, torch.float64) < 1e-13
    assert adapter_matters(case)


def adapter_matters(case: Case) -> bool:
    """Without the adapter the logits are others: the identity is no statement about the base alone."""
    bare = logits(load_small(case.small, dtype="fp32"), torch.float32)
    return ((bare - case.left()).abs().max() / bare.abs().max()).item() > NOTICED


@pytest.mark.parametrize("name", GROUPED)
def test_stock_peft_uses_every_key_and_misses_none(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    case = Case(name, stock(name), tmp_path)
    loaded = PeftModel.from_pretrained(make(name), str(case.recovered))
    stored = load_file(case.recovered / WEIGHTS)
    held = {key.replace(".default.", "."): value for key, value in loaded.state_dict().items() if "lora_" in key}
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[key], value) for key, value in stored.items())
    assert len(stored) == 2 * 3 * len(leaves(name))
    assert all(value.abs().max() > 0 for value in stored.values())
    config = json.loads((case.recovered / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "small" not in config["base_model_name_or_path"]


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "r": 3, "lora_alpha": 5},
        {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 7}, "alpha_pattern": {"o_proj": 3}},
        {"targets": ["o_proj", "up_proj"]},
        {"targets": r".*\.(1|2)\..*(q_proj|down_proj)"},
        {"targets": ["q_proj", "embed_tokens"]},
        {"targets": ["k_proj", "lm_head"]},
        {"layers_to_transform": [0, 2]},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": r".*\.1\..*v_proj"},
    ],
    ids=str,
)
def test_identity_of_every_kind_of_lora(lora: dict[str, Any], stock: Callable[[str], Path], tmp_path: Path) -> None:
    case = Case("llama-gqa", stock("llama-gqa"), tmp_path, 3, **lora)
    assert case.gap(case.recovered) < 1e-5
    assert adapter_matters(case)


# ---- broken recoveries ----

Factors = dict[str, Tensor]
Mutation = Callable[[Case, Factors, Factors], Factors]
"""(case, the recovered tensors, the small tensors) → what a broken recovery would have written."""


def target(key: str) -> str:
    return key.removeprefix(PREFIX).partition(".lora_")[0]


def rescatter(case: Case, wide: Factors, small: Factors, places: Callable[[str, list[int]], list[int]]) -> Factors:
    """The recovery done again by hand, at the places that `places(module, right ones)` gives."""
    found = {}
    for key, value in wide.items():
        rows, columns = masks(case.name, target(key), case.kept)
        dimension, mask = (0, rows) if "lora_B" in key else (1, columns)
        if mask is None:
            found[key] = value
            continue
        right = [index for index, stays in enumerate(mask) if stays]
        found[key] = torch.zeros_like(value).index_copy_(dimension, torch.tensor(places(key, right)), small[key])
    return found


def nothing(case: Case, wide: Factors, small: Factors) -> Factors:
    return rescatter(case, wide, small, lambda _, right: right)


def zeros(case: Case, wide: Factors, small: Factors) -> Factors:
    return {key: torch.zeros_like(value) for key, value in wide.items()}


def first_rows(case: Case, wide: Factors, small: Factors) -> Factors:
    """The small factors as they are, padded at the end: nothing is scattered."""
    return rescatter(case, wide, small, lambda _, right: list(range(len(right))))


def shuffled(case: Case, wide: Factors, small: Factors) -> Factors:
    def places(_: str, right: list[int]) -> list[int]:
        order = torch.randperm(len(right), generator=torch.Generator().manual_seed(1)).tolist()
        return [right[index] for index in order]

    return rescatter(case, wide, small, places)


def heads_modulo(case: Case, wide: Factors, small: Factors) -> Factors:
    """Query head h credited to kv head h mod K (LLM-Pruner's bug) instead of h // (H/K)."""
    width, total = head_dim(case.name), kv_heads(case.name)

    def places(key: str, right: list[int]) -> list[int]:
        module = target(key)
        heads = set(case.kept[int(module.split(".")[2])][0])
        mine = [h * width + row for h in range(HEADS) if h % total in heads for row in range(width)]
        if module.endswith(("q_proj", "o_proj")):
            return mine
        if module.endswith("qkv_proj"):
            return mine + [index for index in right if index >= HEADS * width]
        return right

    return rescatter(case, wide, small, places)


def swapped(case: Case, wide: Factors, small: Factors) -> Factors:
    """A where B belongs and the other way round, in the square modules; where none is square, everywhere."""

    def partner(key: str) -> str:
        return key.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")

    square = {key for key, value in wide.items() if value.numel() == wide[partner(key)].numel()} or set(wide)
    return {key: wide[partner(key)].T.contiguous() if key in square else value for key, value in wide.items()}


def unscaled(case: Case, wide: Factors, small: Factors) -> Factors:
    """alpha/r = 2 left out: half of every update."""
    return {key: value / 2 if "lora_B" in key else value for key, value in wide.items()}


BROKEN: dict[str, Mutation] = {
    "zeros": zeros,
    "first rows": first_rows,
    "shuffled indices": shuffled,
    "heads modulo": heads_modulo,
    "A and B swapped": swapped,
    "scale forgotten": unscaled,
}


def rewrite(case: Case, mutation: Mutation, out: Path) -> Path:
    """The recovered folder with its tensors replaced by the mutation's."""
    shutil.copytree(case.recovered, out)
    wide, small = load_file(case.recovered / WEIGHTS), load_file(case.small_adapter / WEIGHTS)
    save_file(mutation(case, wide, small), out / WEIGHTS)
    return out


@pytest.mark.parametrize("name", GROUPED)
def test_every_broken_recovery_is_noticed(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    case = Case(name, stock(name), tmp_path, 2)
    assert any(len(heads) == 1 for heads, _ in case.kept.values()), "a cut through the heads is needed"
    assert case.gap(rewrite(case, nothing, tmp_path / "right")) < 1e-5
    for number, (label, mutation) in enumerate(BROKEN.items()):
        gap = case.gap(rewrite(case, mutation, tmp_path / f"broken-{number}"))
        assert gap > NOTICED, f"{label}: the identity still holds to {gap:.1e}"
