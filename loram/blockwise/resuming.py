"""A pass over all blocks that can be killed at any moment and gone on with, forward or backward.

    for number, folder in forward_pass(runner, windows, steps, visit):
        ...                                # folder holds what visit(block, folder) found, now or in an earlier call

`visit` must run the block and leave what it found as files in the folder, which is then sealed. The hidden states
behind a block are saved too, unless that would take more than a fifth of the time. What was saved is read back bit for
bit, so a pass gone on with gives what an uninterrupted one gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from torch import Tensor

from loram.blockwise.backward import backward, loss_slope
from loram.blockwise.hidden import Hidden
from loram.blockwise.runner import Block, BlockRunner, Inputs
from loram.progress import SILENT, Progress
from loram.sealing import Steps

Visit = Callable[[Block, Path], None]
Backward = Callable[[Inputs], dict[str, Tensor]]
"""Carries the gradient through the block, observing inputs on the way; gives the gradients of its Linears."""
BackwardVisit = Callable[[Block, Backward, Path], None]
SHARE = 5
FILE = "hidden.bin"


def block_name(number: int) -> str:
    """The step that holds what was found at a block."""
    return f"block-{number:04}"


def input_name(number: int) -> str:
    """The step that holds the hidden states before a block."""
    return f"input-{number:04}"


def slope_name(number: int) -> str:
    """The step that holds the gradient in the input of a block."""
    return f"slope-{number:04}"


class Pace:
    """Whether it is time to save: at once when somebody asked to stop, else so that saving takes a fifth at most."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self._cost, self._last = steps, 0.0, 0.0

    def save(self, name: str, hidden: Hidden) -> bool:
        """Save hidden states as a step, if it is time to."""
        start = time.monotonic()
        if start - self._last < (SHARE - 1) * self._cost and not self._steps.urgent:
            return False
        with self._steps.writing(name) as folder:
            hidden.save(folder / FILE)
        self._last = time.monotonic()
        self._cost = self._last - start
        return True


def forward_pass(
    runner: BlockRunner, windows: Tensor, steps: Steps, visit: Visit, stop: int | None = None
) -> Iterator[tuple[int, Path]]:
    """Every block before `stop` in turn, with the folder of what was found there, in this call or an earlier one."""
    last = runner.layers if stop is None else min(stop, runner.layers)
    done = next((n for n in range(last) if not steps.whole(block_name(n))), last)
    start = next((n for n in range(done, 0, -1) if n == last or steps.whole(input_name(n))), 0)
    for number in range(start):
        yield number, steps.folder(block_name(number))
    if start == last:
        return
    hidden = runner.hidden(windows.shape) if start else runner.embed(windows)
    if start:
        hidden.load(steps.folder(input_name(start)) / FILE)
    pace, saved = Pace(steps), start
    for block in runner.blocks(hidden, start, last):
        with steps.writing(block_name(block.number)) as folder:
            visit(block, folder)
        after = block.number + 1
        if after < last and pace.save(input_name(after), hidden):
            steps.drop(input_name(saved))
            saved = after
        steps.stop_here()
        yield block.number, steps.folder(block_name(block.number))
    hidden.close()


def backward_pass(
    runner: BlockRunner,
    windows: Tensor,
    steps: Steps,
    visit: BackwardVisit,
    layers: Collection[int],
    *,
    progress: Progress = SILENT,
) -> Iterator[tuple[int, Path]]:
    """The blocks of `layers` from the last to the first, with ∂L/∂W of their Linears.

    L is the sum over the windows (N, T) of a window's mean next-token loss. Gradients are (out, in), computed in the
    runner's dtype and added up in fp32. Every weight is read twice. The inputs of all blocks are kept on disk, as
    they are needed again on the way back. `progress` advances by each block of the way there. Raises MismatchError
    where a gradient is not finite.
    """
    first, last = min(layers), runner.layers
    at = turning_point(runner, steps, layers)
    for number in sorted((n for n in layers if n >= at), reverse=True):
        yield number, steps.folder(block_name(number))
    if at == first:
        return
    slope = runner.hidden(windows.shape, copies=2)
    if at < last:
        slope.load(steps.folder(slope_name(at)) / FILE)
    else:
        keep_inputs(runner, windows, steps, first, progress)
        slope.load(steps.folder(input_name(last)) / FILE)
        loss_slope(runner, slope, windows, progress)
    pace = Pace(steps)
    for number in reversed(range(first, at)):
        turn(runner, steps, visit if number in layers else None, number, slope)
        if number == first or pace.save(slope_name(number), slope):
            for behind in range(first if number == first else number + 1, last + 1):
                steps.drop(slope_name(behind))
                steps.drop(input_name(behind))
        steps.stop_here()
        if number in layers:
            yield number, steps.folder(block_name(number))
    slope.close()


def turning_point(runner: BlockRunner, steps: Steps, layers: Collection[int]) -> int:
    """The first block whose way back is done and saved; the number of layers where none is."""
    first, last = min(layers), runner.layers
    for number in range(first, last):
        if not all(steps.whole(block_name(n)) for n in layers if n >= number):
            continue
        inputs = all(steps.whole(input_name(n)) for n in range(first, number))
        if number == first or (inputs and steps.whole(slope_name(number))):
            return number
    return last


def turn(runner: BlockRunner, steps: Steps, visit: BackwardVisit | None, number: int, slope: Hidden) -> None:
    """One block of the way back."""
    before = runner.hidden(slope.shape[:2], copies=2)
    before.load(steps.folder(input_name(number)) / FILE)
    with runner.block(number, before) as block:
        if visit is None:
            backward(block, slope, keep=False)
        else:
            with steps.writing(block_name(number)) as folder:
                visit(block, lambda inputs: backward(block, slope, keep=True, inputs=inputs), folder)
    before.close()


def keep_inputs(runner: BlockRunner, windows: Tensor, steps: Steps, first: int, progress: Progress) -> None:
    """The inputs of the blocks from `first` on, and the output of the last, as steps on disk."""
    last = runner.layers
    done = [n for n in range(first, last + 1) if steps.whole(input_name(n))]
    start = next((n for n, found in enumerate(done, first) if n != found), first + len(done)) - 1
    if start == last:
        return
    if start < first:
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden, 0, first):
            block.run()
            progress.advance()
        start = first
        with steps.writing(input_name(first)) as folder:
            hidden.save(folder / FILE)
    else:
        hidden = runner.hidden(windows.shape)
        hidden.load(steps.folder(input_name(start)) / FILE)
    for block in runner.blocks(hidden, start, last):
        block.run()
        with steps.writing(input_name(block.number + 1)) as folder:
            hidden.save(folder / FILE)
        progress.advance()
        steps.stop_here()
    hidden.close()
