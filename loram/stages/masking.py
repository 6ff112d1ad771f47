"""What stages do about masks: whose updates are masked, what cannot be, and what a mask hid of an update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loram.adapter import Adapter, load_adapter
from loram.artifact import Draft, Manifest
from loram.errors import KindError, OptionError
from loram.hidden_update import HiddenUpdate, hidden_update
from loram.masks import Masks
from loram.options import TrainOptions
from loram.pruning_map import FILE as MAP_FILE
from loram.pruning_map import PruningMap, read_map

RECORD = "mask"
"""Where a manifest's `training` has it."""


def is_masked(options: TrainOptions, small: Manifest | None) -> bool:
    """Whether training masks its updates: it does wherever single weights were pruned, unless asked not to."""
    return small is not None and "mask" in small.compression and not options.unmasked_update


def refuse_unmaskable(options: TrainOptions, folder: Path, small: Manifest | None) -> None:
    """OptionError for a way of training that a masked update cannot go."""
    if not is_masked(options, small):
        return
    if options.lora_fa:
        raise OptionError(
            f"--lora-fa trains B from A's output alone, and {folder} has masks: a masked update needs A's input; leave "
            "it out, or add --unmasked-update"
        )
    if options.compile:
        raise OptionError(
            f"--compile does not go with the masks of {folder}: torch.compile compiles a masked update anew "
            "for every layer; leave it out, or add --unmasked-update"
        )


def training_masks(options: TrainOptions, folder: Path) -> Masks | None:
    """The masks that training puts on its updates; None where there are none, or they are not wanted."""
    if options.unmasked_update or not (folder / MAP_FILE).is_file():
        return None
    pruning_map = read_map(folder)
    return pruning_map.mask_in_small if pruning_map.masked else None


def refuse_masked(adapter: Adapter, where: str | Path) -> None:
    """KindError for a small adapter with a masked update, also where its `loram.json` is gone."""
    if adapter.masked:
        raise KindError(
            f"{where} was trained under the masks of a small model and is no adapter of the large one: run "
            f"`loram recover {where} --small SMALL -o ADAPTER` first"
        )


def look_behind(draft: Draft, folder: Path) -> HiddenUpdate | None:
    """What of the update that was just trained lies on pruned entries of the small model, noted in the manifest."""
    found = hidden_in_small(load_adapter(draft.path, streamed=True), read_map(folder))
    if found is not None:
        assert draft.manifest is not None
        training = (draft.manifest.training or {}) | {RECORD: found.to_json()}
        draft.manifest = replace(draft.manifest, training=training)
    return found


def hidden_in_small(adapter: Adapter, pruning_map: PruningMap) -> HiddenUpdate | None:
    """The same of an adapter in small coordinates; None for a small model without masks."""
    return hidden_update(adapter, pruning_map.mask_in_small, adapter.masked) if pruning_map.masks else None


def recorded(manifest: Manifest | None) -> HiddenUpdate | None:
    """What a manifest says about it."""
    found = (manifest.training or {}).get(RECORD) if manifest is not None else None
    return HiddenUpdate.from_json(found) if isinstance(found, dict) else None
