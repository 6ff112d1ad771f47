"""Bad input through the command line: one sentence on stderr, the right exit code, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from small_models import write_adapter, write_small_folder
from stock_models import make, random_kept

import loram.shards
from loram.options import RecoverOptions
from loram.stages.recover import recover

FIXTURE = Path(__file__).parent / "fixtures" / "tiny-llama-kjv"
NAME = "llama-gqa"
SINGLE, INDEX, WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
CUT = "--keep-first 1 --keep-last 0 --method random"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """large, small, trained (by peft alone), recovered, other (a large model), other-small."""
    folder = tmp_path_factory.mktemp("made")
    make(NAME).save_pretrained(folder / "large")
    small = write_small_folder(folder / "large", random_kept(NAME, 2), folder / "small")
    trained = write_adapter(small, folder / "trained", ["q_proj", "up_proj"], 3)
    recover(RecoverOptions(adapter=str(trained), small=str(small), out=str(folder / "recovered")))
    other = make(NAME)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(folder / "other")
    write_small_folder(folder / "other", random_kept(NAME, 5), folder / "other-small")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be damaged, and the current directory."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


class Refusal:
    """Runs a line that must be refused, and looks at what it said and left."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, line: str, code: int, message: str) -> str:
        before = listing(Path.cwd())
        self.capsys.readouterr()
        (script,) = entry_points(group="console_scripts", name="loram")
        found = script.load()(line.split())
        captured = self.capsys.readouterr()
        said = [text for text in captured.err.splitlines() if text.startswith("error: ")]
        assert found == code, captured.err
        assert len(said) == 1, captured.err
        assert captured.err.splitlines()[-1] == said[0]
        assert message in said[0]
        assert "Traceback" not in captured.err
        assert "bug in loram" not in captured.err
        assert captured.out == ""
        assert listing(Path.cwd()) == before, "something was written or removed"
        return said[0]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()} | {
        str(p): (0, 0) for p in folder.rglob("*") if p.is_dir()
    }


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(capsys)


def config(folder: str, **changes: Any) -> None:
    file = Path(folder) / "config.json"
    body = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in body.items() if value is not ...}))


# ---- weights and configs ----

LINES = {
    "prune": f"prune large -o out {CUT}",
    "merge": "merge recovered --base large -o out",
}


@pytest.mark.parametrize("verb", LINES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: Path("large", SINGLE).unlink(), "holds no model.safetensors"),
        (lambda: Path("large", SINGLE).write_bytes(b""), "is empty, truncated, or not safetensors"),
        (lambda: os.truncate(Path("large", SINGLE), 5000), "truncated"),
        (lambda: os.truncate(Path("large", SINGLE), 20), "truncated"),
        (lambda: torch.save({}, Path("large", SINGLE)), "is a pickle, not safetensors"),
        (lambda: Path("large", SINGLE).rename("large/pytorch_model.bin"), "is a pickle, which loram never reads"),
        (
            lambda: Path("large", INDEX).write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}'),
            "names the shard gone.safetensors",
        ),
        (lambda: Path("large", "config.json").unlink(), "config.json does not exist"),
        (lambda: Path("large", "config.json").write_text("{"), "is not valid JSON"),
        (lambda: config("large", hidden_size=...), "hidden_size is missing"),
        (lambda: config("large", model_type="gpt2"), "model_type gpt2 is not in loram's tables"),
        (lambda: config("large", model_type="mixtral"), "mixture of experts"),
        (lambda: shutil.rmtree("large"), "large does not exist"),
    ],
)
def test_damaged_weights_and_configs(
    verb: str, damage: Callable[[], Any], message: str, work: Path, refused: Refusal
) -> None:
    damage()
    refused(LINES[verb], 4, message)


@pytest.mark.parametrize("change", [{"intermediate_size": 39}, {"num_key_value_heads": 4}, {"num_hidden_layers": 4}])
def test_a_config_that_contradicts_the_tensors(change: dict[str, int], work: Path, refused: Refusal) -> None:
    config("large", **change)
    refused(LINES["prune"], 4, "large")


@pytest.mark.parametrize("verb", ["prune", "plan"])
@pytest.mark.parametrize("ratio", ["0", "1", "-1", "nan", "abc", "1.5", "inf"])
def test_impossible_ratios(verb: str, ratio: str, work: Path, refused: Refusal) -> None:
    out = "-o out " if verb == "prune" else ""
    refused(f"{verb} large {out}--ratio={ratio}", 2, "--ratio is")


