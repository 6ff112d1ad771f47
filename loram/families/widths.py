"""How many heads and channels each layer keeps at a ratio, in exact arithmetic.

The rule is the paper's (2502.13533, by way of LLM-Pruner): with size C and ratio r,
floor(C·(1−r)) channels are kept; of K kv heads of width d,
floor((K·d − floor(K·d·(1−r))) / d) are removed; the first and last layers stay whole.
Floats get this wrong (10240 channels at 0.8 give 2047), so ratios are fractions from their text.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from loram.errors import OptionError


def parse_ratio(text: str | float | int) -> Fraction:
    """The exact fraction that `text` spells; a float through its repr. Must lie strictly between 0 and 1."""
    spelled = repr(text) if isinstance(text, float) else str(text)
    try:
        ratio = Fraction(spelled.strip())
    except (ValueError, ZeroDivisionError):
        raise OptionError(f"--ratio is {spelled!r}; expected a decimal or fraction such as 0.65 or 13/20") from None
    if not 0 < ratio < 1:
        raise OptionError(f"--ratio is {spelled}; it must lie strictly between 0 and 1")
    return ratio


def kept_channels(size: int, ratio: Fraction, round_to: int = 1) -> int:
    """floor(size·(1−ratio)), then down to a multiple of `round_to`."""
    kept = int(size * (1 - ratio))
    return kept - kept % round_to


def kept_heads(kv_heads: int, head_dim: int, ratio: Fraction) -> int:
    """Kept kv heads by the paper's rule; whole heads, so the cut is coarser than the ratio."""
    rows = kv_heads * head_dim
    return kv_heads - (rows - int(rows * (1 - ratio))) // head_dim


@dataclass(frozen=True)
class Widths:
    """Kept units per layer of each axis: `kv_heads[l]` key/value heads and `mlp[l]` channels."""

    kv_heads: tuple[int, ...]
    mlp: tuple[int, ...]

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths, so that a stock config describes the model."""
        return len(set(self.kv_heads)) == 1 and len(set(self.mlp)) == 1


def whole_widths(layers: int, kv_heads: int, mlp: int) -> Widths:
    """Nothing cut."""
    return Widths((kv_heads,) * layers, (mlp,) * layers)


@dataclass(frozen=True)
class Cut:
    """What is asked for: the ratio, the layers left whole, and the rounding."""

    ratio: Fraction
    keep_first: int = 4
    keep_last: int = 2
    round_to: int = 1

    def widths(self, layers: int, kv_heads: int, head_dim: int, mlp: int) -> Widths:
        """Kept units per layer; OptionError where nothing would be cut or nothing would be left."""
        if self.keep_first + self.keep_last >= layers:
            raise OptionError(
                f"--keep-first {self.keep_first} and --keep-last {self.keep_last} leave no layer of {layers} to prune; "
                f"make their sum less than {layers}"
            )
        channels = kept_channels(mlp, self.ratio, self.round_to)
        heads = kept_heads(kv_heads, head_dim, self.ratio)
        if channels < 1 or heads < 1:
            what = "MLP channel" if channels < 1 else "kv head"
            raise OptionError(
                f"--ratio {float(self.ratio):g} leaves no {what} (of {mlp} channels and {kv_heads} kv heads"
                + (f", rounded to {self.round_to}" if self.round_to > 1 else "")
                + "); use a smaller ratio"
            )
        whole = [not self.keep_first <= layer < layers - self.keep_last for layer in range(layers)]
        return Widths(
            kv_heads=tuple(kv_heads if w else heads for w in whole),
            mlp=tuple(mlp if w else channels for w in whole),
        )

    def depth(self, layers: int) -> int:
        """How many of the layers between the first and the last ones are dropped: all but floor(n·(1−ratio))."""
        between = layers - self.keep_first - self.keep_last
        if between < 1:
            raise OptionError(
                f"--keep-first {self.keep_first} and --keep-last {self.keep_last} leave no layer of {layers} to drop; "
                f"make their sum less than {layers}"
            )
        dropped = between - int(between * (1 - self.ratio))
        if dropped == layers:
            raise OptionError(f"--ratio {float(self.ratio):g} leaves no layer of {layers}; use a smaller ratio")
        return dropped


def describe_uncut(kv_heads: int, mlp: int, widths: Widths) -> list[str]:
    """A sentence for every axis that the ratio asked to cut and that could not be."""
    notes = []
    if min(widths.kv_heads) == kv_heads:
        why = "there is one kv head" if kv_heads == 1 else f"{kv_heads} kv heads are too coarse for this ratio"
        notes.append(f"attention is not cut: {why}")
    if min(widths.mlp) == mlp:
        notes.append("MLP channels are not cut: the ratio and --round-to leave all of them")
    return notes
