"""Files, folders and Hub datasets into examples: columns mapped, format found, empty answers refused.

Weights say how often the rows of a source are seen in a pass: `a.jsonl=2` twice, `b.jsonl=0.5` a random half
of them, drawn with the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loram.data.datasets_library import hub_rows, is_saved_dataset, saved_rows
from loram.data.formats import Example, detect, known_columns
from loram.data.places import Place, parse_place, split_weight
from loram.data.readers import PICKLES, READERS, Row, read_rows, suffix_of
from loram.errors import DataError, OptionError

ALIASES = {"validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}


@dataclass(frozen=True)
class Source:
    """One file, folder or dataset: the format that was found and its examples; `blank` rows were passed over."""

    path: str
    format: str
    rows: tuple[Example, ...]
    blank: int = 0
    weight: float = 1.0


def read_sources(
    specs: Sequence[str], columns: str | None = None, system: str | None = None, *, weights: bool = False
) -> list[Source]:
    """`read_source` of each; OptionError where none was given, or a weight where `weights` have no meaning."""
    if not specs:
        raise OptionError("no data was given; add --data FILE")
    found = []
    for spec in specs:
        name, weight = split_weight(spec, "--data")
        if weight != 1.0 and not weights:
            raise OptionError(f"--data {spec} has a weight, which only training data has; give {name}")
        found.append(replace(read_source(name, columns, system), weight=weight))
    return found


def read_source(name: str | Path, columns: str | None = None, system: str | None = None) -> Source:
    """Every example of one file, of a folder (its train.* files, else all its data files) or of a Hub dataset."""
    mapping = parse_columns(columns)
    examples: list[Example] = []
    formats: list[str] = []
    blank = 0
    for origin, is_text, found_rows in row_sets(parse_place(str(name))):
        rows = found_rows if is_text else renamed(found_rows, mapping)
        if not rows:
            continue
        found = detect(rows[0][1], rows[0][0])
        built = [found.build(place, row) for place, row in rows]
        kept = [example for example in built if example.text is None or example.text.strip()]
        format_name = "documents" if is_text else found.name
        formats += [format_name] if format_name not in formats else []
        blank += len(built) - len(kept)
        refuse_empty_answers(kept, origin)
        examples += kept
    if not examples:
        raise DataError(f"{name} holds no rows" + (f" ({blank} blank ones)" if blank else "") + "; check the file")
    source = Source(str(name), " + ".join(formats), tuple(examples), blank)
    return source if system is None else with_system(source, system)


def row_sets(place: Place) -> list[tuple[str, bool, list[Row]]]:
    """(file or dataset, whether it is running text, its rows) for all that a place holds."""
    if not place.on_disk:
        return [(str(place), False, hub_rows(place))]
    path = Path(place.path)
    if path.is_dir() and is_saved_dataset(path):
        return [(str(place), False, saved_rows(path, place.split))]
    return [(str(file), suffix_of(file) == ".txt", read_rows(file)) for file in data_files(path, place.split)]


def with_system(source: Source, system: str) -> Source:
    """The chats with a system turn before those that have none; OptionError where there are no chats."""
    if all(example.messages is None for example in source.rows):
        raise OptionError(
            f"--system is for chats (messages, sharegpt), but {source.path} is {source.format}; "
            "put the text into the prompts instead"
        )
    turn = {"role": "system", "content": system}
    rows = [
        replace(row, messages=(turn, *row.messages)) if row.messages and row.messages[0]["role"] != "system" else row
        for row in source.rows
    ]
    return replace(source, rows=tuple(rows))


def weighted(sources: Sequence[Source], seed: int) -> list[Source]:
    """The sources with each one's rows as often as its weight says; a fraction is a random part, in file order."""
    found = []
    for source in sources:
        whole, part = divmod(source.weight, 1.0)
        count = round(part * len(source.rows))
        drawn = sorted(random.Random(seed).sample(range(len(source.rows)), count))
        rows = source.rows * int(whole) + tuple(source.rows[index] for index in drawn)
        if not rows:
            raise OptionError(f"--data {source.path}={source.weight:g} leaves none of its {len(source.rows)} rows")
        found.append(replace(source, rows=rows))
    return found


def data_files(path: Path, split: str | None = None) -> list[Path]:
    """The files to read, in a fixed order; those of a split by their names (test.jsonl, data/test-00000.parquet)."""
    if path.is_file():
        if split is not None:
            raise DataError(f"{path} is one file and has no splits; give it without @{split}")
        return [path]
    files = listed(path) or listed(path / "data")
    if not files:
        pickles = any(file.suffix.lower() in PICKLES for file in path.iterdir())
        raise DataError(
            f"the folder {path} holds no data file ({', '.join(READERS)})"
            + ("; pickles are never opened, convert them to jsonl" if pickles else "")
        )
    if split is None:
        return [file for file in files if split_name(file) == "train"] or files
    wanted = [file for file in files if split_name(file) in ALIASES.get(split, (split,))]
    if not wanted:
        known = ", ".join(sorted({split_name(file) for file in files}))
        raise DataError(f"the folder {path} has no split {split!r}; its files begin with {known}")
    return wanted


def listed(folder: Path) -> list[Path]:
    """The data files directly in a folder, sorted."""
    if not folder.is_dir():
        return []
    files = (file for file in folder.iterdir() if file.is_file() and suffix_of(file) in READERS)
    return sorted(file for file in files if not file.name.startswith("."))


def split_name(file: Path) -> str:
    """What a file's name begins with: `train` for train.jsonl and train-00000-of-00002.parquet."""
    return file.name.split(".")[0].split("-")[0]


def parse_columns(spec: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer` as {prompt: question, completion: answer}."""
    pairs: dict[str, str] = {}
    for part in (spec or "").split(","):
        if not part.strip():
            continue
        role, separator, column = (piece.strip() for piece in part.partition("="))
        if not separator or not role or not column:
            raise OptionError(f"--columns has {part!r}; expected e.g. prompt=question,completion=answer")
        if role not in known_columns():
            raise OptionError(f"--columns names {role!r}; what can be mapped is {', '.join(known_columns())}")
        if role in pairs:
            raise OptionError(f"--columns maps {role} twice, to {pairs[role]} and {column}; give one")
        pairs[role] = column
    return pairs


def renamed(rows: list[Row], mapping: dict[str, str]) -> list[Row]:
    """Rows holding only the mapped columns under their new names; all rows as they are without a mapping."""
    if not mapping or not rows:
        return rows
    seen = {column for _, row in rows for column in row}
    missing = [column for column in mapping.values() if column not in seen]
    if missing:
        raise DataError(f"{rows[0][0]} has no column {', '.join(missing)} (--columns); it has {', '.join(rows[0][1])}")
    return [(place, {role: row[column] for role, column in mapping.items() if column in row}) for place, row in rows]


def refuse_empty_answers(examples: list[Example], origin: str) -> None:
    """DataError that names the rows with an empty completion or assistant turn."""
    empty = [item.place for item in examples if not all(answer.strip() for answer in item.answers)]
    if empty:
        what = "assistant turns" if any(item.messages for item in examples) else "completions"
        raise DataError(f"{origin}: {len(empty)} empty {what} ({named(empty, origin)}); fill or remove these rows")


def named(places: Sequence[str], origin: str, most: int = 5) -> str:
    """`line 3, 8 and 2 more`: the first few of some places in one file."""
    numbers = [place.removeprefix(origin).removeprefix(":").strip() for place in places[:most]]
    more = f" and {len(places) - most} more" if len(places) > most else ""
    word = "" if numbers[0].startswith("row") else "line "
    return word + ", ".join(numbers) + more
