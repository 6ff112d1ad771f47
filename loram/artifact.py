"""Self-describing folders: the manifest `loram.json`, digests, and atomic writing.

A stage works in the sibling `OUT.partial/` and one `os.replace` turns it into OUT, so that OUT is at
every moment absent, the old one, or complete. Identity is by digest; locations are only hints.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loram.errors import (
    InputError,
    Interrupted,
    KindError,
    LoramError,
    MismatchError,
    OptionError,
    OutputError,
    ResourceError,
    is_disk_full,
)
from loram.version import __version__

SCHEMA = 1
MANIFEST = "loram.json"
SEAL = "checksums.json"  # written last into a checkpoint; one without it is not whole
UNHASHED = (MANIFEST, "loram.log", "metrics.jsonl")  # the last two hold times: they say when, not what
TRACKED = "logs"  # what trackers such as TensorBoard write into an artifact
FIRST_STAGE = {
    "small-model": "loram prune MODEL -o SMALL",
    "small-adapter": "loram train SMALL --data FILE -o ADAPTER",
    "adapter": "loram recover SMALL_ADAPTER -o ADAPTER",
    "merged-model": "loram merge ADAPTER -o MERGED",
    "run": "loram run RECIPE -o RUN",
}


@dataclass(frozen=True)
class Base:
    """Which large model: its Hub id, where it was, and digests that pin its config and weights."""

    id: str
    location: str
    revision: str | None
    config_sha256: str
    weights_fingerprint: str


@dataclass(frozen=True)
class Parent:
    """An artifact that this one was made from."""

    kind: str
    digest: str
    location: str


@dataclass(frozen=True)
class Manifest:
    """`loram.json`: what a folder is and what it was made from."""

    kind: str
    stage: str
    options: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    compression: tuple[str, ...] = ()
    base: Base | None = None
    pruning_map_sha256: str | None = None
    parents: tuple[Parent, ...] = ()
    training: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA
    loram: str = __version__

    def to_json(self) -> dict[str, Any]:
        """The JSON object, keys in the order a reader wants them."""
        first = {"schema": self.schema, "kind": self.kind, "stage": self.stage, "loram": self.loram}
        return first | {key: value for key, value in asdict(self).items() if key not in first}

    def digest(self) -> str:
        """sha256 of everything that says what the artifact is; locations and versions stay outside."""
        body = self.to_json()
        body.pop("environment")
        for name in ("training", "calibration"):
            if body[name] is None:
                body.pop(name)
        body.pop("loram")
        for place in [body["base"] or {}, *body["parents"]]:
            place.pop("location", None)
        body["options"] = {k: v for k, v in body["options"].items() if k not in ("out", "force", "dry_run")}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Draft:
    """An artifact in the making: write files under `path`, set `manifest`; the rest happens at the end.

    `digests` may be filled with the sha256 of files already hashed while they were written.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path = path
        self.out = out
        self.manifest: Manifest | None = None
        self.digests: dict[str, str] = {}

    def finish(self) -> Manifest:
        """Hash what is not hashed yet and write `loram.json`."""
        assert self.manifest is not None, "a stage must set draft.manifest"
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            noted = name in UNHASHED or name.startswith(TRACKED + "/") or name in self.digests
            if file.is_file() and not noted:
                self.digests[name] = sha256_file(file)
        manifest = replace(self.manifest, files=dict(sorted(self.digests.items())), environment=environment())
        write_json(self.path / MANIFEST, manifest.to_json())
        return manifest


def check_output(out: str | Path, inputs: Iterable[str | Path] = (), *, force: bool = False) -> Path:
    """OUT as a path, after refusing one that is, holds or lies in an input, or exists without --force."""
    if not str(out):
        raise OptionError("no output folder was given; add -o OUT")
    target = Path(out)
    resolved = target.resolve()
    for item in inputs:
        source = Path(item).resolve()
        if {source, *source.parents} & {resolved, *(place.resolve() for place in scratch(target))}:
            raise OutputError(f"the output {target} is the input {item} or holds it; choose another folder with -o")
        if source in resolved.parents:
            raise OutputError(f"the output {target} lies inside the input {item}; choose another folder with -o")
    if target.is_file():
        raise OutputError(f"the output {target} is a file; choose a folder with -o")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise OutputError(f"the output {target} exists and is not empty; choose another with -o or add --force")
    return target


def scratch(target: Path) -> tuple[Path, Path]:
    """Where OUT is written, and where an old OUT waits until the new one is complete."""
    target = target if target.name else target.resolve()
    return target.with_name(target.name + ".partial"), target.with_name(f".{target.name}.replaced")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else writes this folder while the block runs; OutputError where somebody does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise OutputError(f"{folder} is being written by another loram; wait for it, or choose another -o") from None
    finally:
        os.close(descriptor)


