"""docs/transfer.md and its pictures, from the records of the quality grid alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks import findings
from benchmarks.cells import RESULTS
from benchmarks.findings import FIRST, HALF, NOT_RUN
from benchmarks.grid import CHOICES, DEEP, ELSEWHERE, LEVERS, METHODS, MODELS, RATES, SPARSIFIED, TASKS, UNCUT, Cell
from benchmarks.kept_gain import Outcome, Records, spelled
from benchmarks.pictures import Bar, Line, bars, lines

MODEL, TASK = "smollm2-135m", "gsm8k"
RATIOS = ("0.3", "0.5", "0.7", "0.9")
FOUR = (
    ("random", "random-distill", "random heads and channels"),
    ("refit", "distill", "heads and channels by Wanda, refit"),
    ("semi", "semi-distill", "2:4 single weights"),
    ("unstructured", "unstructured-distill", "50 % single weights"),
)
NARROWER = ("distill", "taylor", "taylor-block", "random-touched", "taylor-touched")
"""Rows with the first and the last layer left whole, besides those that both parts of the table have."""
Row = tuple[str, str, tuple[int, int] | None]


def rows(model: str) -> list[Row]:
    """(method, ratio, layers kept whole) of the table, in its order."""
    found: list[Row] = [(name, "", None) for name in UNCUT]
    for keep in MODELS[model].keep:
        found += [(name, "0.5", keep) for name in ("random", "structured", "refit-general", "refit", "depth")]
        found += [(name, "0.5", keep) for name in LEVERS if keep == FIRST]
        found += [(name, "0.5", keep) for name in NARROWER if keep != FIRST]
    found += [(name, "0.5", keep) for keep in MODELS[model].keep for name in ("taylor-calibrated", "refit-calibrated")]
    found += [(name, "0.5", None) for name in SPARSIFIED]
    return (
        found
        + [("taylor-block-nf4", "0.5", FIRST)]
        + [(name, ratio, FIRST) for name in ("taylor-nf4", "refit-nf4") for ratio in RATIOS[:3]]
        + [(name, "0.7", FIRST) for name in DEEP]
        + [("refit", ratio, FIRST) for ratio in ("0.3",)]
    )


def label(row: Row) -> str:
    """A method in words, with its ratio where that is not the usual one."""
    method, ratio, _ = row
    return METHODS[method].label + (f", ratio {ratio}" if ratio not in ("", "0.5") else "")


def whole(keep: tuple[int, int] | None) -> str:
    """Which layers stay whole."""
    return "" if keep is None else f"{keep[0]}/{keep[1]}"


def table(records: Records, wanted: Iterable[Row]) -> Iterator[str]:
    """The table of some methods."""
    yield (
        "| how the small model is made | layers whole, first/last | held-out loss of large + recovered | kept gain | "
        "± over rows | seeds | lr | parameters ÷ | bytes ÷ | CPU minutes to make it |"
    )
    yield "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|"
    for row in wanted:
        method, ratio, keep = row
        found = records.outcome(method, ratio, keep)
        cells = [label(row), whole(keep), *([NOT_RUN, *[""] * 7] if found is None else figures(found))]
        yield "| " + " | ".join(cells) + " |"


def figures(found: Outcome) -> list[str]:
    """An outcome's cells."""
    return [
        ", ".join(f"{loss:.3f}" for loss in found.losses),
        f"**{spelled(found.kept)}**" if len(found.kept) == 1 else spelled(found.kept),
        f"{found.stderr:.0%}",
        str(len(found.seeds)),
        f"{found.rates[0]:g}" + "".join(f" ({rate:g})" for rate in found.rates[1:]),
        f"{found.reduction:.2f}",
        f"{found.bytes_reduction:.2f}",
        f"{found.seconds / 60:.1f}",
    ]


def rates(records: Records) -> Iterator[str]:
    """The learning rates that were tried, on the large model and on the small one."""
    yield "| trained on | " + " | ".join(f"lr {rate:g}" for rate in RATES) + " |"
    yield "|---|" + "---:|" * len(RATES)
    for words, cell in (
        ("the large model (ceiling)", records.cell("ceiling")),
        ("the small model (refit on half task text, 4/2)", records.cell("refit", ratio="0.5", keep=FIRST)),
    ):
        losses = (records.loss(replace(cell, lr=rate)) for rate in RATES)
        yield f"| {words} | " + " | ".join(NOT_RUN if loss is None else f"{loss:.3f}" for loss in losses) + " |"


def loss_of(records: Records, cell: Cell) -> str:
    """A loss as a cell of a table."""
    loss = records.loss(cell)
    return NOT_RUN if loss is None else f"{loss:.3f}"


