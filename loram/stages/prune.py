"""prune: cut a large model down to a small one and keep the map between the two."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loram.artifact import Base, Draft, Manifest, check_output, drafting, read_manifest, write_json
from loram.checkpoint import Checkpoint, describe_base, read_tensors
from loram.cutting import Refitted, check_tensors, small_bytes, small_sources, stored_config, write_small
from loram.data.calibration import calibration_windows, is_general
from loram.errors import KindError
from loram.families import Family, Geometry, Weight, family_of
from loram.families.small import small_config
from loram.families.widths import Cut, Widths, describe_uncut, parse_ratio
from loram.hub.download import resolve_model
from loram.memory import check_disk
from loram.options import PruneOptions
from loram.progress import SILENT, Progress
from loram.pruning import SCORES
from loram.pruning.refit import refit, refit_matrix
from loram.pruning.score import unit_scores
from loram.pruning.selection import layer_axes
from loram.pruning_map import Axis, PruningMap
from loram.quantization import STORAGES
from loram.quantization.storage import bitsandbytes_functions
from loram.quantization.writing import stored_bytes, write_stored
from loram.results import StageResult
from loram.shards import write_tensors
from loram.sizes import parameters
from loram.stages.lineage import MODEL_FILES, copy_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PruneResult(StageResult):
    """The small model."""

    large: int
    small: int
    widths: Widths
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """path, params.large, params.small."""
        reduction = self.large / self.small
        return super().to_json() | {
            "params": {"large": self.large, "small": self.small, "reduction": reduction},
            "notes": list(self.notes),
        }

    def summary(self) -> str:
        """Counts, widths, and what a reader should mind."""
        cut = min(self.widths.mlp), min(self.widths.kv_heads)
        whole = max(self.widths.mlp), max(self.widths.kv_heads)
        lines = [
            f"{self.large:,} → {self.small:,} parameters ({self.large / self.small:.2f}×)",
            f"cut layers keep {cut[0]} of {whole[0]} channels and {cut[1]} of {whole[1]} kv heads",
        ]
        return "\n".join([*lines, *self.notes])


@dataclass
class Pruning:
    """What one call of prune works with."""

    options: PruneOptions
    checkpoint: Checkpoint
    family: Family
    geometry: Geometry
    widths: Widths
    windows: Tensor | None
    axes: dict[str, Axis] = field(default_factory=dict)

    @property
    def cut_layers(self) -> list[int]:
        """The layers that are not left whole."""
        pairs = zip(self.widths.kv_heads, self.widths.mlp, strict=True)
        return [n for n, (heads, mlp) in enumerate(pairs) if heads < self.geometry.kv_heads or mlp < self.geometry.mlp]

    @property
    def refits(self) -> bool:
        """Whether o and down are refitted: whenever there is calibration text and --refit."""
        return self.options.refit and self.windows is not None

    @property
    def map(self) -> PruningMap:
        """The map made of the axes chosen so far."""
        return PruningMap(self.family, self.geometry, self.axes)


def prune(options: PruneOptions, progress: Progress = SILENT) -> PruneResult:
    """Choose what stays, cut, refit what reads the cut features, write the small checkpoint in shards."""
    if not options.dry_run:
        check_output(options.out, [options.model], force=options.force)
    folder = resolve_model(options.model, options.revision)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.kind in ("small-model", "small-adapter", "adapter", "run"):
        raise KindError(f"{options.model} is a {manifest.kind}; `loram prune` works on the large model")
    if options.quantize != "none":
        bitsandbytes_functions()
    with Checkpoint(folder) as checkpoint:
        family = family_of(checkpoint.config)
        geometry = family.geometry(checkpoint.config)
        cut = Cut(parse_ratio(options.ratio), options.keep_first, options.keep_last, options.round_to)
        widths = cut.widths(geometry.layers, geometry.kv_heads, geometry.head_dim, geometry.mlp)
        check_tensors(checkpoint, family)
        work = Pruning(options, checkpoint, family, geometry, widths, calibration(options, folder))
        result = PruneResult(
            large=parameters(checkpoint.config),
            small=parameters(checkpoint.config, widths),
            widths=widths,
            notes=(*describe_uncut(geometry.kv_heads, geometry.mlp, widths), *calibration_notes(options)),
            path=None if options.dry_run else Path(options.out),
            next_command=f"loram train {options.out} --data FILE -o ADAPTER",
        )
        if not options.dry_run:
            check_disk(options.out, result.small * max(e.dtype.itemsize for e in checkpoint.entries.values()))
            with drafting(options.out, force=options.force, inputs=[folder]) as draft:
                base = describe_base(folder, options.base_id, options.revision, seen_from=draft.out)
                write(work, draft, base, progress)
        return result


def calibration(options: PruneOptions, folder: Path) -> Tensor | None:
    """Calibration windows (samples, length), or None where neither the score nor the user asks for any."""
    sources = options.calibration
    if not sources:
        if options.method == "random" or SCORES[options.score].needs == "weights":
            return None
        sources = ("builtin",)
    from loram.modeling import load_tokenizer  # transformers, which streaming does without

    tokenizer = load_tokenizer(folder)
    windows = calibration_windows(
        sources, tokenizer, options.samples, options.length, options.seed, columns=options.columns
    )
    return torch.stack(list(windows))


def calibration_notes(options: PruneOptions) -> list[str]:
    """What a reader should know about the calibration text."""
    needs = options.method == "structured" and SCORES[options.score].needs != "weights"
    if not options.calibration and not needs:
        return ["no calibration text: nothing was refitted; add --calibration FILE with the text you will train on"]
    if all(is_general(source) for source in options.calibration):
        return [
            "calibrated on general text only: the adapter will carry over much better with the text you will train on "
            "(--calibration FILE --calibration builtin)"
        ]
    return []


def write(work: Pruning, draft: Draft, base: Base, progress: Progress) -> None:
    """Choose the axes, refit, and write the small model's folder."""
    storage = STORAGES.get(work.options.quantize)
    spill = draft.path / "refit"
    spill.mkdir()
    choose(work, spill, progress)
    config = write_weights(work, spilled(spill), draft, progress)
    for file in spill.iterdir():
        file.unlink()
    spill.rmdir()
    work.map.save(draft.path)
    write_json(draft.path / "config.json", config)
    copy_files(work.checkpoint.folder, draft.path, MODEL_FILES)
    draft.manifest = Manifest(
        kind="small-model",
        stage="prune",
        options=work.options.to_json(),
        family=work.family.name,
        compression=("axes", *(["refit"] if work.refits else []), *([] if storage is None else [storage.name])),
        base=base,
        pruning_map_sha256=work.map.sha256,
    )


