"""Dependencies point one way, heavy libraries are imported where they may be, and sizes stay readable everywhere.

Read from the source by its syntax tree, so that lazy imports inside functions count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From what everything stands on to what stands on everything; a module may import from lower layers, and from
# others of its own layer only within its own package or where SIBLINGS names it.
LAYERS: list[set[str]] = [
    {
        "families",
        "options",
        "option_fields",
        "data_options",
        "prune_options",
        "align_options",
        "quantize_options",
        "recover_options",
        "train_options",
        "errors",
    }
    | {"progress", "results", "version", "memory", "measured", "importing"},
    {
        "pruning_map",
        "axes",
        "masks",
        "numbering",
        "checkpoint",
        "stored",
        "drawing",
        "declared",
        "shards",
        "artifact",
        "recipe",
        "sealing",
    },
    {
        "modeling",
        "quantization",
        "sizes",
        "activations",
        "memory_model",
        "calibration_memory",
        "advice",
        "adapter",
        "renumbering",
        "device",
        "hub.download",
        "hub.failures",
        "portability",
        "group_scales",
    },
    {"data", "pruning", "cutting", "gathering", "merging", "rewriting", "hidden_update"},
    {"training.cross_entropy"},
    {"blockwise"},
    {"training"},
    {"report", "hub", "evaluation", "federated", "verification"},
    {"stages"},
]
SIBLINGS = {
    "options": {
        "errors",
        "families",
        "option_fields",
        "data_options",
        "prune_options",
        "align_options",
        "quantize_options",
        "recover_options",
        "train_options",
    },
    "align_options": {"option_fields", "prune_options", "train_options"},
    "option_fields": {"errors"},
    "data_options": {"option_fields"},
    "prune_options": {"errors", "families", "memory", "option_fields"},
    "quantize_options": {"option_fields"},
    "recover_options": {"option_fields", "data_options"},
    "train_options": {"errors", "option_fields", "data_options"},
    "families": {"errors"},
    "memory": {"errors"},
    "activations": {"sizes"},
    "memory_model": {"sizes", "activations"},
    "advice": {"activations", "memory_model"},
    "calibration_memory": {"activations", "memory_model", "sizes"},
    "stored": {"artifact"},
    "checkpoint": {"stored"},
    "declared": {"stored"},
    "shards": {"stored"},
    "sealing": {"artifact"},
    "masks": {"checkpoint", "shards"},
    "pruning_map": {"axes", "checkpoint", "masks", "numbering", "shards"},
    "portability": {"adapter"},
    "renumbering": {"adapter"},
    "group_scales": {"adapter"},
    "hidden_update": {"merging"},
    "modeling": {"quantization"},
    "hub.download": {"hub.failures"},
}
NO_TORCH = {
    *(
        "errors",
        "families",
        "options",
        "option_fields",
        "data_options",
        "prune_options",
        "align_options",
        "quantize_options",
        "recover_options",
        "train_options",
        "progress",
    ),
    *("results", "version"),
    *("artifact", "recipe", "numbering", "drawing", "declared", "portability"),
    *("memory", "sizes", "activations", "memory_model", "calibration_memory", "advice"),
}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "lm_eval",
    "flwr",
    "matplotlib",
    "scipy",
}

SOURCES = sorted([*(ROOT / "loram").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])
TREE = sorted([*SOURCES, *(file for top in ("tests", "benchmarks", "scripts") for file in (ROOT / top).rglob("*.py"))])
ENTRANCES = {ROOT / "loram" / "__init__.py", ROOT / "loram" / "__main__.py"}
LORAM = [file for file in SOURCES if file.is_relative_to(ROOT / "loram") and file not in ENTRANCES]


def module_name(file: Path) -> str:
    """`pruning.wanda` for loram/pruning/wanda.py."""
    parts = file.relative_to(ROOT / "loram").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every absolute module that is imported, with the line, except for type checking only."""
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not (node.level and node.module is None), "write `from .module import name`"
            module = node.module or ""
            yield from (
                (f"{module}.{alias.name}" if module == "loram" else module, node.lineno) for alias in node.names
            )


def top_level_imports(tree: ast.Module) -> set[str]:
    """First components of what is imported when the module is."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found


def unit(name: str) -> str:
    """The entry of LAYERS that a module belongs to: `hub.download` on its own, `pruning` for `pruning.wanda`."""
    known = set().union(*LAYERS)
    return name if name in known else name.partition(".")[0]


def level(name: str) -> int:
    """The layer of a module."""
    found = [number for number, layer in enumerate(LAYERS) if unit(name) in layer]
    assert found, f"loram/{name.replace('.', '/')} is in no layer; add it to LAYERS in tests/test_imports.py"
    return found[0]


def violations(name: str, tree: ast.AST) -> list[str]:
    """Imports that point the wrong way."""
    wrong = []
    for target, line in imported(tree):
        first, _, rest = target.partition(".")
        if first == "loram_cli" or first == "cli":
            wrong.append(f"line {line}: loram imports the command line")
        if first != "loram" or not rest or unit(rest) == unit(name):
            continue
        here, there = level(name), level(rest)
        if there > here or (there == here and unit(rest) not in SIBLINGS.get(unit(name), set())):
            wrong.append(f"line {line}: {name} (layer {here}) imports {rest} (layer {there})")
    return wrong


@pytest.mark.parametrize("file", LORAM, ids=module_name)
def test_dependencies_point_one_way(file: Path) -> None:
    assert violations(module_name(file), ast.parse(file.read_text(encoding="utf-8"))) == []


def test_the_direction_test_can_fail() -> None:
    assert violations("errors", ast.parse("from loram.stages.prune import prune"))
    assert violations("pruning.wanda", ast.parse("def f():\n    import loram.training.loop"))
    assert violations("artifact", ast.parse("from loram import modeling"))
    assert not violations("stages.prune", ast.parse("from loram.errors import LoramError"))


@pytest.mark.parametrize("file", [file for file in LORAM if unit(module_name(file)) in NO_TORCH], ids=module_name)
def test_the_lowest_layer_is_light(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not {target.partition(".")[0] for target, _ in imported(tree)} & HEAVY


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_optional_libraries_and_the_command_line(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if "flower" not in file.parts:
        assert "flwr" not in {target.partition(".")[0] for target, _ in imported(tree)}
    if file.is_relative_to(ROOT / "cli"):
        assert not top_level_imports(tree) & HEAVY
        assert not {"click", "cli", "loram_cli"} & {target.partition(".")[0] for target, _ in imported(tree)}


def test_only_the_console_prints() -> None:
    for file in SOURCES:
        if file == ROOT / "cli" / "console.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{file}:{node.lineno} prints; use logging or cli/console.py"


@pytest.mark.parametrize("file", TREE, ids=lambda file: str(file.relative_to(ROOT)))
def test_sizes(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{file.relative_to(ROOT)} is longer than 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{file.relative_to(ROOT)}: {node.name}"
            assert (node.end_lineno or 0) - node.lineno < 60, f"{where} is longer than 60 lines"
            count = [item.arg for item in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len([name for name in count if name not in ("self", "cls")]) <= 6, f"{where} has too many parameters"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_house_style(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert file.stem not in ("utils", "helpers", "common", "misc")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what is notable about it"
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{file}: bare except"


def test_modules_of_the_tests_have_names_of_their_own() -> None:
    """They are imported by their names alone (`pythonpath` in pyproject.toml)."""
    names = [file.stem for file in TREE if file.is_relative_to(ROOT / "tests") and file.stem != "conftest"]
    assert [name for name in names if names.count(name) > 1] == []
