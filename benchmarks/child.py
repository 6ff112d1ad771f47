"""What runs inside a measured child: `python -m benchmarks.child JOB ARGUMENTS`.

At the end the child writes its own VmHWM, and what the job returned, to the file that the launcher named.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from benchmarks.measure import REPORT

Figures = dict[str, Any]


def loram(*arguments: str) -> Figures:
    """The command line, as its console script calls it."""
    (script,) = entry_points(group="console_scripts", name="loram")
    code = script.load()(list(arguments))
    if code:
        raise SystemExit(code)
    return {}


def loram_json(*arguments: str) -> Figures:
    """The same with --json: what it printed, and what it holds against the memory it was predicted to take."""
    from benchmarks.memory import kept_figures

    said = io.StringIO()
    with redirect_stdout(said):
        loram(*arguments, "--json", "--quiet")
    return kept_figures(json.loads(said.getvalue()))


def floor() -> Figures:
    """What every process with tensors holds; peaks are counted from here."""
    for name in ("torch", "safetensors"):
        import_module(name)
    return {}


def peft_merge(base: str, adapter: str, out: str) -> Figures:
    """The usual way: load the model, load the adapter, merge, save."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return {}


def limited(most: str, *arguments: str) -> Figures:
    """The command line in a process that the system refuses more than `most` bytes of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (int(most), int(most)))
    return loram(*arguments) | {"address_space": told("VmPeak")}


def make_base(size: str, name: str, folder: str, layers: str = "") -> Figures:
    """A random checkpoint of one of the sizes, of another number of layers where one is given."""
    from benchmarks.checkpoints import write_base
    from benchmarks.sizes import SIZES

    shape = getattr(SIZES[size], name)
    return {"parameters": write_base(replace(shape, layers=int(layers)) if layers else shape, Path(folder))}


def make_adapter(size: str, base: str, folder: str) -> Figures:
    """A random adapter on all Linears of a checkpoint."""
    from benchmarks.checkpoints import write_adapter
    from benchmarks.sizes import SIZES

    write_adapter(SIZES[size].checkpoint, SIZES[size].rank, base, Path(folder))
    return {}


def train(model: str, steps: str, batch: str, length: str, scratch: str) -> Figures:
    """A few steps of loram's own training loop on rows of random tokens."""
    from benchmarks.training import train_steps

    return train_steps(model, int(steps), int(batch), int(length), Path(scratch))


def step(who: str, model: str, steps: str, batch: str, length: str, scratch: str) -> Figures:
    """A few steps of loram's loop or of the stock Trainer, with the memory above the loaded model."""
    from benchmarks.step import measured

    return measured(who, model, int(steps), int(batch), int(length), Path(scratch))


def bnb_quantize(model: str, out: str) -> Figures:
    """The usual way: quantize while loading, save."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind: Any = BitsAndBytesConfig
    config = kind(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config).save_pretrained(out)
    return {}


def load_quantized(model: str) -> Figures:
    """Stock transformers on a folder that is quantized already, and how often it quantized."""
    import bitsandbytes.functional as functional
    from transformers import AutoModelForCausalLM

    calls = 0
    real = functional.quantize_4bit

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*arguments, **options)

    functional.quantize_4bit = counted
    AutoModelForCausalLM.from_pretrained(model)
    return {"quantized": calls}


def loops(size: str, name: str, rounds: str) -> Figures:
    """SparseGPT's column loop beside the reference, on one layer of a shape."""
    import torch

    from benchmarks.loops import measured
    from benchmarks.sizes import SIZES

    torch.set_num_threads(1)
    return measured(getattr(SIZES[size], name), int(rounds))


def make_calibrated(size: str, folder: str) -> Figures:
    """A random model with a tokenizer, and calibration windows."""
    from benchmarks.sizes import SIZES
    from benchmarks.windows import write_calibrated

    chosen = SIZES[size]
    write_calibrated(chosen.trained, Path(folder), chosen.samples, chosen.sample_length)
    return {}


def agree(first: str, second: str) -> Figures:
    """How far two sparse checkpoints have the same zeros."""
    from benchmarks.windows import agreement

    return {"agree": agreement(Path(first), Path(second))}


def imports() -> Figures:
    """What `loram prune` imports where it calibrates."""
    import_module("loram_cli.app")
    import_module("loram.stages").stage_function("prune")
    import_module("loram.blockwise")
    return {}


def llmcompressor(*arguments: str) -> Figures:
    """llm-compressor's job, or only its imports; runs in an environment of its own."""
    from benchmarks.llmcompressor_job import libraries, sparsify

    return sparsify(*arguments) if arguments else libraries()


JOBS: dict[str, Callable[..., Figures]] = {
    "loram": loram,
    "loram-json": loram_json,
    "floor": floor,
    "peft-merge": peft_merge,
    "limited": limited,
    "make-base": make_base,
    "make-adapter": make_adapter,
    "train": train,
    "step": step,
    "bnb-quantize": bnb_quantize,
    "load-quantized": load_quantized,
    "loops": loops,
    "make-calibrated": make_calibrated,
    "agree": agree,
    "imports": imports,
    "llmcompressor": llmcompressor,
}


def told(field: str) -> int:
    """What the kernel tells of this process's memory, in bytes; 0 where it does not."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def main(name: str, *arguments: str) -> None:
    figures = JOBS[name](*arguments)
    peak = told("VmHWM")  # where there is none, the launcher takes ru_maxrss
    report = figures | ({"peak": peak} if peak else {})
    Path(os.environ[REPORT]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
