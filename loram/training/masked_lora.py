"""LoRA whose update is masked, s·(B·A) ∘ M: a variant of peft's own layers, whose forward and merge know the mask.

peft asks a custom module of its config for the layer of every Linear; a Linear that has a keep-mask gets a masked
one, over whatever its weight is stored in (float, NF4, int8), and any other what peft itself would give it.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from loram.masks import Masks
from loram.training.masked_product import keep_, masked_product, packed_rows


class MaskedVariant(LoraVariant):
    """What replaces s·B·A in one of peft's layers by s·(B·A) ∘ M; the bits lie in the layer's `keep_bits`."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to make: A and B are those of plain LoRA."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The base's result with the masked update's."""
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        x = module.lora_dropout[active_adapter](x)
        return result + masked_product(x, a, b, module.keep_bits, module.scaling[active_adapter])

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the masked update."""
        return orig_weight + masked_delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """The same in place."""
        orig_weight.data += masked_delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without it."""
        return orig_weight - masked_delta(module, active_adapter).to(orig_weight.dtype)

    def supports_lora_conversion(self) -> bool:
        """A masked update is of full rank."""
        return False


def masked_delta(module: Any, adapter: str) -> Tensor:
    """s·(B·A) ∘ M of a layer, whole, fp32 (out, in): for merging alone."""
    a, b = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
    return keep_((b @ a).mul_(module.scaling[adapter]), module.keep_bits)


class Masked:
    """Makes one of peft's LoRA layers a masked one: no other variant goes with it."""

    keep_bits: Tensor

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant:
        """The masked variant, whatever the config asks for (loram refuses DoRA before that)."""
        return MaskedVariant()


class MaskedLinear(Masked, Linear):
    """peft's layer over a Linear in floating point."""


def masked_layer(base: nn.Linear) -> type[Any]:
    """The masked layer class over a Linear as it is stored."""
    stored = type(base).__name__
    if stored not in ("Linear4bit", "Linear8bitLt"):
        return MaskedLinear
    from peft.tuners.lora import bnb  # only where bitsandbytes is there

    return type(f"Masked{stored}", (Masked, getattr(bnb, stored)), {})


def mask_updates(config: LoraConfig, masks: Masks) -> LoraConfig:
    """Make peft, wrapping a model by this config, mask the update of every Linear that has a mask."""

    def dispatch(target: nn.Linear, adapter_name: str, config: LoraConfig, **kwargs: Any) -> nn.Module | None:
        mask = masks(kwargs["target_name"])
        if mask is None:
            return None
        layer: nn.Module = masked_layer(target)(target, adapter_name, config=config, **kwargs)
        layer.register_buffer("keep_bits", packed_rows(mask).to(target.weight.device), persistent=False)
        return layer

    config._register_custom_module({nn.Linear: dispatch})  # type: ignore[dict-item]
    return config


def masked_modules(model: nn.Module) -> set[str]:
    """The names of the layers that mask their update."""
    return {name for name, module in model.named_modules() if isinstance(module, Masked)}