@pytest.mark.parametrize("verb", ["prune", "plan"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--keep-first 2 --keep-last 1", "leave no layer of 3 to prune"),
        ("--keep-first 9", "leave no layer of 3 to prune"),
        ("--keep-first 1 --keep-last 0 --ratio 0.99", "leaves no MLP channel"),
        ("--keep-first 1 --keep-last 0 --round-to 64", "leaves no MLP channel"),
        ("--keep-first 1 --keep-last 0 --round-to 0", "--round-to is 0"),
        ("--keep-first=-1", "must be 0 or more"),
    ],
)
def test_cuts_that_leave_nothing_or_everything(
    verb: str, flags: str, message: str, work: Path, refused: Refusal
) -> None:
    out = "-o out --method random" if verb == "prune" else ""
    refused(f"{verb} large {out} {flags}", 2, message)


@pytest.mark.parametrize("verb", ["prune", "plan"])
@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--method semi --pattern 0:4", 2, "--pattern 0:4 keeps nothing"),
        ("--method semi --pattern 4:4", 2, "--pattern 4:4 keeps everything"),
        ("--method semi --pattern 2", 2, "expected N:M"),
        ("--method semi --ratio 0.6", 2, "--ratio 0.6 has no use with --method semi"),
        ("--method semi --keep-first 1", 2, "--keep-first 1 has no use with --method semi"),
        ("--method unstructured --pattern 2:4", 2, "--pattern has no use with --method unstructured"),
        ("--method unstructured --score taylor", 2, "--score taylor measures whole heads"),
        ("--score sparsegpt", 2, "--score sparsegpt measures single weights"),
        ("--method given", 2, "--given"),
    ],
)
def test_single_weights(verb: str, flags: str, code: int, message: str, work: Path, refused: Refusal) -> None:
    refused(f"{verb} large {'-o out' if verb == 'prune' else ''} {flags}", code, message)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--method semi --pattern 3:7 --score magnitude", 2, "--pattern 3:7 does not divide model.layers.0.self_attn"),
        ("--method semi --score sparsegpt", 4, "has no usable tokenizer"),
        ("--method given --given large", 4, "is not sparse"),
        ("--method given --given ./gone", 4, "does not exist"),
        ("--method given --given small", 2, "is a small-model that loram wrote"),
    ],
)
def test_single_weights_of_this_model(flags: str, code: int, message: str, work: Path, refused: Refusal) -> None:
    refused(f"prune large -o out {flags}", code, message)


# ---- adapters ----


def rewrite(folder: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = Path(folder, WEIGHTS)
    tensors = {key: value.clone() for key, value in load(file.read_bytes()).items()}
    change(tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, file)


KEY = "base_model.model.model.layers.1.mlp.up_proj"
USES = {
    "recover": ("trained", "recover trained --small small -o out"),
    "project": ("recovered", "project recovered small -o out"),
    "merge": ("recovered", "merge recovered --base large -o out"),
}


@pytest.mark.parametrize("verb", USES)
@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda t: [t.pop(f"{KEY}.lora_{x}.weight") for x in "AB"], 6, "lacks model.layers.1.mlp.up_proj"),
        (lambda t: t.pop(f"{KEY}.lora_A.weight"), 6, "but not the other factor"),
        (
            lambda t: t.update({f"{KEY.replace('1', '8')}.lora_{x}.weight": t[f"{KEY}.lora_{x}.weight"] for x in "AB"}),
            6,
            "model.layers.8.mlp.up_proj",
        ),
        (lambda t: t[f"{KEY}.lora_B.weight"][0].fill_(float("nan")), 6, "holds NaN or Inf"),
        (lambda t: t[f"{KEY}.lora_A.weight"][0].fill_(float("inf")), 6, "holds NaN or Inf"),
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(9, 4)}), 6, "model.layers.1.mlp.up_proj"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(3, 48)}), 6, "with r = 4"),
        (lambda t: t.update({f"{KEY}.magnitude": torch.ones(3)}), 4, "no lora_A or lora_B"),
        (lambda t: t.clear(), 4, "no LoRA adapter"),
    ],
)
def test_damaged_adapters(
    verb: str, change: Callable[[dict[str, torch.Tensor]], Any], code: int, message: str, work: Path, refused: Refusal
) -> None:
    folder, line = USES[verb]
    rewrite(folder, change)
    refused(line, code, message)


