"""What the quality benchmark compares: models, tasks, methods, and the cells they make; plain data.

A cell is a chain of loram's own stages on one model and one task, and the held-out loss that comes of it. Values of
options that are places are symbols here (`@large`, `@train`), so that what is recorded holds no path of a machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

LARGE, TRAIN, SPARE = "@large", "@train", "@spare"
HALF = (TRAIN, "builtin")
GENERAL = ("builtin",)
RATES = (2e-3, 4e-3, 8e-3)
USUAL = RATES[:2]
"""The rates of most cells; the ablation is at the first."""
SEEDS = (0, 1, 2)
Options = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A large model: its id, and how it is told where it lies (`--place NAME=FOLDER`)."""

    name: str
    id: str
    keep: tuple[tuple[int, int], ...] = ((4, 2), (1, 1))


@dataclass(frozen=True)
class Task:
    """Training and held-out rows, rows that are neither, and the effort that all cells of the task share."""

    name: str
    about: str
    train: str
    test: str
    spare: str | None = None
    columns: str | None = None
    steps: int = 32
    batch: int = 4
    max_length: int = 112
    limit: int | None = None
    samples: int = 64
    length: int = 128

    @property
    def effort(self) -> Options:
        """For the record."""
        names = ("steps", "batch", "max_length", "limit", "samples", "length")
        return {name: value for name, value in asdict(self).items() if name in names}


