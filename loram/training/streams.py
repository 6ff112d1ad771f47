"""Large and small model side by side, one block of each in memory: what the small one's repair is computed from.

Two streams of hidden states run through the layers: the large model's, and the small model's with every layer before
already repaired. The target of a small layer is what the large stream is when the next kept layer begins, so that
a layer also takes over what layers dropped behind it would have added, and the error that earlier layers left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loram.blockwise import Block, BlockRunner, Hidden
from loram.pruning.residual import CheckedResidual
from loram.pruning_map import PruningMap

CHECKED = 8


@dataclass
class Pair:
    """A small layer and its target: `large_in` and `small_in` are the streams before it, `target` the large one."""

    number: int
    block: Block
    large: BlockRunner
    large_in: Hidden
    target: Hidden
    pruning_map: PruningMap

    @property
    def small_in(self) -> Hidden:
        """The small stream before the layer."""
        return self.block.hidden

    @property
    def large_number(self) -> int:
        """The large model's number of the layer."""
        return self.pruning_map.numbering.kept[self.number]

    def module(self, weight: str) -> str:
        """The large model's module of a weight of this layer."""
        return f"{self.pruning_map.family.prefix}{self.large_number}.{weight}"

    def parts(self) -> Iterator[slice]:
        """Windows, a few at a time."""
        return (part for part, _ in self.block.batches())

    @torch.no_grad()
    def error(self) -> float:
        """Mean over tokens of ‖target − output‖² / ‖target‖²: what the next layer's norm will see of it."""
        total, count = 0.0, 0
        for part, x in self.block.batches():
            found = relative_error(self.block(x), self.target.read(part).to(x.device))
            total, count = total + float(found) * x[..., 0].numel(), count + x[..., 0].numel()
        return total / count


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖target − output‖² / ‖target‖², fp32; a token counts the same however large its state."""
    wanted = target.float()
    missing = (output.float() - wanted).square().sum(-1)
    return (missing / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def side_by_side(large: BlockRunner, small: BlockRunner, windows: Tensor, pruning_map: PruningMap) -> Iterator[Pair]:
    """Every layer of the small model with its target; what is changed in its module is what the next layers see."""
    kept = (*pruning_map.numbering.kept, pruning_map.geometry.layers)
    large_in, small_in = large.embed(windows), small.embed(windows)
    target = large.hidden(windows.shape)
    for block in large.blocks(large_in, stop=kept[0]):
        block.run()
    for number, block in enumerate(small.blocks(small_in)):
        with large.block(kept[number], large_in) as above:
            above.run(into=target)
        for dropped in large.blocks(target, kept[number] + 1, kept[number + 1]):
            dropped.run()
        yield Pair(number, block, large, large_in, target, pruning_map)
        block.run()
        large_in, target = target, large_in


def was_cut(pruning_map: PruningMap, layer: int) -> bool:
    """Whether something of a large layer, or the layer behind it, was pruned."""
    kept = pruning_map.numbering.kept
    following = kept.index(layer) + 1
    prefix = f"{pruning_map.family.prefix}{layer}."
    return (
        any(pruning_map.kept(prefix + weight.name, 1) is not None for weight in pruning_map.family.outputs)
        or any(name.startswith(prefix) for name in pruning_map.masks)
        or (kept[following] if following < len(kept) else pruning_map.geometry.layers) > layer + 1
    )


@contextmanager
def hearing(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While the block runs, the last input and output of these Linears."""
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hear(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            heard[name] = inputs[0].detach(), output.detach()

        return hear

    handles: list[Any] = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def kept_aside(count: int) -> Tensor:
    """Which of `count` windows are not fitted but say how much of a repair to believe, bool: every CHECKED-th.

    Of fewer the last one; none where there is but one.
    """
    return (torch.arange(count) % CHECKED == min(CHECKED, count) - 1) & (count > 1)


@torch.no_grad()
def residuals(pair: Pair, names: Sequence[str]) -> dict[str, CheckedResidual]:
    """What the outputs of some Linears of the layer lack, with their inputs, over all windows.

    q, k, v, gate and up lack what the large model's same rows give on its own stream. o and down lack the difference
    of the streams after they are added, where the family adds them as they are: then they also mend what came before.
    The same windows are kept aside in all layers: their stream is then what other text would see, not what was fitted.
    """
    aside = kept_aside(len(pair.small_in))
    found = {name: CheckedResidual() for name in names}
    outputs = [weight.name for weight in pair.pruning_map.family.outputs]
    adds = pair.pruning_map.family.adds_outputs
    with (
        pair.large.block(pair.large_number, pair.large_in) as large,
        hearing(large.module, names) as above,
        hearing(pair.block.module, names) as below,
    ):
        for part in pair.parts():
            device = pair.block.runner.device
            x_large, x_small = (h.read(part).to(device) for h in (pair.large_in, pair.small_in))
            needs_large = not (adds and list(names) == outputs[-1:])
            if needs_large:
                large(x_large)
            y_small = pair.block(x_small)
            for name in names:
                x, y = below[name]
                if name == outputs[-1] and adds:
                    missing = pair.target.read(part).to(device) - y_small
                elif name in outputs:
                    missing = above[name][1] - y + ((x_large - x_small) if adds else 0)
                else:
                    kept = pair.pruning_map.kept(pair.module(name), 0)
                    wanted = above[name][1]
                    missing = (wanted if kept is None else wanted[..., kept.to(device)]) - y
                for use, rows in ((found[name].fitted, ~aside[part]), (found[name].checked, aside[part])):
                    if bool(rows.any()):
                        use.add(x[rows].flatten(0, -2), missing[rows].flatten(0, -2))
    return found
