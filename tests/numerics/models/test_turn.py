"""The trained turn is the chat template's own: families, thoughts, dates, limits, templates that lose a text."""

from __future__ import annotations

import datetime
import pickle
import time
from typing import Any

import pytest

from coalign.config import ModelTable
from coalign.errors import UserError
from coalign.limited_call import TooMuchError, call_limited
from coalign.models.chat_template import ChatTemplate
from coalign.models.codec import Codec
from coalign.prompts import SystemPrompt
from numerics.models import templates
from numerics.models.test_codec import make_tokenizer

HARMONY_TOKENS = ("<|channel|>", "<|message|>", "<|end|>", "<|return|>")
OFF = [
    *(
        "CHATML",
        "CHATML_WITH_SYSTEM",
        "LLAMA_2",
        "LLAMA_3",
        "LLAMA_31",
        "MISTRAL",
        "GEMMA",
        "PHI_3",
        "ZEPHYR",
        "VICUNA",
    ),
    *("ALPACA", "COMMAND_R", "GRANITE", "QWEN_3", "FORGETS_THOUGHTS", "THINKS_BY_DEFAULT", "HARMONY", "GLM"),
    "DEEPSEEK_V31",
    "NO_GENERATION_PROMPT",
]


def codec_of(name: str, thinking: str = "off", **more: Any) -> Codec:
    tokenizer = make_tokenizer(getattr(templates, name, name))
    tokenizer.add_special_tokens({"additional_special_tokens": list(HARMONY_TOKENS)}, False)
    return Codec(tokenizer, ModelTable.model_validate({"thinking": thinking}), **more)


def text_of(codec: Codec, ids: list[int]) -> str:
    text: str = codec.tokenizer.decode(ids)
    return text


@pytest.mark.parametrize("name", OFF)
def test_a_trained_turn_is_the_templates_own(name: str) -> None:
    """Prompt and answer join to what the template renders, but for white space around the answer."""
    codec = codec_of(name, date="2026-12-01")
    conversation = [{"role": "user", "content": "Two and\n two?"}, {"role": "assistant", "content": "Four"}]
    template = ChatTemplate(codec.tokenizer, "", "2026-12-01")
    whole = template.render(conversation, **codec.turn.options)
    joined = text_of(codec, codec.encode_prompt("Two and\n two?") + codec.encode_answer("Four"))
    squeezed = ["".join(text.split()).removeprefix("<s>") for text in (whole, joined)]
    if name == "FORGETS_THOUGHTS" or name == "THINKS_BY_DEFAULT":  # an empty thought that only a prompt has
        squeezed[1] = squeezed[1].replace("<think></think>", "")
    if name in ("ALPACA", "GLM"):  # their answers end without a token, so EOS is trained
        squeezed[1] = squeezed[1].removesuffix("</s>")
    assert squeezed[0].startswith(squeezed[1]) and codec.encode_request("a?") == codec.encode_prompt("a?")


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("HARMONY", "<|start|>assistant<|channel|>final<|message|>"),
        ("QWEN_3", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("THINKS_BY_DEFAULT", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("NO_GENERATION_PROMPT", "<|assistant|>\n"),
        ("LLAMA_2", "a? [/INST]"),
    ],
)
def test_a_prompt_ends_where_an_answer_without_thought_begins(name: str, prompt: str) -> None:
    codec = codec_of(name)
    assert text_of(codec, codec.encode_prompt("a?")).endswith(prompt)


