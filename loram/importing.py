"""Large libraries without the garbage collector, which would look through what they make again and again.

Torch and transformers make some millions of objects that stay. Collecting while they are imported took some seven
percent of the time; the interpreter's last look through them, when it ends, 0.9 s of CPU.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def collecting_paused() -> Iterator[None]:
    """While the block runs, nothing is collected, unless it was switched off anyway."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def end_at_once() -> None:
    """When this process ends, its objects are left to the system: the collector does not look for cycles among them.

    For a program that closes what it writes, as the command line does; a library does not decide this for its user.
    """
    atexit.register(gc.freeze)
