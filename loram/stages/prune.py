"""prune: cut a large model down to a small one and keep the map between the two."""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loram.artifact import Base, Draft, Manifest, check_output, drafting, scratch, write_json
from loram.checkpoint import Checkpoint, describe_base, read_tensors
from loram.cutting import Refitted, small_bytes, small_sources, stored_config, write_small
from loram.data.calibration import calibration_windows, is_general
from loram.declared import check_tensors
from loram.families import Family, Geometry, family_of
from loram.families.small import small_config, with_biases
from loram.families.sparsity import check_widths
from loram.families.widths import Widths, describe_uncut, whole_widths
from loram.hub.download import resolve_model
from loram.memory import check_disk
from loram.options import PruneOptions
from loram.progress import SILENT, Progress
from loram.pruning import WEIGHT_SCORES
from loram.pruning_map import PruningMap, read_map
from loram.quantization import STORAGES
from loram.quantization.storage import bitsandbytes_functions
from loram.quantization.writing import stored_bytes, write_stored
from loram.sealing import discard, set_aside
from loram.sizes import parameters
from loram.stages.calibrating import earlier_result, identity_of, is_same_work, open_steps, recorded, saved
from loram.stages.carried import MODEL_FILES, copy_files
from loram.stages.choosing import Pruning, choose, cut_of, needs_of
from loram.stages.composing import earlier_of
from loram.stages.given import open_given
from loram.stages.pruned import UNCALIBRATED, PruneResult, depth_words, stopped
from loram.stages.sparsify import Sparsifying, from_inputs, from_weights, removed
from loram.training.signals import Stoppable, stop_on_signals

__all__ = ["PruneResult", "prune"]

logger = logging.getLogger(__name__)


def prune(options: PruneOptions, progress: Progress = SILENT) -> PruneResult:
    """Choose what stays, cut, refit what reads the cut features, write the small checkpoint in shards."""
    inputs = [options.model, *([] if options.given is None else [options.given])]
    if not options.dry_run:
        check_output(options.out, inputs, force=options.force or earlier_result(options) is not None)
    folder = resolve_model(options.model, options.revision)
    earlier = earlier_of(options.model, folder)
    if options.quantize != "none":
        bitsandbytes_functions()
    with ExitStack() as opened:
        checkpoint = opened.enter_context(Checkpoint(folder))
        family = family_of(checkpoint.config)
        geometry = family.geometry(checkpoint.config)
        check_tensors(checkpoint, family)
        widths = small_widths(options, family, geometry)
        given = None
        if options.given is not None:
            given = open_given(resolve_model(options.given), checkpoint, family, geometry, progress)
            opened.enter_context(given.checkpoint)
        windows = calibration(options, folder)
        work = Pruning(options, checkpoint, family, geometry, widths, windows, given, earlier)
        if not options.dry_run:
            make(work, [folder, *inputs], progress)
        return outcome(work)


def make(work: Pruning, inputs: list[str | Path], progress: Progress) -> None:
    """Write OUT; stopped, the same command goes on with what a pass over calibration text has found so far."""
    options, out = work.options, Path(work.options.out)
    base = describe_base(work.checkpoint.folder, options.base_id, options.revision, seen_from=out)
    now = identity_of(options, work.windows, base) if work.windows is not None and work.passes else {}
    if is_same_work(earlier_result(options), now):
        logger.info("%s is finished already; to prune it anew add --force", out)
        work.layers = read_map(out).layers if options.method == "depth" else None
        work.layers = work.layers if work.earlier is None else work.earlier.own_layers(work.layers)
        return discard(out)
    check_output(out, inputs, force=options.force)
    check_disk(out, needed_bytes(work) - folder_bytes(scratch(out)[0]))
    with (
        stop_on_signals() as stop,
        drafting(out, force=options.force, inputs=inputs, keep_partial=work.passes) as draft,
    ):
        if work.passes:
            work.steps = open_steps(options, now, stop)
        if work.earlier is not None:
            base = work.earlier.base_seen_from(out)
        write(work, draft, base, Stoppable(progress, lambda: stopped(options, stop, partial(saved_of, work))))
        assert draft.manifest is not None
        draft.manifest = replace(draft.manifest, training=recorded(now))
        set_aside(draft.path, out)
    discard(out)


