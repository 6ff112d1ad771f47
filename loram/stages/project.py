"""project: carry an adapter of the large model over to a small one. The exact inverse of recover."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram.adapter import Adapter, LoraPair, check_finite, check_init, check_modules, expected_modules, load_adapter
from loram.artifact import Manifest, check_output, drafting, read_manifest, require_kind
from loram.errors import InputError, KindError, MismatchError
from loram.hub.download import fetched
from loram.options import ProjectOptions
from loram.progress import SILENT, Progress
from loram.pruning_map import PruningMap, read_map
from loram.renumbering import renumbered
from loram.results import StageResult
from loram.stages.carried import copy_files
from loram.stages.lineage import check_digest, moved, parent_of
from loram.stages.masking import refuse_masked


@dataclass(frozen=True, kw_only=True)
class ProjectResult(StageResult):
    """The projected adapter; `left_out` modules are of layers that the small model does not have."""

    modules: int
    rank: int
    left_out: int = 0

    def to_json(self) -> dict[str, Any]:
        """path, modules, rank."""
        return super().to_json() | {"modules": self.modules, "rank": self.rank, "left_out": self.left_out}

    def summary(self) -> str:
        """One line."""
        lost = f"; {self.left_out} of layers that it does not have are left out" if self.left_out else ""
        return f"projected {self.modules} modules of rank {self.rank} onto the small model{lost}"


def project(options: ProjectOptions, progress: Progress = SILENT) -> ProjectResult:
    """Gather the adapter's rows and columns that the small model kept."""
    asked, options = options, fetched(options)
    inputs = [options.adapter, options.small]
    if not options.dry_run:
        check_output(options.out, inputs, force=options.force)
    small = require_kind(options.small, ("small-model",), "project ADAPTER")
    pruning_map = read_map(options.small)
    check_digest(options.small, pruning_map, small.pruning_map_sha256)
    check_same_base(options, small)
    adapter = load_adapter(options.adapter)
    refuse_masked(adapter, options.adapter)
    check_init(adapter, options.adapter)
    check_finite(adapter, options.adapter)
    projected = project_adapter(adapter, pruning_map, options.adapter)
    result = ProjectResult(
        modules=len(projected.pairs),
        rank=projected.rank,
        left_out=len(adapter.pairs) - len(projected.pairs),
        path=None if options.dry_run else Path(options.out),
        next_command=f"loram train {options.small} --adapter {options.out} --data FILE -o ADAPTER",
    )
    if options.dry_run:
        return result
    with drafting(options.out, force=options.force, inputs=inputs) as draft:
        projected.save(draft.path, str(options.small))
        copy_files(options.small, draft.path)
        pruning_map.without_masks().save(draft.path)
        assert small.base is not None
        draft.manifest = Manifest(
            kind="small-adapter",
            stage="project",
            options=asked.to_json(),
            family=small.family,
            compression=small.compression,
            base=moved(small.base, options.small, draft.out),
            pruning_map_sha256=pruning_map.sha256,
            parents=(
                parent_of(options.small, "small-model", draft.out),
                parent_of(options.adapter, "adapter", draft.out),
            ),
        )
    return result


def project_adapter(adapter: Adapter, pruning_map: PruningMap, where: str | Path) -> Adapter:
    """The adapter in small coordinates; MismatchError where it does not fit the large model."""
    expected = expected_modules(adapter.config, pruning_map.family, pruning_map.geometry)
    check_modules(adapter, pruning_map.shape, expected, where)

    def gather(module: str, pair: LoraPair) -> LoraPair:
        a, b = pruning_map.cut_pair(module, pair.a, pair.b)
        return replace(pair, a=a, b=b)

    numbering = pruning_map.numbering
    if numbering.whole:
        return adapter.map_pairs(gather)
    held = {module: pair for module, pair in adapter.pairs.items() if numbering.to_small(module) is not None}
    if not held:
        raise MismatchError(f"{where} adapts layers {numbering.dropped} only, and the small model has none of them")
    return renumbered(replace(adapter, pairs=held).map_pairs(gather), numbering.to_small)


def check_same_base(options: ProjectOptions, small: Manifest) -> None:
    """Refuse an adapter whose manifest says that it belongs to another large model, or to a small one."""
    if small.base is None:
        raise InputError(f"{options.small}/loram.json does not name the large model; run `loram prune` again")
    manifest = read_manifest(options.adapter)
    if manifest is None:
        return
    if manifest.kind != "adapter":
        raise KindError(
            f"{options.adapter} is a {manifest.kind}; `loram project` works on an adapter of the large model"
        )
    if manifest.base and manifest.base.weights_fingerprint != small.base.weights_fingerprint:
        raise MismatchError(
            f"{options.adapter} was made for {manifest.base.id}, {options.small} was cut from {small.base.id}: "
            "other weights; "
            "prune the adapter's own base"
        )
