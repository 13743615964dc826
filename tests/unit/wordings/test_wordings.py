"""Wordings: rendering, answer maps there and back, files of people, and what is wrong with a file."""

from __future__ import annotations

import concurrent.futures
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from coalign.errors import UserError
from coalign.records import Task, Wording
from coalign.text import normalise_answer
from coalign.wordings import patterns
from coalign.wordings.wording_files import load_wordings, read_wordings
from coalign.wordings.wordings import bare_text, canonical_answer, expected_answer, misfit, render_prompt

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
TASKS = {"t": Task("t", "Do it."), "u": Task("u", "Do that."), "l": Task("l", "Say it.", ("good", "bad"))}
PAIR = r"(?P<left>\w+) (?P<right>\w+)$"


def template(text: str, answers: dict[str, str] | None = None, regex: str = PAIR) -> Wording:
    return Wording("w", "t", text, kind="template", fields_regex=regex, answers=answers)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "wordings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prefix_stands_before_the_input() -> None:
    wording = Wording("w", "t", "Use {braces} {0.__class__}.")
    assert render_prompt(wording, "in {put}") == "Use {braces} {0.__class__}.\n\nin {put}"
    assert render_prompt(wording, "") == "Use {braces} {0.__class__}."


def test_template_renders_fields_in_one_pass() -> None:
    wording = template("{right}, {{right}} {left}!", regex=r"(?P<left>\S+) (?P<right>\S+)")
    assert render_prompt(wording, "{right} b}}") == "b}}, {right} {right}!"
    assert render_prompt(wording, "alone") is None


def test_group_that_took_no_part_is_empty() -> None:
    assert render_prompt(template("<{b}>", regex=r"(?P<a>x)|(?P<b>y)"), "x") == "<>"


def test_answers_without_a_map_stay() -> None:
    wording = Wording("w", "t", "Do it.")
    assert expected_answer(wording, "in", " B ") == " B "
    assert canonical_answer(wording, "in", " B \n") == "B"


def test_answers_with_a_map() -> None:
    wording = Wording("w", "t", "Right?", answers={"Good": "Yes", "Bad": "No"})
    assert expected_answer(wording, "in", "good") == "Yes"
    assert expected_answer(wording, "in", "ugly") is None
    assert canonical_answer(wording, "in", ' "yes." ') == "Good"
    assert canonical_answer(wording, "in", "Bad") is None
    assert canonical_answer(wording, "in", " who knows ") == "who knows"


def test_map_may_exchange_labels() -> None:
    wording = Wording("w", "t", "Is it wrong?", answers={"yes": "no", "no": "yes"})
    assert expected_answer(wording, "", "yes") == "no"
    assert canonical_answer(wording, "", "no") == "yes"


def test_map_with_fields() -> None:
    wording = template("{left} or {right}?", {"A": "{left}", "B": "{right}"})
    assert expected_answer(wording, "cat dog", "B") == "dog"
    assert canonical_answer(wording, "cat dog", "Dog.") == "B"
    assert canonical_answer(wording, "cat dog", "A") is None
    assert expected_answer(wording, "cat", "B") is None
    assert canonical_answer(wording, "cat", "dog") is None


def test_words_that_can_not_be_told_apart_are_no_words() -> None:
    wording = template("{left} or {right}?", {"A": "{left}", "B": "{right}"})
    assert expected_answer(wording, "cat Cat", "B") is None
    assert canonical_answer(wording, "cat Cat", "cat") is None


def test_bare_text_leaves_fields_out() -> None:
    assert bare_text(template("{left}\n\nIs it {{x}} in {right}?")) == "Is it {x} in ?"
    assert bare_text(Wording("w", "t", "Keep {x}.")) == "Keep {x}."


def test_flat_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"task": "t", "id": "a", "text": "Do."},
        {"task": "t", "id": "b", "text": "{x}?", "kind": "template", "fields_regex": "(?P<x>.*)", "source": "me"},
        {"task": "u", "id": "a", "text": "Go.", "split": "test", "answers": {"y": "n"}, "note": "extra"},
        {"task": "elsewhere", "id": "a", "text": "No."},
    )
    files = read_wordings([path], TASKS)
    assert [(w.task, w.id, w.kind, w.source, w.split) for w in files.wordings] == [
        ("t", "a", "prefix", "file:wordings.jsonl", "train"),
        ("t", "b", "template", "file:wordings.jsonl:me", "train"),
        ("u", "a", "prefix", "file:wordings.jsonl", "test"),
    ]
    assert files.with_split == {("u", "a")}
    assert files.dropped == [{"task": "elsewhere", "id": "a", "text": "No.", "reason": "unknown_task"}]
    assert load_wordings([path], TASKS) == (files.wordings, files.dropped)


