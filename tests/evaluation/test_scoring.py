"""The large model under a changing adapter: one block at a time gives what PEFT gives on the whole model."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small_models import write_adapter
from stock_models import GROUPED, VOCABULARY, leaves

from loram.adapter import Adapter, load_adapter
from loram.data.encoding import EncodedRow
from loram.evaluation import scoring
from loram.evaluation.losses import measure
from loram.modeling import load_model

OUTSIDE = {"llama-gqa": ["embed_tokens", "lm_head"], "gemma3_text-mqa": ["embed_tokens", "lm_head"]}


def rows() -> list[EncodedRow]:
    draw = random.Random(5)
    found = []
    for length in (7, 19, 12, 19, 4):
        mask = [False] + [draw.random() < 0.6 for _ in range(length - 2)] + [True]
        ids = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        found.append(EncodedRow(input_ids=ids, loss_mask=mask))
    return found


def halved(adapter: Adapter) -> Adapter:
    return adapter.map_pairs(lambda module, pair: replace(pair, b=pair.b * (0.5 if "mlp" in module else 2)))


@pytest.mark.parametrize("name", [*GROUPED, "gemma3_text-mqa", "llama-mha"])
def test_streamed_is_resident_is_stock(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    targets = [*leaves(name), *OUTSIDE.get(name, [])]
    adapter = load_adapter(write_adapter(stock(name), tmp_path / "adapter", targets, 2))
    for number, changed in enumerate((adapter, halved(adapter), adapter)):
        place = tmp_path / f"changed-{number}"
        place.mkdir()
        changed.save(place, "x")
        expected = measure(PeftModel.from_pretrained(load_model(stock(name), dtype="fp32"), str(place)), rows(), 2)
        for way in (scoring.resident, scoring.streamed):
            with way(stock(name), adapter, "fp32", 2) as score:
                score(halved(adapter), rows())
                found = score(changed, rows())
            assert found.tokens == expected.tokens
            assert found.nll == pytest.approx(expected.nll, rel=1e-5), way


def test_in_bf16_both_agree_up_to_rounding(stock: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(stock("llama-gqa"), tmp_path / "adapter", [*leaves("llama-gqa")], 2))
    with (
        scoring.resident(stock("llama-gqa"), adapter, "bf16", 2) as whole,
        scoring.streamed(stock("llama-gqa"), adapter, "bf16", 2) as blocks,
    ):
        assert blocks(adapter, rows()).nll == pytest.approx(whole(adapter, rows()).nll, rel=0.02)


def test_what_fits(stock: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("looks at the GPU's memory")
    size = sum(parameter.numel() for parameter in load_model(stock("llama-gqa")).parameters()) * 2
    for free, expected in ((size * 1.3, True), (size * 1.1, False)):
        monkeypatch.setattr(scoring, "available_bytes", lambda free=free: free)
        assert scoring.fits(stock("llama-gqa"), "bf16") is expected
