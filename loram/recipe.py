"""Recipes: YAML files with one section per stage, whose keys are that stage's options.

A recipe is checked whole when it is read, every section against the stage's own option types, so that a
misspelt key stops before anything else happens. Positional options (the model, the adapter) may be left out:
they come from the command line, or from the stage before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from loram.errors import OptionError, RecipeError
from loram.options import SECTIONS, StageOptions, did_you_mean, from_mapping

SUFFIXES = (".yaml", ".yml")
PACKAGE = "loram_recipes"


@dataclass(frozen=True)
class Recipe:
    """Sections in the order of the file, each a mapping of a stage's options; `source` is where they came from."""

    source: str
    sections: dict[str, dict[str, Any]]

    def section(self, name: str) -> dict[str, Any]:
        """The options of one stage, empty where the recipe does not speak of it."""
        return dict(self.sections.get(name, {}))

    def override(self, assignments: Iterable[str], default_section: str = "run") -> Recipe:
        """The recipe with `section.key=value` applied; a key without a section belongs to `default_section`."""
        sections = {name: dict(values) for name, values in self.sections.items()}
        for text in assignments:
            section, key, value = parse_assignment(text, default_section)
            sections.setdefault(section, {})[key] = value
            check_section(section, {key: value}, f"--set {text}")
        return Recipe(self.source, sections)


def said_outright(kind: type[StageOptions], given: Mapping[str, Any]) -> tuple[str, ...]:
    """What was given although it is the default, as assignments, for the stages that read a whole recipe.

    Without them nobody could tell it from what was not given, and the recipe's `run:` section would win.
    """
    if not any(item.metadata.get("assignments") for item in dataclasses.fields(kind)):
        return ()
    defaults = {item.name: item.default for item in dataclasses.fields(kind)}
    repeated = [name for name, value in given.items() if value == defaults.get(name, dataclasses.MISSING)]
    return tuple(f"run.{name}={json.dumps(given[name])}" for name in repeated if name != "overrides")


def packaged_recipes() -> dict[str, Traversable]:
    """Name → file of every recipe that comes with loram, sorted by name."""
    try:
        files = resources.files(PACKAGE)
    except ModuleNotFoundError:
        raise RecipeError("this installation has no recipes; install loram again") from None
    found = {file.name.rpartition(".")[0]: file for file in files.iterdir() if file.name.endswith(SUFFIXES)}
    return dict(sorted(found.items()))


def recipe_text(name_or_path: str) -> str:
    """The text of a recipe file, or of a packaged recipe by its name."""
    path = Path(name_or_path)
    looks_like_file = path.suffix in SUFFIXES or len(path.parts) > 1
    packaged = {} if looks_like_file else packaged_recipes()
    if name_or_path in packaged:
        return packaged[name_or_path].read_text(encoding="utf-8")
    if not looks_like_file and not path.is_file():
        raise RecipeError(
            f"there is no recipe {name_or_path!r}"
            + did_you_mean(name_or_path, packaged)
            + f"; packaged recipes: {', '.join(packaged)}; or give a .yaml file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe {path}: {error.strerror}; `loram recipes` lists the packaged ones"
        ) from None
    except UnicodeDecodeError:
        raise RecipeError(f"the recipe {path} is not UTF-8 text; save it as UTF-8") from None


def load_recipe(name_or_path: str) -> Recipe:
    """Read and check a recipe: a file, or the name of a packaged one."""
    return parse_recipe(recipe_text(name_or_path), str(name_or_path))


def parse_recipe(text: str, source: str) -> Recipe:
    """Check a recipe's text; RecipeError names `source`, the section and the nearest known key."""
    import yaml

    try:
        body = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(body, dict) or not body:
        raise RecipeError(f"the recipe {source} has no sections; expected some of {', '.join(SECTIONS)}")
    sections: dict[str, dict[str, Any]] = {}
    for name, values in body.items():
        if name not in SECTIONS:
            raise RecipeError(
                f"the recipe {source} has an unknown section {name!r}"
                + did_you_mean(str(name), SECTIONS)
                + f"; sections are {', '.join(SECTIONS)}"
            )
        if not isinstance(values, dict | None):
            raise RecipeError(f"section {name} of the recipe {source} is {values!r}; expected `key: value` lines")
        sections[name] = {str(key).replace("-", "_"): value for key, value in (values or {}).items()}
        check_section(name, sections[name], f"{source}: {name}")
    return Recipe(source, sections)


def check_section(name: str, values: dict[str, Any], where: str) -> None:
    """Put `values` through the stage's own options, with stand-ins for positional options that are left out."""
    kind = SECTIONS[name]
    needed = {item.name for item in dataclasses.fields(kind) if item.metadata.get("argument")}
    try:
        from_mapping(kind, dict.fromkeys(needed - set(values), "-") | values, where)
    except OptionError as error:
        message = str(error)
        raise RecipeError(message if message.startswith(where) else f"{where}: {message}") from None


def parse_assignment(text: str, default_section: str) -> tuple[str, str, Any]:
    """`section.key=value` or `key=value` as (section, key, value); the value is read as YAML."""
    import yaml

    name, equals, spelled = text.partition("=")
    if not equals or not name.strip():
        raise OptionError(f"--set {text} is no assignment; expected key=value")
    section, dot, key = name.strip().rpartition(".")
    section = section if dot else default_section
    if section not in SECTIONS:
        raise OptionError(f"--set {text}: there is no section {section!r}" + did_you_mean(section, SECTIONS))
    try:
        value = yaml.safe_load(spelled)
    except yaml.YAMLError:
        value = spelled
    return section, key.replace("-", "_"), value