def test_nested_rows(tmp_path: Path) -> None:
    row = {
        "task": "t",
        "split": "test",
        "source": "people",
        "instructions": [{"id": "x", "text": "Which {one}?", "answers": None}],
        "templates": [
            {"id": "x", "text": "{left}?\n{options_}", "answers": {"A": "{left}", "B": "b"}},
            {"id": "y", "text": "{right}"},
        ],
        "fields_regex": PAIR,
        "options": ["{left}", "b"],
    }
    files = read_wordings([write(tmp_path, row)], TASKS)
    assert [(w.id, w.kind, w.text) for w in files.wordings] == [
        ("x:instruction", "prefix", "Which {one}?"),
        ("x:template", "template", "{left}?\nOPTIONS:\n- {left}\n- b"),
        ("y", "template", "{right}"),
    ]
    assert not files.with_split, "the split of a nested row is its task's"
    assert render_prompt(files.wordings[1], "cat dog") == "cat?\nOPTIONS:\n- cat\n- b"
    assert {w.source for w in files.wordings} == {"file:wordings.jsonl:people"}


GOOD = {"task": "t", "id": "a", "text": "Do."}
FIELD = {**GOOD, "kind": "template", "text": "{x}?", "fields_regex": "(?P<x>.*)"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task": "t", "id": "a"}, "line 2: the key 'text' is missing"),
        ({"id": "a", "text": "Do."}, "the key 'task' is missing"),
        ({**GOOD, "text": "  "}, 'text="  "; a text that is not empty'),
        ({**GOOD, "id": 3}, "id=3; a text"),
        ({**GOOD, "kind": "suffix"}, "kind='suffix'; it must be"),
        ({**GOOD, "split": "valid"}, "split='valid'; it must be one of train, dev, test"),
        ({**GOOD, "answer": {"a": "b"}}, "unknown key 'answer'; did you mean 'answers'?"),
        ({**GOOD, "answers": ["yes"]}, 'answers=["yes"]; an object'),
        ({**GOOD, "answers": {"a": "x", "b": "X."}}, "gives 'a' and 'b' the same word 'X.'"),
        ({**FIELD, "fields_regex": None}, "a template needs fields_regex"),
        ({**FIELD, "fields_regex": "(?P<x>"}, "fields_regex='(?P<x>' is no regular expression"),
        ({**FIELD, "text": "{y}?"}, "text names the field 'y', but fields_regex has x"),
        ({**FIELD, "text": "{x.__class__}"}, "a single '{' in text"),
        ({**FIELD, "text": "{x} {0}"}, "a single '{' in text"),
        ({**FIELD, "text": "{x} }"}, "a single '}' in text"),
        ({**FIELD, "answers": {"A": "{z}"}}, "answers['A'] names the field 'z'"),
        ({"task": "t", "templates": [{"id": "a", "text": "{x}"}]}, "templates[0]: a template needs fields_regex"),
        ({"task": "t", "templates": {"id": "a"}}, "templates must be a list of objects"),
        ({"task": "t", "instructions": [{"id": "a"}]}, "instructions[0]: the key 'text' is missing"),
        ({"task": "t", "instructions": [{"text": "a"}]}, "instructions: the key 'id' is missing"),
        (
            {"task": "t", "templates": [{"id": "a", "text": "{options_}"}], "fields_regex": "(?P<x>.*)"},
            "the row's options=null",
        ),
        ({**GOOD, "id": "first"}, "the id 'first' of task 't' was used before"),
        # what Python's re refuses by other exceptions than re.error
        ({**FIELD, "fields_regex": "(?P<x>a{99999999999})"}, "is no regular expression: the repetition number is too"),
        ({**FIELD, "fields_regex": "(" * 3000 + ")" * 3000}, "is no regular expression: maximum recursion depth"),
        ({**FIELD, "fields_regex": "(?P<x>" + "a" * 20000 + ")"}, "has 20007 characters, and 10000 are the most"),
        # half a surrogate pair wherever a text is read
        *[
            ({**FIELD, key: "\ud800{x}"}, f"{key} has half a surrogate pair at character 0")
            for key in ("task", "id", "text", "fields_regex", "source")
        ],
        ({**GOOD, "answers": {"a\udfff": "b"}}, "answers has half a surrogate pair at character 1"),
        ({**GOOD, "answers": {"a": "b\udfff"}}, "answers has half a surrogate pair at character 1"),
        ({"task": "t", "instructions": [{"id": "a", "text": "\ud800"}]}, "instructions[0]: text has half a surr"),
        (
            {"task": "t", "templates": [{"id": "a", "text": "{options_}"}], "options": ["\ud800"], "fields_regex": "x"},
            "options has half a surrogate pair",
        ),
        # a map that no answer of the task is in
        (
            {**GOOD, "task": "l", "answers": {"gut": "A", "schlecht": "B"}},
            "answers has 'gut', 'schlecht', which are no",
        ),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {"task": "t", "id": "first", "text": "Do."}, row)
    with pytest.raises(UserError) as caught:
        load_wordings([path], TASKS)
    assert str(caught.value).startswith(f"{path}, line 2")
    assert message in str(caught.value)


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wordings.jsonl"
    for row, key in [
        ('{"task": "t", "id": "a", "text": "Do.", "text": "Do it."}', "text"),
        ('{"task": "t", "id": "a", "text": "Do.", "answers": {"yes": "A", "yes": "B"}}', "yes"),
        ('{"task": "t", "instructions": [{"id": "a", "id": "b", "text": "Do."}]}', "id"),
    ]:
        path.write_text(row)
        with pytest.raises(UserError, match=rf"line 1: the key '{key}' stands twice in one object; keep one"):
            load_wordings([path], TASKS)


