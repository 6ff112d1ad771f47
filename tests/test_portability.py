"""The verdicts: what each consumer reads, and what it would silently get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loram.adapter import Adapter, LoraPair
from loram.portability import portability

ALL = {"peft", "vllm", "sglang", "llama_cpp"}


def adapter(modules: tuple[str, ...] = ("q_proj", "down_proj"), rank: int = 8, **config: Any) -> Adapter:
    scale = 16 / rank if not config.get("use_rslora") else 16 / rank**0.5
    pairs = {
        f"model.layers.0.x.{module}": LoraPair(
            torch.zeros(rank, 4), torch.zeros(4, rank), scale, embedding=module == "embed_tokens"
        )
        for module in modules
    }
    return Adapter({"r": rank, "lora_alpha": 16, **config}, pairs)


@pytest.mark.parametrize(
    ("subject", "refused"),
    [
        (adapter(), set()),
        (adapter(("qkv_proj", "gate_up_proj")), set()),
        (adapter(use_rslora=True), {"sglang", "llama_cpp"}),
        (adapter(rank_pattern={"q_proj": 8}), {"vllm"}),
        (adapter(alpha_pattern={"q_proj": 16}), {"vllm"}),
        (adapter(("embed_tokens", "q_proj")), {"vllm", "sglang", "llama_cpp"}),
        (adapter(("lm_head", "q_proj")), {"vllm", "sglang", "llama_cpp"}),
        (adapter(rank=513), {"vllm"}),
        (adapter(rank=512), set()),
    ],
)
def test_verdicts(subject: Adapter, refused: set[str]) -> None:
    found = portability(subject)
    assert set(found) == ALL
    assert {name for name, verdict in found.items() if not verdict.ok} == refused
    assert all(verdict.note for verdict in found.values() if not verdict.ok)


def test_folding_makes_portable_what_was_not() -> None:
    for subject in (adapter(use_rslora=True), adapter(rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 16})):
        assert all(verdict.ok for verdict in portability(subject.portable()).values())


@pytest.mark.parametrize(("rank", "bucket"), [(1, 1), (2, 8), (8, 8), (9, 16), (65, 128), (257, 320), (321, 512)])
def test_vllm_is_told_its_rank_flag(rank: int, bucket: int) -> None:
    assert portability(adapter(rank=rank))["vllm"].note == f"--max-lora-rank {bucket}"


def test_an_adapter_that_does_not_fit_is_loaded_by_none() -> None:
    found = portability(adapter(), complete=False)
    assert {name for name, verdict in found.items() if not verdict.ok} == ALL
