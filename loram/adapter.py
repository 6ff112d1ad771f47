"""A LoRA adapter: {module: (A, B, scale)} ↔ a PEFT folder, and the rules that make it portable.

Shapes as PEFT stores them: A (r, in), B (out, r); for an embedding A (r, vocabulary), B (hidden, r).
ΔW = scale·B·A with scale = alpha/r, or alpha/√r with rsLoRA (2312.03732). Safetensors only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loram.artifact import read_json, require_folder, write_json
from loram.checkpoint import TensorEntry, read_entry, read_header
from loram.errors import AdapterError, InputError, MismatchError
from loram.families import Family, Geometry
from loram.shards import write_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KEYS = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
    ".masked_A.weight": ("a", False),
    ".masked_B.weight": ("b", False),
}
MASKED_TYPE = "LORAM_MASKED_LORA"
"""peft_type of a small adapter whose update counts only where the small model's mask is on.

No other program knows it, nor the names of its tensors: without the mask it is another adapter, and must not load.
"""
ABSORBING_INITS = ("pissa", "loftq", "corda", "olora", "lora_ga")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one module's update and its scale."""

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Inner size r."""
        return int(self.a.shape[0])

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weight that the pair updates: (out, in), for an embedding (vocabulary, hidden)."""
        out, into = int(self.b.shape[0]), int(self.a.shape[1])
        return (into, out) if self.embedding else (out, into)