def ablation(records: Records) -> Iterator[str]:
    """Recovery and alignment, by method: the paper's figure 6."""
    yield (
        "| what is cut | small + adapter, not aligned | small + adapter, aligned | large + recovered, not aligned | "
        "large + recovered, aligned |"
    )
    yield "|---|---:|---:|---:|---:|"
    for plain, aligned, words in FOUR:
        keep = None if plain in ("semi", "unstructured") else FIRST
        found = [
            loss_of(records, records.cell(name, ratio="0.5", keep=keep, measured=measured))
            for measured in ("small", "large")
            for name in (plain, aligned)
        ]
        yield f"| {words} | " + " | ".join(found) + " |"


def sweep(records: Records) -> Iterator[str]:
    """Naive pruning against LoRAM over the ratio: the paper's figure 7."""
    yield "| ratio | parameters ÷ | naive: small + adapter | LoRAM: large + recovered | kept gain of LoRAM |"
    yield "|---:|---:|---:|---:|---:|"
    for ratio in RATIOS:
        cell = records.cell("refit", ratio=ratio, keep=FIRST)
        body, kept = records.find(cell), records.kept(cell)
        cut = "" if body is None else f"{body['reduction']['reduction']:.2f}"
        share = NOT_RUN if kept is None else f"{kept[0]:.0%} ± {kept[1]:.0%}"
        yield (
            f"| {ratio} | {cut} | {loss_of(records, replace(cell, measured='small'))} | {loss_of(records, cell)} "
            f"| {share} |"
        )


def kept_picture(records: Records) -> str:
    """Kept gain of every method that was run."""
    found = []
    for row in rows(records.model):
        outcome = records.outcome(*row)
        if outcome is not None:
            keep = f" ({whole(row[2])})" if row[2] not in (None, FIRST) else ""
            found.append(Bar(label(row) + keep, outcome.kept, outcome.stderr))
    found.sort(key=lambda bar: -sum(bar.shares) / len(bar.shares))
    return bars(found, "How much of the gain is kept, by how the small model is made")


def sweep_picture(records: Records) -> str:
    """Loss over ratio."""
    cells = [records.cell("refit", ratio=ratio, keep=FIRST) for ratio in RATIOS]
    found = []
    for words, measured, colour in (
        ("naive: small + adapter", "small", "small"),
        ("LoRAM: large + recovered", "large", "large"),
    ):
        losses = [(float(cell.ratio), records.loss(replace(cell, measured=measured))) for cell in cells]
        found.append(Line(words, tuple((x, y) for x, y in losses if y is not None), colour))
    ends = (float(RATIOS[0]), float(RATIOS[-1]))
    for words, rows_ in (("the large model as it was", records.base), ("LoRA on the large model", records.ceiling)):
        if rows_ is not None:
            found.append(Line(words, tuple((x, rows_.loss()) for x in ends), "axis", dashed=True))
    return lines([line for line in found if line.points], "Loss by pruning ratio", ("ratio", "held-out loss"))


SHORT: tuple[tuple[str, Row], ...] = (
    ("4 bit, nothing cut (`quantize`)", ("nf4", "", None)),
    ("4 bit, and 0.3 cut", ("taylor-nf4", "0.3", FIRST)),
    ("4 bit, and 0.5 cut", ("taylor-nf4", "0.5", FIRST)),
    ("4 bit, and 0.5 cut, repaired layer by layer before (`align`)", ("taylor-block-nf4", "0.5", FIRST)),
    ("16 bit, 0.5 cut, as `run` does it: by gradients, refit on half task text", ("taylor", "0.5", FIRST)),
    ("the same, and scales chosen on the large model (`recover --calibrate`)", ("taylor-calibrated", "0.5", FIRST)),
    ("as `run` does it, and repaired layer by layer before training (`align`)", ("taylor-block", "0.5", FIRST)),
    (
        "as `run` does it, then 8 steps on the large model, one layer in memory (`run --touch-up 8`)",
        ("taylor-touched", "0.5", FIRST),
    ),
    ("nothing but those 8 steps", ("touch-alone", "", None)),
    ("16 bit, 0.5 cut by Wanda (`--score wanda`)", ("refit", "0.5", FIRST)),
    ("the same, refit on general text alone", ("refit-general", "0.5", FIRST)),
    ("16 bit, 0.5 cut at random", ("random", "0.5", FIRST)),
)


def short_table(records: Records) -> str:
    """What README shows."""
    lines_ = ["| small model | kept gain | bytes ÷ |", "|---|---:|---:|"]
    for words, row in SHORT:
        found = records.outcome(*row)
        kept = NOT_RUN if found is None else spelled(found.kept)
        lines_.append(f"| {words} | {kept} | {'' if found is None else f'{found.bytes_reduction:.2f}'} |")
    return "\n".join(lines_) + "\n"


def section(title: str, *parts: str) -> str:
    """A heading and its paragraphs."""
    return "\n\n".join([f"## {title}", *parts]) + "\n"