def small_widths(options: PruneOptions, family: Family, geometry: Geometry) -> Widths:
    """Kept heads and channels per layer: all of them where single weights go."""
    if options.by_weight:
        if options.sparsity is not None:
            check_widths(family, geometry, options.sparsity)
        return whole_widths(geometry.layers, geometry.kv_heads, geometry.mlp)
    cut = cut_of(options)
    if options.method == "depth":
        return whole_widths(geometry.layers - cut.depth(geometry.layers), geometry.kv_heads, geometry.mlp)
    return cut.widths(geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.mlp)


def outcome(work: Pruning) -> PruneResult:
    """What was done, or would be: counts and notes."""
    options, geometry = work.options, work.geometry
    large, small = parameters(large_config(work)), parameters(work.shape, work.widths)
    cut, notes = "", calibration_notes(options)
    if options.method == "depth":
        cut = depth_words(geometry.layers, len(work.widths.mlp), work.layers, work.influences)
        if options.refit and not work.family.adds_outputs:
            notes.append(f"nothing was refitted: a norm follows down in {work.family.name}; `loram align` repairs it")
    elif not options.by_weight:
        notes = [*describe_uncut(geometry.kv_heads, geometry.mlp, work.widths), *notes]
    elif work.given is not None:
        small -= work.given.removed
        cut = f"the zeros of {options.given} are the mask of {len(work.given.zeros)} weights"
        if not work.given.same_norm:
            notes.append(
                f"the final norm of {options.given} is not MODEL's: it may have been pruned from another model"
            )
    elif options.sparsity is not None:
        small -= removed(work.family, work.checkpoint, options.sparsity, options.importance)
        how = f"{options.sparsity.keep}:{options.sparsity.group}" if options.sparsity.group else options.ratio
        cut = f"all shapes stay; {options.importance} put zeros into every decoder Linear ({how})"
    return PruneResult(
        large=large,
        small=small,
        widths=work.widths,
        cut=cut,
        layers=work.layers,
        influences=work.influences,
        notes=tuple(notes),
        path=None if options.dry_run else Path(options.out),
        next_command=f"loram train {options.out} --data FILE -o ADAPTER",
    )


def large_config(work: Pruning) -> dict[str, Any]:
    """The config to count the large model by: of a small model that is pruned again, with the layers that it lost."""
    config = work.checkpoint.config
    return config if work.earlier is None else config | {"num_hidden_layers": work.earlier.map.geometry.layers}


def saved_of(work: Pruning) -> str:
    """In words, which layers are saved."""
    return "" if work.steps is None else saved(work.steps.place)


def needed_bytes(work: Pruning) -> int:
    """Room on the disk, at most: the small checkpoint, what is put aside until it is written, and hidden states."""
    size = max(entry.dtype.itemsize for entry in work.source.entries.values())
    total = parameters(work.shape, work.widths) * size
    states = 0
    if work.windows is not None and work.passes:
        states = work.windows.numel() * work.geometry.hidden * 4
        # Forward: those of now, a copy that is good, and one in the making. Back: the inputs of all blocks as well.
        states *= 3 + (work.geometry.layers if work.score_needs == "gradients" else 0)
    if not work.options.by_weight:
        return total + states
    return total * (2 if work.options.importance == "sparsegpt" else 1) + total // 8 + states


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def calibration(options: PruneOptions, folder: Path) -> Tensor | None:
    """Calibration windows (samples, length), or None where neither the score nor the user asks for any."""
    sources = options.calibration
    if options.by_weight and not needs_inputs(options):
        return None
    if not sources:
        if not needs_inputs(options):
            return None
        sources = ("builtin",)
    from loram.modeling import load_tokenizer  # transformers, which streaming does without

    tokenizer = load_tokenizer(folder)
    windows = calibration_windows(
        sources, tokenizer, options.samples, options.length, options.seed, columns=options.columns
    )
    return torch.stack(list(windows))


def needs_inputs(options: PruneOptions) -> bool:
    """Whether nothing can be chosen without calibration text."""
    return needs_of(options) != "weights"


