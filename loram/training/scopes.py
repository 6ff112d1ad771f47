"""What alignment trains: all weights but the output head, LoRA that is merged back, or norms and biases alone.

The head stays as it is in any scope (2502.13533 freezes it, too): the distributions of small and large model are then
functions of the same space. Where embedding and head are one weight, it is frozen as both.
Trained weights are fp32, read from the checkpoint as they are stored; the others have the dtype that is computed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loram.adapter import LoraPair
from loram.checkpoint import Checkpoint
from loram.masks import Masks
from loram.merging import TileDelta

LORA_ALPHA = 2.0
"""Alpha over rank of the alignment's LoRA."""


def trained_names(model: Any, scope: str) -> list[str]:
    """The names of the weights that `all` or `norms` trains."""
    fixed = {id(part.weight) for part in (model.get_output_embeddings(),) if part is not None}
    found = [name for name, value in model.named_parameters() if id(value) not in fixed]
    if scope == "norms":
        vectors = {name for name, value in model.named_parameters() if value.dim() == 1}
        found = [name for name in found if name in vectors]
    return found


def prepare(model: Any, names: list[str], checkpoint: Checkpoint) -> dict[str, nn.Parameter]:
    """Freeze everything but the named weights and make those fp32, by name."""
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name in names:
        value = parameters[name]
        value.data = checkpoint.read(name).to(value.device, torch.float32)
        value.requires_grad_(True)
    return {name: parameters[name] for name in names}


def add_lora(model: Any, rank: int, seed: int, masks: Masks | None = None) -> dict[str, nn.Parameter]:
    """LoRA on every Linear but the head, its updates masked where there are masks; its factors by name.

    The model is wrapped in place.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from loram.training.lora import leaf_names, without_peft_noise
    from loram.training.masked_lora import mask_updates

    targets = sorted(leaf_names(model, (nn.Linear,)))
    config = LoraConfig(
        r=rank,
        lora_alpha=int(LORA_ALPHA * rank),
        lora_dropout=0.0,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    if masks is not None:
        mask_updates(config, masks)
    set_seed(seed)
    with without_peft_noise():
        get_peft_model(model, config, autocast_adapter_dtype=True)
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def merged_lora(factors: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights that LoRA sat on, with its update: W + s·B·A in fp32, by the checkpoint's names."""
    merged = {}
    for name, a in factors.items():
        if ".lora_A." not in name:
            continue
        module, _, rest = name.partition(".lora_A.")
        b = factors[f"{module}.lora_B.{rest}"]
        delta = TileDelta.of(LoraPair(a.detach().cpu().float(), b.detach().cpu().float(), LORA_ALPHA))
        weight = checkpoint.read(f"{module}.weight").float()
        merged[f"{module}.weight"] = weight.add_(delta.rows(0, weight.shape[0], torch.empty_like(weight)))
    return merged
