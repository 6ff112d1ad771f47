"""The documentation is true: commands parse, flags, links and error texts exist, figures are rendered."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import loram.stages
from loram.families import FAMILIES
from loram.options import SECTIONS, StageOptions, flag
from loram.progress import Progress
from loram.results import StageResult

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGE_PAGES = (
    *("plan", "prune", "align", "quantize", "train", "recover", "verify", "eval"),
    *("merge", "project", "run", "data", "files"),
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
OTHER_FLAGS = {"--help", "--json", "--recipe", "--set"}
BENCHMARK_FLAGS = {"--size", "--only", "--rounds", "--fresh", "--scratch", "--output", "--place", "--llmcompressor"}
PLACEHOLDER = "\0"


def blocks(page: Path, *kinds: str) -> Iterator[str]:
    """The code blocks of these languages."""
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind in kinds:
            yield text


def shell_lines(page: Path, *kinds: str) -> Iterator[list[str]]:
    """Commands as words; continued lines joined, prompts and comments left out."""
    for text in blocks(page, *kinds):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield words


def loram_commands() -> list[tuple[str, list[str]]]:
    """(page, words after `loram`) of every command in the documentation."""
    return [
        (page.name, words[1:]) for page in PAGES for words in shell_lines(page, "sh", "console") if words[0] == "loram"
    ]


def main(arguments: list[str]) -> int:
    (script,) = entry_points(group="console_scripts", name="loram")
    code: int = script.load()(arguments)
    return code


def load_script(name: str) -> Any:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def workplace(folder: Path) -> None:
    """What the examples expect around them: the checkout's tests and docs, and a recipe of one's own."""
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / "docs").symlink_to(ROOT / "docs")
    shutil.copyfile(ROOT / "docs" / "examples" / "recipe.yaml", folder / "recipe.yaml")


def test_there_are_commands_on_every_stage_page() -> None:
    found = {page for page, _ in loram_commands()}
    assert {"README.md", *(f"{name}.md" for name in STAGE_PAGES if name != "files")} <= found


@pytest.mark.parametrize(("page", "words"), loram_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_parses(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reached: list[StageOptions] = []

    def fake(stage: str) -> Any:
        def function(options: StageOptions, progress: Progress) -> StageResult:
            reached.append(options)
            return StageResult()

        return function

    workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loram.stages, "stage_function", fake)
    assert main(words) == 0, capsys.readouterr().err
    assert len(reached) == (words[0] in SECTIONS)


def known_flags() -> set[str]:
    """Every flag of every stage, with its aliases and --no- twins."""
    known = OTHER_FLAGS | BENCHMARK_FLAGS
    for kind in SECTIONS.values():
        for item in kind.__dataclass_fields__.values():
            known |= {f"--{flag(item.name)}", f"--no-{flag(item.name)}"}
            known |= {alias.replace("_", "-") for alias in item.metadata.get("flags", ())}
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_in_the_prose_exists(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    mentioned = {
        word.replace("_", "-") for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"--[a-z_-]+", code)
    }
    assert mentioned <= known_flags()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_index_names_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES[1:]} - {"index.md"} <= set(re.findall(r"\]\(([a-z]+\.md)\)", text))


def test_families_and_stages_are_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "families.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(["model_type", *FAMILIES])
    commands = {words[0] for _, words in loram_commands()}
    text = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    commands |= set(re.findall(r"`loram (\w+)", text))
    assert set(SECTIONS) <= commands


def source_strings() -> str:
    """Every string of loram and cli as its reader sees it, placeholders replaced."""
    found = []
    for file in [*(ROOT / "loram").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)
                found.append("".join(parts))
    return "\n".join(found)


def test_every_error_in_troubleshooting_can_be_raised() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(headings) > 15
    said = source_strings()
    for heading in headings:
        pattern = "[^\n]*".join(re.escape(part.strip()) for part in heading.split("…") if part.strip())
        assert re.search(pattern, said), heading


def test_figures_are_rendered(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_script("render_docs").main("--check") == 0, capsys.readouterr().out


def test_the_ladder_page_lists_what_was_recorded() -> None:
    script = load_script("render_docs")
    ladder = {
        "title": "A title",
        "model": "org/model",
        "task": "a task",
        "settings": {"ratio": "0.5"},
        "rows": [
            {"name": "base", "loss": 2.0, "stderr": 0.1, "accuracy": 0.25},
            {"name": "large + recovered", "loss": 1.5, "stderr": 0.1, "accuracy": None},
        ],
        "verdict": "it helps",
        "stages": [{"name": "prune", "seconds": 61.4, "peak_bytes": 2**31}],
        "commands": ["loram run x -o RUN"],
        "date": "2026-01-01",
        "commit": "abc",
        "machine": "a machine",
    }
    text = script.ladder_section(ladder)
    assert "| base | 2.0000 | 0.1000 | 25.0% |" in text
    assert "| large + recovered | 1.5000 | 0.1000 |  |" in text
    assert "It helps." in text
    assert "prune 61 s; at most 2.0 GiB" in text
    assert "$ loram run x -o RUN" in text


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "accelerate").glob("*.yaml")), ids=lambda file: file.name)
def test_accelerate_reads_its_configurations(file: Path) -> None:
    """None has been run; that accelerate knows every key can be said without a GPU."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == 2
    assert "Not run by us" in file.read_text(encoding="utf-8").splitlines()[0]


def test_the_picture_is_well_formed() -> None:
    picture = ElementTree.parse(ROOT / "docs" / "pipeline.svg").getroot()
    words = " ".join(text.strip() for text in picture.itertext())
    for verb in ("prune", "train", "recover", "project", "verify", "eval", "merge", "pruning map"):
        assert verb in words
    assert "prefers-color-scheme: dark" in words


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_examples_run(tmp_path: Path) -> None:
    """Every `sh` and `python` block of the stage pages, in their order, in one folder."""
    workplace(tmp_path)
    script = Path(sys.executable).with_name("loram")
    for name in (*STAGE_PAGES, "python"):
        page = ROOT / "docs" / f"{name}.md"
        for words in shell_lines(page, "sh"):
            assert words[0] == "loram"
            run_example([str(script), *words[1:]], tmp_path)
        for text in blocks(page, "python"):
            run_example([sys.executable, "-c", text], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_runs(tmp_path: Path) -> None:
    workplace(tmp_path)
    for words in shell_lines(ROOT / "README.md", "sh"):
        run_example([str(Path(sys.executable).with_name("loram")), *words[1:]], tmp_path)


def run_example(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
