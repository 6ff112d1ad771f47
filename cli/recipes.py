"""From a command line to a stage's options: flag > `--set` > recipe > default; and the command `loram recipes`."""

from __future__ import annotations

import dataclasses
from typing import Any

from loram.errors import OptionError, RecipeError
from loram.options import StageOptions, WritingOptions, from_mapping
from loram.recipe import Recipe, load_recipe, packaged_recipes, recipe_text, said_outright

from .options import Invocation

WHOLE_RECIPE = ("run", "demo")


def build_options(call: Invocation) -> StageOptions:
    """The options of the stage, complete and checked; no stage code is imported for it."""
    values = recipe_values(call) | call.given
    inputs = [item.name for item in dataclasses.fields(call.kind) if item.metadata.get("argument")]
    missing = [name.upper() for name in inputs if name not in values]
    if missing:
        raise OptionError(f"loram {call.stage} needs {' and '.join(missing)}; see `loram {call.stage} --help`")
    options = from_mapping(call.kind, values, f"loram {call.stage}")
    if isinstance(options, WritingOptions) and not options.out:
        raise OptionError(f"loram {call.stage} got no output; add -o OUT")
    return options


def recipe_values(call: Invocation) -> dict[str, Any]:
    """What the recipe and `--set` say about this stage."""
    if call.stage in WHOLE_RECIPE:
        return whole_recipe_values(call)
    recipe = load_recipe(call.recipe) if call.recipe else Recipe("--set", {})
    if call.recipe and call.stage not in recipe.sections:
        raise RecipeError(f"the recipe {call.recipe} has no section {call.stage}; it has {', '.join(recipe.sections)}")
    return recipe.override(call.assignments, call.stage).section(call.stage)


def whole_recipe_values(call: Invocation) -> dict[str, Any]:
    """`run` and `demo` read all sections themselves; here they are only checked, before anything heavy happens."""
    assignments = (*call.assignments, *said_outright(call.kind, call.given))
    values: dict[str, Any] = {"overrides": assignments} if assignments else {}
    named = call.given.get("recipe")
    if call.recipe and call.stage == "demo":
        raise OptionError("loram demo runs the recipe quickstart; for another one use `loram run RECIPE -o RUN`")
    if call.recipe and named:
        raise OptionError(f"two recipes were given, {named} and {call.recipe}; give one")
    recipe = "quickstart" if call.stage == "demo" else named or call.recipe
    if recipe is None:
        return values
    load_recipe(recipe).override(assignments)
    return values if call.stage == "demo" else values | {"recipe": recipe}


def descriptions() -> dict[str, str]:
    """Name → first comment line of every packaged recipe."""
    found = {}
    for name in packaged_recipes():
        first = recipe_text(name).lstrip().partition("\n")[0]
        found[name] = first.lstrip("# ").strip() if first.startswith("#") else ""
    return found
