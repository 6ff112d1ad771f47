"""llm-compressor's SparseGPT or Wanda on given windows, 2:4. Runs in an environment of its own (see CONTRIBUTING.md):

PYTHON benchmarks/llmcompressor_job.py METHOD MODEL WINDOWS OUT
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(method: str, folder: str, windows: str, out: str) -> None:
    torch.set_num_threads(1)
    ids = load_file(windows)["windows"]
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    recipe = kind(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder),
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
    )
    model.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
