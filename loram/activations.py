"""What a training step holds beside the weights: what autograd keeps, what a layer's backward pass needs, the loss.

No torch: the sums follow the stock layers with peft's LoRA on them, operation by operation. What an operation keeps
for its backward pass is found with `torch.autograd.graph.saved_tensors_hooks`, and a test does so again for every
family (tests/test_activations.py): the formula of `kept_by_layer` is exact there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loram.families import Family, Geometry, family_of
from loram.families.family import HEAD, HIDDEN
from loram.families.widths import Widths
from loram.sizes import VALUE_BYTES, extent, is_target

CHUNK_BYTES = 2**26
"""fp32 logits that exist at a time; loram.training.cross_entropy takes it from here."""
MIN_ROWS = 16
PRODUCT_TILE, PRODUCT_BYTES = 2**22, 11
"""Entries of a masked update that exist at a time (loram.training.masked_product takes it from here), and what each of
them takes: its fp32 value, its bit looked up as bytes, and the mask made of them."""
LORA_INPUTS = {"q_proj": "norm", "k_proj": "norm", "v_proj": "norm", "gate_proj": "mlp norm", "up_proj": "mlp norm"}
"""Linears that read the same tensor."""


@dataclass(frozen=True)
class Workload:
    """What a training step does, as far as memory is concerned: `batch` rows of `length` tokens.

    `masked`: rows are padded or packed, so that attention is given a mask. `frozen_a`: LoRA-FA, which trains B alone.
    `layers`: the decoder layers that are adapted (none named: all). `supervised`: positions that carry loss.
    `masked_update`: the updates themselves are masked, as on a model whose single weights were pruned. `streamed`: one
    layer's weights are in memory at a time, and layers are computed again as with checkpointing.
    """

    batch: int
    length: int
    rank: int = 8
    targets: tuple[str, ...] = ("all-linear",)
    dtype: str = "bf16"
    checkpointing: bool = False
    dropout: float = 0.05
    optimizer: str = "adamw_torch"
    frozen_a: bool = False
    masked: bool = False
    attention: str = "sdpa"
    layers: tuple[int, ...] = ()
    supervised: int | None = None
    masked_update: bool = False
    streamed: bool = False

    @property
    def value_bytes(self) -> int:
        """Bytes of a value that is computed with."""
        return VALUE_BYTES[self.dtype]

    @property
    def mixed(self) -> bool:
        """Whether the step runs under autocast: 16-bit values over fp32 LoRA weights and norms."""
        return self.value_bytes < 4

    @property
    def tokens(self) -> int:
        """Positions in a forward pass, padding included."""
        return self.batch * self.length


@dataclass(frozen=True)
class Layer:
    """The sizes of one decoder layer at its widths."""

    family: Family
    geometry: Geometry
    widths: Widths | None
    number: int
    window: int | None = None
    """Tokens that its attention looks back at; None for all."""

    @cached_property
    def kv_heads(self) -> int:
        """Key/value heads that are left."""
        return self.geometry.kv_heads if self.widths is None else self.widths.kv_heads[self.number]

    @cached_property
    def channels(self) -> int:
        """MLP channels that are left."""
        return self.geometry.mlp if self.widths is None else self.widths.mlp[self.number]

    @property
    def keys(self) -> int:
        """Width of all keys, or of all values, of a token."""
        return self.kv_heads * self.geometry.head_dim

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.kv_heads * self.geometry.group

    @property
    def heads(self) -> int:
        """Query heads that are left."""
        return self.queries // self.geometry.head_dim

    @property
    def fused(self) -> int:
        """Width of the one Linear that makes queries, keys and values; 0 where there are three."""
        return self.linears.get("qkv_proj", (0, 0))[0]

    @property
    def norms(self) -> int:
        """Norms over the hidden width."""
        return sum(weight.rows == HIDDEN and not weight.columns for weight in self.family.layer)

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normed head by head."""
        return any(weight.rows == HEAD for weight in self.family.layer)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the Linears, by their last names."""
        return {
            weight.name.rpartition(".")[2]: tuple(  # type: ignore[misc]
                extent(dimension, self.geometry, self.widths, self.number)
                for dimension in (weight.rows, weight.columns)
            )
            for weight in self.family.linears
        }


def layers_of(config: Mapping[str, Any], widths: Widths | None) -> list[Layer]:
    """Every decoder layer of a model."""
    family = family_of(config)
    geometry = family.geometry(config)
    return [Layer(family, geometry, widths, layer, window_of(config, layer)) for layer in range(geometry.layers)]


def window_of(config: Mapping[str, Any], number: int) -> int | None:
    """The sliding window of a layer; a config without `layer_types` has one for all layers, or none at all."""
    kinds: Any = config.get("layer_types") or ()
    if number < len(kinds) and kinds[number] != "sliding_attention":
        return None
    # Configs that have `max_window_layers` use their window only where they say so.
    used = config.get("use_sliding_window", "max_window_layers" not in config)
    return config.get("sliding_window") if used else None


def kept_by_layer(layer: Layer, work: Workload, mask_bytes: int, quantize: str = "none") -> int:
    """Bytes that autograd keeps of one layer from its forward to its backward pass.

    `mask_bytes`: of an element of a dropout mask (the CPU makes it in fp32, CUDA as bytes). bitsandbytes keeps the
    input of an int8 Linear, and none of an nf4 one.
    """
    hidden, value = layer.geometry.hidden, work.value_bytes
    if work.layers and layer.number < min(work.layers):
        return 0  # no gradient goes below the first adapted layer
    token = layer.norms * (hidden + 1) * 4  # the input, in fp32, and one over its root mean square
    if layer.head_norms:
        token += (layer.queries + layer.keys + layer.heads + layer.kv_heads) * 4
    token += 3 * layer.channels * value  # gate, its activation, up
    token += kept_by_attention(layer, work) + kept_by_lora(layer, work, mask_bytes)
    if quantize == "int8":
        token += sum(into for _, into in layer.linears.values()) * value
    return token * work.tokens


def kept_by_attention(layer: Layer, work: Workload) -> int:
    """Per token: queries, keys, values, and either the result with its log-sum-exp, or the probabilities."""
    value = work.value_bytes
    if work.attention == "eager":
        # Keys and values are repeated for every query head; the softmax is fp32, and cast under autocast.
        probabilities = layer.heads * work.length * (4 + (value if work.mixed else 0))
        return 3 * layer.queries * value + probabilities
    keys, values = layer.keys, layer.fused or layer.keys  # a view keeps all that it looks into
    mask = 0
    if work.masked or (layer.window is not None and work.length > layer.window):
        keys = values = layer.queries  # no grouped kernel takes a mask: keys and values are repeated
        mask = work.length * value
    return (2 * layer.queries + keys + values) * value + layer.heads * 4 + mask


def kept_by_lora(layer: Layer, work: Workload, mask_bytes: int) -> int:
    """Per token: of each adapted Linear the dropout mask, A's input and B's; a masked update has no B's."""
    value, total = work.value_bytes, 0
    if work.layers and layer.number not in work.layers:
        return 0
    shared: set[str] = set()
    for name, (_, columns) in layer.linears.items():
        if not is_target(name, work.targets):
            continue
        total += 0 if work.masked_update else work.rank * value
        if work.dropout:
            total += columns * mask_bytes
        if work.frozen_a:
            continue
        if work.dropout or work.mixed:  # a copy of its own: masked, or cast up by peft and down by autocast
            total += columns * value
            continue
        source = LORA_INPUTS.get(name, name)
        if source not in shared and not (name == "o_proj" and work.attention == "sdpa" and not layer.fused):
            total += columns * value
        shared.add(source)
    return total


