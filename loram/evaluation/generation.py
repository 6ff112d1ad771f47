"""Greedy exact match: does the model write the completion that the data holds?

Text is compared stripped. Where the completion ends in GSM8K's `#### number`, only the final numbers
are compared, as that benchmark does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loram.data.encoding import encode_example
from loram.data.formats import Example
from loram.errors import DataError
from loram.progress import SILENT, Progress

FINAL_NUMBER = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")


@dataclass(frozen=True)
class Question:
    """The tokens that the model is given, and the text it should go on with."""

    prompt: tuple[int, ...]
    answer: str


def questions(examples: Sequence[Example], tokenizer: Any) -> list[Question]:
    """A question per row that has an answer; DataError where the data is plain text."""
    usable = [question(example, tokenizer) for example in examples if example.text is None]
    if not usable:
        raise DataError("--generate needs rows with answers (prompt/completion or messages); the data is plain text")
    return usable


def question(example: Example, tokenizer: Any) -> Question:
    """One row, encoded as for training: its last stretch of tokens with loss is the answer, what precedes the prompt.

    So the model is asked with the very tokens that it was trained on, also where a token spans the boundary.
    """
    row = encode_example(example, tokenizer)
    ids, mask = row["input_ids"], row["loss_mask"]
    end = len(mask) - mask[::-1].index(True)
    start = end - next((i for i, carries in enumerate(reversed(mask[:end])) if not carries), end)
    return Question(tuple(ids[:start]), str(tokenizer.decode(ids[start:end], skip_special_tokens=True)))


def exact_match(
    model: Any, tokenizer: Any, asked: Sequence[Question], batch: int, new_tokens: int, progress: Progress = SILENT
) -> float:
    """Share of the questions answered exactly."""
    model.eval()
    right = 0
    order = sorted(asked, key=lambda item: len(item.prompt), reverse=True)
    progress.begin("generate", len(order))
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        written = answers(model, tokenizer, group, new_tokens)
        right += sum(same_answer(text, item.answer) for text, item in zip(written, group, strict=True))
        progress.advance(len(group), accuracy=right / (start + len(group)))
    progress.end()
    return right / len(order)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, group: Sequence[Question], new_tokens: int) -> list[str]:
    """What the model writes greedily after each prompt; left padding, so that all write at the right end."""
    device = model.get_input_embeddings().weight.device
    end = tokenizer.eos_token_id
    prompts = [list(item.prompt) for item in group]
    longest = max(map(len, prompts))
    ids = torch.tensor([[end or 0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    written = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy(model, end, new_tokens))
    return [str(text) for text in tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)]


def greedy(model: Any, end: int | None, new_tokens: int) -> Any:
    """Greedy decoding that stops at any of the model's end tokens, whatever else the model's own config says."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else []
    stops = {*(ends if isinstance(ends, list) else [ends]), *([] if end is None else [end])}
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=end or 0,
    )


def same_answer(written: str, wanted: str) -> bool:
    """Equal text, or equal final numbers where the wanted answer ends in one."""
    number = final_number(wanted)
    if number is not None:
        return final_number(written) == number
    return written.strip() == wanted.strip()


def final_number(text: str) -> float | None:
    """The number after the last `####`."""
    found = FINAL_NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
