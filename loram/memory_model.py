"""How much memory every stage needs at its peak, by part: arithmetic on a config, no torch and no weights.

A stage's plan is a sum of named parts. What differs between the CPU and a GPU is in `Hardware`: what a process holds
before it loads anything, how dropout masks are stored, and what the allocator holds beyond what is asked of it.
`benchmarks/memory.py` compares these predictions with measured peaks (docs/benchmarks.md says how well they do).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loram.activations import (
    Layer,
    Workload,
    backward_bytes,
    chunk_rows,
    kept_by_layer,
    layers_of,
    loss_bytes,
    product_bytes,
)
from loram.families import family_of
from loram.families.widths import Widths
from loram.sizes import BITS, ENDS, VALUE_BYTES, count, is_target, lora_parameters

MIB = 2**20
EIGHT_BIT = dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "ademamix_8bit"), 2)
OPTIMIZER_BYTES = EIGHT_BIT | {"sgd": 0, "adafactor": 0, "lion_8bit": 1, "adagrad": 4, "rmsprop": 4, "lion_32bit": 4}
"""State per trained parameter by the optimizer's transformers name; 8 for one that is not here."""


@dataclass(frozen=True)
class Hardware:
    """What the same work costs more or less of, on the CPU and on a GPU."""

    name: str
    training: int
    """What a process holds that has imported the training libraries, before it loads a model."""
    streaming: int
    """The same of a stage that imports torch and safetensors alone."""
    mask_bytes: int
    """Of an element of a dropout mask."""
    allocator: float
    """Share of what comes and goes in a step that the allocator holds in vain: freed and not given back, or torn."""
    tears: bool
    """Whether checkpointing does not lower that: on the heap of the C library the layers' inputs, which stay, lie
    between what is recomputed and freed, and its holes add up to what a step without checkpointing would tear."""
    maps_files: bool
    """Whether weights stay in the file's pages where no conversion is needed, and both are held where one is."""


# The CPU's figures are measured (glibc, torch 2.13): the share is the one constant here that is fitted and not derived,
# to an earlier run of the configurations of benchmarks/memory.py. Those of CUDA are estimates.
CPU = Hardware("cpu", 545 * MIB, 240 * MIB, 4, 0.66, tears=True, maps_files=True)
CUDA = Hardware("cuda", 600 * MIB, 240 * MIB, 1, 0.06, tears=False, maps_files=False)
HARDWARE = {"cpu": CPU, "cuda": CUDA}
TILE = 160 * MIB
"""Buffers of the streaming stages: a tile, its fp32 copy and the product."""
HIDDEN_MEMORY, ROWS = 2 * 2**30, 4
"""Of `loram.blockwise`: hidden states that outgrow this go to a file; windows that pass a block at a time."""
OUTSIDE = ("runtime", "allocator")
"""Parts that torch's own count of allocated GPU memory does not see."""


@dataclass(frozen=True)
class Model:
    """A model as it lies on disk: its config, the widths that are left, the bits of its Linears, its other dtype."""

    config: Mapping[str, Any]
    widths: Widths | None = None
    quantize: str = "none"
    stored: str = "bf16"


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak bytes of one stage, by part."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What torch's own count of GPU memory would show."""
        return sum(size for name, size in self.parts.items() if name not in OUTSIDE)


def training_memory(model: Model, work: Workload, hardware: Hardware = CUDA) -> MemoryPlan:
    """Peak of training LoRA: the larger one of loading the model and of a step."""
    held = resident(model, work, hardware)
    moving = step_parts(model, work, hardware)
    # Streamed, large blocks are given back to the system at once, and hardly anything tears.
    tears = hardware.tears and not work.streamed
    torn = step_parts(model, replace(work, checkpointing=False), hardware) if tears else moving
    moving = moving | {"allocator": int(hardware.allocator * sum(torn.values()))}
    step = MemoryPlan(held | lora_parts(model, work) | moving)
    loading = MemoryPlan(held | {"loading": loading_bytes(model, work, hardware)})
    return max(step, loading, key=lambda plan: plan.total)


def reconstruction_memory(large: Model, small: Model, windows: tuple[int, ...], value_bytes: int) -> MemoryPlan:
    """Peak of `align` as it is by default, layer by layer: an estimate.

    `windows`: how many, tokens in each, how many in a batch. A layer of the small model is trained in fp32, with
    autocast's copy, its gradient, AdamW's two moments and what it was; one of the large model is beside it, and three
    streams of hidden states.
    """
    samples, length, batch = windows
    geometry = family_of(small.config).geometry(small.config)
    above, below = largest_layer(large), largest_layer(small)
    states = 3 * samples * length * geometry.hidden * value_bytes
    parts = {
        "runtime": CPU.training,
        "layers": above * value_bytes + below * (4 + 4 + 8 + 2 * value_bytes),
        "tiles": TILE,
        "hidden states": states if states <= HIDDEN_MEMORY else 0,  # else they are in a file
        "activations": batch * length * (geometry.mlp * 3 + geometry.hidden * 6) * 4 * 2,
    }
    return MemoryPlan(parts)


