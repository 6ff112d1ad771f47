"""`train --adapter`: training that begins with an adapter's A and B, such as a few steps on the large model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from loram.adapter import Adapter, check_finite, check_init, check_modules, load_adapter, target_names
from loram.artifact import Manifest
from loram.errors import OptionError
from loram.evaluation.subjects import module_shape
from loram.hub.download import resolve_artifact
from loram.modeling import empty_model
from loram.option_fields import flag
from loram.options import TrainOptions
from loram.stages.masking import is_masked
from loram.stages.pairing import check_pair
from loram.training.checkpoints import shown


def begun_with(options: TrainOptions, folder: Path, small: Manifest | None) -> TrainOptions:
    """The options with what `--adapter` says of itself filled in; as they are where there is none.

    KindError or MismatchError where it is not an adapter of the model in `folder`, OptionError where an option was
    typed that says otherwise.
    """
    if options.adapter is None:
        return options
    place = resolve_artifact(options.adapter)
    check_pair(folder, place)
    adapter = load_adapter(place)
    check_init(adapter, place)
    check_finite(adapter, place)
    check_modules(adapter, partial(module_shape, empty_model(folder), place), set(), place)
    refuse_other_masking(adapter, options, small)
    said = as_options(adapter)
    defaults = {item.name: item.default for item in fields(options)}
    for name, own in said.items():
        if getattr(options, name) not in (defaults[name], own):
            raise OptionError(
                f"--{flag(name)} is {shown(getattr(options, name))}, and {options.adapter} goes on with its own "
                f"({shown(own)}); leave it out"
            )
    return replace(options, adapter=str(place), **said)


def refuse_other_masking(adapter: Adapter, options: TrainOptions, small: Manifest | None) -> None:
    """OptionError where the update was masked and would not be any more, or the other way round."""
    masked = is_masked(options, small)
    if adapter.masked != masked:
        was, change = ("masked", "leave out") if adapter.masked else ("not masked", "add")
        raise OptionError(f"the update of {options.adapter} was {was} in training; {change} --unmasked-update")


def as_options(adapter: Adapter) -> dict[str, Any]:
    """An adapter's own configuration in the words of `train`; other ranks and alphas by the modules' full names."""
    config: Mapping[str, Any] = adapter.config
    rank, alpha, rslora = int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora"))
    alphas = {module: pair.scale * (pair.rank**0.5 if rslora else pair.rank) for module, pair in adapter.pairs.items()}
    chosen = config.get("layers_to_transform")
    layers = () if chosen is None else (chosen,) if isinstance(chosen, int) else tuple(chosen)
    return {
        "rank": rank,
        "alpha": alpha,
        "init": "default",
        "rslora": rslora,
        "targets": tuple(
            sorted(adapter.pairs) if config.get("exclude_modules") else target_names(adapter.pairs, config)
        ),
        "layers": tuple(str(layer) for layer in layers),
        "rank_pattern": tuple(f"{m}={pair.rank}" for m, pair in sorted(adapter.pairs.items()) if pair.rank != rank),
        "alpha_pattern": tuple(
            f"{m}={value:g}" for m, value in sorted(alphas.items()) if abs(value / alpha - 1) > 1e-6
        ),
    }
