"""Artifacts: whole or absent at every moment, also when killed; digests that say what, not where or when."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_models import write_adapter
from stock_models import build

from loram.artifact import (
    Base,
    Manifest,
    Parent,
    check_output,
    drafting,
    find_location,
    read_manifest,
    relative_location,
    require_kind,
    sha256_file,
)
from loram.errors import InputError, Interrupted, KindError, OptionError, OutputError, ResourceError

MANIFEST = Manifest(kind="run", stage="run")


def write(out: Path, text: str = "new", **how: Any) -> None:
    with drafting(out, **how) as draft:
        (draft.path / "file.txt").write_text(text)
        draft.manifest = MANIFEST


def break_off(out: Path, error: Any, **how: Any) -> None:
    with drafting(out, **how) as draft:
        (draft.path / "file.txt").write_text("half")
        raise error


def test_a_draft_becomes_the_folder_with_its_digests(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "out")
    manifest = read_manifest(tmp_path / "deep" / "out")
    assert manifest is not None
    assert manifest.files == {"file.txt": sha256_file(tmp_path / "deep" / "out" / "file.txt")}
    assert set(manifest.environment) == {"torch", "transformers", "peft"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_existing_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="exists and is not empty; choose another with -o or add --force"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "file.txt").read_text() == "old"
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "file.txt").read_text() == "new"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


@pytest.mark.parametrize("error", [ValueError, InputError, OSError(errno.ENOSPC, "full"), KeyError])
def test_after_an_error_nothing_is_left_and_the_old_folder_stays(error: Any, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    expected = ResourceError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        break_off(tmp_path / "out", error, force=True)
    assert (tmp_path / "out" / "file.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("prune was stopped", "loram prune"), SystemExit()])
def test_after_an_interruption_the_partial_folder_stays(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        break_off(tmp_path / "out", error)
    assert not (tmp_path / "out").exists()
    with drafting(tmp_path / "out", keep_partial=True) as draft:
        assert (draft.path / "file.txt").read_text() == "half"
        draft.manifest = MANIFEST
    assert (tmp_path / "out" / "file.txt").read_text() == "half"
    assert not (tmp_path / "out.partial").exists()


def test_outputs_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out in ("in", "in/../in", "link", "."):
        with pytest.raises(OutputError, match="is the input"):
            check_output(tmp_path / out, [tmp_path / "in"], force=True)
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(OptionError, match="add -o OUT"):
        check_output("")
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / "file" / "out")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_is_said(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "out.partial"))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=rf"cannot write .*out: {os.strerror(number)}; choose another"):
        write(tmp_path / "out")


def test_the_digest_says_what_not_where_or_when() -> None:
    base = Base("org/x", "../x", None, "c", "w")
    manifest = Manifest(kind="adapter", stage="recover", base=base, parents=(Parent("small-adapter", "d", "../y"),))
    same = [
        replace(manifest, base=replace(base, location="/elsewhere")),
        replace(manifest, parents=(Parent("small-adapter", "d", "/there"),)),
        replace(manifest, environment={"torch": "9"}, loram="9.9"),
        replace(manifest, options={"out": "x", "force": True, "dry_run": False}),
    ]
    other = [
        replace(manifest, base=replace(base, weights_fingerprint="v")),
        replace(manifest, parents=(Parent("small-adapter", "e", "../y"),)),
        replace(manifest, files={"a": "b"}),
        replace(manifest, options={"seed": 1}),
        replace(manifest, compression=("axes",)),
    ]
    assert {found.digest() for found in same} == {manifest.digest()}
    assert len({found.digest() for found in [manifest, *other]}) == 1 + len(other)


def test_manifests_survive_the_disk_and_damage_is_said(tmp_path: Path) -> None:
    base = Base("org/x", "../x", None, "c", "w")
    manifest = Manifest(kind="adapter", stage="s", base=base, parents=(Parent("k", "d", "l"),), compression=("axes",))
    (tmp_path / "loram.json").write_text(json.dumps(manifest.to_json()))
    assert read_manifest(tmp_path) == manifest
    assert list(manifest.to_json())[:4] == ["schema", "kind", "stage", "loram"]
    for text, message in [
        (json.dumps(manifest.to_json() | {"schema": 2}), "has schema 2, this loram reads up to 1; upgrade"),
        (json.dumps({"kind": "x"}), "has no schema number"),
        (json.dumps({"schema": 1}), "is damaged"),
        (json.dumps(manifest.to_json() | {"base": {"id": "x"}}), "is damaged"),
        (json.dumps(manifest.to_json() | {"parents": 3}), "is damaged"),
        ("[]", "has no schema number"),
        ("{", "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
    ]:
        (tmp_path / "loram.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match=message):
            read_manifest(tmp_path)


def test_the_wrong_kind_says_which_stage_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(KindError, match="is a run; `loram x` works on a small-model: run `loram prune"):
        require_kind(tmp_path / "out", ("small-model",), "x")
    with pytest.raises(KindError, match=r"is not a folder that loram wrote.*run `loram train"):
        require_kind(tmp_path, ("small-adapter",), "x")
    with pytest.raises(InputError, match="does not exist"):
        require_kind(tmp_path / "gone", ("run",), "x")


def test_location_hints_move_along(tmp_path: Path) -> None:
    for name in ("a/large", "a/small", "b"):
        (tmp_path / name).mkdir(parents=True)
    hint = relative_location(tmp_path / "a" / "large", tmp_path / "a" / "small")
    assert hint == "../large"
    (tmp_path / "a").rename(tmp_path / "c")
    found = find_location(hint, tmp_path / "c" / "small")
    assert found == tmp_path / "c" / "large"
    assert ".." not in str(found)  # it is shown to people
    assert find_location("../gone", tmp_path / "b") is None
    assert find_location("", tmp_path / "b") is None
    (tmp_path / "link").symlink_to(tmp_path / "c" / "small")
    assert find_location(hint, tmp_path / "link") == tmp_path / "c" / "large"


# ---- killed at any moment ----

KILLED = """
import json, os, random, shutil, signal, sys
import torch
from pathlib import Path
from loram.artifact import read_manifest, sha256_file
from loram.options import MergeOptions, PruneOptions
from loram.stages.merge import merge
from loram.stages.prune import prune
torch.set_num_threads(1)
large, adapter, folder, verb, forced = sys.argv[1:]
out = Path(folder) / "out"
def work(force=False):
    if verb == "prune":
        prune(PruneOptions(model=large, out=str(out), method="random", keep_first=1, keep_last=0, force=force, seed=1))
    else:
        merge(MergeOptions(adapter=adapter, base=large, out=str(out), force=force))
