"""Shards in a storage: aligned, complete, dealt so that a weight and its statistics stay together."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loram.artifact import read_json
from loram.checkpoint import INDEX, SINGLE, read_header
from loram.errors import MismatchError
from loram.quantization import STORAGES
from loram.quantization.writing import Source, stored_bytes, write_stored
from loram.shards import TensorPlan


def source(name: str, tensor: Tensor, *, quantized: bool = False) -> Source:
    return Source(TensorPlan(name, tensor.dtype, tuple(tensor.shape)), quantized, lambda: [tensor])


def model(dtype: torch.dtype = torch.bfloat16) -> list[Source]:
    """Odd sizes on purpose: one wrong order would leave a tensor unaligned."""
    made = torch.Generator().manual_seed(0)
    sources = [source("embed.weight", torch.randn(7, 3, generator=made).to(dtype))]
    for number in range(3):
        linear = torch.randn(5, 13 + number, generator=made).to(dtype)
        sources.append(source(f"l{number}.weight", linear, quantized=True))
        sources.append(source(f"l{number}.bias", torch.randn(5, generator=made).to(dtype)))
    return sources


@pytest.mark.parametrize("name", STORAGES)
def test_a_shard_is_aligned_and_whole(name: str, tmp_path: Path) -> None:
    seen: list[int] = []
    sources, storage = model(), STORAGES[name]
    size = write_stored(sources, storage, tmp_path, advance=seen.append)
    assert size == sum(seen) <= stored_bytes(sources, storage)
    _, entries = read_header(tmp_path / SINGLE)
    places = sorted((entry.start, entry.end) for entry in entries.values())
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(places))
    assert places[-1][1] == (tmp_path / SINGLE).stat().st_size
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries.values())
    for each in sources:
        if not each.quantized:
            (tensor,) = each.rows()
            assert torch.equal(load_file(tmp_path / SINGLE)[each.plan.name], tensor)
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_stored(model(), STORAGES["nf4"], tmp_path / name)
    assert (tmp_path / "a" / SINGLE).read_bytes() == (tmp_path / "b" / SINGLE).read_bytes()


def test_several_shards_hold_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_stored(model(), STORAGES["nf4"], tmp_path / "one")
    write_stored(model(), STORAGES["nf4"], tmp_path, shard_bytes=1600)
    index = read_json(tmp_path / INDEX)["weight_map"]
    assert len(set(index.values())) > 1
    for number in range(3):
        assert len({shard for name, shard in index.items() if name.startswith(f"l{number}.weight")}) == 1
    whole = load_file(tmp_path / "one" / SINGLE)
    parts = {key: value for shard in set(index.values()) for key, value in load_file(tmp_path / shard).items()}
    assert parts.keys() == whole.keys() == index.keys()
    assert all(torch.equal(parts[key], value) for key, value in whole.items())


@pytest.mark.parametrize("quantized", [True, False])
def test_nan_is_refused_by_name(quantized: bool, tmp_path: Path) -> None:
    broken = source("l0.weight", torch.full((4, 4), torch.nan), quantized=quantized)
    with pytest.raises(MismatchError, match=r"l0\.weight holds NaN or Inf"):
        write_stored([broken], STORAGES["nf4"], tmp_path)
