"""How the small model behind an adapter was made: read from the manifests of the folders it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from loram.artifact import Manifest, find_location, read_manifest
from loram.data.calibration import is_general
from loram.errors import LoramError
from loram.evaluation.advice import Making
from loram.families.widths import parse_ratio

KINDS = ("adapter", "small-adapter", "small-model")


def making_of(folders: Iterable[Path | None]) -> Making:
    """What an adapter's folder, those it was made from, and the folders that their hints lead to say."""
    made = Making()
    for manifest in ancestors(folder for folder in folders if folder is not None):
        options = manifest.options
        if len(manifest.compression) > len(made.compression):
            made = replace(made, compression=manifest.compression)
        if manifest.stage == "recover":
            made = replace(made, scaled=bool(options.get("calibrate")))
        if manifest.stage == "train":
            masked = "mask" in manifest.compression and not options.get("unmasked_update")
            touched = made.touched or (manifest.kind == "adapter" and bool(options.get("adapter")))
            made = replace(made, steps=options.get("steps"), masked=masked, touched=touched)
        if manifest.stage == "prune":
            calibration = options.get("calibration") or ()
            made = replace(
                made,
                method=options.get("method"),
                ratio=parse_ratio(str(options["ratio"])) if "ratio" in options else None,
                score=options.get("score"),
                task_text=any(not is_general(source) for source in calibration),
            )
    return made


def ancestors(folders: Iterable[Path]) -> Iterator[Manifest]:
    """The manifests of folders and of what they were made from, as far as it can be found; each once."""
    waiting, seen = list(folders), set[str]()
    while waiting:
        folder = waiting.pop(0)
        manifest = known(folder)
        if manifest is None or manifest.digest() in seen:
            continue
        seen.add(manifest.digest())
        yield manifest
        places = (find_location(parent.location, folder) for parent in manifest.parents if parent.kind in KINDS)
        waiting += [place for place in places if place is not None]


def known(folder: Path) -> Manifest | None:
    """A folder's manifest; None for a damaged one: advice is not worth an error."""
    try:
        return read_manifest(folder)
    except LoramError:
        return None
