"""Pictures of the quality grid as SVG text: bars of kept gain, and lines of loss over the ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from statistics import fmean
from xml.sax.saxutils import escape

STYLE = """  <style>
    text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
    .soft { fill: #57606a; font-size: 12px } .middle { text-anchor: middle } .right { text-anchor: end }
    .grid { stroke: #d0d7de } .axis, .whisker { stroke: #57606a; stroke-width: 1.5 }
    .large { fill: #0072b2; stroke: #0072b2 } .small { fill: #d55e00; stroke: #d55e00 } .seed { fill: #1f2328 }
    .line { fill: none; stroke-width: 2.5 } .dashed { stroke-dasharray: 6 4 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .soft { fill: #9aa4af } .grid { stroke: #3d444d } .axis, .whisker { stroke: #9aa4af }
      .large { fill: #56b4e9; stroke: #56b4e9 } .small { fill: #f0a35c; stroke: #f0a35c } .seed { fill: #e6edf3 }
    }
  </style>"""
LEFT, WIDTH, STEP, TOP = 500, 480, 26, 44


@dataclass(frozen=True)
class Bar:
    """A method's kept gain: one share per seed, and the standard error over the held-out rows."""

    label: str
    shares: tuple[float, ...]
    stderr: float


@dataclass(frozen=True)
class Line:
    """Losses over a number, under a CSS class; `dashed` for what nothing was cut from."""

    label: str
    points: tuple[tuple[float, float], ...]
    colour: str
    dashed: bool = False


def frame(size: tuple[int, int], title: str, description: str, body: Sequence[str]) -> str:
    """A whole SVG document with what a screen reader says."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" role="img" '
            'aria-labelledby="title description">',
            f'  <title id="title">{escape(title)}</title>',
            f'  <desc id="description">{escape(description)}</desc>',
            STYLE,
            *(f"  {part}" for part in body),
            "</svg>",
            "",
        ]
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A text element."""
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}>{escape(words)}</text>'


def stroke(start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    """A straight line."""
    return f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" class="{kind}"/>'


def bars(rows: Sequence[Bar], title: str) -> str:
    """Kept gain by method, 0 % (no training) to 100 % (LoRA on the large model), a dot for every seed."""
    low = min(0.0, min((min(row.shares) - row.stderr for row in rows), default=0.0))
    first = floor(low * 4) / 4
    bottom = TOP + STEP * len(rows)

    def x(share: float) -> float:
        return LEFT + WIDTH * (share - first) / (1.1 - first)

    ticks = [share / 4 for share in range(round(first * 4), 5)]
    body = [stroke((x(tick), TOP - 8), (x(tick), bottom), "axis" if tick == 0 else "grid") for tick in ticks]
    body += [text(x(tick), bottom + 18, f"{tick:.0%}", "soft middle") for tick in ticks]
    body += [
        text(x(0), TOP - 18, "no training", "soft middle"),
        text(x(1), TOP - 18, "LoRA on the large model", "soft middle"),
    ]
    for number, row in enumerate(rows):
        body += bar(row, x, TOP + STEP * number + STEP / 2)
    told = "; ".join(f"{row.label}: {fmean(row.shares):.0%}" for row in rows)
    return frame((LEFT + WIDTH + 40, bottom + 34), title, f"Kept gain by method. {told}.", body)


def bar(row: Bar, x: Callable[[float], float], y: float) -> Iterator[str]:
    """A label, a bar to the mean, a whisker of one standard error either way, and the seeds."""
    mean = fmean(row.shares)
    left, right = sorted((x(0), x(mean)))
    yield text(LEFT - 12, y + 5, row.label, "right")
    yield f'<rect x="{left:.1f}" y="{y - 8:.1f}" width="{right - left:.1f}" height="16" class="large" opacity="0.75"/>'
    yield stroke((x(mean - row.stderr), y), (x(mean + row.stderr), y), "whisker")
    if len(row.shares) > 1:
        yield from (f'<circle cx="{x(share):.1f}" cy="{y:.1f}" r="2.5" class="seed"/>' for share in row.shares)
    yield text(x(max(mean + row.stderr, 0, *row.shares)) + 8, y + 5, f"{mean:.0%}", "soft")


def lines(found: Sequence[Line], title: str, labels: tuple[str, str]) -> str:
    """Curves over one axis, each with its name at its right end; `labels` name the two axes."""
    width, height, left, top = 460, 300, 70, 24
    points = [point for line in found for point in line.points]
    columns = sorted({x for x, _ in points})
    low, high = floor(4 * min(y for _, y in points)) / 4, max(y for _, y in points)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - columns[0]) / (columns[-1] - columns[0])
        return left + width * across, top + height * (1 - (point[1] - low) / (high - low))

    body = [text(place((tick, low))[0], top + height + 20, f"{tick:g}", "soft middle") for tick in columns]
    for number in range(floor((high - low) * 2) + 1):
        y = place((columns[0], low + number / 2))[1]
        body += [
            stroke((left, y), (left + width, y), "grid"),
            text(left - 8, y + 4, f"{low + number / 2:g}", "soft right"),
        ]
    body += [
        text(left + width / 2, top + height + 42, labels[0], "soft middle"),
        text(left, top - 8, labels[1], "soft"),
    ]
    for line, y in zip(found, spread([place(line.points[-1])[1] for line in found]), strict=True):
        body += curve(line, [place(point) for point in line.points], y)
    told = "; ".join(f"{line.label}: " + ", ".join(f"{y:.2f} at {x:g}" for x, y in line.points) for line in found)
    return frame((left + width + 270, top + height + 56), title, f"{told}.", body)


def curve(line: Line, points: Sequence[tuple[float, float]], label: float) -> Iterator[str]:
    """A line with its points, and its name at height `label`."""
    spots = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = " dashed" if line.dashed else ""
    yield f'<polyline points="{spots}" class="{line.colour} line{dashed}" style="fill: none"/>'
    if not line.dashed:
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{line.colour}"/>' for x, y in points)
    yield text(points[-1][0] + 12, label + 5, line.label, "soft")


def spread(heights: Sequence[float], apart: float = 16) -> list[float]:
    """Heights for labels, in order, at least so far apart."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    found = list(heights)
    for above, below in pairwise(order):
        found[below] = max(found[below], found[above] + apart)
    return found
