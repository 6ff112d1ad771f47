"""A model by folder or by Hub id: the one place that may ask the network, and only when given an id."""

from __future__ import annotations

import re
from pathlib import Path

from loram.errors import HubError, InputError

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def resolve_model(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model. A Hub id is looked up in the cache, then fetched.

    InputError for a path that does not exist, HubError where the Hub cannot be asked.
    """
    if Path(model).exists():
        return Path(model)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model):
        raise InputError(f"{model} does not exist; give a model folder or a Hub id such as org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*OTHER_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{model} is neither a folder nor in the Hub cache, and the Hub cannot be reached; "
            "check the path, or go online and try again"
        ) from error
    except Exception as error:
        raise HubError(f"the Hub did not give {model}: {str(error).strip().splitlines()[0][:200]}") from error
