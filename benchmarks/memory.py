"""Predicted against measured peak memory of `loram train`, over many configurations, each in a process of its own.

The measured figure is the process's VmHWM as `benchmarks.child` reads it when the command has ended; the prediction is
what the command printed. On a GPU `loram train` measures torch's own count instead, and that is compared.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import ROOT, Sample, job, run, say
from benchmarks.outcome import Goal

STEPS, VARIED_STEPS = 3, 8
"""Of full rows, which are all alike, and of rows of other lengths: once through all of them, in batches of eight."""
TOKENIZER = ROOT / "tests" / "fixtures" / "tiny-llama-kjv"
TEXT = ROOT / "loram" / "data" / "builtin.txt"
CUTS: dict[str, tuple[str, ...]] = {
    "random": ("--method", "random", "--keep-first", "1", "--keep-last", "1"),
    "depth": ("--method", "depth", "--keep-first", "1", "--keep-last", "1", "--samples", "4", "--length", "64"),
    "semi": ("--method", "semi", "--score", "magnitude"),
    "unstructured": ("--method", "unstructured", "--score", "magnitude"),
}
"""How the small models are made: what is trained has the same shape whatever chose it."""
SMOLLM2 = "SmolLM2-135M"


@dataclass(frozen=True)
class Configuration:
    """What is trained, and how; `model` is a field of `Size`, or SmolLM2-135M from the user's cache.

    `varied`: rows of many lengths, padded to the longest of their batch, as they are in practice.
    """

    model: str
    batch: int
    length: int
    dtype: str = "fp32"
    checkpointing: bool = False
    ratio: str | None = None
    method: str = "random"
    quantize: str = "none"
    varied: bool = False
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The configuration in a cell of a table."""
        words = [self.model, f"{self.batch}×{self.length}", self.dtype]
        words += ["checkpointing"] * self.checkpointing + ([f"ratio {self.ratio}"] if self.ratio else [])
        words += [self.method] * (self.method != "random") + ["rows of many lengths"] * self.varied
        words += [self.quantize] * (self.quantize != "none") + [" ".join(self.more).replace("--", "")] * bool(self.more)
        return ", ".join(words)

    def flags(self) -> list[str]:
        """The options of `loram train`."""
        flags = ["--batch", str(self.batch), "--max-length", str(self.length), "--dtype", self.dtype, *self.more]
        return flags + ["--checkpointing"] * self.checkpointing


def configurations(size: str) -> list[Configuration]:
    """All of them; two at the toy size."""
    made = Configuration
    if size == "tiny":
        return [made("narrow", 2, 32), made("narrow", 2, 32, checkpointing=True)]
    return [
        *(made("narrow", batch, length) for batch, length in ((1, 128), (4, 128), (8, 256), (2, 1024))),
        *(made("narrow", batch, length, checkpointing=True) for batch, length in ((4, 128), (8, 256), (16, 512))),
        *(made("narrow", 4, 256, more=("--dropout", "0"), checkpointing=again) for again in (False, True)),
        made("narrow", 4, 256, more=("--rank", "64")),
        made("narrow", 4, 256, more=("--lora-fa",)),
        made("narrow", 4, 256, more=("--packing",)),
        made("narrow", 2, 128, "bf16"),
        made("narrow", 2, 128, "bf16", checkpointing=True),
        *(made("wide", batch, length) for batch, length in ((1, 128), (2, 256))),
        *(made("wide", batch, length, checkpointing=True) for batch, length in ((2, 256), (8, 256))),
        *(made("wide", 2, 256, ratio=ratio) for ratio in ("0.5", "0.75")),
        made("wide", 2, 256, ratio="0.5", checkpointing=True),
        *(made("wide", 2, 256, quantize="nf4", checkpointing=again) for again in (False, True)),
        made("wide", 2, 256, ratio="0.5", quantize="nf4"),
        made("wide", 1, 64, "bf16", ratio="0.5", quantize="nf4"),
        made("wide", 2, 256, ratio="0.3", method="depth"),
        made("wide", 2, 256, ratio="0.3", method="depth", quantize="nf4", checkpointing=True),
        *(made("wide", 2, 256, method="semi", checkpointing=again) for again in (False, True)),
        made("wide", 2, 256, method="semi", more=("--unmasked-update",)),
        made("wide", 4, 256, ratio="0.5", method="unstructured"),
        made("wide", 2, 128, "bf16", ratio="0.5", method="unstructured", checkpointing=True),
        *(made("wide", batch, 256, more=("--streamed",)) for batch in (1, 8)),
        made("narrow", 2, 1024, more=("--streamed",)),
        made("wide", 2, 256, "bf16", ratio="0.5", more=("--streamed",)),
        made("wide", 2, 256, method="semi", more=("--streamed",)),
        made(SMOLLM2, 2, 256, more=("--streamed",)),
        *(made(SMOLLM2, 2, 256, checkpointing=again) for again in (False, True)),
        made(SMOLLM2, 2, 256, ratio="0.5"),
        made(SMOLLM2, 2, 256, quantize="nf4", checkpointing=True),
        *(made(SMOLLM2, 8, 256, dtype, ratio="0.5", varied=True) for dtype in ("fp32", "bf16")),
    ]