def calibration_notes(options: PruneOptions) -> list[str]:
    """What a reader should know about the calibration text."""
    if options.by_weight and not needs_inputs(options):
        return ["--calibration was not read: nothing here looks at text"] if options.calibration else []
    if not options.calibration and not needs_inputs(options):
        return [UNCALIBRATED]
    if all(is_general(source) for source in options.calibration):
        return [
            "calibrated on general text only: the adapter will carry over much better with the text you will train on "
            "(--calibration FILE --calibration builtin)"
        ]
    return []


def write(work: Pruning, draft: Draft, base: Base, progress: Progress) -> None:
    """Choose the axes, refit, and write the small model's folder."""
    spill = draft.path / "refit"
    spill.mkdir()
    if work.options.by_weight:
        choose_masks(work, spill, progress)
    elif work.options.method == "depth":
        from loram.stages.dropping import drop_layers  # transformers: not for streaming

        drop_layers(work, spill, progress)
    else:
        choose(work, spill, progress)
    pruning_map = work.map
    steps = [] if work.steps is None else [folder for folder in work.steps.place.iterdir() if folder.is_dir()]
    config = write_weights(work, pruning_map, spilled([spill, *steps]), draft, progress)
    if work.earlier is not None:
        pruning_map = work.earlier.map.compose(pruning_map)
    pruning_map.save(draft.path)
    shutil.rmtree(spill)
    write_json(draft.path / "config.json", config)
    copy_files(work.checkpoint.folder, draft.path, MODEL_FILES)
    draft.manifest = Manifest(
        kind="small-model",
        stage="prune",
        options=work.options.outcome(),
        family=work.family.name,
        compression=work.compression,
        base=base,
        pruning_map_sha256=pruning_map.sha256,
        parents=() if work.earlier is None else (work.earlier.parent(draft.out),),
    )


def choose_masks(work: Pruning, spill: Path, progress: Progress) -> None:
    """Fill `work.masks`; their bits are in `spill`, or in the steps beside the weights that a solver changed."""
    if work.given is not None:
        work.masks.update(work.given.masks(spill))
        return
    sparsity, score = work.options.sparsity, WEIGHT_SCORES[work.options.importance]
    assert sparsity is not None
    found = Sparsifying(work.checkpoint, work.family, work.geometry, sparsity, score, work.masks)
    if not work.passes:
        return from_weights(found, spill, progress)
    assert work.windows is not None
    assert work.steps is not None
    with work.runner(spill) as runner:
        from_inputs(found, runner, work.windows, work.steps, progress)


def write_weights(
    work: Pruning, pruning_map: PruningMap, refitted: Refitted, draft: Draft, progress: Progress
) -> dict[str, Any]:
    """The small checkpoint's shards, in the storage asked for; returns its config."""
    storage, source = STORAGES.get(work.options.quantize), work.source
    config = small_config(spelled(work), work.widths, work.layers)
    if storage is None:
        progress.begin("cut", small_bytes(source, pruning_map, refitted))
        draft.digests.update(write_small(source, pruning_map, refitted, draft.path, advance=progress.advance))
    else:
        sources = small_sources(source, pruning_map, refitted)
        progress.begin("cut and quantize", stored_bytes(sources, storage))
        write_stored(sources, storage, draft.path, advance=progress.advance)
        config = stored_config(config, storage, sources)
    progress.end()
    return config


def spelled(work: Pruning) -> dict[str, Any]:
    """The large model's config with the biases that came; where layers went, with lists that follow from numbers."""
    config = work.source.config
    if work.layers is None:
        return with_biases(config, work.widths) if work.compensates else config
    from loram.modeling import spelled_out  # transformers: not for streaming

    return spelled_out(config)


def spilled(folders: list[Path]) -> Refitted:
    """The changed weights on disk, each read when it is its turn."""

    def reader(file: Path) -> Any:
        return lambda: next(iter(read_tensors(file).values()))

    files = (file for folder in folders for kind in ("weight", "bias") for file in folder.glob(f"*.{kind}.safetensors"))
    return {file.name.removesuffix(".safetensors"): reader(file) for file in files}
