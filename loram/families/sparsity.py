"""How many elements of a weight go when zeros are stored instead of units cut. Exact arithmetic, no torch.

Either a share of the weight (unstructured), or N:M (2102.04010): N of every M consecutive input features
stay in each row. Both are exact: `removed` says how many of `count` elements go, rounded down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from loram.errors import OptionError
from loram.families.family import Family, Geometry


@dataclass(frozen=True)
class Sparsity:
    """The share of elements that go; with `group`, all but `keep` of every `group` along the input."""

    ratio: Fraction
    keep: int = 0
    group: int = 0

    def removed(self, count: int) -> int:
        """How many of `count` elements go."""
        return int(count * self.ratio)

    def check_width(self, module: str, width: int) -> None:
        """OptionError where a weight's input features cannot be divided into groups."""
        if self.group and width % self.group:
            raise OptionError(
                f"--pattern {self.keep}:{self.group} does not divide {module}, which has {width} input features; "
                "choose a pattern whose second number divides them, or --method unstructured"
            )


def parse_sparsity(text: str) -> Sparsity:
    """`2:4` as N kept of every M; OptionError where nothing or everything would stay."""
    keep, colon, group = (part.strip() for part in text.partition(":"))
    if not colon or not keep.isdecimal() or not group.isdecimal():
        raise OptionError(f"--pattern is {text!r}; expected N:M, N kept of every M, such as 2:4")
    if not 0 < int(keep) < int(group):
        kept = "nothing" if int(keep) == 0 else "everything"
        raise OptionError(f"--pattern {text} keeps {kept}; N of N:M must lie between 1 and M - 1, such as 2:4")
    return Sparsity(1 - Fraction(int(keep), int(group)), int(keep), int(group))


def decoder_weights(family: Family, geometry: Geometry) -> Iterator[tuple[str, int]]:
    """Every weight that is pruned, by name, with its input features."""
    for layer in range(geometry.layers):
        for weight in family.linears:
            width = sum(geometry.size(part.count) * geometry.size(part.width) for part in weight.columns)
            yield f"{family.module(layer, weight)}.weight", width


def check_widths(family: Family, geometry: Geometry, sparsity: Sparsity) -> None:
    """OptionError where the pattern does not divide a Linear's input features."""
    for name, width in decoder_weights(family, geometry):
        sparsity.check_width(name.removesuffix(".weight"), width)
