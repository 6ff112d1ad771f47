"""The pruning map: which units of each axis were kept. Maps small ↔ large coordinates.

Kept indices are always in the large model's units: channels for `layers.N.mlp`, key/value heads for
`layers.N.kv_heads`; a kv head takes its query heads along (head h belongs to kv head h // (H/K)).
cut gathers (large → small), embed scatters into zeros (small → large); cut∘embed is the identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loram.checkpoint import read_config, read_metadata, read_tensors
from loram.errors import PruningMapError
from loram.families import AXES, FAMILIES, Dimension, Family, Geometry, Weight
from loram.families.widths import Widths
from loram.shards import TensorPlan, plan_header

FILE = "pruning_map.safetensors"
SCHEMA = "1"


@dataclass(frozen=True)
class Axis:
    """One axis that was cut: its size in the large model and the sorted kept indices (int64)."""

    name: str
    size: int
    kept: Tensor

    def __post_init__(self) -> None:
        kept = self.kept
        if kept.dtype != torch.int64 or kept.dim() != 1:
            raise PruningMapError(
                f"axis {self.name}: kept indices are {kept.dtype} of shape {tuple(kept.shape)}; expected int64, 1-D"
            )
        if not kept.numel():
            raise PruningMapError(f"axis {self.name}: nothing is kept; at least one unit must stay")
        if int(kept[0]) < 0 or int(kept[-1]) >= self.size or bool((kept[1:] <= kept[:-1]).any()):
            raise PruningMapError(f"axis {self.name}: kept indices must be sorted, unique and in 0…{self.size - 1}")

    def compose(self, inner: Axis) -> Axis:
        """This cut followed by `inner`, whose units are this cut's kept ones."""
        if inner.size != self.kept.numel():
            raise PruningMapError(
                f"axis {self.name}: {self.kept.numel()} units are kept, the second map expects {inner.size}"
            )
        return Axis(self.name, self.size, self.kept[inner.kept])


