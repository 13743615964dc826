"""Prompts: what a request must hold, and rewrites taken out of whatever a model wraps around them."""

from __future__ import annotations

import pytest

from coalign.config import ParaphraseTable
from coalign.prompts import (
    NO,
    NUM_VARIANTS,
    REQUESTS,
    YES,
    correct_question,
    paraphrase_prompt,
    strip_thought,
    type_question,
)
from coalign.wordings.extraction import parse_cut_off, parse_paraphrase
from coalign.wordings.near_repeats import NearRepeats
from coalign.wordings.rewrites import check_rewrite


def test_paraphrase_prompt_holds_instruction_and_labels() -> None:
    prompt = paraphrase_prompt("Say yes or no.", ["yes", "no"], 0)
    assert prompt.endswith("Instruction: Say yes or no.")
    assert "Keep these words: yes, no." in prompt
    assert "Keep these words" not in paraphrase_prompt("Add the numbers.", [], 0)


def test_variants_differ_and_count_round() -> None:
    prompts = [paraphrase_prompt("Add.", [], variant) for variant in range(NUM_VARIANTS)]
    assert len(set(prompts)) == NUM_VARIANTS
    assert paraphrase_prompt("Add.", [], NUM_VARIANTS) == prompts[0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Add both numbers.", "Add both numbers."),
        ("  Add both numbers.\n", "Add both numbers."),
        ("1. Add both numbers.\n2. Sum the two.", "Add both numbers."),
        ("(1) Add both numbers.", "Add both numbers."),
        ("- Add both numbers.", "Add both numbers."),
        ('"Add both numbers."', "Add both numbers."),
        ("“Add both numbers.”", "Add both numbers."),
        ('1. "Add both numbers."', "Add both numbers."),
        ("**Add both numbers.**", "Add both numbers."),
        ("Sure, here is a rewrite:\n\nAdd both numbers.", "Add both numbers."),
        ("Certainly! Here's the rewritten instruction:\nAdd both numbers.", "Add both numbers."),
        ("Sure!\nAdd both numbers.", "Add both numbers."),
        ("Sure, here is a paraphrase: Add both numbers.", "Add both numbers."),
        ("Rewritten instruction: Add both numbers.", "Add both numbers."),
        ("Instruction: Add both numbers.", "Add both numbers."),
        ("The rewritten instruction is:\n\n1) Add both numbers.", "Add both numbers."),
        ("Okay, here it is:\nAdd both numbers.", "Add both numbers."),
        ("Here is another way to ask: Add both numbers.", "Add both numbers."),
        ("Here is a review, is it good or bad:", "Here is a review, is it good or bad:"),
        ("Rewrite this sentence in simple words:", "Rewrite this sentence in simple words:"),
        ("Write a new sentence for this:", "Write a new sentence for this:"),
        ("```\nAdd both numbers.\n```", "Add both numbers."),
        ('Say "yes" or "no"', 'Say "yes" or "no"'),
        ('"yes" or "no"', '"yes" or "no"'),
        ("Okay is one answer, bad the other.", "Okay is one answer, bad the other."),
        ("Choose one of these: good, bad.", "Choose one of these: good, bad."),
        ("Yes or no: is it large?", "Yes or no: is it large?"),
        ("2 numbers are given, add them.", "2 numbers are given, add them."),
        ("Sure, here is a rewrite:", ""),
        ('""', ""),
        ("", ""),
        (" \n\t\n", ""),
    ],
)
def test_parse_paraphrase(answer: str, expected: str) -> None:
    assert parse_paraphrase(answer) == expected


