"""What is packaged is what is in the tree, and an installed wheel works on its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from loram.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
RENAMED = {"cli": "loram_cli", "recipes": "loram_recipes"}


def folders_with_code() -> set[str]:
    """Import names of all folders that hold Python files."""
    found = set()
    for top in ("loram", "cli", "recipes"):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.parent.relative_to(ROOT).parts
            found.add(".".join((RENAMED.get(parts[0], parts[0]), *parts[1:])))
    return found


def test_packages_are_the_folders() -> None:
    assert set(SETUPTOOLS["packages"]) == folders_with_code()
    assert SETUPTOOLS["package-dir"] == {new: old for old, new in RENAMED.items()}


def test_every_package_has_an_init() -> None:
    places = {new: old for old, new in RENAMED.items()}
    for name in SETUPTOOLS["packages"]:
        first, *rest = name.split(".")
        assert (ROOT.joinpath(places.get(first, first), *rest) / "__init__.py").is_file(), name


def test_data_files_are_packaged() -> None:
    assert SETUPTOOLS["package-data"]["loram_recipes"] == ["*.yaml", "data/*"]
    assert {file.parent for file in (ROOT / "recipes").rglob("*.yaml")} == {ROOT / "recipes"}
    for package in ("loram", "cli"):
        assert (ROOT / package / "py.typed").is_file()
    assert (ROOT / "loram" / "data" / "builtin.txt").is_file()


def test_constraints_pin_every_requirement_inside_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert all(re.fullmatch(r"[0-9][0-9a-z.!]*", version) for version in pins.values())
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(item for extra in extras.values() for item in extra)]
    for requirement in map(Requirement, wanted):
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} is pinned to {pinned}"


def test_the_ranges_that_flower_allows() -> None:
    ranges = {item.name: item.specifier for item in map(Requirement, PROJECT["project"]["dependencies"])}
    assert not ranges["typer"].contains("0.21.0")
    assert not ranges["rich"].contains("15.0")
    assert not ranges["packaging"].contains("26.0")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "__pycache__", ".*_cache", "fixtures")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = wheels.glob(f"loram-{__version__}-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, cwd=tmp_path)
    shutil.rmtree(source)

    def loram(*arguments: str) -> str:
        code = (
            f"import sys; sys.path.insert(0, {str(target)!r})\n"
            "import loram, loram_cli.app as app\n"
            f"assert loram.__file__.startswith({str(target)!r}) and app.__file__.startswith({str(target)!r})\n"
            "raise SystemExit(app.main(sys.argv[1:]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert loram("recipes", "quickstart") == (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    assert loram("--version").strip() == f"loram {__version__}"
    for name in ("loram/py.typed", "loram_cli/py.typed", "loram/data/builtin.txt"):
        assert (target / name).is_file()
