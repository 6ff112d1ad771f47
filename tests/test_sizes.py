"""Counts and bytes: the paper's tables to the unit and the digit, and the stock classes' own tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from stock_models import VARIANTS, cut_by_hand, leaves, make, random_kept, raw_config

from loram.families.widths import Cut, Widths
from loram.options import PlanOptions
from loram.sizes import Counts, count, lora_parameters, paper_bytes, parameters, weight_bytes
from loram.stages.plan import plan

PAPER = json.loads((Path(__file__).parent / "fixtures" / "paper_tables.json").read_text())
GIB = 2**30


def paper_config(name: str) -> dict[str, Any]:
    return {"model_type": "llama", **PAPER["configs"][name]}


def row_id(row: dict[str, Any]) -> str:
    return f"{row['config']}-{row.get('ratio', row.get('pattern'))}"


def counts(row: dict[str, Any]) -> tuple[Counts, Counts]:
    """Large and small, cut as the paper does: first 4 and last 2 layers whole."""
    config = paper_config(row["config"])
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    cut = Cut(Fraction(row["ratio"]), 4, 2)
    widths = cut.widths(
        layers, config["num_key_value_heads"], config["hidden_size"] // heads, config["intermediate_size"]
    )
    return count(config), count(config, widths)


@pytest.mark.parametrize("row", PAPER["structured"], ids=row_id)
def test_structured_rows_are_exact(row: dict[str, Any], tmp_path: Path) -> None:
    large, small = counts(row)
    assert (large.total, small.total) == (row["large"], row["small"])
    assert round(large.total / small.total, 2) == row["reduction"]
    assert round(weight_bytes(small) / GIB, 2) == row["gib_bf16"]
    (tmp_path / "config.json").write_text(json.dumps(paper_config(row["config"])))
    body = plan(PlanOptions(model=str(tmp_path), ratio=row["ratio"])).to_json()
    assert (body["params"]["large"], body["params"]["small"]) == (row["large"], row["small"])
    assert round(body["params"]["reduction"], 2) == row["reduction"]


@pytest.mark.parametrize("row", PAPER["qloram_paper_rule"], ids=row_id)
def test_qloram_rows_by_the_papers_rule(row: dict[str, Any]) -> None:
    large, small = counts(row)
    assert round(paper_bytes(small, "nf4") / GIB, 2) == row["gib"]
    assert round(paper_bytes(large) / paper_bytes(small, "nf4"), 2) == row["reduction"]


@pytest.mark.parametrize("row", PAPER["qloram_true_bytes"], ids=row_id)
def test_qloram_rows_in_true_bytes(row: dict[str, Any]) -> None:
    large, small = counts(row)
    assert round(weight_bytes(small, "nf4") / GIB, 2) == row["gib"]
    assert round(weight_bytes(large) / weight_bytes(small, "nf4"), 2) == row["reduction"]


@pytest.mark.parametrize("row", PAPER["non_structured"], ids=row_id)
def test_non_structured_rows_follow_from_the_counts(row: dict[str, Any], tmp_path: Path) -> None:
    """All decoder linears at the pattern's density, the rest whole: no mask is needed to count."""
    (tmp_path / "config.json").write_text(json.dumps(paper_config(row["config"])))
    how = {"method": "semi"} if row["pattern"] == "2:4" else {"method": "unstructured", "ratio": row["pattern"]}
    body = plan(PlanOptions(model=str(tmp_path), **how)).to_json()
    assert body["params"]["small"] == row["nonzero"]
    assert round(body["params"]["reduction"], 3) == row["reduction"]
    assert body["bytes"]["small"] == body["bytes"]["large"]
    density = 1 - (Fraction(1, 2) if row["pattern"] == "2:4" else Fraction(row["pattern"]))
    large = count(paper_config(row["config"]))
    assert large.total - large.linear + int(large.linear * density) == row["nonzero"]
    assert round(large.total / row["nonzero"], 3) == row["reduction"]


def test_all_tables_are_there() -> None:
    assert len(PAPER["structured"]) == 6
    assert len(PAPER["qloram_paper_rule"]) == 5
    assert len(PAPER["qloram_true_bytes"]) >= 2
    assert len(PAPER["non_structured"]) == 2


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_are_the_numel_of_the_models(name: str, stock: Callable[[str], Path]) -> None:
    model, config = make(name), raw_config(stock(name))
    state = {key: value for key, value in model.named_parameters()}  # ties are named once
    linear = sum(
        v.numel() for key, v in state.items() if key.endswith(tuple(f"{leaf}.weight" for leaf in leaves(name)))
    )
    assert count(config) == Counts(sum(value.numel() for value in state.values()), linear)
    kept = random_kept(name, 3)
    small = sum(value.numel() for value in cut_by_hand(name, state, kept).values())
    heads = [model.config.num_key_value_heads, *(len(kept[layer][0]) for layer in (1, 2))]
    channels = [model.config.intermediate_size, *(len(kept[layer][1]) for layer in (1, 2))]
    assert parameters(config, Widths(tuple(heads), tuple(channels))) == small


@pytest.mark.parametrize("name", VARIANTS)
def test_lora_parameters_are_peft_s(name: str, stock: Callable[[str], Path]) -> None:
    import peft

    adapted = peft.get_peft_model(make(name), peft.LoraConfig(r=3, target_modules=list(leaves(name))))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    config = raw_config(stock(name))
    assert lora_parameters(config, 3, ("all-linear",)) == trainable
    assert lora_parameters(config, 3, leaves(name)) == trainable
    assert lora_parameters(config, 3, ("down_proj",)) == 3 * 3 * (48 + 40)
    assert lora_parameters(config, 3, ("down_proj", "lm_head")) == 3 * 3 * (48 + 40) + 3 * (48 + 64)
