"""The loop against a hand-written one on the same tensors, its records, its stops."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from loram.data.encoding import EncodedRow
from loram.device import resolve_dtype
from loram.errors import MismatchError, OptionError
from loram.options import TrainOptions
from loram.progress import Progress
from loram.training.loop import TrainingRun, fit, refuse_shards, training_arguments
from loram.training.lora import wrap
from loram.training.trainer import CheckpointingTrainer


def options(**changes: Any) -> TrainOptions:
    plain = {"model": "m", "rank": 4, "dropout": 0.0, "dtype": "fp32", "batch": 4, "lr": 1e-2, "seed": 3}
    return TrainOptions(**{**plain, **changes})


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )


def some_rows(count: int) -> list[EncodedRow]:
    """Rows of different lengths and different shares of loss, so that a mean of means would be wrong."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(count):
        length = 4 + 3 * (number % 5)
        ids = torch.randint(0, 64, (length,), generator=generator).tolist()
        first = 1 + (number * 7) % (length - 1)
        rows.append(EncodedRow(input_ids=ids, loss_mask=[position >= first for position in range(length)]))
    return rows


def train_tiny(folder: Path, rows: list[EncodedRow], progress: Progress | None = None, **changes: Any) -> TrainingRun:
    chosen = options(**changes)
    return fit(wrap(tiny_model(), chosen), rows, chosen, folder, progress or Progress())


