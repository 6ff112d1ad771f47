"""The benchmark of a whole run, from pruning to merging, on a model of a size that people fine-tune, without a GPU."""

from __future__ import annotations

import shutil

from benchmarks.measure import ROOT, Command, Sample, job, run, say
from benchmarks.outcome import Bench, Goal, Outcome
from benchmarks.streaming import GIB, base

DATA = ROOT / "docs" / "examples" / "train.jsonl"
RATIO, RANK, BATCH, LENGTH = 0.65, 8, 2, 32
PRUNED = "prune, random"
QUANTIZED = "quantize to NF4"
TRAINED = "train the small model, 2 steps"
RECOVERED = "recover"
VERIFIED = "verify"
MERGED = "merge"
STREAMED = "train the large model, 1 step, one layer in memory"
CALIBRATED = "prune by gradients, refit, NF4"
MOST = {PRUNED: 0.25, RECOVERED: 0.5, VERIFIED: 0.6, MERGED: 0.5, STREAMED: 4.0}
"""GiB of memory that a stage may take at most, whatever the number of layers."""


def stages(bench: Bench) -> Outcome:
    """Each stage once, in a process of its own; what the next one does not need is deleted."""
    size = bench.size
    model = base(bench, "real", size.real.layers)
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    small, four, trained, adapter, merged, streamed, fitted = (
        bench.folder / name for name in ("small", "small-nf4", "trained", "adapter", "merged", "streamed", "fitted")
    )
    text = ("--calibration", DATA, "--samples", size.limited_samples, "--length", size.limited_length)
    step = ("--data", DATA, "--rank", RANK, "--batch", BATCH, "--max-length", LENGTH)
    ratio = ("--ratio", RATIO)
    commands: dict[str, Command] = {
        PRUNED: job("loram", "prune", model, "--method", "random", *ratio, "-o", small, "--quiet"),
        QUANTIZED: job("loram", "quantize", small, "-o", four, "--quiet"),
        TRAINED: job("loram", "train", four, *step, "--steps", 2, "-o", trained, "--quiet"),
        RECOVERED: job("loram", "recover", trained, "-o", adapter, "--quiet"),
        VERIFIED: job("loram", "verify", adapter, "--quiet"),
        MERGED: job("loram", "merge", adapter, "-o", merged, "--quiet"),
        STREAMED: job("loram", "train", model, *step, "--steps", 1, "--streamed", "-o", streamed, "--quiet"),
        CALIBRATED: job("loram", "prune", model, *ratio, *text, "--quantize", "nf4", "-o", fitted, "--quiet"),
    }
    done_with = {QUANTIZED: (small,), MERGED: (merged, four), STREAMED: (streamed,), CALIBRATED: (fitted, model)}
    samples: dict[str, list[Sample]] = {}
    for name, command in commands.items():
        samples[name] = [run(command, bench.folder)]
        found = samples[name][0]
        say(f"  {name}: {found.cpu:.0f} s CPU, {found.wall:.0f} s, {found.peak / GIB:.2f} GiB")
        for place in done_with.get(name, ()):
            shutil.rmtree(place)
    goals = [Goal("weights on disk", stored / GIB, "GiB")]
    goals += [Goal(f"peak of {name}", samples[name][0].peak / GIB, "GiB", at_most=most) for name, most in MOST.items()]
    setting = (
        f"{bench.describe('real')}: the shape of Llama-3.1-8B; ratio {RATIO}, first 4 and last 2 layers whole; LoRA of "
        f"rank {RANK} on all Linears, {BATCH} rows of {LENGTH} tokens a step; calibration on {size.limited_samples} "
        f"windows of {size.limited_length} tokens. No GPU. The weights are random, so this shows time and memory, and "
        "nothing of quality"
    )
    return Outcome("From pruning to merging on a model of 8 billion parameters", setting, samples, goals)
