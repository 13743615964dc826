"""What counts in a task's answers, through the real command: told from the gold answers, or set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coalign.config import AnswerFormTable
from coalign.data.answer_forms import MAX_SPELLINGS, with_answer_forms
from coalign.data.instances import Instance
from coalign.records import Task
from integration.bad_inputs import run_recipe


def prepare(
    folder: Path, rows: Sequence[tuple[str, str, Any]], *settings: str
) -> tuple[dict[str, Any], list[Any], str]:
    """Run prepare on (task, input, outputs); return its tasks by name, its examples, and what it printed."""
    data = folder / "rows.jsonl"
    lines = [{"task": t, "instruction": f"Do {t}.", "input": i, "outputs": o} for t, i, o in rows]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "empty.toml").write_text("", encoding="utf-8")
    words = (f"data.path={data}", f"run.folder={folder}", "run.name=r", *settings)
    outcome = run_recipe("prepare", str(folder / "empty.toml"), *words)
    if outcome.code:
        return {}, [], outcome.stderr
    written = {
        name: [
            json.loads(line) for line in (folder / "r" / "prepare" / f"{name}.jsonl").read_text("utf-8").splitlines()
        ]
        for name in ("tasks", "examples")
    }
    return {task["id"]: task for task in written["tasks"]}, written["examples"], outcome.stdout + outcome.stderr


LABELS = {
    "interval": ("<42", ">42"),
    "unit": ("MW", "mW"),
    "gene": ("AA", "Aa", "aa"),
    "mark": ("5", "5!"),
    "pair": ("(3, 4)", "[3, 4]"),
    "cost": ("O(n!)", "O(n)", "O(n²)"),
    "code": ("if a:\n  b\n  c", "if a:\n  b\nc"),
    "wrapped": ("a\nb", "a b"),
    "rating": ("C", "C*", "C+"),
    "chinese": ("正面", "负面"),
}


def test_labels_are_what_answers_keep_apart(tmp_path: Path) -> None:
    rows = [(task, f"{task} {i}", [golds[i % len(golds)]]) for task, golds in LABELS.items() for i in range(40)]
    spelt = ["Positive", "positive.", "positive", "**Negative**", "negative", "negative"]
    rows += [("mood", f"mood {i}", [spelt[i % 6]]) for i in range(60)]
    tasks, _, said = prepare(tmp_path, rows)
    assert {task: tuple(tasks[task]["labels"]) for task in LABELS} == {t: tuple(sorted(g)) for t, g in LABELS.items()}
    assert sorted(label.lower().strip("*.") for label in tasks["mood"]["labels"]) == ["negative", "positive"]
    forms = {name: task["answer_form"] for name, task in tasks.items() if task["answer_form"]}
    assert forms == {"unit": ["case"], "gene": ["case"], "code": ["space"], "wrapped": ["space"]}
    assert "case counts when answers are compared (data.answer_form): unit, gene" in said


def test_inputs_are_merged_when_they_are_the_same_text(tmp_path: Path) -> None:
    apart = [
        ("2² = ?", "4"),
        ("22 = ?", "22"),
        ("x = A", "1"),
        ("x = a", "2"),
        ("a\n  b", "3"),
        ("a\nb", "4"),
        ("a b", "5"),
    ]
    same = [("e\u0301te\u0301 ", "summer"), ("\u00e9t\u00e9", "Summer."), ("l 1\r\nl 2", "x"), ("l 1\nl 2\n", "y")]
    _, examples, _ = prepare(tmp_path, [("t", text, [output]) for text, output in [*apart, *same]])
    by_input = {example["input"]: example["outputs"] for example in examples}
    assert len({example["id"] for example in examples}) == len(examples) == 9
    assert {text: by_input[text] for text, _ in apart} == {text: [output] for text, output in apart}
    assert by_input["e\u0301te\u0301 "] == ["summer"] and by_input["l 1\r\nl 2"] == ["x", "y"]
    split = {example["input"]: example["split"] for example in examples}
    assert split["2² = ?"] == split["22 = ?"] and split["x = A"] == split["x = a"], "nearly equal inputs share a split"


def test_golds_that_differ_are_kept_and_spellings_are_not(tmp_path: Path) -> None:
    golds = [["5!", "5"], ["C", "C*"], ["Paris", "paris.", "**PARIS**"], ["1,000", "1000"], ["mW", "MW"]]
    rows = [("t", f"text {i}", outputs) for i, outputs in enumerate(golds)]
    _, examples, _ = prepare(tmp_path, rows)
    assert [example["outputs"] for example in examples] == [["5!", "5"], ["C", "C*"], ["Paris"], ["1,000"], ["mW"]]
    _, examples, _ = prepare(tmp_path, rows, 'data.answer_form={"*"={case=true, numbers=true}}', "run.name=set")
    found = [json.loads(line) for line in (tmp_path / "set/prepare/examples.jsonl").read_text("utf-8").splitlines()]
    assert [row["outputs"] for row in found[2:]] == [["Paris", "paris.", "**PARIS**"], ["1,000", "1000"], ["mW", "MW"]]


def test_a_setting_wins_and_the_task_before_the_star(tmp_path: Path) -> None:
    rows = [(task, f"{task} {i}", [("MW", "mW")[i % 2]]) for task in ("unit", "name", "free") for i in range(40)]
    settings = (
        "data.answer_form.unit.case=false",
        'data.answer_form={"*"={space=true}, unit={case=false}, free={space=false}}',
    )
    tasks, _, _ = prepare(tmp_path, rows, *settings)
    assert {name: task["answer_form"] for name, task in tasks.items()} == {
        "unit": ["space"],
        "name": ["case", "space"],
        "free": ["case"],
    }
    assert tasks["unit"]["labels"] == ["MW"] and tasks["name"]["labels"] == ["MW", "mW"]
    manifest = json.loads((tmp_path / "r/prepare/manifest.json").read_text("utf-8"))
    assert manifest["config"]["data.answer_form"]["unit"] == {"case": False}
    assert prepare(tmp_path, rows, *settings)[2].count("complete"), "the same settings again"
    changed = prepare(tmp_path, rows)[2]
    assert "data.answer_form was" in changed and "is now null" in changed


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "data.answer_form={units={case=true}}",
            "data.answer_form names 'units', which is no task of the data; did you mean",
        ),
        ("data.answer_form={unit={cases=true}}", "unknown key 'data.answer_form.unit.cases'"),
        ("data.answer_form={unit={case=1}}", "data.answer_form.unit.case=1"),
        ("data.answer_form.unit=true", "data.answer_form.unit=true"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, setting: str, said: str) -> None:
    error = prepare(tmp_path, [("unit", f"text {i}", ["x"]) for i in range(20)], setting)[2]
    assert said in error and error.count("\n") == 1


def test_a_manifest_without_the_key_is_of_the_same_settings(tmp_path: Path) -> None:
    """Runs from before the key go on."""
    rows = [("t", f"text {i}", ["x"]) for i in range(20)]
    prepare(tmp_path, rows)
    manifest = json.loads((tmp_path / "r/prepare/manifest.json").read_text("utf-8"))
    assert "data.answer_form" not in manifest["config"]
    assert "complete" in prepare(tmp_path, rows)[2]


def test_answers_of_one_input_and_of_a_task_with_very_many_tell_nothing() -> None:
    def form(rows: list[tuple[str, ...]]) -> tuple[str, ...]:
        instances = [Instance("", "t", "Do.", str(i), outputs) for i, outputs in enumerate(rows)]
        return with_answer_forms({"t": Task("t", "Do.")}, instances, {})["t"].answer_form

    assert form([("mW",), ("MW",)]) == ("case",)
    assert form([("mW", "MW"), ("MW",)]) == ()
    assert form([("mW",), ("MW",), *((str(i),) for i in range(MAX_SPELLINGS - 2))]) == ("case",)
    assert form([("mW",), ("MW",), *((str(i),) for i in range(MAX_SPELLINGS + 1))]) == ()
    table = {"*": AnswerFormTable(case=True)}
    assert with_answer_forms({"t": Task("t", "Do.")}, [], table)["t"].answer_form == ("case",)


LONG = "Read the whole review below with care, then say in no more than one short word whether its author liked the"
WORDINGS = {
    "english": [
        ("a", "test", f"{LONG} film."),
        ("b", "train", f"{LONG} movie."),
        ("c", "train", "Thumbs up or thumbs down for this one?"),
    ],
    "chinese": [
        ("a", "test", "请读完这条评论，用一个词说出作者喜不喜欢这部电影。"),
        ("b", "train", "请读完这篇评论，用一个词说出作者喜不喜欢这部电影。"),
        ("c", "train", "这部电影在作者看来怎么样？"),
    ],
    "japanese": [
        ("a", "test", "このレビューを読んで、気持ちを一言で答えてください。"),
        ("b", "train", "このレビュを読んで、気持ちを一言で答えてください。"),
        ("c", "train", "書いた人は満足していますか。"),
    ],
    "thai": [
        ("a", "test", "อ่านรีวิวนี้แล้วบอกว่าผู้เขียนชอบหนังเรื่องนี้ไหม"),
        ("b", "train", "อ่านรีวิวนี้แล้วบอกว่าผู้เขียนชอบหนังเรื่องนี้ไหน"),
        ("c", "train", "ความรู้สึกของผู้เขียนเป็นอย่างไร"),
    ],
}


def test_wordings_like_a_held_out_one_are_dropped_in_every_script(tmp_path: Path) -> None:
    """Through paraphrase, from files; the English twin differs by its last word."""
    rows = [(task, f"{task} {i}", [("yes", "no")[i % 2]]) for task in WORDINGS for i in range(20)]
    files = tmp_path / "wordings.jsonl"
    lines = [
        json.dumps({"task": task, "id": name, "text": text, "split": split})
        for task, found in WORDINGS.items()
        for name, split, text in found
    ]
    files.write_text("\n".join(lines), encoding="utf-8")
    settings = (f'paraphrase.files=["{files}"]', "paraphrase.num_wordings=0")
    prepare(tmp_path, rows, *settings)
    words = (f"data.path={tmp_path / 'rows.jsonl'}", f"run.folder={tmp_path}", "run.name=r", *settings)
    outcome = run_recipe("paraphrase", str(tmp_path / "empty.toml"), *words)
    assert outcome.code == 0, outcome.stderr
    read = (tmp_path / "r" / "paraphrase" / "dropped.jsonl").read_text("utf-8").splitlines()
    assert [(row["task"], row["id"], row["reason"]) for row in map(json.loads, read)] == [
        (task, "b", "held_out") for task in WORDINGS
    ]
