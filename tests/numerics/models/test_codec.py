"""codec.Codec: one BOS, a trained end of turn, padding, lengths; over the tokenizers that models come with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from coalign.config import ModelTable
from coalign.errors import UserError
from coalign.models.codec import Codec

TEMPLATES = Path(__file__).resolve().parents[3] / "configs" / "templates"
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
OPEN_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>"]


def make_tokenizer(template: str | None, adds_bos: bool = False, **tokens: str | None) -> Any:
    """Return a byte-level tokenizer; `adds_bos`: it puts <s> before every text, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["hello world"], trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    given = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | tokens
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=100,
        additional_special_tokens=SPECIAL[3:],
        **{k: v for k, v in given.items() if v},
    )
    tokenizer.chat_template = template
    return tokenizer


def token(name: str) -> int:
    return SPECIAL.index(name)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(
    ("template", "has_bos", "end"),
    [
        (LLAMA_2, True, "</s>"),
        (CHATML, False, "<|im_end|>"),
        (LLAMA_3, True, "<|eot|>"),
        (OPEN_END, False, "</s>"),
        (None, True, "</s>"),
        ((TEMPLATES / "vicuna.jinja").read_text(), True, "</s>"),
        ((TEMPLATES / "plain.jinja").read_text(), True, "</s>"),
    ],
    ids=["llama-2", "chatml", "llama-3", "open end", "no template", "vicuna", "plain"],
)
def test_one_bos_and_the_templates_end_of_turn(template: str | None, has_bos: bool, end: str, adds_bos: bool) -> None:
    """A prompt begins with exactly one BOS where model or template have one; an answer ends as the template does."""
    codec = Codec(make_tokenizer(template, adds_bos), ModelTable())
    prompt, answer = codec.encode_prompt("hello world"), codec.encode_answer("hello")
    assert prompt.count(token("<s>")) == (has_bos or adds_bos)
    assert (prompt[0] == token("<s>")) == (has_bos or adds_bos)
    assert codec.end_of_turn_id == token(end) and answer[-1] == token(end) and answer.count(token(end)) == 1
    assert codec.stop_ids == sorted({token(end), token("</s>")})
    assert codec.encode_answer("hello", finished=False) == answer[:-1]
    assert codec.decode(answer) == "hello" and "hello world" in codec.tokenizer.decode(prompt)
    assert codec.max_tokens == 100


def test_prompt_and_answer_join_to_what_the_template_renders() -> None:
    """Prompt ids followed by answer ids are the ids of the rendered conversation."""
    for template in (CHATML, LLAMA_3):
        tokenizer = make_tokenizer(template)
        codec = Codec(tokenizer, ModelTable())
        messages = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "world"}]
        whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
        joined = codec.encode_prompt("hello?") + codec.encode_answer("world")
        assert whole[: len(joined)] == joined


@pytest.mark.parametrize("template", [CHATML, LLAMA_2, LLAMA_3])
def test_special_tokens_in_the_data_stay_text(template: str) -> None:
    """A row that spells out a special token neither begins nor ends a turn, and an answer with one reads back."""
    codec = Codec(make_tokenizer(template), ModelTable())
    special = {i for i, t in codec.tokenizer.added_tokens_decoder.items() if t.special}
    plain, spelt = codec.encode_prompt("say x now"), codec.encode_prompt("say <s>x</s> now")
    assert [i for i in spelt if i in special] == [i for i in plain if i in special]
    answer = codec.encode_answer("a <s>b")
    assert [i for i in answer if i in special] == [codec.end_of_turn_id]
    assert codec.decode(answer[:-1]).replace(" ", "") == "a<s>b"


def test_a_context_beyond_the_models_is_refused() -> None:
    """model.max_tokens may only narrow the context."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.model_max_length = 64
    with pytest.raises(UserError, match=r"model\.max_tokens=65 is more than the model's context of 64"):
        Codec(tokenizer, ModelTable(max_tokens=65))


def test_a_template_that_doubles_the_bos_is_mended() -> None:
    """Two BOS in a row become one."""
    codec = Codec(make_tokenizer("{{ bos_token }}" + LLAMA_2, adds_bos=True), ModelTable())
    assert codec.encode_prompt("x").count(token("<s>")) == 1


def test_a_template_that_eats_the_answer_is_refused() -> None:
    """Nothing could be trained with it, so it names the key that mends it."""
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match=r"drops the assistant's answer.*model\.chat_template"):
        Codec(make_tokenizer(template), ModelTable())


def test_a_tokenizer_without_pad_pads_with_the_end_of_turn(caplog: pytest.LogCaptureFixture) -> None:
    """It is said in the log, and model.pad_token overrides it."""
    with caplog.at_level(logging.INFO, "coalign"):
        codec = Codec(make_tokenizer(CHATML, pad_token=None), ModelTable())
    assert codec.pad_id == token("<|im_end|>") and "no pad token" in caplog.text
    assert Codec(make_tokenizer(CHATML, pad_token=None), ModelTable(pad_token="<s>")).pad_id == token("<s>")
    assert Codec(make_tokenizer(CHATML), ModelTable()).pad_id == token("<pad>")


def test_a_tokenizer_without_eos() -> None:
    """The template's end of turn is enough; without both the key to set is named, and setting it helps."""
    codec = Codec(make_tokenizer(CHATML, eos_token=None), ModelTable())
    assert codec.stop_ids == [token("<|im_end|>")]
    with pytest.raises(UserError, match=r"model\.end_of_turn"):
        Codec(make_tokenizer(OPEN_END, eos_token=None), ModelTable())
    assert Codec(make_tokenizer(OPEN_END, eos_token=None), ModelTable(end_of_turn="<|eot|>")).stop_ids == [
        token("<|eot|>")
    ]


def test_an_eos_with_the_id_zero_stops_too() -> None:
    """Zero is a token id like any other (GPT-NeoX ends a text with it)."""
    codec = Codec(make_tokenizer(CHATML, eos_token="<pad>", pad_token=None), ModelTable())
    assert codec.stop_ids == [0, token("<|im_end|>")]


@pytest.mark.parametrize("key", ["end_of_turn", "pad_token"])
def test_a_token_that_does_not_exist_is_refused(key: str) -> None:
    """A misspelt token is named with its key."""
    with pytest.raises(UserError, match=rf"model\.{key}='<nothing>' is no token"):
        Codec(make_tokenizer(CHATML, unk_token="<pad>"), ModelTable(**{key: "<nothing>"}))
    with pytest.raises(UserError, match=rf"model\.{key}='<nothing>' is no token"):
        Codec(make_tokenizer(CHATML), ModelTable(**{key: "<nothing>"}))


def test_the_context_can_be_set() -> None:
    assert Codec(make_tokenizer(CHATML), ModelTable(max_tokens=40)).max_tokens == 40
