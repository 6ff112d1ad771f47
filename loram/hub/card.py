"""The model card: what a reader of the Hub page needs, and nothing that is not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import yaml

from loram.artifact import Base, Manifest
from loram.hub.contents import data_name
from loram.hub.upload import License
from loram.version import __version__

TEMPLATE = "card.md.jinja"
WAYS = {
    "axes": "attention heads and MLP channels were cut out of it",
    "mask": "single weights were set to zero",
    "depth": "whole layers were left out",
    "refit": "the layers that read cut features were refitted in closed form",
    "bias": "biases stand in for the means of what was cut",
    "aligned": "it was trained to behave like the large model again",
    "nf4": "its weights were stored in 4 bit (NF4)",
    "int8": "its weights were stored in 8 bit",
}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All that the card says."""

    repo: str
    kind: str
    base: Base
    license: License | None = None
    datasets: tuple[str, ...] = ()
    lineage: tuple[Manifest, ...] = ()
    adapter: dict[str, Any] = field(default_factory=dict)
    steps: tuple[int | None, ...] = ()
    """Of every training among the lineage, in its order."""
    checks: tuple[str, ...] = ()
    vllm_rank: int | None = None
    vllm_note: str = ""
    ladder: tuple[dict[str, Any], ...] = ()
    verdict: str = ""

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.rpartition("/")[2]

    def stage(self, name: str) -> dict[str, Any]:
        """The options of the stage of that name among the ancestors; empty where they are not known."""
        return next((made.options for made in self.lineage if made.stage == name), {})

    @property
    def trainings(self) -> list[tuple[Manifest, int | None]]:
        """Every training with its steps, the first one first."""
        made = [manifest for manifest in self.lineage if manifest.stage == "train"]
        return list(zip(made, self.steps or [None] * len(made), strict=True))[::-1]

    @property
    def compression(self) -> tuple[str, ...]:
        """What was done to the large weights, in sentences' halves."""
        done = next((made.compression for made in self.lineage if made.compression), ())
        return tuple(WAYS.get(step, step) for step in done)


def render(facts: CardFacts) -> str:
    """The card: YAML header and body."""
    environment = jinja2.Environment(
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    text = resources.files("loram.hub").joinpath(TEMPLATE).read_text(encoding="utf-8")
    prune = facts.stage("prune")
    read = [source for made, _ in facts.trainings for source in made.options.get("data", ())]
    body = environment.from_string(text).render(
        facts=facts,
        prune=prune,
        data=names_of(read),
        calibration=names_of(prune.get("calibration", ())),
        scales=next((made.calibration["scales"] for made in facts.lineage if made.calibration), {}),
        version=__version__,
        scored=any(row.get("accuracy") is not None for row in facts.ladder),
    )
    head = yaml.safe_dump(header(facts), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n{body}"


def header(facts: CardFacts) -> dict[str, Any]:
    """The metadata that the Hub reads."""
    merged = facts.kind == "merged-model"
    relation = "finetune" if merged else "adapter"
    values: dict[str, Any] = {
        "base_model": facts.base.id,
        "base_model_relation": relation,
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
    }
    if facts.license is not None:
        known = {"license": facts.license.id, "license_name": facts.license.name, "license_link": facts.license.link}
        values |= {key: value for key, value in known.items() if value}
    if facts.datasets:
        values["datasets"] = list(facts.datasets)
    kinds = ["loram"] if merged else ["lora", "loram", "peft"]
    return values | {"tags": [*kinds, "transformers", f"base_model:{relation}:{facts.base.id}"]}


def names_of(data: Sequence[str]) -> list[str]:
    """Data as it is called in public."""
    return list(dict.fromkeys(name for name in (data_name(item) for item in data) if name))