RULES = "Label the review.\nRules:\n1. Say good or bad.\n2. Use at most 3 words."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # thoughts
        ("<think>They want a rewrite.</think>Give the capital.", "Give the capital."),
        ("<think>\nThey want a rewrite.\n\nHm.\n</think>\n\nGive the capital.", "Give the capital."),
        ("They want a rewrite.\n</think>\n\nGive the capital.", "Give the capital."),
        ("<think>They want a rewrite. Give the capital.", ""),
        ("<thinking>x</thinking> Give the <reasoning>y</reasoning>capital.", "Give the capital."),
        ("[THINK]x[/THINK]Give the capital.", "Give the capital."),
        (
            "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>Give it.<|return|>",
            "Give it.",
        ),
        # several lines of one rewrite
        ("Add both numbers.\nWrite the sum in digits.", "Add both numbers.\nWrite the sum in digits."),
        ("Add both numbers.\n\nRules:\n- digits\n- no text", "Add both numbers.\n\nRules:\n- digits\n- no text"),
        ('"Add both numbers.\nWrite the sum."', "Add both numbers.\nWrite the sum."),
        ("**A** and **B**", "**A** and **B**"),
        # openings in any language, the text on the next line
        ("You could say:\nAdd both numbers.", "Add both numbers."),
        ("You could say: Add both numbers.", "Add both numbers."),
        ("Hier ist eine Umformulierung:\nAdd both numbers.", "Add both numbers."),
        ("Here's a version with the same meaning:\n\nAdd both numbers.\nUse digits.", "Add both numbers.\nUse digits."),
        ("Voici une reformulation :\n« Add both numbers. »", "Add both numbers."),
        ("以下是改写：\n把两个数相加。", "把两个数相加。"),
        ("改写：把两个数相加。", "把两个数相加。"),
        ("**Rewritten instruction:**\nAdd both numbers.", "Add both numbers."),
        ("### Rewritten instruction\n\nAdd both numbers.", "Add both numbers."),
        ("Sure, here's the rewritten instruction.\nAdd both numbers.", "Add both numbers."),
        ("Original instruction: Sum it.\nRewritten instruction: Add both numbers.", "Add both numbers."),
        ("Sure! Add both numbers.", "Add both numbers."),
        # tags, fences, special tokens
        ("<instruction>Add both numbers.</instruction>", "Add both numbers."),
        ("Here:\n<instruction>\nAdd both.\nUse digits.\n</instruction>\nDone!", "Add both.\nUse digits."),
        ("```text\nAdd both numbers.\nUse digits.\n```", "Add both numbers.\nUse digits."),
        ("Add both numbers.</s>", "Add both numbers."),
        ("Add both numbers. <|im_end|>\n<|im_start|>user\nMore.", "Add both numbers."),
        ("Add both numbers.<eos><eos>", "Add both numbers."),
        ("Add both numbers.<end_of_turn>\n", "Add both numbers."),
        ("<|im_start|>assistant\nAdd both numbers.<｜end▁of▁sentence｜>", "Add both numbers."),
        ("<|thinking|>x<|/thinking|>Add both.", "Add both."),
        ("**Thinking:** they want a rewrite.\n\n**Answer:** Add both.", "Add both."),
        ('{"instruction": "Add both numbers."}', "Add both numbers."),
        ("> Add both numbers.\n> Use digits.", "Add both numbers.\nUse digits."),
        ('"""Add both numbers."""', "Add both numbers."),
        # several rewrites: the first
        ('"Add both."\n\n"Sum the two."', "Add both."),
        ("1) Add both.  2) Sum the two.", "Add both."),
        ("Add both.\n\nor\n\nSum the two.", "Add both."),
        ("Here are three:\n\n1. Add both.\n2. Sum the two.\n\nLet me know if you need more!", "Add both."),
        ("- Add both.\n  Use digits.\n- Sum the two.", "Add both.\n  Use digits."),
        ("Option 1:\nAdd both.\n\nOption 2:\nSum the two.", "Add both."),
        # closing remarks and what else a model goes on with
        ("Add both numbers.\n\nI hope this helps!", "Add both numbers."),
        ("Add both numbers. I hope this helps!", "Add both numbers."),
        ("Add both numbers.\n\n---\n\nThe meaning is the same.", "Add both numbers."),
        ("Add both numbers.\nLet me know if you need anything else.", "Add both numbers."),
        ("Add both numbers.\n\n(Note: this version keeps the original meaning.)", "Add both numbers."),
        ("Add both numbers.\n\nInput: 1 2\nOutput: 3", "Add both numbers."),
        ("Addiere beide Zahlen.\n\nIch hoffe, das hilft!", "Addiere beide Zahlen."),
    ],
)
def test_what_models_write_around_a_rewrite(answer: str, expected: str) -> None:
    assert parse_paraphrase(answer) == expected
    assert parse_paraphrase(expected) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (RULES, RULES),
        (f"Here is a rewrite:\n{RULES}", RULES),
        (f"Hier ist eine Umformulierung:\n\n{RULES}\n\nViel Erfolg! Ich hoffe, das hilft.", None),
        ("Judge it.\nRules:\n1. good or bad\n2. 3 words", "Judge it.\nRules:\n1. good or bad\n2. 3 words"),
        ("Rules:\n1. good or bad\n2. 3 words", "Rules:\n1. good or bad\n2. 3 words"),
        (
            "Judge it by four rules:\n1. good or bad\n2. 3 words\n3. no\n4. yes",
            "Judge it by four rules:\n1. good or bad\n2. 3 words\n3. no\n4. yes",
        ),
    ],
)
def test_a_list_of_the_original_stays(answer: str, expected: str | None) -> None:
    assert parse_paraphrase(answer, RULES) == expected or (
        expected is None and RULES in parse_paraphrase(answer, RULES)
    )


