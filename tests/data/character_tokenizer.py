"""Tokenizers whose output can be written down by hand: one token per character."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama-kjv"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<unk>")


def make_tokenizer(*, bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with pad == eos, as SmolLM2 has; `bos` puts <s> before every text, as Gemma does."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "é"]
    vocabulary = {token: number for number, token in enumerate((*SPECIALS, *characters))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIALS))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer
