"""merge: write W + s·B·A into a copy of the large checkpoint, as a stream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram.adapter import CONFIG, Adapter, check_finite, check_init, expected_modules, load_adapter
from loram.artifact import Base, Manifest, check_output, drafting, read_json, read_manifest, write_json
from loram.checkpoint import BY_FLAG, Checkpoint, describe_base, read_config
from loram.errors import KindError, MismatchError, OptionError
from loram.families import family_of, is_small_config
from loram.hub.download import fetched, is_hub_id
from loram.memory import check_disk, format_bytes, peak_bytes
from loram.merging import check_mergeable, merge_shards, merged_bytes, refuse_quantized
from loram.options import MergeOptions
from loram.progress import SILENT, Progress
from loram.results import StageResult
from loram.stages.carried import copy_files
from loram.stages.lineage import check_same, find_large, parent_of
from loram.stages.masking import refuse_masked

COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
CONFIG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class MergeResult(StageResult):
    """The merged model."""

    modules: int
    bytes: int
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """path, peak_bytes."""
        return super().to_json() | {"modules": self.modules, "bytes": self.bytes, "peak_bytes": self.peak_bytes}

    def summary(self) -> str:
        """One line."""
        size, peak = format_bytes(self.bytes), format_bytes(self.peak_bytes)
        return f"merged {self.modules} modules, {size} of weights; peak memory {peak}"


def merge(options: MergeOptions, progress: Progress = SILENT) -> MergeResult:
    """Stream the base through, add each module's update tile by tile, keep everything else to the bit."""
    asked, options = options, fetched(options)
    if not options.dry_run:
        check_output(options.out, [options.adapter, *([options.base] if options.base else [])], force=options.force)
    manifest = read_manifest(options.adapter)
    if manifest is not None and manifest.kind != "adapter":
        raise KindError(
            f"{options.adapter} is a {manifest.kind}; `loram merge` works on an adapter of the large model: "
            f"run `loram recover {options.adapter} -o ADAPTER` first"
        )
    adapter = load_adapter(options.adapter, streamed=True)
    refuse_masked(adapter, options.adapter)
    check_init(adapter, options.adapter)
    check_finite(adapter, options.adapter)
    base = base_folder(options, manifest)
    identity = describe_base(base, seen_from=options.out)
    if manifest is not None and manifest.base is not None:
        check_same(manifest.base, identity, base)
    dtype = None if options.dtype == "same" else BY_FLAG[options.dtype]
    with Checkpoint(base) as checkpoint:
        check_fit(checkpoint, adapter, options.adapter)
        size = merged_bytes(checkpoint, dtype)
        if not options.dry_run:
            check_disk(options.out, size)
            progress.begin("merge", size)
            write(options, asked, checkpoint, adapter, identity, progress)
            progress.end()
        return MergeResult(
            modules=len(adapter.pairs),
            bytes=size,
            peak_bytes=peak_bytes(),
            path=None if options.dry_run else Path(options.out),
            next_command=f"loram eval {options.out} --data FILE",
        )


def base_folder(options: MergeOptions, manifest: Manifest | None) -> Path:
    """The large model to merge into."""
    base = find_large(options.adapter, manifest, options.base)
    if base is None:
        named = base_name(options.adapter, manifest)
        known = f" or --base {named} to fetch it" if named else ""
        raise OptionError(f"{options.adapter} does not say where its large model is; add --base FOLDER{known}")
    refuse_quantized(base, read_config(base))
    return base


def base_name(adapter: str, manifest: Manifest | None) -> str:
    """The large model's Hub id with its revision, as the manifest or the adapter's config names it; or nothing."""
    config = read_json(Path(adapter) / CONFIG)
    told = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    known = (manifest.base.id, manifest.base.revision) if manifest is not None and manifest.base is not None else told
    name, revision = known
    return "" if not is_hub_id(name) else f"{name}@{revision}" if revision else name


def check_fit(checkpoint: Checkpoint, adapter: Adapter, where: str) -> None:
    """Refuse an adapter that is not complete for this base, and a base that cannot take one."""
    if is_small_config(checkpoint.config):
        raise KindError(f"{checkpoint.folder} is a small model; merge into the large one with --base FOLDER")
    family = family_of(checkpoint.config)
    geometry = family.geometry(checkpoint.config)
    check_mergeable(checkpoint, adapter, geometry.tied)
    missing = sorted(expected_modules(adapter.config, family, geometry) - set(adapter.pairs))
    if missing:
        raise MismatchError(
            f"{where} lacks {missing[0]} ({len(missing)} modules missing) that its target_modules names"
        )


def write(
    options: MergeOptions,
    asked: MergeOptions,
    checkpoint: Checkpoint,
    adapter: Adapter,
    identity: Base,
    progress: Progress,
) -> None:
    """Write the folder: other files first, then the shards. `asked`: the options as they were typed."""
    dtype = None if options.dtype == "same" else BY_FLAG[options.dtype]
    with drafting(options.out, force=options.force, inputs=[options.adapter, checkpoint.folder]) as draft:
        copy_files(checkpoint.folder, draft.path, COPIED)
        for name in ("loram.json", "model.safetensors.index.json"):
            (draft.path / name).unlink(missing_ok=True)
        if dtype is not None:
            config = checkpoint.config | {"dtype": CONFIG_NAMES[options.dtype]}
            config.pop("torch_dtype", None)
            write_json(draft.path / "config.json", config)
        draft.digests.update(merge_shards(checkpoint, adapter, draft.path, dtype, progress.advance))
        draft.manifest = Manifest(
            kind="merged-model",
            stage="merge",
            options=asked.to_json(),
            family=family_of(checkpoint.config).name,
            base=identity,
            parents=(parent_of(options.adapter, "adapter", draft.out),),
        )