@dataclass(frozen=True)
class Adapter:
    """All pairs of an adapter and its raw adapter_config.json; `dropped` are base weights that PEFT had saved along."""

    config: dict[str, Any]
    pairs: Mapping[str, LoraPair]
    dropped: tuple[str, ...] = field(default=())

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def masked(self) -> bool:
        """Whether the update is s·(B·A) ∘ M, with the masks of the small model that it was trained on."""
        return bool(self.config.get("peft_type") == MASKED_TYPE)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(p.a.nbytes + p.b.nbytes for p in self.pairs.values())

    @property
    def uniform(self) -> bool:
        """Whether one rank and alpha/r from the config hold for every module, so that every server reads it right."""
        nominal = float(self.config["lora_alpha"]) / int(self.config["r"])
        return all(pair.rank == self.config["r"] and pair.scale == nominal for pair in self.pairs.values())

    def map_pairs(self, change: Callable[[str, LoraPair], LoraPair]) -> Adapter:
        """The same adapter with every pair replaced."""
        return replace(self, pairs={module: change(module, pair) for module, pair in self.pairs.items()})

    def portable(self) -> Adapter:
        """One rank and one alpha: rsLoRA and patterns folded into B, smaller ranks padded with zeros.

        A uniform adapter comes back with its bits unchanged.
        """
        alpha, rank = float(self.config["lora_alpha"]), self.rank
        nominal = alpha / rank

        def fold(_: str, pair: LoraPair) -> LoraPair:
            b = pair.b if pair.scale == nominal else (pair.b.float() * (pair.scale / nominal)).to(pair.b.dtype)
            missing = rank - pair.rank
            if missing:
                a = torch.cat([pair.a, pair.a.new_zeros(missing, pair.a.shape[1])])
                return replace(pair, a=a, b=torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1), scale=nominal)
            return replace(pair, b=b, scale=nominal)

        config = self.config | {
            "r": rank,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": target_names(self.pairs, self.config),
        }
        return replace(self.map_pairs(fold), config=config)

    def tensors(self) -> dict[str, Tensor]:
        """All factors by the names that PEFT knows them by."""
        found: dict[str, Tensor] = {}
        for module, pair in self.pairs.items():
            names = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
            found |= {f"{PREFIX}{module}.{name}": value for name, value in zip(names, (pair.a, pair.b), strict=True)}
        return found

    def save(self, folder: str | Path, base_id: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors: plain lora_A/lora_B keys, nothing else."""
        write_tensors(Path(folder) / WEIGHTS, {name: value.contiguous() for name, value in self.tensors().items()})
        write_json(Path(folder) / CONFIG, saved_config(self.config, base_id))


def saved_config(config: Mapping[str, Any], base_id: str) -> dict[str, Any]:
    """The keys that mean something to a reader; others at their defaults would only make old versions warn."""
    keep = (
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "use_rslora", "rank_pattern", "alpha_pattern", "peft_version",
    )  # fmt: skip
    fixed = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "revision": config.get("revision"),
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    return fixed | {key: config[key] for key in keep if key in config}


def load_adapter(folder: str | Path, *, streamed: bool = False) -> Adapter:
    """A PEFT LoRA folder; AdapterError where it is none, MismatchError where its numbers contradict each other.

    `streamed` leaves the pairs in the file, to be read one by one: memory then does not grow with the adapter.
    """
    path = require_folder(folder)
    if not (path / CONFIG).is_file():
        raise AdapterError(f"{path} has no {CONFIG}; give the folder of a PEFT LoRA adapter")
    config = read_json(path / CONFIG)
    check_make(path, config)
    entries: dict[str, dict[str, TensorEntry]] = {}
    embeddings: set[str] = set()
    dropped: list[str] = []
    for key, entry in read_header(path / WEIGHTS)[1].items():
        module, part, embedding = split_key(path, key)
        if part is None:
            dropped.append(key)
            continue
        entries.setdefault(module, {})[part] = entry
        if embedding:
            embeddings.add(module)
    if not entries:
        raise AdapterError(f"{path / WEIGHTS} holds no lora_A and lora_B tensors; it is no LoRA adapter")
    scales = {module: check_factors(path, module, factors, config) for module, factors in entries.items()}
    stored = StoredPairs(entries, scales, embeddings)
    return Adapter(config, stored if streamed else dict(stored), tuple(dropped))


class StoredPairs(Mapping[str, LoraPair]):
    """Pairs that stay in their file: each is read when it is asked for, so that a stream holds one at a time."""

    def __init__(
        self, entries: Mapping[str, Mapping[str, TensorEntry]], scales: Mapping[str, float], embeddings: set[str]
    ) -> None:
        self._entries, self._scales, self._embeddings = entries, scales, embeddings

    def __getitem__(self, module: str) -> LoraPair:
        factors = self._entries[module]
        a, b = read_entry(factors["a"]), read_entry(factors["b"])
        return LoraPair(a, b, self._scales[module], module in self._embeddings)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


def check_make(path: Path, config: Any) -> None:
    """Refuse what is no plain LoRA, each with its reason."""
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", MASKED_TYPE):
        found = config.get("peft_type") if isinstance(config, dict) else "no JSON object"
        raise AdapterError(f"{path / CONFIG} has peft_type {found}; loram works on LORA adapters")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise AdapterError(f"{path / CONFIG}: {key} is {config.get(key)!r}; expected a positive number")
    check_patterns(path, config)
    if config.get("use_dora"):
        raise AdapterError(
            f"{path} is a DoRA adapter: its magnitudes belong to the weights it was trained on; train plain LoRA"
        )
    if config.get("modules_to_save"):
        raise AdapterError(
            f"{path} carries whole modules ({config['modules_to_save']}); loram handles plain LoRA: "
            "train without modules_to_save"
        )
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise AdapterError(f"{path} carries trained biases; loram handles plain LoRA: train with bias='none'")
    if config.get("layer_replication"):
        raise AdapterError(f"{path} replicates layers; loram handles adapters of the model's own layers")
    if not (path / WEIGHTS).is_file():
        pickled = (
            "adapter_model.bin is a pickle, which loram never reads: save it as safetensors"
            if (path / "adapter_model.bin").is_file()
            else "the folder is incomplete"
        )
        raise AdapterError(f"{path} has no {WEIGHTS}; {pickled}")


def check_patterns(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse patterns that are no {regular expression: number}, and a regular expression that is none."""
    named = (config.get("target_modules"), config.get("exclude_modules"))
    expressions = [value for value in named if isinstance(value, str)]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(isinstance(v, (int, float)) for v in patterns.values()):
            raise AdapterError(f"{path / CONFIG}: {key} is {patterns!r}; expected names with a number each")
        expressions += patterns
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise AdapterError(f"{path / CONFIG}: {expression!r} is no regular expression ({error})") from None


def check_init(adapter: Adapter, where: str | Path) -> None:
    """Refuse an adapter whose init moved base weights into A and B: on the original base they would count twice."""
    init = str(adapter.config.get("init_lora_weights", True)).lower()
    if init.startswith(ABSORBING_INITS):
        raise AdapterError(
            f"{where} was initialised with {init}, which moves base weights into A and B; on the large model that part "
            "would be added twice: train with the default init"
        )


def split_key(path: Path, key: str) -> tuple[str, str | None, bool]:
    """(module, 'a' or 'b', embedding) of a stored key; part None for a base weight that PEFT saved along."""
    name = key.removeprefix(PREFIX)
    for suffix, (part, embedding) in KEYS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), part, embedding
    if name.endswith((".base_layer.weight", ".base_layer.bias")) or name in (
        "lm_head.weight",
        "model.embed_tokens.weight",
    ):
        return name, None, False
    raise AdapterError(f"{path / WEIGHTS} holds {key}, which is no lora_A or lora_B; loram handles plain LoRA")


