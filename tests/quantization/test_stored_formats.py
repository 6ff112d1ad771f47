"""NF4 and int8 bit for bit as bitsandbytes makes them; zeros survive; what is damaged is refused."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loram.errors import MismatchError
from loram.quantization import STORAGES, int8, nf4
from loram.shards import TensorPlan

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
SHAPES = [(48, 40), (13, 7), (1, 3), (2, 64), (300, 129), (700, 1024)]


def matrix(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random weights with an outlier, a row of zeros and a block of zeros."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[0] = 0
    weight[-1, -1] = 3.0
    return weight.to(dtype)


def pieces(weight: Tensor, height: int) -> Iterator[Tensor]:
    """The rows as a checkpoint hands them out: in one buffer that the next piece overwrites."""
    buffer = torch.empty(height, weight.shape[1], dtype=weight.dtype)
    for start in range(0, len(weight), height):
        rows = buffer[: len(weight[start : start + height])]
        yield rows.copy_(weight[start : start + height])


def encoded(name: str, weight: Tensor, height: int = 128) -> dict[str, Tensor]:
    """The tensors that stand for a weight, put together."""
    storage, plan = STORAGES[name], TensorPlan("m.weight", weight.dtype, tuple(weight.shape))
    parts: dict[str, list[Tensor]] = {}
    plans = {}
    for part, data in storage.encode(plan, pieces(weight, height)):
        parts.setdefault(part.name, []).append(data.reshape(-1).clone())
        plans[part.name] = part
    for expected in storage.plans(plan):
        assert plans[expected.name].nbytes <= expected.nbytes
        assert plans[expected.name] == expected or storage.variable is not None
    return {name: torch.cat(data).reshape(plans[name].shape) for name, data in parts.items()}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_what_bitsandbytes_stores(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = matrix(shape, dtype)
    data, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    expected = {"m.weight": data, **{f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    found = encoded("nf4", weight)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@DTYPES
def test_pieces_of_any_height_give_the_same_bytes(dtype: torch.dtype) -> None:
    weight = matrix((301, 97), dtype)
    whole = encoded("nf4", weight, 301)
    for height in (1, 7, 128):
        found = encoded("nf4", weight, height)
        assert all(torch.equal(found[key], value) for key, value in whole.items())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), st.integers(0, 14), st.sampled_from([-1, 0, 1]))
def test_the_nearest_level_is_that_of_a_search(values: list[float], boundary: int, step: int) -> None:
    levels = nf4.levels()
    boundaries = (levels[:-1] + levels[1:]) / 2
    near = boundaries[boundary].clone()
    if step:
        near = torch.nextafter(near, torch.tensor(float(step)))
    scaled = torch.cat([torch.tensor(values), near.view(1), torch.tensor([-1.0, 1.0])])
    assert torch.equal(nf4.numbers(scaled), torch.bucketize(scaled, boundaries).to(torch.uint8))


def test_exact_zeros_stay_zero() -> None:
    weight = matrix((64, 256), torch.bfloat16)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    found = encoded("nf4", weight)
    state = bnb.QuantState.from_dict(
        {key.removeprefix("m.weight."): value for key, value in found.items() if key != "m.weight"},
        torch.device("cpu"),
    )
    again = bnb.dequantize_4bit(found["m.weight"], state)
    assert bool((again[weight == 0] == 0).all())


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_what_bitsandbytes_stores(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = matrix(shape, dtype)
    data, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    found = encoded("int8", weight)
    assert found.keys() == {"m.weight", "m.SCB", "m.weight_format"}
    assert torch.equal(found["m.weight"], data)
    assert torch.equal(found["m.SCB"], scales)
    assert found["m.weight_format"].shape == ()


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (12, 30)], ids=["in a block", "in the last, short block"])
def test_numbers_that_are_none_are_refused(name: str, value: float, place: tuple[int, int]) -> None:
    weight = matrix((13, 31), torch.bfloat16)
    weight[place] = value
    with pytest.raises(MismatchError, match="NaN"):
        encoded(name, weight)


def test_what_fp16_cannot_hold_is_refused_by_int8() -> None:
    with pytest.raises(MismatchError, match="use --type nf4"):
        int8.quantize_rows(torch.full((2, 2), 1e6))