def test_an_answer_that_was_cut_off_gives_its_first_whole_line() -> None:
    assert parse_cut_off("1. Add both.\n2. Sum the", "Add.") == "Add both."
    assert parse_cut_off("Add both", "Add.") == ""
    assert parse_cut_off("<think>Add both.\nOr sum", "Add.") == ""
    assert parse_cut_off("They want it.\nSo </think>Add bo", "Add.") == ""
    assert parse_cut_off("Judge it.\nRules:\n1. good or bad\n2. three", RULES) == ""


CAPITAL = "Give the capital of the country that is named in the text."
FOREIGN = {
    "repeats_request": [
        *REQUESTS,
        "Rewrite this instruction with other words, keeping its meaning.",
        "Please rephrase the given instruction so that it means the same.",
        f"{REQUESTS[0]}\n\nInstruction: {CAPITAL}",
        f"Keep these words: capital.\n{CAPITAL}",
    ],
    "refusal": [
        "I'm sorry, but I can't help with that request.",
        "I’m sorry, but I cannot assist with this one here.",
        "Sorry, I am not able to rewrite the instruction for you.",
        "As an AI language model, I do not have opinions on that.",
        "I cannot fulfill this request, since it is not clear.",
        "Please provide the instruction that you would like me to rewrite.",
        "Okay, the user wants me to find another way to say it.",
        "Es tut mir leid, aber dabei kann ich nicht helfen.",
        "Tut mir leid, das kann ich nicht beantworten, frag etwas anderes.",
        "Je suis désolé, mais je ne peux pas vous aider avec cela.",
        "Lo siento, pero no puedo ayudarte con esa petición ahora mismo.",
        "Mi dispiace, ma non posso aiutarti con questa richiesta adesso.",
        "Desculpe, mas não posso ajudar com esse pedido agora mesmo.",
        "К сожалению, я не могу помочь с этим запросом сейчас.",
        "抱歉，我无法帮助您完成这个请求。",
        "作为一个人工智能语言模型，我没有意见。",
        "申し訳ありませんが、お手伝いできません。",
    ],
    "unclosed_tag": [
        "<instruction>Name the capital of the country in the text.",
        "Name the capital of the country in the text.</instruction>",
        "<b>Name the capital of the country in the text.",
    ],
    "only_opening": [
        "Here is a rewritten instruction that has the same meaning:",
        "You could say something like this:",
    ],
    "several_texts": [
        "Name the capital of the country that the text names.\nWhich city is the capital of the country in the text?",
    ],
    "other_language": [
        "Nenne die Hauptstadt des Landes, das in dem Text genannt wird.",
        "Nenne die Hauptstadt von diesem Land hier.",
        "Qual é a capital do país que está no texto?",
        "Ülkenin başkenti nedir, metinde adı geçen ülke?",
        "Donnez la capitale du pays qui est nommé dans le texte.",
        "Indica la capital del país que se nombra en el texto.",
        "写出文中提到的国家的首都。",
        "Назовите столицу страны, о которой говорится в тексте.",
        "テキストに出てくる国の首都を書いてください。",
    ],
}


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in FOREIGN.items() for text in texts])
def test_what_is_no_rewrite_has_its_reason(reason: str, text: str) -> None:
    """Whether it is taken as it stands or out of the answer: nothing of it becomes a wording."""
    for rewrite in {text, parse_paraphrase(text, CAPITAL)} - {"", CAPITAL}:
        assert check_rewrite(CAPITAL, rewrite, (), [], NearRepeats(0.9), ParaphraseTable()) == reason


