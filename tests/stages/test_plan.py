"""plan: from the config alone; what fits, what does not, and what to type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stock_models import VARIANTS, make, raw_config

from loram.errors import FamilyError, HubError, InputError, KindError, OptionError
from loram.measured import because
from loram.options import PlanOptions, PruneOptions
from loram.sizes import count
from loram.stages.plan import PlanResult, plan
from loram.stages.prune import prune

GIB = 2**30
LLAMA_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_13B))
    return file


def planned(model: Path, **changes: Any) -> PlanResult:
    return plan(PlanOptions(model=str(model), **changes))


def test_a_config_file_or_its_folder_is_enough(config: Path) -> None:
    body = planned(config).to_json()
    assert body == planned(config.parent).to_json()
    assert json.loads(json.dumps(body)) == body
    assert body["params"]["large"] == 13015864320
    assert body["bytes"]["large"] == 2 * 13015864320
    assert set(body["peak_bytes"]) == {"prune", "align", "train", "recover", "merge"}
    assert body["fits"] is None
    assert [path.name for path in config.parent.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_planned_is_what_prune_makes(name: str, stock: Callable[[str], Path], tmp_path: Path) -> None:
    cut: dict[str, Any] = {"ratio": "0.6", "keep_first": 1, "keep_last": 0}
    found = planned(stock(name), **cut)
    made = prune(PruneOptions(model=str(stock(name)), out=str(tmp_path / "small"), method="random", **cut))
    assert (found.large.total, found.small.total) == (made.large, made.small)
    assert found.large.total == sum(value.numel() for value in make(name).parameters())
    uncut = "attention is not cut: there is one kv head"
    assert (uncut in found.notes) == (uncut in str(found)) == name.endswith("-mqa")


@pytest.mark.parametrize(("tied", "said"), [(True, 50), (False, 67)])
def test_a_model_that_is_mostly_vocabulary_is_said_to_be(tied: bool, said: int, tmp_path: Path) -> None:
    """Shares by the definition: the rest is 40 layers of 4 h² + 3 h m and their norms, and the last norm."""
    hidden, mlp, layers = 5120, 13824, 40
    rest = layers * (4 * hidden**2 + 3 * hidden * mlp + 2 * hidden) + hidden
    vocab = -(-rest // hidden)  # as much again, in one table
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA_13B | {"vocab_size": vocab, "tie_word_embeddings": tied}), encoding="utf-8"
    )
    assert planned(tmp_path / "config.json").notes == (
        f"{said}% of the parameters are embeddings, which are never cut",
    )
    smaller = LLAMA_13B | {"vocab_size": vocab // 3, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(smaller), encoding="utf-8")
    assert planned(tmp_path / "config.json").notes == ()


def test_memory_names_the_mildest_that_fits(config: Path) -> None:
    whole = planned(config, memory="200GiB")
    assert whole.choice is not None
    assert (whole.choice.ratio, whole.choice.quantize) == (None, "none")
    four_bit = planned(config, memory="12GiB")
    assert four_bit.choice is not None
    assert (four_bit.choice.ratio, four_bit.choice.quantize) == (None, "nf4")
    previous = 0.0
    for memory in (8, 7, 6, 5, 4):
        result = planned(config, memory=f"{memory}GiB")
        assert result.choice is not None
        assert result.choice.quantize == "nf4"
        assert result.choice.train_bytes <= memory * GIB
        ratio = float(result.choice.ratio or 0)
        assert ratio >= previous
        previous = ratio
        assert result.fits is False  # at the default ratio in 16 bit
        milder = planned(config, ratio=f"{ratio - 0.05:.2f}", quantize="nf4") if ratio > 0.05 else None
        assert milder is None or milder.peaks["train"].total > memory * GIB
        assert "← suggested" in str(result)
        assert f"why          {because(result.choice.ratio, 'nf4')} (docs/transfer.md)" in str(result)
        assert result.to_json()["suggestion"]["reason"] == result.choice.reason
    assert previous > 0.3
    nothing = planned(config, memory="1GiB")
    assert nothing.choice is None
    assert nothing.fits is False
    assert "no cut fits" in str(nothing)
    assert "why " not in str(nothing)


def test_peaks_move_with_what_they_are_made_of(config: Path) -> None:
    plain = planned(config).peaks["train"].total
    assert planned(config, ratio="0.65").peaks["train"].total < plain
    assert planned(config, quantize="nf4").peaks["train"].total < plain
    assert planned(config, batch=4).peaks["train"].total > plain
    assert planned(config, max_length=2048).peaks["train"].total > plain
    assert planned(config, checkpointing=False).peaks["train"].total > plain
    assert planned(config, rank=64).peaks["train"].total > plain
    assert planned(config, score="magnitude", refit=False).peaks["prune"].total <= 400 * 2**20
    assert planned(config, method="semi", score="magnitude").peaks["prune"].total <= 400 * 2**20
    refitted = planned(config, score="magnitude").peaks["prune"]  # what is said to be typed names text
    assert refitted == planned(config, score="wanda").peaks["prune"]
    assert planned(config, method="random").peaks["prune"].total <= 400 * 2**20
    assert planned(config).peaks["merge"].total <= 400 * 2**20
    calibrated = planned(config, score="wanda").peaks["prune"].total
    assert calibrated < planned(config, score="taylor").peaks["prune"].total < 2 * 13015864320  # it streams, too
    assert calibrated < planned(config, method="semi", score="sparsegpt").peaks["prune"].total < 2 * 13015864320
    assert planned(config, device="cpu").peaks["train"].total > plain
    assert planned(config, optimizer="adamw_8bit").peaks["train"].total < plain
    assert all(part >= 0 for peak in planned(config).peaks.values() for part in peak.parts.values())


def test_every_stage_has_its_parts_a_bar_and_a_verdict(config: Path) -> None:
    result = planned(config, memory="8GiB", quantize="nf4", ratio="0.65")
    body = result.to_json()
    assert set(body["stages"]) == set(body["peak_bytes"])
    for name, stage in body["stages"].items():
        assert stage["peak_bytes"] == sum(stage["parts"].values()) == body["peak_bytes"][name]
        assert stage["fits"] == (stage["peak_bytes"] <= 8 * GIB)
        (line,) = [text for text in str(result).splitlines() if text.startswith(f"  {name} ")]
        assert "█" in line
        assert ("does not fit" in line) != stage["fits"]
    assert body["train_parts"] == body["stages"]["train"]["parts"]
    assert "quantized weights" in body["train_parts"]
    longest = max(str(result).splitlines()[4:9], key=lambda line: line.count("█"))
    assert longest.split()[0] == max(body["peak_bytes"], key=body["peak_bytes"].get)


def test_what_does_not_fit_is_given_the_cheapest_changes(config: Path) -> None:
    tight: dict[str, Any] = {"batch": 4, "checkpointing": False, "memory": "16GiB"}
    result = planned(config, **tight)
    flags = [change["flags"] for change in result.to_json()["changes"]]
    assert flags[:2] == ["--batch 1 --accumulate 4", "--checkpointing"] or flags[0].startswith("--batch 2")
    assert all(change["saves"] > 0 for change in result.to_json()["changes"])
    assert f"  {result.changes[0]}" in str(result)
    assert planned(config, memory="100GiB", batch=4).changes == ()
    for targets, named in (("all-linear",), True), (("q_proj", "lm_head"), False):
        result = planned(config, memory="8GiB", device="cpu", batch=1, checkpointing=True, targets=targets)
        assert ("--streamed" in [change.flags for change in result.changes]) == named


def test_single_weights_are_counted_and_take_the_memory_of_all(config: Path) -> None:
    dense = planned(config, method="semi")
    body = dense.to_json()
    assert body["params"]["small"] == 6_671_979_520  # Table 4 of 2502.13533, as counted exactly
    assert body["bytes"]["small"] == body["bytes"]["large"]
    assert dense.peaks["train"].total > planned(config).peaks["train"].total
    assert "their zeros are stored" in str(dense)
    text = "--calibration FILE --calibration builtin"
    assert dense.next_command == f"loram prune {config.parent} --method semi {text} -o SMALL"
    with pytest.raises(OptionError, match=r"--pattern 3:7 does not divide model.layers.0.self_attn.q_proj, which has"):
        planned(config, method="semi", pattern="3:7")


@pytest.mark.parametrize("changes", [{"method": "semi", "pattern": "4:8"}, {"method": "unstructured", "ratio": "0.3"}])
def test_memory_that_single_weights_do_not_save_is_found_by_bits_and_units(
    changes: dict[str, Any], config: Path
) -> None:
    """Zeros are stored: what is suggested is a cut of heads and channels, and a command that prune takes."""
    weights, units = planned(config, memory="6GiB", **changes), planned(config, memory="6GiB")
    assert weights.tried == units.tried
    assert units.choice is not None
    assert units.choice.ratio is not None
    assert weights.next_command == units.next_command
    assert "--method" not in weights.next_command


def test_what_to_type_next(config: Path) -> None:
    text = "--calibration FILE --calibration builtin"
    assert planned(config).next_command == f"loram prune {config.parent} --ratio 0.5 {text} -o SMALL"
    assert planned(config, quantize="nf4").next_command.endswith(f"--ratio 0.5 --quantize nf4 {text} -o SMALL")
    random_cut = planned(config, method="random").next_command
    assert random_cut == f"loram prune {config.parent} --method random --ratio 0.5 -o SMALL"
    assert planned(config, memory="12GiB").next_command == f"loram quantize {config.parent} --type nf4 -o SMALL"
    assert planned(config, memory="200GiB").next_command == f"loram train {config.parent} --data FILE -o ADAPTER"
    assert planned(config, memory="1GiB").next_command == ""
    for changes, typed in [
        ({"method": "unstructured", "ratio": "0.3"}, f"--method unstructured --ratio 0.3 {text}"),
        (
            {"method": "unstructured", "score": "magnitude", "quantize": "nf4"},
            "--method unstructured --score magnitude --ratio 0.5 --quantize nf4",
        ),
        ({"method": "semi", "pattern": "4:8"}, f"--method semi --pattern 4:8 {text}"),
        ({"method": "depth", "ratio": "1/4"}, f"--method depth --ratio 1/4 {text}"),
        (
            {"score": "wanda", "keep_first": 1, "samples": 8, "refit": False},
            f"--score wanda --ratio 0.5 --keep-first 1 --samples 8 --no-refit {text}",
        ),
    ]:
        assert planned(config, **changes).next_command == f"loram prune {config.parent} {typed} -o SMALL"
    lone = config.rename(config.with_name("Llama.json"))
    assert planned(lone).next_command == f"loram prune MODEL --ratio 0.5 {text} -o SMALL"


@pytest.mark.parametrize("memory", ["", "abc", "24XB", "-3GiB"])
def test_a_size_that_is_none_is_refused(memory: str, config: Path) -> None:
    with pytest.raises(OptionError, match="expected a size such as 24GiB"):
        planned(config, memory=memory)


def test_what_cannot_be_planned_is_refused(config: Path, tmp_path: Path) -> None:
    for body, error, message in [
        ([], InputError, "is not a JSON object"),
        ({"model_type": "mixtral"}, FamilyError, "mixture of experts"),
        ({"model_type": "loram_llama"}, KindError, "is a small model; plan for the large one"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "awq"}},
            KindError,
            "is quantized; pruning needs",
        ),
        ({"model_type": "llama"}, FamilyError, "hidden_size is missing"),
    ]:
        config.write_text(json.dumps(body))
        with pytest.raises(error, match=message):
            planned(config)
    with pytest.raises(InputError, match="does not exist"):
        planned(tmp_path / "gone")
    with pytest.raises(HubError, match="cannot be reached"):
        planned(Path("nobody/nothing"))


def test_a_small_model_of_the_large_one_s_shapes_is_told_by_its_manifest(
    stock: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its config.json says nothing of masks or bits; prune would refuse what is planned."""
    out = tmp_path / "small"
    prune(PruneOptions(model=str(stock("llama-gqa")), method="semi", score="magnitude", out=str(out)))
    with pytest.raises(KindError, match="is a small model; plan for the large one"):
        planned(out, keep_first=1, keep_last=0)


def test_no_weight_is_read(stock: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_config(stock("phi3-gqa"))))
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    assert planned(tmp_path, keep_first=1, keep_last=0).large.total > 0


@pytest.mark.parametrize(
    ("stored", "asked", "width"),
    [
        ("bfloat16", "bf16", 2),
        ("bfloat16", "fp32", 4),
        ("float16", "bf16", 4),
        ("float16", "fp16", 4),
        ("float32", "bf16", 4),
    ],
)
def test_calibration_computes_in_bf16_only_what_is_stored_so(config: Path, stored: str, asked: str, width: int) -> None:
    """As `BlockRunner` does."""
    raw = json.loads(config.read_text())
    raw.pop("dtype", None)
    config.write_text(json.dumps(raw | {"torch_dtype": stored}))
    block = planned(config, score="wanda", dtype=asked).peaks["prune"].parts["block"]
    assert block == width * count(raw).linear // raw["num_hidden_layers"]


def test_text_is_asked_for_only_where_it_is_looked_at(config: Path) -> None:
    plain = planned(config, score="magnitude", refit=False)
    assert plain.next_command.endswith("--no-refit -o SMALL")
    assert "--calibration" in planned(config, score="magnitude").next_command
