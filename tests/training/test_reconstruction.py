"""Repair layer by layer: against brute-force least squares on whole models, and the identities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import map_for, write_small_folder
from stock_models import GROUPED, LAYERS, random_kept, tokens
from torch import Tensor

from loram.align_options import AlignOptions
from loram.blockwise import BlockRunner
from loram.checkpoint import Checkpoint
from loram.modeling import load_small
from loram.progress import SILENT
from loram.pruning.residual import CheckedResidual, Residual, masked_solve
from loram.pruning_map import PruningMap
from loram.training.loop import Session
from loram.training.metrics import StepReport
from loram.training.reconstruction import REPAIRS, Job, reconstruct, stored
from loram.training.streams import kept_aside

WINDOWS = tokens(rows=12, length=20)


def repaired(large: Path, small: Path, pruning_map: PruningMap, place: Path, **options: Any) -> dict[str, Tensor]:
    """What a repair changes, by tensor name."""
    chosen = AlignOptions(model=str(small), **options)
    place.mkdir(parents=True)
    with (
        Checkpoint(large) as above,
        Checkpoint(small) as below,
        BlockRunner(above, rows=5) as one,
        BlockRunner(below, rows=5) as two,
    ):
        job = Job(one, two, WINDOWS, pruning_map, chosen, place, Session(), REPAIRS[chosen.method])
        changed = reconstruct(job, StepReport(place.parent, SILENT, 1))
    return {name: stored(file, name) for name, file in changed.items()}


def states(model: Any, wanted: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of modules in one whole forward, (tokens, features) fp64."""
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def hear(_: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            heard[name] = tuple(t.detach().double().reshape(-1, t.shape[-1]) for t in (inputs[0], y))  # type: ignore[assignment]

        return hear

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in wanted]
    with torch.no_grad():
        model(input_ids=WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return heard


HELD = torch.arange(len(WINDOWS)).repeat_interleave(WINDOWS.shape[1]) % 8 == 7


def ridge(w: Tensor, x: Tensor, missing: Tensor, strength: float) -> Tensor:
    """argmin over W′ of ‖R + (W − W′)·x‖² + λ·mean(diag xxᵀ)·‖W′ − W‖², as one stacked least-squares problem."""
    weight = (strength * (x.T @ x).diagonal().mean()).sqrt()
    rows = torch.cat([x, weight * torch.eye(x.shape[1], dtype=x.dtype)])
    target = torch.cat([missing, torch.zeros(x.shape[1], missing.shape[1], dtype=x.dtype)])
    return w + torch.linalg.lstsq(rows, target).solution.T


def checked_ridge(w: Tensor, x: Tensor, missing: Tensor) -> Tensor:
    """The ridge of seven windows in eight, λ ten times larger until the error on the eighth grows; or W as it is."""
    best, least, last = w, missing[HELD].square().sum(), torch.tensor(torch.inf)
    for strength in (0.01, 0.1, 1.0, 10.0, 100.0):
        found = ridge(w, x[~HELD], missing[~HELD], strength)
        left = (missing[HELD] - x[HELD] @ (found - w).T).square().sum()
        if left >= last:
            break
        last = left
        if left < least:
            best, least = found, left
    return best


def brute_force(
    large: Any, small: Any, layers: list[int], pruning_map: PruningMap, *, everything: bool
) -> dict[str, Tensor]:
    """The sequential refit with whole models in memory: a forward of all layers for every weight."""
    adds = pruning_map.family.adds_outputs
    outputs = [weight.name for weight in pruning_map.family.outputs]
    changed = {}
    for layer in layers:
        for weight in order_of(pruning_map, everything):
            name = f"model.layers.{layer}.{weight}"
            block = f"model.layers.{layer}"
            above, below = states(large, [name, block]), states(small, [name, block])
            x, y = below[name]
            if weight == outputs[1] and adds:
                missing = above[block][1] - below[block][1]
            elif weight in outputs:
                missing = above[name][1] - y + ((above[block][0] - below[block][0]) if adds else 0)
            else:
                kept = pruning_map.kept(name, 0)
                missing = (above[name][1] if kept is None else above[name][1][:, kept]) - y
            parameter = small.get_submodule(name).weight
            parameter.data = checked_ridge(parameter.data.double(), x, missing).float()
            changed[f"{name}.weight"] = parameter.data.clone()
    return changed


def order_of(pruning_map: PruningMap, everything: bool) -> list[str]:
    """What is repaired one after the other: what stands before an output, then the output."""
    if not everything:
        return [weight.name for weight in pruning_map.family.outputs]
    return [weight.name for weight in pruning_map.family.linears]


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("everything", [False, True])
def test_refit_is_brute_force_least_squares(stock: Any, tmp_path: Path, name: str, everything: bool) -> None:
    large, kept = stock(name), random_kept(name, 1)
    small = write_small_folder(large, kept, tmp_path / "small")
    pruning_map = map_for(large, kept)
    found = repaired(large, small, pruning_map, tmp_path / "a" / "place", method="refit", refit_all=everything)
    wanted = brute_force(
        load_small(large, dtype="fp32").eval(),
        load_small(small, dtype="fp32").eval(),
        sorted(kept),
        pruning_map,
        everything=everything,
    )
    with Checkpoint(small) as checkpoint:
        # The first cut layer's q, k and v see what the large model's do, and are left as they are.
        before = {tensor: checkpoint.read(tensor) for tensor in wanted}
    assert set(found) <= set(wanted)
    assert len(found) >= (2 if everything else len(wanted))
    for tensor, value in wanted.items():
        torch.testing.assert_close(
            found.get(tensor, before[tensor]), value, rtol=2e-3, atol=2e-4 * float(value.abs().max())
        )


@pytest.mark.parametrize("method", ["refit", "block"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3_text-gqa"])
def test_nothing_cut_is_nothing_changed(stock: Any, tmp_path: Path, name: str, method: str) -> None:
    small = write_small_folder(stock(name), {}, tmp_path / "small")
    assert repaired(stock(name), small, map_for(stock(name), {}), tmp_path / "a" / "place", method=method) == {}


def test_a_cut_that_costs_nothing_is_refitted_to_itself(stock: Any, tmp_path: Path) -> None:
    """Axes in the map, but equal streams: what was cut never said anything (its columns of down are zero)."""
    name = "llama-gqa"
    large = tmp_path / "large"
    shutil.copytree(stock(name), large)
    model = load_small(large, dtype="fp32")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[:, 30:] = 0
    model.save_pretrained(large)
    kept = {1: ([0, 1], list(range(30)))}
    small = write_small_folder(large, kept, tmp_path / "small")
    found = repaired(large, small, map_for(large, kept), tmp_path / "a" / "place", method="refit", refit_all=True)
    with Checkpoint(small) as checkpoint:
        for tensor, value in found.items():
            torch.testing.assert_close(value, checkpoint.read(tensor), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["refit", "block"])
def test_every_layer_comes_closer(stock: Any, tmp_path: Path, method: str) -> None:
    name = "qwen3-gqa"
    kept = random_kept(name, 2)
    small = write_small_folder(stock(name), kept, tmp_path / "small")
    repaired(stock(name), small, map_for(stock(name), kept), tmp_path / "a" / "place", method=method, steps=20)
    report = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in report]
    assert [line["step"] for line in lines] == list(range(1, LAYERS + 1))
    assert lines[0]["loss"] == lines[0]["error_before"] < 1e-12
    assert all(line["loss"] < line["error_before"] for line in lines[1:])


def test_masked_rows_are_solved_each_on_its_own() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=draw, dtype=torch.float64) * torch.logspace(-1, 1, 12, dtype=torch.float64)
    missing = torch.randn(200, 5, generator=draw, dtype=torch.float64)
    mask = torch.rand(5, 12, generator=draw) < 0.5
    mask[4] = False
    found = Residual()
    found.add(x, missing)
    update = found.update(mask)
    moment = found.moment + 0.01 * found.moment.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    for row in range(5):
        own = mask[row]
        wanted = torch.linalg.solve(moment[own][:, own], found.cross[row, own])
        torch.testing.assert_close(update[row, own], wanted, rtol=1e-6, atol=1e-9)
    assert not update[~mask].any()
    whole = masked_solve(moment, found.cross, torch.ones(5, 12, dtype=torch.bool))
    torch.testing.assert_close(whole, found.update(), rtol=1e-6, atol=1e-9)


def test_features_that_were_never_active_change_nothing() -> None:
    found = Residual()
    found.add(torch.zeros(8, 3), torch.ones(8, 2))
    assert not found.update().any()


def test_noise_is_not_fitted_and_what_is_there_is() -> None:
    """Few tokens for many features: without the check the repair of pure noise makes new tokens worse."""
    draw = torch.Generator().manual_seed(1)
    x, noise = torch.randn(240, 40, generator=draw), torch.randn(240, 6, generator=draw)
    truth = torch.randn(6, 40, generator=draw)
    x_new = torch.randn(4000, 40, generator=draw)

    def update(missing: Tensor) -> Tensor:
        found = CheckedResidual()
        found.fitted.add(x[:60], missing[:60])
        found.checked.add(x[60:], missing[60:])
        return found.update()

    assert (x_new.double() @ update(noise).T).square().mean() < 0.05  # and 2 where λ = 0.01 is believed
    gap = (update(x @ truth.T + 0.1 * noise) - truth).norm() / truth.norm()
    assert gap < 0.1
    unchecked = CheckedResidual()
    unchecked.fitted.add(x[:60], noise[:60])
    assert (x_new.double() @ unchecked.update().T).square().mean() > 1


@pytest.mark.parametrize("tokens_fitted", [20, 60, 200])
@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
def test_what_was_kept_aside_never_gets_worse(tokens_fitted: int, noise: float) -> None:
    draw = torch.Generator().manual_seed(tokens_fitted)
    x = torch.randn(tokens_fitted + 60, 40, generator=draw)
    missing = x @ torch.randn(40, 6, generator=draw) + noise * torch.randn(len(x), 6, generator=draw)
    found = CheckedResidual()
    found.fitted.add(x[:-60], missing[:-60])
    found.checked.add(x[-60:], missing[-60:])
    left = missing[-60:].double() - x[-60:].double() @ found.update().T
    assert left.square().sum() <= missing[-60:].double().square().sum()


def test_with_plenty_of_tokens_the_check_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(20000, 12, generator=draw)
    missing = x @ torch.randn(12, 5, generator=draw) + torch.randn(len(x), 5, generator=draw)
    found, plain = CheckedResidual(), Residual()
    for use in (found.fitted, plain):
        use.add(x[:15000], missing[:15000])
    found.checked.add(x[15000:], missing[15000:])
    torch.testing.assert_close(found.update(), plain.update())


@pytest.mark.parametrize(("count", "aside"), [(1, []), (2, [1]), (7, [6]), (8, [7]), (15, [7]), (24, [7, 15, 23])])
def test_windows_kept_aside(count: int, aside: list[int]) -> None:
    assert kept_aside(count).nonzero()[:, 0].tolist() == aside
