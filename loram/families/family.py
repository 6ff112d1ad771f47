"""What a family table is made of: weights, their dimensions, and the axes that run along them.

A dimension is a tuple of segments laid one after the other (fused projections have several). A segment
is `count` units of `width` rows each, both named after quantities of the model's Geometry. A segment
whose count is an axis is cut in whole units; any other is left whole. All shapes are (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loram.errors import FamilyError

AXES = ("kv_heads", "mlp")
BIASES_KEY = "loram_biases"
"""Of a small model's config: the layers in which a Linear that stands without a bias in the large one has one."""
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Geometry:
    """The sizes of one model, as its config gives them; `group` rows of q belong to one kv head."""

    layers: int
    hidden: int
    vocab: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @property
    def one(self) -> int:
        """Width of a unit that is a single row."""
        return 1

    @property
    def group(self) -> int:
        """Rows of the query heads that share one kv head: query head h belongs to kv head h // (H/K)."""
        return self.heads // self.kv_heads * self.head_dim

    def size(self, name: str) -> int:
        """A quantity by name."""
        return int(getattr(self, name))


@dataclass(frozen=True)
class Segment:
    """A stretch of a dimension: `count` units of `width` rows."""

    count: str
    width: str = "one"

    @property
    def axis(self) -> str | None:
        """The axis that cuts this segment, if one does."""
        return self.count if self.count in AXES else None


Dimension = tuple[Segment, ...]

HIDDEN: Dimension = (Segment("hidden"),)
VOCABULARY: Dimension = (Segment("vocab"),)
CHANNELS: Dimension = (Segment("mlp"),)
HEAD: Dimension = (Segment("head_dim"),)
QUERIES: Dimension = (Segment("kv_heads", "group"),)
KEYS: Dimension = (Segment("kv_heads", "head_dim"),)


@dataclass(frozen=True)
class Weight:
    """One module with a weight of shape (rows, columns); a norm has no columns.

    `bias` is True, False, or the config key that switches it on. A bias is cut with its rows.
    """

    name: str
    rows: Dimension
    columns: Dimension = ()
    bias: bool | str = False

    def has_bias(self, config: Mapping[str, Any], layer: int | None = None) -> bool:
        """Whether this model's config gives the module a bias; small models may have some in certain layers only."""
        if layer is not None and layer in config.get(BIASES_KEY, {}).get(self.name, ()):
            return True
        return bool(config.get(self.bias, False)) if isinstance(self.bias, str) else self.bias


@dataclass(frozen=True)
class Family:
    """A table for one group of architectures that share their weights' names and meanings."""

    name: str
    config_class: str
    model_class: str
    layer: tuple[Weight, ...]
    required: tuple[str, ...] = ()
    tied: bool = False
    per_layer_config: bool = False
    """The attention reads head counts from its config in `forward`: give each layer a copy of its own."""
    layer_counts: tuple[tuple[str, str], ...] = ()
    """Attributes of a layer's modules that hold an axis' size, as (path, axis)."""
    adds_outputs: bool = True
    """What o and down give is added to the residual stream as it is; False where a norm stands in between."""
    prefix: str = "model.layers."
    embedding: Weight = Weight("model.embed_tokens", VOCABULARY, HIDDEN)
    head: Weight = Weight("lm_head", VOCABULARY, HIDDEN)
    norm: Weight = Weight("model.norm", HIDDEN)

    @property
    def linears(self) -> tuple[Weight, ...]:
        """The decoder layer's Linear modules."""
        return tuple(weight for weight in self.layer if weight.columns)

    @property
    def outputs(self) -> tuple[Weight, ...]:
        """The Linears whose input is cut (o and down): where Wanda scores and the refit work."""
        return tuple(weight for weight in self.linears if any(segment.axis for segment in weight.columns))

    def module(self, layer: int, weight: Weight) -> str:
        """The full module name of a layer's weight."""
        return f"{self.prefix}{layer}.{weight.name}"

    def find(self, module: str) -> tuple[Weight, int | None]:
        """The table's entry and the layer number of a module; FamilyError for one not in the table."""
        for weight in (self.embedding, self.norm, self.head):
            if module == weight.name:
                return weight, None
        match = re.fullmatch(re.escape(self.prefix) + r"(\d+)\.(.+)", module)
        if match:
            for weight in self.layer:
                if weight.name == match[2]:
                    return weight, int(match[1])
        raise FamilyError(f"{module} is not a module of the {self.name} family; loram cannot tell how to cut it")

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """The sizes that a raw config.json gives; FamilyError where a key is missing or contradicts another."""
        optional = [key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None]
        for key in (*REQUIRED, *self.required, *optional):
            value = config.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                found = "is missing" if value is None else f"is {value!r}"
                raise FamilyError(f"config.json: {key} {found}; the {self.name} family needs it as a whole number")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        if heads % kv_heads:
            raise FamilyError(f"config.json: {heads} attention heads are not a multiple of {kv_heads} key/value heads")
        if not config.get("head_dim") and hidden % heads:
            raise FamilyError(
                f"config.json: hidden_size {hidden} is not a multiple of {heads} heads, and head_dim is missing"
            )
        return Geometry(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            vocab=config["vocab_size"],
            mlp=config["intermediate_size"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            tied=bool(config.get("tie_word_embeddings", self.tied)),
        )

    def tensors(self, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Dimension, ...], int | None]]:
        """Every tensor of a checkpoint: (name, its dimensions, its layer), in the order of the forward pass."""
        geometry = self.geometry(config)
        yield from _tensors_of(self.embedding, self.embedding.name, None, config)
        for layer in range(geometry.layers):
            for weight in self.layer:
                yield from _tensors_of(weight, self.module(layer, weight), layer, config)
        yield from _tensors_of(self.norm, self.norm.name, None, config)
        if not geometry.tied:
            yield from _tensors_of(self.head, self.head.name, None, config)


def _tensors_of(
    weight: Weight, module: str, layer: int | None, config: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Dimension, ...], int | None]]:
    shape = (weight.rows, weight.columns) if weight.columns else (weight.rows,)
    yield f"{module}.weight", shape, layer
    if weight.has_bias(config, layer):
        yield f"{module}.bias", (weight.rows,), layer
