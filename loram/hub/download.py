"""A model by folder or by Hub id: the one place that may ask the network, and only when given an id.

`ID@REVISION` names a branch, a tag or a commit. What is fetched lies in the Hub's own cache, whose path tells id and
commit; weights are identified by their fingerprint, wherever they came from.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath

from loram.artifact import Base
from loram.errors import InputError, OptionError
from loram.hub.failures import hub_failure

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
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
