"""The hidden states of all windows, in memory or in a file that is read and written by rows.

The file is not mapped into memory: mapped pages count as ours, and a limit on memory would not know the difference.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from loram.errors import CheckpointError


class Hidden:
    """A tensor of (windows, length, width) that is read and written by windows; in `file` where one is given."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, file: Path | None = None) -> None:
        self.shape, self.dtype, self.file = shape, dtype, file
        self._memory: Tensor | None = None
        self._descriptor: int | None = None
        if file is None:
            self._memory = torch.empty(shape, dtype=dtype)
        else:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(self._descriptor, self.nbytes)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def in_memory(self) -> bool:
        """Whether it is in memory."""
        return self._memory is not None

    def read(self, rows: slice) -> Tensor:
        """Some windows (rows, length, width); to be left as it is, and good until the same rows are written."""
        first, last = self._span(rows)
        if self._memory is not None:
            return self._memory[first:last]
        values = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        view = raw(values)
        offset, done = first * self._row_bytes, 0
        while done < len(view):
            got = os.preadv(self._open, [view[done:]], offset + done)
            if not got:
                raise CheckpointError(f"{self.file} ends too early; something else has written to it")
            done += got
        return values

    def write(self, rows: slice, values: Tensor) -> None:
        """Put windows in place of those that are there."""
        first, last = self._span(rows)
        if self._memory is not None:
            self._memory[first:last] = values.detach()
            return
        view = raw(values.detach().to("cpu", self.dtype).contiguous())
        offset, done = first * self._row_bytes, 0
        while done < len(view):
            done += os.pwrite(self._open, view[done:], offset + done)

    def save(self, file: Path) -> None:
        """Write a copy of everything into a file."""
        if self.file is not None:
            shutil.copyfile(self.file, file)
            return
        assert self._memory is not None, "the hidden states were closed"
        with open(file, "wb", buffering=0) as stream:
            view, done = raw(self._memory), 0
            while done < len(view):
                done += stream.write(view[done:])

    def load(self, file: Path) -> None:
        """Take over what `save` has written."""
        if file.stat().st_size != self.nbytes:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, expected {self.nbytes}; it is damaged")
        if self._descriptor is not None:
            assert self.file is not None
            shutil.copyfile(file, self.file)  # the descriptor stays good: the file is written over, not replaced
            return
        assert self._memory is not None, "the hidden states were closed"
        with open(file, "rb", buffering=0) as stream:
            view, done = raw(self._memory), 0
            while done < len(view):
                got = stream.readinto(view[done:])
                if not got:
                    raise CheckpointError(f"{file} ends too early; something else has written to it")
                done += got

    def close(self) -> None:
        """Let go of the memory; delete the file."""
        self._memory = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            assert self.file is not None
            self.file.unlink(missing_ok=True)

    @property
    def _open(self) -> int:
        assert self._descriptor is not None, "the hidden states were closed"
        return self._descriptor

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def _span(self, rows: slice) -> tuple[int, int]:
        first, last, step = rows.indices(len(self))
        assert step == 1, "windows are read one after the other"
        return first, max(first, last)


def raw(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in memory."""
    view: memoryview = values.reshape(-1).view(torch.uint8).numpy().data
    return view
