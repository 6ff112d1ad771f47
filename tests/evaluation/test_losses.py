"""Held-out loss against brute force, token by token; standard errors against their definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from loram.data.encoding import EncodedRow
from loram.errors import MismatchError
from loram.evaluation.losses import RowLosses, measure, paired_gain, ratio_estimate, summarize
from loram.options import TrainOptions
from loram.progress import Progress
from loram.training import cross_entropy
from loram.training.lora import wrap

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"


def rows_of(vocabulary: int) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate((5, 17, 9, 3, 30, 12, 2)):
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        rows.append(EncodedRow(input_ids=ids, loss_mask=[position % 3 != number % 3 for position in range(length)]))
    return rows


def brute_force(model: Any, row: EncodedRow) -> tuple[float, int]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0].double()
    total, count = 0.0, 0
    for position in range(1, len(row["input_ids"])):
        if row["loss_mask"][position]:
            total -= logits[position - 1].log_softmax(-1)[row["input_ids"][position]].item()
            count += 1
    return total, count


def llama() -> Any:
    return AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32)


def llama_with_adapter() -> Any:
    model = wrap(llama(), TrainOptions(model="m", targets=("q_proj", "down_proj")))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.3)
    return model


def capped_gemma() -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.05,
        pad_token_id=0,
    )
    return Gemma3ForCausalLM(config)


@pytest.mark.parametrize("build", [llama, llama_with_adapter, capped_gemma])
@pytest.mark.parametrize(("batch", "chunk"), [(1, 512), (3, 4), (8, 512)])
def test_row_losses_equal_brute_force(build: Any, batch: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda vocabulary: chunk)
    model = build().eval()
    rows = rows_of(64)
    found = measure(model, rows, batch)
    expected = [brute_force(model, row) for row in rows]
    torch.testing.assert_close(list(found.nll), [nll for nll, _ in expected], rtol=1e-4, atol=1e-4)
    assert list(found.tokens) == [count for _, count in expected]
    summary = summarize(found)
    total, count = (sum(part) for part in zip(*expected, strict=True))
    assert summary.mean == pytest.approx(total / count, rel=1e-5)
    assert summary.perplexity == pytest.approx(math.exp(summary.mean))


class Heard(Progress):
    """The figures that were shown."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.losses.append(figures["loss"])


def test_the_loss_shown_meanwhile_is_of_the_rows_so_far() -> None:
    rows, heard = sorted(rows_of(64), key=lambda row: -len(row["input_ids"])), Heard()
    found = measure(llama(), rows, 1, heard)
    so_far = [sum(found.nll[: i + 1]) / sum(found.tokens[: i + 1]) for i in range(len(rows))]
    assert heard.losses == pytest.approx(so_far)


def test_an_adapter_changes_the_loss() -> None:
    rows = rows_of(64)
    assert measure(llama(), rows, 4).nll != pytest.approx(measure(llama_with_adapter(), rows, 4).nll, rel=1e-3)


def test_nan_weights_are_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(MismatchError, match="the loss of row 1 is nan: the model or its adapter holds NaN"):
        measure(model, rows_of(64), 4)


def test_the_ratio_estimate_by_hand() -> None:
    # mean 10/5 = 2; residuals 4 - 2·1 = 2 and 6 - 2·4 = -2; sqrt((4 + 4)·2/1)/5
    assert ratio_estimate((4.0, 6.0), (1, 4)) == pytest.approx((2.0, 4 / 5))
    # rows of equal length: the ordinary standard error of a mean
    mean, stderr = ratio_estimate((1.0, 2.0, 6.0), (1, 1, 1))
    assert (mean, stderr) == pytest.approx((3.0, math.sqrt(((4 + 1 + 9) / 2) / 3)))
    assert ratio_estimate((3.0,), (2,)) == (1.5, 0.0)


def test_the_standard_error_covers_the_truth() -> None:
    """On drawn data the spread of the estimate is what the standard error says."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        tokens = torch.randint(1, 20, (50,), generator=generator)
        nll = tokens * 2.0 + tokens.sqrt() * torch.randn(50, generator=generator)
        mean, stderr = ratio_estimate(tuple(nll.tolist()), tuple(tokens.tolist()))
        means.append(mean)
        errors.append(stderr)
    assert torch.tensor(means).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.15)


def test_the_paired_error_is_smaller_than_the_rungs_own() -> None:
    before = RowLosses((10.0, 20.0, 33.0, 5.0), (5, 5, 6, 4))
    after = RowLosses((9.0, 19.2, 31.9, 4.1), (5, 5, 6, 4))
    gain, stderr = paired_gain(before, after)
    assert gain == pytest.approx(summarize(before).mean - summarize(after).mean)
    assert 0 < stderr < summarize(before).stderr / 10
