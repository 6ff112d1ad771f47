"""Prompt texts that are fixed by convention rather than by a tokenizer."""

from __future__ import annotations

# Stanford Alpaca's own wording: models fine-tuned on alpaca data expect it to the letter.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The stock Alpaca prompt, with or without an input."""
    if context.strip():
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def question_prompt(question: str) -> str:
    """A question on its own line, the answer below it (GSM8K)."""
    return question + "\n"
