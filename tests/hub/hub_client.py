"""Command lines in another process, with the real Hub client: HF_ENDPOINT has to be set before it is imported.

One process answers many command lines, since importing torch takes longer than any of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_hub import TOKEN

SERVE = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import entry_points

(script,) = entry_points(group="console_scripts", name="loram")
main = script.load()
for line in sys.stdin:
    request = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(request["arguments"])
    sys.__stdout__.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\\n")
    sys.__stdout__.flush()
"""


@dataclass
class Answer:
    """What a command line left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    """Variables of a process that takes `url` for the Hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return kept | ours | {"HF_HUB_DISABLE_TELEMETRY": "1"} | more


class Client:
    """A process that runs loram's command lines against one Hub."""

    def __init__(self, url: str, home: Path, **more: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(url, home, **more),
        )

    def __call__(self, *arguments: str | Path, token: str | None = TOKEN, folder: Path | None = None) -> Answer:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {
            "arguments": [str(word) for word in arguments],
            "environment": {} if token is None else {"HF_TOKEN": token},
            "folder": str(folder or Path.cwd()),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = Answer(**json.loads(self.process.stdout.readline()))
        assert TOKEN not in answer.out + answer.err, "the token was shown"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()
