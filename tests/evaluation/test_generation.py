"""Exact match: how answers are compared, and that batching and padding change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loram.data.formats import Example
from loram.errors import DataError
from loram.evaluation.generation import Question, answers, exact_match, final_number, question, questions, same_answer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
PROMPTS = ("And the LORD said unto", "In the", "For he that", "And it came to pass in those days, that the king")


@pytest.mark.parametrize(
    ("written", "wanted", "same"),
    [
        (" the answer \n", "the answer", True),
        ("the answer.", "the answer", False),
        ("2+2=4\n#### 4", "so it is four\n#### 4", True),
        ("#### 1,234.0", "#### 1234", True),
        ("#### $5", "#### 5", True),
        ("#### 3 then #### 4", "#### 4", True),
        ("4", "#### 4", False),
        ("#### -4", "#### 4", False),
        ("#### 4.", "#### 4", True),
    ],
)
def test_answers_are_compared(written: str, wanted: str, same: bool) -> None:
    assert same_answer(written, wanted) is same


def test_final_numbers() -> None:
    assert final_number("#### .5") == 0.5
    assert final_number("no number") is None


def test_greedy_answers_do_not_depend_on_the_batch() -> None:
    model = AutoModelForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    alone = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(12):  # greedy by hand, without a cache
            following = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following.reshape(1, 1)], dim=1)
        prompt_length = len(tokenizer(prompt)["input_ids"])
        alone.append(tokenizer.decode(ids[0, prompt_length:], skip_special_tokens=True))
    prompts = [tuple(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert answers(model, tokenizer, [Question(prompt, "") for prompt in prompts], 12) == alone
    asked = [Question(prompt, answer) for prompt, answer in zip(prompts, alone, strict=True)]
    asked[1] = Question(prompts[1], "something else")
    assert exact_match(model, tokenizer, asked, 3, 12) == 0.75


def test_questions_are_the_tokens_trained_on() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    whole = tokenizer("And the LORD")["input_ids"]
    clean, spanning = (
        Example("f:1", prompt="And", completion=" the LORD"),
        Example("f:2", prompt="And ", completion="the LORD"),
    )
    expected = Question(tuple(whole[: len(tokenizer("And")["input_ids"])]), " the LORD")
    assert questions([clean, spanning, Example("f:3", text="a")], tokenizer) == [expected, expected]


def test_a_chat_asks_for_its_last_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    contents = ("Who", "he", "Where", "there")
    messages = tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents))
    asked = question(Example("f:1", messages=messages), tokenizer)
    assert tokenizer.decode(asked.prompt) == "u: Who</s>a: he</s>u: Where</s>a:"
    assert asked.answer == " there"


def test_plain_text_asks_nothing() -> None:
    with pytest.raises(DataError, match="--generate needs rows with answers"):
        questions([Example("f:1", text="a")], AutoTokenizer.from_pretrained(FIXTURE))