class Models:
    """The models that are trained on, each made when it is first asked for."""

    def __init__(self, size: str, folder: Path) -> None:
        self.size = size
        self.folder = folder

    def get(self, wanted: Configuration) -> Path | None:
        """The folder to train on; None where SmolLM2 is not in the cache."""
        place = self.base(wanted.model)
        if place is None:
            return None
        if wanted.ratio or wanted.method == "semi":
            ratio = ("--ratio", wanted.ratio) if wanted.ratio else ()
            name = f"{wanted.model}-{wanted.method}-{wanted.ratio}"
            place = self.made(name, "prune", place, *CUTS[wanted.method], *ratio, "--quiet")
        if wanted.quantize != "none":
            place = self.made(
                f"{place.name}-{wanted.quantize}", "quantize", place, "--type", wanted.quantize, "--quiet"
            )
        return place

    def base(self, name: str) -> Path | None:
        """A random model with the tokenizer of the tests' tiny one, or SmolLM2."""
        if name == SMOLLM2:
            cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
            found = Path(cache) / "loram" / "models" / "SmolLM2-135M-Instruct"
            return found if found.is_dir() else None
        place = self.folder / name
        if not place.is_dir():
            run(job("make-base", self.size, name, place), self.folder)
            for file in TOKENIZER.glob("tokenizer*"):
                shutil.copyfile(file, place / file.name)
        return place

    def made(self, name: str, *command: object) -> Path:
        """What a command of loram's writes."""
        place = self.folder / name
        if not place.is_dir():
            run(job("loram", *command, "-o", place), self.folder)
        return place


def write_rows(folder: Path, name: str, sizes: Sequence[int]) -> Path:
    """Rows of text of so many characters."""
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    file = folder / f"{name}.jsonl"
    rows = [text[97 * number : 97 * number + size] for number, size in enumerate(sizes)]
    assert [len(row) for row in rows] == list(sizes)
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return file


def measured(size: str, folder: Path) -> Iterator[tuple[Configuration, Sample]]:
    """Every configuration that can be trained here, one process each."""
    models = Models(size, folder)
    # A token is about four characters at most: all longer than any --max-length here, and 60 to 240 tokens.
    full = write_rows(folder, "rows", [12_000] * 64)
    varied = write_rows(folder, "varied", [240 + 37 * number % 720 for number in range(64)])
    for wanted in configurations(size):
        model, out = models.get(wanted), folder / "adapter"
        if model is None:
            say(f"  {wanted}: left out, the model is not in the cache")
            continue
        rows, steps = (varied, VARIED_STEPS) if wanted.varied else (full, STEPS)
        command = ["train", model, "--data", rows, "-o", out, "--steps", steps, "--save-every", 0, *wanted.flags()]
        sample = run(job("loram-json", *command), folder)
        shutil.rmtree(out)
        error = sample.figures["predicted_bytes"] / sample.peak - 1
        say(f"  {wanted}: {sample.peak / 2**20:.0f} MiB, predicted {error:+.1%}, {sample.wall:.0f} s")
        yield wanted, sample


def error_of(sample: Sample) -> float:
    """Predicted over measured, less one: below zero where too little was predicted."""
    return float(sample.figures["predicted_bytes"] / sample.peak - 1)


def goals_of(samples: Mapping[str, Sequence[Sample]], at_least: int | None = None) -> list[Goal]:
    """How far predictions may be off, over configurations of which each was run once."""
    errors = [error_of(sample) for (sample,) in samples.values()]
    return [
        Goal("configurations", len(errors), "", at_least=at_least),
        Goal("median error of the prediction", 100 * median(map(abs, errors)), "%", at_most=15),
        Goal("furthest below the measured peak", 100 * max(0.0, -min(errors)), "%", at_most=10),
        Goal("furthest above it", 100 * max(errors), "%"),
    ]


def kept_figures(body: dict[str, Any]) -> dict[str, Any]:
    """Of what `loram train --json` printed, or `loram plan --json` for prune, what the comparison needs."""
    if "stages" in body:
        prune = body["stages"]["prune"]
        return {"predicted_bytes": prune["peak_bytes"], "predicted_parts": prune["parts"]}
    return {name: body[name] for name in ("predicted_bytes", "predicted_parts", "peak_bytes")}
