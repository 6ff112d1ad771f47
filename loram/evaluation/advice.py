"""What to change where an adapter helps the large model less than it could: by how its small model was made.

The order is that of what was measured (loram/measured.py, docs/transfer.md): the text that the cut was repaired on
first, which costs nothing, then plain updates in place of masked ones, bits instead of cuts, the score, a few steps on
the large model itself, repair layer by layer, scales, and more steps or a higher rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

MILD = Fraction(3, 10)


@dataclass(frozen=True)
class Making:
    """How a small model was made and trained, as far as manifests say; None is unknown."""

    compression: tuple[str, ...] = ()
    method: str | None = None
    ratio: Fraction | None = None
    task_text: bool | None = None
    score: str | None = None
    steps: int | None = None
    scaled: bool = False
    masked: bool = False
    """Whether what was trained was an update under the mask of the pruned weights."""
    touched: bool = False
    """Whether further steps were taken on the large model itself."""


def advise(made: Making) -> tuple[str, ...]:
    """Sentences for a person, the strongest lever first; each names what to type."""
    more = "train more steps" if made.steps is None else f"train more than {made.steps} steps"
    scales = (
        "choose scales on the large model (`loram recover --calibrate FILE`)" if cut(made) and not made.scaled else ""
    )
    plain = "train a plain update on the pruned weights (`loram train --unmasked-update`)" if made.masked else ""
    found = [repair(made), plain, bits(made), scored(made), touching(made), layers(made), scales]
    found.append(f"{more}, or at a higher rate (`loram train --lr`)")
    return tuple(sentence for sentence in found if sentence)


def cut(made: Making) -> bool:
    """Whether anything was taken away, other than bits."""
    return bool({"axes", "mask", "depth"} & {*made.compression})


def repair(made: Making) -> str:
    """The text of the calibration, and the closed form that it serves."""
    if not cut(made):
        return ""
    if made.method == "random":
        return "cut by score and on your own text (`--method structured --calibration FILE --calibration builtin`)"
    if made.task_text is False:
        return "calibrate on the text that you train on (`loram prune --calibration FILE --calibration builtin`)"
    if made.compression[:1] == ("axes",) and not {"refit", "aligned"} & {*made.compression}:
        return "let prune refit what it has cut (`--refit`)"
    return ""


def scored(made: Making) -> str:
    """What heads and channels are chosen by: gradients on the task's text beat norms of inputs."""
    if made.method != "structured" or made.score in (None, "taylor") or not made.task_text:
        return ""
    return "choose what is cut by gradients (`loram prune --score taylor`)"


def touching(made: Making) -> str:
    """Steps on the large model itself: what did not carry over is learnt there."""
    if made.touched or not cut(made):
        return ""
    command = "`loram train LARGE --adapter ADAPTER --streamed --steps 8`, or `loram run --touch-up 8`"
    return f"take a few steps on the large model itself, one layer in memory at a time ({command})"


def layers(made: Making) -> str:
    """Repair that sees what earlier layers left: before training, and before quantizing."""
    if not cut(made) or "aligned" in made.compression:
        return ""
    before = "quantizing" if {"nf4", "int8"} & {*made.compression} else "training"
    return f"repair the small model layer by layer before {before} (`loram align --method block`)"


def bits(made: Making) -> str:
    """A milder cut, paid for in bits."""
    if not cut(made) or (made.ratio is not None and made.ratio <= MILD):
        return ""
    less = "cut less" if made.ratio is None else f"cut less than {float(made.ratio):g}"
    quantized = bool({"nf4", "int8"} & {*made.compression})
    return f"{less} (`--ratio`)" if quantized else f"{less} and take 4 bits for it (`--ratio`, `--quantize nf4`)"
