"""Folders, splits, Hub datasets, weights, system turns: what is read from where, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from loram.data import datasets_library
from loram.data.places import Place, parse_place, source_path, split_weight
from loram.data.sources import read_source, read_sources, weighted
from loram.errors import DataError, HubError, OptionError


def jsonl(path: Path, *rows: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(name: str | Path) -> list[str | None]:
    return [row.text for row in read_source(name).rows]


CHAT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_sharegpt_in_both_spellings(tmp_path: Path) -> None:
    rows = ({"conversations": CHAT, "id": 1}, {"conversations": TURNS}, {"conversations": CHAT, "system": None})
    source = read_source(jsonl(tmp_path / "a.jsonl", *rows))
    assert source.format == "sharegpt"
    assert [list(row.messages or ()) for row in source.rows] == [TURNS] * 3


def test_the_system_column_comes_first_unless_there_is_a_system_turn(tmp_path: Path) -> None:
    own = [{"from": "system", "value": "own"}, *CHAT]
    rows = [{"conversations": CHAT, "system": "S"}, {"conversations": own, "system": "S"}, {"conversations": CHAT}]
    name = jsonl(tmp_path / "a.jsonl", *rows)
    found = [[turn["content"] for turn in row.messages or ()] for row in read_source(name, system="given").rows]
    assert found == [["S", "hi", "yo"], ["own", "hi", "yo"], ["given", "hi", "yo"]]


def test_system_is_for_chats(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(OptionError, match=r"--system is for chats .*a\.jsonl is prompt/completion"):
        read_sources((name,), system="S")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 1: from 'alien'; expected one of human"),
        ({"conversations": [{"from": "human", "text": "x"}]}, "turn 1: no column 'value'; it has from, text"),
        ({"conversations": CHAT[:1]}, r"a\.jsonl:1: no assistant turn"),
        ({"conversations": CHAT, "system": 3}, "column 'system' is a number"),
    ],
)
def test_bad_conversations(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_source(jsonl(tmp_path / "a.jsonl", row))


def test_empty_answers_are_named_by_line(tmp_path: Path) -> None:
    good, bad = {"conversations": CHAT}, {"conversations": [CHAT[0], {"from": "gpt", "value": " "}]}
    with pytest.raises(DataError, match=r"a\.jsonl: 2 empty assistant turns \(line 2, 4\); fill or remove"):
        read_source(jsonl(tmp_path / "a.jsonl", good, bad, good, bad))
    empty = [{"prompt": "a", "completion": ""}] * 7
    with pytest.raises(DataError, match=r"7 empty completions \(line 1, 2, 3, 4, 5 and 2 more\)"):
        read_source(jsonl(tmp_path / "b.jsonl", *empty))


def test_optional_and_late_columns_can_be_mapped(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a.jsonl", {"dialog": TURNS}, {"dialog": TURNS, "rules": "R"})
    source = read_source(name, "messages=dialog,system=rules")
    assert [len(row.messages or ()) for row in source.rows] == [2, 3]
    with pytest.raises(OptionError, match="maps messages twice"):
        read_source(name, "messages=dialog,messages=rules")


def test_folders_have_splits_by_file_name(tmp_path: Path) -> None:
    for name in ("train", "test", "val"):
        jsonl(tmp_path / "data" / f"{name}-00000-of-00001.jsonl", {"text": name})
    assert texts(tmp_path) == ["train"]
    assert texts(f"{tmp_path}@test") == ["test"]
    assert texts(f"{tmp_path}@validation") == ["val"]
    with pytest.raises(DataError, match=r"has no split 'other'; its files begin with test, train, val"):
        texts(f"{tmp_path}@other")
    with pytest.raises(DataError, match="is one file and has no splits"):
        texts(f"{tmp_path}/data/val-00000-of-00001.jsonl@test")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["test"].save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "both") == ["train"]
    assert texts(f"{tmp_path}/both@test") == texts(tmp_path / "one") == ["test"]
    assert read_source(f"{tmp_path}/both@test").rows[0].place == f"{tmp_path}/both@test row 1"
    for name, message in (("both@dev", "no split 'dev'; give one of train, test"), ("one@test", "has no splits")):
        with pytest.raises(DataError, match=message):
            texts(f"{tmp_path}/{name}")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"x")
    with pytest.raises(DataError, match="is a damaged saved dataset"):
        texts(tmp_path / "one")


def test_offline_a_hub_id_is_one_sentence() -> None:
    with pytest.raises(HubError, match="someone/nothing is neither a file nor a folder, and the Hub") as caught:
        read_source("someone/nothing:main@test")
    assert caught.value.exit_code == 5


def test_an_unreachable_hub_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(self: Any, name: str, **options: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(HubError, match=r"\(Name or service not known\); check the name, or go online"):
        read_source("someone/nothing")


def test_a_hub_dataset_by_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']")
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}])

    monkeypatch.setattr(datasets_library, "require_reachable", lambda place: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = read_source("openai/gsm8k:main@test")
    assert (source.format, source.rows[0].place) == ("question/answer", "openai/gsm8k@test row 1")
    read_source("openai/gsm8k:main")
    with pytest.raises(DataError, match=r"Config name is missing; name them as openai/gsm8k:CONFIG@SPLIT"):
        read_source("openai/gsm8k")
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", None, "train"),
    ]


def test_how_places_are_read(tmp_path: Path) -> None:
    odd = tmp_path / "a@b=2"
    odd.write_text("x")
    assert parse_place(str(odd)) == Place(str(odd))
    assert split_weight(str(odd), "--data") == (str(odd), 1.0)
    assert parse_place("a/b:c@d") == Place("a/b", "c", "d")
    assert source_path(f"{tmp_path}@test=0.5") == str(tmp_path)
    assert source_path("a/b@test=2") == "a/b@test"
    assert source_path("gone.jsonl=2") == "gone.jsonl"
    for bad, message in (
        ("data/a.jsonl", "does not exist; check the path"),
        ("./a/b", "does not exist"),
        ("a", "does not exist"),
        ("a/b@", "names no split"),
        ("a/b:@test", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            parse_place(bad)


def test_weights_say_how_often_rows_are_seen(tmp_path: Path) -> None:
    names = [jsonl(tmp_path / f"{letter}.jsonl", *({"text": f"{letter}{n}"} for n in range(10))) for letter in "abc"]
    specs = (names[0] + "=2", names[1] + "=0.3", names[2])
    first, second, third = weighted(read_sources(specs, weights=True), seed=1)
    assert [row.text for row in first.rows] == [f"a{n}" for n in range(10)] * 2
    assert len(second.rows) == 3 == len({row.text for row in second.rows})
    assert [row.text for row in third.rows] == [f"c{n}" for n in range(10)]
    again, other = (weighted(read_sources(specs, weights=True), seed)[1].rows for seed in (1, 2))
    assert again == second.rows != other
    with pytest.raises(OptionError, match=r"leaves none of its 10 rows"):
        weighted(read_sources((names[0] + "=0.01",), weights=True), seed=0)
    with pytest.raises(OptionError, match="which only training data has"):
        read_sources(specs)
