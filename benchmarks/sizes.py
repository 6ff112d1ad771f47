"""The two sizes that a benchmark runs at, and the shapes of the random models it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model: what its config.json says."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self) -> dict[str, Any]:
        """The config.json of a stock, untied Llama in bf16."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


@dataclass(frozen=True)
class Size:
    """How big the benchmark is; `judged` is whether its figures are held against the goals."""

    checkpoint: Shape
    trained: Shape
    stepped: Shape
    narrow: Shape
    wide: Shape
    deep: Shape
    huge: Shape
    real: Shape
    rank: int
    rounds: int
    help_rounds: int
    steps: int
    batch: int
    length: int
    step_batch: int
    step_length: int
    samples: int
    sample_length: int
    limited_samples: int
    limited_length: int
    judged: bool


SIZES = {
    # A smoke run: start-up is all of it, so no goal is judged.
    "tiny": Size(
        checkpoint=Shape(hidden=128, mlp=352, layers=4, heads=8, kv_heads=2, vocab=1000),
        trained=Shape(hidden=64, mlp=176, layers=4, heads=4, kv_heads=2, vocab=1024),
        stepped=Shape(hidden=64, mlp=176, layers=4, heads=4, kv_heads=2, vocab=2000),
        narrow=Shape(hidden=64, mlp=176, layers=4, heads=4, kv_heads=2, vocab=2000),
        wide=Shape(hidden=128, mlp=352, layers=4, heads=4, kv_heads=2, vocab=2000),
        deep=Shape(hidden=64, mlp=176, layers=8, heads=4, kv_heads=2, vocab=2000),
        huge=Shape(hidden=128, mlp=352, layers=8, heads=4, kv_heads=2, vocab=2000),
        real=Shape(hidden=128, mlp=352, layers=8, heads=4, kv_heads=2, vocab=2000),
        rank=4,
        rounds=1,
        help_rounds=2,
        steps=3,
        batch=2,
        length=32,
        step_batch=2,
        step_length=64,
        samples=2,
        sample_length=32,
        limited_samples=2,
        limited_length=32,
        judged=False,
    ),
    # 1.1 billion parameters to merge and prune (the shape of TinyLlama), 125 million to train on; for the step beside
    # the stock Trainer, four layers of SmolLM2-135M's shape under its vocabulary; 40 and 168 million whose memory is
    # predicted; layers of 3 million to stack; 2.2 billion (4 GiB) to prune where memory is limited; and the shape of
    # Llama-3.1-8B for every stage.
    "full": Size(
        checkpoint=Shape(hidden=2048, mlp=5632, layers=22, heads=32, kv_heads=4, vocab=32000),
        trained=Shape(hidden=768, mlp=2048, layers=12, heads=12, kv_heads=4, vocab=32000),
        stepped=Shape(hidden=576, mlp=1536, layers=4, heads=9, kv_heads=3, vocab=49152),
        narrow=Shape(hidden=512, mlp=1408, layers=8, heads=8, kv_heads=4, vocab=16000),
        wide=Shape(hidden=1024, mlp=2816, layers=12, heads=16, kv_heads=4, vocab=16000),
        deep=Shape(hidden=512, mlp=1408, layers=8, heads=8, kv_heads=4, vocab=4000),
        huge=Shape(hidden=2048, mlp=5632, layers=46, heads=32, kv_heads=4, vocab=32000),
        real=Shape(hidden=4096, mlp=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
        rank=16,
        rounds=3,
        help_rounds=15,
        steps=6,
        batch=4,
        length=256,
        step_batch=8,
        step_length=512,
        samples=8,
        sample_length=512,
        limited_samples=8,
        limited_length=64,
        judged=True,
    ),
}
