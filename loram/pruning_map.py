"""The pruning map: which units of each axis were kept. Maps small ↔ large coordinates.

Kept indices are always in the large model's units: channels for `layers.N.mlp`, key/value heads for
`layers.N.kv_heads`; a kv head takes its query heads along (head h belongs to kv head h // (H/K)).
cut gathers (large → small), embed scatters into zeros (small → large); cut∘embed is the identity. A weight with a
keep-mask keeps its shape and is cut to zeros; dropped layers have no small counterpart. Everything is spoken of in
the large model's names, numbers and shapes; `numbering` translates names where layers were dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from loram.axes import Axis, axis_name, parse_axis
from loram.checkpoint import TensorEntry, read_config, read_entry, read_header, read_metadata
from loram.errors import PruningMapError
from loram.families import AXES, FAMILIES, Dimension, Family, Geometry, Weight
from loram.families.widths import Widths
from loram.masks import PackedMask, digest_of, masked
from loram.numbering import Numbering
from loram.shards import ShardWriter, TensorPlan, plan_header

__all__ = ["FILE", "Axis", "PruningMap", "axis_name", "parse_axis", "read_geometry", "read_map"]

FILE = "pruning_map.safetensors"
SCHEMA = "1"


@dataclass(frozen=True)
class PruningMap:
    """What was kept, for one family and one geometry. Axes, masks and layers that are absent were left whole.

    `masks` {weight name: PackedMask, or booleans (out, in)}; `layers` the kept decoder layers. A copy that travels
    with an adapter knows its masks by `masks_sha256` alone.
    """

    family: Family
    geometry: Geometry
    axes: Mapping[str, Axis]
    masks: Mapping[str, PackedMask] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    masks_sha256: str | None = None

    def __post_init__(self) -> None:
        layers = None if self.layers is None else tuple(int(layer) for layer in self.layers)
        object.__setattr__(self, "layers", layers)
        assert self.numbering.kept  # refuses layers that are not the model's
        for name, axis in self.axes.items():
            layer, unit = parse_axis(name)
            self._check_layer(f"axis {name}", layer)
            if axis.name != name or axis.size != self.geometry.size(unit):
                raise PruningMapError(
                    f"axis {name}: size {axis.size}, but the model has {self.geometry.size(unit)} {unit}"
                )
        packed = {n: m if isinstance(m, PackedMask) else PackedMask.of(n, m) for n, m in self.masks.items()}
        object.__setattr__(self, "masks", packed)
        for name, mask in packed.items():
            if mask.name != name or mask.shape != self._mask_shape(name):
                raise PruningMapError(f"mask {name}: shape {mask.shape}, but the weight is {self._mask_shape(name)}")

    def _check_layer(self, what: str, layer: int) -> None:
        if layer >= self.geometry.layers:
            raise PruningMapError(f"{what}: the model has {self.geometry.layers} layers")
        if layer not in self.numbering.kept:
            raise PruningMapError(f"{what}: layer {layer} was dropped")

    def _mask_shape(self, name: str) -> tuple[int, ...]:
        """The large shape of a weight that may have a mask: a Linear of a decoder layer that is there."""
        module, _, leaf = name.rpartition(".")
        weight, layer = self.family.find(module)
        if layer is None or not weight.columns or leaf != "weight":
            raise PruningMapError(f"mask {name}: only the Linears of decoder layers have masks")
        self._check_layer(f"mask {name}", layer)
        return self.shape(module)

    @cached_property
    def numbering(self) -> Numbering:
        """Which layers are left, and the names of modules on either side."""
        count = self.geometry.layers
        return Numbering(tuple(range(count)) if self.layers is None else self.layers, count, self.family.prefix)

    @property
    def small_geometry(self) -> Geometry:
        """The large model's sizes with the small one's layer count: which modules there are."""
        return replace(self.geometry, layers=len(self.numbering.kept))

    @property
    def masked(self) -> bool:
        """Whether weights were pruned entry by entry."""
        return bool(self.masks) or self.masks_sha256 is not None

    @property
    def widths(self) -> Widths:
        """Kept units per layer of the small model."""
        return Widths(*(tuple(self._kept_count(layer, unit) for layer in self.numbering.kept) for unit in AXES))

    def _kept_count(self, layer: int, unit: str) -> int:
        axis = self.axes.get(axis_name(layer, unit))
        return self.geometry.size(unit) if axis is None else axis.kept.numel()

    def mask(self, module: str) -> Tensor | None:
        """The large weight's keep-mask, bool (out, in); None where it has none."""
        if self.masks_sha256 is not None and not self.masks:
            raise PruningMapError(
                f"the masks (digest {self.masks_sha256[:12]}) are not in this folder, which knows them by digest only; "
                "add --small FOLDER with the small model that has them"
            )
        found = self.masks.get(f"{module}.weight")
        return None if found is None else found.unpack()

    def small_mask(self, module: str) -> Tensor | None:
        """The same mask over the small weight."""
        mask = self.mask(module)
        return None if mask is None else self._gather(module, mask)

    def mask_in_small(self, module: str) -> Tensor | None:
        """The same by the small model's own name of a module."""
        return self.small_mask(self.numbering.to_large(module))

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
        """The small weight's shape (out, in); PruningMapError where its layer was dropped."""
        if self.numbering.to_small(module) is None:
            raise PruningMapError(f"{module} is of a layer that was dropped; the small model does not have it")
        kept = [self.kept(module, dimension) for dimension in range(2)]
        return tuple(n if k is None else k.numel() for n, k in zip(self.shape(module), kept, strict=False))

    def _extent(self, segments: Dimension) -> int:
        return sum(self.geometry.size(s.count) * self.geometry.size(s.width) for s in segments)

    def cut(self, module: str, weight: Tensor) -> Tensor:
        """A large weight (out, in) or bias (out,) → the small one; entries that a mask drops are zero."""
        mask = self.mask(module) if weight.dim() == 2 else None
        return self._gather(module, weight if mask is None else masked(weight, mask))

    def _gather(self, module: str, weight: Tensor) -> Tensor:
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

    def twin(self, module: str, weight: Tensor) -> Tensor:
        """A large weight or bias with all that was pruned set to zero: the large model that equals the small one.

        A dropped layer passes its input on when what it adds (the outputs of o and down) is zero.
        """
        if self.numbering.to_small(module) is not None:
            return self.embed(module, self.cut(module, weight))
        adds = any(self.family.find(module)[0] == output for output in self.family.outputs)
        return torch.zeros_like(weight) if adds else weight

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
        if self.masks_sha256 is not None or inner.masks_sha256 is not None:
            raise PruningMapError("masks known by digest only cannot be composed; give the small models themselves")
        if inner.geometry.layers != len(self.numbering.kept):
            raise PruningMapError(
                f"{len(self.numbering.kept)} layers are kept, the second map expects {inner.geometry.layers}"
            )
        kept = tuple(self.numbering.kept[layer] for layer in inner.numbering.kept)
        layers = kept if len(kept) < self.geometry.layers else None
        axes = {name: axis for name, axis in self.axes.items() if parse_axis(name)[0] in kept}
        for name, axis in inner.axes.items():
            layer, unit = parse_axis(name)
            outer = axis_name(self.numbering.kept[layer], unit)
            moved = replace(axis, name=outer)
            axes[outer] = axes[outer].compose(moved) if outer in axes else moved
        return PruningMap(self.family, self.geometry, axes, self._composed_masks(inner, axes, layers), layers)

    def _composed_masks(
        self, inner: PruningMap, axes: Mapping[str, Axis], layers: tuple[int, ...] | None
    ) -> dict[str, PackedMask]:
        """Masks of both maps in large shapes; entries outside the rows and columns that are kept are off."""
        block = PruningMap(self.family, self.geometry, axes, layers=layers)
        names = {self.numbering.to_large(name) for name in inner.masks}
        names |= {name for name in self.masks if block.numbering.to_small(name) is not None}
        found = {}
        for name in sorted(names):
            module = name.rpartition(".")[0]
            within = self.numbering.to_small(module) or module
            renamed = inner.masks.get(f"{within}.weight")
            if (
                renamed is not None
                and name not in self.masks
                and renamed.shape == block.small_shape(module) == block.shape(module)
            ):
                found[name] = replace(renamed, name=name)  # its bits may stay on disk
                continue
            small = torch.ones(block.small_shape(module), dtype=torch.bool)
            own, below = self.mask(module), inner.small_mask(within)
            if own is not None:
                small &= block._gather(module, own)
            if below is not None:
                small &= below
            found[name] = PackedMask.of(name, block.embed(module, small))
        return found

    @cached_property
    def _digest_of_masks(self) -> str | None:
        return digest_of(self.masks.values()) if self.masks else self.masks_sha256

    def without_masks(self) -> PruningMap:
        """The copy that travels with an adapter: axes and layers, masks by digest."""
        return replace(self, masks={}, masks_sha256=self._digest_of_masks)

    def _header(self) -> tuple[dict[str, str], list[tuple[TensorPlan, Tensor]]]:
        """Metadata, and the small tensors in their order."""
        metadata = {
            "schema": SCHEMA,
            "family": next(key for key, family in FAMILIES.items() if family is self.family),
            "sizes": json.dumps({name: self.axes[name].size for name in sorted(self.axes)}),
            "geometry": json.dumps(asdict(self.geometry)),
        }
        if self._digest_of_masks is not None:
            metadata["masks_sha256"] = self._digest_of_masks
        tensors = {f"axis.{name}": self.axes[name].kept for name in sorted(self.axes)}
        if self.layers is not None:
            tensors["layers"] = torch.tensor(self.layers, dtype=torch.int64)
        return metadata, [(TensorPlan(n, t.dtype, tuple(t.shape)), t) for n, t in tensors.items()]

    def to_bytes(self) -> bytes:
        """The file's bytes without its masks: the same map always gives the same."""
        metadata, tensors = self._header()
        # safetensors.torch.save orders the metadata at random, and the digest must not.
        head = plan_header([plan for plan, _ in tensors], metadata)
        return head + b"".join(tensor.contiguous().numpy().tobytes() for _, tensor in tensors)

    def save(self, folder: str | Path) -> None:
        """Write pruning_map.safetensors into a folder, one mask in memory at a time."""
        metadata, tensors = self._header()
        masks = [self.masks[name] for name in sorted(self.masks)]
        plans = [TensorPlan(f"mask.{m.name}", torch.uint8, tuple(m.stored.shape)) for m in masks]
        with ShardWriter(Path(folder) / FILE, plan_header([*(plan for plan, _ in tensors), *plans], metadata)) as file:
            for _, tensor in tensors:
                file.write(tensor)
            for mask in masks:
                file.write(mask.packed())

    @cached_property
    def sha256(self) -> str:
        """Digest that adapters record and recover compares: of axes and layers, and of the masks by their digest."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


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
    entries = read_header(file)[1]
    strange = sorted(name for name in entries if name != "layers" and not name.startswith(("axis.", "mask.")))
    if strange:
        raise PruningMapError(
            f"{file} holds {strange[0]}, which this loram does not know; use the version that wrote it"
        )
    try:
        return _map_of(file, header, FAMILIES[family], entries)
    except (KeyError, TypeError, ValueError) as error:
        raise PruningMapError(f"{file} is damaged ({type(error).__name__}: {error}); run `loram prune` again") from None


def _map_of(file: Path, header: Mapping[str, str], family: Family, entries: Mapping[str, TensorEntry]) -> PruningMap:
    """The map that a file's header and tensors say; masks stay in the file."""
    sizes = json.loads(header["sizes"])
    if "layers" in entries and "geometry" not in header:
        raise KeyError("geometry")
    geometry = read_geometry(file, header, family, sizes)
    names = [name.removeprefix("axis.") for name in entries if name.startswith("axis.")]
    axes = {name: Axis(name, sizes[name], read_entry(entries[f"axis.{name}"])) for name in names}
    layers = read_entry(entries["layers"]) if "layers" in entries else None
    if layers is not None and (layers.dtype != torch.int64 or layers.dim() != 1):
        raise PruningMapError(f"{file}: layers are {layers.dtype} of shape {tuple(layers.shape)}; expected int64, 1-D")
    kept = None if layers is None else tuple(layers.tolist())
    whole = PruningMap(family, geometry, {}, layers=kept)
    masks = {}
    for entry in entries.values():
        if entry.name.startswith("mask."):
            name = entry.name.removeprefix("mask.")
            rows, columns = whole._mask_shape(name)
            masks[name] = PackedMask(name, (rows, columns), entry)
    digest = None if masks else header.get("masks_sha256")
    return PruningMap(family, geometry, axes, masks, kept, digest)
