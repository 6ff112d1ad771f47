"""Block by block the same second moments as the whole model under hooks, for every family and sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import LAYERS, VARIANTS, build, make, raw_config, tokens
from torch import Tensor

from loram.blockwise import BlockRunner, Fluctuation, SecondMoment
from loram.checkpoint import Checkpoint
from loram.errors import MismatchError

OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


def hooked_moments(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """Σ x·xᵀ of the inputs of o and down, in fp64, with all windows through the whole stock model."""
    moments: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: Any) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            moments[name] = moments.get(name, 0) + x.T @ x

        return hook

    for layer in range(LAYERS):
        for leaf in OUTPUTS:
            name = f"model.layers.{layer}.{leaf}"
            model.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(windows, use_cache=False)
    return moments


def observed(folder: Path, windows: Tensor, rows: int, layers: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with Checkpoint(folder) as checkpoint, BlockRunner(checkpoint, rows=rows) as runner:
        for block in runner.blocks(runner.embed(windows)):
            seen = {name: SecondMoment() for name in OUTPUTS if block.number in layers}
            block.run(seen)
            found |= {f"{block.name}.{name}": moment.total for name, moment in seen.items()}
    return found


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("name", VARIANTS)
def test_moments_are_those_of_the_whole_model(name: str, rows: int, stock: Callable[[str], Path]) -> None:
    windows = tokens(5, rows=5, length=24)
    expected = hooked_moments(make(name), windows)
    found = observed(stock(name), windows, rows)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert ((found[key] - value).norm() / value.norm()).item() < 1e-5, key


def test_one_window_alone(stock: Callable[[str], Path]) -> None:
    windows = tokens(6, rows=1, length=24)
    expected = hooked_moments(make("gemma3_text-gqa"), windows)
    for key, value in observed(stock("gemma3_text-gqa"), windows, 4).items():
        assert ((value - expected[key]).norm() / expected[key].norm()).item() < 1e-5, key


def test_only_the_layers_asked_for_are_observed(stock: Callable[[str], Path]) -> None:
    windows = tokens(6, rows=3, length=24)
    expected = hooked_moments(make("qwen3-gqa"), windows)
    found = observed(stock("qwen3-gqa"), windows, 4, layers=(1,))
    assert set(found) == {f"model.layers.1.{leaf}" for leaf in OUTPUTS}
    for key, value in found.items():
        assert ((value - expected[key]).norm() / expected[key].norm()).item() < 1e-5, key
    assert observed(stock("qwen3-gqa"), windows, 4, layers=()) == {}


def test_damaged_weights_are_named_by_layer(tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"layer 1: its output is NaN or Inf"):
        observed(tmp_path, tokens(), 4)


def test_bf16_weights_are_read_as_they_are_stored(tmp_path: Path) -> None:
    folder = build("mistral-gqa", tmp_path / "fp32")
    model = make("mistral-gqa").bfloat16()
    model.save_pretrained(tmp_path / "bf16")
    assert raw_config(folder)["model_type"] == "mistral"
    windows = tokens(7, rows=3)
    expected = hooked_moments(model.float(), windows)
    for key, value in observed(tmp_path / "bf16", windows, 4).items():
        assert ((value - expected[key]).norm() / expected[key].norm()).item() < 2e-2, key


def test_fluctuations_are_centered_moments() -> None:
    x = torch.randn(300, 270, generator=torch.Generator().manual_seed(2)) + 3 * torch.arange(270) / 270
    seen, plain = Fluctuation(products=True), Fluctuation()
    for rows in torch.split(x, 70):
        seen(rows)
        plain(rows)
    wide = x.double()
    assert torch.allclose(seen.mean, wide.mean(0))
    assert torch.allclose(seen.variance, wide.var(0))
    assert torch.equal(plain.variance, seen.variance)
    assert torch.allclose(seen.norm, wide.norm(dim=0))
    expected = torch.cov(wide.T) * (len(x) - 1)
    assert ((seen.total - expected).abs().max() / expected.abs().max()).item() < 1e-5
