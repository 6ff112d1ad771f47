"""prune --method random: nothing is computed, so nothing that computes is imported; anything else goes to prune.py."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

from loram.artifact import Base, Draft, Manifest, check_output, drafting, read_manifest, write_json
from loram.declared import check_tensors
from loram.drawing import draw
from loram.families import family_of
from loram.families.small import small_config
from loram.families.widths import Cut, Widths, describe_uncut, parse_ratio
from loram.gathering import Cut as Gathered
from loram.gathering import write_gathered
from loram.hub.download import resolve_model
from loram.memory import check_disk
from loram.options import PruneOptions
from loram.progress import SILENT, Progress
from loram.sealing import discard
from loram.sizes import parameters
from loram.stages.carried import MODEL_FILES, copy_files
from loram.stages.pruned import UNCALIBRATED, PruneResult, stopped
from loram.stored import StoredModel, describe_base
from loram.training.signals import Stoppable, stop_on_signals

HANDLED = {
    *("model", "out", "force", "dry_run", "seed", "base_id", "revision"),
    *("method", "ratio", "keep_first", "keep_last", "round_to"),
    # without calibration text these change nothing
    *("score", "samples", "length", "refit", "columns", "resume", "hidden_memory"),
}


def prune(options: PruneOptions, progress: Progress = SILENT) -> PruneResult:
    """Prune: random units as a stream of bytes, everything else by loram.stages.prune."""
    if not is_plain(options):
        return with_torch(options, progress)
    if not options.dry_run:
        check_output(options.out, [options.model], force=options.force)
    folder = resolve_model(options.model, options.revision)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.kind != "merged-model":
        return with_torch(options, progress)
    with StoredModel(folder) as model:
        family = family_of(model.config)
        geometry = family.geometry(model.config)
        check_tensors(model, family)
        rule = Cut(parse_ratio(options.ratio), options.keep_first, options.keep_last, options.round_to)
        widths = rule.widths(geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.mlp)
        result = PruneResult(
            large=parameters(model.config),
            small=parameters(model.config, widths),
            widths=widths,
            notes=(*describe_uncut(geometry.kv_heads, geometry.mlp, widths), UNCALIBRATED),
            path=None if options.dry_run else Path(options.out),
            next_command=f"loram train {options.out} --data FILE -o ADAPTER",
        )
        if not options.dry_run:
            check_disk(options.out, result.small * max(entry.itemsize for entry in model.entries.values()))
            with (
                stop_on_signals() as stop,
                drafting(options.out, force=options.force, inputs=[folder, options.model]) as draft,
            ):
                base = describe_base(folder, options.base_id, options.revision, seen_from=draft.out)
                write(options, model, widths, Writing(draft, base), Stoppable(progress, lambda: stopped(options, stop)))
            discard(Path(options.out))
        return result


def with_torch(options: PruneOptions, progress: Progress) -> PruneResult:
    """Whatever is more than a stream of bytes: maps to compose, too."""
    from loram.stages.prune import prune as prune_anything

    return prune_anything(options, progress)


@dataclasses.dataclass(frozen=True)
class Writing:
    """Where the small model goes, and whose it is."""

    draft: Draft
    base: Base


def is_plain(options: PruneOptions) -> bool:
    """Whether random units are all that is asked for."""
    others = (field for field in dataclasses.fields(options) if field.name not in HANDLED)
    return options.method == "random" and all(getattr(options, field.name) == field.default for field in others)


def write(options: PruneOptions, model: StoredModel, widths: Widths, where: Writing, progress: Progress) -> None:
    """Draw the units and write the small model's folder."""
    family, draft = family_of(model.config), where.draft
    geometry = family.geometry(model.config)
    pairs = enumerate(zip(widths.kv_heads, widths.mlp, strict=True))
    layers = [n for n, (heads, mlp) in pairs if heads < geometry.kv_heads or mlp < geometry.mlp]
    cut = Gathered(family, geometry, draw(layers, widths, geometry, options.seed))
    tensors = cut.tensors(model.config)
    progress.begin("cut", sum(math.prod(shape) * model.entry(name).itemsize for name, shape, _ in tensors))
    draft.digests.update(write_gathered(model, cut, draft.path, advance=progress.advance))
    progress.end()
    found = cut.map_bytes()
    (draft.path / "pruning_map.safetensors").write_bytes(found)
    write_json(draft.path / "config.json", small_config(model.config, widths))
    copy_files(model.folder, draft.path, MODEL_FILES)
    draft.manifest = Manifest(
        kind="small-model",
        stage="prune",
        options=options.outcome(),
        family=family.name,
        compression=("axes",),
        base=where.base,
        pruning_map_sha256=hashlib.sha256(found).hexdigest(),
    )
