"""Write the parts of the documentation that are figures: `scripts/render_docs.py [--check]`.

    docs/benchmarks.md              from benchmarks/results.json  (python -m benchmarks)
    docs/transfer.md, its pictures  from benchmarks/quality/*.json (python -m benchmarks.quality)
    docs/methods.md                 from docs/methods.json        (scripts/methods.py)
    the table in docs/train.md      from docs/killed.json         (scripts/killed.py)
    the table in docs/prune.md      from docs/killed-pruning.json (scripts/killed_pruning.py)
    the tables in docs/align.md     from docs/killed-alignment.json (scripts/killed_alignment.py)
                                    and docs/alignments.json      (scripts/record_alignments.py)
    docs/quality.md                 from docs/ladders/*.json      (scripts/record_ladder.py)
    the table in README, plan.md    from docs/configs/*.json, by the planner itself
    the other table in README       from benchmarks/quality/*.json

`--check` writes nothing and fails where a page is not what its figures render to.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import render as benchmark_page  # noqa: E402  (the checkout is no package of its own)
from benchmarks import transfer  # noqa: E402

GIB = 2**30
CARD = 24 * GIB
CUTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("0.5", {"ratio": "0.5"}),
    ("0.65", {"ratio": "0.65"}),
    ("0.85", {"ratio": "0.85"}),
    ("0.85 + 4 bit", {"ratio": "0.85", "quantize": "nf4"}),
)
KILLED_MARKS = re.compile(r"(<!-- killed: .*?-->\n).*?(<!-- /killed -->)", re.DOTALL)
ALIGN_MARKS = re.compile(r"(<!-- (killed|ways|memory): .*?-->\n).*?(<!-- /\2 -->)", re.DOTALL)
MARKS = re.compile(r"(<!-- fits: .*?-->\n).*?(<!-- /fits -->)", re.DOTALL)

KEPT = re.compile(r"(<!-- kept: .*?-->\n).*?(<!-- /kept -->)", re.DOTALL)

QUALITY = """<!-- Written by scripts/render_docs.py from docs/ladders/*.json; do not edit. -->
# Quality

Held-out loss in nats a token, lower is better, with the standard error over rows. Only *large + recovered* against
*base* says whether the large model got better; the small rungs explain why. *Ceiling* is LoRA trained on the large
model itself with the same options, where that was done.

Record a run of your own with `scripts/record_ladder.py` and render this page with `scripts/render_docs.py`.

"""


METHODS = """<!-- Written by scripts/render_docs.py from docs/methods.json; do not edit. -->
# Methods, through all stages

Every way of [pruning](prune.md), plain and in NF4, from the large model to the merged one: `prune`, `quantize`,
`train`, `recover`, `verify --numeric`, `merge` and the ladder of `eval`, on {model} and the problems that come
with the demo. A training of 8 steps of 4 rows shows that each way works; it is no comparison of methods, for which see
[transfer](transfer.md). Do it again with `scripts/methods.py MODEL SCRATCH`.

## Losses

Held-out loss in nats a token; that of the large model as it was is {base:.4f}. *Gain* is how much less *large +
recovered* loses, with the standard error over rows. *Merged* is the merged checkpoint, in which the update is rounded
to bf16. *Identity* is the largest difference that `verify --numeric` found between the logits of the cut large model
with the small adapter and of the zeroed one with the recovered, relative to the largest.

{losses}
{masks}
## Time and memory

CPU seconds, and the process's peak of resident memory in GiB. `prune` and `quantize` are done once for all chains that
use them. The machine did other work besides.

{taken}
{date}, commit `{commit}`. {machine}.
"""


def fits_table() -> str:
    """Predicted peak memory of training, in GiB, for the configs in docs/configs: one planner call per cell."""
    head = ["model", "parameters", "plain LoRA", *(name for name, _ in CUTS)]
    rows = [fits_row(file) for file in sorted((ROOT / "docs" / "configs").glob("*.json"), key=parameters)]
    return table(head, rows)


def parameters(config: Path) -> int:
    """How big the model is."""
    large: int = plan_json(config)["params"]["large"]
    return large


def fits_row(config: Path) -> list[str]:
    """A model's cells; what fits a 24 GiB card is bold."""
    plain = next(item.train_bytes for item in planned(config, memory="1000GiB").tried if item.ratio is None)
    peaks = [plain, *(plan_json(config, **flags)["peak_bytes"]["train"] for _, flags in CUTS)]
    return [config.stem, f"{parameters(config) / 1e9:.1f} B", *map(cell, peaks)]


def cell(peak: int) -> str:
    """GiB, bold where it fits."""
    return f"**{peak / GIB:.1f}**" if peak <= CARD else f"{peak / GIB:.1f}"


def planned(config: Path, **options: Any) -> Any:
    """What `loram plan` says."""
    import loram

    return loram.plan(config, **options)


def plan_json(config: Path, **options: str) -> dict[str, Any]:
    """The same as `loram plan --json`."""
    body: dict[str, Any] = planned(config, **options).to_json()
    return body


def killed_table() -> str:
    """What was killed when, and what was lost, as scripts/killed.py saw it."""
    body = json.loads((ROOT / "docs" / "killed.json").read_text(encoding="utf-8"))
    head = ["what happened", "when", "what is lost", "seen: steps lost", "exit code", "the adapter afterwards"]
    return table(head, map(killed_row, body["rows"]), "lllrrl")


def killed_row(row: dict[str, Any]) -> list[str]:
    """One case; a process that a signal ended has no exit code of its own."""
    code = str(row["code"]) if row["code"] >= 0 else "the signal's"
    return [row["what"], row["when"], row["rule"], f"{row['lost']} (of {row['reached']})", code, afterwards(row)]


def afterwards(row: dict[str, Any]) -> str:
    """What became of work that was killed and went on."""
    return "that of a run left alone, bit for bit" if row["same"] else "**another one**"


def killed_pruning_table() -> str:
    """What was killed in which block, and what was done again, as scripts/killed_pruning.py saw it."""
    body = json.loads((ROOT / "docs" / "killed-pruning.json").read_text(encoding="utf-8"))
    head = ["calibration", "blocks done at the SIGKILL", "done again", "the small model afterwards"]
    return table(head, map(killed_pruning_row, body["rows"]), "lrrl")


def killed_pruning_row(row: dict[str, Any]) -> list[str]:
    """A calibration that was killed and went on."""
    return [row["what"], f"{row['reached']} of {row['blocks']}", str(row["again"]), afterwards(row)]


def methods_page() -> str:
    """Every way of pruning: its ladder, and what its stages took."""
    body = json.loads((ROOT / "docs" / "methods.json").read_text(encoding="utf-8"))
    rows = body.pop("rows")
    losses = ["pruned", "small", "small + adapter", "large + recovered", "gain", "merged", "identity"]
    names = max((list(row["stages"]) for row in rows), key=len)
    costs = [[chain_name(row), *(taken(row["stages"].get(name)) for name in names)] for row in rows]
    said = [f"- {chain_name(row)}: {row['mask']}\n" for row in rows if row["mask"]]
    return METHODS.format(
        **body,
        base=rows[0]["ladder"]["base"],
        losses=table(losses, map(losses_row, rows)),
        masks="".join(["What `verify` says of the masks:\n\n", *said]) if said else "",
        taken=table(["pruned", *names], costs),
    )


def table(head: list[str], rows: Iterable[list[str]], sides: str = "") -> str:
    """Names at the left, figures at the right; `sides` says it of each column, l or r, where it is otherwise."""
    rule = "".join("---:|" if side == "r" else "---|" for side in sides or "l" + "r" * (len(head) - 1))
    return "\n".join([line(head), "|" + rule, *map(line, rows)]) + "\n"


def chain_name(row: dict[str, Any]) -> str:
    """A way of pruning and storing."""
    kind = {"structured": "structured, wanda", "semi": "semi 2:4, sparsegpt", "unstructured": "unstructured, wanda"}
    parts = [kind.get(row["method"], row["method"]), "NF4" * row["nf4"], "`--unmasked-update`" * row["unmasked"]]
    return ", ".join(part for part in parts if part)


def losses_row(row: dict[str, Any]) -> list[str]:
    """A chain's ladder, and how exact it is."""
    ladder = row["ladder"]
    gain = f"{ladder['base'] - ladder['large + recovered']:+.3f} ± {row['gain stderr']:.3f}"
    rungs = [f"{ladder[name]:.4f}" for name in ("small", "small + adapter", "large + recovered")]
    return [
        chain_name(row),
        *rungs,
        gain,
        f"{row['merged']:.4f}",
        f"{row['identity']:.1e}" if row["identity"] else "exact",
    ]


def taken(stage: dict[str, Any] | None) -> str:
    """CPU seconds and peak memory of a stage."""
    return f"{stage['cpu']:.0f} s, {stage['peak'] / GIB:.2f}" if stage else ""


def line(cells: list[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def quality_page() -> str:
    """The recorded ladders, the newest first."""
    files = sorted((ROOT / "docs" / "ladders").glob("*.json"))
    ladders = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    ladders.sort(key=lambda ladder: str(ladder["date"]), reverse=True)
    return QUALITY + "\n".join(ladder_section(ladder) for ladder in ladders)


def ladder_section(ladder: dict[str, Any]) -> str:
    """One run: what was done, the ladder, what it took, how to do it again."""
    scored = any(row.get("accuracy") is not None for row in ladder["rows"])
    head = ["model", "loss", "± stderr", *(["exact match"] if scored else [])]
    stages = ", ".join(f"{stage['name']} {stage['seconds']:.0f} s" for stage in ladder["stages"])
    peak = max(stage["peak_bytes"] for stage in ladder["stages"]) / GIB
    settings = ", ".join(f"{name} {value}" for name, value in ladder["settings"].items())
    lines = [
        f"## {ladder['title']}",
        "",
        f"{ladder['model']} on {ladder['task']}: {settings}.",
        "",
        line(head),
        "|---|" + "---:|" * (len(head) - 1),
        *(line(ladder_row(row, scored)) for row in ladder["rows"]),
        "",
        f"{ladder['verdict'][:1].upper()}{ladder['verdict'][1:]}.",
        "",
        f"Took, on a machine shared with other work, {stages}; at most {peak:.1f} GiB. {ladder['machine']}. "
        f"{ladder['date']}, commit `{ladder['commit']}`:",
        "",
        "```console",
        *(f"$ {command}" for command in ladder["commands"]),
        "```",
        "",
    ]
    return "\n".join(lines)


def ladder_row(row: dict[str, Any], scored: bool) -> list[str]:
    """A rung."""
    right = [] if not scored else ["" if row.get("accuracy") is None else f"{row['accuracy']:.1%}"]
    return [row["name"], f"{row['loss']:.4f}", f"{row['stderr']:.4f}", *right]


def with_fits(page: Path) -> str:
    """A page with its table of sizes renewed."""
    return MARKS.sub(lambda found: found[1] + fits_table() + found[2], page.read_text(encoding="utf-8"))


def readme() -> str:
    """README with both of its tables."""
    table = transfer.short_table(transfer.Records(transfer.MODEL, transfer.TASK))
    return KEPT.sub(lambda found: found[1] + table + found[2], with_fits(ROOT / "README.md"))


def with_killed(page: Path, table: Callable[[], str]) -> str:
    """A page with its table of what was killed renewed."""
    text = page.read_text(encoding="utf-8")
    return KILLED_MARKS.sub(lambda found: found[1] + table() + found[2], text)


def killed_alignment_table() -> str:
    """Which alignment was killed when, and what was lost, as scripts/killed_alignment.py saw it."""
    body = json.loads((ROOT / "docs" / "killed-alignment.json").read_text(encoding="utf-8"))
    head = ["what was killed", "after", "went on from", "seen: lost", "the result"]
    rows = [
        [
            row["what"],
            f"{row['reached']} of {row['count']} {row['unit']}s",
            f"{row['unit']} {row['went on from']}",
            f"{row['lost']} {row['unit']}s" if row["lost"] != 1 else f"1 {row['unit']}",
            afterwards(row),
        ]
        for row in body["rows"]
    ]
    return table(head, rows, "lllll")


def ways_table() -> str:
    """What every way of aligning made of one small model, as scripts/record_alignments.py saw it."""
    body = json.loads((ROOT / "docs" / "alignments.json").read_text(encoding="utf-8"))
    start, texts = body["start"], list(body["start"]["small"])
    head = ["small model", "options", *(f"loss, {text}" for text in texts), "CPU minutes", "peak memory, GiB"]
    rows = [["as it was pruned", "", *losses_of(start["small"]), "", ""]]
    for name, options in body["planned"].items():
        way = body.get("ways", {}).get(name)
        found = [*losses_of(way["loss"]), *took(way)] if way else ["not run", *[""] * (len(texts) + 1)]
        rows.append([name, f"`{options.replace('CACHE', 'FOLDER')}`", *found])
    rows.append(["(the large model)", "", *losses_of(start["large"]), "", ""])
    return table(head, rows, "ll" + "r" * (len(texts) + 2))


def took(way: dict[str, Any]) -> list[str]:
    """Time and memory, as cells."""
    return [f"{way['cpu_seconds'] / 60:.1f}", f"{way['peak_bytes'] / GIB:.2f}"]


def losses_of(losses: dict[str, float]) -> list[str]:
    """As cells."""
    return [f"{loss:.3f}" for loss in losses.values()]


def memory_table() -> str:
    """Peak memory of distillation by where the large model is, as scripts/record_alignments.py saw it."""
    rows = json.loads((ROOT / "docs" / "alignments.json").read_text(encoding="utf-8"))["memory"]
    teachers = list(dict.fromkeys(name.rpartition(", ")[0] for name in rows))
    scopes = list(dict.fromkeys(name.rpartition(", ")[2] for name in rows))

    def cells(teacher: str) -> list[str]:
        found = [rows.get(f"{teacher}, {scope}") for scope in scopes]
        return ["not run" if row is None else f"{row['peak_bytes'] / GIB:.2f}" for row in found]

    head = ["large model", *(f"`--scope {scope}`" for scope in scopes)]
    return table(head, ([teacher, *cells(teacher)] for teacher in teachers))


def with_alignments(page: Path) -> str:
    """A page with its tables of alignments renewed."""
    tables = {"killed": killed_alignment_table, "ways": ways_table, "memory": memory_table}
    text = page.read_text(encoding="utf-8")
    return ALIGN_MARKS.sub(lambda found: found[1] + tables[found[2]]() + found[3], text)


PAGES: dict[str, Callable[[], str]] = {
    "docs/benchmarks.md": lambda: benchmark_page.page(benchmark_page.load()),
    "docs/transfer.md": transfer.page,
    "docs/transfer.svg": lambda: transfer.kept_picture(transfer.Records(transfer.MODEL, transfer.TASK)),
    "docs/ratio.svg": lambda: transfer.sweep_picture(transfer.Records(transfer.MODEL, transfer.TASK)),
    "docs/quality.md": quality_page,
    "docs/methods.md": methods_page,
    "docs/train.md": lambda: with_killed(ROOT / "docs" / "train.md", killed_table),
    "docs/prune.md": lambda: with_killed(ROOT / "docs" / "prune.md", killed_pruning_table),
    "docs/align.md": lambda: with_alignments(ROOT / "docs" / "align.md"),
    "docs/plan.md": lambda: with_fits(ROOT / "docs" / "plan.md"),
    "README.md": readme,
}


def main(*arguments: str) -> int:
    stale = []
    for name, render in PAGES.items():
        page, text = ROOT / name, render()
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            stale.append(name)
            if "--check" not in arguments:
                page.write_text(text, encoding="utf-8")
    verb = "is not what its figures render to; run scripts/render_docs.py" if "--check" in arguments else "written"
    sys.stdout.write("".join(f"{name} {verb}\n" for name in stale))
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