def backward_bytes(layers: Sequence[Layer], work: Workload) -> int:
    """Gradients that exist at a time in the backward pass of the widest layer.

    Of down's input there is one gradient through the frozen weight and one through LoRA, which is fp32 under
    autocast and there once more with the dropout mask on it; at a norm there are five of the hidden width.
    """
    value = work.value_bytes
    through_lora = 4 * (2 if work.mixed and work.dropout else 1)
    channels = max(layer.channels for layer in layers)
    hidden = layers[0].geometry.hidden
    return work.tokens * max(channels * (value + through_lora) + 2 * hidden * value, 5 * hidden * 4)


def product_bytes(layers: Sequence[Layer], work: Workload) -> int:
    """A tile of a masked update, while it is made and masked."""
    if not work.masked_update:
        return 0
    largest = max(out * into for layer in layers for out, into in layer.linears.values())
    return min(PRODUCT_TILE, largest) * PRODUCT_BYTES


def loss_bytes(geometry: Geometry, work: Workload, *, soft_cap: bool) -> int:
    """The chunked loss: a chunk's logits in fp32 and their exponentials (and the cap's slope), and the hidden states
    that carry loss with their gradient."""
    carry = work.tokens if work.supervised is None else work.supervised
    rows = min(carry, chunk_rows(geometry.vocab))
    return rows * geometry.vocab * 4 * (3 if soft_cap else 2) + 2 * carry * geometry.hidden * work.value_bytes


def chunk_rows(vocabulary: int) -> int:
    """Positions whose logits exist at a time."""
    return max(MIN_ROWS, CHUNK_BYTES // (4 * vocabulary))
