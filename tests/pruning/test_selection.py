"""Which units stay: the best, or random ones."""

from __future__ import annotations

from collections import Counter

import numpy
import torch

from loram.drawing import random_units
from loram.families import Geometry
from loram.families.widths import Widths
from loram.pruning.selection import best, layer_axes

GEOMETRY = Geometry(layers=2, hidden=8, vocab=8, mlp=6, heads=4, kv_heads=2, head_dim=2, tied=False)


def test_the_best_stay_in_their_order() -> None:
    assert best(torch.tensor([3.0, 9.0, 1.0, 7.0]), 2).tolist() == [1, 3]
    assert best(torch.tensor([1.0, 1.0, 1.0, 2.0]), 3).tolist() == [0, 1, 3]
    assert best(torch.tensor([1.0, 2.0]), 2).tolist() == [0, 1]


def test_random_units_are_every_subset_equally_often() -> None:
    generator = numpy.random.default_rng(0)
    seen = Counter(tuple(random_units(4, 2, generator).tolist()) for _ in range(3000))
    assert set(seen) == {(a, b) for a in range(4) for b in range(a + 1, 4)}
    assert all(400 < count < 600 for count in seen.values())


def test_an_axis_is_made_only_where_something_goes() -> None:
    widths = Widths((2, 1), (6, 3))
    scores = {"kv_heads": torch.tensor([1.0, 2.0]), "mlp": torch.arange(6.0)}
    assert layer_axes(0, widths, GEOMETRY, scores) == {}
    axes = layer_axes(1, widths, GEOMETRY, scores)
    assert {name: axis.kept.tolist() for name, axis in axes.items()} == {
        "layers.1.kv_heads": [1],
        "layers.1.mlp": [3, 4, 5],
    }
    assert {name: axis.size for name, axis in axes.items()} == {"layers.1.kv_heads": 2, "layers.1.mlp": 6}
