"""The Trainer with checkpoints that are whole or not there, and the callback that says when to write one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loram.data.collate import packed_tokens
from loram.options import TrainOptions
from loram.training import checkpoints
from loram.training.metrics import StepReport
from loram.training.processes import first_found, is_writer, wait
from loram.training.signals import StopRequest

WEIGHTS = "adapter_model.safetensors"


class SaveAndStop(TrainerCallback):
    """Asks for a checkpoint every N steps, after the last one, and when somebody wants to stop; then stops."""

    def __init__(self, every: int, stop: StopRequest) -> None:
        self.every = every
        self.stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step is done: is it time?"""
        # A signal may reach the processes in different steps; all of them have to stop after the same one.
        self.stop.name = first_found(self.stop.name)
        step = state.global_step
        last = control.should_training_stop or step == state.max_steps
        due = self.every > 0 and (step % self.every == 0 or last)
        control.should_save = control.should_save or due or bool(self.stop)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step is safe."""
        control.should_training_stop = control.should_training_stop or bool(self.stop)


class CheckpointingTrainer(Trainer):
    """Writes checkpoints of the adapter alone, with their metrics, sealed last."""

    metrics: Path
    identity: dict[str, Any]
    options: TrainOptions
    report: StepReport

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What trackers hear holds the held-out losses, too."""
        super().log({**logs, **self.report.extra} if "loss" in logs else logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the options name; LoRA+ and LoRA-FA come from peft."""
        adapted: Any = self.model
        if self.optimizer is None and self.options.lora_plus_ratio is not None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, adapted)
            rate = settings.pop("lr")
            self.optimizer = create_loraplus_optimizer(
                adapted,
                kind,
                lr=rate,
                loraplus_lr_ratio=self.options.lora_plus_ratio,
                loraplus_lr_embedding=rate,
                loraplus_weight_decay=self.options.weight_decay,
                **settings,
            )
        elif self.optimizer is None and self.options.lora_fa:
            self.optimizer = create_lorafa_optimizer(
                adapted,
                r=self.options.rank,
                lora_alpha=self.options.alpha,  # type: ignore[arg-type]
                lr=self.options.lr,
                weight_decay=self.options.weight_decay,
            )
        found: torch.optim.Optimizer = super().create_optimizer(model)
        return found

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if "position_ids" not in inputs:
            super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]
            return
        found = self.accelerator.gather(packed_tokens(inputs["position_ids"])).sum()
        self.state.num_input_tokens_seen += int(found.item())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        place = Path(str(self.args.output_dir))
        folder = place / f"{checkpoints.PREFIX}{self.state.global_step}"
        if is_writer():
            shutil.rmtree(folder, ignore_errors=True)
            checkpoints.write_identity(place, self.identity)
        wait()
        super()._save_checkpoint(model, trial)
        wait()
        if is_writer():
            shutil.copyfile(self.metrics, folder / self.metrics.name)
            checkpoints.seal(folder)
            checkpoints.keep_newest(place, self.options.keep_checkpoints)
        wait()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save or output_dir is None:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(adapter_state(self.model, state_dict), Path(output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model, Path(resume_from_checkpoint))


def adapter_state(model: Any, state: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The LoRA weights by peft's names, as they are."""
    found = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def load_weights(model: Any, folder: Path) -> None:
    """Put a checkpoint's LoRA weights into the model."""
    assert isinstance(model, PeftModel)
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
