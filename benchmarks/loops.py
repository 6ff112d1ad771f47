"""SparseGPT's column loop beside the plain reference formulation, on the Linears of one layer, in one process.

Between two blocks of columns both bring all later columns up to date by one product, in fp32 at the machine's peak:
`our_product` and `its_product` are what each spends on that alone, so that the loop over columns can be told from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints import linears
from benchmarks.reference_sparsegpt import reference_loop
from benchmarks.sizes import Shape
from loram.families.sparsity import Sparsity, parse_sparsity
from loram.pruning.inverse import inverse_factor
from loram.pruning.sparsegpt import BLOCK, side_by_side, solve

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears that read one input: loram solves them side by side, the reference one after the other."""
PATTERN = "2:4"
TOKENS = 2


def measured(shape: Shape, rounds: int) -> dict[str, Any]:
    """CPU seconds of both for a layer and of the product in both, a figure per round; what both remove alike.

    The second moments and their factors are made beforehand, the same for both: they are not in these figures.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {name.rpartition(".")[2]: size for name, size in linears(shape).items()}
    layer = []
    for names in GROUPS:
        width = sizes[names[0]][1]
        x = torch.randn(TOKENS * width, width, generator=generator) * torch.rand(width, generator=generator)
        weights = [torch.randn(sizes[name], generator=generator) * 0.02 for name in names]
        layer.append((weights, inverse_factor(x.T @ x, names[0])))
    found: dict[str, Any] = {}
    for kind, sparsity in (
        ("unstructured", Sparsity(parse_sparsity(PATTERN).ratio)),
        (PATTERN, parse_sparsity(PATTERN)),
    ):
        found[kind] = {"ours": [], "reference": [], "product": [], "reference product": [], "agree": 1.0}
        for _ in range(rounds):
            one_round(layer, sparsity, found[kind])
    return found


def one_round(layer: list[tuple[list[Tensor], Tensor]], sparsity: Sparsity, found: dict[str, Any]) -> None:
    """Both loops over all Linears of the layer, group by group in turns."""
    ours = reference = product = usual = 0.0
    same = total = 0
    for weights, factor in layer:
        seconds, pruned = timed(partial(reference_weights, weights, factor, sparsity))
        reference += seconds
        seconds, gone = timed(partial(loram_weights, weights, factor, sparsity))
        ours += seconds
        product += timed(partial(our_product, side_by_side(weights), factor))[0]
        usual += timed(partial(its_product, [weight.clone() for weight in weights], factor))[0]
        same += sum(int((mask == (w == 0)).sum()) for mask, w in zip(gone, pruned, strict=True))
        total += sum(w.numel() for w in weights)
    found["ours"].append(round(ours, 4))
    found["reference"].append(round(reference, 4))
    found["product"].append(round(product, 4))
    found["reference product"].append(round(usual, 4))
    found["agree"] = min(found["agree"], round(same / total, 6))


def reference_weights(weights: list[Tensor], factor: Tensor, sparsity: Sparsity) -> list[Tensor]:
    """The reference's loop, one weight after the other: the pruned weights."""
    return [reference_loop(weight, factor, 0.5, sparsity.keep, sparsity.group) for weight in weights]


def loram_weights(weights: list[Tensor], factor: Tensor, sparsity: Sparsity) -> list[Tensor]:
    """loram's loop, with the copy that it works on: what went of each weight."""
    sizes = [weight.shape[0] for weight in weights]
    gone = solve(side_by_side(weights), factor, sizes, sparsity)
    return [mask.T for mask in torch.split(gone, sizes, 1)]


def its_product(weights: list[Tensor], factor: Tensor) -> list[Tensor]:
    """What the reference does between two blocks, and nothing else, weight by weight (out, in)."""
    for weight in weights:
        errors = torch.ones_like(weight[:, :BLOCK])
        for start in range(0, weight.shape[1], BLOCK):
            stop = min(start + BLOCK, weight.shape[1])
            weight[:, stop:] -= errors[:, : stop - start].matmul(factor[start:stop, stop:])
    return weights


def our_product(work: Tensor, factor: Tensor) -> list[Tensor]:
    """What loram does between two blocks, and nothing else, on weights side by side (in, out)."""
    errors = torch.ones_like(work[:BLOCK])
    for start in range(0, work.shape[0], BLOCK):
        stop = min(start + BLOCK, work.shape[0])
        work[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return [work]


def timed(work: Callable[[], list[Tensor]]) -> tuple[float, list[Tensor]]:
    """CPU seconds that something takes, and what it gives."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result
