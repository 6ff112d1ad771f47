"""Gemma 3, text only: head_dim is not hidden/heads, embeddings are tied, four norms per layer."""

from __future__ import annotations

from loram.families.family import HIDDEN, Family, Weight
from loram.families.llama import HEAD_NORMS, LAYER_NORMS, attention, gated_mlp

GEMMA3 = Family(
    name="gemma3",
    config_class="Gemma3TextConfig",
    model_class="Gemma3ForCausalLM",
    layer=(
        *attention("attention_bias", "attention_bias"),
        *gated_mlp(),
        *HEAD_NORMS,
        *LAYER_NORMS,
        Weight("pre_feedforward_layernorm", HIDDEN),
        Weight("post_feedforward_layernorm", HIDDEN),
    ),
    required=("num_key_value_heads", "head_dim"),
    tied=True,
    adds_outputs=False,
)
