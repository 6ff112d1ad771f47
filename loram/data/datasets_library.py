"""Rows through the `datasets` library: datasets on the Hub, and folders that `save_to_disk` wrote.

Files that lie about are read by `readers` instead, which knows their lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loram.data.places import Place
from loram.data.readers import Row
from loram.errors import DataError, HubError

MARKS = ("dataset_dict.json", "state.json")
SECONDS = 10.0


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in MARKS)


def saved_rows(folder: Path, split: str | None) -> list[Row]:
    """The rows of a folder that `save_to_disk` wrote."""
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # arrow raises many kinds
        raise DataError(f"{folder} is a damaged saved dataset: {first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        names = list(found)
        chosen = split or ("train" if "train" in names or len(names) != 1 else names[0])
        if chosen not in names:
            raise DataError(f"{folder} has no split {chosen!r}; give one of {', '.join(names)} as {folder}@SPLIT")
        return rows_of(found[chosen], f"{folder}@{chosen}")
    if split is not None:
        raise DataError(f"{folder} has no splits; give it without @{split}")
    return rows_of(found, str(folder))


def hub_rows(place: Place) -> list[Row]:
    """The rows of a dataset on the Hub, from its cache where they are there; `train` where no split is named."""
    import datasets

    require_reachable(place)
    split = place.split or "train"
    try:
        found: Any = datasets.load_dataset(place.path, place.config, split=split)
    except ValueError as error:  # an unknown configuration or split; the library names those that there are
        raise DataError(
            f"{place}: {first_line(error)}; name them as {place.path}:CONFIG@SPLIT, e.g. openai/gsm8k:main@test"
        ) from error
    except Exception as error:
        raise HubError(unreachable(place, error)) from error
    return rows_of(found, f"{place.path}@{split}")


def require_reachable(place: Place) -> None:
    """HubError at once where the Hub cannot be asked or refuses; the library itself would try for half a minute."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.HfApi().dataset_info(place.path, timeout=SECONDS)
    except Exception as error:
        raise HubError(unreachable(place, error)) from error


def unreachable(place: Place, error: Exception) -> str:
    """Why a dataset cannot be had."""
    return (
        f"{place.path} is neither a file nor a folder, and the Hub did not give a dataset of that name "
        f"({first_line(error)}); check the name, or go online (HF_HUB_OFFLINE=1 reads what was fetched before)"
    )


def rows_of(found: Any, name: str) -> list[Row]:
    """Every row with its place, counted from 1."""
    return [(f"{name} row {number}", dict(row)) for number, row in enumerate(found, start=1)]


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
