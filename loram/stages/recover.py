"""recover: carry a small adapter over to the large model (2502.13533, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
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
from loram.artifact import Base, Draft, Manifest, check_output, drafting, read_manifest
from loram.data.places import source_path
from loram.errors import KindError
from loram.hidden_update import HiddenUpdate
from loram.hub.download import fetched
from loram.memory import check_disk
from loram.options import RecoverOptions
from loram.progress import SILENT, Progress
from loram.pruning_map import PruningMap
from loram.renumbering import renumbered
from loram.results import StageResult
from loram.sealing import checkpoints_of, discard, keep_only_steps, set_aside
from loram.stages.carried import copy_files
from loram.stages.lineage import SmallSource, moved, parent_of, small_source
from loram.stages.masking import RECORD, hidden_in_small, recorded


@dataclass(frozen=True, kw_only=True)
class RecoverResult(StageResult):
    """The recovered adapter."""

    modules: int
    rank: int
    base_id: str
    dropped: tuple[str, ...] = ()
    calibration: dict[str, Any] | None = None
    hidden: HiddenUpdate | None = None

    def to_json(self) -> dict[str, Any]:
        """path, modules, rank; where there are masks `mask`; after --calibrate `scales`, `found`, and `loss.choose`,
        `loss.check`."""
        body = super().to_json() | {"modules": self.modules, "rank": self.rank, "base": self.base_id}
        if self.hidden is not None:
            body["mask"] = self.hidden.to_json()
        told = self.calibration or {}
        return body | {key: told[key] for key in ("scales", "found", "loss") if key in told}

    def summary(self) -> str:
        """One line, one more where base weights were left out, and what a calibration found."""
        lines = [f"recovered {self.modules} modules of rank {self.rank} for {self.base_id}"]
        if self.dropped:
            lines.append(f"left out {len(self.dropped)} base weights that PEFT had saved along: {self.dropped[0]} …")
        if self.hidden is not None:
            lines.append(str(self.hidden))
        return "\n".join([*lines, *(describe(self.calibration) if self.calibration else [])])


def recover(options: RecoverOptions, progress: Progress = SILENT) -> RecoverResult:
    """Scatter the adapter's rows and columns to where the map kept them; zeros elsewhere."""
    asked, options = options, fetched(options)
    inputs = [options.adapter, *([options.small] if options.small else []), *map(source_path, options.calibrate)]
    if not options.dry_run:
        check_output(options.out, inputs, force=options.force)
    manifest = read_manifest(options.adapter)
    if options.calibrate:
        refuse_calibrating(options, manifest)
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
        hidden=hidden_from(adapter, source, manifest),
        path=None if options.dry_run else Path(options.out),
        next_command=f"loram verify {options.out}",
    )
    if options.dry_run:
        return result
    check_disk(options.out, recovered.nbytes)
    with drafting(options.out, force=options.force, inputs=inputs, keep_partial=bool(options.calibrate)) as draft:
        record = made.calibration if made else None
        if options.calibrate:
            base = source.base if source else made.base if made else None
            recovered, record = calibrated(options, recovered, base, draft, progress)
        recovered.save(draft.path, base_id)
        copy_files(options.adapter, draft.path)
        about = recovered_manifest(options, draft, source, made)
        draft.manifest = replace(about, options=asked.to_json(), calibration=record)
        if result.hidden is not None:
            draft.manifest = replace(draft.manifest, training={RECORD: result.hidden.to_json()})
        set_aside(draft.path, draft.out)
    discard(draft.out)
    return replace(result, calibration=record)


def calibrated(
    options: RecoverOptions, recovered: Adapter, base: Base | None, draft: Draft, progress: Progress
) -> tuple[Adapter, dict[str, Any]]:
    """The adapter with a scale for each group of its modules, and the record of them."""
    from loram.stages.scaling import calibrate  # PEFT and transformers, which plain recovery does without
    from loram.training.signals import stop_on_signals

    with stop_on_signals() as stop:
        found = calibrate(options, recovered, base, checkpoints_of(draft.out), stop, progress)
    check_finite(found.adapter, options.adapter)
    keep_only_steps(draft.path)
    return found.adapter, found.record


def refuse_calibrating(options: RecoverOptions, made: Manifest | None) -> None:
    """What can be refused, or said about the rows, before anything is read."""
    from loram.evaluation.scale_search import scipy_minimize
    from loram.stages.calibration_rows import warn_of_shared

    scipy_minimize()
    if made is not None and made.calibration is not None:
        raise KindError(
            f"{options.adapter} has scales from an earlier --calibrate; recover the small adapter that it was made from"
        )
    warn_of_shared(options)


def describe(record: Mapping[str, Any]) -> list[str]:
    """What a calibration found, and whether it helps on rows that it was not chosen on."""
    losses, scales = record["loss"], record["scales"]
    lines = [f"{split}: {one['before']:.4f} → {one['after']:.4f} ({one['rows']} rows)" for split, one in losses.items()]
    if all(scale == 1 for scale in scales.values()):
        return ["calibrated: no scale lowers the loss on the rows kept for checking, so all stay 1", *lines]
    return ["calibrated: " + ", ".join(f"{name} {scale:g}" for name, scale in scales.items()), *lines]


def hidden_from(adapter: Adapter, source: SmallSource | None, manifest: Manifest | None) -> HiddenUpdate | None:
    """What the masks hid of the update: by the masks themselves where they are at hand, else as training noted it."""
    if source is not None and source.pruning_map.masks:
        return hidden_in_small(adapter, source.pruning_map)
    return recorded(manifest)


def recover_adapter(adapter: Adapter, pruning_map: PruningMap, where: str | Path) -> Adapter:
    """The adapter in large coordinates; MismatchError where it does not fit the map."""
    numbering = pruning_map.numbering
    expected = expected_modules(adapter.config, pruning_map.family, pruning_map.small_geometry)
    check_modules(adapter, lambda module: pruning_map.small_shape(numbering.to_large(module)), expected, where)

    def embed(module: str, pair: LoraPair) -> LoraPair:
        a, b = pruning_map.embed_pair(numbering.to_large(module), pair.a, pair.b)
        return replace(pair, a=a, b=b)

    # A masked update is whole from here on: the large model has no mask.
    recovered = replace(adapter.map_pairs(embed), config=adapter.config | {"peft_type": "LORA"})
    return recovered if numbering.whole else renumbered(recovered, numbering.to_large)


def recovered_manifest(
    options: RecoverOptions, draft: Draft, source: SmallSource | None, made: Manifest | None
) -> Manifest:
    """What the recovered adapter is and was made from."""
    parent = parent_of(options.adapter, "small-adapter" if source else "adapter", draft.out)
    if source is None:
        assert made is not None
        base = moved(made.base, options.adapter, draft.out) if made.base else None
        return replace(made, stage="recover", base=base, parents=(parent,))
    family = source.pruning_map.family.name
    return Manifest(
        kind="adapter",
        stage="recover",
        family=family,
        compression=source.compression,
        base=replace(moved(source.base, options.adapter, draft.out), id=options.base_id or source.base.id),
        pruning_map_sha256=source.pruning_map.sha256,
        parents=(parent, *([parent_of(options.small, "small-model", draft.out)] if options.small else [])),
    )