def state():
    if not out.exists():
        return "absent"
    manifest = read_manifest(out)
    assert manifest is not None, "there, but without a manifest"
    here = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()} - {"loram.json", "loram.log"}
    assert here == set(manifest.files), here ^ set(manifest.files)
    assert all(sha256_file(out / n) == d for n, d in manifest.files.items()), "there, but torn"
    return "complete"
def run(kill_at):
    # A child that dies at its kill_at-th touch of OUT's folder; None: lives. Gives the number of touches.
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        seen = [0]
        def hook(event, arguments):
            touched = any(folder in str(argument) for argument in arguments[:2])
            seen[0] += touched
            if touched and seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            work(force=forced == "forced")
            os.write(write, str(seen[0]).encode())
        finally:
            os._exit(0)
    os.close(write)
    status = os.waitpid(child, 0)[1]
    said = os.read(read, 100).decode()
    os.close(read)
    return status, said
old = forced == "forced"
if old:
    work()
status, touches = run(None)
assert status == 0
draw = random.Random(0)
total = int(touches)
found = []
for kill_at in sorted({1, total - 2, total - 1, total, *(draw.randint(2, total) for _ in range(7))}):
    for name in os.listdir(folder):
        shutil.rmtree(Path(folder) / name)
    if old:
        work()
    status, _ = run(kill_at)
    assert os.WIFSIGNALED(status), (status, kill_at, total)
    found.append(state())
    work(force=True)
    assert state() == "complete"
    assert sorted(os.listdir(folder)) == ["out"], os.listdir(folder)
print(json.dumps(found))
"""


@pytest.mark.parametrize("forced", ["fresh", "forced"])
@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_killed_at_any_moment_the_folder_is_absent_or_complete(
    verb: str, forced: str, stock: Callable[[str], Path], tmp_path: Path
) -> None:
    large = build("llama-gqa", tmp_path / "large", max_shard_size="30KB")
    adapter = write_adapter(large, tmp_path / "adapter", ["q_proj"], 1)
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", KILLED, str(large), str(adapter), str(tmp_path / "work"), verb, forced]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) >= 8
    assert ("absent" if forced == "fresh" else "complete") in found
