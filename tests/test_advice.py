"""What is advised where memory is short: real savings, the cheapest first, three at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loram.activations import Workload
from loram.advice import Training, candidates, cheapest, sentence
from loram.families.widths import Widths
from loram.memory_model import CPU, CUDA, Model, training_memory

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 16000,
}
FULL = Training(Model(CONFIG), Workload(batch=8, length=256, dtype="bf16"), CUDA, "small")


def test_three_changes_the_cheapest_first() -> None:
    batch, again, bits = cheapest(FULL)
    assert batch.flags == "--batch 4 --accumulate 2"
    assert again.flags == "--checkpointing"
    assert bits.flags == "`loram quantize small --type nf4 -o small-nf4` and training on that"


def test_what_a_change_saves_is_what_the_model_says_without_it() -> None:
    batch, again, bits = cheapest(FULL)
    for change, model, work in (
        (batch, FULL.model, replace(FULL.work, batch=4)),
        (again, FULL.model, replace(FULL.work, checkpointing=True)),
        (bits, replace(FULL.model, quantize="nf4"), FULL.work),
    ):
        assert change.saves == FULL.peak - training_memory(model, work, CUDA).total > 0


def test_the_batch_that_fits_is_named() -> None:
    two = replace(FULL, work=replace(FULL.work, batch=2)).peak
    assert cheapest(FULL, two)[0].flags == "--batch 2 --accumulate 4"
    assert cheapest(replace(FULL, accumulate=3), two)[0].flags == "--batch 2 --accumulate 12"
    assert cheapest(FULL, 1)[0].flags == "--batch 4 --accumulate 2"
    assert "--batch 2 --accumulate 4 saves" in sentence(FULL, two)
    assert "little slower): enough; " in sentence(FULL, two)
    assert "enough" not in sentence(FULL, 1)


def test_what_is_done_already_is_not_advised() -> None:
    work = Workload(batch=1, length=512, dtype="bf16", checkpointing=True)
    done = Training(Model(CONFIG, quantize="nf4"), work, CUDA)
    assert [change.flags for change in cheapest(done)] == ["--max-length 256"]
    deeper = Model(CONFIG, Widths((4,) * 12, (100,) * 12), "nf4")
    told = cheapest(replace(done, deeper=(deeper, "cut more")))
    assert [change.flags for change in told] == ["--max-length 256", "cut more"]
    least = Training(Model(CONFIG, quantize="nf4"), replace(work, length=8), CUDA)
    assert cheapest(least) == ()
    assert "use a smaller model" in sentence(least)


def test_the_cpu_and_a_gpu_differ() -> None:
    flags = [change.flags for change in cheapest(replace(FULL, work=replace(FULL.work, dtype="fp32")))]
    assert flags[0] == "--dtype bf16"  # emulated on many CPUs, so it is not the first thing to say there
    on_cpu = replace(FULL, hardware=CPU, work=replace(FULL.work, dtype="fp32", batch=1))
    assert cheapest(on_cpu)[0].flags == "--checkpointing"


def test_one_layer_in_memory_is_named_where_it_may_be_asked_for() -> None:
    on_cpu = replace(FULL, hardware=CPU, streamable=True)
    assert [change.flags for change in cheapest(on_cpu)] == [
        "--batch 4 --accumulate 2",
        "--checkpointing",
        "--streamed",
    ]
    change = cheapest(on_cpu)[2]
    assert "the same steps, about 1.8 times the processor time" in change.cost
    streamed = replace(FULL.work, checkpointing=True, streamed=True)
    assert change.saves == on_cpu.peak - training_memory(FULL.model, streamed, CPU).total > cheapest(on_cpu)[1].saves
    for refused in (
        replace(on_cpu, streamable=False),
        replace(on_cpu, model=replace(FULL.model, quantize="nf4")),
        replace(on_cpu, work=streamed),
    ):
        assert "--streamed" not in [flags for flags, _, _ in candidates(refused, None)]


def test_on_a_gpu_bits_are_cheaper_than_reading_every_weight_twice() -> None:
    single = replace(FULL, streamable=True, work=replace(FULL.work, batch=1, length=2048, checkpointing=True))
    assert [change.flags.split()[0] for change in cheapest(single)] == ["`loram", "--streamed", "--max-length"]
    assert "processor" not in cheapest(single)[1].cost


def test_one_layer_in_memory_is_not_named_for_what_checkpointing_saves_as_well() -> None:
    """Weights of 20 MB beside activations of 9 GB."""
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 704}
    wide = Training(Model(config), Workload(batch=64, length=2048), CUDA, streamable=True)
    assert wide.peak - replace(wide, work=replace(wide.work, checkpointing=True, streamed=True)).peak > wide.peak / 2
    assert "--streamed" not in [flags for flags, _, _ in candidates(wide, None)]


def test_with_one_layer_in_memory_fewer_rows_mean_more_reading() -> None:
    streamed = replace(FULL.work, checkpointing=True, streamed=True)
    changes = cheapest(replace(FULL, hardware=CPU, work=streamed, streamable=True))
    assert changes[0].flags == "--batch 4 --accumulate 2"
    assert changes[0].cost == "the same steps, every weight is read 2 times as often"
    assert not any("quantize" in change.flags for change in changes)  # it is refused together with --streamed
    more = cheapest(replace(FULL, hardware=CPU, work=streamed, streamable=True, accumulate=4))[0]
    assert (more.flags, more.cost) == ("--batch 4 --accumulate 8", changes[0].cost)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_rows_of_a_step_are_kept(batch: int) -> None:
    for change in cheapest(replace(FULL, work=replace(FULL.work, batch=batch))):
        words = change.flags.split()
        if words[0] == "--batch":
            assert int(words[1]) * int(words[3]) >= batch
