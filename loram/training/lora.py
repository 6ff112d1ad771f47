"""LoRA on a model through peft: which modules, with which seed, and what is saved.

The seed is set before wrapping, because that is when A is drawn. LoRA weights are fp32 also on a
bf16 base. Saving never takes base weights along (peft does for lm_head and embeddings by itself).
A masked update is saved under names that nothing but loram reads: without its mask it is another adapter.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, set_seed

from loram.adapter import CONFIG, MASKED_TYPE, WEIGHTS, Adapter
from loram.artifact import read_json, write_json
from loram.errors import OptionError
from loram.masks import Masks
from loram.option_fields import did_you_mean, flag
from loram.options import TrainOptions
from loram.shards import write_tensors
from loram.train_options import parse_layers, parse_pattern
from loram.training.masked_lora import mask_updates, masked_modules

logger = logging.getLogger(__name__)
ALL_LINEAR = "all-linear"


def wrap(
    model: PreTrainedModel, options: TrainOptions, masks: Masks | None = None, first: Adapter | None = None
) -> PeftModel:
    """The model with LoRA weights, its updates masked where there are masks; the base is frozen.

    The weights are fresh, or those of `first`, whose ranks and targets the options then have.
    """
    config = lora_config(model, options)
    warn_of_tied_ends(model, config)
    if masks is not None:
        mask_updates(config, masks)
    set_seed(options.seed)
    with without_peft_noise():
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    assert isinstance(wrapped, PeftModel)
    return wrapped if first is None else with_factors(wrapped, first)


@contextmanager
def without_peft_noise() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 by a deprecated name, which no user of loram can do anything about; and what it
    says of tied embeddings, `warn_of_tied_ends` says in loram's words."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        yield


def lora_config(model: PreTrainedModel, options: TrainOptions) -> LoraConfig:
    """The peft configuration that the options ask for, with the targets spelled out."""
    targets = resolve_targets(model, options.targets)
    return LoraConfig(
        r=options.rank,
        lora_alpha=plain_number(options.alpha),  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        target_modules=targets,
        layers_to_transform=chosen_layers(model, options, targets),
        rank_pattern=pattern(model, "rank_pattern", options.rank_pattern, targets),
        alpha_pattern=pattern(model, "alpha_pattern", options.alpha_pattern, targets),
        init_lora_weights="gaussian" if options.init == "gaussian" else True,
        bias="none",
        task_type="CAUSAL_LM",
    )


def warn_of_tied_ends(model: PreTrainedModel, config: LoraConfig) -> None:
    """Say before the training what an adapter on one of two tied weights cannot be used for."""
    targets = config.target_modules or ()
    ends = [end for end in ("embed_tokens", "lm_head") if any(target.rpartition(".")[2] == end for target in targets)]
    if ends and model.config.tie_word_embeddings:
        logger.warning(
            "%s is one weight with the model's %s: the adapter will change one of the two and works with PEFT, but it "
            "cannot be merged, and servers do not read it; leave it out of --targets for that",
            ends[0],
            "lm_head" if ends[0] == "embed_tokens" else "embed_tokens",
        )


def plain_number(value: float) -> float:
    """Whole numbers as such: some readers of adapter_config.json want an integer."""
    return int(value) if float(value).is_integer() else value


def chosen_layers(model: PreTrainedModel, options: TrainOptions, targets: list[str]) -> list[int] | None:
    """The decoder layers that are adapted; None for all."""
    if not options.layers:
        return None
    layers, count = parse_layers(options.layers), int(model.config.num_hidden_layers)
    if layers[-1] >= count:
        raise OptionError(f"--layers names layer {layers[-1]}, and the model has the layers 0 to {count - 1}")
    outside = sorted({"embed_tokens", "lm_head"} & {target.rpartition(".")[2] for target in targets})
    if outside:
        raise OptionError(
            f"--layers is about decoder layers and --targets has {outside[0]}, which is in none; leave one"
        )
    return layers


def pattern(model: PreTrainedModel, name: str, texts: tuple[str, ...], targets: list[str]) -> dict[str, Any]:
    """A rank or alpha pattern, every key of which names a module that is adapted."""
    values = parse_pattern(name, texts)
    adapted = [module for module, _ in adaptable(model) if any(matches(target, module) for target in targets)]
    for key in values:
        if not any(matches(key, module) for module in adapted):
            known = sorted({module.rpartition(".")[2] for module in adapted})
            raise OptionError(
                f"--{flag(name)} has {key!r}, which no adapted module is called; expected some of {', '.join(known)}"
                + did_you_mean(key, known)
            )
    # The longest name is the most exact one, and peft takes the first that fits.
    return {re.escape(key): plain_number(values[key]) for key in sorted(values, key=len, reverse=True)}


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


def attach_masked(model: Any, adapter: Adapter, masks: Masks) -> PeftModel:
    """The small model with an adapter whose update was masked in training, in evaluation mode."""
    plain = adapter.config | {"peft_type": "LORA", "inference_mode": True, "base_model_name_or_path": None}
    config: LoraConfig = LoraConfig.from_peft_type(**plain)  # type: ignore[no-untyped-call]
    with without_peft_noise():
        wrapped = get_peft_model(model, mask_updates(config, masks), autocast_adapter_dtype=True)
    assert isinstance(wrapped, PeftModel)
    return with_factors(wrapped, adapter).eval()


def with_factors(model: PeftModel, adapter: Adapter) -> PeftModel:
    """The wrapped model with an adapter's A and B in place of its own."""
    set_peft_model_state_dict(model, adapter.tensors())
    return model


def save_adapter(model: PeftModel, folder: Path, base_name: str) -> None:
    """adapter_config.json and adapter_model.safetensors, and nothing else (peft adds a placeholder card)."""
    state: dict[str, Any] = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(state.items())}
    masked = masked_modules(model)
    write_tensors(folder / WEIGHTS, {stored_name(name, masked): tensor for name, tensor in tensors.items()})
    config: Any = model.peft_config["default"]
    training = config.target_modules, config.inference_mode, config.base_model_name_or_path
    # peft keeps the targets as a set, whose order differs between processes; a list keeps files equal.
    config.target_modules, config.inference_mode = sorted(config.target_modules), True
    config.base_model_name_or_path = base_name
    config.save_pretrained(str(folder))
    if masked:
        write_json(folder / CONFIG, read_json(folder / CONFIG) | {"peft_type": MASKED_TYPE})
    config.target_modules, config.inference_mode, config.base_model_name_or_path = training


def stored_name(name: str, masked: set[str]) -> str:
    """A factor's name in the file; another one where its module's update is masked."""
    module, _, rest = name.partition(".lora_")
    return f"{module}.masked_{rest}" if module in masked else name
