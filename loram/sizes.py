"""Parameter counts, bytes, and the memory each stage needs: arithmetic on a config, no torch.

Counts follow the family's table, so they are exact. Reductions come in two kinds: the paper's rule
(2502.13533: everything ÷ 4 for 4 bit) and true bytes (embeddings, head and norms stay in 16 bit; NF4
with double quantization costs 4.127 bit per weight, int8 8 bit and a scale per row).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loram.families import Dimension, Geometry, family_of
from loram.families.widths import Widths

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
INT8_BITS = 8.0
BITS = {"none": 16.0, "nf4": NF4_BITS, "int8": INT8_BITS}
PAPER_DIVISOR = {"none": 1, "nf4": 4, "int8": 2}
RUNTIME = 400 * 2**20
"""What a process that imports torch, transformers and peft holds before it loads anything."""
TILE = 160 * 2**20
"""Buffers of the streaming stages: a tile, its fp32 copy and the product."""


@dataclass(frozen=True)
class Counts:
    """Parameters of a model: all of them, and those in the decoder's Linears (what quantization shrinks)."""

    total: int
    linear: int


def extent(segments: Dimension, geometry: Geometry, widths: Widths | None, layer: int | None) -> int:
    """Rows of a dimension at these widths."""
    total = 0
    for segment in segments:
        whole = segment.axis is None or widths is None or layer is None
        count = geometry.size(segment.count) if whole else getattr(widths, segment.count)[layer]
        total += count * geometry.size(segment.width)
    return total


def count(config: Mapping[str, Any], widths: Widths | None = None) -> Counts:
    """Parameters of the model that a raw config describes, at these widths (None: whole)."""
    family = family_of(config)
    geometry = family.geometry(config)
    total = linear = 0
    for _, dimensions, layer in family.tensors(config):
        size = 1
        for segments in dimensions:
            size *= extent(segments, geometry, widths, layer)
        total += size
        if layer is not None and len(dimensions) == 2:
            linear += size
    return Counts(total, linear)


def parameters(config: Mapping[str, Any], widths: Widths | None = None) -> int:
    """All parameters (tied weights once)."""
    return count(config, widths).total


def weight_bytes(counts: Counts, quantize: str = "none", bytes_per_weight: int = 2) -> int:
    """True bytes: the decoder's Linears at the quantized width, the rest unquantized."""
    if quantize == "none":
        return counts.total * bytes_per_weight
    return int(counts.linear * BITS[quantize] / 8) + (counts.total - counts.linear) * bytes_per_weight


def paper_bytes(counts: Counts, quantize: str = "none") -> int:
    """Bytes by the paper's rule: all parameters at 16 bit ÷ 4 for 4 bit."""
    return counts.total * 2 // PAPER_DIVISOR[quantize]


def lora_parameters(
    config: Mapping[str, Any], rank: int, targets: tuple[str, ...], widths: Widths | None = None
) -> int:
    """Parameters of LoRA on these targets: r·(in + out) per module."""
    family = family_of(config)
    geometry = family.geometry(config)
    total = 0
    for layer in range(geometry.layers):
        for weight in family.linears:
            if "all-linear" in targets or weight.name.rpartition(".")[2] in targets:
                sizes = (extent(d, geometry, widths, layer) for d in (weight.rows, weight.columns))
                total += rank * sum(sizes)
    if {"lm_head", "embed_tokens"} & set(targets):
        total += rank * (geometry.hidden + geometry.vocab) * len({"lm_head", "embed_tokens"} & set(targets))
    return total


@dataclass(frozen=True)
class TrainingShape:
    """What a training step looks like, as far as memory is concerned."""

    batch: int
    length: int
    rank: int
    targets: tuple[str, ...]
    checkpointing: bool
    bytes_per_value: int = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak bytes of one stage, by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self.parts.values())


def training_memory(
    config: Mapping[str, Any], widths: Widths | None, shape: TrainingShape, quantize: str = "none"
) -> MemoryPlan:
    """Weights, LoRA (fp32) with gradient and two AdamW moments, activations, and the logits of the loss."""
    geometry = family_of(config).geometry(config)
    counts = count(config, widths)
    lora = lora_parameters(config, shape.rank, shape.targets, widths)
    tokens = shape.batch * shape.length
    per_layer = [_layer_activations(geometry, widths, layer, shape) for layer in range(geometry.layers)]
    if shape.checkpointing:
        activations = tokens * geometry.hidden * shape.bytes_per_value * geometry.layers + max(per_layer)
    else:
        activations = sum(per_layer)
    return MemoryPlan(
        {
            "runtime": RUNTIME,
            "weights": weight_bytes(counts, quantize, shape.bytes_per_value),
            "lora and optimizer": lora * 16,
            "activations": activations,
            "logits and loss": tokens * geometry.vocab * (shape.bytes_per_value + 4 + 4),
        }
    )


def _layer_activations(geometry: Geometry, widths: Widths | None, layer: int, shape: TrainingShape) -> int:
    """Bytes that one decoder layer keeps for its backward pass (attention probabilities are recomputed)."""
    kv_heads = geometry.kv_heads if widths is None else widths.kv_heads[layer]
    channels = geometry.mlp if widths is None else widths.mlp[layer]
    attention = kv_heads * (2 * geometry.group + 2 * geometry.head_dim)
    rows = 2 * geometry.hidden * 2 + 4 * geometry.hidden + 2 * attention + 4 * channels
    lora = 7 * shape.rank * 2 + (geometry.hidden * 2 + attention + channels) // 2
    return shape.batch * shape.length * (rows + lora) * shape.bytes_per_value


def streaming_memory(config: Mapping[str, Any]) -> MemoryPlan:
    """Random and magnitude pruning, recovery and merging: a few tiles, whatever the model's size."""
    return MemoryPlan({"runtime": 240 * 2**20, "tiles": TILE})


def calibrated_memory(config: Mapping[str, Any], samples: int, length: int, *, gradients: bool) -> MemoryPlan:
    """Calibrated pruning: one block, its second moments, all windows' hidden states; Taylor: model and gradients."""
    geometry = family_of(config).geometry(config)
    counts = count(config)
    block = counts.linear // geometry.layers
    queries = geometry.heads * geometry.head_dim
    parts = {
        "runtime": RUNTIME,
        "embedding": geometry.vocab * geometry.hidden * 4,  # fp32 wherever bf16 is emulated
        "block": block * 4,
        "second moments": (geometry.mlp**2 + queries**2) * 4 + geometry.mlp**2 * 16,
        "hidden states": samples * length * geometry.hidden * 4 * 2,
        "activations": 4 * length * (geometry.mlp * 3 + geometry.hidden * 4) * 4,
    }
    if gradients:
        parts["model and gradients"] = (counts.total + counts.linear) * 4
        parts["logits"] = length * geometry.vocab * 12
    return MemoryPlan(parts)


def recovery_memory(config: Mapping[str, Any], rank: int, targets: tuple[str, ...]) -> MemoryPlan:
    """Recover: the adapter twice (small and large), fp32."""
    return MemoryPlan({"runtime": 240 * 2**20, "adapters": lora_parameters(config, rank, targets) * 4 * 3})
