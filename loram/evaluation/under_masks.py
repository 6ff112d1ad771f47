"""The masks that an adapter needs which was masked in training: those of the small model it is measured on."""

from __future__ import annotations

from pathlib import Path

from loram.adapter import Adapter
from loram.errors import MismatchError
from loram.masks import Masks
from loram.pruning_map import FILE as MAP_FILE
from loram.pruning_map import read_map


def masks_for(adapter: Adapter, folder: Path | None) -> Masks | None:
    """The masks in the folder of the adapter's model; None where its update is not masked.

    MismatchError where it is and the model has no masks: without them it would be another adapter.
    """
    if not adapter.masked:
        return None
    pruning_map = read_map(folder) if folder is not None and (folder / MAP_FILE).is_file() else None
    if pruning_map is None or not pruning_map.masks:
        raise MismatchError(
            f"the adapter was trained under masks and {folder or 'the model'} has none; give the small model that it "
            "was trained on, or run `loram recover` and give the large one"
        )
    return pruning_map.mask_in_small