def by_hand(rows: list[EncodedRow], steps: int, lr: float, warmup: int) -> list[float]:
    """Full-batch LoRA training in plain torch: one row at a time, no padding, cosine with linear warm-up."""
    model = wrap(tiny_model(), options())
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    count = sum(sum(row["loss_mask"][1:]) for row in rows)
    losses = []
    for step in range(steps):
        rate = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        optimizer.zero_grad()
        total = 0.0
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            for position in range(1, len(row["input_ids"])):
                if row["loss_mask"][position]:
                    target = torch.tensor(row["input_ids"][position])
                    total = total + nn.functional.cross_entropy(logits[position - 1], target)
        loss = total / count
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = lr * rate
        optimizer.step()
        losses.append(loss.item())
    return losses


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("batch", [12, 4, 1])
def test_losses_equal_a_hand_written_loop_however_the_batch_is_accumulated(tmp_path: Path, batch: int) -> None:
    rows = some_rows(12)
    run = train_tiny(tmp_path, rows, batch=batch, accumulate=12 // batch, steps=5, warmup=2.0)
    expected = by_hand(rows, steps=5, lr=1e-2, warmup=2)
    torch.testing.assert_close([line["loss"] for line in records(tmp_path)], expected, rtol=1e-5, atol=1e-5)
    assert (run.steps, run.loss_first, run.loss_last) == (
        5,
        records(tmp_path)[0]["loss"],
        records(tmp_path)[-1]["loss"],
    )
    assert run.tokens == 5 * sum(len(row["input_ids"]) for row in rows)
    assert run.peak_bytes > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_changes_no_loss_and_counts_no_padding(tmp_path: Path, checkpointing: bool) -> None:
    rows = some_rows(12)
    packing = {"packing": True, "max_length": 24, "checkpointing": checkpointing}
    run = train_tiny(tmp_path, rows, batch=12, steps=5, warmup=2.0, **packing)
    expected = by_hand(rows, steps=5, lr=1e-2, warmup=2)
    torch.testing.assert_close([line["loss"] for line in records(tmp_path)], expected, rtol=1e-5, atol=1e-5)
    assert run.tokens == 5 * sum(len(row["input_ids"]) for row in rows)


def test_packing_is_refused_where_rows_would_leak(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    model.config.max_position_embeddings = 8
    chosen = options(packing=True, max_length=24)
    with pytest.raises(OptionError, match="--packing: this model turns positions differently"):
        fit(wrap(model, chosen), some_rows(12), chosen, tmp_path)


def test_same_seed_same_losses_other_seed_other_losses(tmp_path: Path) -> None:
    losses = []
    for number, seed in enumerate((3, 3, 4)):
        folder = tmp_path / str(number)
        folder.mkdir()
        train_tiny(folder, some_rows(12), steps=6, dropout=0.1, seed=seed)
        losses.append([line["loss"] for line in records(folder)])
    assert losses[0] == losses[1] != losses[2]


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = train_tiny(tmp_path, some_rows(12), steps=4)
    checkpointed = train_tiny(tmp_path, some_rows(12), steps=4, checkpointing=True)
    assert plain.loss_last == pytest.approx(checkpointed.loss_last, rel=1e-6)
    assert len(records(tmp_path)) == 4  # a run that starts anew leaves no lines of an earlier one


def test_a_run_in_another_dtype_in_between_leaves_no_trace(tmp_path: Path) -> None:
    first = train_tiny(tmp_path, some_rows(12), steps=3)
    train_tiny(tmp_path, some_rows(12), steps=3, dtype="bf16")
    assert train_tiny(tmp_path, some_rows(12), steps=3).loss_last == first.loss_last


def test_epochs_schedules_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_tiny(tmp_path, some_rows(12), epochs=1.5, schedule="linear", warmup=0.0)
    lines = records(tmp_path)
    assert run.steps == 5
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line.keys() == {"step", "loss", "lr", "tokens", "seconds"} for line in lines)
    assert lines[0]["lr"] == pytest.approx(1e-2)
    assert lines[0]["tokens"] < lines[-1]["tokens"] == run.tokens
    assert capsys.readouterr().out == ""


def test_progress_hears_every_step_at_most_every_n(tmp_path: Path) -> None:
    class Recorder(Progress):
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def begin(self, label: str, total: int) -> None:
            self.heard.append((label, total))

        def advance(self, amount: int = 1, **figures: float) -> None:
            self.heard.append((amount, sorted(figures)))

        def end(self) -> None:
            self.heard.append("end")

    recorder = Recorder()
    train_tiny(tmp_path, some_rows(12), recorder, steps=8, log_every=3)
    figures = ["loss", "memory", "tokens_per_second"]
    assert recorder.heard == [("train", 8), *[(amount, figures) for amount in (1, 3, 3, 1)], "end"]


def test_training_lowers_the_loss_and_touches_only_lora(tmp_path: Path) -> None:
    model = wrap(tiny_model(), options())
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = fit(model, some_rows(12), options(steps=20), tmp_path)
    assert run.loss_last < run.loss_first - 0.2
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_nan_is_a_sentence_with_the_step(tmp_path: Path) -> None:
    model = wrap(tiny_model(), options())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).fill_(math.nan)
    with pytest.raises(MismatchError, match=r"the loss became NaN at step 1 with --lr 0\.01; lower --lr") as caught:
        fit(model, some_rows(12), options(steps=3), tmp_path)
    assert caught.value.exit_code == 6


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"do not go together: .*nonsense"):
        train_tiny(tmp_path, some_rows(4), steps=1, optimizer="nonsense")


