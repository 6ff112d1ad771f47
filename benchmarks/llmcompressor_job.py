"""llm-compressor's SparseGPT or Wanda on given windows, 2:4, in an environment of its own (see CONTRIBUTING.md)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any


def libraries() -> dict[str, Any]:
    """Import what the job needs; the versions that count."""
    import datasets  # noqa: F401
    import llmcompressor.modifiers.pruning  # noqa: F401
    import transformers  # noqa: F401

    return {name: version(name) for name in ("llmcompressor", "torch", "transformers")}


def sparsify(method: str, folder: str, windows: str, out: str) -> dict[str, Any]:
    """Prune a model's decoder Linears in the dtype it is stored in, and save it."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    ids = load_file(windows)["windows"]
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder),
        dataset=Dataset.from_dict(rows),
        recipe=kind(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
    )
    model.save_pretrained(out)
    return libraries()
