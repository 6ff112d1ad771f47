"""Phi-3: q, k and v are one Linear, gate and up another; its attention reads head counts from the config."""

from __future__ import annotations

from loram.families.family import CHANNELS, HIDDEN, KEYS, QUERIES, Family, Weight
from loram.families.llama import LAYER_NORMS

PHI3 = Family(
    name="phi3",
    config_class="Phi3Config",
    model_class="Phi3ForCausalLM",
    layer=(
        Weight("self_attn.qkv_proj", (*QUERIES, *KEYS, *KEYS), HIDDEN),
        Weight("self_attn.o_proj", HIDDEN, QUERIES),
        Weight("mlp.gate_up_proj", (*CHANNELS, *CHANNELS), HIDDEN),
        Weight("mlp.down_proj", HIDDEN, CHANNELS),
        *LAYER_NORMS,
    ),
    per_layer_config=True,
    layer_counts=(("self_attn.num_key_value_heads", "kv_heads"),),
)