SLOW = (
    (r"(?P<x>(\w+\s?)+)!$", "word " * 28),
    (r"(?P<x>(a|aa|aaa)*)b", "a" * 80),
    (r"(?P<x>.*?).*?.*?.*?.*?!", "a" * 5000),
    (r"(?P<x>(?:(.+),)*)\2!", "a,b," * 400),
)


@pytest.mark.parametrize(("regex", "text"), SLOW)
def test_a_pattern_that_takes_too_long_is_refused_wherever_it_is_matched(
    regex: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.1)
    says = "fields_regex=.* takes over 0.1 s on the input"
    slow = Wording("w", "t", "{x}?", kind="template", fields_regex=regex, answers={"a": "A"}, source="file:w.jsonl")
    for call in (
        lambda: render_prompt(slow, text),
        lambda: expected_answer(slow, text, "a"),
        lambda: canonical_answer(slow, text, "A"),
        lambda: misfit(slow, text),
    ):
        with pytest.raises(UserError, match=f"^w.jsonl: wording 'w' of task 't': {says}"):
            call()
    path = write(tmp_path, {**FIELD, "fields_regex": regex})
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"task": "t", "input": text, "outputs": ["a"]}) + "\n")
    assert len(read_wordings([path], TASKS).wordings) == 1
    with pytest.raises(UserError, match=says):
        read_wordings([path], TASKS, examples)


def test_the_limit_leaves_no_timer_and_changes_no_match() -> None:
    """The slow twin is re itself."""
    for regex, text in [
        (PAIR, "cat dog"),
        (PAIR, "cat"),
        (r"(?P<a>x)?(?P<b>.*)", "yz"),
        (r"(?P<a>(\w+ ?)+)", "a b " * 9),
    ]:
        match = re.compile(regex).match(text)
        assert patterns.match_fields(regex, text) == (match and match.groupdict(default=""))
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # without a limit, and without an error
        assert pool.submit(patterns.match_fields, PAIR, "two words").result() == {"left": "two", "right": "words"}


def test_a_map_that_knows_no_gold_answer_of_the_inputs_is_refused(tmp_path: Path) -> None:
    """A task without labels: only the inputs say which answers there are."""
    path = write(tmp_path, {**GOOD, "answers": {"cat": "A", "dog": "B"}})
    examples = tmp_path / "examples.jsonl"
    for golds, good in ((["Cat."], True), (["cow"], False)):
        examples.write_text(json.dumps({"task": "t", "input": "x", "outputs": golds}) + "\n")
        if good:
            assert read_wordings([path], TASKS, examples).wordings
        else:
            with pytest.raises(UserError, match=r"wording 'a': answers has 'cat', 'dog', which are no answers of task"):
                read_wordings([path], TASKS, examples)


