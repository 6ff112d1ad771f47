"""Held-out loss over the tokens that carry loss, with its standard error.

Logits are never whole: the decoder runs once, and the head is applied in chunks to the positions
whose next token carries loss. Rows are batched by length, results stay in the rows' order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from loram.data.collate import IGNORED, collate, collate_packs, owners
from loram.data.encoding import EncodedRow
from loram.data.isolation import refuse_leaks
from loram.data.packing import pack
from loram.errors import MismatchError
from loram.progress import SILENT, Progress
from loram.training.cross_entropy import position_losses


@dataclass(frozen=True)
class RowLosses:
    """Per row: summed negative log-likelihood and the number of tokens summed over."""

    nll: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Loss:
    """Mean over the tokens that carry loss; `stderr` as a ratio estimator over rows."""

    mean: float
    stderr: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


def measure(
    model: Any,
    rows: list[EncodedRow],
    batch: int,
    progress: Progress = SILENT,
    label: str = "evaluate",
    packed_to: int | None = None,
) -> RowLosses:
    """Summed loss and token count of every row; MismatchError where a loss is not finite.

    With `packed_to`, rows share forward passes of so many tokens, each isolated from the others.
    """
    device = model.get_input_embeddings().weight.device
    nll = [0.0] * len(rows)
    tokens = [sum(row["loss_mask"][1:]) for row in rows]
    lengths = [len(row["input_ids"]) for row in rows]
    model.eval()
    if packed_to is None:
        packs = [[index] for index in sorted(range(len(rows)), key=lambda i: lengths[i], reverse=True)]
    else:
        refuse_leaks(model, max(lengths))
        packs = pack(lengths, packed_to)
    progress.begin(label, len(rows))
    seen = 0
    for start in range(0, len(packs), batch):
        group = [[rows[index] for index in numbers] for numbers in packs[start : start + batch]]
        chosen = [index for numbers in packs[start : start + batch] for index in numbers]
        found = collate([row for (row,) in group]) if packed_to is None else collate_packs(group)
        inputs = {name: tensor.to(device) for name, tensor in found.items()}
        sums = batch_losses(model, inputs, owners(group).to(device))
        for index, value in zip(chosen, sums.tolist(), strict=True):
            nll[index] = value
        seen += sum(tokens[index] for index in chosen)
        progress.advance(len(chosen), loss=sum(nll) / max(1, seen))
    progress.end()
    if not all(map(math.isfinite, nll)):
        bad = next(i for i, value in enumerate(nll) if not math.isfinite(value))
        raise MismatchError(f"the loss of row {bad + 1} is {nll[bad]}: the model or its adapter holds NaN or Inf")
    return RowLosses(tuple(nll), tuple(tokens))


@torch.no_grad()
def batch_losses(model: Any, inputs: dict[str, torch.Tensor], owner: torch.Tensor) -> torch.Tensor:
    """Summed loss of each row of one collated batch, in fp64; `owner` says which row a position is of."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = inner.get_decoder()
    # With a cache, positions that begin anew would not keep the rows of a pack apart.
    passed = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    hidden = decoder(**passed, use_cache=False)[0]
    targets = inputs["labels"][:, 1:]
    carry = targets != IGNORED
    kept, wanted = hidden[:, :-1][carry], targets[carry]
    losses = position_losses(inner, kept, wanted)
    sums = torch.zeros(int(owner.max()) + 1, dtype=torch.float64, device=losses.device)
    return sums.index_add(0, owner[:, 1:][carry], losses.double())


def summarize(losses: RowLosses) -> Loss:
    """The mean over tokens and its standard error."""
    mean, stderr = ratio_estimate(losses.nll, losses.tokens)
    return Loss(mean=mean, stderr=stderr, tokens=sum(losses.tokens), rows=len(losses.nll))


def paired_gain(before: RowLosses, after: RowLosses) -> tuple[float, float]:
    """How much lower the loss is after than before on the same rows, and the standard error of that."""
    differences = tuple(old - new for old, new in zip(before.nll, after.nll, strict=True))
    return ratio_estimate(differences, before.tokens)


def ratio_estimate(totals: tuple[float, ...], counts: tuple[int, ...]) -> tuple[float, float]:
    """sum(totals)/sum(counts) and its standard error when rows are the sampling unit (0 for one row)."""
    rows, count = len(totals), sum(counts)
    mean = sum(totals) / count
    if rows < 2:
        return mean, 0.0
    squares = sum((total - mean * tokens) ** 2 for total, tokens in zip(totals, counts, strict=True))
    return mean, math.sqrt(squares * rows / (rows - 1)) / count
