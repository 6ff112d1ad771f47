"""The same LoRA steps twice, each in a process of its own: loram's loop, and plain transformers.Trainer with peft.

Same checkpoint, rows, seed, LoRA and training arguments, so both draw the same A and see the same rows in the same
order. Everything is imported and every weight has been read (safetensors maps files, and pages count when they are
touched) before the peak begins to count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.training import RANK, StepClock, per_step
from loram import memory

SEED = 0
LEARNING_RATE = 2e-4


class LossClock(StepClock):
    """The losses, too."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def advance(self, amount: int = 1, **figures: float) -> None:
        """A step is done."""
        super().advance(amount)
        self.losses.append(figures["loss"])


def measured(who: str, model: str, steps: int, batch: int, length: int, scratch: Path) -> dict[str, Any]:
    """Seconds of a step, losses, and the peak of memory above that of the loaded model."""
    run = stock(model, steps, batch, length) if who == "stock" else ours(who, model, steps, batch, length, scratch)
    memory.restart_peak()
    loaded = resident_bytes()
    clock = LossClock()
    began = time.process_time()
    run(clock)
    return {
        "cpu_step": per_step(clock.cpu),
        "wall_step": per_step(clock.wall),
        "cpu_first": clock.cpu[0] - began,
        "above": memory.peak_bytes() - loaded,
        "losses": clock.losses,
    }


def token_rows(vocabulary: int, count: int, length: int) -> list[list[int]]:
    """Random tokens, the same for everybody."""
    import torch

    found: list[list[int]] = torch.randint(
        vocabulary, (count, length), generator=torch.Generator().manual_seed(2)
    ).tolist()
    return found


def ours(who: str, folder: str, steps: int, batch: int, length: int, scratch: Path) -> Callable[[LossClock], None]:
    """loram, ready to train."""
    from loram.data.encoding import EncodedRow
    from loram.modeling import load_model
    from loram.options import TrainOptions
    from loram.training.loop import fit
    from loram.training.lora import wrap

    options = TrainOptions(
        model=folder,
        out=str(scratch),
        steps=steps,
        batch=batch,
        max_length=length,
        rank=RANK,
        dropout=0.0,
        lr=LEARNING_RATE,
        warmup=0.0,
        seed=SEED,
        dtype="bf16",
        log_every=1,
        save_every=0,
        compile=who == "loram-compiled",
    )
    model = wrap(load_model(folder, dtype="bf16"), options)
    mask = [False, *[True] * (length - 1)]
    rows = [
        EncodedRow(input_ids=row, loss_mask=mask) for row in token_rows(model.config.vocab_size, batch * steps, length)
    ]
    scratch.mkdir(exist_ok=True)
    read_weights(model)

    def run(clock: LossClock) -> None:
        fit(model, rows, options, scratch, clock)

    return run


def stock(folder: str, steps: int, batch: int, length: int) -> Callable[[LossClock], None]:
    """What one writes without loram, ready to train."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    set_seed(SEED)
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    tokens = token_rows(base.config.vocab_size, batch * steps, length)
    rows = [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in tokens]

    class Report(TrainerCallback):
        clock: LossClock

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                self.clock.advance(1, loss=float(logs["loss"]))

    def run(clock: LossClock) -> None:
        report = Report()
        report.clock = clock
        arguments = TrainingArguments(
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            optim="adamw_torch",
            seed=SEED,
            bf16=True,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=default_data_collator,
            callbacks=[report],
        )
        trainer.train()

    read_weights(model)
    return run


def read_weights(model: Any) -> None:
    """Touch every page of every weight."""
    for weight in model.parameters():
        weight.detach().view(-1)[:: max(1, 1024 // weight.element_size())].sum()


def resident_bytes() -> int:
    """What this process holds now (VmRSS)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
