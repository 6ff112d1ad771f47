"""What is left to a process: its own limits and its control group are believed where they leave least."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loram.device import native_bf16
from loram.errors import OptionError
from loram.memory import (
    KERNEL_CACHES,
    KERNELS,
    _group_leaves,
    available_bytes,
    bound_kernel_caches,
    format_bytes,
    give_back,
    parse_bytes,
    peak_bytes,
    resident_bytes,
)

GIB = 2**30
UNBOUND = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_a_process_holds_something_and_may_take_more() -> None:
    assert 0 < resident_bytes() <= peak_bytes()
    assert available_bytes() > 0


@linux
@pytest.mark.parametrize("limit", [resource.RLIMIT_DATA, resource.RLIMIT_AS], ids=["data", "address space"])
def test_its_own_limits_count(limit: int) -> None:
    script = (
        "import resource; from loram.memory import available_bytes\n"
        f"resource.setrlimit({limit}, ({GIB}, {GIB})); print(available_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < GIB


@pytest.mark.parametrize(
    ("folder", "names", "cache"),
    [
        (".", ("memory.max", "memory.current"), "inactive_file"),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_its_control_group_counts(folder: str, names: tuple[str, str], cache: str, tmp_path: Path) -> None:
    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    for name, text in zip((*names, "memory.stat"), ("1000\n", "700\n", f"anon 5\n{cache} 200\n"), strict=True):
        (place / name).write_text(text)
    assert _group_leaves(tmp_path) == 500  # cache that can be dropped is free
    (place / names[0]).write_text("max\n")
    assert _group_leaves(tmp_path) == _group_leaves(tmp_path / "gone") > 2**50


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("24", 24 * GIB), ("1.5g", 15 * 10**8)]
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "12 apples", "1e3GiB", "24b"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match="expected a size such as 24GiB"):
        parse_bytes(text)


def test_sizes_as_they_are_said() -> None:
    assert (format_bytes(1), format_bytes(3 * GIB // 2)) == ("1 B", "1.5 GiB")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's heap that is told")
def test_large_blocks_do_not_stay_in_the_heap() -> None:
    script = """
import re, torch
from pathlib import Path
from loram.memory import return_large_blocks

def heap():
    found = re.search(r"^([0-9a-f]+)-([0-9a-f]+) .*\\[heap\\]$", Path("/proc/self/maps").read_text(), re.M)
    return int(found[2], 16) - int(found[1], 16)

return_large_blocks()
torch.empty(30 * 2**20, dtype=torch.uint8)  # freed, it would raise the bound to its own size
before = heap()
blocks = [torch.empty(12 * 2**20, dtype=torch.uint8) for _ in range(10)]
print(heap() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12 * 2**20


@linux
def test_holes_in_the_heap_are_given_back() -> None:
    blocks = [bytearray(b"x" * 100_000) for _ in range(2000)]
    last = blocks[-1]  # what stands at the end keeps the C library from giving back what lies before it
    full = resident_bytes()
    del blocks
    give_back()
    assert resident_bytes() < full - 100_000_000
    assert len(last) == 100_000


KERNELS_MADE = """
import torch
from loram.memory import bound_kernel_caches
if BOUND: bound_kernel_caches()
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in [*range(64, 384), 64]:
    torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
"""


@pytest.mark.skipif(not native_bf16() or torch.cuda.is_available(), reason="oneDNN computes bf16 in hardware")
@pytest.mark.parametrize(("bound", "given", "made"), [(False, {}, 320), (True, {}, 321), (True, {UNBOUND: "999"}, 320)])
def test_kernels_of_shapes_that_are_long_past_are_dropped(bound: bool, given: dict[str, str], made: int) -> None:
    """320 shapes, and the first of them again: oneDNN itself says how many kernels it has made."""
    environment = {key: value for key, value in os.environ.items() if key not in sum(KERNEL_CACHES, ())}
    done = subprocess.run(
        [sys.executable, "-c", KERNELS_MADE.replace("BOUND", str(bound))],
        env=environment | given | {"ONEDNN_VERBOSE": "all"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("create:cache_miss,cpu,matmul") == made


def test_a_bound_that_is_set_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in sum(KERNEL_CACHES, ()):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "7")
    bound_kernel_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == str(KERNELS)
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ
