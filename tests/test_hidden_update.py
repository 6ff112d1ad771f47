"""What a mask hides of an update, against the dense formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loram.adapter import Adapter, LoraPair
from loram.hidden_update import HiddenUpdate, hidden_update

CONFIG = {"r": 2, "lora_alpha": 3, "peft_type": "LORA"}


def adapter(rows: int = 7, width: int = 9) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    pair = [torch.randn(2, width, generator=draw), torch.randn(rows, 2, generator=draw)]
    table = LoraPair(torch.randn(2, 11, generator=draw), torch.randn(5, 2, generator=draw), 1.0, embedding=True)
    return Adapter(
        CONFIG, {"m": LoraPair(*pair, 1.5), "n": LoraPair(*pair, 1.0), "head": LoraPair(*pair, 1.0), "e": table}
    )


def masks(rows: int = 7, width: int = 9) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.rand(rows, width, generator=draw) < 0.5 for name in ("m", "n")}


@pytest.mark.parametrize(("rows", "width"), [(7, 9), (600, 1200)])
def test_norms_are_those_of_the_dense_update(rows: int, width: int) -> None:
    """Of what has a mask alone; over several tiles too."""
    made, under = adapter(rows, width), masks(rows, width)
    found = hidden_update(made, under.get, masked=True)
    deltas = {name: made.pairs[name].scale * (made.pairs[name].b @ made.pairs[name].a).double() for name in under}
    norm = math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))
    hidden = math.sqrt(sum(float((delta * ~under[name]).square().sum()) for name, delta in deltas.items()))
    assert found is not None
    assert (found.modules, found.masked) == (2, True)
    assert found.norm == pytest.approx(norm, rel=1e-6)
    assert found.hidden_norm == pytest.approx(hidden, rel=1e-6)
    assert found.share == pytest.approx(hidden / norm, rel=1e-6)


def test_nothing_hidden_everything_hidden_and_no_masks_at_all() -> None:
    made = adapter()
    for value, share in ((True, 0.0), (False, 1.0)):
        found = hidden_update(made, {"m": torch.full((7, 9), value)}.get, masked=False)
        assert found is not None
        assert found.share == share
    assert hidden_update(made, {}.get, masked=False) is None
    assert HiddenUpdate(True, 1, 0.0, 0.0).share == 0


def test_it_says_whose_it_is_and_comes_back_from_json() -> None:
    found = HiddenUpdate(True, 3, 2.0, 0.5)
    assert HiddenUpdate.from_json(found.to_json()) == found
    assert found.to_json()["hidden_share"] == 0.25
    assert str(found) == "the mask hid 25% of the update's norm (0.5 of 2) from training: it lies on pruned entries"
    assert str(HiddenUpdate(False, 3, 2.0, 0.5)).endswith("lies on pruned entries; training was not masked")
