"""The LoRAM identity in numbers, and the checks that `verify` reports.

cut(large) + small adapter ≡ large with the pruned rows and columns zeroed + recovered adapter
(2502.13533); a dropped layer is one whose o and down are zero, so that it passes its input on. It speaks of the cut
large weights, so it holds whatever refit, alignment or quantization did to the small model afterwards. Where training
masked the update, both sides of it count where the masks are on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loram.adapter import Adapter
from loram.families.small import without_layers
from loram.masks import Masks
from loram.masks import masked as under
from loram.modeling import load_model, small_classes
from loram.pruning_map import PruningMap


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str = ""


@torch.no_grad()
def identity_gap(
    large: str, pruning_map: PruningMap, adapters: tuple[Adapter, Adapter], tokens: Tensor, *, masked: bool = False
) -> float:
    """Largest logit difference between the two sides of the identity, relative to the largest logit.

    `adapters`: the small one and the recovered one; `tokens` is (rows, length). Both sides are computed in fp32; about
    three copies of the large model are in memory. `masked`: both updates count where the masks are on.
    """
    small_adapter, recovered = adapters
    model = load_model(large, dtype="fp32")
    untie(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    zeroed = {n: pruning_map.twin(_module(n), t) for n, t in state.items()}
    apply_adapter(zeroed, recovered, pruning_map.mask if masked else None)
    model.load_state_dict(zeroed)
    expected = model(input_ids=tokens, use_cache=False).logits
    config = dict(model.config.to_dict())
    del model, zeroed
    masks = pruning_map.mask_in_small if masked else None
    small = cut_model(config, pruning_map, state, small_adapter, masks)
    found = small(input_ids=tokens, use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max())


def cut_model(
    config: Mapping[str, Any],
    pruning_map: PruningMap,
    state: Mapping[str, Tensor],
    adapter: Adapter,
    masks: Masks | None,
) -> PreTrainedModel:
    """cut(large) with the small adapter added to its weights, as a transformers model in fp32."""
    widths, numbering = pruning_map.widths, pruning_map.numbering
    config_class, model_class = small_classes(str(config["model_type"]))
    config = without_layers(config, numbering.kept)
    values = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "dtype")}
    values["loram_widths"] = {"kv_heads": list(widths.kv_heads), "mlp": list(widths.mlp)}
    small: PreTrainedModel = model_class(config_class(**values))
    untie(small)
    names = {name: new for name in state if (new := numbering.to_small(name)) is not None}
    weights = {new: pruning_map.cut(_module(name), state[name]) for name, new in names.items()}
    apply_adapter(weights, adapter, masks)
    small.load_state_dict(weights)
    return small


def untie(model: PreTrainedModel) -> None:
    """Ready to be read, the head with weights of its own: PEFT's update of an embedding does not reach a tied head."""
    model.train(False)
    head: Any = model.get_submodule("lm_head")
    embedding: Any = model.get_submodule("model.embed_tokens")
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def apply_adapter(weights: dict[str, Tensor], adapter: Adapter, masks: Masks | None = None) -> None:
    """Add every module's s·B·A to `weights`, in place of the entries it touches; where there are masks, under them."""
    for module, pair in adapter.pairs.items():
        delta = pair.scale * (pair.b.float() @ pair.a.float())
        mask = masks(module) if masks is not None else None
        delta = delta if mask is None else under(delta, mask)
        name = f"{module}.weight"
        weights[name] = weights[name] + (delta.T if pair.embedding else delta)


def nonzero_shares(adapter: Adapter) -> dict[str, float]:
    """Per decoder layer (and per module outside the layers): share of its modules whose update is not zero."""
    found: dict[str, list[bool]] = {}
    for module, pair in adapter.pairs.items():
        match = re.search(r"layers\.\d+", module)
        found.setdefault(match[0] if match else module, []).append(bool(pair.a.any()) and bool(pair.b.any()))
    return {place: sum(alive) / len(alive) for place, alive in found.items()}


def _module(name: str) -> str:
    return name.rpartition(".")[0]