@dataclass(frozen=True)
class PruningMap:
    """What was kept, for one family and one geometry. Axes that are absent were left whole."""

    family: Family
    geometry: Geometry
    axes: Mapping[str, Axis]

    def __post_init__(self) -> None:
        for name, axis in self.axes.items():
            layer, unit = parse_axis(name)
            if layer >= self.geometry.layers:
                raise PruningMapError(f"axis {name}: the model has {self.geometry.layers} layers")
            if axis.name != name or axis.size != self.geometry.size(unit):
                raise PruningMapError(
                    f"axis {name}: size {axis.size}, but the model has {self.geometry.size(unit)} {unit}"
                )

    @property
    def widths(self) -> Widths:
        """Kept units per layer."""
        return Widths(*(tuple(self._kept_count(layer, unit) for layer in range(self.geometry.layers)) for unit in AXES))

    def _kept_count(self, layer: int, unit: str) -> int:
        axis = self.axes.get(axis_name(layer, unit))
        return self.geometry.size(unit) if axis is None else axis.kept.numel()

    def kept(self, module: str, dimension: int) -> Tensor | None:
        """Large-model indices that the small weight's `dimension` (0 out, 1 in) holds; None where it is whole."""
        weight, layer = self._find(module)
        segments = weight.rows if dimension == 0 else weight.columns
        return None if layer is None else self._expand(layer, segments)

    def _find(self, module: str) -> tuple[Weight, int | None]:
        weight, layer = self.family.find(module)
        if layer is not None and layer >= self.geometry.layers:
            raise PruningMapError(f"{module} is of layer {layer}, and the model has {self.geometry.layers} layers")
        return weight, layer

    def _expand(self, layer: int, segments: Dimension) -> Tensor | None:
        if not any(s.axis and axis_name(layer, s.axis) in self.axes for s in segments):
            return None
        pieces, offset = [], 0
        for segment in segments:
            count, width = self.geometry.size(segment.count), self.geometry.size(segment.width)
            axis = self.axes.get(axis_name(layer, segment.axis)) if segment.axis else None
            units = torch.arange(count) if axis is None else axis.kept
            pieces.append((offset + units[:, None] * width + torch.arange(width)).reshape(-1))
            offset += count * width
        return torch.cat(pieces)

    def shape(self, module: str) -> tuple[int, ...]:
        """The large weight's shape (out, in) as the table declares it."""
        weight, _ = self._find(module)
        return tuple(self._extent(d) for d in (weight.rows, weight.columns) if d)

    def small_shape(self, module: str) -> tuple[int, ...]:
        """The small weight's shape (out, in)."""
        kept = [self.kept(module, dimension) for dimension in range(2)]
        return tuple(n if k is None else k.numel() for n, k in zip(self.shape(module), kept, strict=False))

    def _extent(self, segments: Dimension) -> int:
        return sum(self.geometry.size(s.count) * self.geometry.size(s.width) for s in segments)

    def cut(self, module: str, weight: Tensor) -> Tensor:
        """A large weight (out, in) or bias (out,) → the small one."""
        for dimension in range(weight.dim()):
            kept = self.kept(module, dimension)
            if kept is not None:
                weight = weight.index_select(dimension, kept)
        return weight

    def embed(self, module: str, weight: Tensor) -> Tensor:
        """A small weight or bias → large coordinates, zeros elsewhere."""
        for dimension in range(weight.dim()):
            weight = self._scatter(module, dimension, dimension, weight)
        return weight

    def embed_pair(self, module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """LoRA factors A (r, in), B (out, r) → large coordinates: ΔWᴿ = Sₒᵀ·B·A·Sᵢ (2502.13533)."""
        return self._scatter(module, 1, 1, a), self._scatter(module, 0, 0, b)

    def cut_pair(self, module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """LoRA factors of the large model → the small one: the inverse gather of embed_pair."""
        columns, rows = self.kept(module, 1), self.kept(module, 0)
        return (
            a if columns is None else a.index_select(1, columns),
            b if rows is None else b.index_select(0, rows),
        )

    def _scatter(self, module: str, dimension: int, along: int, values: Tensor) -> Tensor:
        """Scatter `values` along its dimension `along` to where the large weight's `dimension` kept them."""
        kept = self.kept(module, dimension)
        if kept is None:
            return values
        shape = list(values.shape)
        shape[along] = self.shape(module)[dimension]
        return torch.zeros(shape, dtype=values.dtype).index_copy_(along, kept, values)

    def compose(self, inner: PruningMap) -> PruningMap:
        """This map followed by one made for its small model: large → small in one step."""
        axes = dict(self.axes)
        for name, axis in inner.axes.items():
            axes[name] = self.axes[name].compose(axis) if name in self.axes else axis
        return PruningMap(self.family, self.geometry, axes)

    def to_bytes(self) -> bytes:
        """The file's bytes: the same map always gives the same."""
        sizes = {name: self.axes[name].size for name in sorted(self.axes)}
        metadata = {
            "schema": SCHEMA,
            "family": next(key for key, family in FAMILIES.items() if family is self.family),
            "sizes": json.dumps(sizes),
            "geometry": json.dumps(asdict(self.geometry)),
        }
        axes = [self.axes[name] for name in sorted(self.axes)]
        plans = [TensorPlan(f"axis.{axis.name}", axis.kept.dtype, tuple(axis.kept.shape)) for axis in axes]
        # safetensors.torch.save orders the metadata at random, and the digest must not.
        return plan_header(plans, metadata) + b"".join(axis.kept.contiguous().numpy().tobytes() for axis in axes)

    def save(self, folder: str | Path) -> None:
        """Write pruning_map.safetensors into a folder."""
        (Path(folder) / FILE).write_bytes(self.to_bytes())

    @property
    def sha256(self) -> str:
        """Digest that adapters record and recover compares."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def axis_name(layer: int, unit: str) -> str:
    """`layers.3.mlp`."""
    return f"layers.{layer}.{unit}"


def parse_axis(name: str) -> tuple[int, str]:
    """(layer, unit) of an axis name; PruningMapError for any other name."""
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdigit() or parts[2] not in AXES:
        raise PruningMapError(f"{name!r} is no axis; expected layers.N.{' or layers.N.'.join(AXES)}")
    return int(parts[1]), parts[2]


def read_geometry(file: Path, header: Mapping[str, str], family: Family, sizes: Mapping[str, int]) -> Geometry:
    """The large model's geometry: from the header, else from the small model's config.json beside the map.

    head_dim, the hidden size and the query heads per kv head are the same in both; `sizes` has the rest.
    """
    if "geometry" in header:
        return Geometry(**json.loads(header["geometry"]))
    if not (file.parent / "config.json").is_file():
        raise KeyError("geometry")
    small = family.geometry(read_config(file.parent))
    whole = {parse_axis(name)[1]: size for name, size in sizes.items()}
    kv_heads = whole.get("kv_heads", small.kv_heads)
    heads = small.heads // small.kv_heads * kv_heads
    return replace(small, kv_heads=kv_heads, heads=heads, mlp=whole.get("mlp", small.mlp))


def read_map(path: str | Path) -> PruningMap:
    """The map in a folder or file, validated."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise PruningMapError(f"{file} does not exist; give the small model that `loram prune` wrote")
    header = read_metadata(file)
    schema, family = header.get("schema"), header.get("family")
    if schema is None or family not in FAMILIES:
        raise PruningMapError(f"{file} is not a pruning map of a known family (schema {schema}, family {family})")
    if not schema.isdigit() or int(schema) > int(SCHEMA):
        raise PruningMapError(f"{file} has schema {schema}, this loram reads {SCHEMA}; upgrade loram")
    tensors = read_tensors(file)
    strange = sorted(name for name in tensors if not name.startswith("axis."))
    if strange:
        raise PruningMapError(
            f"{file} holds {strange[0]}: this loram works with axes only; use the version that wrote it"
        )
    try:
        sizes = json.loads(header["sizes"])
        geometry = read_geometry(file, header, FAMILIES[family], sizes)
        axes = {n: Axis(n, sizes[n], t) for n, t in ((name.removeprefix("axis."), t) for name, t in tensors.items())}
    except (KeyError, TypeError, ValueError) as error:
        raise PruningMapError(f"{file} is damaged ({type(error).__name__}: {error}); run `loram prune` again") from None
    return PruningMap(FAMILIES[family], geometry, axes)