@pytest.mark.parametrize(
    ("name", "prompt", "request_end"),
    [
        ("R1", "<|Assistant|>", "<|Assistant|><think>\n"),
        ("QWEN_3_THINKING", "<think>\n\n</think>\n\n", "<|im_start|>assistant\n<think>\n"),
        ("QWEN_3", "<think>\n\n</think>\n\n", "<|im_start|>assistant\n"),
        ("HARMONY", "<|channel|>final<|message|>", "<|start|>assistant"),
        ("DEEPSEEK_V31", "<|Assistant|></think>", "<|Assistant|><think>"),
        ("GLM", "<|assistant|>\n<think></think>\n", "<|assistant|>"),
        ("FORGETS_THOUGHTS", "<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("THINKS_BY_DEFAULT", "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"),
        ("LLAMA_3", "assistant<|stop|>\n\n", "assistant<|stop|>\n\n"),
    ],
)
def test_strip_samples_with_a_thought_and_trains_without(name: str, prompt: str, request_end: str) -> None:
    codec = codec_of(name, "strip")
    assert text_of(codec, codec.encode_prompt("a?")).endswith(prompt)
    assert text_of(codec, codec.encode_request("a?")).endswith(request_end)


@pytest.mark.parametrize("name", ["R1", "QWEN_3_THINKING"])
def test_a_model_that_always_thinks_needs_a_choice(name: str) -> None:
    with pytest.raises(UserError, match=r'always opens a thought.*model\.thinking="off" can\'t be.*"strip"'):
        codec_of(name)


@pytest.mark.parametrize("name", ["R1", "HARMONY"])
def test_keep_is_refused_where_the_template_drops_thoughts(name: str) -> None:
    with pytest.raises(UserError, match=r'does not keep the thought.*model\.thinking="keep" can\'t be'):
        codec_of(name, "keep")


def test_kept_thoughts_belong_to_the_answer() -> None:
    """An answer without a thought gets the template's empty one; with a thought it is trained as it was sampled."""
    codec = codec_of("QWEN_3_THINKING", "keep")
    assert text_of(codec, codec.encode_prompt("a?")).endswith("<think>\n")
    assert text_of(codec, codec.encode_answer("Four")) == "\n</think>\n\nFour<|im_end|>"
    thought = "2 and 2\n</think>\n\nFour"
    assert text_of(codec, codec.encode_answer(thought)) == f"{thought}<|im_end|>"
    assert codec.describe_answer(codec.encode_plain(thought), True)["text"] == thought


@pytest.mark.parametrize(
    ("name", "said", "answer"),
    [
        ("R1", "2 and 2\n</think>\n\nFour", "Four"),
        ("R1", "2 and 2 </think> no, </think>Four", "Four"),
        ("R1", "2 and 2 makes", ""),
        ("R1", "", ""),
        ("R1", "a</think><think>b", ""),
        ("QWEN_3", "<think>\n2 and 2\n</think>\n\nFour", "Four"),
        ("QWEN_3", "<think>\n2 and 2", ""),
        ("QWEN_3", "Four", "Four"),
        ("LLAMA_3", "[THINK]2[/THINK]Four", "Four"),
        ("LLAMA_3", "a < b and c</d>", "a < b and c</d>"),
        (
            "HARMONY",
            "<|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant<|channel|>final<|message|>Four",
            "Four",
        ),
        ("HARMONY", "<|channel|>analysis<|message|>2 and", ""),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_thought_is_taken_off(name: str, said: str, answer: str, finished: bool) -> None:
    """What is left is the answer; a thought that did not end leaves nothing. Tokens are those of what is left."""
    codec = codec_of(name, "strip")
    found = codec.describe_answer(codec.tokenizer(said, add_special_tokens=False).input_ids, finished)
    assert found["text"] == answer and found["finish"] == ("stop" if finished else "length")
    assert found["num_tokens"] <= len(codec.encode_plain(f"\n\n{answer}")) + finished
    if not answer:
        assert found["num_tokens"] == finished


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LOSES_USER", "drops the user's message"),
        ("UPPER", "alters the assistant's answer"),
        ("ESCAPES", "alters the user's message"),
        ("ONE_LINE", "alters the user's message"),
        ("CUTS", "alters the user's message"),
        ("TWICE", "repeats the assistant's answer"),
        ("OTHER_TURN", "writes an answer otherwise than it asks for one.*Sure"),
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{% for i in range(999999999) %}{% endfor %}", "OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ [1][7].x }}", "has no"),
        ("{{ 'a'.encode('nosuch') }}", "LookupError"),
    ],
)
@pytest.mark.parametrize("thinking", ["off", "strip", "keep"])
def test_a_template_that_loses_a_text_or_fails_is_one_line(name: str, said: str, thinking: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        codec_of(name, thinking)
    text = str(raised.value)
    assert "\n" not in text and len(text) < 700 and "model.chat_template" in text


def test_a_message_that_only_later_is_altered_is_refused() -> None:
    """A text that no check at start could foresee, also one with a special token in it."""
    codec = codec_of(templates.CHATML.replace("m['content']", "m['content'] | replace('cat', 'dog')"))
    assert "a bird" in text_of(codec, codec.encode_prompt("a bird"))
    with pytest.raises(UserError, match="alters the message 'a cat'"):
        codec.encode_prompt("a cat")


def test_several_templates_without_a_default_are_one_line() -> None:
    tokenizer = make_tokenizer(templates.CHATML)
    tokenizer.chat_template = {"rag": templates.CHATML, "tool_use": templates.CHATML}
    with pytest.raises(UserError, match=r"multiple chat templates.*model\.chat_template"):
        Codec(tokenizer, ModelTable())
    tokenizer.chat_template = {"default": templates.CHATML, "tool_use": templates.UPPER}
    assert Codec(tokenizer, ModelTable()).end_of_turn == "<|im_end|>"


@pytest.mark.parametrize(
    ("waste", "said"),
    [
        ("{{ 'x' * 10**10 }}", "memory"),
        ("{% set a = 'x' * 10**10 %}", "memory"),
        ("{{ 'x' * 10**8 }}", "characters"),
        ("{% for m in messages if m['content'] | length > 9999 %}{{ 'x'.ljust(10**10) }}{% endfor %}", "memory"),
    ],
)
def test_a_template_that_wastes_memory_is_refused(waste: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        codec_of(templates.CHATML + waste)


def test_a_template_without_end_is_refused() -> None:
    """Two nested loops over 10**10 rounds in all."""
    started, before = time.monotonic(), time.process_time()
    with pytest.raises(TooMuchError, match="more than 1 seconds"):
        call_limited(lambda: sum(1 for _ in range(10**10)), cpu_seconds=1)
    assert time.monotonic() - started < 60 and time.process_time() - before < 1


def test_a_call_with_limits_returns_what_the_function_does() -> None:
    assert call_limited(lambda: {"a": ["x" * 10**6, None]}) == {"a": ["x" * 10**6, None]}
    with pytest.raises(TooMuchError):
        call_limited(lambda: 1 // 0)


DATES = "{{ strftime_now('%d %B %Y|%-d|%Y-%m-%d|%H') }}"


@pytest.mark.parametrize("name", ["LLAMA_31", "GRANITE", "HARMONY", f"\n  {DATES}{templates.CHATML}"])
def test_a_date_is_that_of_the_run(name: str) -> None:
    """It decides prompts and the digest; a template without a date has the digest that it had before."""
    first, again, other = (codec_of(name, date=day) for day in ("2026-12-01", "2026-12-01", "2027-01-09"))
    assert first.encode_prompt("a?") == again.encode_prompt("a?") != other.encode_prompt("a?")
    assert first.digest() == again.digest() != other.digest()
    assert codec_of(name).encode_prompt("a?") == codec_of(
        name, date=datetime.datetime.now(datetime.UTC).date().isoformat()
    ).encode_prompt("a?")


def test_every_part_of_a_date_is_as_the_clock_writes_it() -> None:
    codec = codec_of(f"\n  {DATES}{templates.CHATML}", date="2026-12-01")
    assert text_of(codec, codec.encode_prompt("a?")).startswith("\n  01 December 2026|1|2026-12-01|00<|im_start|>user")


def test_the_digest_is_as_before_where_nothing_new_decides() -> None:
    """Rows that an older coalign encoded are read again."""
    from coalign.runs.digests import digest_value

    codec = codec_of("CHATML", date="2026-12-01")
    rules = codec.tokenizer.backend_tokenizer.to_str()
    own = [codec.tokenizer.chat_template, codec.bos_id, codec.end_of_turn_id, codec.max_tokens]
    assert codec.digest() == digest_value([type(codec.tokenizer).__name__, rules, *own])
    assert codec.digest() != codec_of("CHATML", "strip").digest()


def test_a_tokenizer_that_makes_no_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    empty.chat_template = templates.CHATML
    with pytest.raises(UserError, match="makes no tokens of a text"):
        Codec(empty, ModelTable())


def test_the_sources_own_stops_are_obeyed() -> None:
    codec = codec_of("CHATML", source_stops=[7, 5, 10**6])
    assert codec.stop_ids == [2, 4, 5, 7] and codec.ends == [4, 2, 5, 7]


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("CHATML", "<|im_start|>system\nBe <b>.<|im_end|>\n<|im_start|>user\nice?<|im_end|>"),
        ("CHATML_WITH_SYSTEM", "<|im_start|>system\nBe <b>.<|im_end|>\n<|im_start|>user\nice?"),
        ("LLAMA_2", "<s>[INST] <<SYS>>\nBe <b>.\n<</SYS>>\n\nice? [/INST]"),
        ("HARMONY", "Instructions\n\nBe <b>.<|end|><|start|>user<|message|>ice?<|end|>"),
        ("R1", "<s>Be <b>.<|User|>ice?<|Assistant|>"),
        ("MISTRAL", "<s>[INST] Be <b>.\n\nice?[/INST]"),
        ("GEMMA", "<s><|start|>user\nBe <b>.\n\nice?<|eot|>"),
        ("ALPACA", "### Instruction:\nBe <b>.\n\nice?\n\n"),
    ],
)
@pytest.mark.parametrize("word", ["<b>", "<s>"])
def test_a_system_message_stays_one_where_the_template_has_it(name: str, begin: str, word: str) -> None:
    """Elsewhere it opens the user's message; a special token in it stays text."""
    codec = codec_of(name, "strip" if name == "R1" else "off")
    prompt = SystemPrompt(f"Be {word}.", "ice?")
    assert pickle.loads(pickle.dumps(prompt)).user == "ice?" and prompt == f"Be {word}.\n\nice?"
    ids = codec.encode_prompt(prompt)
    assert begin.replace("<b>", word) in text_of(codec, ids)
    assert ids.count(1) == (1 if codec.bos_id is not None else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loops",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for a in m.content %}{% for b in m.content %}{% endfor %}{% endfor %}{% endfor %}",
    ],
)
def test_nested_loops_end(loops: str) -> None:
    """Also those over the characters of a message, which are short in a short one."""
    with pytest.raises(UserError, match=r"more than 5 seconds.*model\.chat_template"):
        codec_of(templates.CHATML + loops)
