"""A decoder run block by block is the stock model: hidden states, losses, edits, small models, spill files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import write_small_folder
from stock_models import GROUPED, LAYERS, VARIANTS, make, random_kept, tokens
from torch import Tensor

from loram.blockwise import BlockRunner, Cosine, Hidden, MeanVariance, Norm, SecondMoment, shared_inputs
from loram.checkpoint import Checkpoint
from loram.errors import MismatchError
from loram.families import family_of
from loram.modeling import load_small


def states(model: Any, windows: Tensor) -> tuple[Tensor, ...]:
    """The input of every block of the whole model, and last of all the final norm's output."""
    with torch.no_grad():
        found: tuple[Tensor, ...] = model.get_decoder()(windows, use_cache=False, output_hidden_states=True)[1]
    return found


def close(found: Tensor, expected: Tensor) -> None:
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def everything(hidden: Hidden) -> Tensor:
    return hidden.read(slice(None)).clone()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_block_has_the_inputs_of_the_whole_model(name: str, stock: Callable[[str], Path]) -> None:
    windows = tokens(1, rows=5, length=24)
    expected = states(make(name), windows)
    with Checkpoint(stock(name)) as checkpoint, BlockRunner(checkpoint, rows=2) as runner:
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden):
            close(everything(hidden), expected[block.number])
            block.run()
        with runner.head() as model:
            close(model.get_decoder().norm(everything(hidden)), expected[LAYERS])
        assert {parameter.device.type for parameter in runner.model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", [*GROUPED, "llama-mha", "gemma3_text-mha"])
def test_losses_are_those_of_the_whole_model(name: str, stock: Callable[[str], Path]) -> None:
    windows = tokens(2, rows=3, length=20)
    labels = windows.clone()
    labels[0, :7] = labels[2, 11:] = -100
    model = make(name)
    with Checkpoint(stock(name)) as checkpoint, BlockRunner(checkpoint, rows=2) as runner:
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden):
            block.run()
        nll, counts = runner.losses(hidden, labels)
    assert counts.tolist() == [13, 19, 10]
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
    assert torch.allclose(nll, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_small_models_run_alike(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    small = write_small_folder(stock(name), random_kept(name, 4), tmp_path / "small")
    windows = tokens(3, rows=3)
    expected = states(load_small(small, dtype="fp32").eval(), windows)
    with Checkpoint(small) as checkpoint, BlockRunner(checkpoint) as runner:
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden):
            close(everything(hidden), expected[block.number])
            block.run()


def test_a_spill_file_changes_nothing_and_is_gone_afterwards(stock: Callable[[str], Path], tmp_path: Path) -> None:
    windows = tokens(3, rows=7)
    found = []
    for memory in (2**30, 0):
        with (
            Checkpoint(stock("llama-gqa")) as checkpoint,
            BlockRunner(checkpoint, rows=3, hidden_memory=memory, spill=tmp_path / "spill") as runner,
        ):
            hidden = runner.embed(windows)
            assert hidden.in_memory == bool(memory)
            for block in runner.blocks(hidden):
                block.run()
            found.append(everything(hidden))
            assert memory or [file.stat().st_size for file in (tmp_path / "spill").iterdir()] == [hidden.nbytes]
    assert torch.equal(*found)
    assert not list((tmp_path / "spill").iterdir())


def test_weights_changed_between_two_runs(stock: Callable[[str], Path]) -> None:
    windows = tokens(4, rows=3)
    model = make("qwen3-gqa")
    moments = {}
    with Checkpoint(stock("qwen3-gqa")) as checkpoint, BlockRunner(checkpoint, rows=2) as runner:
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden):
            before = everything(hidden)
            block.observe({"mlp.down_proj": (moment := SecondMoment())})
            assert torch.equal(everything(hidden), before)
            moments[block.number] = moment.total
            block.module.get_submodule("mlp.down_proj").weight.data[:, ::2] = 0
            block.run()
        last = everything(hidden)
    seen: dict[int, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.data[:, ::2] = 0
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, x, number=number: seen.__setitem__(number, x[0].detach().reshape(-1, x[0].shape[-1]))
        )
    captured: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, x: captured.append(x[0]))
    with torch.no_grad():
        model(windows)
    close(last, captured[0])
    for number, x in seen.items():
        close(moments[number], x.T @ x)


