"""A model or an adapter by folder or by Hub id: the one place that may ask the network, and only when given an id.

`ID@REVISION` names a branch, a tag or a commit. What is fetched lies in the Hub's own cache, whose path tells id and
commit; weights are identified by their fingerprint, wherever they came from.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, TypeVar

from loram.artifact import Base
from loram.errors import InputError, OptionError
from loram.hub.failures import hub_failure
from loram.option_fields import StageOptions

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
FETCHED = ("adapter", "small", "small_adapter", "ceiling")
"""Options that name an adapter or a small model."""
Options = TypeVar("Options", bound=StageOptions)
REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*"


def resolve_model(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model: a path, or a Hub id (`ID` or `ID@REVISION`), looked up in the cache, then fetched.

    InputError for a path that does not exist, HubError where the Hub does not give it.
    """
    if Path(model).exists():
        return Path(model)
    named, wanted = split_id(model)
    if named is None:
        raise InputError(
            f"{model} does not exist; give a model folder or a Hub id such as org/name or org/name@revision"
        )
    if wanted and revision and wanted != revision:
        raise OptionError(f"{model} names the revision {wanted} and --revision says {revision}; give one of them")
    from huggingface_hub import snapshot_download

    patterns = [*OTHER_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(named, revision=wanted or revision, allow_patterns=patterns))
    except Exception as error:
        raise hub_failure(error, model, "read") from error


def resolve_artifact(place: str) -> Path:
    """The local folder of an adapter or a small model, by path or by Hub id, fetched where it is one.

    A path that does not exist is left to the stage. `runs/adapter` beside a folder `runs` is a path; with a revision,
    `runs/adapter@main`, it is an id.
    """
    named, revision = split_id(place)
    if named is None or (revision is None and Path(place).parent.is_dir()):
        return Path(place)
    return resolve_model(place)


def fetched(options: Options) -> Options:
    """The options with folders in place of the Hub ids of adapters and small models."""
    given = {name: place for name in FETCHED if (place := getattr(options, name, None))}
    found: dict[str, Any] = {name: str(resolve_artifact(place)) for name, place in given.items()}
    return replace(options, **{name: folder for name, folder in found.items() if folder != given[name]})


def split_id(model: str) -> tuple[str | None, str | None]:
    """(id, revision) of `ID` or `ID@REVISION`; (None, None) for what is no Hub id, or is a path that exists."""
    found = None if Path(model).exists() else re.fullmatch(rf"({REPO})(?:@([\w./-]+))?", model)
    return (found[1], found[2]) if found else (None, None)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a Hub id."""
    return re.fullmatch(REPO, text) is not None


def is_path(base: Base) -> bool:
    """Whether an id of the form org/name is only how a folder was typed."""
    return Path(base.id).exists() or PurePath(base.location).parts[-2:] == PurePath(base.id).parts
