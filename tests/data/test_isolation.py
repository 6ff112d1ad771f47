"""A row in a pack gives the logits it gives alone: every family, stock and small, sdpa and eager, with and without
training, and refused where it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import write_adapter, write_small_folder
from stock_models import GROUPED, VOCABULARY, leaves, make, random_kept

from loram.data.collate import collate_packs
from loram.data.encoding import EncodedRow
from loram.data.isolation import changes_beyond, leaks, refuse_leaks
from loram.errors import OptionError
from loram.evaluation.losses import measure
from loram.modeling import load_small

LENGTHS = ((11, 2, 9), (20, 3), (14,))


def some_packs() -> list[list[EncodedRow]]:
    """Rows longer than the sliding windows of the tiny models (8), and packs with padding."""
    draw = torch.Generator().manual_seed(1)

    def row(length: int) -> EncodedRow:
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        return EncodedRow(input_ids=ids, loss_mask=[place > length // 2 for place in range(length)])

    return [[row(length) for length in lengths] for lengths in LENGTHS]


def furthest(model: Any) -> float:
    """The largest difference between a row's logits in its pack and alone."""
    packs = some_packs()
    batch = {name: tensor for name, tensor in collate_packs(packs).items() if name != "labels"}
    found = model(**batch, use_cache=False).logits
    largest = 0.0
    for number, pack in enumerate(packs):
        start = 0
        for row in pack:
            alone = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            largest = max(largest, (found[number, start : start + len(alone)] - alone).abs().max().item())
            start += len(alone)
    return largest


def small_model(name: str, stock: Callable[[str], Path], folder: Path, kernel: str) -> Any:
    small = write_small_folder(stock(name), random_kept(name, 3), folder / "small")
    return load_small(small, dtype="fp32", attn_implementation=kernel)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GROUPED)
def test_stock_models(name: str, kernel: str) -> None:
    model = make(name)
    model.set_attn_implementation(kernel)
    with torch.no_grad():
        assert furthest(model) <= 1e-4
    refuse_leaks(model, 64)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GROUPED)
def test_small_models_with_an_adapter_in_training(
    name: str, kernel: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    model = small_model(name, stock, tmp_path, kernel)
    write_adapter(tmp_path / "small", tmp_path / "adapter", list(leaves(name)))
    adapted: Any = PeftModel.from_pretrained(model, str(tmp_path / "adapter"), is_trainable=True)
    adapted.config.use_cache = False
    adapted.train()
    assert furthest(adapted) <= 1e-4
    refuse_leaks(adapted, 64)
    assert adapted.training


@pytest.mark.parametrize("name", GROUPED)
def test_measured_losses_are_the_same_in_packs(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    model = small_model(name, stock, tmp_path, "sdpa")
    rows = [row for pack in some_packs() for row in pack]
    plain, packed = measure(model, rows, 2), measure(model, rows, 2, packed_to=24)
    assert plain.tokens == packed.tokens
    torch.testing.assert_close(packed.nll, plain.nll, rtol=1e-5, atol=1e-4)


def test_the_comparison_can_fail() -> None:
    """With an attention mask of ones, or with a cache, transformers takes the pack for one text."""
    model = make("llama-gqa")
    stock_forward = model.model.forward

    def with_mask(input_ids: Any, position_ids: Any, use_cache: bool = False) -> Any:
        ones = torch.ones_like(input_ids)
        return stock_forward(input_ids=input_ids, position_ids=position_ids, attention_mask=ones, use_cache=False)

    model.model.forward = with_mask
    assert leaks(model)[0] > 1e-3
    with pytest.raises(OptionError, match=r"--packing: LlamaForCausalLM with sdpa attention does not keep the rows"):
        refuse_leaks(model, 8)
    model.model.forward = lambda **inputs: stock_forward(**{**inputs, "use_cache": True})
    assert leaks(model)[0] > 1e-3


def test_a_model_without_positions_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(OptionError, match="--packing: "):
        refuse_leaks(transformers.BloomForCausalLM(config), 8)


def test_rotary_embeddings_that_look_at_the_longest_row() -> None:
    short = [1.0] * 6
    scaled = {"rope_type": "longrope", "short_factor": short, "long_factor": [4.0] * 6, "rope_theta": 1e4}
    config = transformers.Phi3Config(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters=scaled,
    )
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).eval()
    assert changes_beyond(config) == 16
    refuse_leaks(model, 16)
    with torch.no_grad():
        assert furthest(model) > 1e-3  # with a row of 20: refused for a reason
    with pytest.raises(OptionError, match=r"more than 16 tokens \(the longest has 17\).*set --max-length 16"):
        refuse_leaks(model, 17)
    assert changes_beyond(make("llama-gqa").config) is None
    assert changes_beyond(make("gemma3_text-gqa").config) is None
