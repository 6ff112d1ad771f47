"""Build and load small models whose layers have different widths.

A small model is a dynamically made subclass of the stock class: its __init__ lets the stock one build,
then replaces the cut Linears by ones of the kept sizes. With head_dim and the query-heads-per-kv-head
ratio unchanged, the stock attention and MLP code runs as it is: no forked modelling files. Where all
layers are cut alike the small model *is* a stock model, and its config says so.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from loram.artifact import read_json
from loram.checkpoint import BY_FLAG, find_shards
from loram.errors import CheckpointError, DataError, FamilyError, is_out_of_memory
from loram.families import FAMILIES, Family, family_of, is_small_config
from loram.families.small import WIDTHS_KEY
from loram.families.widths import Widths
from loram.memory import bound_kernel_caches
from loram.quantization.loading import keep_unpacked, require_library, settle


@cache
def small_classes(model_type: str) -> tuple[type[Any], type[PreTrainedModel]]:
    """The config and model class of small models of one architecture."""
    family = FAMILIES[model_type]
    stock_config: type[Any] = getattr(transformers, family.config_class)
    stock_model: type[Any] = getattr(transformers, family.model_class)
    config_class = type(
        f"Loram{family.config_class}", (stock_config,), {"model_type": f"loram_{model_type}", "__module__": __name__}
    )

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock_model.__init__(self, config, *args, **kwargs)
        narrow(self, family)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found: Any = super(model_class, cls).from_pretrained(*args, **kwargs)
        keep_unpacked(found[0] if isinstance(found, tuple) else found)
        return found

    members = {
        "__init__": __init__,
        "from_pretrained": classmethod(from_pretrained),
        "config_class": config_class,
        "__module__": __name__,
    }
    model_class: Any = type(f"Loram{family.model_class}", (stock_model,), members)
    return config_class, model_class


def narrow(model: PreTrainedModel, family: Family) -> None:
    """Replace the Linears of a stock model, in place, by ones of the widths that its config states."""
    config: Any = model.config
    raw = config.to_dict() | {"head_dim": getattr(config, "head_dim", None)}
    geometry, widths = family.geometry(raw), Widths(**{k: tuple(v) for k, v in getattr(config, WIDTHS_KEY).items()})
    if len(widths.mlp) != geometry.layers or len(widths.kv_heads) != geometry.layers:
        raise FamilyError(
            f"config.json: {WIDTHS_KEY} speaks of {len(widths.mlp)} layers, the model has {geometry.layers}"
        )
    for number in range(geometry.layers):
        counts = {"kv_heads": widths.kv_heads[number], "mlp": widths.mlp[number]}
        layer = model.get_submodule(f"{family.prefix}{number}")
        for weight in family.linears:
            old: Any = layer.get_submodule(weight.name)
            out, into = (
                sum(counts.get(s.count, geometry.size(s.count)) * geometry.size(s.width) for s in d)
                for d in (weight.rows, weight.columns)
            )
            bias = weight.has_bias(raw, number)
            if (out, into) != tuple(old.weight.shape) or bias != (old.bias is not None):
                new = nn.Linear(into, out, bias, device=old.weight.device, dtype=old.weight.dtype)
                layer.set_submodule(weight.name, new)
        for path, axis in family.layer_counts:
            owner, _, attribute = path.rpartition(".")
            setattr(layer.get_submodule(owner), attribute, counts[axis])
        if family.per_layer_config:
            own = copy.copy(config)
            own.num_key_value_heads = counts["kv_heads"]
            own.num_attention_heads = counts["kv_heads"] * (geometry.heads // geometry.kv_heads)
            attention: Any = layer.get_submodule("self_attn")
            attention.config = own


def spelled_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config with the lists that its stock class derives from layer numbers, such as layer_types."""
    family, count = family_of(config), int(config["num_hidden_layers"])
    config_class: Any = getattr(transformers, family.config_class)
    values = {key: value for key, value in config.items() if key != "model_type"}
    stock = config_class.from_dict(values).to_dict()
    lists = {k: v for k, v in stock.items() if "layer" in k and isinstance(v, list) and len(v) == count}
    return {**config, **lists}