@contextmanager
def drafting(
    out: str | Path, *, force: bool = False, inputs: Iterable[str | Path] = (), keep_partial: bool = False
) -> Iterator[Draft]:
    """A draft that becomes OUT when the block ends well.

    `keep_partial` leaves what an earlier, interrupted call wrote in OUT.partial (a stage that resumes).
    After an interruption the partial folder stays; after an error it is removed, unless `keep_partial` and it holds
    checkpoints to go on from: a full disk or memory must not cost them. Numbers that went wrong do.
    """
    target = check_output(out, inputs, force=force)
    partial, _ = scratch(target)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, target) from error
    with locked(partial):
        yield from _draft(Draft(partial, target), keep_partial)


def _draft(draft: Draft, keep_partial: bool) -> Iterator[Draft]:
    """The inside of `drafting`, with the partial folder to itself."""
    partial, target = draft.path, draft.out
    try:
        if not keep_partial:
            empty(partial)
        with logging_into(partial / "loram.log"):
            yield draft
        draft.finish()
        publish(partial, target)
    except (KeyboardInterrupt, SystemExit, Interrupted):
        raise
    except BaseException as error:
        if isinstance(error, MismatchError) or not (keep_partial and any(partial.glob(f"*/*/{SEAL}"))):
            shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise disk_full(target) from error
        if isinstance(error, OSError):
            raise output_error(error, target) from error
        raise


@contextmanager
def logging_into(file: Path) -> Iterator[None]:
    """What loram logs while the block runs also goes to `file`."""
    handler = logging.FileHandler(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("loram")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def publish(partial: Path, target: Path) -> None:
    """Make `partial` the target; an old target is moved aside first and deleted last."""
    _, aside = scratch(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(target, aside)
    os.replace(partial, target)
    shutil.rmtree(aside, ignore_errors=True)


def empty(folder: Path) -> None:
    """Remove what a folder holds, not the folder."""
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def output_error(error: OSError, target: Path) -> LoramError:
    """A write that failed, as the sentence and exit code a user needs."""
    if is_disk_full(error):
        return disk_full(target)
    place = Path(str(error.filename)) if error.filename else target
    if place not in target.parents and not str(place).startswith((str(target), *map(str, scratch(target)))):
        return InputError(f"cannot read {error.filename}: {error.strerror}")
    return OutputError(f"cannot write {target}: {error.strerror or error}; choose another folder with -o")


def disk_full(target: Path) -> ResourceError:
    """No room for what was to be written."""
    return ResourceError(f"the disk is full while writing {target}; free some space or choose another disk with -o")


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of an artifact, or None for a folder that no stage of loram wrote."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        return None
    body = read_json(file)
    schema = body.get("schema") if isinstance(body, dict) else None
    if not isinstance(schema, int):
        raise InputError(f"{file} has no schema number; it is damaged or was not written by loram")
    if schema > SCHEMA:
        raise InputError(f"{file} has schema {schema}, this loram reads up to {SCHEMA}; upgrade loram")
    try:
        known = {key: body[key] for key in Manifest.__dataclass_fields__ if key in body}
        known["base"] = Base(**body["base"]) if body.get("base") else None
        known["parents"] = tuple(Parent(**parent) for parent in body.get("parents", ()))
        known["compression"] = tuple(body.get("compression", ()))
        return Manifest(**known)
    except (TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged: {error}; write the folder again") from error


def require_kind(folder: str | Path, kinds: tuple[str, ...], verb: str) -> Manifest:
    """The manifest of a folder that must be one of `kinds`; KindError says which stage comes first."""
    require_folder(folder)
    manifest = read_manifest(folder)
    if manifest is None or manifest.kind not in kinds:
        found = "not a folder that loram wrote" if manifest is None else f"a {manifest.kind}"
        raise KindError(
            f"{folder} is {found}; `loram {verb}` works on a {' or '.join(kinds)}: run `{FIRST_STAGE[kinds[0]]}` first"
        )
    return manifest


def require_folder(folder: str | Path) -> Path:
    """`folder` as a path, or InputError where it does not exist."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder} does not exist or is not a folder; check the path")
    return path


def relative_location(target: str | Path, start: str | Path) -> str:
    """A hint where `target` is, seen from the folder `start`."""
    return os.path.relpath(Path(target).resolve(), Path(start).resolve())


def find_location(location: str, start: str | Path) -> Path | None:
    """The folder that a location hint in `start` points to, if it is there; without the ".." on the way."""
    place = Path(start).resolve() / location  # the hint was made from resolved paths
    return place.resolve() if location and place.is_dir() else None


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: str | Path) -> Any:
    """A JSON file; InputError where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); it is damaged") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON with a final newline, whole or not at all."""
    file = Path(path)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def environment() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    found: dict[str, str] = {}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
