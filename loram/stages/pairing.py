"""Which model an adapter belongs on, and which folders make up a ladder: by manifests, never by trust."""

from __future__ import annotations

import logging
from pathlib import Path

from loram.artifact import Manifest, read_manifest
from loram.checkpoint import describe_base
from loram.errors import InputError, KindError, MismatchError
from loram.stages.verify import ancestors

logger = logging.getLogger(__name__)
MODELS = (None, "small-model", "merged-model")


def model_manifest(model: Path) -> Manifest | None:
    """The manifest of something that must be a model; KindError for an adapter or a run."""
    if not (model / "config.json").is_file() and (model / "adapter_config.json").is_file():
        raise KindError(f"{model} is an adapter, not a model; give its model and add --adapter {model}")
    manifest = read_manifest(model)
    if (manifest.kind if manifest else None) not in MODELS:
        raise KindError(f"{model} is a {manifest.kind if manifest else 'folder'}; `loram eval` works on a model folder")
    return manifest


def check_pair(model: Path, adapter: Path) -> None:
    """Refuse an adapter on a model of the other size, of another map or of other weights."""
    if not adapter.is_dir():
        raise InputError(f"the adapter {adapter} does not exist; check the path")
    owner, manifest = model_manifest(model), read_manifest(adapter)
    small = owner is not None and owner.kind == "small-model"
    if manifest is None:
        return
    if manifest.kind not in ("adapter", "small-adapter"):
        raise KindError(f"{adapter} is a {manifest.kind}, not an adapter; give the folder of an adapter")
    if manifest.kind == "small-adapter" and not small:
        raise KindError(
            f"{adapter} is for the small model; run `loram recover {adapter} -o LARGE_ADAPTER` and give that one"
        )
    if manifest.kind == "adapter" and small:
        raise KindError(f"{adapter} is for the large model and {model} is a small one; give the large model")
    if small and owner is not None and manifest.pruning_map_sha256 != owner.pruning_map_sha256:
        raise MismatchError(
            f"{adapter} was trained with the pruning map {str(manifest.pruning_map_sha256)[:12]}, {model} has "
            f"{str(owner.pruning_map_sha256)[:12]}; give the small model that it was trained on"
        )
    if not small and manifest.base is not None:
        found = describe_base(model).weights_fingerprint
        if found != manifest.base.weights_fingerprint:
            raise MismatchError(
                f"{adapter} is for {manifest.base.id} with weights {manifest.base.weights_fingerprint[:12]}, "
                f"{model} has {found[:12]}; give that model"
            )


def parent_folder(folder: Path, kind: str, given: str | None, flag: str) -> Path | None:
    """The artifact of `kind` that `folder` was made from, at once or by steps: as given, or where manifests lead.

    None, with a warning that names the flag, where it cannot be found; a folder of another digest is not it.
    """
    if given is not None:
        path = Path(given)
        manifest = read_manifest(path)
        if not path.is_dir():
            raise InputError(f"{flag} {given} does not exist; check the path")
        if manifest is not None and manifest.kind != kind:
            raise KindError(f"{flag} {given} is a {manifest.kind}; expected a {kind}")
        return path
    for place in ancestors(folder):
        found = read_manifest(place)
        if found is not None and found.kind == kind:
            return place
    logger.warning("the %s that %s was made from was not found; give it with %s to see its rungs", kind, folder, flag)
    return None