@pytest.mark.parametrize("verb", USES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: Path(f, WEIGHTS).unlink(), "the folder is incomplete"),
        (lambda f: Path(f, WEIGHTS).write_bytes(b""), "is empty, truncated"),
        (lambda f: os.truncate(Path(f, WEIGHTS), 3000), "truncated"),
        (lambda f: Path(f, WEIGHTS).rename(Path(f, "adapter_model.bin")), "is a pickle, which loram never reads"),
        (lambda f: torch.save({}, Path(f, WEIGHTS)), "is a pickle, not safetensors"),
        (lambda f: Path(f, "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: Path(f, "adapter_config.json").write_text("[]"), "no JSON object"),
        (lambda f: shutil.rmtree(f), "does not exist"),
    ],
)
def test_broken_adapter_folders(
    verb: str, damage: Callable[[str], Any], message: str, work: Path, refused: Refusal
) -> None:
    folder, line = USES[verb]
    damage(folder)
    refused(line, 4, message)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("merge recovered --base other -o out", 6, "was made for"),
        ("merge trained --base large -o out", 6, "updates model.layers.1"),
        ("merge recovered --base small -o out", 6, "has the weights"),
        ("recover trained --small other-small -o out", 6, "updates a weight of shape"),
        ("project recovered other-small -o out", 6, "other weights"),
        ("recover trained -o out", 2, "add --small FOLDER"),
        ("recover trained --small large -o out", 2, "run `loram prune"),
        ("recover small -o out", 2, "is a small-model"),
        ("project recovered large -o out", 2, "run `loram prune"),
        ("merge small --base large -o out", 2, "is a small-model"),
        ("prune small -o out", 2, "is a small-model"),
        ("plan small", 2, "is a small model; plan for the large one"),
    ],
)
def test_things_that_do_not_belong_together(line: str, code: int, message: str, work: Path, refused: Refusal) -> None:
    refused(line, code, message)


# ---- outputs ----

WRITERS = {
    "prune": (f"prune large -o {{}} {CUT}", "large"),
    "recover": ("recover trained --small small -o {}", "trained"),
    "project": ("project recovered small -o {}", "recovered"),
    "merge": ("merge recovered --base large -o {}", "recovered"),
}


@pytest.mark.parametrize("verb", WRITERS)
def test_outputs_that_are_taken(verb: str, work: Path, refused: Refusal) -> None:
    line, source = WRITERS[verb]
    Path("taken").mkdir()
    Path("taken", "x").write_text("mine")
    refused(line.format("taken"), 2, "exists and is not empty")
    refused(line.format("taken/x"), 2, "is a file")
    refused(line.format("taken/x/out"), 2, "cannot write")
    for extra in ("", " --force"):
        refused(line.format(source) + extra, 2, "is the input")
        refused(line.format(".") + extra, 2, "is the input")


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 3), (errno.EROFS, 2), (errno.EDQUOT, 3)])
def test_a_disk_that_fills_up_or_refuses(
    verb: str, number: int, code: int, work: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def failing(self: Path, *values: Any, **more: Any) -> int:
        if "out.partial" in str(self):
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *values, **more)

    monkeypatch.setattr(Path, "write_text", failing)
    refused(WRITERS[verb][0].format("out"), code, "the disk is full" if code == 3 else "cannot write out")


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_a_disk_that_fills_up_inside_a_shard(
    verb: str, work: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = loram.shards.ShardWriter.write, []

    def failing(self: Any, rows: torch.Tensor) -> None:
        written.append(rows.nbytes)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, rows)

    monkeypatch.setattr(loram.shards.ShardWriter, "write", failing)
    refused(WRITERS[verb][0].format("out"), 3, "the disk is full while writing out")
    assert len(written) == 5


@pytest.mark.parametrize("verb", ["prune", "merge"])
def test_too_little_disk_is_said_before_anything_is_written(
    verb: str, work: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    refused(WRITERS[verb][0].format("out"), 3, "the disk has 9.8 KiB left")


# ---- tokenizer, hub ----


@pytest.mark.parametrize("flags", ["", "--method random --calibration builtin", "--score taylor"])
def test_calibration_needs_a_tokenizer(flags: str, work: Path, refused: Refusal) -> None:
    refused(f"prune large -o out --keep-first 1 --keep-last 0 {flags}", 4, "has no usable tokenizer")


@pytest.mark.parametrize("verb", ["prune", "plan", "merge"])
def test_a_hub_id_while_offline(
    verb: str, work: Path, refused: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = {
        "prune": "prune nobody/nothing -o out",
        "plan": "plan nobody/nothing",
        "merge": "merge recovered --base nobody/nothing -o out",
    }[verb]
    refused(line, 5, "nobody/nothing is neither a folder nor in the Hub cache")
    refused(line.replace("nobody/nothing", "./nothing"), 4, "does not exist")


def test_the_fixture_itself_is_fine(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines above are refused for what was damaged, not for themselves."""
    (script,) = entry_points(group="console_scripts", name="loram")
    for number, (line, _) in enumerate(WRITERS.values()):
        assert script.load()(line.format(f"out{number}").split()) == 0, capsys.readouterr().err
    assert FIXTURE.is_dir()