def test_a_block_that_is_not_run_is_left_out(stock: Callable[[str], Path]) -> None:
    windows = tokens(4, rows=3)
    model = make("mistral-gqa")
    del model.model.layers[1]
    model.config.num_hidden_layers = 2
    with Checkpoint(stock("mistral-gqa")) as checkpoint, BlockRunner(checkpoint) as runner:
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden):
            if block.number != 1:
                block.run()
        with runner.head() as head:
            close(head.get_decoder().norm(everything(hidden)), states(model, windows)[-1])


def test_edit_sees_every_weight_as_it_is_read(stock: Callable[[str], Path]) -> None:
    windows = tokens(5, rows=2)
    model = make("llama-mha")
    wanted = {"model.embed_tokens.weight", "model.layers.2.self_attn.o_proj.weight", "model.norm.weight"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in wanted:
                parameter.mul_(0.5)
    names = []

    def edit(name: str, weight: Tensor) -> Tensor:
        names.append(name)
        return weight * 0.5 if name in wanted else weight

    with Checkpoint(stock("llama-mha")) as checkpoint, BlockRunner(checkpoint, edit=edit) as runner:
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden):
            block.run()
        nll, counts = runner.losses(hidden, windows)
    assert wanted < set(names)
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    assert torch.allclose(nll.sum() / counts.sum(), loss.double(), rtol=1e-5)


def test_a_block_can_be_trained(stock: Callable[[str], Path]) -> None:
    windows = tokens(6, rows=4)
    with Checkpoint(stock("llama-gqa")) as checkpoint, BlockRunner(checkpoint, rows=4) as runner:
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden, stop=1):
            block.module.requires_grad_(True)
            weight: Any = block.module.get_submodule("mlp.down_proj").weight
            target = torch.zeros(hidden.shape)
            errors = []
            for _ in range(3):
                for rows, x in block.batches():
                    loss = torch.nn.functional.mse_loss(block(x), target[rows])
                    (slope,) = torch.autograd.grad(loss, [weight])
                    weight.data -= slope
                    errors.append(loss.item())
            assert errors[-1] < errors[0]


@pytest.mark.parametrize("name", GROUPED)
def test_linears_that_share_an_input_are_named_together(name: str, stock: Callable[[str], Path]) -> None:
    model = make(name)
    with Checkpoint(stock(name)) as checkpoint:
        family = family_of(checkpoint.config)
    seen: dict[str, int] = {}
    kept = []
    for weight in family.linears:

        def hook(_: Any, inputs: Any, name: str = weight.name) -> None:
            kept.append(inputs[0])  # or another tensor could get the same address
            seen[name] = id(inputs[0])

        model.model.layers[0].get_submodule(weight.name).register_forward_pre_hook(hook)
    model(tokens())
    groups = shared_inputs(family)
    assert sorted(name for names in groups.values() for name in names) == sorted(seen)
    assert len({seen[names[0]] for names in groups.values()}) == len(groups)
    for names in groups.values():
        assert len({seen[name] for name in names}) == 1


def test_observers_by_hand() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    norm, moment, fluctuation, cosine = Norm(), SecondMoment(), MeanVariance(), Cosine()
    for start in (0, 7, 8, 30):
        stop = {0: 7, 7: 8, 8: 30, 30: 50}[start]
        for observer in (norm, moment, fluctuation):
            observer(x[start:stop])
        cosine(x[None, start:stop], -x[None, start:stop].roll(1, -1))
    assert norm.count == moment.count == fluctuation.count == cosine.count == 50
    assert torch.allclose(norm.norm, x.norm(dim=0))
    assert torch.allclose(moment.norm, x.norm(dim=0))
    assert torch.allclose(moment.total, x.T @ x)
    assert torch.allclose(fluctuation.mean, x.double().mean(0))
    assert torch.allclose(fluctuation.variance, x.double().var(0))
    expected = torch.nn.functional.cosine_similarity(x, -x.roll(1, -1)).mean().item()
    assert cosine.mean == pytest.approx(expected, rel=1e-5)


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    model = make("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("inf")
    model.save_pretrained(tmp_path)
    windows = tokens(1)
    with (
        Checkpoint(tmp_path) as checkpoint,
        BlockRunner(checkpoint) as runner,
        pytest.raises(MismatchError, match="head is damaged"),
    ):
        runner.losses(runner.embed(windows), windows)