MODELS = {
    model.name: model
    for model in (
        Model("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        Model("gemma-3-270m", "google/gemma-3-270m", keep=((4, 2),)),
        Model("qwen2.5-coder-0.5b", "Qwen/Qwen2.5-Coder-0.5B-Instruct", keep=((4, 2),)),
    )
}
GSM8K = "GSM8K completions, the short problems that come with loram"
TASKS = {
    task.name: task
    for task in (
        Task(
            "gsm8k",
            GSM8K,
            "recipes/data/train.jsonl",
            "recipes/data/test.jsonl",
            "benchmarks/data/gsm8k-spare.jsonl",
        ),
        Task(
            "arc-easy",
            "ARC-Easy in the LLM-Adapters form",
            "commonsense/arc_easy.train.jsonl",
            "commonsense/arc_easy.test.jsonl",
            limit=64,
        ),
    )
}


@dataclass(frozen=True)
class Method:
    """How the small model is made and trained: options of each stage (prune None: nothing is cut)."""

    name: str
    label: str
    prune: Options | None = field(default_factory=dict)
    align: Options | None = None
    quantize: Options | None = None
    train: Options = field(default_factory=dict)
    recover: Options = field(default_factory=dict)
    touch: Options | None = None
    """Options of a training on the large model that goes on from the recovered adapter, or from nothing."""


WINDOWS: Options = {"data": HALF, "length": 128, "held_out": 8}
DISTILL: Options = {"method": "distill", **WINDOWS, "steps": 48, "batch": 4, "lr": 3e-4, "save_every": 24}
NORMS: Options = {"scope": "norms", "lr": 1e-3}
TASK_TEXT: Options = {"data": (TRAIN,)}
SEQUENTIAL: Options = {"method": "refit", **WINDOWS, "samples": 64, "refit_all": True}
BLOCK: Options = {"method": "block", **WINDOWS, "samples": 64, "steps": 48, "batch": 4}
SCALES: Options = {"calibrate": (SPARE,), "max_length": 112, "evaluations": 30}
SPARSE: Options = {"score": "sparsegpt", "calibration": HALF}
WANDA: Options = {"calibration": HALF, "score": "wanda"}
TAYLOR: Options = {"calibration": HALF, "score": "taylor"}
PLAIN: Options = {"unmasked_update": True}
LM_LORA: Options = {"method": "lm", **WINDOWS, "scope": "lora", "steps": 48, "batch": 4, "save_every": 24}
WATCHED: Options = {"eval_data": (SPARE,), "eval_every": 8, "recover_eval": 8, "patience": 9, "stop_on": "large"}
"""Held-out rows that are not those of the figure choose the step; the patience never runs out."""
TOUCH: Options = {"steps": 8, "lr": 1e-3, "streamed": True}
"""A quarter of the steps, at a quarter of the rate."""
ALONE: Options = {"steps": 8, "streamed": True}
METHODS = {
    method.name: method
    for method in (
        Method("random", "random cut", {"method": "random"}),
        Method("structured", "cut by Wanda, no repair", {**WANDA, "refit": False}),
        Method("refit-general", "refit on general text", {**WANDA, "calibration": GENERAL}),
        Method("refit", "cut by Wanda, refit on half task text", WANDA),
        Method("refit-task", "refit on task text alone", {**WANDA, "calibration": (TRAIN,)}),
        Method("refit-256", "refit on half task text, 256 windows", {**WANDA, "samples": 256}),
        Method("distill", "refit + distillation on half task text", WANDA, align=DISTILL),
        Method("distill-task", "refit + distillation on task text alone", WANDA, align=DISTILL | TASK_TEXT),
        Method("distill-norms", "refit + distillation of the norms alone", WANDA, align=DISTILL | NORMS),
        Method("sequential", "refit + sequential refit of all Linears", WANDA, align=SEQUENTIAL),
        Method("block", "refit + steps layer by layer", WANDA, align=BLOCK),
        Method("taylor", "cut by Taylor, refit on half task text", TAYLOR),
        Method(
            "taylor-calibrated",
            "cut by Taylor, recover --calibrate",
            TAYLOR,
            recover=SCALES,
        ),
        Method("whole-layers", "refit, LoRA in the whole layers alone", WANDA, train={"layers": ("0-3", "28-29")}),
        Method("lm-lora", "refit + next tokens of half task text, LoRA merged", WANDA, align=LM_LORA),
        Method("random-block", "random cut + steps layer by layer", {"method": "random"}, align=BLOCK),
        Method("taylor-sequential", "cut by Taylor, sequential refit of all Linears", TAYLOR, align=SEQUENTIAL),
        Method("taylor-block", "cut by Taylor, steps layer by layer", TAYLOR, align=BLOCK),
        Method("taylor-block-192", "cut by Taylor, 192 steps a layer", TAYLOR, align=BLOCK | {"steps": 192}),
        Method(
            "taylor-block-general",
            "cut by Taylor, steps layer by layer on general text",
            TAYLOR,
            align=BLOCK | {"data": GENERAL},
        ),
        Method("taylor-block-nf4", "cut by Taylor, steps layer by layer, NF4", TAYLOR, BLOCK, {}),
        Method("taylor-stopped", "cut by Taylor, stopped by the large model's loss", TAYLOR, train=WATCHED),
        Method("random-stopped", "random cut, stopped by the large model's loss", {"method": "random"}, train=WATCHED),
        Method("touch-alone", "nothing but 8 steps on the large model", None, touch=ALONE),
        Method("random-touched", "random cut, 8 steps on the large model", {"method": "random"}, touch=TOUCH),
        Method("taylor-touched", "cut by Taylor, 8 steps on the large model", TAYLOR, touch=TOUCH),
        Method(
            "taylor-block-touched",
            "cut by Taylor, layer by layer, 8 steps on the large model",
            TAYLOR,
            align=BLOCK,
            touch=TOUCH,
        ),
        Method("semi", "2:4 masks (SparseGPT), all layers", {"method": "semi", **SPARSE}),
        Method("unstructured", "50 % unstructured masks (SparseGPT), all layers", {"method": "unstructured", **SPARSE}),
        Method("semi-plain", "2:4 masks (SparseGPT), plain updates", {"method": "semi", **SPARSE}, train=PLAIN),
        Method(
            "unstructured-plain",
            "50 % unstructured masks (SparseGPT), plain updates",
            {"method": "unstructured", **SPARSE},
            train=PLAIN,
        ),
        Method("depth", "whole layers dropped", {"method": "depth", "calibration": HALF}),
        Method("random-distill", "random cut + distillation", {"method": "random"}, align=DISTILL),
        Method("semi-block", "2:4 masks + steps layer by layer", {"method": "semi", **SPARSE}, align=BLOCK),
        Method("semi-distill", "2:4 masks + distillation", {"method": "semi", **SPARSE}, align=DISTILL),
        Method(
            "unstructured-distill", "50 % masks + distillation", {"method": "unstructured", **SPARSE}, align=DISTILL
        ),
        Method("nf4", "NF4, nothing cut", None, quantize={}),
        Method("int8", "int8, nothing cut", None, quantize={"type": "int8"}),
        Method("refit-nf4", "refit on half task text, NF4", WANDA, quantize={}),
        Method("taylor-nf4", "cut by Taylor, refit on half task text, NF4", TAYLOR, quantize={}),
        Method("refit-calibrated", "refit, recover --calibrate", WANDA, recover=SCALES),
    )
}
UNCUT = ("nf4", "int8", "touch-alone")
CHOICES = ("random", "taylor", "taylor-block")
"""What a user would choose from, measured on other models and data too."""
ELSEWHERE = (("gemma-3-270m", "gsm8k"), ("qwen2.5-coder-0.5b", "gsm8k"), ("smollm2-135m", "arc-easy"))
SPARSIFIED = ("semi", "unstructured", "semi-plain", "unstructured-plain", "semi-block")
MASKS = ("semi", "unstructured", "semi-distill", "unstructured-distill")
BEST = ("refit-nf4", "refit-calibrated", "taylor-calibrated")
NARROW = (
    "random",
    "refit",
    "distill",
    "structured",
    "refit-general",
    "depth",
    *BEST[1:],
    "taylor",
    "taylor-block",
    "taylor-sequential",
    "random-stopped",
    "random-touched",
    "taylor-touched",
)
"""What is measured with the first and the last layer left whole."""
DEEP = ("taylor", "taylor-block", "taylor-touched", "taylor-block-touched")
"""What is measured at ratio 0.7 besides."""
SEEDED = (
    *("random", "refit", "block", "sequential", "taylor", "taylor-calibrated", "taylor-block", "taylor-sequential"),
    *("random-touched", "taylor-touched"),
)
"""What is measured with three seeds."""
LEVERS = (
    "distill",
    "refit-256",
    "refit-task",
    "distill-task",
    "distill-norms",
    "sequential",
    "block",
    "lm-lora",
    "random-block",
    "taylor",
    "taylor-sequential",
    "taylor-block",
    "taylor-block-192",
    "taylor-block-general",
    "taylor-stopped",
    "random-stopped",
    "random-touched",
    "taylor-touched",
    "taylor-block-touched",
    "whole-layers",
)


@dataclass(frozen=True)
class Cell:
    """One figure of the grid. `method` may also be `base` (no training) or `ceiling` (LoRA on the large model)."""

    model: str
    task: str
    method: str
    ratio: str = ""
    keep: tuple[int, int] | None = None
    seed: int = 0
    lr: float = 2e-3
    measured: str = "large"

    @property
    def id(self) -> str:
        """The name it is recorded and asked for by."""
        keep = "" if self.keep is None else f"keep{self.keep[0]}-{self.keep[1]}"
        lr = "" if self.method == "base" else f"lr{self.lr:g}"
        parts = (self.model, self.task, self.method, self.ratio, keep, lr, f"seed{self.seed}")
        small = "small" if self.measured == "small" else ""
        return "_".join(part for part in (*parts, small) if part)

    def stages(self) -> list[tuple[str, Options]]:
        """The stages in order with their options; `@before` is the folder that the stage before wrote."""
        task = TASKS[self.task]
        held = {"limit": task.limit, "max_length": task.max_length, "long": "drop", "columns": task.columns}
        measure = ("eval", {"model": LARGE, "data": ("@test",), "batch": 8, **held})
        if self.method == "base":
            return [measure]
        train = {
            "data": (TRAIN,),
            "lr": self.lr,
            "steps": task.steps,
            "batch": task.batch,
            "save_every": 16,
            "warmup": 0.0,
        }
        train |= {"max_length": task.max_length, "long": "drop", "columns": task.columns}
        train |= METHODS[self.method].train if self.method in METHODS else {}
        if self.method == "ceiling":
            return [("train", {"model": LARGE, **train}), replace_option(measure, adapter="@before")]
        method, chain = METHODS[self.method], self.compression(task)
        if chain:
            chain.append(("train", {"model": "@before", **train}))
            if self.measured == "small":
                return [*chain, replace_option(measure, model="@small", adapter="@before")]
            chain.append(("recover", {"adapter": "@before", **method.recover}))
        if method.touch is not None:
            begun = {"adapter": "@before"} if chain else {}
            chain.append(("train", {"model": LARGE, **train, **begun, **method.touch}))
        return [*chain, replace_option(measure, adapter="@before")]

    def compression(self, task: Task) -> list[tuple[str, Options]]:
        """prune, align and quantize, as far as the method has them."""
        method = METHODS[self.method]
        found: list[tuple[str, Options]] = []
        if method.prune is not None:
            cut: Options = {"model": LARGE, "samples": task.samples, "length": task.length, **method.prune}
            cut |= {} if self.keep is None else {"keep_first": self.keep[0], "keep_last": self.keep[1]}
            cut |= {} if method.prune.get("method") == "semi" else {"ratio": self.ratio}
            cut |= {"columns": task.columns}
            found.append(("prune", cut))
        if method.align is not None:
            found.append(("align", {"model": "@before", "columns": task.columns, **method.align}))
        if method.quantize is not None:
            found.append(("quantize", {"model": "@before" if found else LARGE, **method.quantize}))
        return found


def replace_option(stage: tuple[str, Options], **values: Any) -> tuple[str, Options]:
    """The stage with other values."""
    return stage[0], stage[1] | values


def grid() -> list[Cell]:
    """All cells, the most wanted first; each once."""
    wanted = [*main_grid("smollm2-135m", "gsm8k"), *ablation("smollm2-135m", "gsm8k"), *others()]
    return list(dict.fromkeys(wanted))


def main_grid(model: str, task: str) -> Iterator[Cell]:
    """The table of the issue: ceilings at three rates, methods at two, with both ways of keeping layers whole."""
    yield Cell(model, task, "base")
    first, *further = MODELS[model].keep
    for rate in RATES:
        yield Cell(model, task, "ceiling", lr=rate)
        yield Cell(model, task, "refit", "0.5", first, lr=rate)
    for rate in USUAL:
        for name in ("random", "structured", "refit-general", *LEVERS):
            yield Cell(model, task, name, "0.5", first, lr=rate)
        yield from (Cell(model, task, name, lr=rate) for name in UNCUT)
        yield from (Cell(model, task, name, "0.5", lr=rate) for name in SPARSIFIED)
        yield from (Cell(model, task, name, "0.5", first, lr=rate) for name in ("depth", *BEST))
        yield from (Cell(model, task, name, "0.3", first, lr=rate) for name in BEST)
        for name in ("taylor-nf4", "taylor-block-nf4"):
            yield from (Cell(model, task, name, ratio, first, lr=rate) for ratio in ("0.3", "0.5", "0.7"))
        yield from (Cell(model, task, name, "0.7", first, lr=rate) for name in DEEP)
        for keep in further:
            for name in NARROW:
                yield Cell(model, task, name, "0.5", keep, lr=rate)
    for seed in SEEDS[1:]:
        for name in SEEDED:
            for keep in MODELS[model].keep:
                yield from (Cell(model, task, name, "0.5", keep, seed, rate) for rate in USUAL)


def ablation(model: str, task: str) -> Iterator[Cell]:
    """The shape of the paper's figures 6 (recovery and alignment, by method) and 7 (ratio, naive against LoRAM)."""
    for ratio in ("0.3", "0.5", "0.7", "0.9"):
        both = Cell(model, task, "refit", ratio, (4, 2))
        yield from (both, replace(both, measured="small"))
    for name in ("random", "random-distill", "distill", *MASKS):
        both = Cell(model, task, name, "0.5", None if name in MASKS else (4, 2))
        yield from (both, replace(both, measured="small"))
    yield from (Cell(model, task, "refit-nf4", ratio, (4, 2)) for ratio in ("0.3", "0.7"))


def others() -> Iterator[Cell]:
    """The same on other models and another task: one seed, the methods that matter."""
    for model, task in ELSEWHERE:
        yield Cell(model, task, "base")
        yield from (Cell(model, task, "ceiling", lr=rate) for rate in RATES)
        for rate in USUAL:
            yield from (Cell(model, task, name, "0.5", (4, 2), lr=rate) for name in CHOICES)
        yield Cell(model, task, "nf4")
