"""What calibrated pruning is predicted to take: parts that are real tensors', and a peak that no depth moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import GROUPED, make, raw_config

from loram.blockwise import BlockRunner, SecondMoment
from loram.calibration_memory import Calibration, calibrated_memory, observed_bytes
from loram.checkpoint import Checkpoint
from loram.families import family_of

WANDA = Calibration(samples=6, length=16, value_bytes=4, kept=20)
WAYS = {
    "wanda": WANDA,
    "taylor": replace(WANDA, gradients=True),
    "sparsegpt": replace(WANDA, kept=None, hessians=True),
    "depth": replace(WANDA, kept=None, gaps=True),
    "no refit": replace(WANDA, kept=None),
}
LARGE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@pytest.mark.parametrize("name", GROUPED)
def test_blocks_and_second_moments_are_the_tensors_of_real_models(name: str, stock: Callable[[str], Path]) -> None:
    config, model = raw_config(stock(name)), make(name)
    layer = model.get_decoder().layers[0]
    linears = sum(part.weight.numel() for part in layer.modules() if isinstance(part, torch.nn.Linear))
    assert calibrated_memory(config, WANDA).parts["block"] == linears * 4
    with Checkpoint(stock(name)) as checkpoint, BlockRunner(checkpoint, dtype=torch.float32) as runner:
        seen = {weight.name: SecondMoment() for weight in runner.family.outputs}
        hidden = runner.embed(torch.arange(32).reshape(2, 16))
        with runner.block(0, hidden) as block:
            block.run(seen)
        held = sum(moment.total.nbytes for moment in seen.values())
    geometry = family_of(config).geometry(config)
    assert observed_bytes(geometry, WANDA) == held
    assert observed_bytes(geometry, WAYS["no refit"]) == 0


@pytest.mark.parametrize("way", WAYS)
def test_what_moves_the_peak(way: str) -> None:
    def peak(config: dict[str, Any] = LARGE, **changes: Any) -> int:
        return calibrated_memory(config, replace(WAYS[way], **changes)).total

    assert peak(LARGE | {"num_hidden_layers": 80}) == peak()
    assert peak(LARGE | {"intermediate_size": 11264}) > peak()
    assert peak(samples=7) > peak()
    assert peak(value_bytes=2) < peak()
    if way in ("wanda", "taylor"):
        assert peak(kept=5000) > peak(kept=4000) > peak(kept=None)


def test_hidden_states_beyond_their_memory_wait_in_a_file() -> None:
    few, many = (calibrated_memory(LARGE, replace(WANDA, samples=samples)).parts for samples in (1000, 20_000))
    assert few["hidden states"] == 1000 * 16 * 2048 * 4
    assert many["hidden states"] == 0
    back = calibrated_memory(LARGE, replace(WAYS["taylor"], samples=1000)).parts
    assert back["hidden states"] == 2 * few["hidden states"]


def test_with_many_words_the_head_is_the_peak_of_taylor() -> None:
    small = LARGE | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 200_000}
    parts = calibrated_memory(small, WAYS["taylor"]).parts
    assert parts["head"] == 200_000 * 64 * 4
    assert "block" not in parts
    assert "head" not in calibrated_memory(small, WANDA).parts
