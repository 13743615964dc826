"""Prompts: what a request must hold, and rewrites taken out of whatever a model wraps around them."""

from __future__ import annotations

import pytest

from coalign.prompts import NO, NUM_VARIANTS, YES, correct_question, paraphrase_prompt, type_question
from coalign.wordings.rewrites import parse_paraphrase


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
