"""What to change where training does not fit: each change with what it saves, the cheapest first.

Cheapest is what costs least in quality: first what computes the same in more time, then what reads less text, then
bits, and a deeper cut last (4 bits agree far better with the large model than any cut of the same size). Savings are
differences of the memory model's predictions.
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

    `deeper` is the same model after a deeper cut, with the words to type for it, where that is known.
    """

    model: Model
    work: Workload
    hardware: Hardware
    name: str = "SMALL"
    accumulate: int = 1
    deeper: tuple[Model, str] | None = None

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
        again = training.accumulate * -(-work.batch // batch)
        yield f"--batch {batch} --accumulate {again}", "the same steps, a little slower", with_batch(training, batch)
    if not work.checkpointing:
        yield "--checkpointing", "the same steps, about a third slower", doing(checkpointing=True)
    if model.quantize == "none":
        smaller = replace(training, model=replace(model, quantize="nf4"))
        command = f"`loram quantize {name} --type nf4 -o {name.rstrip('/')}-nf4` and training on that"
        yield command, "the linears in 4 bit", smaller
    if work.length > 64:
        shorter = doing(length=work.length // 2, supervised=None)
        yield f"--max-length {work.length // 2}", "longer rows are cut", shorter
    if training.deeper is not None:
        yield training.deeper[1], "a deeper cut", replace(training, model=training.deeper[0])
    if work.dropout and training.hardware.mask_bytes > 1:
        yield "--dropout 0", "no regularization", doing(dropout=0.0)


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