def test_ids_must_differ_over_files(tmp_path: Path) -> None:
    first = write(tmp_path, GOOD)
    second = tmp_path / "more.jsonl"
    second.write_text(first.read_text())
    with pytest.raises(UserError, match=r"more.jsonl, line 1: .* used before \(.*wordings.jsonl, line 1\)"):
        load_wordings([first, second], TASKS)


def test_file_that_fits_no_task(tmp_path: Path) -> None:
    path = write(tmp_path, {"task": "elsewhere", "id": "a", "text": "No."})
    with pytest.raises(UserError, match=r"none of its 1 tasks .* the file has 'elsewhere', the run has 'l', 't', 'u'"):
        load_wordings([path], TASKS)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no wordings"):
        load_wordings([path], TASKS)
    with pytest.raises(UserError, match="no such file"):
        load_wordings([tmp_path / "absent.jsonl"], TASKS)


def test_a_wording_that_cannot_ask_about_an_input_says_why() -> None:
    """No gold answer is looked at: a map is unusable when its own words can't be told apart on this input."""
    options = {"fields_regex": "(?P<a>.*) / (?P<b>.*)", "answers": {"A": "{a}", "B": "{b}"}}
    template = Wording("x", "t", "{a} or {b}?", kind="template", **options)  # type: ignore[arg-type]
    prefix = Wording("y", "t", "Which one?", **options)  # type: ignore[arg-type]
    plain = Wording("z", "t", "Which one?")
    asked = {text: [misfit(w, text) for w in (template, prefix, plain)] for text in ("cat / dog", "cat / cat", "cat")}
    assert asked == {
        "cat / dog": ["", "", ""],
        "cat / cat": ["answer_map", "answer_map", ""],
        "cat": ["wording_does_not_fit", "answer_map", ""],
    }


# The wordings that people wrote for real tasks


def human_rows() -> list[dict[str, Any]]:
    path = SHARED / "paraphrases-human.jsonl"
    if not path.exists():
        pytest.skip("the shared data are not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_human_wording_loads() -> None:
    rows = human_rows()
    tasks = {row["task"]: Task(row["task"], row["definition"]) for row in rows}
    wordings, dropped = load_wordings([SHARED / "paraphrases-human.jsonl"], tasks)
    assert len(wordings) == sum(len(row["instructions"]) + len(row["templates"]) for row in rows) == 234
    assert not dropped
    for row in rows:
        if row["example"] and row["templates"]:
            wanted = row["example"]["variant"]
            same = [w for w in wordings if w.task == row["task"] and w.id.removesuffix(":template") == wanted]
            assert row["example"]["prompt"] in [render_prompt(w, row["example"]["input"]) for w in same]


def test_human_templates_render_and_answers_map_both_ways() -> None:
    rows = human_rows()
    tasks = {row["task"]: Task(row["task"], row["definition"]) for row in rows}
    files = [*SHARED.glob("sni-mini/tasks/*.json"), *SHARED.glob("sni-mini/extra/**/*.json")]
    instances = {path.stem: json.loads(path.read_text())["Instances"] for path in files if path.stem in tasks}
    parsed = {row["task"]: row["parsed"] for row in rows}
    for wording in load_wordings([SHARED / "paraphrases-human.jsonl"], tasks)[0]:
        fitting = [i for i in instances[wording.task] if render_prompt(wording, i["input"]) is not None]
        if wording.kind == "template":
            assert f"{len(fitting)} of {len(instances[wording.task])}" == parsed[wording.task], wording.id
        lost = 0
        for instance in fitting:
            for gold in instance["output"]:
                asked = expected_answer(wording, instance["input"], gold)
                if asked is None:
                    lost += 1
                    continue
                back = canonical_answer(wording, instance["input"], asked)
                assert back is not None
                assert normalise_answer(back) == normalise_answer(gold)
        # An instruction with a map is a prompt for every input, though its words may not be had.
        assert lost <= len(fitting) // 50, (wording.task, wording.id, lost)
