"""The benchmarks of calibrated pruning: cost against depth, and a model larger than the memory allowed."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median

from benchmarks.measure import ROOT, Command, Sample, job, run, say
from benchmarks.outcome import Bench, Goal, Outcome

TOKENIZER = ROOT / "tests" / "fixtures" / "tiny-llama-kjv"
DEPTHS = (8, 16, 32)
WHOLE = ("--keep-first", "0", "--keep-last", "0")
WAYS: dict[str, tuple[str, ...]] = {
    "Wanda and refit": ("--score", "wanda", *WHOLE),
    "Taylor and refit": ("--score", "taylor", *WHOLE),
    "SparseGPT 2:4": ("--method", "semi", "--score", "sparsegpt"),
}
GIB = 2**30
LIMIT = 2 * GIB


def base(bench: Bench, name: str, layers: int) -> Path:
    """A random model of so many layers, with the tokenizer of the tests' tiny one."""
    place = bench.folder / f"{name}-{layers}"
    bench.prepare(place, "make-base", bench.size_name, name, place, layers)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copyfile(file, place / file.name)
    return place


def depth(bench: Bench) -> Outcome:
    """Time and peak memory of `loram prune` on 8, 16 and 32 equal layers."""
    size, out = bench.size, {}
    text = ("--samples", size.samples, "--length", size.sample_length, "--quiet")
    contenders: dict[str, Command] = {}
    for layers in DEPTHS:
        model = base(bench, "deep", layers)
        for way, how in WAYS.items():
            name = f"{way}, {layers} layers"
            out[name] = bench.folder / f"cut-{len(out)}"
            contenders[name] = job("loram", "prune", model, *how, *text, "-o", out[name])
    samples = bench.race(contenders, out)
    for place in out.values():
        shutil.rmtree(place)
    goals, facts = [], {}
    for way in WAYS:
        few, some, many = (samples[f"{way}, {layers} layers"] for layers in DEPTHS)
        first, second = per_layer(few, some, DEPTHS[0]), per_layer(some, many, DEPTHS[1])
        goals += [
            Goal(f"{way}: CPU time of a layer, 17th to 32nd ÷ 9th to 16th", second / first, at_most=1.15),
            Goal(f"{way}: peak, 32 layers ÷ 8", middle_peak(many) / middle_peak(few), at_most=1.05),
        ]
        facts[f"CPU s a layer, {way}"] = f"{second:.2f}"
    setting = (
        f"{bench.describe('deep').replace(f'{size.deep.layers} layers', 'equal layers')}; ratio 0.5, no layer is left "
        f"whole; {size.samples} windows of {size.sample_length} tokens"
    )
    return Outcome("Calibrated pruning against depth", setting, samples, goals, facts)


def per_layer(fewer: list[Sample], more: list[Sample], added: int) -> float:
    """Median CPU seconds of each of the layers that were added."""
    return float(median((b.cpu - a.cpu) / added for a, b in zip(fewer, more, strict=True)))


def middle_peak(runs: list[Sample]) -> float:
    """The median peak."""
    return float(median(run.peak for run in runs))


def limited(bench: Bench) -> Outcome:
    """Prune, refit and quantize a model larger than the address space that the system lets the process have."""
    size = bench.size
    model = base(bench, "huge", size.huge.layers)
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    small, four = bench.folder / "limited", bench.folder / "limited-nf4"
    samples: dict[str, list[Sample]] = {}
    text = ("--samples", size.limited_samples, "--length", size.limited_length, "--quiet")
    for way, how in WAYS.items():
        for name, command in (
            (f"prune: {way}", ("prune", model, *how, *text, "-o", small)),
            (f"quantize to NF4: {way}", ("quantize", small, "--quiet", "-o", four)),
        ):
            samples[name] = [run(job("limited", LIMIT, *command), bench.folder)]
            found = samples[name][0]
            say(f"  {name}: {found.cpu:.0f} s CPU, {found.figures['address_space'] / GIB:.2f} GiB of address space")
        for place in (small, four):
            shutil.rmtree(place)
    goals = [Goal("weights on disk", stored / GIB, "GiB", at_least=4), Goal("limit", LIMIT / GIB, "GiB")]
    goals += [
        Goal(f"address space at most, {name}", runs[0].figures["address_space"] / GIB, "GiB", at_most=LIMIT / GIB)
        for name, runs in samples.items()
    ]
    setting = (
        f"{bench.describe('huge')}; ratio 0.5, no layer is left whole; {size.limited_samples} windows of "
        f"{size.limited_length} tokens. Each process sets RLIMIT_AS (`ulimit -v`) to 2 GiB before it imports torch: "
        "the system refuses it more address space, with program code, libraries, mapped files and all memory counted; "
        "what the kernel keeps of files that were read is not counted. Peaks in the table below are of resident memory"
    )
    return Outcome("A model of 4 GiB pruned and quantized in 2 GiB", setting, samples, goals)
