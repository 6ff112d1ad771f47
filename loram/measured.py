"""What was measured of transfer (docs/transfer.md): the figures that `plan` and the ladder's advice speak from.

Kept gain of SmolLM2-135M on GSM8K: of the held-out loss that LoRA takes off when it is trained on the large model
itself, the share that is left when it was trained on the small one. A test holds them to the benchmark's records.
"""

from __future__ import annotations

SETTING = "SmolLM2-135M, GSM8K, ratio 0.5"
KEPT = {
    "nf4": 0.96,
    "refit-general": 0.78,
    "refit": 0.85,
    "taylor": 0.90,
    "taylor-touched": 0.95,
    "taylor-nf4": 0.86,
    "taylor-block-nf4": 0.91,
}
"""By method of `benchmarks/grid.py`: the mean over the seeds that were run, to a percent."""


def because(ratio: str | None, quantize: str) -> str:
    """Why a combination is the one to take, in a sentence; `ratio` None: nothing is cut."""
    if ratio is None and quantize == "none":
        return "nothing is cut or rounded, so nothing of the gain is lost"
    bits = (
        f"4 bit without a cut kept {KEPT['nf4']:.0%} of what LoRA on the large model gains, a cut in 16 bit "
        f"{KEPT['taylor']:.0%} ({SETTING})"
    )
    if ratio is None:
        return f"bits before cuts: {bits}"
    repair = f"`loram align`: {KEPT['taylor-nf4']:.0%} to {KEPT['taylor-block-nf4']:.0%}"
    touching = f"`loram run --touch-up 8`: {KEPT['taylor']:.0%} to {KEPT['taylor-touched']:.0%} in 16 bit"
    return (
        f"{bits}, so bits first and the mildest cut that fits; calibrate it half on your own text (by Wanda that kept "
        f"{KEPT['refit']:.0%}, and {KEPT['refit-general']:.0%} on general text alone); before it is rounded to 4 bit "
        f"repair it layer by layer ({repair}), and end with a few steps on the large model itself ({touching})"
    )