HEAD = """<!-- Written by scripts/render_docs.py from benchmarks/quality/*.json; do not edit. -->
# Transfer: does it help the large model?

LoRA is trained on the small model, and used on the large one. That works as far as the two agree on which way the
weights should move. Where the small model is damaged, part of what LoRA learns there is how to mend the damage. The
large model has no such damage: on it, that part is noise. So everything that brings the small model closer to the
large one before training makes the adapter carry over better, and none of it costs anything when the adapter is used.

**Kept gain** says how much carries over: of the held-out loss that LoRA takes off when it is trained on the large
model itself, the share that remains when it was trained on the small one, with the same rows and steps.
0 % is no training at all, 100 % is training on the large model; below 0 % the adapter does harm.

![Kept gain by how the small model is made](transfer.svg)
"""
COMMANDS = """Run what is missing, and write this page anew:

```console
$ python -m benchmarks.quality --list
$ python -m benchmarks.quality --run --only smollm2-135m_gsm8k
$ scripts/render_docs.py
```

Every cell is a file in `benchmarks/quality`: the options of every stage, the loss of every held-out row, seconds,
machine and versions. A run may be stopped at any time and goes on. Other models and data are rows of the same grid
(`--place MODEL=FOLDER`, `--data FOLDER`)."""


def page(folder: Path = RESULTS) -> str:
    """The whole of docs/transfer.md."""
    records = Records(MODEL, TASK, folder)
    parts = [
        HEAD,
        section("Measured", setting(records), "\n".join(table(records, rows(MODEL))), READING),
        section("What to read from it", findings.findings(records)),
        section("Learning rates", RATES_TEXT, "\n".join(rates(records))),
        section("Other models and data", *elsewhere(folder)),
        section("Ablation: recovery and alignment", ABLATION, "\n".join(ablation(records)), commands_of_ablation()),
        section(
            "Ablation: ratio",
            SWEEP,
            "![Loss by pruning ratio](ratio.svg)",
            "\n".join(sweep(records)),
            commands_of_sweep(),
        ),
        section("Commands", COMMANDS),
    ]
    return "\n".join(parts)


READING = """*Layers whole* are those that nothing is cut from. *±* is one standard error over the held-out rows, which
all figures share; with several seeds the mean is in front. *Parameters ÷* and *bytes ÷* are what was achieved,
embeddings included: a ratio of 0.5 is far from half of a model this small. Zeros of single-weight masks are stored, so
they save no bytes. The weights of all models on this page came from 4 bit GGUF files (SmolLM2: `make model`) and were
made bf16 again before any of this, so 4 bit may do a little better here than with the published weights."""
RATES_TEXT = """Both sides were tried at the same rates. The ceiling is the best of its row. In the table above every
small model is at the best of the rates it was tried at; the others are in brackets. The ablations are all at the first
rate. Held-out losses:"""
ABLATION = """The shape of the paper's figure 6 (2502.13533). *Small + adapter* is what naive pruning gives: the pruned
model with its own adapter, which saves memory in use as well. *Large + recovered* is LoRAM. *Aligned* is
`loram align --method distill` on half task text before training. Held-out losses:"""
SWEEP = """The shape of the paper's figure 7: the deeper the cut, the more naive pruning loses.
LoRAM loses its gain, not the model."""


def setting(records: Records) -> str:
    """What was trained, on what, how long, and between which losses the gain lies."""
    task, model = TASKS[records.task], MODELS[records.model]
    base, ceiling = records.base, records.ceiling
    if base is None:
        ends = " Not run."
    elif ceiling is None:
        ends = f" The large model's loss is {base.loss():.3f} as it was; the rest was not run."
    else:
        ends = (
            f" The large model's loss is {base.loss():.3f} as it was and {ceiling.loss():.3f} with LoRA trained on "
            "itself: that is 100 %."
        )
    count = "" if base is None else f", {len(base.tokens)} held-out rows of {sum(base.tokens)} answer tokens"
    return (
        f"{model.id} on {task.about}: {task.steps} steps of {task.batch} rows of at most {task.max_length} tokens"
        f"{count}, LoRA of rank 8 on all Linears, {task.samples} calibration windows of {task.length} tokens.{ends} "
        "CPU, one thread."
    )


def elsewhere(folder: Path) -> Iterator[str]:
    """The same on other models and data: what a user would choose from."""
    every = [Records(model, task, folder) for model, task in ELSEWHERE]
    if every[0].ceiling is not None:
        yield findings.elsewhere(*every)
    for found in every:
        yield setting(found)
        if found.ceiling is not None:
            yield "\n".join(table(found, [("nf4", "", None), *((name, HALF, FIRST) for name in CHOICES)]))


def commands_of_ablation() -> str:
    """What to type for figure 6."""
    names = sorted({name for plain, aligned, _ in FOUR for name in (plain, aligned)})
    patterns = " ".join(f"--only {MODEL}_{TASK}_{name}_0.5" for name in names)
    return f"```console\n$ python -m benchmarks.quality --run {patterns}\n```"


def commands_of_sweep() -> str:
    """What to type for figure 7."""
    patterns = " ".join(f"--only {MODEL}_{TASK}_refit_{ratio}_keep4-2" for ratio in RATIOS)
    return f"```console\n$ python -m benchmarks.quality --run {patterns}\n```"
