"""Chats through the model's own template, with the places of the assistant's turns.

The template is never edited. A turn's place is found by rendering the chat up to the turn and up to
its end: what the second text has more than the first is what the assistant writes, end mark included.
Turns whose words a template drops or moves are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loram.data.formats import Example
from loram.errors import DataError

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A chat as text, the (start, end) of each assistant turn in it, and what the template did to other turns."""

    text: str
    spans: list[Span]
    notices: tuple[str, ...] = ()


def render(tokenizer: Any, messages: Sequence[dict[str, str]], place: str, *, prompt: bool = False) -> str:
    """The chat as text; with `prompt`, up to where the assistant would begin to write."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{place}: the data holds chats but the tokenizer has no chat template; "
            "use an instruct model, or prompt and completion columns"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # jinja raises whatever a template asks for
        raise DataError(f"{place}: the model's chat template refuses this chat: {error}") from error
    return str(text)


def render_with_spans(tokenizer: Any, example: Example) -> Rendered:
    """The whole chat as text with the places of the assistant's turns."""
    messages = example.messages or ()
    full = render(tokenizer, messages, example.place)
    spans: list[Span] = []
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:number], example.place, prompt=True) if number else ""
        after = render(tokenizer, messages[: number + 1], example.place)
        if not (full.startswith(after) and after.startswith(before)):
            raise DataError(
                f"{example.place}: the model's chat template rewrites turn {number + 1} when others follow it, "
                "so the assistant's words cannot be placed; split the chat into one row per answer"
            )
        words = turn["content"].split()
        if words and words[-1] not in after[len(before) :]:
            raise DataError(
                f"{example.place}: the model's chat template drops the words of turn {number + 1} (assistant), "
                "so they cannot be learnt; change the row, or use prompt and completion columns"
            )
        # The line break that templates put after the end mark is not the assistant's.
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return Rendered(full, spans, changed_turns(full, messages))


def changed_turns(text: str, messages: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """What the template does to turns whose words are not in the text at their place."""
    notices: list[str] = []
    cursor = 0
    for turn in messages:
        words = turn["content"].strip()
        found = text.find(words, cursor)
        if found >= 0:
            cursor = found + len(words)
            continue
        role = turn["role"]
        moved = f"puts a {role} turn before one that it follows"
        notices.append(moved if words in text else f"drops or rewrites the words of a {role} turn")
    return tuple(dict.fromkeys(notices))
