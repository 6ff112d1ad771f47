"""What to change where training does not fit: each change with what it saves, the cheapest first.

Cheapest is what costs least in quality: first what computes the same in more time, then bits, then what reads less
text, and a deeper cut (4 bits agree far better with the large model than any cut of the same size). One layer in memory
computes the same as well; on a GPU it comes after the bits, for a step would wait there for the disk most of the time.
Savings are differences of the memory model's predictions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from loram.activations import Workload
from loram.memory import format_bytes
from loram.memory_model import CUDA, Hardware, Model, training_memory

SHOWN = 3
WORTH = 0.01
"""Share of the peak that a change must save to be named."""


@dataclass(frozen=True)
class Training:
    """A training that is to fit: what is trained, how, where, and how the command line spells it.

    `deeper` is the same model after a deeper cut, with the words to type for it, where that is known; `streamable` says
    whether the other options go with `--streamed`.
    """

    model: Model
    work: Workload
    hardware: Hardware
    name: str = "SMALL"
    accumulate: int = 1
    deeper: tuple[Model, str] | None = None
    streamable: bool = False

    @property
    def peak(self) -> int:
        """The predicted peak, in bytes."""
        return training_memory(self.model, self.work, self.hardware).total


@dataclass(frozen=True)
class Change:
    """What to type, what it costs in a few words, and the bytes of the peak that it saves."""

    flags: str
    cost: str
    saves: int

    def __str__(self) -> str:
        return f"{self.flags} saves {format_bytes(self.saves)} ({self.cost})"


def cheapest(training: Training, limit: int | None = None) -> tuple[Change, ...]:
    """The three cheapest changes that save anything worth naming; `limit`: the bytes that can be had, where known."""
    peak = training.peak
    found = []
    for flags, cost, changed in candidates(training, limit):
        saves = peak - changed.peak
        if saves > WORTH * peak:
            found.append(Change(flags, cost, saves))
    return tuple(found[:SHOWN])


def candidates(training: Training, limit: int | None) -> Iterator[tuple[str, str, Training]]:
    """Every change that there is to make: (flags, cost, the training after it)."""
    work, model, name = training.work, training.model, training.name

    def doing(**changes: object) -> Training:
        return replace(training, work=replace(work, **changes))  # type: ignore[arg-type]

    if not work.mixed and training.hardware is CUDA:
        yield "--dtype bf16", "half the bytes of every value", doing(dtype="bf16")
    for batch in smaller_batches(training, limit):
        times = -(-work.batch // batch)
        cost = f"every weight is read {times} times as often" if work.streamed else "a little slower"
        yield (
            f"--batch {batch} --accumulate {training.accumulate * times}",
            f"the same steps, {cost}",
            with_batch(training, batch),
        )
    if not work.checkpointing:
        yield "--checkpointing", "the same steps, about a third slower", doing(checkpointing=True)
    if training.hardware is not CUDA:
        yield from streaming(training)
    if model.quantize == "none" and not work.streamed:
        smaller = replace(training, model=replace(model, quantize="nf4"))
        command = f"`loram quantize {name} --type nf4 -o {name.rstrip('/')}-nf4` and training on that"
        yield command, "the linears in 4 bit", smaller
    if training.hardware is CUDA:
        yield from streaming(training)
    if work.length > 64:
        shorter = doing(length=work.length // 2, supervised=None)
        yield f"--max-length {work.length // 2}", "longer rows are cut", shorter
    if training.deeper is not None:
        yield training.deeper[1], "a deeper cut", replace(training, model=training.deeper[0])
    if work.dropout and training.hardware.mask_bytes > 1:
        yield "--dropout 0", "no regularization", doing(dropout=0.0)


def streaming(training: Training) -> Iterator[tuple[str, str, Training]]:
    """One layer in memory, where that is not refused and saves more than computing activations again does alone."""
    if not training.streamable or training.work.streamed or training.model.quantize != "none":
        return
    again = replace(training, work=replace(training.work, checkpointing=True))
    streamed = replace(again, work=replace(again.work, streamed=True))
    if again.peak - streamed.peak > WORTH * training.peak:
        slower = "about 1.8 times the processor time, and " if training.hardware is not CUDA else ""
        yield "--streamed", f"the same steps, {slower}every weight is read twice in each", streamed


def smaller_batches(training: Training, limit: int | None) -> list[int]:
    """The largest smaller batch that fits alone; half of it where none does or nobody knows; none of one row."""
    batch, halves = training.work.batch, []
    while batch > 1:
        batch //= 2
        halves.append(batch)
    fitting = [size for size in halves if limit is not None and with_batch(training, size).peak <= limit]
    return (fitting or halves)[:1]


def with_batch(training: Training, batch: int) -> Training:
    """The same with fewer rows."""
    work = training.work
    carry = None if work.supervised is None else -(-work.supervised * batch // work.batch)
    return replace(training, work=replace(work, batch=batch, supervised=carry))


def sentence(training: Training, limit: int | None = None) -> str:
    """The changes in a row, and which of them is enough."""
    found = cheapest(training, limit)
    if not found:
        return "nothing that training could be asked to do differently would save much; use a smaller model"
    spelled = [
        f"{change}" + (": enough" if limit is not None and training.peak - change.saves <= limit else "")
        for change in found
    ]
    return "cheapest first: " + "; ".join(spelled)