@pytest.mark.parametrize(
    ("original", "rewrite"),
    [
        (CAPITAL, "Which city is the seat of government of the country mentioned?"),
        ("Rewrite this instruction in other words.", "Put this instruction into other words, please."),
        ("Say what <sep> stands for here.", "Tell what is meant by <sep> in this place."),
        ("As an AI assistant, sort the mail.", "You are an AI assistant, sort the mail."),
        ("Translate to French.", "Give the French for it."),
        ("Nenne die Hauptstadt des Landes.", "Wie heißt die Hauptstadt von dem Land?"),
        ("写出国家的首都。", "请写出这个国家的首都是什么。"),
        ("国の首都を書いてください。", "その国の首都は何ですか。"),
        ("Say sorry or not sorry.", "Sort it: sorry or not sorry?"),
        ("Fasse es zusammen:", "Gib es kurz wieder:"),
    ],
)
def test_good_rewrites_are_not_taken_for_something_else(original: str, rewrite: str) -> None:
    assert parse_paraphrase(rewrite, original) == rewrite
    table = ParaphraseTable(max_length_ratio=20)
    assert check_rewrite(original, rewrite, (), [], NearRepeats(0.9), table) in (None, "near_duplicate")


def test_a_rewrite_is_checked_with_all_its_lines() -> None:
    table = ParaphraseTable()
    whole = "Judge this review.\nMind these:\n1. Answer good or bad.\n2. Take 3 words at most, no more."
    assert check_rewrite(RULES, whole, ("good", "bad"), [], NearRepeats(0.9), table) is None
    one = whole.partition("\n")[0]
    assert check_rewrite(RULES, one, ("good", "bad"), [], NearRepeats(0.9), table) == "too_short"


def test_strip_thought() -> None:
    assert strip_thought("<think>a<think>b</think>c</think>d") == "d"
    assert strip_thought("a < think > b") == "a < think > b"
    assert strip_thought("x</think>y<think>z") == ""
    assert strip_thought("<think>" * 20000 + "</think>" * 20000 + "x") == "x"  # in linear time


@pytest.mark.parametrize("text", ["Add both numbers.", "1. 'Add'", 'Sure, here is it: "x"'])
def test_parse_paraphrase_of_its_own_result_changes_nothing(text: str) -> None:
    once = parse_paraphrase(text)
    assert parse_paraphrase(once) == once


def test_correct_question_with_gold_is_short() -> None:
    question = correct_question("Add.", "1 2", "4", "3")
    assert question.endswith("Expected: 3\nResponse: 4")
    assert "Add." not in question
    assert "1 2" not in question


def test_questions_without_gold_hold_everything() -> None:
    for question in (correct_question("Add.", "1 2", "4", None), type_question("Add.", "1 2", "4")):
        assert question.endswith("Instruction: Add.\nInput: 1 2\nResponse: 4")
        assert f"Answer {YES} or {NO}." in question
    assert "Input" not in type_question("Tell a joke.", "", "ha")
