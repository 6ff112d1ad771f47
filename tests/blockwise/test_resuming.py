"""A pass that was stopped at any block and gone on with gives, bit for bit, what an uninterrupted one gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import LAYERS, tokens
from torch import Tensor

from loram.blockwise import Block, BlockRunner, SecondMoment, backward_pass, forward_pass, resuming
from loram.checkpoint import Checkpoint, read_tensors
from loram.errors import CheckpointError
from loram.sealing import Steps
from loram.shards import write_tensors

WINDOWS = tokens(1, rows=5)
Found = dict[int, dict[str, Tensor]]


class Killed(Exception):
    """What stands for a signal here; real ones are sent in tests/stages."""


class Pass:
    """A pass in either direction that may be killed at a block, and what it did."""

    def __init__(self, model: Path, place: Path, direction: str, layers: tuple[int, ...] = (0, 1, 2)) -> None:
        self.model, self.place, self.direction, self.layers = model, place, direction, layers
        self.visited: list[int] = []
        self.fatal: int | None = None

    def __call__(self, fatal: int | None = None, **options: Any) -> Found:
        self.visited, self.fatal = [], fatal
        with Checkpoint(self.model) as checkpoint, BlockRunner(checkpoint, rows=2, **options) as runner:
            steps = Steps(self.place, {"work": 1})
            if self.direction == "forward":
                found = forward_pass(runner, WINDOWS, steps, self.forward)
            else:
                found = backward_pass(runner, WINDOWS, steps, self.backward, self.layers)
            return {number: read_tensors(folder / "found.safetensors") for number, folder in found}

    def forward(self, block: Block, folder: Path) -> None:
        moment = SecondMoment()
        block.observe({"mlp.down_proj": moment})
        block.module.get_submodule("mlp.down_proj").weight.data.mul_(0.5)  # what follows depends on it
        block.run()
        self.leave(block, folder, {"moment": moment.total})

    def backward(self, block: Block, back: Any, folder: Path) -> None:
        moment = SecondMoment()
        found = back({"mlp.down_proj": moment})
        self.leave(block, folder, {"moment": moment.total, **found})

    def leave(self, block: Block, folder: Path, found: dict[str, Tensor]) -> None:
        self.visited.append(block.number)
        write_tensors(folder / "found.safetensors", found)
        if block.number == self.fatal:
            raise Killed


def same(one: Found, other: Found) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[number][name]) for number in one for name, value in one[number].items()
    )


@pytest.mark.parametrize("memory", [2**30, 0])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("fatal", range(LAYERS))
def test_goes_on_where_it_stopped(
    direction: str, fatal: int, memory: int, stock: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(resuming, "SHARE", 1)  # the blocks are too quick for saving to be worth it
    model = stock("gemma3_text-gqa")
    expected = Pass(model, tmp_path / "whole", direction)()
    disturbed = Pass(model, tmp_path / "disturbed", direction)
    options = {"hidden_memory": memory, "spill": tmp_path / "spill"}
    with pytest.raises(Killed):
        disturbed(fatal, **options)
    order = range(LAYERS) if direction == "forward" else range(LAYERS - 1, -1, -1)
    assert disturbed.visited == list(order)[: list(order).index(fatal) + 1]
    assert same(disturbed(**options), expected)
    assert disturbed.visited == list(order)[list(order).index(fatal) :]
    assert same(disturbed(**options), expected)
    assert disturbed.visited == [], "everything was there already"
    states = [step.name for step in (tmp_path / "disturbed").iterdir() if not step.name.startswith(("block", "run"))]
    assert states == [] if direction == "backward" else len(states) == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_blocks_behind_the_saved_states_are_done_again(
    direction: str, stock: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    model = stock("llama-gqa")
    expected = Pass(model, tmp_path / "whole", direction)()
    disturbed = Pass(model, tmp_path / "disturbed", direction)
    monkeypatch.setattr(resuming.Pace, "save", lambda *_: False)
    with pytest.raises(Killed):
        disturbed(1)
    assert same(disturbed(), expected)
    assert disturbed.visited == ([0, 1, 2] if direction == "forward" else [2, 1, 0])


@pytest.mark.parametrize("broken", ["input-0000", "input-0001", "slope-0001", "slope-0002", "block-0002"])
def test_damaged_steps_of_the_way_back_are_done_again(
    broken: str, stock: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(resuming, "SHARE", 1)
    model = stock("llama-gqa")
    expected = Pass(model, tmp_path / "whole", "backward")()
    disturbed = Pass(model, tmp_path / "disturbed", "backward")
    with pytest.raises(Killed):
        disturbed(0 if broken == "slope-0001" else 1)
    for file in (tmp_path / "disturbed" / broken).glob("*n"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    for file in (tmp_path / "disturbed" / broken).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert same(disturbed(), expected)


def test_some_layers_only(stock: Callable[[str], Path], tmp_path: Path) -> None:
    model = stock("qwen2-gqa")
    whole = Pass(model, tmp_path / "whole", "backward")()
    some = Pass(model, tmp_path / "some", "backward", (1,))
    assert same(some(), {1: whole[1]})
    assert some.visited == [1]


def test_hidden_states_of_another_size_are_refused(stock: Callable[[str], Path], tmp_path: Path) -> None:
    with Checkpoint(stock("llama-gqa")) as checkpoint, BlockRunner(checkpoint) as runner:
        runner.embed(WINDOWS).save(tmp_path / "hidden.bin")
        with pytest.raises(CheckpointError, match="it is damaged"):
            runner.hidden((4, 20)).load(tmp_path / "hidden.bin")
