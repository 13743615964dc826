"""The data that the project brings: reproducible, small, with exactly the properties its README names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import make_world

from coalign.records import Task
from coalign.wordings.wording_files import load_wordings

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "phrasebook"


def read_tasks() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (FOLDER / "tasks").glob("*.json")}


def test_script_reproduces_the_committed_files() -> None:
    expected = make_world.make_files()
    written = {
        path.relative_to(FOLDER).as_posix()
        for path in [*FOLDER.glob("tasks/*"), FOLDER / "wordings.jsonl", FOLDER / "held_out.jsonl"]
    }
    assert written == expected.keys()
    for name, content in expected.items():
        assert (FOLDER / name).read_bytes() == content.encode(), f"{name} differs: run make_world.py again"


def test_data_stay_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.parent.name != "base") < 1_200_000
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 9_000_000


def test_words_are_distinct() -> None:
    assert len(make_world.VOCABULARY) == 200
    assert {len(words) for words in make_world.WORDS.values()} == {25}


def test_instances_are_distinct_and_answered_by_the_rule() -> None:
    for task, content in read_tasks().items():
        instances = content["Instances"]
        assert len({row["input"] for row in instances}) == len({row["id"] for row in instances}) == 120
        for row in instances:
            assert row["output"] == [make_world.ANSWERS[task](row["input"].split())]
            assert row["output"][0].strip()


def test_a_list_holds_one_word_of_what_can_be_asked_for() -> None:
    for content in read_tasks().values():
        for row in content["Instances"]:
            categories = Counter(make_world.CATEGORY[word] for word in row["input"].split())
            assert all(categories[name] <= 1 for name in make_world.ASKED_FOR)


def test_wordings_never_repeat() -> None:
    rows = [json.loads(line) for line in (FOLDER / "wordings.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["text"].casefold() for row in rows]
    texts += [content["Definition"][0].casefold() for content in read_tasks().values()]
    assert len(set(texts)) == len(texts)
    assert len({row["id"] for row in rows}) == len(rows)
    counts = Counter((row["task"], row["split"]) for row in rows)
    for task in read_tasks():
        assert [counts[task, split] for split in ("train", "dev", "test")] == [9, 4, 12]


def test_wordings_load_without_a_drop() -> None:
    tasks = {name: Task(id=name, instruction=content["Definition"][0]) for name, content in read_tasks().items()}
    held_out, _ = load_wordings([FOLDER / "held_out.jsonl"], tasks)
    assert Counter(wording.split for wording in held_out) == {"dev": 80, "test": 240}
    wordings, dropped = load_wordings([FOLDER / "wordings.jsonl"], tasks)
    assert not dropped
    assert Counter(wording.split for wording in wordings) == {"train": 180, "dev": 80, "test": 240}