def register() -> None:
    """Make transformers' Auto classes load small models of every family."""
    for model_type in FAMILIES:
        config_class, model_class = small_classes(model_type)
        AutoConfig.register(f"loram_{model_type}", config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def load_small(path: str | Path, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """A small model as a transformers model; keyword arguments go to `from_pretrained`.

    Loads what `loram prune` wrote, whatever its widths. Also loads any plain model.
    """
    return load_model(path, **from_pretrained_kwargs)


def load_model(path: str | Path, *, dtype: Any = "auto", **kwargs: Any) -> PreTrainedModel:
    """A large or small model. `dtype`: auto (the checkpoint's), bf16, fp16, fp32, or a torch dtype."""
    bound_kernel_caches()
    kwargs["dtype"] = BY_FLAG.get(dtype, dtype) if isinstance(dtype, str) else dtype
    kwargs = {"low_cpu_mem_usage": True, "use_safetensors": True, "trust_remote_code": False} | kwargs
    classes = classes_in(path)
    if Path(path).is_dir():
        find_shards(Path(path))  # says it better than transformers does
        require_library(read_json(Path(path) / "config.json"))
    loader: Any = classes[1] if classes else AutoModelForCausalLM
    hf_logging: Any = transformers_logging
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # loram draws its own
    try:
        model: PreTrainedModel = loader.from_pretrained(str(path), **kwargs)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise loading_error(path, error) from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    settle(model, kwargs["dtype"] if isinstance(kwargs["dtype"], torch.dtype) else None)
    return model


def empty_model(path: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A large or small model of this folder's config, in evaluation mode, whose weights are on `meta`.

    Buffers that are no part of the checkpoint (rotary frequencies) are real.
    """
    bound_kernel_caches()
    classes = classes_in(path)
    config = (classes[0] if classes else AutoConfig).from_pretrained(str(path), trust_remote_code=False)
    with init_empty_weights(include_buffers=False), WithoutMemory():
        maker: Any = classes[1]._from_config if classes else AutoModelForCausalLM.from_config
        model = maker(config, dtype=dtype)
    model.train(False)
    model.requires_grad_(False)
    return model


class WithoutMemory(TorchFunctionMode):
    """Weights that a module makes by `torch.empty`, as Linears and embeddings do, are on `meta` from the start.

    `init_empty_weights` moves each one there after it was made, and what they leave behind in the heap adds up to
    several times the largest one: too much where the address space is limited.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch.empty without a device gives no memory; everything else is as it was."""
        named = dict(kwargs or {})
        if func is torch.empty and named.get("device") is None:
            named["device"] = "meta"
        return func(*args, **named)


def classes_in(path: str | Path) -> tuple[type[Any], type[PreTrainedModel]] | None:
    """Our config and model class, where a folder holds a small model with widths of its own."""
    file = Path(path) / "config.json"
    config = read_json(file) if file.is_file() else {}
    if not is_small_config(config):
        return None
    family_of(config)
    return small_classes(str(config["model_type"]).removeprefix("loram_"))


def loading_error(path: str | Path, error: Exception) -> CheckpointError:
    """Whatever transformers raised, as one sentence that names the folder."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"transformers cannot load {path}: {first[:300]}")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; DataError where there is none."""
    classes = classes_in(path)
    config = {"config": classes[0].from_pretrained(str(path))} if classes else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **config)
    except Exception as error:
        raise DataError(
            f"{path} has no usable tokenizer ({str(error).strip().splitlines()[0][:200]}); "
            "copy tokenizer.json and tokenizer_config.json of the model into the folder"
        ) from error
    return tokenizer
