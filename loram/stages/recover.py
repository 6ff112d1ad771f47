"""recover: carry a small adapter over to the large model (2502.13533, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram.adapter import (
    Adapter,
    LoraPair,
    check_finite,
    check_init,
    check_modules,
    expected_modules,
    load_adapter,
)
from loram.artifact import Draft, Manifest, check_output, drafting, read_manifest
from loram.memory import check_disk
from loram.options import RecoverOptions
from loram.progress import SILENT, Progress
from loram.pruning_map import PruningMap
from loram.renumbering import renumbered
from loram.results import StageResult
from loram.stages.carried import copy_files
from loram.stages.lineage import SmallSource, moved, parent_of, small_source


@dataclass(frozen=True, kw_only=True)
class RecoverResult(StageResult):
    """The recovered adapter."""

    modules: int
    rank: int
    base_id: str
    dropped: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """path, modules, rank."""
        return super().to_json() | {"modules": self.modules, "rank": self.rank, "base": self.base_id}

    def summary(self) -> str:
        """One line, and one more where base weights were left out."""
        lines = [f"recovered {self.modules} modules of rank {self.rank} for {self.base_id}"]
        if self.dropped:
            lines.append(f"left out {len(self.dropped)} base weights that PEFT had saved along: {self.dropped[0]} …")
        return "\n".join(lines)


def recover(options: RecoverOptions, progress: Progress = SILENT) -> RecoverResult:
    """Scatter the adapter's rows and columns to where the map kept them; zeros elsewhere."""
    inputs = [options.adapter, *([options.small] if options.small else [])]
    if not options.dry_run:
        check_output(options.out, inputs, force=options.force)
    manifest = read_manifest(options.adapter)
    whole = manifest is not None and manifest.kind == "adapter"  # LoRA on an unpruned model: recover is the identity
    source = None if whole else small_source(options.adapter, options.small)
    adapter = load_adapter(options.adapter)
    recovered = adapter if source is None else recover_adapter(adapter, source.pruning_map, options.adapter)
    check_init(adapter, options.adapter)
    check_finite(recovered, options.adapter)
    if options.portable:
        recovered = recovered.portable()
    made = manifest if source is None else None
    base_id = options.base_id or (source.base.id if source else made.base.id if made and made.base else "")
    result = RecoverResult(
        modules=len(recovered.pairs),
        rank=recovered.rank,
        base_id=base_id,
        dropped=adapter.dropped,
        path=None if options.dry_run else Path(options.out),
        next_command=f"loram verify {options.out}",
    )
    if not options.dry_run:
        check_disk(options.out, recovered.nbytes)
        with drafting(options.out, force=options.force, inputs=inputs) as draft:
            recovered.save(draft.path, base_id)
            copy_files(options.adapter, draft.path)
            draft.manifest = recovered_manifest(options, draft, source, made)
    return result


def recover_adapter(adapter: Adapter, pruning_map: PruningMap, where: str | Path) -> Adapter:
    """The adapter in large coordinates; MismatchError where it does not fit the map."""
    numbering = pruning_map.numbering
    expected = expected_modules(adapter.config, pruning_map.family, pruning_map.small_geometry)
    check_modules(adapter, lambda module: pruning_map.small_shape(numbering.to_large(module)), expected, where)

    def embed(module: str, pair: LoraPair) -> LoraPair:
        a, b = pruning_map.embed_pair(numbering.to_large(module), pair.a, pair.b)
        return replace(pair, a=a, b=b)

    recovered = adapter.map_pairs(embed)
    return recovered if numbering.whole else renumbered(recovered, numbering.to_large)


def recovered_manifest(
    options: RecoverOptions, draft: Draft, source: SmallSource | None, made: Manifest | None
) -> Manifest:
    """What the recovered adapter is and was made from."""
    parent = parent_of(options.adapter, "small-adapter" if source else "adapter", draft.out)
    if source is None:
        assert made is not None
        base = moved(made.base, options.adapter, draft.out) if made.base else None
        return replace(made, stage="recover", options=options.to_json(), base=base, parents=(parent,))
    family = source.pruning_map.family.name
    return Manifest(
        kind="adapter",
        stage="recover",
        options=options.to_json(),
        family=family,
        compression=source.compression,
        base=replace(moved(source.base, options.adapter, draft.out), id=options.base_id or source.base.id),
        pruning_map_sha256=source.pruning_map.sha256,
        parents=(parent, *([parent_of(options.small, "small-model", draft.out)] if options.small else [])),
    )
