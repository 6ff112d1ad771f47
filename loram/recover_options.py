"""The options of `recover`: what is carried over, and how its parts are weighed against each other afterwards."""

from __future__ import annotations

from dataclasses import dataclass, fields

from loram.data_options import RowOptions
from loram.option_fields import WritingOptions, argument, flag, option, require

FEWEST_ROWS = 4
FEWEST_EVALUATIONS = 8
"""COBYLA begins with one more point than there are scales, six, and needs one more to make a step."""


@dataclass(frozen=True, kw_only=True)
class RecoverInputs(WritingOptions):
    """What is carried over."""

    adapter: str = argument("Adapter trained on the small model.")
    small: str | None = option(None, "The small model, for an adapter trained outside loram.")
    portable: bool = option(True, "One rank and one alpha for all modules, as every server reads it.")
    base_id: str | None = option(None, "Hub id of the large model to name in the adapter.")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(RowOptions):
    """One scale per group of modules, chosen by the large model's loss."""

    calibrate: tuple[str, ...] = option(
        (),
        "Rows, as train reads them, on which a scale for each group of modules is chosen (extra: loram[calibrate]); "
        "neither rows you trained on nor those you will report on; may be repeated.",
    )
    large: str | None = option(None, "--calibrate: the large model, where the manifest does not say.")
    calibrate_rows: int = option(32, "--calibrate: rows to take; half to choose on, half to check on.")
    evaluations: int = option(40, "--calibrate: times the large model is run over the first half, at most.")
    batch: int = option(8, "--calibrate: rows in a forward pass.", flags=("--per-device-eval-batch-size",))

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"calibrate_rows": FEWEST_ROWS, "evaluations": FEWEST_EVALUATIONS, "batch": 1}
        for name, count in least.items():
            found = getattr(self, name)
            require(found >= count, f"--{flag(name)} is {found}; it must be {count} or more")
        if not self.calibrate:
            for item in fields(CalibrateOptions):
                unused = item.name != "seed" and getattr(self, item.name) != item.default
                require(not unused, f"--{flag(item.name)} is for --calibrate; add --calibrate FILE, or leave it out")


# The groups are shown from the last base to the first: that is how Python orders inherited fields.
@dataclass(frozen=True, kw_only=True)
class RecoverOptions(CalibrateOptions, RecoverInputs):
    """Carry a small adapter over to the large model."""