def check_factors(path: Path, module: str, factors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> float:
    """One module's scale; MismatchError where a factor is missing or the ranks differ."""
    if set(factors) != {"a", "b"}:
        raise MismatchError(f"{path}: {module} has lora_{'A' if 'a' in factors else 'B'} but not the other factor")
    a, b = factors["a"].shape, factors["b"].shape
    declared = pattern_value(config.get("rank_pattern") or {}, module, config["r"])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] != declared:
        raise MismatchError(
            f"{path}: {module} has A {a} and B {b}; expected A (r, in) and B (out, r) with r = {declared}"
        )
    alpha = float(pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"]))
    return alpha / math.sqrt(declared) if config.get("use_rslora") else alpha / declared


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: a key is a regular expression for the name's end."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def target_names(modules: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """target_modules as a plain list: as it was, or the modules' full names where it was a pattern.

    Leaf names would name more modules than a pattern may have matched, and PEFT would miss their keys.
    """
    named = config.get("target_modules")
    if isinstance(named, (list, tuple)) and named:
        return sorted(named)
    return sorted(modules)


def expected_modules(config: Mapping[str, Any], family: Family, geometry: Geometry) -> set[str]:
    """The modules that a config's target_modules names in a model of this family (empty for a pattern)."""
    named, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not isinstance(named, (list, tuple)):
        return set()
    chosen = range(geometry.layers) if layers is None else [layers] if isinstance(layers, int) else layers
    candidates = {family.module(layer, weight) for layer in chosen for weight in family.linears}
    candidates |= {family.embedding.name, family.head.name} if layers is None else set()
    return {m for m in candidates if is_named(m, named) and not is_named(m, config.get("exclude_modules") or [])}


def is_named(module: str, names: str | Iterable[str]) -> bool:
    """PEFT's rule for target_modules and exclude_modules: a pattern for the whole name, or a list of endings."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def check_finite(adapter: Adapter, where: str | Path) -> None:
    """MismatchError that names the first module with a NaN or Inf."""
    for module, pair in adapter.pairs.items():
        for name, value in (("lora_A", pair.a), ("lora_B", pair.b)):
            if not bool(torch.isfinite(value).all()):
                raise MismatchError(
                    f"{where}: {module}.{name} holds NaN or Inf; training diverged: train again with a lower --lr"
                )


def check_modules(
    adapter: Adapter, shape_of: Callable[[str], tuple[int, ...]], expected: set[str], where: str | Path
) -> None:
    """MismatchError where a module is missing, unknown, or has other shapes than the model's."""
    missing = sorted(expected - set(adapter.pairs))
    if missing:
        raise MismatchError(
            f"{where} lacks {missing[0]} ({len(missing)} modules missing) that its target_modules names"
        )
    for module, pair in adapter.pairs.items():
        try:
            shape = shape_of(module)
        except InputError:
            raise MismatchError(f"{where} updates {module}, which the model does not have") from None
        if pair.weight_shape != shape:
            raise MismatchError(
                f"{where}: {module} updates a weight of shape {pair.weight_shape}, the model's is {shape}"
            )