def resident(model: Model, work: Workload, hardware: Hardware) -> dict[str, int]:
    """What is there from loading on: the process itself and the frozen weights."""
    counts = count(model.config, model.widths)
    if work.streamed:
        return {"runtime": hardware.training, "weights": largest_piece(model) * work.value_bytes}
    quantized = counts.linear if model.quantize != "none" else 0
    parts = {"runtime": hardware.training, "weights": (counts.total - quantized) * work.value_bytes}
    return parts | ({"quantized weights": int(quantized * BITS[model.quantize] / 8)} if quantized else {})


def largest_piece(model: Model) -> int:
    """Parameters of what a streamed training holds at a time: of the largest layer, or of the output head."""
    geometry = family_of(model.config).geometry(model.config)
    return max(geometry.vocab * geometry.hidden, largest_layer(model))


def largest_layer(model: Model) -> int:
    """Parameters of the Linears of the largest layer."""
    layers = layers_of(model.config, model.widths)
    return max(sum(out * into for out, into in layer.linears.values()) for layer in layers)


def lora_parts(model: Model, work: Workload) -> dict[str, int]:
    """LoRA in fp32 (autocast keeps a 16-bit copy for the step), its gradients, the optimizer's state, and the bits of
    a masked update, which takes LoRA as it is."""
    layers = layers_of(model.config, model.widths)
    chosen = [layer for layer in layers if not work.layers or layer.number in work.layers]
    shapes = [shape for each in chosen for name, shape in each.linears.items() if is_target(name, work.targets)]
    ends = lora_parameters(model.config, work.rank, tuple(t for t in work.targets if t in ENDS))
    found = sum(out + into for out, into in shapes) * work.rank + ends
    trained = sum(out for out, _ in shapes) * work.rank if work.frozen_a else found
    copied = (ends if work.masked_update else found) * (work.value_bytes if work.mixed else 0)
    masks = {"masks": sum(out * -(-into // 8) for out, into in shapes)} if work.masked_update else {}
    return {
        "lora": found * 4 + copied,
        "gradients": trained * 4,
        "optimizer": trained * OPTIMIZER_BYTES.get(work.optimizer, 8),
    } | masks


def step_parts(model: Model, work: Workload, hardware: Hardware) -> dict[str, int]:
    """What comes and goes in a step: the larger one of the loss and of the widest layer's backward pass."""
    geometry = family_of(model.config).geometry(model.config)
    layers = layers_of(model.config, model.widths)
    kept = [kept_by_layer(layer, work, hardware.mask_bytes, model.quantize) for layer in layers]
    inputs = work.tokens * geometry.hidden * work.value_bytes * len(layers)
    # With checkpointing only the layers' inputs are kept, and one layer at a time is computed again.
    base, again = (inputs, max(kept)) if work.checkpointing else (sum(kept), 0)
    base += work.tokens * (geometry.hidden + 1) * 4  # the last norm's input
    loss = loss_bytes(geometry, work, soft_cap=bool(model.config.get("final_logit_softcapping")))
    backward = backward_bytes(layers, work) + dequantized_bytes(layers, work, model) + product_bytes(layers, work)
    if loss > again + backward:
        return {"activations": base, "logits and loss": loss}
    return {"activations": base + again, "backward pass": backward}


def dequantized_bytes(layers: list[Layer], work: Workload, model: Model) -> int:
    """The largest Linear in full, as bitsandbytes makes it for a product."""
    if model.quantize == "none":
        return 0
    return max(out * into for layer in layers for out, into in layer.linears.values()) * work.value_bytes


def loading_bytes(model: Model, work: Workload, hardware: Hardware) -> int:
    """Beside the weights while they are loaded: the file's pages where it holds another dtype."""
    if work.streamed or not hardware.maps_files or model.stored == work.dtype:
        return 0
    counts = count(model.config, model.widths)
    quantized = counts.linear if model.quantize != "none" else 0
    return int((counts.total - quantized) * VALUE_BYTES[model.stored] + quantized * BITS[model.quantize] / 8)


def forward_memory(model: Model, work: Workload) -> MemoryPlan:
    """What a whole model takes to be measured, beside what the process holds already; estimated from above.

    No gradients: a layer's widest values come and go, and a chunk of logits.
    """
    geometry = family_of(model.config).geometry(model.config)
    layers = layers_of(model.config, model.widths)
    widest = max(3 * layer.channels + 2 * layer.queries + 2 * layer.keys for layer in layers) + 3 * geometry.hidden
    scores = max(layer.heads for layer in layers) * work.length * 2 if work.attention == "eager" else 0
    rows = min(work.tokens, chunk_rows(geometry.vocab))
    weights = {key: value for key, value in resident(model, work, CPU).items() if key != "runtime"}
    return MemoryPlan(
        weights
        | {
            "activations": work.tokens * (widest + scores) * work.value_bytes,
            "logits and loss": rows * geometry.vocab * 4 * 2 + work.tokens * geometry.hidden * work.value_bytes,
        }
    )


def streaming_memory() -> MemoryPlan:
    """Random and magnitude pruning, quantizing and merging: a few tiles, whatever the model's size."""
    return MemoryPlan({"runtime": CPU.streaming, "tiles": TILE})


def recovery_memory(config: Mapping[str, Any], rank: int, targets: tuple[str, ...]) -> MemoryPlan:
    """Recover: the adapter twice (small and large), fp32."""
    return MemoryPlan({"runtime": CPU.streaming, "adapters": lora_parameters(config, rank, targets) * 4 * 3})
