"""Filters of rewrites: each reason once and its near misses, similarity, files merged, rewrites chosen."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from coalign.config import ParaphraseTable
from coalign.errors import UserError
from coalign.records import Task, Wording
from coalign.wordings.filtering import (
    choose_rewrites,
    count_wordings,
    drop_held_out,
    drop_repeats,
    settle,
)
from coalign.wordings.near_repeats import NearRepeats, repeats, similarity
from coalign.wordings.rewrites import REASONS, answers_in_turn, check_rewrite, labels_in
from coalign.wordings.wording_files import WordingFiles

TABLE = ParaphraseTable()
CASES: list[tuple[str, str, Sequence[str], str | None]] = [
    ("Add the two numbers.", "Sum up both numbers.", (), None),
    ("Add the two numbers.", "  ", (), "empty"),
    ("Add the two numbers.", "?!", (), "malformed"),
    ("Add the two numbers.", "Sum both \ufffd numbers.", (), "malformed"),
    ("Add the two numbers that you are given here.", "Add them.", (), "too_short"),
    ("Add them.", "Please add all of the given numbers.", (), "too_long"),
    ("Is it Good or Bad?", "Would you call it good or bad?", ("Good", "Bad"), None),
    ("Is it Good or Bad?", "Would you call it good or not?", ("Good", "Bad"), "lost_label"),
    ("Is it Good or Bad?", "Is it goodness or badness here?", ("Good", "Bad"), "lost_label"),
    ("Judge the mood.", "Say how the mood is.", ("Good", "Bad"), None),
    ("Is it a Good  Review?", "Does this look like a good review?", ("Good Review",), None),
    ("Give a letter for the case.", "Name the letter of this case.", ("A", "B"), None),
    ("Answer with A or B for it.", "Answer by one letter: a or b.", ("A", "B"), "lost_label"),
    ("Is it C++ code?", "Would you say that this is C code?", ("C++",), "lost_label"),
    ("Pick 3 of them.", "Choose three of these.", (), "lost_number"),
    ("Pick 3 of them.", "Choose 3 of these.", (), None),
    ("Round 3.14 to tens.", "To tens please round 3.", (), "lost_number"),
    ("Replace {x} by its sum.", "Put the sum there.", (), "lost_placeholder"),
    ("Replace {x} by its sum.", "Put the sum in place of {x}.", (), None),
    ("The text after <sep> counts.", "Only what follows counts.", (), "lost_placeholder"),
    ("Fill in [MASK] with a word.", "Find a word for [MASK].", (), None),
    ('Answer "cannot say" if unsure.', "When unsure, answer 'cannot say'.", (), None),
    ('Answer "cannot say" if unsure.', "When unsure, answer that you can't.", (), "lost_placeholder"),
    ("Answer the reader's and writer's question.", "Reply to what they ask there.", (), None),
    ("Answer in one word.", "Reply with a single word.", (), None),
    ("Answer in one word.", "Reply briefly please.", (), "lost_format"),
    ("List them comma separated.", "List them, separated by commas.", (), None),
    ("List them comma separated.", "List them one by one.", (), "lost_format"),
    ("Write it in uppercase.", "Write it in capital letters.", (), None),
    ("Write it in uppercase.", "Write it down loudly.", (), "lost_format"),
    ("Return JSON of it.", "Return it as an object.", (), "lost_format"),
    ("Answer yes or no.", "Reply with no or with yes.", (), None),
    ("Answer yes or no.", "Reply whether it holds.", (), "lost_format"),
    ("Say True/False for it.", "Tell whether it holds.", (), "lost_format"),
    ("Use at most five words there.", "Use a maximum of five words there.", (), None),
    ("Use at most five words there.", "Use five words there.", (), "lost_format"),
    ("Add the two numbers.", "Rewrite this instruction in other words.", (), "repeats_request"),
    ("Add the two numbers.", "I'm sorry, but I can't help with that.", (), "refusal"),
    ("Add the two numbers.", "<instruction>Sum up both numbers.", (), "unclosed_tag"),
    ("Add the two numbers.", "You could say:", (), "only_opening"),
    ("Add the two numbers.", "Sum up both numbers.\nAdd these two up.", (), "several_texts"),
    ("Add the two numbers.", "Сложите оба числа вместе.", (), "other_language"),
    ("Add the two numbers here now please.", "add the two numbers here NOW, please", (), "near_duplicate"),
]


def held(*texts: str) -> NearRepeats:
    return NearRepeats(TABLE.max_similarity, texts)


@pytest.mark.parametrize(("original", "rewrite", "labels", "reason"), CASES)
def test_check_rewrite(original: str, rewrite: str, labels: Sequence[str], reason: str | None) -> None:
    assert check_rewrite(original, rewrite, labels, [], held(), TABLE) == reason


def test_what_is_there_already() -> None:
    rewrite = "Sum up both of the numbers that follow."
    assert check_rewrite("Add the numbers.", rewrite, (), [rewrite], held(), TABLE) == "near_duplicate"
    assert check_rewrite("Add the numbers.", rewrite, (), [], held(rewrite.upper()), TABLE) == "held_out"
    assert check_rewrite("Add the numbers.", rewrite, (), [rewrite], held(rewrite), TABLE) == "held_out"
    assert check_rewrite("Add the numbers.", rewrite, (), ["Other"], held("More"), TABLE) is None


def test_every_reason_is_listed() -> None:
    assert {reason for *_, reason in CASES if reason} | {"held_out", "cut_off"} == set(REASONS)


def test_labels_in() -> None:
    assert labels_in("Say yes or No, not maybe.", ["Yes", "no", "may", ""]) == ["Yes", "no"]


def test_similarity_by_hand() -> None:
    assert similarity("a b c d e f", "a b c d e g") == pytest.approx(3 / 5)  # 3-grams: 3 of 4 + 4 - 3
    assert similarity("a b c d e f", "A b, c d e f!") == 1.0
    assert similarity("a b c", "c b a") == 1.0  # short: sets of words
    assert similarity("a b c", "a b d") == pytest.approx(2 / 4)
    assert similarity("???", "???") == 1.0
    assert similarity("???", "!!!") == 0.0
    assert similarity("", "word") == 0.0


@pytest.mark.parametrize("max_similarity", [0.0, 0.3, 0.5, 2 / 3, 0.7, 0.9, 1.0])
def test_the_index_of_held_out_texts_says_what_comparing_with_each_says(max_similarity: float) -> None:
    """The slow twin compares with every text."""
    rng = random.Random(0)
    vocabulary = ["the", "of", "a", "to", "is", "sum", "two", "add", "give", "word", "text", "name"]

    def sentence() -> str:
        return " ".join(rng.choices(vocabulary, k=rng.choice([0, 1, 2, 4, 5, 6, 7, 9, 14, 20])))

    def change(text: str) -> str:
        changed = text.split()
        for _ in range(rng.randint(0, 2) if changed else 0):
            changed[rng.randrange(len(changed))] = rng.choice(vocabulary)
        return rng.choice([" ".join(changed), " ".join(changed).upper() + "!"])

    texts = [sentence() for _ in range(60)]
    index = NearRepeats(max_similarity, texts)
    asked = [change(rng.choice(texts)) for _ in range(300)] + [sentence() for _ in range(300)] + ["???", ""]
    found = [index.has_like(text) for text in asked]
    assert found == [repeats(text, texts, max_similarity) for text in asked]
    assert any(found) and (max_similarity == 0.0 or not all(found))
    assert not NearRepeats(max_similarity).has_like("anything")


def test_twenty_wordings_of_a_thousand_tasks_are_compared_in_seconds() -> None:
    """Comparing all with all would take minutes."""
    rng = random.Random(0)
    common = [f"w{i}" for i in range(300)]
    texts = [
        "answer the question with one of the options given " + " ".join(rng.choices(common, k=9)) for _ in range(20_000)
    ]
    by_task = {
        f"t{i}": [
            Wording(f"w{j}", f"t{i}", text, source="file:f", split="test" if j < 6 else "train")
            for j, text in enumerate(texts[20 * i : 20 * i + 20])
        ]
        for i in range(1000)
    }
    start = time.process_time()
    drop_held_out(by_task, [], 0.9)
    assert time.process_time() - start < 20


def wording(id_: str, text: str, split: str = "train", source: str = "file:f", kind: str = "prefix") -> Wording:
    return Wording(id_, "t", text, source=source, split=split, kind=kind, fields_regex="(?P<x>.*)")  # type: ignore[arg-type]


def test_drop_repeats() -> None:
    task = Task("t", "Add the two numbers up.")
    wordings = [
        wording("original", task.instruction, source="original"),
        wording("like original", "{x}\n\nAdd the two numbers up:", "test", kind="template"),
        wording("tested", "What is the sum of these?", "test"),
        wording("tested again", "What is the sum of these?", "test"),
        wording("both forms", "{x} What is the sum of these?", "test", kind="template"),
        wording("dev", "What is the sum of these", "dev"),
        wording("other dev", "Please give me the total.", "dev"),
        wording("train", "{x}: please give me the total", kind="template"),
        wording("good", "Count them together."),
    ]
    kept, dropped = drop_repeats(wordings, task, 0.9)
    assert [w.id for w in kept] == ["original", "tested", "both forms", "other dev", "good"]
    assert {row["id"]: row["reason"] for row in dropped} == {
        "like original": "near_duplicate",
        "tested again": "near_duplicate",
        "dev": "held_out",
        "train": "held_out",
    }


def test_wordings_like_a_held_out_one_of_another_task_go_but_originals_stay() -> None:
    """Dev and test wordings of every task are kept from training, those of unseen tasks too."""

    def of(task: str, id_: str, text: str, split: str = "train", source: str = "file:f") -> Wording:
        return Wording(id_, task, text, source=source, split=split)  # type: ignore[arg-type]

    tasks = [Task("a", "Tell me what this is about."), Task("b", "Sum it up."), Task("c", "Go.", seen=False)]
    by_task = {
        "a": [
            of("a", "original", tasks[0].instruction, source="original"),
            of("a", "of file", "In short, what is it?"),
            of("a", "model:0", "Name the unseen thing here!", source="model"),
            of("a", "model:1", "Put it briefly, please.", source="model"),
            of("a", "model:2", "What does the writer want?", "dev", source="model"),
            of("a", "dev of file", "What does the writer want, then?", "dev"),
            of("a", "model:3", "Say it in short, what is it?", "test", source="model"),
        ],
        "b": [
            of("b", "original", tasks[1].instruction, source="original"),
            of("b", "test", "In short: what is it?", "test"),
            of("b", "dev", "Put it briefly please", "dev"),
            of("b", "test like original", "Tell me what this is about", "test"),
            of("b", "test like dev", "What does the writer want", "test"),
            of("b", "fine", "Make it short."),
        ],
        "c": [of("c", "test", "Name the unseen thing here", "test")],
    }
    kept, dropped, originals = drop_held_out(by_task, tasks, 0.9)
    assert {row["id"] for row in dropped} == {"of file", "model:0", "model:1", "model:2"}
    assert {(row["task"], row["reason"]) for row in dropped} == {("a", "held_out")}
    assert [w.id for w in kept["a"]] == ["original", "dev of file", "model:3"]
    assert (kept["b"], kept["c"]) == (by_task["b"], by_task["c"])
    assert originals == ["a"]


def test_rewrites_and_files_are_compared_with_the_held_out_wordings_of_other_tasks() -> None:
    """An unseen task's test wording keeps its like out of a seen task's training wordings."""
    tasks = [Task("t", "Add the numbers up."), Task("u", "Go.", seen=False)]
    files = [
        Wording("x", "t", "Which is the total of these numbers?", source="file:f", split="train"),
        Wording("y", "u", "Which is the total of these numbers", source="file:f", split="test"),
    ]
    given = WordingFiles(files, [], frozenset({("t", "x"), ("u", "y")}))
    settled = settle(tasks, given, TABLE, 0)
    assert [w.id for w in settled.by_task["t"]] == ["original"]
    assert [(row["task"], row["id"], row["reason"]) for row in settled.dropped] == [("t", "x", "held_out")]
    answers = {"t": [{"text": "Which is the total of these numbers?", "finish": "stop"}]}
    again = settle(tasks, given, TABLE, 0, lambda _: (answers, ()))
    assert again.by_task == settled.by_task and again.wanted == settled.wanted
    assert [row["reason"] for row in again.dropped] == ["held_out", "held_out"]


def test_rewrites_fill_up_what_files_lack_and_every_loss_has_its_reason() -> None:
    """One call decides: wordings of files keep their splits, rewrites fill the rest, and no text is lost unseen."""
    tasks = [Task("t", "Add the two numbers up."), Task("long", "Go on.", seen=False)]
    files = WordingFiles([wording("w1", "Sum these two numbers for me.", "test")], [], frozenset({("t", "w1")}))
    few = ParaphraseTable(num_wordings=2, num_dev=1, num_test=2)
    wanted = settle(tasks, files, few, 0).wanted
    assert wanted == {"t": 4, "long": 2}  # one for test, one for dev, two to train on; two for test
    texts = [
        "Add both numbers.",
        "Add both numbers!",
        "Sum these two numbers for me!",
        "Give the total of the two.",
        "?",
    ]
    answers = {"t": [{"text": text, "finish": "stop"} for text in texts]}
    settled = settle(tasks, files, few, 0, lambda _: (answers, {"long"}))
    kept = {w.id: w.split for w in settled.by_task["t"]}
    assert kept["original"] == "train" and kept["w1"] == "test" and {*kept} == {"original", "w1", "model:0", "model:1"}
    reasons = {(row["task"], row["reason"]) for row in settled.dropped}
    assert reasons == {("long", "longer_than_context"), ("t", "near_duplicate"), ("t", "held_out"), ("t", "malformed")}
    assert len(settled.dropped) + len(kept) - 2 == len(texts) + 1


def test_choose_rewrites_stops_when_it_has_enough() -> None:
    task = Task("t", "Is it good or bad?", labels=("good", "bad"))
    existing = [wording("original", task.instruction, source="original"), wording("model:1", "Bad or is it good?")]
    existing.append(wording("held", "Would you say good or bad?", "test"))
    texts = [
        ("1. Tell me: good or bad?", "stop"),
        ("Here it is:", "stop"),
        ("Would you say good, or bad?", "stop"),
        ("Is this thing good?", "stop"),
        ("Good is it, or bad and", "length"),
        ("Choose between good and bad.\nThen", "length"),
        ("Say whether it seems bad or good.", "stop"),
    ]
    answers = [{"text": text, "finish": finish} for text, finish in texts]
    held_out = NearRepeats(TABLE.max_similarity, ["Would you say good or bad?"])
    accepted, dropped = choose_rewrites(task, existing, answers, 2, TABLE, held_out)
    assert [(w.id, w.text) for w in accepted] == [
        ("model:0", "Tell me: good or bad?"),
        ("model:2", "Choose between good and bad."),
    ]
    assert {w.source for w in accepted} == {"model"}
    assert [row["reason"] for row in dropped] == ["empty", "held_out", "lost_label", "cut_off"]
    assert choose_rewrites(task, existing, answers, 0, TABLE, held_out) == ([], [])


def test_rewrites_are_chosen_from_what_models_write_around_them() -> None:
    """Of a multi-line instruction a rewrite keeps the rules; its numbers and labels are looked for in all lines."""
    rules = "Label the review.\nRules:\n1. Say good or bad.\n2. Use at most 3 words."
    task = Task("t", rules, labels=("good", "bad"))
    good = "Judge this review.\nMind these:\n1. Answer good or bad.\n2. Take at most 3 words for it."
    answers = [
        {"text": f"<think>Hm.</think>Here is a rewrite:\n\n```\n{good}\n```\n\nI hope this helps!", "finish": "stop"},
        {"text": "<think>They want me to say good or bad, with 3 words at most", "finish": "length"},
        {"text": "<think>They want me to say good or bad", "finish": "stop"},
        {"text": good.rpartition("\n")[0], "finish": "stop"},
        {"text": good, "finish": "length"},
        {"text": "I'm sorry, but I can't say good or bad in 3 words.", "finish": "stop"},
    ]
    accepted, dropped = choose_rewrites(task, [], answers, 9, TABLE, held())
    assert [wording.text for wording in accepted] == [good]
    assert [row["reason"] for row in dropped] == ["cut_off", "empty", "lost_number", "cut_off", "refusal"]


def test_files_alone_and_the_summary() -> None:
    tasks = [Task("t", "Add the two numbers up."), Task("u", "Go.", seen=False)]
    files = [wording(f"w{i}", f"Wording number {i} of this task {'x' * i} stands here.") for i in range(6)]
    files.append(wording("original", "Add the two numbers up!"))
    few = ParaphraseTable(num_test=2, num_wordings=3)
    settled = settle(tasks, WordingFiles(files, [], frozenset()), few, 0)
    assert [w.split for w in settled.by_task["t"]].count("test") == 2
    assert [w.id for w in settled.by_task["u"]] == ["original"]
    assert [row["reason"] for row in settled.dropped] == ["near_duplicate"]
    counts = count_wordings(tasks, settled, few)
    assert counts["sources"] == {"original": 2, "file": 6}
    assert counts["splits"] == {"train": 4, "test": 2, "dev": 2}
    assert counts["short"] == {"t": {"train": 1}, "u": {"test": 2}}


def test_id_of_the_original_is_taken() -> None:
    files = WordingFiles([wording("original", "Something else altogether, by far.")], [], frozenset())
    with pytest.raises(UserError, match="task 't' has a wording with the id 'original'"):
        settle([Task("t", "Add.")], files, TABLE, 0)


def test_answers_are_tried_in_turn() -> None:
    """The first answer to every way to ask comes before the second to any."""
    rows = [{"task": "t", "answers": answers} for answers in ([1, 4, 6], [2], [3, 5])]
    assert answers_in_turn([*rows, {"task": "u", "answers": [7]}]) == {"t": [1, 2, 3, 4, 5, 6], "u": [7]}
