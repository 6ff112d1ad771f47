"""Loss masks against hand-made expectations: with and without BOS, pad == eos, chats, cuts."""

from __future__ import annotations

from typing import Any

import pytest
from character_tokenizer import FIXTURE, SMOLLM2_TEMPLATE, make_tokenizer
from transformers import AutoTokenizer

from loram.data.chat import changed_turns
from loram.data.collate import collate
from loram.data.encoding import EncodedRow, encode, encode_example, within_context
from loram.data.formats import Example
from loram.data.sources import Source
from loram.data.summary import stop_tokens
from loram.errors import DataError


def learnt(tokenizer: Any, row: EncodedRow) -> str:
    """The tokens that carry loss, as text."""
    ids = [token for token, carries in zip(row["input_ids"], row["loss_mask"], strict=True) if carries]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def tokens(tokenizer: Any, row: EncodedRow) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(row["input_ids"]))


def source(*rows: Example) -> Source:
    return Source("data.jsonl", "text", rows)


def test_text_without_bos() -> None:
    tokenizer = make_tokenizer()
    row = encode_example(Example("f:1", text="abc"), tokenizer)
    assert tokens(tokenizer, row) == ["a", "b", "c", "<|im_end|>"]
    assert row["loss_mask"] == [False, True, True, True]


def test_text_with_bos() -> None:
    tokenizer = make_tokenizer(bos=True)
    row = encode_example(Example("f:1", text="abc"), tokenizer)
    assert tokens(tokenizer, row) == ["<s>", "a", "b", "c", "<|im_end|>"]
    assert row["loss_mask"] == [False, True, True, True, True]


@pytest.mark.parametrize("bos", [False, True])
def test_completion_and_eos_carry_loss_and_nothing_else(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    row = encode_example(Example("f:1", prompt="ab", completion="cd"), tokenizer)
    assert tokens(tokenizer, row) == ["<s>"] * bos + ["a", "b", "c", "d", "<|im_end|>"]
    assert row["loss_mask"] == [False] * bos + [False, False, True, True, True]


def test_an_eos_already_there_is_not_doubled() -> None:
    tokenizer = make_tokenizer()
    row = encode_example(Example("f:1", prompt="ab", completion="c<|im_end|>"), tokenizer)
    assert tokens(tokenizer, row) == ["a", "b", "c", "<|im_end|>"]
    assert row["loss_mask"] == [False, False, True, True]


def test_eos_inside_the_prompt_carries_no_loss_though_pad_is_eos() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = encode_example(Example("f:1", prompt="a<|im_end|>", completion="c"), tokenizer)
    batch = collate([row, encode_example(Example("f:2", prompt="ab", completion="cdef"), tokenizer)])
    end = tokenizer.eos_token_id
    assert batch["labels"][0].tolist() == [-100, -100, row["input_ids"][2], end, -100, -100, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert batch["labels"][1].tolist()[-1] == end


def test_a_token_over_the_boundary_belongs_to_the_completion() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    row = encode_example(Example("f:1", prompt="And t", completion="he LORD"), tokenizer)
    whole = tokenizer("And the LORD")["input_ids"]
    assert row["input_ids"] == [*whole, tokenizer.eos_token_id]
    assert learnt(tokenizer, row) == " the LORD</s>"
    spanning = [
        Example("f:1", prompt="And t", completion="he LORD"),
        Example("f:2", prompt="And", completion=" the LORD"),
    ]
    _, summary = encode([source(*spanning)], tokenizer, 64)
    assert summary.joined == 1
    assert "in 1 rows one token spans the end of the prompt" in str(summary)


def test_pieces_for_a_tokenizer_without_offsets() -> None:
    tokenizer = make_tokenizer(bos=True)
    expected = encode_example(Example("f:1", prompt="ab", completion="cd"), tokenizer)

    class Slow:
        is_fast = False
        eos_token_id, bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return tokenizer(text, **options)

    assert encode_example(Example("f:1", prompt="ab", completion="cd"), Slow()) == expected


CHAT = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo\n"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
)


def test_chat_loss_is_on_assistant_turns_with_their_end_marks() -> None:
    tokenizer = make_tokenizer(template=SMOLLM2_TEMPLATE)
    row = encode_example(Example("f:1", messages=CHAT), tokenizer)
    assert learnt(tokenizer, row) == "Yo\n<|im_end|>So long<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(list(CHAT), tokenize=False)


def test_chat_with_system_prompt_and_equal_words_in_both_mouths() -> None:
    tokenizer = make_tokenizer(template=SMOLLM2_TEMPLATE)
    chat = ({"role": "system", "content": "x"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"})
    row = encode_example(Example("f:1", messages=chat), tokenizer)
    assert learnt(tokenizer, row) == "x<|im_end|>"
    assert sum(row["loss_mask"]) == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; use an instruct model"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this chat: roles must alternate"),
        ("{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}", "rewrites turn 2"),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=f"f:1: .*{message}"):
        encode_example(Example("f:1", messages=CHAT), make_tokenizer(template=template))


def test_rows_are_cut_counted_and_dropped() -> None:
    tokenizer = make_tokenizer()
    rows = (
        Example("f:1", prompt="ab", completion="c"),
        Example("f:2", prompt="ab", completion="cdefg"),
        Example("f:3", prompt="abcdefgh", completion="i"),
    )
    encoded, summary = encode([source(*rows)], tokenizer, 5)
    assert [len(row["input_ids"]) for row in encoded] == [4, 5]
    assert (summary.rows, summary.cut, summary.dropped, summary.tokens, summary.loss_tokens) == (2, 1, 1, 9, 5)
    assert summary.lengths == (8, 10, 10, 10, 10)
    assert "56% carry loss" in str(summary)
    assert "1 rows are longer than --max-length 5 and were cut; 1 more have no loss left" in str(summary)


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match=r"none of the 1 rows of data\.jsonl.*longest row has 7 tokens.*raise"):
        encode([source(Example("f:1", prompt="abcde", completion="f"))], make_tokenizer(), 5)