def write_weights(work: Pruning, refitted: Refitted, draft: Draft, progress: Progress) -> dict[str, Any]:
    """The small checkpoint's shards, in the storage asked for; returns its config."""
    storage, pruning_map = STORAGES.get(work.options.quantize), work.map
    config = small_config(work.checkpoint.config, work.widths)
    if storage is None:
        progress.begin("cut", small_bytes(work.checkpoint, pruning_map))
        draft.digests.update(write_small(work.checkpoint, pruning_map, refitted, draft.path, advance=progress.advance))
    else:
        sources = small_sources(work.checkpoint, pruning_map, refitted)
        progress.begin("cut and quantize", stored_bytes(sources, storage))
        write_stored(sources, storage, draft.path, advance=progress.advance)
        config = stored_config(config, storage, sources)
    progress.end()
    return config


def choose(work: Pruning, spill: Path, progress: Progress) -> None:
    """Fill `work.axes` layer by layer, and the refitted weights of each layer into `spill`."""
    layers = work.cut_layers
    score = SCORES[work.options.score]
    scores = scores_beforehand(work, layers)
    progress.begin("score", len(layers))

    def decide(layer: int, moments: dict[str, Tensor]) -> None:
        chosen = scores[layer] if layer in scores else layer_scores(work, layer, moments=moments)
        work.axes.update(layer_axes(layer, work.widths, work.geometry, chosen))
        if moments and work.refits:
            refit_layer(work, layer, moments, spill)
        progress.advance()

    if work.windows is not None and (work.refits or (not scores and score.needs == "inputs")):
        from loram.blockwise import observe_inputs

        observe_inputs(work.checkpoint, work.family, work.windows, layers, decide)
    else:
        for layer in layers:
            decide(layer, {})
    progress.end()


def scores_beforehand(work: Pruning, layers: list[int]) -> dict[int, Any]:
    """Per layer the scores (or the random generator) that need no pass over its inputs."""
    score = SCORES[work.options.score]
    if work.options.method == "random":
        return dict.fromkeys(layers, torch.Generator().manual_seed(work.options.seed))
    if score.needs == "weights":
        return {layer: layer_scores(work, layer) for layer in layers}
    if score.needs == "inputs":
        return {}
    from loram.blockwise import BlockRunner, gradients

    assert work.windows is not None
    with BlockRunner(work.checkpoint, dtype=torch.float32) as runner:
        return {
            block.number: layer_scores(work, block.number, gradients=found)
            for block, found in gradients(runner, work.windows, layers)
        }


def layer_scores(
    work: Pruning,
    layer: int,
    *,
    moments: dict[str, Tensor] | None = None,
    gradients: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The score of every unit of one layer."""

    def companion(weight: Weight, start: int, stop: int) -> Tensor:
        if gradients is not None:
            return gradients[weight.name][start:stop].float().cpu()
        return moments[weight.name].diagonal().clamp_min(0).sqrt() if moments else torch.empty(0)

    return unit_scores(
        SCORES[work.options.score],
        work.family,
        work.geometry,
        lambda weight: work.checkpoint.tiles(f"{work.family.module(layer, weight)}.weight"),
        companion,
    )


def refit_layer(work: Pruning, layer: int, moments: dict[str, Tensor], spill: Path) -> None:
    """Refit the layer's o and down where their inputs are cut, and put the result on disk."""
    for weight in work.family.outputs:
        module = work.family.module(layer, weight)
        kept = work.map.kept(module, 1)
        if kept is None:
            continue
        matrix = refit_matrix(moments[weight.name], kept).float()
        rows = [refit(tile, matrix) for _, tile in work.checkpoint.tiles(f"{module}.weight")]
        name = f"{module}.weight"
        write_tensors(spill / f"{name}.safetensors", {name: torch.cat(rows)})


def spilled(spill: Path) -> Refitted:
    """The refitted weights on disk, each read when it is its turn."""

    def reader(file: Path) -> Any:
        return lambda: next(iter(read_tensors(file).values()))

    return {file.name.removesuffix(".safetensors"): reader(file) for file in spill.iterdir()}
