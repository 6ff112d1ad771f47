"""init: write a recipe for a model, data and a memory size; what it says is what `run` would do by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram.artifact import output_error
from loram.errors import OptionError, OutputError, ResourceError
from loram.families import family_of
from loram.memory import format_bytes
from loram.options import InitOptions, PlanOptions
from loram.progress import SILENT, Progress
from loram.results import StageResult
from loram.stages.plan import PlanResult, plan, read_model_config

CALIBRATING = "Calibrating half on the training data is what makes the adapter carry over to the large model."
REPAIRING = (
    "Repaired layer by layer before it is rounded to 4 bit, a cut so deep carries over better (docs/transfer.md)."
)
TOUCHING = (
    "`touch_up: 8` in the section run ends with 8 steps on the large model itself, one layer in memory at a time."
)
DEEP = 0.5
"""The ratio from which on a small model in 4 bit is worth repairing (benchmarks/quality)."""


@dataclass(frozen=True, kw_only=True)
class InitResult(StageResult):
    """The recipe that was written."""

    text: str

    def to_json(self) -> dict[str, Any]:
        """path, recipe (the text)."""
        return super().to_json() | {"recipe": self.text}

    def summary(self) -> str:
        """The recipe itself."""
        return self.text.rstrip()


def init(options: InitOptions, progress: Progress = SILENT) -> InitResult:
    """Choose ratio and steps, and write them down with the reasons."""
    if not options.data:
        raise OptionError("loram init needs the training data; add --data FILE")
    target = Path(options.out or "recipe.yaml")
    if target.exists() and not options.force:
        raise OutputError(f"{target} exists; choose another with -o or add --force")
    layers = family_of(config := read_model_config(options.model)).geometry(config).layers
    whole = (4, 2) if layers > 8 else (layers // 4, layers // 4)
    result = plan(PlanOptions(model=options.model, memory=options.memory, keep_first=whole[0], keep_last=whole[1]))
    text = recipe_text(options, result, whole)
    if not options.dry_run:
        try:
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise output_error(error, target) from error
    return InitResult(
        text=text,
        path=None if options.dry_run else target,
        next_command=f"loram run {target} -o RUN",
    )


def chosen(options: InitOptions, result: PlanResult) -> tuple[float | None, str, str]:
    """The mildest ratio (None: no cut) and quantization that train within the memory, and a sentence that says why."""
    peak = format_bytes(result.peaks["train"].total)
    if options.memory is None:
        reason = f"Ratio 0.5: training is predicted to peak at {peak}; `--memory 24GiB` would choose for a card."
        return 0.5, "none", reason
    fitting = result.choice
    if fitting is None:
        raise ResourceError(f"no cut of {options.model} fits into {options.memory}, in 4 bit either; give more memory")
    size, bits = format_bytes(fitting.train_bytes), fitting.quantize
    if fitting.ratio is not None:
        form = "16 bit" if bits == "none" else bits
        return (
            float(fitting.ratio),
            bits,
            f"Ratio {fitting.ratio} is the mildest that fits in {form}: {size} predicted.",
        )
    if bits == "none":
        reason = (
            f"The whole model fits ({size}): `loram train` on it needs no pruning. This recipe prunes all the same."
        )
        return 0.5, bits, reason
    return None, bits, f"Whole and in {bits} it fits ({size} predicted), which agrees better with it than any cut."


def recipe_text(options: InitOptions, result: PlanResult, whole: tuple[int, int]) -> str:
    """The recipe as YAML with comments."""
    import yaml

    ratio, bits, reason = chosen(options, result)
    repaired = ratio is not None and ratio >= DEEP and bits != "none"
    run: dict[str, Any] = {"model": options.model, "data": list(options.data), "eval_data": list(options.eval_data)}
    cut = {
        "method": "structured",
        "score": "taylor",
        "ratio": ratio,
        "keep_first": whole[0],
        "keep_last": whole[1],
        "calibration": [*options.data, f"builtin={len(options.data)}"],
    }
    sections = {
        "run": {key: value for key, value in run.items() if value},
        **({} if ratio is None else {"prune": cut}),
        **({"align": {"method": "block"}} if repaired else {}),
        **({} if bits == "none" else {"quantize": {"type": bits}}),
        "train": {"rank": 8, "alpha": 16, "epochs": 1, "lr": 2e-4},
        "recover": {"portable": True},
        "verify": {},
        "eval": {"compare": True},
    }
    head = [
        f"# {options.model} on {options.memory or 'this machine'}; every key is an option of its stage.",
        f"# {reason}",
        *([] if ratio is None else [f"# {CALIBRATING}"]),
        *([f"# {REPAIRING}"] if repaired else []),
        *([] if ratio is None else [f"# {TOUCHING}"]),
    ]
    return "\n".join(head) + "\n\n" + yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
