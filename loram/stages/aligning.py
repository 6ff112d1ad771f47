"""The ways of aligning, each from what the stage has read to the tensors that change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loram.artifact import Manifest, sha256_json
from loram.blockwise import BlockRunner
from loram.checkpoint import BY_FLAG, Checkpoint
from loram.data.encoding import EncodedRow
from loram.data.isolation import refuse_leaks
from loram.data.windows import Mixture
from loram.device import pick_device, place, resolve_dtype
from loram.errors import InputError
from loram.evaluation.losses import summarize
from loram.evaluation.streamed import StreamedModel
from loram.masks import masked
from loram.modeling import load_model
from loram.options import AlignOptions
from loram.progress import Progress
from loram.pruning_map import PruningMap, read_map
from loram.rewriting import Changed
from loram.stages.lineage import check_base, find_large
from loram.training import teacher as teachers
from loram.training.alignment import Objective, Task, align_weights, refuse_stop
from loram.training.checkpoints import FOLDER
from loram.training.loop import Session
from loram.training.metrics import StepReport
from loram.training.objectives import Student, Teacher, distilled, next_token, resident_teacher
from loram.training.reconstruction import REPAIRS, Job, reconstruct, stored
from loram.training.scopes import add_lora, merged_lora, prepare, trained_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What one call of align works with; `path` is the draft's folder, `out` where it will be."""

    options: AlignOptions
    manifest: Manifest
    checkpoint: Checkpoint
    mixture: Mixture
    path: Path
    out: Path
    session: Session
    progress: Progress

    @property
    def dtype_name(self) -> str:
        """The dtype that is computed in, as it is typed."""
        return resolve_dtype(self.options.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is computed in."""
        return BY_FLAG[self.dtype_name]

    @cached_property
    def pruning_map(self) -> PruningMap:
        """The map of the small model, masks included."""
        return read_map(self.checkpoint.folder)

    def mask(self, name: str) -> Tensor | None:
        """The keep-mask of a small tensor, bool (out, in); None where it has none."""
        module, _, leaf = self.pruning_map.numbering.to_large(name).rpartition(".")
        return self.pruning_map.small_mask(module) if f"{module}.{leaf}" in self.pruning_map.masks else None

    def masks(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The keep-masks of those of these tensors that have one."""
        found = {name: self.mask(name) for name in names}
        return {name: mask for name, mask in found.items() if mask is not None}

    def runner(self, checkpoint: Checkpoint) -> BlockRunner:
        """A model that is run one layer at a time; hidden states that outgrow memory wait beside the checkpoints."""
        return BlockRunner(
            checkpoint,
            dtype=self.dtype,
            rows=self.options.batch,
            hidden_memory=self.options.hidden_bytes,
            spill=self.path / FOLDER / f"spill-{checkpoint.folder.name}",
        )

    def large(self) -> Path:
        """The large model's folder; InputError where it is not found, MismatchError where it is another one."""
        folder = find_large(self.checkpoint.folder, self.manifest, self.options.large)
        if folder is None or self.manifest.base is None:
            name = self.manifest.base.id if self.manifest.base else "the large model"
            raise InputError(f"{self.checkpoint.folder} was cut from {name}, which was not found; give it with --large")
        check_base(self.manifest.base, folder)
        return folder


def digest_of(mixture: Mixture) -> str:
    """Changes when a token or the order does."""
    return sha256_json([mixture.windows.tolist(), mixture.held_out.tolist(), mixture.order])


def held_out_loss(work: Work, folder: Path) -> float:
    """Mean next-token loss of a model on the windows that were held out, one layer in memory at a time."""
    windows = work.mixture.held_out
    if work.mixture.held_places is not None:
        rows = documents(windows, work.mixture.held_places)
        losses = StreamedModel(folder, work.options.batch, work.dtype_name).measure(rows, None, work.progress)
        return summarize(losses).mean
    with Checkpoint(folder) as checkpoint, work.runner(checkpoint) as runner:
        work.progress.begin("measure", runner.layers)
        hidden = runner.embed(windows)
        for block in runner.blocks(hidden):
            block.run()
            work.progress.advance()
        nll, tokens = runner.losses(hidden, windows)
        work.progress.end()
        return float(nll.sum() / tokens.sum())


def documents(windows: Tensor, places: Tensor) -> list[EncodedRow]:
    """The documents in windows, and parts of documents, as rows of their own; what is one token long says nothing."""
    rows = []
    for ids, where in zip(windows.tolist(), places.tolist(), strict=True):
        starts = [0, *(number for number in range(1, len(ids)) if where[number] == 0), len(ids)]
        parts = [ids[first:last] for first, last in pairwise(starts) if last - first > 1]
        rows += [EncodedRow(input_ids=part, loss_mask=[False, *[True] * (len(part) - 1)]) for part in parts]
    return rows


def learn(work: Work) -> Changed:
    """lm and distill: train the weights of --scope, from the next tokens or from the large model."""
    options = work.options
    if options.teacher_cache is not None:
        write_cache(work)
    model: Any = place(load_model(work.checkpoint.folder, dtype=work.dtype))
    if options.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    parameters = trained_weights(work, model)
    logger.info("aligning %s of %s parameters", f"{count(parameters):,}", f"{count(dict(model.named_parameters())):,}")
    if options.packing:
        refuse_leaks(model, options.length)
    student = Student(model, work.mixture.windows, work.dtype, work.mixture.places)
    masks = {} if options.scope == "lora" else work.masks(parameters)
    task = Task(parameters, objective_of(work, student), work.mixture.order, work.mixture.windows.shape[1], masks)
    align_weights(task, options, work.path, work.progress, work.session)
    final: Mapping[str, Tensor] = parameters
    if options.scope == "lora":
        final = merged_lora(parameters, work.checkpoint)
    return {name: partial(kept_zeros, work, name, partial(final.__getitem__, name)) for name in final}


def trained_weights(work: Work, model: Any) -> dict[str, nn.Parameter]:
    """What --scope trains, made ready for it."""
    options = work.options
    if options.scope == "lora":
        model.requires_grad_(False)
        masks = work.pruning_map.mask_in_small if work.pruning_map.masked else None
        return add_lora(model, options.rank, options.seed, masks)
    return prepare(model, trained_names(model, options.scope), work.checkpoint)


def count(parameters: Mapping[str, Tensor]) -> int:
    """Numbers in tensors."""
    return sum(value.numel() for value in parameters.values())


def objective_of(work: Work, student: Student) -> Objective:
    """The loss that --method minimizes."""
    options = work.options
    if options.method == "lm":
        return next_token(student)
    return distilled(student, teacher_of(work, student), options.temperature, options.hidden_weight)


def teacher_of(work: Work, student: Student) -> Teacher:
    """The large model: from its cache of logits, or in memory beside the student."""
    options = work.options
    if options.teacher_cache is not None:
        return teachers.cached_teacher(Path(options.teacher_cache), pick_device(), hidden=bool(options.hidden_weight))
    large = replace(student, model=place(load_model(work.large(), dtype=work.dtype)))
    return resident_teacher(large, options.temperature)


def write_cache(work: Work) -> None:
    """Write what is missing of the large model's logits; stopped, it goes on with the next part."""
    options, windows = work.options, work.mixture.windows
    assert options.teacher_cache is not None
    assert work.manifest.base is not None
    folder, large = Path(options.teacher_cache), work.large()
    identity = {
        "schema": 1,
        "teacher": work.manifest.base.weights_fingerprint,
        "windows": sha256_json(windows.tolist()),
        "top_k": options.top_k,
        "temperature": options.temperature,
        "hidden": bool(options.hidden_weight),
        "part": teachers.PART,
        "dtype": str(work.dtype),
    }
    teachers.open_cache(folder, identity)
    missing = teachers.missing_parts(folder, len(windows))
    if not missing:
        return
    with Checkpoint(large) as checkpoint, work.runner(checkpoint) as runner:
        work.progress.begin("teacher", len(missing) * runner.layers)

        def after_block() -> None:
            refuse_stop(work.session, 0, options)
            work.progress.advance()

        for number in missing:
            some = windows[number * teachers.PART : (number + 1) * teachers.PART]
            said = teachers.taught(runner, some, options.top_k, options.temperature, after_block)
            if not options.hidden_weight:
                said.pop("hidden")
            teachers.write_part(folder, number, said)
        work.progress.end()


def rebuild(work: Work) -> Changed:
    """refit and block: repair layer after layer against the large model's stream."""
    with Checkpoint(work.large()) as above, work.runner(above) as large, work.runner(work.checkpoint) as small:
        job = Job(
            large,
            small,
            work.mixture.windows,
            work.pruning_map,
            work.options,
            work.path / FOLDER,
            work.session,
            REPAIRS[work.options.method],
        )
        report = StepReport(work.path, work.progress, work.options.log_every)
        changed = reconstruct(job, report)
    logger.info("%s: %d tensors changed", work.options.method, len(changed))
    return {name: partial(kept_zeros, work, name, partial(stored, file, name)) for name, file in changed.items()}


def kept_zeros(work: Work, name: str, read: Callable[[], Tensor]) -> Tensor:
    """A changed weight as it is written: zero wherever its mask is off."""
    value, mask = read().detach().cpu(), work.mask(name)
    return value if mask is None else masked(value, mask)


CHANGES: dict[str, Callable[[Work], Changed]] = {"lm": learn, "distill": learn, "refit": rebuild, "block": rebuild}
