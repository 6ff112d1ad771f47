"""Every error loram raises on purpose, and the exit code that each one means.

    LoramError                     1   (never raised itself: a subclass says what went wrong)
    ├── OptionError                2   unknown or impossible option value
    │   └── RecipeError            2   the same, found in a recipe file
    ├── OutputError                2   the output exists, or is one of the inputs
    ├── KindError                  2   a folder of the wrong kind: another stage comes first
    ├── ResourceError              3   does not fit, disk full
    │   └── OutOfMemory            3   memory, of whichever device, ran out
    ├── InputError                 4   a damaged, missing or inconsistent input
    │   ├── CheckpointError        4   weights: truncated, missing, not safetensors
    │   ├── FamilyError            4   an architecture or config that loram cannot prune
    │   ├── PruningMapError        4   a map that contradicts itself or the model
    │   ├── AdapterError           4   an adapter that cannot be read or is of an unknown make
    │   └── DataError              4   training, calibration or evaluation data; tokenizer
    ├── HubError                   5   Hub or network
    ├── MismatchError              6   wrong base, wrong map, wrong shapes, NaN or Inf
    └── Interrupted               75   stopped by a signal; can be resumed

A message is one sentence or two: what was found, what was expected, where, and what to type.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class LoramError(Exception):
    """What all of loram's own errors have in common: a sentence and an exit code."""

    exit_code: ClassVar[int] = 1


class OptionError(LoramError):
    """An option is unknown, impossible, or contradicts another."""

    exit_code = 2


class RecipeError(OptionError):
    """A recipe file holds a key or a value that no stage takes."""


class OutputError(LoramError):
    """The output folder exists already, or is one of the inputs."""

    exit_code = 2


class KindError(LoramError):
    """A folder is not of the kind this stage works on."""

    exit_code = 2


class ResourceError(LoramError):
    """The work does not fit into memory or on the disk."""

    exit_code = 3


class OutOfMemory(ResourceError):
    """Memory ran out, of the process or of a GPU."""


class InputError(LoramError):
    """An input is damaged, missing or inconsistent."""

    exit_code = 4


class CheckpointError(InputError):
    """Weights cannot be read: missing, truncated, or not safetensors."""


class FamilyError(InputError):
    """The architecture is not in the tables, or its config contradicts the table."""


class PruningMapError(InputError):
    """A pruning map is damaged, or contradicts itself or the model it is used with."""


class AdapterError(InputError):
    """An adapter cannot be read, or is of a make that loram does not handle."""


class DataError(InputError):
    """Text data or a tokenizer cannot be used."""


class HubError(LoramError):
    """The Hub or the network said no."""

    exit_code = 5


class MismatchError(LoramError):
    """Two inputs do not belong together, or numbers are not finite."""

    exit_code = 6


class Interrupted(LoramError):
    """A signal stopped the work at a point from which it can be resumed: `what` happened, `command` goes on."""

    exit_code = 75

    def __init__(self, what: str, command: str = "") -> None:
        super().__init__(f"{what}; go on with `{command}`" if command else what)
        self.what = what


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk had no room: the kernel's word for it, also where torch and safetensors pass it on as a text.

    torch's writer says only that its file has not grown as it should have.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    words = ("No space left on device", "os error 28", "unexpected pos", "PytorchStreamWriter failed")
    return isinstance(error, Exception) and any(word in str(error) for word in words)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, torch's (of any device), or the kernel's own word for it.

    Told by name and text, so that torch need not be imported.
    """
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    if "OutOfMemoryError" in {kind.__name__ for kind in type(error).__mro__}:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(
        words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory")
    )
