"""Masks and kept layers of the pruning map, against a twin that keeps whole boolean matrices and a list of layers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_models import map_for
from stock_models import LAYERS, leaves, make, random_kept
from torch import Tensor

from loram.checkpoint import read_header
from loram.errors import CheckpointError, PruningMapError
from loram.families import LLAMA, Geometry
from loram.masks import PackedMask
from loram.numbering import Numbering
from loram.pruning_map import FILE, Axis, PruningMap, read_map

GEOMETRY = Geometry(layers=4, hidden=6, vocab=9, mlp=5, heads=4, kv_heads=2, head_dim=3, tied=False)
LINEARS = {weight.name: weight for weight in LLAMA.linears}
SHAPES = {
    **{
        "self_attn.q_proj": (12, 6),
        "self_attn.k_proj": (6, 6),
        "self_attn.v_proj": (6, 6),
        "self_attn.o_proj": (6, 12),
    },
    **{"mlp.gate_proj": (5, 6), "mlp.up_proj": (5, 6), "mlp.down_proj": (6, 5)},
}
ROWS = {"self_attn.q_proj": 6, "self_attn.k_proj": 3, "self_attn.v_proj": 3, "mlp.gate_proj": 1, "mlp.up_proj": 1}
COLUMNS = {"self_attn.o_proj": 6, "mlp.down_proj": 1}


class Twin:
    """What a map means, in the plainest way: per large weight a boolean of its own shape, and the kept units."""

    def __init__(self, pruning_map: PruningMap) -> None:
        layers = pruning_map.layers
        self.layers = list(range(GEOMETRY.layers)) if layers is None else list(layers)
        self.units = {name: axis.kept.tolist() for name, axis in pruning_map.axes.items()}
        self.bits = {name: mask.unpack() for name, mask in pruning_map.masks.items()}

    def places(self, layer: int, name: str, dimension: int) -> list[int]:
        width = (ROWS if dimension == 0 else COLUMNS).get(name)
        size = SHAPES[name][dimension]
        unit = "mlp" if name.startswith("mlp") else "kv_heads"
        kept = self.units.get(f"layers.{layer}.{unit}")
        if width is None or kept is None:
            return list(range(size))
        return [u * width + i for u in kept for i in range(width)]

    def cut(self, layer: int, name: str, weight: Tensor) -> list[list[float]]:
        bits = self.bits.get(f"model.layers.{layer}.{name}.weight")
        rows, columns = self.places(layer, name, 0), self.places(layer, name, 1)
        return [[float(weight[i, j]) if bits is None or bits[i, j] else 0.0 for j in columns] for i in rows]


def axes_of(draw: Any, layers: list[int], sizes: dict[str, int]) -> dict[str, Axis]:
    found = {}
    for layer in layers:
        for unit, size in sizes.items():
            if draw(st.booleans()):
                kept = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
                found[f"layers.{layer}.{unit}"] = Axis(f"layers.{layer}.{unit}", size, torch.tensor(kept))
    return found


@st.composite
def maps(draw: Any, geometry: Geometry = GEOMETRY) -> PruningMap:
    """Any map: some layers dropped, some axes cut, some weights masked."""
    dropped = draw(st.booleans())
    count = geometry.layers
    layers = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1))) if dropped else list(range(count))
    axes = axes_of(draw, layers, {"kv_heads": geometry.kv_heads, "mlp": geometry.mlp})
    whole = PruningMap(LLAMA, geometry, {})
    masks = {}
    for layer in layers:
        for name in draw(st.sets(st.sampled_from(sorted(LINEARS)), max_size=2)):
            shape = whole.shape(f"model.layers.{layer}.{name}")
            seed = draw(st.integers(0, 2**31))
            bits = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < draw(st.floats(0, 1))
            masks[f"model.layers.{layer}.{name}.weight"] = bits
    return PruningMap(LLAMA, geometry, axes, masks, tuple(layers) if dropped else None)  # type: ignore[arg-type]


def numbered(layer: int, name: str) -> Tensor:
    rows, columns = SHAPES[name]
    return torch.arange(1, rows * columns + 1, dtype=torch.float32).reshape(rows, columns) + 1000 * layer


@settings(max_examples=40, deadline=None)
@given(maps())
def test_any_map_cuts_as_its_twin_does(pruning_map: PruningMap) -> None:
    twin = Twin(pruning_map)
    for layer in range(GEOMETRY.layers):
        for name in SHAPES:
            module = f"model.layers.{layer}.{name}"
            if layer not in twin.layers:
                assert pruning_map.numbering.to_small(module) is None
                with pytest.raises(PruningMapError, match="was dropped"):
                    pruning_map.small_shape(module)
                zero = name in ("self_attn.o_proj", "mlp.down_proj")
                assert torch.equal(
                    pruning_map.twin(module, numbered(layer, name)), numbered(layer, name) * (0 if zero else 1)
                )
                continue
            small = f"model.layers.{twin.layers.index(layer)}.{name}"
            assert pruning_map.numbering.to_small(module) == small
            assert pruning_map.numbering.to_large(small) == module
            cut = pruning_map.cut(module, numbered(layer, name))
            assert cut.tolist() == twin.cut(layer, name, numbered(layer, name))
            assert pruning_map.small_shape(module) == tuple(cut.shape)
            wide = pruning_map.embed(module, cut)
            assert torch.equal(pruning_map.cut(module, wide), cut)
            assert torch.equal(pruning_map.twin(module, numbered(layer, name)), wide)
            mask = pruning_map.small_mask(module)
            assert mask is None or torch.equal(mask, cut != 0)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_composing_is_one_cut_after_the_other(data: Any) -> None:
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, 3), min_size=1))))
    heads, channels = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    axes = {}
    for layer in layers:
        for unit, size, count in (("kv_heads", 2, heads), ("mlp", 5, channels)):
            if count < size:
                kept = sorted(data.draw(st.permutations(range(size)))[:count])
                axes[f"layers.{layer}.{unit}"] = Axis(f"layers.{layer}.{unit}", size, torch.tensor(kept))
    bits = {
        f"model.layers.{layer}.{name}.weight": torch.rand(SHAPES[name], generator=torch.Generator().manual_seed(layer))
        < 0.6
        for layer in layers
        for name in data.draw(st.sets(st.sampled_from(sorted(SHAPES)), max_size=2))
    }
    outer = PruningMap(LLAMA, GEOMETRY, axes, bits, layers)  # type: ignore[arg-type]
    below = replace(GEOMETRY, layers=len(layers), kv_heads=heads, heads=2 * heads, mlp=channels)
    inner = data.draw(maps(below))
    both = outer.compose(inner)
    for small_layer in inner.numbering.kept:
        layer = layers[small_layer]
        for name in SHAPES:
            module, middle = f"model.layers.{layer}.{name}", f"model.layers.{small_layer}.{name}"
            weight = numbered(layer, name)
            assert torch.equal(both.cut(module, weight), inner.cut(middle, outer.cut(module, weight)))
    assert both.numbering.kept == tuple(layers[n] for n in inner.numbering.kept)
    assert both.widths == inner.widths


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(maps())
def test_a_saved_map_is_the_same_map(tmp_path: Path, pruning_map: PruningMap) -> None:
    pruning_map.save(tmp_path)
    loaded = read_map(tmp_path)
    assert (loaded.layers, loaded.sha256) == (pruning_map.layers, pruning_map.sha256)
    assert loaded.masks.keys() == pruning_map.masks.keys()
    for name, mask in pruning_map.masks.items():
        assert torch.equal(loaded.masks[name].unpack(), mask.unpack())
        assert loaded.masks[name].kept == int(mask.unpack().sum())
    light = pruning_map.without_masks()
    light.save(tmp_path)
    carried = read_map(tmp_path)
    assert carried.sha256 == pruning_map.sha256 == light.sha256
    assert carried.masked == pruning_map.masked
    assert not carried.masks


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(0, 2**31), st.data())
def test_rows_of_a_packed_mask_are_numpys(rows: int, columns: int, seed: int, data: Any) -> None:
    bits = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = PackedMask.of("w", bits)
    assert packed.packed().tolist() == numpy.packbits(bits.numpy().reshape(-1)).tolist()
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert torch.equal(packed.rows(start, stop), bits[start:stop])


def masked_map() -> PruningMap:
    bits = torch.rand(SHAPES["mlp.up_proj"], generator=torch.Generator().manual_seed(0)) < 0.5
    name = "model.layers.3.mlp.up_proj.weight"
    return PruningMap(LLAMA, GEOMETRY, {}, {name: PackedMask.of(name, bits)}, (0, 3))


def test_the_file_holds_numpys_bits_and_the_large_models_numbers(tmp_path: Path) -> None:
    masked_map().save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert tensors["layers"].tolist() == [0, 3]
    bits = numpy.unpackbits(tensors["mask.model.layers.3.mlp.up_proj.weight"].numpy())[:30].reshape(5, 6)
    assert bits.tolist() == masked_map().masks["model.layers.3.mlp.up_proj.weight"].unpack().int().tolist()


def test_masks_on_disk_are_read_by_the_row(tmp_path: Path) -> None:
    bits = torch.rand(64, 1000, generator=torch.Generator().manual_seed(0)) < 0.5
    stored = PackedMask.of("w", bits).spilled(tmp_path)
    assert not isinstance(stored.stored, Tensor)
    assert torch.equal(stored.unpack(), bits)
    file = stored.stored.file
    whole = file.read_bytes()
    file.write_bytes(whole[:-4000])  # the last rows are gone: the first are read all the same
    assert torch.equal(stored.rows(0, 20), bits[:20])
    with pytest.raises(CheckpointError, match="ends inside w"):
        stored.unpack()


def test_the_digest_is_the_same_in_every_process_and_sees_one_bit(tmp_path: Path) -> None:
    pruning_map = masked_map()
    pruning_map.save(tmp_path)
    code = "import sys; from loram.pruning_map import read_map; print(read_map(sys.argv[1]).sha256)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == pruning_map.sha256
    entry = read_header(tmp_path / FILE)[1]["mask.model.layers.3.mlp.up_proj.weight"]
    raw = bytearray((tmp_path / FILE).read_bytes())
    raw[entry.start] ^= 0x80
    (tmp_path / FILE).write_bytes(raw)
    assert read_map(tmp_path).sha256 != pruning_map.sha256
    raw[entry.end - 1] |= 1  # 30 entries leave two spare bits
    (tmp_path / FILE).write_bytes(raw)
    with pytest.raises(PruningMapError, match="bits behind the last entry"):
        read_map(tmp_path).masks["model.layers.3.mlp.up_proj.weight"].packed()


def test_a_truncated_mask_is_refused(tmp_path: Path) -> None:
    masked_map().save(tmp_path)
    raw = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_map(tmp_path)


def test_a_map_without_its_masks_cannot_cut() -> None:
    light = masked_map().without_masks()
    with pytest.raises(PruningMapError, match="by digest only; add --small"):
        light.cut("model.layers.3.mlp.up_proj", numbered(3, "mlp.up_proj"))
    assert light.small_shape("model.layers.3.mlp.up_proj") == (5, 6)
    with pytest.raises(PruningMapError, match="cannot be composed"):
        light.compose(PruningMap(LLAMA, replace(GEOMETRY, layers=2), {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": {"model.layers.1.mlp.up_proj.weight": torch.ones(5, 6)}}, "expected booleans"),
        ({"masks": {"model.layers.1.mlp.up_proj.weight": torch.ones(6, 5) > 0}}, r"shape \(6, 5\), but the weight is"),
        ({"masks": {"model.layers.4.mlp.up_proj.weight": torch.ones(5, 6) > 0}}, "has 4 layers"),
        ({"masks": {"lm_head.weight": torch.ones(9, 6) > 0}}, "only the Linears"),
        ({"layers": (0, 4)}, "in 0…3"),
        ({"layers": (0, 0)}, "unique"),
        ({"layers": ()}, "no decoder layer"),
        ({"layers": (0,), "masks": {"model.layers.1.mlp.up_proj.weight": torch.ones(5, 6) > 0}}, "was dropped"),
    ],
)
def test_what_contradicts_the_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningMapError, match=message):
        PruningMap(LLAMA, GEOMETRY, {}, **change)


def test_names_on_either_side() -> None:
    numbering = Numbering((0, 3), 4, "model.layers.")
    assert numbering.to_small("model.norm.weight") == "model.norm.weight"
    assert numbering.to_large("model.layers.1.mlp.up_proj.bias") == "model.layers.3.mlp.up_proj.bias"
    assert numbering.to_small("model.layers.2.mlp.up_proj") is None
    assert (numbering.dropped, numbering.whole) == ((1, 2), False)
    with pytest.raises(PruningMapError, match="is of layer 2, and the small model has 2 layers"):
        numbering.to_large("model.layers.2.mlp.up_proj")


@pytest.mark.parametrize("name", ["phi3-gqa", "qwen2-gqa"])
def test_masks_of_stock_models_with_axes(name: str, stock: Callable[[str], Path]) -> None:
    axes = map_for(stock(name), random_kept(name, 4)).axes
    whole = map_for(stock(name), {})
    state = {
        key: value
        for key, value in make(name).state_dict().items()
        if key.endswith(tuple(f"{x}.weight" for x in leaves(name)))
    }
    bits = {key: value > 0 for key, value in state.items()}
    both = PruningMap(whole.family, whole.geometry, axes, bits)  # type: ignore[arg-type]
    only = PruningMap(whole.family, whole.geometry, axes)
    assert len(state) == LAYERS * len(leaves(name))
    for key, value in state.items():
        module = key.rpartition(".")[0]
        assert torch.equal(both.cut(module, value), only.cut(module, value.clamp_min(0)))
