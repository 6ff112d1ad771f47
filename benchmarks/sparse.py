"""The benchmarks of single-weight pruning: the column loop by itself, and whole stages beside llm-compressor's."""

from __future__ import annotations

import shutil
from statistics import median

from benchmarks.measure import ROOT, Command, Sample, job, ratio, run
from benchmarks.outcome import Bench, Goal, Outcome

PATTERN = "2:4"
PEERS = {"sparsegpt": 0.6, "wanda": 0.7}
"""Scores that llm-compressor knows as well, and the most of its CPU time that loram may take."""


def loop(bench: Bench) -> Outcome:
    """SparseGPT's column loop against the plain reference formulation, on the Linears of one layer."""
    shapes = {f"hidden {getattr(bench.size, name).hidden}": name for name in ("trained", "checkpoint")}
    rounds = bench.rounds or bench.size.rounds
    samples = {
        words: [run(job("loops", bench.size_name, name, rounds), bench.folder)] for words, name in shapes.items()
    }
    goals, facts = [], {}
    for words, (sample,) in samples.items():
        for kind, found in sample.figures.items():
            products = zip(found["reference product"], found["product"], strict=True)
            rows = list(zip(found["reference"], found["ours"], products, strict=True))
            columns = median((a - its) / (b - our) for a, b, (its, our) in rows)
            whole = median(a / b for a, b, _ in rows)
            goals.append(Goal(f"the reference's CPU time ÷ loram's, {kind}, {words}", columns, at_least=3))
            goals.append(Goal(f"the same with the product between blocks, {kind}, {words}", whole))
            facts[f"same elements removed, {kind}, {words}"] = f"{found['agree']:.4%}"
    setting = (
        f"all Linears of one layer of {bench.describe('trained')}; and of {bench.describe('checkpoint')}; fp32, 50 %; "
        f"both loops in turns in one process, {rounds} rounds; second moments and their factors are made beforehand; "
        "between blocks of columns both bring later ones up to date by a product at the machine's peak: the goal is "
        "for the loop over columns, without it; "
        "seconds in the table below are of the whole process"
    )
    return Outcome("SparseGPT's column loop", setting, samples, goals, facts)


def sparsify(bench: Bench) -> Outcome:
    """`loram prune --method semi` against llm-compressor: the same model, windows, pattern and arithmetic."""
    size, model = bench.size, bench.folder / "calibrated"
    python = bench.llmcompressor
    assert python, "needs --llmcompressor PYTHON"
    bench.prepare(model, "make-calibrated", bench.size_name, model)
    cut = ["--method", "semi", "--pattern", PATTERN, "--calibration", ROOT / "loram" / "data" / "builtin.txt"]
    cut += ["--samples", size.samples, "--length", size.sample_length, "--quiet"]
    theirs = [python, *job("llmcompressor")[1:]]
    contenders: dict[str, Command] = {}
    for score in PEERS:
        place = bench.folder / f"sparse-{score}"
        contenders[f"loram, {score}"] = job("loram", "prune", model, "--score", score, *cut, "-o", place)
        given = (score, str(model), str(model / "windows" / "windows.safetensors"), f"{place}-peer")
        contenders[f"llm-compressor, {score}"] = [*theirs, *given]
    contenders["importing loram's stage"] = job("imports")
    contenders["importing llm-compressor"] = theirs
    out = {f"loram, {score}": bench.folder / f"sparse-{score}" for score in PEERS}
    out |= {f"llm-compressor, {score}": bench.folder / f"sparse-{score}-peer" for score in PEERS}
    samples = bench.race(contenders, out)
    goals, facts = [], {}
    for score, most in PEERS.items():
        ours, usual = samples[f"loram, {score}"], samples[f"llm-compressor, {score}"]
        started = samples["importing loram's stage"], samples["importing llm-compressor"]
        goals += [
            Goal(f"{score}: CPU time ÷ llm-compressor's", ratio(ours, usual, "cpu"), at_most=most),
            Goal(f"{score}: the same without what imports take", without(ours, usual, *started)),
            Goal(
                f"{score}: peak ÷ llm-compressor's", median(a.peak / b.peak for a, b in zip(ours, usual, strict=True))
            ),
        ]
        pair = run(job("agree", *(out[f"{who}, {score}"] for who in ("loram", "llm-compressor"))), bench.folder)
        facts[f"same weights removed, {score}"] = f"{pair.figures['agree']:.3%}"
    for place in out.values():
        shutil.rmtree(place)
    setting = (
        f"{bench.describe('trained')}; {PATTERN}, {size.samples} windows of {size.sample_length} tokens, the same for "
        "both, and both compute in the dtype that is stored"
    )
    theirs_use = samples["importing llm-compressor"][0].figures
    facts["llm-compressor's environment"] = ", ".join(f"{name} {theirs_use[name]}" for name in theirs_use)
    return Outcome("SparseGPT and Wanda beside llm-compressor", setting, samples, goals, facts)


def without(ours: list[Sample], theirs: list[Sample], start: list[Sample], other: list[Sample]) -> float:
    """Median ratio of CPU times, each with what its imports take taken off."""
    rows = zip(ours, start, theirs, other, strict=True)
    return float(median((a.cpu - b.cpu) / (c.cpu - d.cpu) for a, b, c, d in rows))
