"""Keep-masks of single weights, eight entries a byte: what non-structured pruning left standing.

A mask is packed as numpy's `packbits` does (big bit order) over the flattened weight, which is also how the pruning
map stores it. It may stay on disk and be read by rows: the masks of a 70B model are 9 GB even so, and as booleans
they would be as large as the model in 8 bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import Tensor

from loram.checkpoint import TensorEntry, read_entry, read_header, tile_bounds
from loram.errors import PruningMapError
from loram.shards import write_tensors

MASK_FILE = ".mask.safetensors"
Masks = Callable[[str], Tensor | None]
"""A module's name → its keep-mask, bool (out, in); None where it has none."""


@dataclass(frozen=True, eq=False)
class PackedMask:
    """Which entries of one weight (out, in) were kept; `stored` is the packed bytes or where they lie in a file."""

    name: str
    shape: tuple[int, int]
    stored: Tensor | TensorEntry

    def __post_init__(self) -> None:
        count = self.shape[0] * self.shape[1]
        dtype, shape = self.stored.dtype, tuple(self.stored.shape)
        if dtype != torch.uint8 or shape != ((count + 7) // 8,):
            raise PruningMapError(
                f"mask {self.name}: {dtype} of shape {shape}; a weight of shape {self.shape} needs uint8 of "
                f"{((count + 7) // 8,)}, eight entries a byte"
            )

    @staticmethod
    def of(name: str, mask: Tensor) -> PackedMask:
        """A boolean mask (out, in), packed."""
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise PruningMapError(
                f"mask {name}: {mask.dtype} of shape {tuple(mask.shape)}; expected booleans (out, in)"
            )
        packed = numpy.packbits(mask.cpu().contiguous().numpy().reshape(-1))
        return PackedMask(name, (int(mask.shape[0]), int(mask.shape[1])), torch.from_numpy(packed))

    @staticmethod
    def of_rows(name: str, shape: tuple[int, int], rows: Iterable[Tensor]) -> PackedMask:
        """A boolean mask (out, in) that comes in pieces of rows; all but the last end at a whole byte."""
        packed = numpy.empty((shape[0] * shape[1] + 7) // 8, dtype=numpy.uint8)
        done = 0
        for piece in rows:
            bits = numpy.packbits(piece.cpu().contiguous().numpy().reshape(-1))
            packed[done : done + bits.size] = bits
            done += bits.size
        assert done == packed.size, "pieces must cover the weight"
        return PackedMask(name, shape, torch.from_numpy(packed))

    def spilled(self, folder: Path) -> PackedMask:
        """The same mask, its bytes in a file of its own in `folder` and no longer in memory."""
        file = folder / f"{self.name}{MASK_FILE}"
        write_tensors(file, {self.name: self.packed()})
        return replace(self, stored=read_header(file)[1][self.name])

    def packed(self) -> Tensor:
        """The bytes, uint8 (⌈out·in/8⌉,); PruningMapError where bits behind the last entry are set."""
        found = self.stored if isinstance(self.stored, Tensor) else read_entry(self.stored)
        spare = -self.shape[0] * self.shape[1] % 8
        if found.numel() and int(found[-1]) & ((1 << spare) - 1):
            raise PruningMapError(f"mask {self.name}: bits behind the last entry are set; the file is damaged")
        return found

    def unpack(self) -> Tensor:
        """The whole mask, bool (out, in)."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as bool; of a stored mask only these bytes are read."""
        width = self.shape[1]
        first, last = start * width, stop * width
        low, high = first // 8, (last + 7) // 8
        if isinstance(self.stored, Tensor):
            raw = self.stored[low:high]
        else:
            begin = self.stored.start
            raw = read_entry(replace(self.stored, shape=(high - low,), start=begin + low, end=begin + high))
        bits = numpy.unpackbits(raw.numpy())[first - 8 * low : last - 8 * low]
        return torch.from_numpy(bits).view(torch.bool).reshape(stop - start, width)

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """The mask in pieces of about 16 MiB: (first row, rows)."""
        for start, stop in tile_bounds(*self.shape):
            yield start, self.rows(start, stop)

    @property
    def kept(self) -> int:
        """How many entries stay."""
        return sum(int(rows.sum()) for _, rows in self.tiles())


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest_of(masks: Iterable[PackedMask]) -> str:
    """sha256 of masks by name, shape and bits, in the order of their names."""
    digest = hashlib.sha256()
    for mask in sorted(masks, key=lambda item: item.name):
        digest.update(f"{mask.name} {mask.shape[0]}x{mask.shape[1]}\n".encode())
        digest.update(mask.packed().numpy().data)
    return digest.hexdigest()


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """weight ∘ mask with plain zeros: a product of floats would leave -0 and NaN behind.

    As a product of whole numbers it takes a tenth of what `masked_fill` does in 16 bit on a CPU.
    """
    return (weight.view(INTEGERS[weight.element_size()]) * mask).view(weight.dtype)
