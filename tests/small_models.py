"""Small models and adapters made for tests: cut by loram at given indices, trained by peft at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from stock_models import Kept, raw_config
from torch import Tensor

from loram.artifact import Manifest, drafting, write_json
from loram.checkpoint import Checkpoint, describe_base
from loram.cutting import write_small
from loram.families import family_of
from loram.families.small import small_config
from loram.masks import PackedMask
from loram.modeling import load_small, spelled_out
from loram.pruning_map import Axis, PruningMap


def map_for(
    large: Path, kept: Kept, layers: tuple[int, ...] | None = None, masks: dict[str, Tensor] | None = None
) -> PruningMap:
    """The pruning map that keeps these units, layers and entries."""
    config = raw_config(large)
    family = family_of(config)
    geometry = family.geometry(config)
    axes = {}
    for layer, (heads, channels) in kept.items():
        for unit, size, indices in (("kv_heads", geometry.kv_heads, heads), ("mlp", geometry.mlp, channels)):
            if len(indices) < size and (layers is None or layer in layers):
                name = f"layers.{layer}.{unit}"
                axes[name] = Axis(name, size, torch.tensor(indices))
    packed = {name: PackedMask.of(name, mask) for name, mask in (masks or {}).items()}
    return PruningMap(family, geometry, axes, packed, layers)


def write_small_folder(
    large: Path,
    kept: Kept,
    out: Path,
    layers: tuple[int, ...] | None = None,
    masks: dict[str, Tensor] | None = None,
) -> Path:
    """A small model of these units, layers and entries, as `loram prune` would have left it."""
    pruning_map = map_for(large, kept, layers, masks)
    done = [name for name, part in (("axes", pruning_map.axes), ("mask", masks), ("depth", layers)) if part]
    with Checkpoint(large) as checkpoint, drafting(out) as draft:
        draft.digests.update(write_small(checkpoint, pruning_map, {}, draft.path))
        config = spelled_out(checkpoint.config) if layers else checkpoint.config
        write_json(draft.path / "config.json", small_config(config, pruning_map.widths, layers))
        pruning_map.save(draft.path)
        draft.manifest = Manifest(
            kind="small-model",
            stage="prune",
            family=pruning_map.family.name,
            compression=tuple(done),
            base=describe_base(large, seen_from=out),
            pruning_map_sha256=pruning_map.sha256,
        )
    return out


def randomize(model: Any, seed: int) -> None:
    """Random numbers in every LoRA factor: a fresh B is zero and would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)


def write_adapter(model: Path, out: Path, targets: Any, seed: int = 0, **lora: Any) -> Path:
    """A random LoRA adapter of a model (large or small), made and saved by peft."""
    base = load_small(model, dtype="fp32")
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **lora}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**options))
    randomize(adapted, seed)
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    return out
