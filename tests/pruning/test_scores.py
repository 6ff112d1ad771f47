"""Scores against loops that know nothing of axes: which head and which channel an element counts for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stock_models import GROUPED, HEADS, MLP, head_dim, kv_heads, leaves, make, raw_config
from torch import Tensor

from loram.families import Weight, family_of
from loram.prune_options import UNIT_SCORES
from loram.prune_options import WEIGHT_SCORES as WEIGHT_SCORE_NAMES
from loram.pruning import SCORES, WEIGHT_SCORES
from loram.pruning.score import unit_scores


def by_hand(name: str, elements: dict[str, Tensor], outputs_only: bool = False) -> dict[str, list[float]]:
    """Every element of a layer's importances, added to the head and the channel that owns its row or column."""
    width, total = head_dim(name), kv_heads(name)
    found = {"kv_heads": [0.0] * total, "mlp": [0.0] * MLP}
    queries = [h // (HEADS // total) for h in range(HEADS) for _ in range(width)]
    keys = [k for k in range(total) for _ in range(width)]
    owners = {
        "q_proj": (queries, None, "kv_heads"),
        "k_proj": (keys, None, "kv_heads"),
        "v_proj": (keys, None, "kv_heads"),
        "qkv_proj": (queries + keys + keys, None, "kv_heads"),
        "o_proj": (None, queries, "kv_heads"),
        "gate_proj": (list(range(MLP)), None, "mlp"),
        "up_proj": (list(range(MLP)), None, "mlp"),
        "gate_up_proj": ([*range(MLP), *range(MLP)], None, "mlp"),
        "down_proj": (None, list(range(MLP)), "mlp"),
    }
    for leaf, element in elements.items():
        if outputs_only and leaf not in ("o_proj", "down_proj"):
            continue
        rows, columns, axis = owners[leaf]
        sums = (element.sum(1) if rows is not None else element.sum(0)).tolist()
        for index, value in enumerate(sums):
            found[axis][(rows or columns or [])[index]] += value
    return found


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", GROUPED)
def test_unit_scores(name: str, score: str, stock: Callable[[str], Path]) -> None:
    config = raw_config(stock(name))
    family = family_of(config)
    state = {key: value.double() for key, value in make(name).state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    weights = {
        leaf: next(v for k, v in state.items() if f".1.{_part(leaf)}.{leaf}.weight" in k) for leaf in leaves(name)
    }
    gradients = {leaf: torch.randn(w.shape, generator=generator).double() for leaf, w in weights.items()}
    norms = {leaf: torch.rand(w.shape[1], generator=generator).double() for leaf, w in weights.items()}
    element = {
        "magnitude": lambda leaf: weights[leaf] ** 2,
        "wanda": lambda leaf: weights[leaf].abs() * norms[leaf][None, :],
        "flap": lambda leaf: weights[leaf] ** 2 * norms[leaf][None, :],
        "taylor": lambda leaf: (weights[leaf] * gradients[leaf]).abs(),
    }[score]
    expected = by_hand(name, {leaf: element(leaf) for leaf in weights}, outputs_only=score in ("wanda", "flap"))

    def leaf_of(weight: Weight) -> str:
        return weight.name.rpartition(".")[2]

    def tiles(weight: Weight) -> list[tuple[int, Tensor]]:
        value = weights[leaf_of(weight)].float()
        return [(start, value[start : start + 7]) for start in range(0, value.shape[0], 7)]

    def companion(weight: Weight, start: int, stop: int) -> Tensor:
        leaf = leaf_of(weight)
        return norms[leaf].float() if score in ("wanda", "flap") else gradients[leaf][start:stop].float()

    found = unit_scores(SCORES[score], family, family.geometry(config), tiles, companion)
    assert found.keys() == expected.keys()
    for axis, values in expected.items():
        assert torch.allclose(found[axis], torch.tensor(values, dtype=torch.float64), rtol=1e-5), axis


def _part(leaf: str) -> str:
    return "mlp" if leaf in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") else "self_attn"


def test_the_names_on_the_command_line_are_the_scores() -> None:
    assert set(UNIT_SCORES) == set(SCORES)
    assert set(WEIGHT_SCORE_NAMES) == set(WEIGHT_SCORES)
    assert all(score.name == key for key, score in SCORES.items())
    assert all(score.name == key for key, score in WEIGHT_SCORES.items())
    assert all((score.masks is None) != (score.prune is None) for score in WEIGHT_SCORES.values())
