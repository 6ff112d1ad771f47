"""Which of several processes this one is, as launchers (accelerate, torchrun) say it in the environment.

Only process 0 writes; the others compute and wait. torch is imported where there are several.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from loram.errors import LoramError


def process_count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_writer() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def connect() -> None:
    """Let the processes speak to each other; nothing to do for a single one."""
    if process_count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def wait() -> None:
    """Go on when all processes have come here."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()


def done_by_writer(action: Callable[[], Any]) -> Any:
    """What `action` gives in process 0, in all of them; its error, too."""
    from torch import distributed

    if not distributed.is_initialized():
        return action()
    box: list[Any] = [None, None]
    if is_writer():
        try:
            box[0] = action()
        except LoramError as error:
            box[1] = error
    distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def first_found(value: str | None) -> str | None:
    """The first value that is not None among the processes, the same in all of them."""
    from torch import distributed

    if not distributed.is_initialized():
        return value
    values: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return next((found for found in values if found is not None), None)
