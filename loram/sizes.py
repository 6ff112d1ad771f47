"""Parameter counts and bytes: arithmetic on a config, no torch.

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
VALUE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
ENDS = ("lm_head", "embed_tokens")
PAPER_DIVISOR = {"none": 1, "nf4": 4, "int8": 2}


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


def is_target(name: str, targets: tuple[str, ...]) -> bool:
    """Whether LoRA sits on the decoder Linear of this (last) name; peft's rule, part by part."""
    return any(target in ("all-linear", name) or target.endswith(f".{name}") for target in targets)


def lora_parameters(
    config: Mapping[str, Any], rank: int, targets: tuple[str, ...], widths: Widths | None = None
) -> int:
    """Parameters of LoRA on these targets: r·(in + out) per module."""
    family = family_of(config)
    geometry = family.geometry(config)
    total = 0
    for layer in range(geometry.layers):
        for weight in family.linears:
            if is_target(weight.name.rpartition(".")[2], targets):
                sizes = (extent(d, geometry, widths, layer) for d in (weight.rows, weight.columns))
                total += rank * sum(sizes)
    return total + rank * (geometry.hidden + geometry.vocab) * len(set(ENDS) & set(targets))
