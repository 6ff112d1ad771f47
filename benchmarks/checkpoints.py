"""Random checkpoints and adapters, written tensor by tensor (in a child: this imports torch)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.sizes import Shape

SHARD_LAYERS = 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of the Linears of a decoder layer, by their names inside it."""
    rows = shape.hidden // shape.heads * shape.kv_heads
    return {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (rows, shape.hidden),
        "self_attn.v_proj": (rows, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.mlp, shape.hidden),
        "mlp.up_proj": (shape.mlp, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.mlp),
    }


def shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, a dict per shard: embeddings, some layers at a time, norm and head."""
    yield {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for first in range(0, shape.layers, SHARD_LAYERS):
        names: dict[str, tuple[int, ...]] = {}
        for layer in range(first, min(first + SHARD_LAYERS, shape.layers)):
            names |= {f"model.layers.{layer}.{name}.weight": size for name, size in linears(shape).items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                names[f"model.layers.{layer}.{norm}.weight"] = (shape.hidden,)
        yield names
    yield {"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocab, shape.hidden)}


def write_base(shape: Shape, folder: Path) -> int:
    """A sharded bf16 checkpoint with an index; its number of parameters."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    layout = list(shards(shape))
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(layout, start=1):
        file = f"model-{number:05}-of-{len(layout):05}.safetensors"
        tensors = {name: random_weight(size, generator) for name, size in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")
    return total


def random_weight(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms are ones, everything else is small and normal."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) * 0.02).to(torch.bfloat16)


def write_adapter(shape: Shape, rank: int, base: str, folder: Path) -> None:
    """A PEFT folder with random A and B on every Linear, as PEFT names them."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in linears(shape).items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": list(LINEARS),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
