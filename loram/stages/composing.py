"""A small model that is pruned again: what lost whole layers may lose heads, channels or weights after that.

The map that is written is the composition of both, from the large model to the result in one step, so that an adapter
trained on it is recovered like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loram.artifact import Base, Manifest, Parent, read_manifest
from loram.errors import InputError, KindError
from loram.pruning_map import PruningMap, read_map
from loram.stages.lineage import check_digest, moved, parent_of

DEPTH_ONLY = {"depth", "refit", "aligned"}
"""What may have been done to a small model that is pruned again: its layers have the large model's shapes."""


@dataclass(frozen=True)
class Earlier:
    """The small model that is pruned again: where it is, its map, what was done to it, and to which large model."""

    folder: Path
    map: PruningMap
    compression: tuple[str, ...]
    base: Base

    def base_seen_from(self, out: Path) -> Base:
        """The large model, as what is written to `out` names it."""
        return moved(self.base, self.folder, out)

    def parent(self, out: Path) -> Parent:
        """The small model, as a parent of what is written to `out`."""
        return parent_of(self.folder, "small-model", out)

    def own_layers(self, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Layers of the large model in the numbers of this small one."""
        return layers and tuple(self.map.numbering.kept.index(layer) for layer in layers)


def earlier_of(model: str, folder: Path) -> Earlier | None:
    """The small model that `prune` is given, None for a large one; KindError for what cannot be pruned."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.kind not in ("small-model", "small-adapter", "adapter", "run"):
        return None
    if manifest.kind != "small-model":
        raise KindError(f"{model} is a {manifest.kind}; `loram prune` works on the large model")
    if manifest.base is None:
        raise InputError(f"{folder}/loram.json does not name the large model; it is damaged: run `loram prune` again")
    refuse_narrowed(model, manifest)
    pruning_map = read_map(folder)
    check_digest(folder, pruning_map, manifest.pruning_map_sha256)
    return Earlier(folder, pruning_map, manifest.compression, manifest.base)


def refuse_narrowed(model: str, manifest: Manifest) -> None:
    """KindError for a small model whose layers are not the large model's any more."""
    others = [step for step in manifest.compression if step not in DEPTH_ONLY]
    if not others and "depth" in manifest.compression:
        return
    assert manifest.base is not None
    raise KindError(
        f"{model} is a small-model ({', '.join(manifest.compression)}); `loram prune` works on the large model, or on "
        f"a small one that lost whole layers only: prune {manifest.base.id} with --method depth first, and the result "
        "of that once more"
    )