def test_the_context_length_bounds_the_rows() -> None:
    assert within_context(512, {"max_position_embeddings": 256}) == 256
    assert within_context(128, {"max_position_embeddings": 256}) == 128
    assert within_context(128, {}) == 128


LLAMA2_TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def test_rows_too_long_are_dropped_if_asked() -> None:
    tokenizer = make_tokenizer()
    rows = (Example("f:1", text="abc"), Example("f:2", text="abcdefgh"), Example("f:3", prompt="abcd", completion="e"))
    encoded, summary = encode([source(*rows)], tokenizer, 5, long="drop")
    assert [len(row["input_ids"]) for row in encoded] == [4]
    assert (summary.rows, summary.cut, summary.too_long, summary.dropped) == (1, 0, 2, 0)
    assert "2 rows are longer than --max-length 5 and were dropped" in str(summary)
    with pytest.raises(DataError, match=r"none of the 1 rows of data\.jsonl .* is within --max-length 5"):
        encode([source(rows[1])], tokenizer, 5, long="drop")


def test_every_source_must_have_a_usable_row() -> None:
    good, bad = (
        source(Example("f:1", text="abc")),
        Source("b.jsonl", "x", (Example("b.jsonl:7", prompt="abcdef", completion="g"),)),
    )
    with pytest.raises(DataError, match=r"none of the 1 rows of b\.jsonl \(line 7\) has a token with loss"):
        encode([good, bad], make_tokenizer(), 5)


def test_the_end_of_a_turn_is_in_the_loss_and_ends_generation() -> None:
    tokenizer = make_tokenizer(template=SMOLLM2_TEMPLATE)
    _, summary = encode([source(Example("f:1", messages=CHAT))], tokenizer, 999)
    assert summary.endings is not None
    assert (summary.endings.token, summary.endings.right) == ("<|im_end|>", True)
    assert summary.remarks() == []
    (other,) = tokenizer.convert_tokens_to_ids(["<|endoftext|>"])
    _, summary = encode([source(Example("f:1", messages=CHAT))], tokenizer, 999, stops=[other])
    assert "1 rows do not teach the model to stop: their loss ends in '<|im_end|>', but generation ends at" in str(
        summary
    )
    _, summary = encode([source(Example("f:1", messages=CHAT))], tokenizer, 999, stops=[other, tokenizer.eos_token_id])
    assert summary.remarks() == []


def test_a_template_without_an_end_mark_is_noticed() -> None:
    tokenizer = make_tokenizer(template=LLAMA2_TEMPLATE)
    _, summary = encode([source(Example("f:1", messages=CHAT))], tokenizer, 999)
    assert "do not teach the model to stop: their loss ends in 'g'" in str(summary)


def test_cut_rows_are_not_asked_for_an_end() -> None:
    _, summary = encode([source(Example("f:1", text="abcdef"))], make_tokenizer(), 4)
    assert (summary.cut, summary.endings) == (1, None)


def test_stop_tokens_of_a_model_folder(tmp_path: Any) -> None:
    tokenizer = make_tokenizer()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    assert stop_tokens(tmp_path, tokenizer) == {7, 8, 9, tokenizer.eos_token_id}
    assert stop_tokens(tmp_path / "gone", tokenizer) == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content + '\n' if m.role != 'system' }}{% endfor %}",
            "drops or rewrites the words of a system turn",
        ),
        (
            "{% for m in messages %}{{ m.content + '\n' if m.role != 'system' }}{% endfor %}{{ messages[0].content }}",
            "puts a user turn before one that it follows",
        ),
    ],
)
def test_templates_that_drop_or_move_a_turn_are_named(template: str, message: str) -> None:
    tokenizer = make_tokenizer(template=template)
    chat = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    found = changed_turns(tokenizer.apply_chat_template([*chat], tokenize=False), chat)
    assert found == (message,)
    if message.startswith("drops"):
        answered = (*chat, {"role": "assistant", "content": "Yo"})
        _, summary = encode([source(*(Example(f"f:{n}", messages=answered) for n in (1, 2)))], tokenizer, 99)
        assert "template drops or rewrites the words of a system turn in 2 rows (first f:1)" in str(summary)


def test_a_template_that_drops_the_answer_is_refused() -> None:
    tokenizer = make_tokenizer(template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match=r"f:1: .*drops the words of turn 2 \(assistant\)"):
        encode_example(Example("f:1", messages=CHAT[:2]), tokenizer)
