"""What goes to the Hub, by name: weights, configs, tokenizer, manifest, card. Never pickles, checkpoints or logs.

Files that may hold paths of this machine are rewritten on the way; the folder itself is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loram.adapter import CONFIG, WEIGHTS
from loram.artifact import MANIFEST, Base, Manifest, read_json, sha256_file
from loram.checkpoint import INDEX, find_shards
from loram.hub.download import is_hub_id

CARD = "README.md"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
LOCAL_OPTIONS = (
    *("out", "force", "dry_run", "adapter", "small", "small_adapter", "model", "large", "base", "ceiling"),
    *("resume", "recipe", "overrides", "data", "eval_data", "calibration", "calibrate"),
)
PLACE = re.compile(r"(/|~|\.{1,2}[/\\]|[A-Za-z]:[\\/]|file:)")
PLACES = ("path", "file", "location", "dir", "folder")


@dataclass(frozen=True)
class HubFile:
    """A file of the repository: its name there, and where its bytes are."""

    name: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @property
    def sha256(self) -> str:
        """Hex digest."""
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else sha256_file(self.source)


def adapter_files(folder: Path, base: Base) -> list[HubFile]:
    """An adapter's weights, its config naming the base by its Hub id, and the tokenizer it was trained with."""
    config = clean(read_json(folder / CONFIG)) | {
        "base_model_name_or_path": base.id,
        "revision": base.revision,
        "inference_mode": True,
    }
    return [HubFile(CONFIG, as_json(config)), HubFile(WEIGHTS, folder / WEIGHTS), *tokenizer_files(folder)]


def model_files(folder: Path) -> list[HubFile]:
    """A model's config, all its shards with their index, and its tokenizer."""
    shards = [HubFile(shard.name, shard) for shard in find_shards(folder)]
    index = [HubFile(INDEX, folder / INDEX)] if (folder / INDEX).is_file() else []
    config = clean(read_json(folder / "config.json"))
    return [HubFile("config.json", as_json(config)), *shards, *index, *tokenizer_files(folder)]


def tokenizer_files(folder: Path) -> list[HubFile]:
    """Tokenizer, chat template and generation settings. Not added_tokens.json: SGLang takes it for new embeddings."""
    found = []
    for name in TOKENIZER:
        file = folder / name
        if file.is_file():
            small = name.endswith("_config.json") or name == "special_tokens_map.json"
            found.append(HubFile(name, as_json(clean(read_json(file))) if small else file))
    return found


def manifest_file(manifest: Manifest, base: Base | None, files: list[HubFile]) -> HubFile:
    """`loram.json` without places of this machine, its digests those of the files that go along."""
    digests = {
        file.name: manifest.files[file.name]
        if isinstance(file.source, Path) and file.name in manifest.files
        else file.sha256
        for file in files
    }
    training = manifest.training and {
        key: public_options(value) if key == "options" else value for key, value in manifest.training.items()
    }
    public = replace(
        manifest,
        options=public_options(manifest.options),
        base=base and replace(base, location=""),
        parents=tuple(replace(parent, location="") for parent in manifest.parents),
        training=training,
        files=dict(sorted(digests.items())),
    )
    return HubFile(MANIFEST, as_json(public.to_json()))


def public_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options without those that name places; Hub ids stay."""
    return {
        key: value
        for key, value in options.items()
        if key not in LOCAL_OPTIONS and not (isinstance(value, str) and PLACE.match(value))
    }


def data_name(text: str) -> str:
    """What to call a data file in public: its name; a Hub id whole. A `=WEIGHT` goes."""
    place = text.partition("=")[0]
    path = Path(place)
    return place if is_hub_id(place) and not path.suffix and not path.exists() else path.name


def clean(value: Any) -> Any:
    """JSON without entries that name a place on this machine, such as `tokenizer_file` or `_name_or_path`."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items() if not is_place(str(key), item)}
    return [clean(item) for item in value] if isinstance(value, list) else value


def is_place(key: str, value: Any) -> bool:
    """Whether an entry is a path of this machine."""
    if not isinstance(value, str) or not key.lower().endswith(PLACES):
        return False
    return PLACE.match(value) is not None or (bool(value) and Path(value).exists())


def as_json(value: Any) -> bytes:
    """Indented JSON with a final newline."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
