"""How the sections of a recipe are joined: which stage reads whose folder, and what run fills in by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loram.artifact import read_manifest, sha256_file, sha256_json
from loram.checkpoint import describe_base
from loram.data.places import names_one_of, source_path
from loram.errors import OptionError
from loram.options import SECTIONS, RunOptions, StageOptions, TrainOptions, from_mapping
from loram.recipe import Recipe, parse_assignment

logger = logging.getLogger(__name__)
FOLDERS = {
    "prune": "prune",
    "align": "align",
    "quantize": "quantize",
    "train": "train",
    "recover": "adapter",
    "touch_up": "touched",
    "merge": "merge",
    "ceiling": "ceiling",
}
"""The folder inside the run that a section writes; the others print and write none."""
SMALL = ("prune", "align", "quantize")
"""Sections that write a small model: each works on that of the one before it, and train on the last."""
INPUTS = ("model", "given", "adapter", "small", "small_adapter", "large", "base", "ceiling")
LISTS = ("data", "eval_data", "calibration", "calibrate")
PLACES = (*INPUTS, *LISTS, "out", "force", "dry_run")
"""Options that say where something is. Digests look at what is there, so that a run may be moved."""
STAGE_OF = {"ceiling": "train", "touch_up": "train"}
"""Sections that run adds by itself, and the stage each one calls."""

SPOKEN_FOR: dict[str, tuple[tuple[str, ...], str]] = {
    "seed": ((), "seed"),
    "columns": ((), "columns"),
    "data": (("train",), "data"),
    "eval_data": (("eval",), "data"),
}
"""Options of run that, when typed, win over an option of these sections (none named: of all)."""


@dataclass(frozen=True)
class Step:
    """One section of a run: its name, the stage it calls, its options, and the folders and files it reads."""

    name: str
    options: StageOptions
    inputs: tuple[str, ...]

    @property
    def stage(self) -> str:
        """The stage that is called."""
        return STAGE_OF.get(self.name, self.name)

    @property
    def out(self) -> Path | None:
        """The folder it writes."""
        out = getattr(self.options, "out", "")
        return Path(out) if out else None

    def digest(self) -> str:
        """Changes when the options or the content of an input do."""
        options = {k: v for k, v in self.options.outcome().items() if k not in PLACES}
        weights = [s.removeprefix(source_path(s)) for key in LISTS for s in getattr(self.options, key, ())]
        inputs = [content_digest(item) for item in self.inputs]
        return sha256_json({"options": options, "inputs": inputs, "weights": weights})


def content_digest(place: str) -> str:
    """Digest of an artifact, a model folder, a data folder or a file."""
    path = Path(place)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        return place
    manifest = read_manifest(path)
    if manifest is not None:
        return manifest.digest()
    if (path / "config.json").is_file():
        base = describe_base(path)
        return base.config_sha256 + base.weights_fingerprint
    return sha256_json([sha256_file(file) for file in sorted(path.iterdir()) if file.is_file()])


def settle(options: RunOptions, recipe: Recipe) -> tuple[RunOptions, Recipe]:
    """The run's own options, and the recipe with what was typed and set in place of what the file says.

    Typed is what differs from the default, or stands among the overrides (see `said_outright`).
    """
    defaults = {item.name: item.default for item in fields(options)}
    set_here = {key for section, key, _ in (parse_assignment(t, "run") for t in options.overrides) if section == "run"}
    typed = {name for name, value in vars(options).items() if value != defaults[name]} | set_here
    recipe = giving_way(recipe, typed).override(options.overrides)
    said = {key: value for key, value in recipe.section("run").items() if getattr(options, key) == defaults[key]}
    settled = from_mapping(RunOptions, vars(options) | said, f"{options.recipe}: run")
    if settled.model is None:
        raise OptionError(f"{options.recipe} does not say which model to run on; add --model FOLDER")
    return settled, recipe


def giving_way(recipe: Recipe, typed: set[str]) -> Recipe:
    """The recipe without what its sections say about options of run that were typed."""
    sections = {name: dict(section) for name, section in recipe.sections.items()}
    for key in typed & SPOKEN_FOR.keys():
        stages, name = SPOKEN_FOR[key]
        for section in stages or sections:
            sections.get(section, {}).pop(name, None)
    return Recipe(recipe.source, sections)


def wire(options: RunOptions, recipe: Recipe, model: str) -> list[Step]:
    """The steps of a run in order, each with complete options. `model` is the large model's folder."""
    run = Path(options.out)
    names = list(options.stages) or [name for name in recipe.sections if name not in ("run", "plan", "demo", "init")]
    unknown = [name for name in names if name not in WIRES]
    if unknown:
        raise OptionError(f"{options.recipe}: run cannot do {unknown[0]!r}; it does {', '.join(WIRES)}")
    if options.touch_up and "recover" in names and "touch_up" not in names:
        # What verify says of the recovered adapter is no longer so of one that was trained further.
        last = "verify" if names[names.index("recover") + 1 :][:1] == ["verify"] else "recover"
        names.insert(names.index(last) + 1, "touch_up")
    if options.ceiling and "train" in names and "ceiling" not in names:
        names.insert(names.index("eval") if "eval" in names else len(names), "ceiling")
    if "eval" in names and not (options.eval_data or recipe.section("eval").get("data")):
        names.remove("eval")
    check_order(options, names)
    steps = []
    for number, name in enumerate(names):
        stage = STAGE_OF.get(name, name)
        small = small_before(names[:number], name, recipe)
        place = model if small is None else str(run / FOLDERS[small])
        own = told_to_touch_up(recipe) if name == "touch_up" else recipe.section(stage)
        filled = WIRES[name](options, run, model, place) | {"seed": options.seed} | own
        if stage == "prune" and filled.get("method") == "random":
            filled["calibration"] = recipe.section("prune").get("calibration", ())  # streaming is its point
        if name == "ceiling":
            filled |= {"model": model, "adapter": None}  # what the small model's training begins with is no use here
        if filled.get("calibrate"):
            filled = {"large": model, "columns": options.columns} | filled
            warn_of_eval_rows(filled["calibrate"], options.eval_data)
        if name == "push" and not filled.get("yes"):
            filled["dry_run"] = True  # nobody is there to ask when a run of hours ends
        if name in FOLDERS:
            filled |= {"out": str(run / FOLDERS[name])}
        built = from_mapping(SECTIONS[stage], filled, f"{options.recipe}: {stage}")
        steps.append(Step(name, built, inputs_of(built)))
    return steps


