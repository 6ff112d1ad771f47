"""Llama and its close relatives: separate q/k/v and gate/up projections.

llama: Llama 1-3, SmolLM, TinyLlama, and what else calls itself `llama`. mistral: without experts.
qwen2: biases on q, k and v. qwen3: norms of head_dim on q and k, shared by all heads and so never cut.
"""

from __future__ import annotations

from dataclasses import replace

from loram.families.family import CHANNELS, HEAD, HIDDEN, KEYS, QUERIES, Family, Weight


def attention(bias: bool | str, o_bias: bool | str) -> tuple[Weight, ...]:
    """Separate q, k, v and o projections."""
    return (
        Weight("self_attn.q_proj", QUERIES, HIDDEN, bias),
        Weight("self_attn.k_proj", KEYS, HIDDEN, bias),
        Weight("self_attn.v_proj", KEYS, HIDDEN, bias),
        Weight("self_attn.o_proj", HIDDEN, QUERIES, o_bias),
    )


def gated_mlp(bias: bool | str = False) -> tuple[Weight, ...]:
    """Separate gate, up and down projections."""
    return (
        Weight("mlp.gate_proj", CHANNELS, HIDDEN, bias),
        Weight("mlp.up_proj", CHANNELS, HIDDEN, bias),
        Weight("mlp.down_proj", HIDDEN, CHANNELS, bias),
    )


LAYER_NORMS = (Weight("input_layernorm", HIDDEN), Weight("post_attention_layernorm", HIDDEN))
HEAD_NORMS = (Weight("self_attn.q_norm", HEAD), Weight("self_attn.k_norm", HEAD))

LLAMA = Family(
    name="llama",
    config_class="LlamaConfig",
    model_class="LlamaForCausalLM",
    layer=(*attention("attention_bias", "attention_bias"), *gated_mlp("mlp_bias"), *LAYER_NORMS),
)
MISTRAL = replace(
    LLAMA,
    name="mistral",
    config_class="MistralConfig",
    model_class="MistralForCausalLM",
    layer=(*attention(False, False), *gated_mlp(), *LAYER_NORMS),
    required=("num_key_value_heads",),
)
QWEN2 = replace(
    MISTRAL,
    name="qwen2",
    config_class="Qwen2Config",
    model_class="Qwen2ForCausalLM",
    layer=(*attention(True, False), *gated_mlp(), *LAYER_NORMS),
)
QWEN3 = replace(
    MISTRAL,
    name="qwen3",
    config_class="Qwen3Config",
    model_class="Qwen3ForCausalLM",
    layer=(*attention("attention_bias", "attention_bias"), *gated_mlp(), *HEAD_NORMS, *LAYER_NORMS),
    required=("num_key_value_heads", "head_dim"),
)
