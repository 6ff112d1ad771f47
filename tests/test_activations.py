"""What autograd keeps, counted by torch's own hooks on stock models with peft on them, against the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stock_models import GROUPED, HIDDEN, head_dim, leaves, make, raw_config
from torch import Tensor, nn

from loram.activations import Layer, Workload, backward_bytes, kept_by_layer, layers_of, loss_bytes
from loram.families.widths import Widths
from loram.training.cross_entropy import without_logits
from loram.training.masked_lora import mask_updates

RANK, BATCH, LENGTH = 3, 2, 12
WORK = Workload(batch=BATCH, length=LENGTH, rank=RANK, dtype="fp32", dropout=0.0)


@contextmanager
def inside(model: nn.Module, name: str) -> Iterator[list[bool]]:
    """A list that is not empty while the module of this name runs its forward pass."""
    running: list[bool] = []
    module = model.get_submodule(name)
    hooks = [
        module.register_forward_pre_hook(lambda *_: running.append(True)),
        module.register_forward_hook(lambda *_: running.clear()),
    ]
    yield running
    for hook in hooks:
        hook.remove()


def counted(name: str, work: Workload, attention: str = "sdpa", frozen_a: bool = False) -> int:
    """Bytes of the storages that are kept while layer 1 runs and that are no parameters and nothing kept before."""
    base = make(name).train().to(torch.float32 if work.dtype == "fp32" else torch.bfloat16)
    base.set_attn_implementation(attention)
    config = LoraConfig(r=RANK, lora_dropout=work.dropout, target_modules=list(leaves(name)), task_type="CAUSAL_LM")
    if work.masked_update:
        mask_updates(config, lambda module: half_of(base.get_submodule(module).weight) if "layers" in module else None)
    model: Any = get_peft_model(base, config)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in key or ("lora_A" in key and not frozen_a))
    there = [*model.parameters(), *model.buffers()]
    known: dict[int, Tensor] = {p.untyped_storage().data_ptr(): p for p in there}
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known[storage.data_ptr()] = tensor  # held, so that no other storage gets this address
            total += storage.nbytes() if running else 0
        return tensor

    ids = torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0 if work.masked else 1
    half = torch.autocast("cpu", torch.bfloat16) if work.mixed else nullcontext()
    path = "base_model.model.model.layers.1"
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with inside(model, path) as running, without_logits(model.get_base_model()), hooks, half:
        model(input_ids=ids, labels=ids, attention_mask=mask)
    return total


def half_of(weight: Tensor) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5


def without_tokens(name: str, layer: Layer, work: Workload) -> int:
    """What is kept once, and not of every token: LoRA's 16-bit copies; of Gemma, 1 + each norm's weight, and the
    rotary tables of the first layer of its kind."""
    copied = work.mixed and not work.masked_update
    lora = sum(out + into for out, into in layer.linears.values()) * RANK * 2 if copied else 0
    if not name.startswith("gemma"):
        return lora
    return lora + layer.norms * HIDDEN * 4 + 2 * head_dim(name) * (4 + LENGTH * work.value_bytes)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", GROUPED)
def test_what_a_layer_keeps(name: str, dtype: str, dropout: float, masked: bool, stock: Callable[[str], Any]) -> None:
    work = replace(WORK, dtype=dtype, dropout=dropout, masked=masked)
    layer = layers_of(raw_config(stock(name)), None)[1]
    assert counted(name, work) == kept_by_layer(layer, work, 4) + without_tokens(name, layer, work)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3_text-gqa", "phi3-gqa"])
def test_what_a_layer_keeps_whose_update_is_masked(
    name: str, dtype: str, dropout: float, stock: Callable[[str], Any]
) -> None:
    """x, and nothing of the product."""
    work = replace(WORK, dtype=dtype, dropout=dropout, masked_update=True)
    layer = layers_of(raw_config(stock(name)), None)[1]
    assert counted(name, work) == kept_by_layer(layer, work, 4) + without_tokens(name, layer, work)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_eager_attention_keeps_its_probabilities(dtype: str, stock: Callable[[str], Any]) -> None:
    work = replace(WORK, dtype=dtype, attention="eager")
    layer = layers_of(raw_config(stock("llama-gqa")), None)[1]
    assert counted("llama-gqa", work, "eager") == kept_by_layer(layer, work, 4) + without_tokens("", layer, work)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_fa_keeps_no_inputs_of_a(dropout: float, stock: Callable[[str], Any]) -> None:
    work = replace(WORK, dropout=dropout, frozen_a=True)
    layer = layers_of(raw_config(stock("llama-gqa")), None)[1]
    assert counted("llama-gqa", work, frozen_a=True) == kept_by_layer(layer, work, 4)


def test_narrow_layers_keep_less_and_layers_below_lora_nothing(stock: Callable[[str], Any]) -> None:
    config = raw_config(stock("llama-gqa"))
    whole = [kept_by_layer(layer, WORK, 4) for layer in layers_of(config, None)]
    narrow = [kept_by_layer(layer, WORK, 4) for layer in layers_of(config, Widths((2, 1, 1), (40, 40, 7)))]
    assert len(set(whole)) == 1
    assert narrow[0] == whole[0] > narrow[1] > narrow[2] > 0
    chosen = replace(WORK, layers=(1,))
    kept = [kept_by_layer(layer, chosen, 4) for layer in layers_of(config, None)]
    assert kept[0] == 0
    assert kept[1] == whole[1] > kept[2] > 0  # above it gradients pass, and there is no LoRA


def test_a_gpu_s_dropout_masks_are_bytes(stock: Callable[[str], Any]) -> None:
    work = replace(WORK, dropout=0.1)
    layer = layers_of(raw_config(stock("llama-gqa")), None)[0]
    columns = sum(into for _, into in layer.linears.values())
    assert kept_by_layer(layer, work, 4) - kept_by_layer(layer, work, 1) == 3 * columns * BATCH * LENGTH
    assert kept_by_layer(layer, WORK, 4) == kept_by_layer(layer, WORK, 1)


def test_the_loss_holds_chunks_not_logits(stock: Callable[[str], Any]) -> None:
    (layer, *_) = layers_of(raw_config(stock("llama-gqa")) | {"vocab_size": 50_000}, None)
    few, many = (loss_bytes(layer.geometry, replace(WORK, batch=rows), soft_cap=False) for rows in (100, 10_000))
    hidden = 2 * HIDDEN * 4 * LENGTH
    assert few == 2 * (2**26 // 200_000 * 200_000) + 100 * hidden
    assert many - few == 9_900 * hidden
    assert loss_bytes(layer.geometry, WORK, soft_cap=True) > loss_bytes(layer.geometry, WORK, soft_cap=False)
    quiet = replace(WORK, supervised=1)
    assert loss_bytes(layer.geometry, quiet, soft_cap=False) < loss_bytes(layer.geometry, WORK, soft_cap=False)


def test_gradients_of_the_widest_layer(stock: Callable[[str], Any]) -> None:
    config = raw_config(stock("llama-gqa"))
    wide = backward_bytes(layers_of(config | {"intermediate_size": 400}, None), WORK)
    assert wide == BATCH * LENGTH * (400 * 8 + 2 * HIDDEN * 4)
    assert backward_bytes(layers_of(config | {"intermediate_size": 4}, None), WORK) == BATCH * LENGTH * 5 * HIDDEN * 4
