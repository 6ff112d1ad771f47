"""LoRA on a model through peft: which modules, with which seed, and what is saved.

The seed is set before wrapping, because that is when A is drawn. LoRA weights are fp32 also on a
bf16 base. Saving never takes base weights along (peft does for lm_head and embeddings by itself).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from loram.errors import OptionError
from loram.options import TrainOptions, did_you_mean

ALL_LINEAR = "all-linear"


def wrap(model: PreTrainedModel, options: TrainOptions) -> PeftModel:
    """The model with fresh LoRA weights; the base is frozen."""
    config = lora_config(model, options)
    set_seed(options.seed)
    with without_peft_noise():
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    assert isinstance(wrapped, PeftModel)
    return wrapped


@contextmanager
def without_peft_noise() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 by a deprecated name, which no user of loram can do anything about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def lora_config(model: PreTrainedModel, options: TrainOptions) -> LoraConfig:
    """The peft configuration that the options ask for, with the targets spelled out."""
    return LoraConfig(
        r=options.rank,
        # Whole numbers are written as such: some readers of adapter_config.json want an integer.
        lora_alpha=int(options.alpha) if float(options.alpha).is_integer() else options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        target_modules=resolve_targets(model, options.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def resolve_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> list[str]:
    """Module names for peft, sorted; OptionError names what can be adapted where a name is unknown."""
    if not targets:
        raise OptionError(f"--targets is empty; give {ALL_LINEAR} or module names")
    linears = leaf_names(model, (nn.Linear,))
    names: set[str] = set()
    for target in targets:
        if target == ALL_LINEAR:
            names |= linears
        elif any(matches(target, name) for name, _ in adaptable(model)):
            names.add(target)
        else:
            known = sorted(leaf_names(model, (nn.Linear, nn.Embedding), head=True))
            raise OptionError(
                f"--targets has {target!r}, which no module of this model is called; expected {ALL_LINEAR} or some of "
                + ", ".join(known)
                + did_you_mean(target, known)
            )
    return sorted(names)


def adaptable(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Every module that LoRA can sit on, by its full name."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Embedding))]


def leaf_names(model: PreTrainedModel, kinds: tuple[type[nn.Module], ...], *, head: bool = False) -> set[str]:
    """Last parts of the names of modules of these kinds; the output head only if asked for."""
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = [(name, part) for name, part in adaptable(model) if isinstance(part, kinds)]
    return {name.rpartition(".")[2] for name, part in found if head or part is not output}


def matches(target: str, name: str) -> bool:
    """peft's own rule: the whole name or its end, part by part."""
    return name == target or name.endswith("." + target)


def save_adapter(model: PeftModel, folder: Path, base_name: str) -> None:
    """adapter_config.json and adapter_model.safetensors, and nothing else (peft adds a placeholder card)."""
    state: dict[str, Any] = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(state.items())}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = model.peft_config["default"]
    training = config.target_modules, config.inference_mode, config.base_model_name_or_path
    # peft keeps the targets as a set, whose order differs between processes; a list keeps files equal.
    config.target_modules, config.inference_mode = sorted(config.target_modules), True
    config.base_model_name_or_path = base_name
    config.save_pretrained(str(folder))
    config.target_modules, config.inference_mode, config.base_model_name_or_path = training
