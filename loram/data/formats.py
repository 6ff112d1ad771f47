"""The formats that loram knows: each is told by its columns, and brings a row to one shape.

A row becomes an `Example`: either running `text`, or `prompt` and `completion`, or chat `messages`.
Each example remembers its place (FILE:LINE), so that every complaint can name it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loram.data.readers import type_name
from loram.data.template import alpaca_prompt, question_prompt
from loram.errors import DataError

ROLES = ("system", "user", "assistant", "tool", "developer")
# Who speaks in sharegpt data, in the many spellings that are around.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
KNOWN_FORMATS = (
    "text; prompt, completion; question, answer; messages; conversations (sharegpt); instruction, output and perhaps "
    "input (alpaca); .txt files"
)


@dataclass(frozen=True)
class Example:
    """One training example: `text`, or `prompt` + `completion`, or `messages`; the rest is None."""

    place: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, str], ...] | None = None

    @property
    def answers(self) -> list[str]:
        """What the model is to say; nothing for running text."""
        if self.messages is not None:
            return [turn["content"] for turn in self.messages if turn["role"] == "assistant"]
        return [] if self.completion is None else [self.completion]


@dataclass(frozen=True)
class Format:
    """A format's name, the columns that give it away, and how a row of it becomes an example."""

    name: str
    columns: tuple[str, ...]
    build: Callable[[str, dict[str, Any]], Example]
    optional: tuple[str, ...] = ()


def detect(row: dict[str, Any], place: str) -> Format:
    """The first format whose columns the row has."""
    for item in FORMATS:
        if all(name in row for name in item.columns):
            return item
    raise DataError(
        f"{place} has the columns {', '.join(map(str, row)) or '(none)'}, which is no format loram knows "
        f"({KNOWN_FORMATS}); map them with e.g. --columns prompt=question,completion=answer"
    )


def known_columns() -> list[str]:
    """Every column that some format reads, sorted."""
    return sorted({name for item in FORMATS for name in item.columns + item.optional})


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
    return build_chat(place, row, "messages")


def build_conversations(place: str, row: dict[str, Any]) -> Example:
    """A chat in sharegpt's form."""
    return build_chat(place, row, "conversations")


def build_chat(place: str, row: dict[str, Any], column: str) -> Example:
    """The turns in a column, and before them what a column `system` says, where they have no system turn."""
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: {column} is {'empty' if turns == [] else 'a ' + type_name(turns)}; expected turns")
    messages = [build_turn(turn, f"{place}, turn {number}") for number, turn in enumerate(turns, start=1)]
    if row.get("system") is not None and messages[0]["role"] != "system":
        system = text_in(row, "system", place)
        messages = [{"role": "system", "content": system}, *messages] if system.strip() else messages
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError(f"{place}: no assistant turn, so there is nothing to learn from; remove the row")
    return Example(place, messages=tuple(messages))


def build_turn(turn: Any, where: str) -> dict[str, str]:
    """One turn: role and content, or sharegpt's from and value."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: a {type_name(turn)}; expected an object with role and content, or from and value")
    if "from" in turn and "role" not in turn:
        speaker = text_in(turn, "from", where)
        if speaker not in SPEAKERS:
            raise DataError(f"{where}: from {speaker!r}; expected one of {', '.join(SPEAKERS)}")
        return {"role": SPEAKERS[speaker], "content": text_in(turn, "value", where)}
    role = text_in(turn, "role", where)
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r}; expected one of {', '.join(ROLES)}")
    return {"role": role, "content": text_in(turn, "content", where)}


# The order decides where several match: commonsense sets carry alpaca columns and an `answer`.
FORMATS = (
    Format("messages", ("messages",), build_messages, optional=("system",)),
    Format("sharegpt", ("conversations",), build_conversations, optional=("system",)),
    Format("prompt/completion", ("prompt", "completion"), build_completion),
    Format("alpaca", ("instruction", "output"), build_alpaca, optional=("input",)),
    Format("question/answer", ("question", "answer"), build_answer),
    Format("text", ("text",), build_text),
)
