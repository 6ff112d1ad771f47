"""Where an adapter comes from: its pruning map, its small model, its large model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from loram.adapter import CONFIG
from loram.artifact import (
    Base,
    Manifest,
    Parent,
    find_location,
    read_json,
    read_manifest,
    relative_location,
    require_folder,
    require_kind,
)
from loram.checkpoint import describe_base
from loram.errors import InputError, KindError, MismatchError, OptionError
from loram.hub.download import resolve_model
from loram.pruning_map import FILE as MAP_FILE
from loram.pruning_map import PruningMap, read_map


@dataclass(frozen=True)
class SmallSource:
    """What recover needs of an adapter trained on a small model: the map, the large model, what was done to it."""

    pruning_map: PruningMap
    base: Base
    compression: tuple[str, ...]


def small_source(adapter: str | Path, small: str | Path | None) -> SmallSource:
    """The map and the base of a small adapter, from its own folder or from `small`.

    MismatchError where the adapter records another map than the one given, naming both.
    """
    folder = require_folder(adapter)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.kind != "small-adapter":
        raise KindError(f"{adapter} is a {manifest.kind}; `loram recover` works on an adapter trained on a small model")
    if small is None and manifest is None:
        raise OptionError(
            f"{adapter} was not trained by loram, so it does not say on which small model; add --small FOLDER"
        )
    maps = []
    if manifest is not None:
        pruning_map = read_map(folder)
        check_digest(folder, pruning_map, manifest.pruning_map_sha256)
        maps.append((folder, pruning_map, manifest))
    if small is not None:
        small_manifest = require_kind(small, ("small-model",), "recover --small")
        small_map = read_map(small)
        check_digest(small, small_map, small_manifest.pruning_map_sha256)
        maps.append((Path(small), small_map, small_manifest))
    (place, chosen, source), *others = maps
    for other_place, other, _ in others:
        if other.sha256 != chosen.sha256:
            raise MismatchError(
                f"{place} was trained with the pruning map {chosen.sha256[:12]}, {other_place} has the map "
                f"{other.sha256[:12]}; give the small model that the adapter was trained on"
            )
    if source.base is None:
        raise InputError(f"{place}/loram.json does not name the large model; it is damaged: run the stage again")
    # The adapter's own copy knows its masks by digest; the small model's has them.
    fullest = next((found for _, found, _ in maps if found.masks), chosen)
    return SmallSource(fullest, moved(source.base, place, folder), source.compression)


def check_digest(folder: str | Path, pruning_map: PruningMap, recorded: str | None) -> str:
    """The map's digest; MismatchError where the manifest beside it records another one."""
    if recorded is not None and recorded != pruning_map.sha256:
        raise MismatchError(
            f"{Path(folder) / MAP_FILE} has digest {pruning_map.sha256[:12]}, loram.json records {recorded[:12]}; "
            "the map was exchanged: give the one that was written there"
        )
    return pruning_map.sha256[:12]


def moved(base: Base, old: str | Path, new: str | Path) -> Base:
    """The same base, its location hint seen from another folder."""
    found = find_location(base.location, old)
    return replace(base, location=relative_location(found, new) if found else base.location)


def parent_of(folder: str | Path, kind: str, seen_from: str | Path) -> Parent:
    """A folder as a parent of what is written to `seen_from`; an empty digest for one loram did not write."""
    manifest = read_manifest(folder)
    return Parent(kind, manifest.digest() if manifest else "", relative_location(folder, seen_from))


def find_large(adapter: str | Path, manifest: Manifest | None, given: str | None) -> Path | None:
    """The large model's folder: as given, as the manifest hints, or as adapter_config.json names it."""
    if given is not None:
        return resolve_model(given)
    if manifest is not None and manifest.base is not None:
        hinted = find_location(manifest.base.location, adapter)
        if hinted is not None:
            return hinted
    config = Path(adapter) / CONFIG
    named = str(read_json(config).get("base_model_name_or_path") or "") if config.is_file() else ""
    return Path(named) if named and Path(named).is_dir() else None


def check_base(expected: Base, folder: str | Path) -> str:
    """The base's id and digest; MismatchError where the weights in `folder` have another fingerprint."""
    return check_same(expected, describe_base(folder), folder)


def check_same(expected: Base, found: Base, folder: str | Path) -> str:
    """The same for a base that is described already."""
    if found.weights_fingerprint != expected.weights_fingerprint:
        raise MismatchError(
            f"{folder} has the weights {found.weights_fingerprint[:12]}, the adapter was made for {expected.id} with "
            f"{expected.weights_fingerprint[:12]}; give that model (and that revision)"
        )
    return f"{expected.id} {found.weights_fingerprint[:12]}"
