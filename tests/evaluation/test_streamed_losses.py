"""A model measured block by block has the losses that it has whole, with stock peft as the other side."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from stock_models import GROUPED, VOCABULARY, leaves, make, raw_config

from loram.activations import Workload
from loram.adapter import load_adapter
from loram.data.encoding import EncodedRow
from loram.errors import MismatchError
from loram.evaluation.losses import measure
from loram.evaluation.room import whole_bytes
from loram.evaluation.streamed import LENGTHS, StreamedModel, by_length
from loram.memory_model import Model, forward_memory
from loram.training.lora import save_adapter, without_peft_noise


def rows_of(seed: int, lengths: list[int]) -> list[EncodedRow]:
    """Rows of random tokens, about half of which carry loss."""
    draw = random.Random(seed)
    rows = []
    for length in lengths:
        mask = [False, *(draw.random() < 0.5 for _ in range(length - 1))]
        mask[-1] = True
        rows.append(EncodedRow(input_ids=[draw.randrange(3, VOCABULARY) for _ in range(length)], loss_mask=mask))
    return rows


ROWS = rows_of(0, [5, 31, 17, 17, 9, 24, 2, 30, 12, 8, 21])


def adapted(name: str, folder: Path, targets: list[str]) -> Any:
    """A stock model with a LoRA whose B is not zero, saved in `folder`."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM")
    with without_peft_noise():
        model: Any = peft.get_peft_model(make(name), config)
    for key, weight in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.2)
    save_adapter(model, folder, "large")
    return model.eval()


@pytest.mark.parametrize("name", GROUPED)
def test_losses_are_those_of_the_whole_model_under_peft(
    name: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    model = adapted(name, tmp_path, [*leaves(name), "embed_tokens"])
    expected = measure(model, ROWS, 4)
    plain = measure(make(name), ROWS, 4)
    found = StreamedModel(stock(name), 4, "fp32").measure(ROWS, load_adapter(tmp_path))
    assert found.tokens == expected.tokens
    assert found.nll == pytest.approx(expected.nll, rel=1e-5)
    assert found.nll != pytest.approx(plain.nll, rel=1e-3)
    assert StreamedModel(stock(name), 4, "fp32").measure(ROWS).nll == pytest.approx(plain.nll, rel=1e-5)


def test_an_adapted_head_counts_where_it_is_not_tied(stock: Callable[[str], Path], tmp_path: Path) -> None:
    model = adapted("llama-gqa", tmp_path, ["q_proj", "lm_head"])
    found = StreamedModel(stock("llama-gqa"), 4, "fp32").measure(ROWS, load_adapter(tmp_path))
    assert found.nll == pytest.approx(measure(model, ROWS, 4).nll, rel=1e-5)


def test_hidden_states_that_outgrow_memory_go_to_a_file_that_is_gone_afterwards(
    stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    inside = StreamedModel(stock("llama-gqa"), 4, "fp32").measure(ROWS)
    outside = StreamedModel(stock("llama-gqa"), 4, "fp32", hidden_memory=100).measure(ROWS)
    assert inside == outside
    assert not list(tmp_path.iterdir())


def test_nan_is_named(stock: Callable[[str], Path], tmp_path: Path) -> None:
    adapted("llama-gqa", tmp_path, ["q_proj", "up_proj"])
    adapter = load_adapter(tmp_path)
    adapter.pairs["model.layers.1.mlp.up_proj"].b[0, 0] = float("nan")
    with pytest.raises(MismatchError, match="layer 1"):
        StreamedModel(stock("llama-gqa"), 4, "fp32").measure(ROWS, adapter)


@pytest.mark.parametrize(("count", "batch"), [(1, 8), (8, 8), (9, 8), (200, 3), (1000, 1)])
def test_groups_hold_every_row_once_in_few_lengths(count: int, batch: int) -> None:
    draw = random.Random(count)
    lengths = [draw.randrange(2, 500) for _ in range(count)]
    groups = by_length(lengths, batch)
    assert sorted(index for group in groups for index in group) == list(range(count))
    assert len(groups) <= LENGTHS
    assert all(len(group) % batch == 0 for group in groups[:-1])
    flat = [lengths[index] for group in groups for index in group]
    assert flat == sorted(flat, reverse=True)


def test_what_a_model_takes_whole(stock: Callable[[str], Path]) -> None:
    """At least its weights, more with longer and more rows, less in 16 bit; nothing is said of a quantized one."""
    weights = sum(parameter.numel() for parameter in make("llama-gqa").parameters()) * 4
    needed = whole_bytes(stock("llama-gqa"), ROWS, 4, "fp32")
    assert needed is not None
    assert needed > weights
    config = raw_config(stock("llama-gqa"))

    def planned(**changes: Any) -> int:
        return forward_memory(Model(config), Workload(**{"batch": 4, "length": 31, "dtype": "fp32", **changes})).total

    assert planned() == needed
    assert planned(batch=5) > needed
    assert planned(length=32) > needed
    assert planned(attention="eager") > needed
    assert planned(dtype="bf16") < needed
