"""Imports of large libraries without the garbage collector, which would look through what they make again and again.

Torch and transformers make some millions of objects that stay;
collecting meanwhile took some seven percent of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
