"""Run a decoder over calibration windows with one block's weights in memory, observing inputs.

The model is built without weights; each decoder layer is wrapped so that its forward reads the layer's
weights from safetensors, runs the windows through in batches, and drops them. Masks, rotary embeddings,
sliding windows and per-layer types come from the stock model's own forward. Every weight is read once.
Gradients (Taylor scores) still need the whole model: see `whole_model_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from loram.checkpoint import Checkpoint
from loram.device import native_bf16
from loram.errors import MismatchError, PruningMapError
from loram.families import Family
from loram.modeling import load_model

Observer = Callable[[int, dict[str, Tensor]], None]
"""Called after each layer with its number and {weight name: second moment Σ x·xᵀ, (in, in) fp32}."""


class BlockwiseLayer(nn.Module):
    """A decoder layer whose weights are there only while its forward runs."""

    def __init__(
        self, layer: nn.Module, load: Callable[[nn.Module], None], rows: int, done: Callable[[], None]
    ) -> None:
        super().__init__()
        self.layer = layer
        self._load, self._rows, self._done = load, rows, done

    def __getattr__(self, name: str) -> Any:
        """Whatever the stock model asks its layer for (attention_type and the like)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All windows through this layer, `rows` at a time; the result overwrites the input."""
        self._load(self.layer)
        count = hidden_states.shape[0]
        for start in range(0, count, self._rows):
            part = slice(start, start + self._rows)
            own = {key: _batch(value, part, count) for key, value in kwargs.items()}
            found = self.layer(hidden_states[part], *(_batch(value, part, count) for value in args), **own)
            hidden_states[part] = found[0] if isinstance(found, tuple) else found
        self._done()
        self.layer.to("meta")
        return hidden_states


def _batch(value: Any, part: slice, count: int) -> Any:
    """The rows of a tensor argument that has one per window; anything else as it is."""
    return value[part] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count > 1 else value


@torch.no_grad()
def observe_inputs(
    checkpoint: Checkpoint,
    family: Family,
    windows: Tensor,
    layers: Collection[int],
    observer: Observer,
    *,
    rows: int = 4,
) -> None:
    """Second moments of the inputs of o and down of `layers`, over `windows` (count, length) of token ids.

    `rows` windows go through a layer at a time; layers behind the last one wanted are not run. Raises
    MismatchError where activations are not finite.
    """
    config: Any = AutoConfig.from_pretrained(str(checkpoint.folder))
    # Emulated bf16 is several times slower than fp32; the second moments are summed in fp32 either way.
    stored = checkpoint.entry(f"{family.embedding.name}.weight").dtype
    dtype = stored if native_bf16() and stored == torch.bfloat16 else torch.float32
    with init_empty_weights(include_buffers=False):
        model: Any = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype)
    model.train(False)
    decoder: Any = model.get_decoder()
    load_module(checkpoint, decoder.embed_tokens, family.embedding.name, dtype)
    load_module(checkpoint, decoder.norm, family.norm.name, dtype)
    decoder.layers = decoder.layers[: max(layers, default=-1) + 1]
    for number in range(len(decoder.layers)):
        moments: dict[str, Tensor] = {}
        layer = decoder.layers[number]
        for weight in family.outputs if number in layers else ():
            layer.get_submodule(weight.name).register_forward_pre_hook(accumulator(weight.name, moments))

        def load(layer: nn.Module, name: str = f"{family.prefix}{number}") -> None:
            load_module(checkpoint, layer, name, dtype)

        def done(number: int = number, moments: dict[str, Tensor] = moments) -> None:
            if moments:
                check_moments(number, moments)
                observer(number, moments)
                moments.clear()

        decoder.layers[number] = BlockwiseLayer(layer, load, rows, done)
    decoder(input_ids=windows, use_cache=False)


def accumulator(name: str, moments: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A forward pre-hook that adds x·xᵀ of a Linear's input to `moments[name]`, fp32."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        if name in moments:
            moments[name].addmm_(x.T, x)
        else:
            moments[name] = x.T @ x

    return hook


def check_moments(layer: int, moments: dict[str, Tensor]) -> None:
    """MismatchError that names the layer where activations are NaN or Inf."""
    for name, moment in moments.items():
        if not bool(torch.isfinite(moment.sum())):
            raise MismatchError(f"layer {layer}: the input of {name} is NaN or Inf; the model's weights are damaged")


def load_module(checkpoint: Checkpoint, module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Fill a module that has no weights yet with the checkpoint's, in `dtype`."""
    state = {key: checkpoint.read(f"{name}.{key}").to(dtype) for key in module.state_dict()}
    module.load_state_dict(state, assign=True)


@contextmanager
def whole_model_gradients(checkpoint: Checkpoint, family: Family, windows: Tensor) -> Iterator[dict[str, Tensor]]:
    """∂L/∂W, summed over the windows, of every decoder Linear: {tensor name: (out, in)}.

    L is the mean next-token loss of a window. The whole model and its gradients are in memory.
    """
    model: Any = load_model(checkpoint.folder, dtype="fp32")
    model.train(False)
    model.requires_grad_(False)
    wanted = {f"{family.module(n, w)}.weight" for n in range(model.config.num_hidden_layers) for w in family.linears}
    parameters = {name: value for name, value in model.named_parameters() if name in wanted}
    if set(parameters) != wanted:
        raise PruningMapError(f"the model lacks {sorted(wanted - set(parameters))[0]}, which the family's table names")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for window in windows:
        model(input_ids=window[None], labels=window[None], use_cache=False).loss.backward()
    yield {name: parameter.grad for name, parameter in parameters.items()}
