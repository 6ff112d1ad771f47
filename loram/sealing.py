"""Work that can be stopped at any moment and gone on with: folders in OUT.partial/checkpoints, whole or not there.

A step's folder is written beside its place, sealed (`checksums.json`, written last, says what every file must be), and
renamed into it. `run.json` says whose steps they are. What belongs to other work, or does not match its checksums, is
never gone on with. While OUT is put in place the steps wait beside it, so that no kill costs them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loram.artifact import SEAL, read_json, sha256_file, write_json
from loram.errors import InputError

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
IDENTITY = "run.json"
NOTHING = "nothing"


class Steps:
    """The finished steps of one piece of work, each a sealed folder in `place`, by name.

    `identity` is a JSON object of everything that the outcome depends on: steps left by work of another identity are
    deleted. `interruption` gives an error to raise once somebody has asked to stop and what can be saved is saved.
    """

    def __init__(
        self, place: Path, identity: Mapping[str, Any], interruption: Callable[[], Exception | None] = lambda: None
    ) -> None:
        self.place, self._interruption = place, interruption
        self._whole: dict[str, bool] = {}
        before = whose(place)
        if before is not None and before != json.loads(json.dumps(identity)):
            logger.info("%s is of a call with other options or inputs; starting anew", place)
            before = None
        if before is None:
            shutil.rmtree(place, ignore_errors=True)
        write_identity(place, identity)
        for leftover in place.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    @property
    def urgent(self) -> bool:
        """Whether somebody has asked to stop: what can be saved should be saved now."""
        return self._interruption() is not None

    def stop_here(self) -> None:
        """Raise the interruption, if one was asked for."""
        error = self._interruption()
        if error is not None:
            raise error

    def folder(self, name: str) -> Path:
        """Where a finished step is."""
        return self.place / name

    def whole(self, name: str) -> bool:
        """Whether a step was finished, and its files are what they were; looked at once."""
        if name not in self._whole:
            reason = damage(self.folder(name)) if self.folder(name).is_dir() else ""
            if reason:
                logger.warning("%s is damaged (%s); doing it again", self.folder(name), reason)
            self._whole[name] = reason is None
        return self._whole[name]

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """An empty folder that becomes the step when the block ends well."""
        partial = self.place / (name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if not any(partial.iterdir()):
            (partial / NOTHING).touch()  # a seal over no file at all would be a broken one
        seal(partial)
        self.drop(name)
        os.replace(partial, self.folder(name))
        self._whole[name] = True

    def drop(self, name: str) -> None:
        """Delete a step; the seal goes first, so that half of it is never taken for whole."""
        self._whole[name] = False
        (self.folder(name) / SEAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder(name), ignore_errors=True)


def whose(place: Path) -> Any:
    """The identity that stands beside steps; None where there is none."""
    try:
        return read_json(place / IDENTITY)
    except InputError:
        return None


def write_identity(place: Path, now: Mapping[str, Any]) -> None:
    """Note whose steps these are."""
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / IDENTITY, now)


def damage(folder: Path) -> str | None:
    """What is wrong with a step's folder; None if it is whole."""
    try:
        sums = read_json(folder / SEAL)
    except InputError:
        return "it was not written to its end"
    if not isinstance(sums, dict) or not sums:
        return f"{SEAL} is broken"
    for name, digest in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_file(folder / name) != digest:
            return f"{name} has changed"
    return None


def seal(folder: Path) -> None:
    """Say that a folder is whole, in one atomic step."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and SEAL not in file.name)
    write_json(folder / SEAL, {file.relative_to(folder).as_posix(): sha256_file(file) for file in files})


def checkpoints_of(out: Path) -> Path:
    """Where the steps of OUT are; brings back those of a call killed while OUT was being put in place."""
    partial = out.with_name(out.name + ".partial")
    aside = set_aside_folder(out)
    if aside.is_dir() and not (partial / FOLDER).exists():
        partial.mkdir(parents=True, exist_ok=True)
        os.replace(aside, partial / FOLDER)
    return partial / FOLDER


def set_aside_folder(out: Path) -> Path:
    """Where steps wait, out of the artifact's way, until OUT is in place."""
    return out.with_name(out.name + ".checkpoints")


def set_aside(partial: Path, out: Path) -> None:
    """Take the steps out of the folder that is about to become OUT."""
    shutil.rmtree(set_aside_folder(out), ignore_errors=True)
    if (partial / FOLDER).is_dir():
        os.replace(partial / FOLDER, set_aside_folder(out))


def discard(out: Path) -> None:
    """Delete all steps of OUT."""
    shutil.rmtree(set_aside_folder(out), ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".partial") / FOLDER, ignore_errors=True)


def keep_only_steps(partial: Path) -> None:
    """Empty OUT.partial of all but the steps and the log: a call that goes on writes the rest again."""
    for item in partial.iterdir():
        if item.name in (FOLDER, "loram.log"):
            continue
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
