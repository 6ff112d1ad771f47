"""Gradients block by block are those of the whole model under autograd, and each weight is read twice at most."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import GROUPED, LAYERS, VARIANTS, make, tokens
from torch import Tensor

from loram.blockwise import Block, BlockRunner, backward_pass
from loram.checkpoint import Checkpoint
from loram.errors import MismatchError
from loram.families import family_of
from loram.progress import Progress
from loram.sealing import Steps

CAPPED = {"final_logit_softcapping": 3.0}


class CountingCheckpoint(Checkpoint):
    """A checkpoint that counts the bytes that are read of each tensor."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.counts: Counter[str] = Counter()

    def raw(self, name: str, start: int, stop: int) -> Any:
        self.counts[name] += (stop - start) * self.entry(name).row_bytes
        return super().raw(name, start, stop)


class Counting(Progress):
    """Counts the steps of each piece of work; the pass itself is the first, and is begun by who calls it."""

    def __init__(self) -> None:
        self.open: list[tuple[str, int]] = [("pass", LAYERS)]
        self.steps: Counter[tuple[str, int]] = Counter()

    def begin(self, label: str, total: int) -> None:
        self.open.append((label, total))

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.steps[self.open[-1]] += amount

    def end(self) -> None:
        self.open.pop()


def found_gradients(
    folder: Path, windows: Tensor, layers: tuple[int, ...] = tuple(range(LAYERS)), **options: object
) -> dict[str, Tensor]:
    found = {}
    counting = Counting()

    def visit(block: Block, back: Any, folder: Path) -> None:
        found.update({f"{block.name}.{name}.weight": slope for name, slope in back({}).items()})

    with (
        tempfile.TemporaryDirectory() as place,
        Checkpoint(folder) as checkpoint,
        BlockRunner(checkpoint, rows=2, **options) as runner,  # type: ignore[arg-type]
    ):
        steps = Steps(Path(place), {})
        for _ in backward_pass(runner, windows, steps, visit, layers, progress=counting):
            pass
    parts = -(-len(windows) // 2)
    assert counting.steps == {("pass", LAYERS): LAYERS, ("loss", parts): parts}
    return found


def whole_gradients(model: torch.nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """One window after the other through the whole model: the sum over windows of the mean loss."""
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:]).backward()
    linears = ("_proj.weight",)
    return {name: p.grad for name, p in model.named_parameters() if name.endswith(linears) and p.grad is not None}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert ((found[name] - value).norm() / value.norm()).item() < 1e-5, name


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_the_whole_model(name: str, stock: Callable[[str], Path]) -> None:
    windows = tokens(8, rows=5)
    expected = whole_gradients(make(name), windows)
    assert len(expected) == LAYERS * (4 if name.startswith("phi3") else 7)
    agree(found_gradients(stock(name), windows), expected)


def test_gradients_computed_in_bf16_are_added_up_in_fp32(stock: Callable[[str], Path]) -> None:
    """Twelve parts of two windows: a sum kept in bf16 would lose bits at each."""
    folder, windows = stock("llama-gqa"), tokens(8, rows=24)
    parts = [found_gradients(folder, part, dtype=torch.bfloat16) for part in windows.split(2)]
    expected = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    found = found_gradients(folder, windows, dtype=torch.bfloat16)
    assert {value.dtype for value in found.values()} == {torch.float32}
    agree(found, expected)


def test_soft_capped_logits(tmp_path: Path) -> None:
    model = make("gemma3_text-gqa")
    model.config.final_logit_softcapping = CAPPED["final_logit_softcapping"]
    model.save_pretrained(tmp_path)
    windows = tokens(9, rows=3)
    plain = whole_gradients(make("gemma3_text-gqa"), windows)
    expected = whole_gradients(model, windows)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(expected[name], plain[name], rtol=0.1), "the cap makes no difference"
    agree(found_gradients(tmp_path, windows), expected)


def test_only_the_layers_asked_for(stock: Callable[[str], Path]) -> None:
    windows = tokens(8, rows=3)
    expected = whole_gradients(make("qwen3-gqa"), windows)
    found = found_gradients(stock("qwen3-gqa"), windows, (1,))
    agree(found, {name: value for name, value in expected.items() if ".layers.1." in name})


def test_inputs_in_spill_files_change_nothing(stock: Callable[[str], Path], tmp_path: Path) -> None:
    windows = tokens(8, rows=5)
    spilled = found_gradients(stock("llama-gqa"), windows, hidden_memory=0, spill=tmp_path)
    for name, value in found_gradients(stock("llama-gqa"), windows).items():
        assert torch.equal(spilled[name], value), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*GROUPED, "llama-mha"])
def test_each_weight_is_read_twice_at_most(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    with CountingCheckpoint(stock(name)) as checkpoint, BlockRunner(checkpoint, rows=1) as runner:
        steps, layers = Steps(tmp_path, {}), range(LAYERS)
        for _ in backward_pass(runner, tokens(8, rows=6), steps, lambda block, back, folder: back({}), layers):
            pass
        sizes = {key: entry.end - entry.start for key, entry in checkpoint.entries.items()}
        family = family_of(checkpoint.config)
    assert set(checkpoint.counts) == set(sizes)
    for key, count in checkpoint.counts.items():
        assert count == (2 if key.startswith(family.prefix) else count // sizes[key]) * sizes[key]
        assert count <= 2 * sizes[key], key


def test_gradients_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"layer 2: the gradient of self_attn.q_proj is NaN or Inf"):
        found_gradients(tmp_path, tokens())
