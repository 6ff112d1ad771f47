"""quantize: store a model's decoder Linears in 4 or 8 bit, once, as bitsandbytes and transformers read them.

A small model stays the small model it was, in fewer bits. A plain model becomes a small model of which nothing was
cut: its map has no axes, recovering an adapter of it is the identity, and the adapter is the original's.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram.artifact import Draft, Manifest, check_output, drafting, read_manifest, write_json
from loram.checkpoint import Checkpoint, describe_base
from loram.cutting import is_decoder_linear, stored_config
from loram.declared import check_tensors
from loram.errors import InputError, KindError
from loram.families import family_of, is_small_config
from loram.hub.download import resolve_model
from loram.memory import check_disk, format_bytes
from loram.progress import SILENT, Progress
from loram.pruning_map import FILE as MAP_FILE
from loram.pruning_map import PruningMap
from loram.quantization import STORAGES
from loram.quantization.loading import quantization_of
from loram.quantization.storage import bitsandbytes_functions
from loram.quantization.writing import Source, stored_bytes, write_stored
from loram.quantize_options import QuantizeOptions
from loram.results import StageResult
from loram.shards import TensorPlan
from loram.stages.carried import MODEL_FILES, copy_files
from loram.stages.lineage import moved, parent_of


@dataclass(frozen=True, kw_only=True)
class QuantizeResult(StageResult):
    """The quantized model."""

    type: str
    before: int
    small: int
    cut: bool

    def to_json(self) -> dict[str, Any]:
        """path, bytes.small."""
        return super().to_json() | {"type": self.type, "bytes": {"before": self.before, "small": self.small}}

    def summary(self) -> str:
        """Bytes, and what kind of small model it is."""
        line = (
            f"{format_bytes(self.before)} → {format_bytes(self.small)} ({self.before / self.small:.2f}×): decoder "
            f"linears in {self.type}; embeddings, norms and head as they were"
        )
        return line if self.cut else f"{line}\nnothing was cut: an adapter trained on it recovers as it is"


def quantize(options: QuantizeOptions, progress: Progress = SILENT) -> QuantizeResult:
    """Read each tensor once, tile by tile, and write the model's folder."""
    if not options.dry_run:
        check_output(options.out, [options.model], force=options.force)
    folder = resolve_model(options.model, options.revision)
    manifest = model_of(options, folder)
    bitsandbytes_functions()
    with Checkpoint(folder) as checkpoint:
        sources = sources_of(checkpoint, whole=manifest is None)
        size = stored_bytes(sources, STORAGES[options.type])
        if not options.dry_run:
            check_disk(options.out, size)
            with drafting(options.out, force=options.force, inputs=[folder]) as draft:
                size = write(options, draft, checkpoint, sources, progress)
                draft.manifest = manifest_of(options, draft, checkpoint, manifest)
        return QuantizeResult(
            type=options.type,
            before=checkpoint.total_bytes,
            small=size,
            cut=manifest is not None and manifest.compression[:1] not in ((), *((name,) for name in STORAGES)),
            path=None if options.dry_run else Path(options.out),
            next_command=f"loram train {options.out} --data FILE -o ADAPTER",
        )


def model_of(options: QuantizeOptions, folder: Path) -> Manifest | None:
    """The small model's manifest, None for a plain model; KindError for what is no model."""
    if not folder.is_dir():
        raise InputError(f"{options.model} is a file; give the folder of a small model or of any plain one")
    manifest = read_manifest(folder)
    if manifest is None or manifest.kind == "merged-model":
        return None
    if manifest.kind != "small-model":
        raise KindError(
            f"{options.model} is a {manifest.kind}; `loram quantize` works on a small model (`loram prune`) or a "
            "plain one"
        )
    if manifest.base is None or manifest.pruning_map_sha256 is None:
        raise InputError(f"{folder}/loram.json does not name the large model and the map; run `loram prune` again")
    return manifest


def sources_of(checkpoint: Checkpoint, *, whole: bool) -> list[Source]:
    """Every tensor of the model, in the order of the forward pass; refuses a model that cannot be quantized."""
    method = quantization_of(checkpoint.config)
    if method is not None:
        raise KindError(
            f"{checkpoint.folder} is quantized already ({method}); give the 16-bit model that it was made from"
        )
    family = family_of(checkpoint.config)
    if whole:
        if is_small_config(checkpoint.config):
            raise InputError(f"{checkpoint.folder} is a small model without its loram.json; give the folder it lay in")
        check_tensors(checkpoint, family)

    def source(name: str) -> Source:
        entry = checkpoint.entry(name)
        plan = TensorPlan(name, entry.dtype, entry.shape)
        return Source(plan, is_decoder_linear(family, name), lambda: (tile for _, tile in checkpoint.tiles(name)))

    return [source(name) for name, _, _ in family.tensors(checkpoint.config)]


def write(
    options: QuantizeOptions, draft: Draft, checkpoint: Checkpoint, sources: list[Source], progress: Progress
) -> int:
    """The weights, the config, and the files that go with a model; returns the weights' bytes."""
    storage = STORAGES[options.type]
    progress.begin("quantize", stored_bytes(sources, storage))
    size = write_stored(sources, storage, draft.path, advance=progress.advance)
    progress.end()
    write_json(draft.path / "config.json", stored_config(checkpoint.config, storage, sources))
    copy_files(checkpoint.folder, draft.path, MODEL_FILES)
    return size


def manifest_of(options: QuantizeOptions, draft: Draft, checkpoint: Checkpoint, small: Manifest | None) -> Manifest:
    """What was quantized; writes the map beside it."""
    folder = checkpoint.folder
    if small is not None:
        shutil.copyfile(folder / MAP_FILE, draft.path / MAP_FILE)
        assert small.base is not None
        return replace(
            small,
            stage="quantize",
            options=options.to_json(),
            compression=(*small.compression, options.type),
            base=moved(small.base, folder, draft.out),
            parents=(parent_of(folder, "small-model", draft.out),),
        )
    family = family_of(checkpoint.config)
    uncut = PruningMap(family, family.geometry(checkpoint.config), {})
    uncut.save(draft.path)
    return Manifest(
        kind="small-model",
        stage="quantize",
        options=options.to_json(),
        family=family.name,
        compression=(options.type,),
        base=describe_base(folder, options.base_id, options.revision, seen_from=draft.out),
        pruning_map_sha256=uncut.sha256,
    )
