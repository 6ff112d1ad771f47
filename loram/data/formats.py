"""What a data file holds: its format is found from its columns and every row brought to one shape.

A row becomes an `Example`: either running `text`, or `prompt` and `completion`, or chat `messages`.
Each example remembers its place (FILE:LINE), so that every complaint can name it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram.data.readers import PICKLES, READERS, Row, read_rows, suffix_of, type_name
from loram.data.template import alpaca_prompt, question_prompt
from loram.errors import DataError, OptionError

ROLES = ("system", "user", "assistant", "tool", "developer")
KNOWN_FORMATS = (
    "text; prompt, completion; question, answer; messages; instruction, output and perhaps input (alpaca); .txt files"
)


@dataclass(frozen=True)
class Example:
    """One training example: `text`, or `prompt` + `completion`, or `messages`; the rest is None."""

    place: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Source:
    """One file or folder: the format that was found and its examples; `blank` rows were passed over."""

    path: str
    format: str
    rows: tuple[Example, ...]
    blank: int = 0


@dataclass(frozen=True)
class Format:
    """A format's name, the columns that give it away, and how a row of it becomes an example."""

    name: str
    columns: tuple[str, ...]
    build: Callable[[str, dict[str, Any]], Example]
    optional: tuple[str, ...] = ()


def read_source(path: str | Path, columns: str | None = None) -> Source:
    """Every example of one file, or of a folder (its train.* files, else all its data files)."""
    examples: list[Example] = []
    formats: list[str] = []
    blank = 0
    for file in data_files(Path(path)):
        rows = renamed(read_rows(file), parse_columns(columns), file)
        if not rows:
            continue
        found = detect(rows[0][1], file)
        built = [found.build(place, row) for place, row in rows]
        kept = [example for example in built if example.text is None or example.text.strip()]
        name = "documents" if suffix_of(file) == ".txt" else found.name
        formats += [name] if name not in formats else []
        blank += len(built) - len(kept)
        refuse_empty_completions(kept, file)
        examples += kept
    if not examples:
        raise DataError(f"{path} holds no rows" + (f" ({blank} blank ones)" if blank else "") + "; check the file")
    return Source(str(path), " + ".join(formats), tuple(examples), blank)


def read_sources(paths: tuple[str, ...], columns: str | None = None) -> list[Source]:
    """`read_source` of each path; OptionError where none was given."""
    if not paths:
        raise OptionError("no data was given; add --data FILE")
    return [read_source(path, columns) for path in paths]


def data_files(path: Path) -> list[Path]:
    """The files to read, in a fixed order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        hub = str(path).count("/") == 1 and not path.suffix and not str(path).startswith((".", "/", "~"))
        advice = f"; a Hub dataset is fetched with `hf download --repo-type dataset {path}`" if hub else ""
        raise DataError(f"{path} does not exist; check the path given to --data{advice}")
    files = sorted(file for file in path.iterdir() if file.is_file() and suffix_of(file) in READERS)
    files = [file for file in files if not file.name.startswith(".")]
    train = [file for file in files if file.name.split(".")[0].split("-")[0] == "train"]
    if not files:
        pickles = any(file.suffix.lower() in PICKLES for file in path.iterdir())
        raise DataError(
            f"the folder {path} holds no data file ({', '.join(READERS)})"
            + ("; pickles are never opened, convert them to jsonl" if pickles else "")
        )
    return train or files


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
        pairs[role] = column
    return pairs


def known_columns() -> list[str]:
    """Every column that some format reads, sorted."""
    return sorted({name for item in FORMATS for name in item.columns + item.optional})


def renamed(rows: list[Row], mapping: dict[str, str], file: Path) -> list[Row]:
    """Rows holding only the mapped columns under their new names; all rows as they are without a mapping."""
    if not mapping or not rows or suffix_of(file) == ".txt":
        return rows
    missing = [column for column in mapping.values() if column not in rows[0][1]]
    if missing:
        raise DataError(f"{rows[0][0]} has no column {', '.join(missing)} (--columns); it has {', '.join(rows[0][1])}")
    return [(place, {role: row[column] for role, column in mapping.items() if column in row}) for place, row in rows]


def detect(row: dict[str, Any], file: Path) -> Format:
    """The first format whose columns the row has."""
    for item in FORMATS:
        if all(name in row for name in item.columns):
            return item
    raise DataError(
        f"{file} has the columns {', '.join(map(str, row)) or '(none)'}, which is no format loram knows "
        f"({KNOWN_FORMATS}); map them with e.g. --columns prompt=question,completion=answer"
    )


def refuse_empty_completions(examples: list[Example], file: Path) -> None:
    """DataError that names the rows whose completion is empty."""
    empty = [item.place for item in examples if item.completion is not None and not item.completion.strip()]
    if empty:
        lines = ", ".join(place.removeprefix(f"{file}:").removeprefix(f"{file} ") for place in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise DataError(f"{file}: {len(empty)} empty completions (line {lines}{more}); fill or remove these rows")


def text_in(row: dict[str, Any], column: str, place: str) -> str:
    """The text in a column; DataError where the column is missing or holds something else."""
    if column not in row:
        raise DataError(f"{place}: no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
    if not isinstance(row[column], str):
        raise DataError(f"{place}: column {column!r} is a {type_name(row[column])}; expected text")
    return str(row[column])


def build_text(place: str, row: dict[str, Any]) -> Example:
    """Running text."""
    return Example(place, text=text_in(row, "text", place))


def build_completion(place: str, row: dict[str, Any]) -> Example:
    """A prompt and what follows it."""
    return Example(place, prompt=text_in(row, "prompt", place), completion=text_in(row, "completion", place))


def build_answer(place: str, row: dict[str, Any]) -> Example:
    """A question and its answer, as in GSM8K."""
    prompt = question_prompt(text_in(row, "question", place))
    return Example(place, prompt=prompt, completion=text_in(row, "answer", place))


def build_alpaca(place: str, row: dict[str, Any]) -> Example:
    """Instruction, output and perhaps input, in the stock Alpaca wording."""
    context = text_in(row, "input", place) if row.get("input") is not None else ""
    prompt = alpaca_prompt(text_in(row, "instruction", place), context)
    return Example(place, prompt=prompt, completion=text_in(row, "output", place))


def build_messages(place: str, row: dict[str, Any]) -> Example:
    """A chat in OpenAI's form."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: messages is {'empty' if turns == [] else 'a ' + type_name(turns)}; expected turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"{place}, turn {number}"
        if not isinstance(turn, dict):
            raise DataError(f"{where}: a {type_name(turn)}; expected an object with role and content")
        role = text_in(turn, "role", where)
        if role not in ROLES:
            raise DataError(f"{where}: role {role!r}; expected one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": text_in(turn, "content", where)})
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if not answers:
        raise DataError(f"{place}: no assistant turn, so there is nothing to learn from; remove the row")
    if not all(answer.strip() for answer in answers):
        raise DataError(f"{place}: an empty assistant turn; fill it or remove the row")
    return Example(place, messages=tuple(messages))


# The order decides where several match: commonsense sets carry alpaca columns and an `answer`.
FORMATS = (
    Format("messages", ("messages",), build_messages),
    Format("prompt/completion", ("prompt", "completion"), build_completion),
    Format("alpaca", ("instruction", "output"), build_alpaca, optional=("input",)),
    Format("question/answer", ("question", "answer"), build_answer),
    Format("text", ("text",), build_text),
)