def test_compile_reaches_the_trainer_and_is_off_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not training_arguments(options(), tmp_path).torch_compile
    monkeypatch.setenv("CXX", sys.executable)  # anything that is there
    assert training_arguments(options(compile=True), tmp_path).torch_compile


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_compile_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OptionError, match=r"--compile needs a C\+\+ compiler, and there is no no-such-compiler"):
        train_tiny(tmp_path, some_rows(4), steps=1, compile=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_has_the_same_losses(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        train_tiny(tmp_path, some_rows(12), steps=2, compile=compiled)
        losses.append([line["loss"] for line in records(tmp_path)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit")


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_optimizers_of_bitsandbytes_run(tmp_path: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    run = train_tiny(tmp_path, some_rows(12), steps=6, optimizer=name)
    assert run.loss_last < run.loss_first


def test_eight_bits_hold_the_optimizers_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors stay in 32 bits (below 4096 weights), so the rank is high enough for larger ones."""
    pytest.importorskip("bitsandbytes")
    seen: list[Any] = []
    plain = CheckpointingTrainer.create_optimizer

    def kept(self: CheckpointingTrainer, model: Any = None) -> torch.optim.Optimizer:
        seen.append(plain(self, model))
        return seen[-1]

    monkeypatch.setattr(CheckpointingTrainer, "create_optimizer", kept)
    train_tiny(tmp_path, some_rows(4), steps=1, rank=128, optimizer="adamw_bnb_8bit")
    kinds = {state["state1"].dtype for state in seen[0].state.values()}
    assert torch.uint8 in kinds


@pytest.mark.parametrize(("fsdp", "stage"), [(True, None), (False, 3)])
def test_weights_in_shards_are_refused(fsdp: bool, stage: int | None) -> None:
    plugin = SimpleNamespace(zero_stage=stage) if stage else None
    state = SimpleNamespace(deepspeed_plugin=plugin)
    trainer: Any = SimpleNamespace(is_fsdp_enabled=fsdp, accelerator=SimpleNamespace(state=state))
    with pytest.raises(OptionError, match=r"in shards .* DeepSpeed ZeRO-2"):
        refuse_shards(trainer)


@pytest.mark.parametrize("plugin", [None, SimpleNamespace(zero_stage=2)])
def test_whole_weights_are_not_refused(plugin: Any) -> None:
    state = SimpleNamespace(deepspeed_plugin=plugin)
    trainer: Any = SimpleNamespace(is_fsdp_enabled=False, accelerator=SimpleNamespace(state=state))
    refuse_shards(trainer)


def test_an_optimizer_whose_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    said = r"^--optimizer adamw_bnb_8bit needs bitsandbytes; pip install 'loram\[quant\]'$"
    with pytest.raises(OptionError, match=said):
        train_tiny(tmp_path, some_rows(4), steps=1, optimizer="adamw_bnb_8bit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_dtypes_without_a_gpu() -> None:
    assert resolve_dtype("auto") in ("bf16", "fp32")
    assert resolve_dtype("bf16") == "bf16"
    with pytest.raises(OptionError, match="fp16 needs a GPU"):
        resolve_dtype("fp16")


def test_lora_plus_learns_b_faster_than_a(tmp_path: Path) -> None:
    """One Adam step moves every weight by its learning rate, so the two rates can be read off B (which begins at 0)."""
    moved = {}
    for ratio in (1.0, 8.0):
        chosen = options(steps=1, lora_plus_ratio=ratio, warmup=0.0, clip=0.0, schedule="constant")
        model = wrap(tiny_model(), chosen)
        fit(model, some_rows(4), chosen, tmp_path)
        moved[ratio] = max(float(p.detach().abs().max()) for name, p in model.named_parameters() if "lora_B" in name)
    assert moved[8.0] == pytest.approx(8 * moved[1.0], rel=1e-3)
    assert moved[1.0] == pytest.approx(1e-2, rel=1e-3)


def test_lora_fa_leaves_a_as_it_was_drawn(tmp_path: Path) -> None:
    chosen = options(steps=10, lora_fa=True)
    model = wrap(tiny_model(), chosen)
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = fit(model, some_rows(12), chosen, tmp_path)
    assert run.loss_last < run.loss_first
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_B" in name for name in changed)


def test_neftune_is_noise_while_training_only(tmp_path: Path) -> None:
    plain = train_tiny(tmp_path, some_rows(12), steps=2)
    noisy = train_tiny(tmp_path, some_rows(12), steps=2, neftune=5.0)
    assert noisy.loss_first != plain.loss_first
    assert noisy.loss_first == pytest.approx(plain.loss_first, rel=0.1)


def test_a_tracker_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nonsense"):
        train_tiny(tmp_path, some_rows(4), steps=1, report_to=("nonsense",))


def test_tensorboard_hears_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_tiny(tmp_path, some_rows(4), steps=3, report_to=("tensorboard",))
    (file,) = (tmp_path / "logs").rglob("events.*")
    heard = EventAccumulator(str(file.parent))
    heard.Reload()
    scalars = heard.Scalars("train/loss")
    assert [item.step for item in scalars] == [1, 2, 3]
    assert scalars[-1].value == pytest.approx(run.loss_last)
