"""A model to calibrate, the text, and the very windows that loram would make of it (in a child: this imports torch)."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.checkpoints import write_base
from benchmarks.measure import ROOT
from benchmarks.sizes import Shape
from loram.data.calibration import calibration_windows
from loram.modeling import load_tokenizer

TOKENIZER = ROOT / "tests" / "fixtures" / "tiny-llama-kjv"
TEXT = ROOT / "loram" / "data" / "builtin.txt"
FILE = "windows.safetensors"


def write_calibrated(shape: Shape, folder: Path, samples: int, length: int) -> None:
    """A random model in bf16 with a tokenizer, and its windows (samples, length)."""
    write_base(shape, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    windows = calibration_windows((str(TEXT),), load_tokenizer(folder), samples, length, 0)
    (folder / "windows").mkdir()
    save_file({"windows": torch.stack(windows)}, folder / "windows" / FILE)


def agreement(first: Path, second: Path) -> float:
    """The share of decoder weights that are zero in both checkpoints or in neither."""
    same = total = 0
    for name, place in pruned(first).items():
        with safe_open(place, "pt") as one, safe_open(pruned(second)[name], "pt") as other:
            zeros = [file.get_tensor(name) == 0 for file in (one, other)]
        same += int((zeros[0] == zeros[1]).sum())
        total += zeros[0].numel()
    return same / total


def pruned(folder: Path) -> dict[str, Path]:
    """The decoder's Linears of a checkpoint, with the file that each is in."""
    found = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        found |= {name: file for name in names if name.endswith("_proj.weight")}
    return found
