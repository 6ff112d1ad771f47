"""A driver for tests: prune in forked processes that kill themselves at the n-th file operation beside OUT.

    python killing.py FOLDER '{"name": {"model": …, …}, …}' POINTS

The same call again must then end as one that nobody killed, to the byte. POINTS is how many moments are tried, 0 for
all; they are spread evenly, and the last few operations (OUT is put in place, the steps go) are always among them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
LAST = 4


def watch(beside: str, fatal: int | None) -> list[int]:
    """Count the file operations on paths that begin with `beside`; kill this process before the fatal one."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WATCHED or not str(arguments[0]).startswith(beside):
            return
        if count[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    sys.addaudithook(hook)
    return count


def prune_once(options: dict[str, Any], out: Path, fatal: int | None = None) -> int:
    """One call in a process of its own; the number of its file operations, or -1 where it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        from loram.options import PruneOptions
        from loram.stages.prune import prune

        logging.basicConfig(stream=(out.parent / "said.txt").open("a"), level=logging.INFO, force=True)
        count = watch(f"{out}", fatal)
        prune(PruneOptions(**options, out=str(out)))
        os.write(writing, str(count[0]).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        said = stream.read()
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    assert os.waitstatus_to_exitcode(status) == 0
    return int(said)


def contents(out: Path) -> dict[str, str]:
    """Digests of all files but the log; of the manifest without where OUT is."""
    found = {}
    for file in sorted(out.rglob("*")):
        if file.is_file() and file.name != "loram.log":
            found[str(file.relative_to(out))] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest = json.loads((out / "loram.json").read_text())
    manifest["options"].pop("out")
    return found | {"loram.json": json.dumps(manifest)}


def disturb(place: Path, options: dict[str, Any], points: int) -> dict[str, int]:
    """Kill and go on at many moments; how many there were, and how often saved work was found."""
    (place / "whole").mkdir(parents=True)
    total = prune_once(options, place / "whole" / "out")
    expected = contents(place / "whole" / "out")
    step = max(total // points, 1) if points else 1
    moments = sorted({*range(step // 2, total, step), *range(total - LAST, total)})
    went_on = 0
    for moment in moments:
        out = place / f"{moment}" / "out"
        out.parent.mkdir()
        assert prune_once(options, out, moment) == -1, f"operation {moment} of {total} was not reached"
        assert not out.exists() or contents(out) == expected, f"half an artifact after a kill at operation {moment}"
        prune_once(options, out)
        assert contents(out) == expected, f"killed at operation {moment} of {total}, it is not the same"
        left = [path.name for path in out.parent.iterdir() if path.name not in ("out", "said.txt")]
        assert not left, f"killed at operation {moment}, it leaves {left}"
        went_on += "going on behind" in (out.parent / "said.txt").read_text()
    return {"operations": total, "moments": len(moments), "went_on": went_on}


def main(folder: str, options: str, points: str) -> None:
    import loram.stages.prune  # noqa: F401, before the forks, which then need not
    from loram.blockwise import resuming

    resuming.SHARE = 1  # the blocks of a tiny model are too quick for saving to be worth it
    found = {name: disturb(Path(folder) / name, chosen, int(points)) for name, chosen in json.loads(options).items()}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
