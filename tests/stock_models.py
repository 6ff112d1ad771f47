"""Tiny stock models of every family, and what the tests know about them without asking loram.

The layout facts below (which rows belong to which head, which module carries which bias) are written down a
second time on purpose: they are the oracle that the tables of loram.families are compared with.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

LAYERS, HIDDEN, HEADS, MLP, VOCABULARY = 3, 48, 4, 40, 64
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
}
SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
BIASED = {"attention_bias": True, "mlp_bias": True}


def heads(kv_heads: int, **more: Any) -> dict[str, Any]:
    return {"num_key_value_heads": kv_heads, **more}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", heads(2)),
    "llama-mha": ("llama", heads(4, head_dim=16, tie_word_embeddings=True, **BIASED)),
    "llama-mqa": ("llama", heads(1, **BIASED)),
    "mistral-gqa": ("mistral", heads(2, head_dim=16, sliding_window=8)),
    "mistral-mha": ("mistral", heads(4, tie_word_embeddings=True)),
    "mistral-mqa": ("mistral", heads(1)),
    "qwen2-gqa": ("qwen2", heads(2)),
    "qwen2-mha": ("qwen2", heads(4, tie_word_embeddings=True)),
    "qwen2-mqa": ("qwen2", heads(1)),
    "qwen3-gqa": ("qwen3", heads(2, head_dim=16)),
    "qwen3-mha": ("qwen3", heads(4, head_dim=12, tie_word_embeddings=True, attention_bias=True)),
    "qwen3-mqa": ("qwen3", heads(1, head_dim=8)),
    "gemma3_text-gqa": ("gemma3_text", heads(2, **GEMMA)),
    "gemma3_text-mha": ("gemma3_text", heads(4, **GEMMA)),
    "gemma3_text-mqa": ("gemma3_text", heads(1, **GEMMA, tie_word_embeddings=False)),
    "phi3-gqa": ("phi3", heads(2, pad_token_id=0)),
    "phi3-mha": ("phi3", heads(4, pad_token_id=0, tie_word_embeddings=True)),
    "phi3-mqa": ("phi3", heads(1, pad_token_id=0)),
}
GROUPED = [name for name in VARIANTS if name.endswith("-gqa")]
Kept = dict[int, tuple[list[int], list[int]]]
"""Per cut layer: the kv heads and the MLP channels that stay."""


def make(name: str) -> Any:
    """The stock model, with random numbers also where the stock classes put zeros or ones."""
    model_type, changes = VARIANTS[name]
    config_class, model_class = (getattr(transformers, found) for found in CLASSES[model_type])
    values = {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = model_class(config_class(**{**values, **changes})).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() == 2 else parameter + 0.3 * noise)
    return model


def build(name: str, folder: Path, **save: Any) -> Path:
    """The stock model of this name in a folder, as transformers writes it."""
    make(name).save_pretrained(folder, **save)
    return folder


def raw_config(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return body


def leaves(name: str) -> tuple[str, ...]:
    """The names of a decoder layer's Linears."""
    return FUSED if VARIANTS[name][0] == "phi3" else SEPARATE


def kv_heads(name: str) -> int:
    found: int = VARIANTS[name][1]["num_key_value_heads"]
    return found


def head_dim(name: str) -> int:
    found: int = VARIANTS[name][1].get("head_dim", HIDDEN // HEADS)
    return found


def random_kept(name: str, seed: int) -> Kept:
    """Layer 0 whole; the others keep random heads and channels, of different counts."""
    draw = random.Random(seed)
    total = kv_heads(name)
    kept = {}
    for layer in range(1, LAYERS):
        few = sorted(draw.sample(range(total), max(1, draw.randint(1, max(total - 1, 1)))))
        kept[layer] = few, sorted(draw.sample(range(MLP), 11 + 5 * layer + draw.randint(0, 3)))
    return kept


def row_mask(name: str, leaf: str, kept: tuple[list[int], list[int]]) -> list[bool] | None:
    """Per row of a Linear's weight (and entry of its bias): does it stay? None for a dimension that is not cut."""
    stays_head, stays_channel = (set(part) for part in kept)
    width = head_dim(name)
    queries = [h // (HEADS // kv_heads(name)) in stays_head for h in range(HEADS) for _ in range(width)]
    keys = [k in stays_head for k in range(kv_heads(name)) for _ in range(width)]
    channels = [c in stays_channel for c in range(MLP)]
    return {
        "q_proj": queries,
        "k_proj": keys,
        "v_proj": keys,
        "qkv_proj": queries + keys + keys,
        "gate_proj": channels,
        "up_proj": channels,
        "gate_up_proj": channels + channels,
    }.get(leaf)


def column_mask(name: str, leaf: str, kept: tuple[list[int], list[int]]) -> list[bool] | None:
    """Per column of a Linear's weight: does it stay?"""
    if leaf == "o_proj":
        return row_mask(name, "q_proj", kept)
    return row_mask(name, "up_proj", kept) if leaf == "down_proj" else None


def masks(name: str, tensor: str, kept: Kept) -> tuple[list[bool] | None, list[bool] | None]:
    """Row and column mask of a tensor of the state dict, or of a module."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+?_proj)(?:\.(?:weight|bias))?", tensor)
    if match is None or int(match[1]) not in kept:
        return None, None
    units = kept[int(match[1])]
    return row_mask(name, match[2], units), column_mask(name, match[2], units)


def zero_pruned(name: str, state: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The large model's tensors with every pruned row and column set to zero."""
    zeroed = {}
    for tensor, value in state.items():
        value = value.clone()
        rows, columns = masks(name, tensor, kept)
        if rows is not None:
            value[~torch.tensor(rows)] = 0
        if columns is not None and value.dim() == 2:
            value[:, ~torch.tensor(columns)] = 0
        zeroed[tensor] = value
    return zeroed


def cut_by_hand(name: str, state: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """The large model's tensors without the pruned rows and columns."""
    small = {}
    for tensor, value in state.items():
        rows, columns = masks(name, tensor, kept)
        if rows is not None:
            value = value[torch.tensor(rows)]
        if columns is not None and value.dim() == 2:
            value = value[:, torch.tensor(columns)]
        small[tensor] = value
    return small


def tokens(seed: int = 0, rows: int = 2, length: int = 20) -> Tensor:
    """Random token ids; longer than the sliding windows above."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
