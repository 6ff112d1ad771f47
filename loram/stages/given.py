"""An already sparse checkpoint from elsewhere (llm-compressor, wanda, sparsegpt) as the small model of a large one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from loram.artifact import read_manifest
from loram.checkpoint import Checkpoint, all_finite
from loram.declared import check_tensors
from loram.errors import CheckpointError, KindError, MismatchError
from loram.families import Family, Geometry, family_of
from loram.families.sparsity import decoder_weights
from loram.masks import PackedMask
from loram.progress import Progress

SPARSE = 0.05
"""From this share of zeros a weight counts as pruned; a dense one has a few by rounding."""


@dataclass(frozen=True)
class GivenSparse:
    """A sparse checkpoint of the large model's shapes, and the zeros in each of its pruned weights."""

    checkpoint: Checkpoint
    zeros: dict[str, int]
    same_norm: bool

    @property
    def removed(self) -> int:
        """How many weights are gone."""
        return sum(self.zeros.values())

    def masks(self, spill: Path) -> dict[str, PackedMask]:
        """The keep-mask of every pruned weight: what is not zero. Their bits are in `spill`."""

        def rows(name: str) -> Iterator[Tensor]:
            return (tile != 0 for _, tile in self.checkpoint.tiles(name))

        found = {}
        for name in self.zeros:
            out, width = self.checkpoint.entry(name).shape
            found[name] = PackedMask.of_rows(name, (out, width), rows(name)).spilled(spill)
        return found


def open_given(folder: Path, large: Checkpoint, family: Family, geometry: Geometry, progress: Progress) -> GivenSparse:
    """The sparse checkpoint in `folder`, after a look at every weight of it; the caller closes it.

    KindError for a folder that loram wrote; CheckpointError where it is stored compressed, is of another model, or is
    not sparse; MismatchError where it holds NaN or Inf.
    """
    manifest = read_manifest(folder)
    if manifest is not None and manifest.kind != "merged-model":
        raise KindError(
            f"{folder} is a {manifest.kind} that loram wrote; --given takes a sparse checkpoint from elsewhere"
        )
    given = Checkpoint(folder)
    try:
        if "quantization_config" in given.config or "sparsity_config" in given.config:
            raise CheckpointError(
                f"{folder} is stored compressed or quantized; loram reads zeros from plain weights: save it with "
                "save_compressed=False"
            )
        if family_of(given.config) is not family or family.geometry(given.config) != geometry:
            raise CheckpointError(
                f"{folder} is of other sizes than {large.folder}; --given takes a sparse checkpoint of the very MODEL"
            )
        check_tensors(given, family)
        return GivenSparse(given, count_zeros(given, family, geometry, progress), same_norm(large, given, family))
    except BaseException:
        given.close()
        raise


def count_zeros(given: Checkpoint, family: Family, geometry: Geometry, progress: Progress) -> dict[str, int]:
    """The zeros of each weight that was pruned."""
    names = [name for name, _ in decoder_weights(family, geometry)]
    zeros, size = {}, 0
    progress.begin("look for zeros", len(names))
    for name in names:
        zeros[name] = 0
        for _, tile in given.tiles(name):
            if not all_finite(tile):
                raise MismatchError(f"{given.folder}: {name} holds NaN or Inf; the checkpoint is damaged")
            zeros[name] += tile.numel() - int(torch.count_nonzero(tile))
            size += tile.numel()
        progress.advance()
    progress.end()
    pruned = {n: count for n, count in zeros.items() if count >= SPARSE * elements(given, n)}
    if not pruned:
        raise CheckpointError(
            f"{given.folder} is not sparse: {sum(zeros.values()) / size:.2%} of its decoder weights are zero; "
            "give what was pruned, or prune it here with --method semi or unstructured"
        )
    return pruned


def elements(checkpoint: Checkpoint, name: str) -> int:
    """How many elements a weight has."""
    out, width = checkpoint.entry(name).shape
    return out * width


def same_norm(large: Checkpoint, given: Checkpoint, family: Family) -> bool:
    """Whether the final norms agree: no method of pruning touches them, and no two models share them."""
    name = f"{family.norm.name}.weight"
    theirs = given.read(name)
    return torch.allclose(large.read(name).to(theirs.dtype).float(), theirs.float(), rtol=1e-2, atol=1e-3)
