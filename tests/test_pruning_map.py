"""The pruning map: what it accepts, and cut / embed / project / compose against loops over rows and columns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from small_models import map_for
from stock_models import GROUPED, LAYERS, VARIANTS, cut_by_hand, make, masks, random_kept, raw_config, zero_pruned
from torch import Tensor

from loram.errors import CheckpointError, PruningMapError
from loram.families import family_of
from loram.pruning_map import FILE, Axis, PruningMap, parse_axis, read_map

MODULE = "model.layers.1.mlp.down_proj"


def axis(kept: list[int], size: int = 40, name: str = "layers.1.mlp") -> Axis:
    return Axis(name, size, torch.tensor(kept, dtype=torch.int64))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.tensor([2, 1]), "sorted"),
        (torch.tensor([1, 1]), "sorted, unique"),
        (torch.tensor([-1, 1]), "in 0…39"),
        (torch.tensor([0, 40]), "in 0…39"),
        (torch.tensor([], dtype=torch.int64), "nothing is kept"),
        (torch.tensor([0, 1], dtype=torch.int32), "expected int64"),
        (torch.tensor([0.0, 1.0]), "expected int64"),
        (torch.tensor([[0, 1]]), "1-D"),
        (torch.tensor(3), "1-D"),
    ],
)
def test_impossible_indices_are_refused(kept: Tensor, message: str) -> None:
    with pytest.raises(PruningMapError, match=message):
        Axis("layers.1.mlp", 40, kept)


@pytest.mark.parametrize("name", ["mlp", "layers.1.heads", "layers.x.mlp", "layers.-1.mlp", "layer.1.mlp", "a.b.c.d"])
def test_a_name_that_is_no_axis_is_refused(name: str, stock: Callable[[str], Path]) -> None:
    with pytest.raises(PruningMapError, match="is no axis"):
        parse_axis(name)
    whole = map_for(stock("llama-gqa"), {})
    with pytest.raises(PruningMapError, match="is no axis"):
        PruningMap(whole.family, whole.geometry, {name: axis([1], name=name)})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"layers.3.mlp": axis([1], name="layers.3.mlp")}, "the model has 3 layers"),
        ({"layers.1.mlp": axis([1], size=41)}, "size 41, but the model has 40 mlp"),
        ({"layers.1.mlp": axis([1], name="layers.2.mlp")}, "axis layers.1.mlp"),
        ({"layers.1.kv_heads": axis([1], name="layers.1.kv_heads")}, "size 40, but the model has 2 kv_heads"),
    ],
)
def test_axes_must_be_the_models(axes: dict[str, Axis], message: str, stock: Callable[[str], Path]) -> None:
    whole = map_for(stock("llama-gqa"), {})
    with pytest.raises(PruningMapError, match=message):
        PruningMap(whole.family, whole.geometry, axes)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_cut_and_embed_are_what_loops_do(name: str, seed: int, stock: Callable[[str], Path]) -> None:
    kept = random_kept(name, seed)
    pruning_map = map_for(stock(name), kept)
    state = dict(make(name).state_dict())
    small, zeroed = cut_by_hand(name, state, kept), zero_pruned(name, state, kept)
    for tensor, value in state.items():
        module = tensor.rpartition(".")[0]
        cut = pruning_map.cut(module, value)
        assert torch.equal(cut, small[tensor]), tensor
        assert torch.equal(pruning_map.embed(module, cut), zeroed[tensor]), tensor
        assert torch.equal(pruning_map.cut(module, pruning_map.embed(module, cut)), cut), tensor
        assert pruning_map.shape(module)[: value.dim()] == tuple(value.shape)
        assert pruning_map.small_shape(module)[: value.dim()] == tuple(small[tensor].shape)
    assert pruning_map.widths.mlp == (40, *(len(kept[layer][1]) for layer in (1, 2)))


@pytest.mark.parametrize("name", VARIANTS)
def test_factors_are_scattered_and_gathered_as_their_product_is(name: str, stock: Callable[[str], Path]) -> None:
    kept = random_kept(name, 2)
    pruning_map = map_for(stock(name), kept)
    generator = torch.Generator().manual_seed(0)
    config = raw_config(stock(name))
    family = family_of(config)
    for layer in range(LAYERS):
        for weight in family.linears:
            module = family.module(layer, weight)
            out, into = pruning_map.small_shape(module)
            a, b = torch.randn(3, into, generator=generator), torch.randn(out, 3, generator=generator)
            wide_a, wide_b = pruning_map.embed_pair(module, a, b)
            rows, columns = masks(name, module, kept)
            product = (b.double() @ a.double()).tolist()
            expected = torch.zeros(pruning_map.shape(module), dtype=torch.float64)
            large_rows = [i for i in range(expected.shape[0]) if rows is None or rows[i]]
            large_columns = [j for j in range(expected.shape[1]) if columns is None or columns[j]]
            for i, large_row in enumerate(large_rows):
                for j, large_column in enumerate(large_columns):
                    expected[large_row, large_column] = product[i][j]
            assert torch.allclose(wide_b.double() @ wide_a.double(), expected, atol=1e-12)
            back_a, back_b = pruning_map.cut_pair(module, wide_a, wide_b)
            assert torch.equal(back_a, a)
            assert torch.equal(back_b, b)


def test_a_kv_head_takes_its_own_query_heads_along(stock: Callable[[str], Path]) -> None:
    """Four query heads of 12 rows over two kv heads: kv head 1 owns query heads 2 and 3, not 1 and 3."""
    pruning_map = map_for(stock("llama-gqa"), {1: ([1], list(range(40)))})
    assert pruning_map.kept("model.layers.1.self_attn.q_proj", 0).tolist() == list(range(24, 48))  # type: ignore[union-attr]
    assert pruning_map.kept("model.layers.1.self_attn.k_proj", 0).tolist() == list(range(12, 24))  # type: ignore[union-attr]
    fused = map_for(stock("phi3-gqa"), {1: ([1], list(range(40)))})
    rows = [*range(24, 48), *range(60, 72), *range(84, 96)]
    assert fused.kept("model.layers.1.self_attn.qkv_proj", 0).tolist() == rows  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama-mha", "phi3-mha", "gemma3_text-mha"])
def test_compose_is_one_cut_after_the_other(name: str, stock: Callable[[str], Path]) -> None:
    outer = map_for(stock(name), {layer: ([0, 1, 3], [1, *range(5, 35, 2)]) for layer in range(LAYERS)})
    geometry = replace(outer.geometry, kv_heads=3, heads=3, mlp=16)
    axes = {
        "layers.0.kv_heads": axis([0, 2], 3, "layers.0.kv_heads"),
        "layers.1.mlp": axis([0, 3, 15], 16),
        "layers.2.kv_heads": axis([1], 3, "layers.2.kv_heads"),
        "layers.2.mlp": axis([15], 16, "layers.2.mlp"),
    }
    inner = PruningMap(outer.family, geometry, axes)
    both = outer.compose(inner)
    assert both.axes["layers.0.kv_heads"].kept.tolist() == [0, 3]
    assert both.axes["layers.1.kv_heads"].kept.tolist() == [0, 1, 3]
    assert both.axes["layers.1.mlp"].kept.tolist() == [1, 9, 33]
    for tensor, value in make(name).state_dict().items():
        module = tensor.rpartition(".")[0]
        small = inner.cut(module, outer.cut(module, value))
        assert torch.equal(both.cut(module, value), small), tensor
        assert torch.equal(both.embed(module, small), outer.embed(module, inner.embed(module, small))), tensor


def test_composed_sizes_must_meet() -> None:
    with pytest.raises(PruningMapError, match="2 units are kept, the second map expects 3"):
        axis([1, 2]).compose(axis([0], size=3))


@pytest.mark.parametrize("name", GROUPED)
def test_save_and_load_keep_every_bit(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    pruning_map = map_for(stock(name), random_kept(name, 5))
    pruning_map.save(tmp_path)
    for place in (tmp_path, tmp_path / FILE):
        loaded = read_map(place)
        assert loaded.family is pruning_map.family
        assert loaded.geometry == pruning_map.geometry
        assert loaded.axes.keys() == pruning_map.axes.keys()
        assert all(torch.equal(loaded.axes[key].kept, found.kept) for key, found in pruning_map.axes.items())
        assert loaded.sha256 == pruning_map.sha256
        assert loaded.to_bytes() == (tmp_path / FILE).read_bytes()


def test_the_file_is_readable_by_any_program(stock: Callable[[str], Path], tmp_path: Path) -> None:
    pruning_map = map_for(stock("qwen3-gqa"), {1: ([1], [3, 5])})
    pruning_map.save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert {key: value.tolist() for key, value in tensors.items()} == {
        "axis.layers.1.kv_heads": [1],
        "axis.layers.1.mlp": [3, 5],
    }
    assert all(value.dtype == torch.int64 for value in tensors.values())
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()
    assert (metadata["schema"], metadata["family"]) == ("1", "qwen3")
    assert json.loads(metadata["sizes"]) == {"layers.1.kv_heads": 2, "layers.1.mlp": 40}


def test_the_digest_is_the_same_in_every_process(stock: Callable[[str], Path], tmp_path: Path) -> None:
    pruning_map = map_for(stock("llama-gqa"), random_kept("llama-gqa", 6))
    pruning_map.save(tmp_path)
    code = "import sys; from loram.pruning_map import read_map; print(read_map(sys.argv[1]).sha256)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == pruning_map.sha256
    shuffled = PruningMap(pruning_map.family, pruning_map.geometry, dict(reversed(pruning_map.axes.items())))
    assert shuffled.sha256 == pruning_map.sha256
    other = map_for(stock("llama-gqa"), random_kept("llama-gqa", 7))
    assert other.sha256 != pruning_map.sha256


def rewritten(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> None:
    with safe_open(folder / FILE, "pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(tensors, folder / FILE, {key: value for key, value in metadata.items() if value is not None})


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({}, {"schema": None}, "not a pruning map of a known family"),
        ({}, {"family": "bloom"}, "not a pruning map of a known family .*bloom"),
        ({}, {"schema": "2"}, "has schema 2, this loram reads 1; upgrade"),
        ({}, {"schema": "one"}, "has schema one"),
        ({}, {"geometry": None}, "is damaged"),
        ({}, {"geometry": "{}"}, "is damaged"),
        ({}, {"geometry": "[1]"}, "is damaged"),
        ({}, {"geometry": "{"}, "is damaged"),
        ({}, {"sizes": "{}"}, "is damaged"),
        ({}, {"sizes": "[]"}, "is damaged"),
        ({"axis.layers.1.mlp": torch.tensor([5, 3])}, {}, "sorted"),
        ({"axis.layers.1.mlp": torch.tensor([5, 50])}, {}, "in 0…39"),
        ({"mask.model.norm.weight": torch.zeros(6, dtype=torch.uint8)}, {}, "only the Linears"),
        ({"mask.model.layers.1.mlp.up_proj.bias": torch.zeros(5, dtype=torch.uint8)}, {}, "only the Linears"),
        ({"mask.model.layers.7.mlp.up_proj.weight": torch.zeros(240, dtype=torch.uint8)}, {}, "has 3 layers"),
        ({"mask.model.layers.1.mlp.up_proj.weight": torch.zeros(239, dtype=torch.uint8)}, {}, "needs uint8 of .240,"),
        ({"mask.model.layers.1.mlp.up_proj.weight": torch.zeros(240, dtype=torch.int8)}, {}, "needs uint8"),
        ({"code.layers.1.mlp": torch.zeros(6, dtype=torch.uint8)}, {}, "which this loram does not know"),
        ({"layers": torch.tensor([0, 3])}, {}, "kept layers must be sorted, unique and in 0…2"),
        ({"layers": torch.tensor([1, 0])}, {}, "kept layers must be sorted"),
        ({"layers": torch.tensor([], dtype=torch.int64)}, {}, "no decoder layer is kept"),
        ({"layers": torch.tensor([0.0, 1.0])}, {}, "layers are torch.float32"),
        ({"layers": torch.tensor([0, 2])}, {"geometry": None}, "is damaged"),
        ({"layers": torch.tensor([0, 2]), "axis.layers.1.mlp": torch.tensor([3])}, {}, "layer 1 was dropped"),
        ({"axis.layers.9.mlp": torch.tensor([5])}, {"sizes": '{"layers.9.mlp": 40}'}, "has 3 layers"),
    ],
)
def test_a_damaged_map_is_refused(
    tensors: dict[str, Tensor], changes: dict[str, Any], message: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    map_for(stock("llama-gqa"), {1: ([1], [3, 5])}).save(tmp_path)
    rewritten(tmp_path, tensors or load((tmp_path / FILE).read_bytes()), **changes)
    with pytest.raises(PruningMapError, match=message):
        read_map(tmp_path)


def test_a_missing_truncated_or_empty_file_is_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(PruningMapError, match="does not exist"):
        read_map(tmp_path)
    map_for(stock("llama-gqa"), {1: ([1], [3, 5])}).save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for size in (0, 4, 20, len(whole) - 1):
        (tmp_path / FILE).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            read_map(tmp_path)