def warn_of_eval_rows(calibrate: str | Sequence[str], eval_data: Sequence[str]) -> None:
    """Say so where the scales are chosen on what the run ends with measuring."""
    for spec in (calibrate,) if isinstance(calibrate, str) else calibrate:
        if names_one_of(spec, eval_data):
            logger.warning(
                "recover.calibrate is %s, which the run also evaluates on: the ladder will flatter the adapter; give "
                "other held-out rows",
                spec,
            )


def check_order(options: RunOptions, names: list[str]) -> None:
    """What is pushed has to be made, verified and measured before."""
    if "push" in names:
        late = [name for name in ("recover", "verify", "eval") if name in names[names.index("push") :]]
        if late:
            raise OptionError(f"{options.recipe}: push stands before {late[0]}; put it last")


def small_before(done: list[str], name: str, recipe: Recipe) -> str | None:
    """The section whose small model `name` works on: the last one of this run, or else of the recipe's earlier ones.

    None where there is none: the stage works on the large model itself (a recipe that quantizes and does not prune).
    """
    sections = list(recipe.sections)
    earlier = done if any(n in SMALL for n in done) else sections[: sections.index(name) if name in sections else None]
    return next((section for section in reversed(earlier) if section in SMALL), None)


def inputs_of(options: StageOptions) -> tuple[str, ...]:
    """The folders and files that options name."""
    named = [getattr(options, key, None) for key in INPUTS]
    listed = [source_path(spec) for key in LISTS for spec in getattr(options, key, ())]
    return tuple(str(item) for item in (*named, *listed) if item)


def half_general(data: tuple[str, ...]) -> tuple[str, ...]:
    """Half the user's text, half general text: the strongest lever known (one task, 30 % → 65 % of the gain kept)."""
    return (*data, f"builtin={len(data) or 1}")


def _prune(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {"model": model, "columns": options.columns, "calibration": half_general(options.data)}


def _align(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {"model": small, "large": model, "columns": options.columns, "data": half_general(options.data)}


def _quantize(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {"model": small}


def _train(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {"model": small, "data": options.data, "columns": options.columns}


def _recover(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {"adapter": str(run / "train")}


QUARTER = 0.25
"""Of the training's rate: steps that go on from what was learnt undo some of it at the rate that it was learnt at."""
CARRIED = ("data", "columns", "system", "max_length", "long", "packing", "batch", "accumulate", "dtype", "schedule")
"""What the section `train` says that holds for further steps, too: what is read, and how much of it at a time."""


def told_to_touch_up(recipe: Recipe) -> dict[str, Any]:
    """Of the section `train`, what further steps on the large model share, and a quarter of its rate."""
    section = recipe.section("train")
    rate = float(section.get("lr", TrainOptions.__dataclass_fields__["lr"].default))
    return {key: value for key, value in section.items() if key in CARRIED} | {"lr": rate * QUARTER}


def _touch_up(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {
        "model": model,
        "data": options.data,
        "columns": options.columns,
        "adapter": str(run / "adapter"),
        "steps": options.touch_up,
        "warmup": 0.0,
        "streamed": True,
    }


def final_adapter(run: Path, touch_up: int) -> str:
    """The adapter that a run ends with, which is measured, merged and pushed."""
    return str(run / FOLDERS["touch_up" if touch_up else "recover"])


def _verify(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {"adapter": str(run / "adapter"), "large": model}


def _merge(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {"adapter": final_adapter(run, options.touch_up), "base": model}


def _push(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {"adapter": final_adapter(run, options.touch_up), "large": model}


def _eval(options: RunOptions, run: Path, model: str, small: str) -> dict[str, Any]:
    return {
        "model": model,
        "data": options.eval_data,
        "columns": options.columns,
        "compare": True,
        "adapter": final_adapter(run, options.touch_up),
        "small": None if small == model else small,
        "small_adapter": str(run / "train"),
        "ceiling": str(run / "ceiling") if options.ceiling else None,
    }


WIRES: dict[str, Callable[[RunOptions, Path, str, str], dict[str, Any]]] = {
    "prune": _prune,
    "align": _align,
    "quantize": _quantize,
    "train": _train,
    "recover": _recover,
    "touch_up": _touch_up,
    "verify": _verify,
    "merge": _merge,
    "ceiling": _train,
    "eval": _eval,
    "push": _push,
}
