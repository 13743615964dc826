"""Wordings: rendering, answer maps there and back, files of people, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalign.errors import UserError
from coalign.records import Task, Wording
from coalign.text import normalise_answer
from coalign.wordings.wording_files import load_wordings, read_wordings
from coalign.wordings.wordings import bare_text, canonical_answer, expected_answer, misfit, render_prompt

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
TASKS = {"t": Task("t", "Do it."), "u": Task("u", "Do that.")}
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
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {"task": "t", "id": "first", "text": "Do."}, row)
    with pytest.raises(UserError) as caught:
        load_wordings([path], TASKS)
    assert str(caught.value).startswith(f"{path}, line 2")
    assert message in str(caught.value)


def test_ids_must_differ_over_files(tmp_path: Path) -> None:
    first = write(tmp_path, GOOD)
    second = tmp_path / "more.jsonl"
    second.write_text(first.read_text())
    with pytest.raises(UserError, match=r"more.jsonl, line 1: .* used before \(.*wordings.jsonl, line 1\)"):
        load_wordings([first, second], TASKS)


def test_file_that_fits_no_task(tmp_path: Path) -> None:
    path = write(tmp_path, {"task": "elsewhere", "id": "a", "text": "No."})
    with pytest.raises(UserError, match=r"none of its 1 tasks .* the file has 'elsewhere', the run has 't', 'u'"):
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
