"""Stretches of text with and without loss: together they are the row, spaces and split characters included."""

from __future__ import annotations

from character_tokenizer import FIXTURE, SMOLLM2_TEMPLATE, make_tokenizer
from transformers import AutoTokenizer

from loram.data.encoding import EncodedRow, encode_example
from loram.data.formats import Example
from loram.data.masks import Stretch, stretches


def test_a_chat() -> None:
    turns = "{% for m in messages %}{{ m.role[0] + m.content }}<|im_end|>{% endfor %}"
    tokenizer = make_tokenizer(template=turns + "{{ 'a' if add_generation_prompt }}")
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"})
    found = stretches(encode_example(Example("f:1", messages=turns), tokenizer), tokenizer)
    assert found == (Stretch("uHi<|im_end|>a", False), Stretch("Yo<|im_end|>", True))


def test_spaces_at_the_edges_stay() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    row = encode_example(Example("f:1", prompt="And the", completion=" LORD  said\n"), tokenizer)
    found = stretches(row, tokenizer)
    assert "".join(part.text for part in found).endswith("And the LORD  said\n</s>")
    assert found[-1] == Stretch(" LORD  said\n</s>", True)


def test_a_character_split_between_tokens_is_shown_once() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    mask = [False] + [True] * (len(ids) - 1)
    found = stretches(EncodedRow(input_ids=ids, loss_mask=mask), tokenizer)
    assert "".join(part.text for part in found).strip() == "é"


def test_the_smollm2_template_shows_the_answer_only() -> None:
    tokenizer = make_tokenizer(template=SMOLLM2_TEMPLATE)
    turns = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "x"})
    found = stretches(encode_example(Example("f:1", messages=turns), tokenizer), tokenizer)
    assert [part.text for part in found if part.loss] == ["x<|im_end|>"]
