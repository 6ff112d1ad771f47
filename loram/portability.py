"""Who can load an adapter: the rules that servers apply, read in their sources.

Servers fail silently (a module they do not know leaves the base model's output), so the verdict is given
beforehand. vLLM reads r, lora_alpha and use_rslora only; llama.cpp's converter reads lora_alpha only.
"""

from __future__ import annotations

from dataclasses import dataclass

from loram.adapter import Adapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SERVED_LEAVES = frozenset(
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
)


@dataclass(frozen=True)
class Verdict:
    """Whether one consumer loads the adapter right, and why not (or what to mind)."""

    ok: bool
    note: str = ""


def portability(adapter: Adapter, *, complete: bool = True) -> dict[str, Verdict]:
    """The verdict for peft, vllm, sglang and llama_cpp; `complete`: keys and shapes fit the base."""
    leaves = {module.rpartition(".")[2] for module in adapter.pairs}
    strange = sorted(leaves - SERVED_LEAVES)
    patterns = bool(adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern"))
    fits = Verdict(False, "keys or shapes do not fit the base")
    if adapter.masked:
        masked = Verdict(False, "masked: recover it")
        return dict.fromkeys(("peft", "vllm", "sglang", "llama_cpp"), masked)
    return {
        "peft": Verdict(True) if complete else fits,
        "vllm": fits if not complete else _vllm(adapter, strange, patterns),
        "sglang": fits if not complete else _reads_alpha_over_rank(adapter, strange, "is not served"),
        "llama_cpp": fits if not complete else _reads_alpha_over_rank(adapter, strange, "cannot be converted"),
    }


def _vllm(adapter: Adapter, strange: list[str], patterns: bool) -> Verdict:
    if patterns:
        return Verdict(False, "rank_pattern and alpha_pattern are not read: recover with --portable")
    if strange:
        return Verdict(False, f"{strange[0]} is not served")
    if adapter.rank > VLLM_RANKS[-1]:
        return Verdict(False, f"rank {adapter.rank} is above {VLLM_RANKS[-1]}")
    bucket = next(rank for rank in VLLM_RANKS if rank >= adapter.rank)
    return Verdict(True, f"--max-lora-rank {bucket}")


def _reads_alpha_over_rank(adapter: Adapter, strange: list[str], trouble: str) -> Verdict:
    """SGLang and llama.cpp's converter: one scale alpha/r for all modules, and no others than these."""
    if strange:
        return Verdict(False, f"{strange[0]} {trouble}")
    if not adapter.uniform:
        return Verdict(False, "only alpha/r is read: rsLoRA and patterns come out wrong; recover with --portable")
    return Verdict(True)
