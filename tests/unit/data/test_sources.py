"""Sources in, splits out: every layout, every rule of the split, labels, limits. Bad input is in test_prepare.py."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from coalign.config import DataTable, SourceTable
from coalign.data import sources as data
from coalign.data import splits
from coalign.data.answer_forms import distinct_answers
from coalign.data.instances import DroppedInstance, FreeNames, Instance, distinct_references, parse_row
from coalign.data.inventory import Inventory, count_words
from coalign.data.sources import Collection, digest_sources, find_format, instruction_slug, read_sources
from coalign.data.splits import (
    SPLITS,
    Prepared,
    find_labels,
    split_index,
    split_instances,
    tokenizer_texts,
)
from coalign.data.task_names import mark_unseen
from coalign.errors import UserError
from coalign.records import Example, Task
from coalign.text import loose_key, normalise_answer, normalise_input, unit_hash

SNI_MINI = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "sni-mini"


def choose_split(text: str, table: DataTable) -> str:
    """Return the split of an input text."""
    return SPLITS[split_index(loose_key(text), table)]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_sni(folder: Path, tasks: dict[str, Any], train: str = "", test: str = "") -> Path:
    (folder / "tasks").mkdir(parents=True)
    for name, task in tasks.items():
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(task), encoding="utf-8")
    for name, text in (("train", train), ("test", test)):
        if text:
            (folder / "splits" / "default").mkdir(parents=True, exist_ok=True)
            (folder / "splits" / "default" / f"{name}_tasks.txt").write_text(text, encoding="utf-8")
    return folder


def sni_task(definition: Any, *pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"Definition": definition, "Instances": [{"input": x, "output": y} for x, y in pairs]}


def read(path: Path, **values: Any) -> Collection:
    return read_sources(DataTable(path=str(path), **values))


def make(task: str, text: str, *outputs: str, name: str = "", instruction: str = "Do it.") -> Instance:
    return Instance(f"file, {text}", task, instruction, text, outputs, name)


def split(instances: list[Instance], unseen: tuple[str, ...] = (), **values: Any) -> Prepared:
    tasks = {i.task: Task(i.task, i.instruction, seen=i.task not in unseen) for i in instances}
    return split_instances(tasks, instances, DataTable(**values))


def summarise(prepared: Prepared) -> dict[str, Any]:
    inventory = Inventory(prepared)
    assert list(inventory.examples()) == list(prepared.examples())
    counts = inventory.counts()
    assert counts["dropped"] == dict(sorted(Counter(row.reason for row in prepared.dropped()).items()))
    return counts


# ---- layouts


def test_sni_folder_reads_splits_definitions_and_several_outputs(tmp_path: Path) -> None:
    tasks = {
        "task1": sni_task(["Say the colour.", "Name the colour."], ("grass ", ["green", "Green.", "verdant"])),
        "task2": sni_task("Say the size.", ("ant", "small")),
        "task3": sni_task("Never read.", ("x", "y")),
    }
    found = read(write_sni(tmp_path / "mini", tasks, train="task1\n\n", test=" task2 \n"))
    assert {name: task.seen for name, task in found.tasks.items()} == {"task1": True, "task2": False}
    assert found.tasks["task1"].instruction == "Say the colour."
    assert found.tasks["task1"].source == "mini"
    assert [(row.input, row.outputs) for row in found.instances] == [
        ("grass ", ("green", "Green.", "verdant")),  # what counts in the task is known when all have been read
        ("ant", ("small",)),
    ]
    assert sorted((row.reason, row.id, row.detail) for row in found.dropped) == [
        ("further_definition", "task1", "Name the colour."),
        ("task_not_in_splits", "task3", ""),
    ]


def test_sni_folder_without_lists_has_seen_tasks_only_and_no_extra_ones(tmp_path: Path) -> None:
    folder = write_sni(tmp_path, {"a": sni_task("A.", ("x", "y"))})
    write_sni(tmp_path / "extra", {"b": sni_task("B.", ("x", "y"))})
    assert [(task.id, task.seen) for task in read(folder).tasks.values()] == [("a", True)]
    assert list(read(tmp_path / "extra").tasks) == ["b"]


def test_jsonl_with_and_without_task_names(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"task": "t", "instruction": "Add.", "input": "1 1", "output": "2"},
        {"task": "t", "instruction": "Add up.", "input": "1 2", "outputs": ["3", "three"], "id": 7},
        {"task": "t", "instruction": "Add.", "input": "2 2", "output": ["4"]},
        {"instruction": "Tell a joke.", "output": "No."},
    ]
    found = read(write_jsonl(tmp_path / "a.jsonl", rows))
    joke = instruction_slug("Tell a joke.")
    assert [row.task for row in found.instances] == ["t", "t#2", "t", joke]
    assert joke.startswith("tell-a-joke-")
    assert [row.id for row in found.instances] == ["", "7", "", ""]
    assert found.instances[3].input == ""


def test_folder_of_jsonl_is_read_in_name_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"instruction": "Do.", "input": name, "output": "x"}])
    assert [row.input for row in read(tmp_path).instances] == ["a", "b"]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (chat(("user", "Hi"), ("assistant", "Ho")), ("Hi", "", ("Ho",))),
        (chat(("system", "Sum."), ("user", "1 1"), ("assistant", " 2 ")), ("Sum.", "1 1", ("2",))),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), None),
        (chat(("user", "a"), ("user", "c")), None),
        (chat(("user", "a"), ("assistant", "b"), ("assistant", "d")), None),
    ],
)
def test_chat_messages(row: dict[str, Any], expected: tuple[str, str, tuple[str, ...]] | None) -> None:
    found = parse_row(row, "file, line 1")
    if expected is None:
        assert found == DroppedInstance("multi_turn", "file, line 1")
    else:
        assert isinstance(found, Instance)
        assert (found.instruction, found.input, found.outputs) == expected


ROWS = [
    {"instruction": "Say it.", "input": "007", "output": "NA"},
    {"instruction": "Say it.", "input": "a", "output": "1"},
]


def write_csv(folder: Path) -> Path:
    (folder / "x.csv").write_text("instruction,input,output\nSay it.,007,NA\nSay it.,a,1\n", encoding="utf-8")
    return folder / "x.csv"


def write_tsv(folder: Path) -> Path:
    (folder / "x.tsv").write_text("instruction\tinput\toutput\nSay it.\t007\tNA\nSay it.\ta\t1\n", encoding="utf-8")
    return folder / "x.tsv"


def write_json_file(folder: Path) -> Path:
    (folder / "x.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return folder / "x.json"


def write_parquet(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(folder / "x.parquet"))
    return folder / "x.parquet"


def write_parquet_folder(folder: Path) -> Path:
    return write_parquet(folder).parent


def write_saved(folder: Path) -> Path:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize(
    "write", [write_csv, write_tsv, write_json_file, write_parquet, write_parquet_folder, write_saved]
)
def test_hugging_face_files_keep_answers_as_text(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    found = read(write(tmp_path / "d"))
    assert [(row.input, row.outputs) for row in found.instances] == [("007", ("NA",)), ("a", ("1",))]
    assert len(found.tasks) == 1


def test_hugging_face_class_labels_and_messages(tmp_path: Path) -> None:
    import datasets

    label = datasets.ClassLabel(names=["no", "yes"])
    rows = datasets.Dataset.from_dict({"instruction": ["Is it?"] * 2, "input": ["a", "b"], "output": [1, 0]})
    rows.cast_column("output", label).save_to_disk(str(tmp_path / "labels"))
    assert [row.outputs for row in read(tmp_path / "labels").instances] == [("yes",), ("no",)]
    datasets.Dataset.from_list([chat(("user", "Hi"), ("assistant", "Ho"))]).save_to_disk(str(tmp_path / "chat"))
    assert [row.outputs for row in read(tmp_path / "chat").instances] == [("Ho",)]


def test_hub_name_goes_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = DataTable(sources=[SourceTable(path="someone/some-data", name="en", split="test")])
    assert len(read_sources(table).instances) == 2
    assert calls == [(("someone/some-data", "en"), {"split": "test"})]
    assert digest_sources(table) == digest_sources(table)


# ---- mixing


def test_sources_mix_with_clashing_names(tmp_path: Path) -> None:
    same = {"task": "t", "instruction": "Add.", "input": "1", "output": "1", "id": "x"}
    write_jsonl(tmp_path / "a.jsonl", [same])
    write_jsonl(tmp_path / "b.jsonl", [{**same, "instruction": "Subtract."}])
    write_jsonl(tmp_path / "c.jsonl", [{**same, "input": "2"}])
    sources = [SourceTable(path=str(tmp_path / f"{name}.jsonl")) for name in "abc"]
    found = read_sources(DataTable(sources=sources))
    assert [(row.task, row.id) for row in found.instances] == [("t", "x"), ("b/t", "b/x"), ("t", "c/x")]
    assert {name: task.source for name, task in found.tasks.items()} == {"t": "a", "b/t": "b"}


def test_max_rows_takes_the_same_rows_in_any_order(tmp_path: Path) -> None:
    rows = [{"instruction": "Do.", "input": f"input {i}", "output": "x"} for i in range(50)]
    taken = []
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", ordered)
        found = read_sources(DataTable(sources=[SourceTable(path=str(path), max_rows=10)]))
        assert [row.reason for row in found.dropped] == ["over_max_rows"] * 40
        taken.append({row.input for row in found.instances})
    assert len(taken[0]) == 10
    assert taken[0] == taken[1]


def test_max_rows_beyond_the_rows_takes_all(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Do.", "input": str(i), "output": "x"} for i in range(3)])
    found = read_sources(DataTable(sources=[SourceTable(path=str(path), max_rows=9)]))
    assert (len(found.instances), len(found.dropped)) == (3, 0)


def test_ids_whose_hashes_clash_are_no_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "hash", len, raising=False)
    rows = [{"instruction": "Do.", "input": name, "output": "x", "id": name} for name in "ab"]
    assert [row.id for row in read(write_jsonl(tmp_path / "a.jsonl", rows)).instances] == ["a", "b"]
    with pytest.raises(UserError, match=r"b\.jsonl, line 3: the id 'a' is also at .*b\.jsonl, line 1"):
        read(write_jsonl(tmp_path / "b.jsonl", [*rows, rows[0]]))


def test_digest_depends_on_contents_and_not_on_the_place(tmp_path: Path) -> None:
    tasks = {"a": sni_task("A.", ("x", "y"))}
    folders = [write_sni(tmp_path / name / "mini", tasks, train="a") for name in ("one", "two")]
    first, second = (digest_sources(DataTable(path=str(folder))) for folder in folders)
    assert first == second
    (folders[1] / "tasks" / "a.json").write_text(json.dumps(sni_task("B.", ("x", "y"))), encoding="utf-8")
    assert digest_sources(DataTable(path=str(folders[1]))) != first


@pytest.mark.parametrize(
    ("make_path", "expected"),
    [
        ("d/tasks/a.json", "sni"),
        ("d/a.jsonl", "rows"),
        ("d/train.parquet", "hf"),
        ("d/sub/train.csv", "hf"),
        ("d/dataset_dict.json", "saved"),
    ],
)
def test_folder_format_is_found(make_path: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / make_path).parent.mkdir(parents=True)
    (tmp_path / make_path).touch()
    assert find_format(SourceTable(path=str(tmp_path / "d"))) == expected


# ---- splits


def test_one_text_is_on_one_side_in_every_task() -> None:
    texts = [f"Sentence number {i}." for i in range(300)]
    found = split([make(task, text if task == "a" else f" {text.upper()}  ", "x") for text in texts for task in "ab"])
    sides: dict[str, set[str]] = {}
    for example in found.examples():
        sides.setdefault(example.input.strip().lower(), set()).add(example.split)
    assert len(sides) == 300
    assert all(len(side) == 1 for side in sides.values())


def test_shares_are_met_and_growing_data_moves_nothing() -> None:
    table = DataTable()
    counts = dict.fromkeys(SPLITS, 0)
    for i in range(20000):
        counts[choose_split(f"text {i}", table)] += 1
    assert [round(counts[name] / 20000, 1) for name in SPLITS] == [0.4, 0.3, 0.1, 0.2]
    few, many = ([make("t", f"text {i}", "x") for i in range(n)] for n in (50, 200))
    before = {example.id: example.split for example in split(few).examples()}
    after = {example.id: example.split for example in split(many[::-1]).examples()}
    assert before.items() <= after.items()


def test_inputs_without_text_are_split_by_instruction() -> None:
    instances = [make(f"t{i}", "", "x", instruction=f"Say {i}.") for i in range(200)]
    assert {example.split for example in split(instances).examples()} == set(SPLITS)


def test_unseen_tasks_keep_test_inputs_only() -> None:
    found = split([make(task, f"text {i}", "x") for task in "ab" for i in range(100)], unseen=("b",))
    unseen = [example for example in found.examples() if example.task == "b"]
    assert unseen and {example.split for example in unseen} == {"test"}
    assert {row.reason for row in found.dropped()} == {"unseen_task_not_test"}
    assert len(list(found.dropped())) == 100 - len(unseen)


def test_only_the_tasks_named_are_taken() -> None:
    instances = [make(task, f"text {i}", "x") for task in "abc" for i in range(50)]
    found = split(instances, only_tasks=["c", "a"])
    assert {task.id for task in found.tasks} == {example.task for example in found.examples()} == {"a", "c"}
    assert summarise(found)["dropped"] == {"other_task": 50}
    assert [e for e in split(instances).examples() if e.task != "b"] == list(found.examples())
    with pytest.raises(UserError, match=r"data\.only_tasks names 'd', which is no task of the data"):
        split(instances, only_tasks=["d"])


def test_config_can_make_tasks_unseen() -> None:
    tasks = {name: Task(name, "Do.") for name in ("add", "add#2", "sub")}
    assert [task.seen for task in mark_unseen(tasks, ["add"]).values()] == [False, False, True]
    assert [task.seen for task in mark_unseen(tasks, ["add#2"]).values()] == [True, False, True]
    with pytest.raises(UserError, match="'addd', which is no task of the data; did you mean 'add'"):
        mark_unseen(tasks, ["addd"])


def test_repeats_are_merged_with_the_union_of_their_references() -> None:
    rows = [make("t", "An Ant", "x", name="1"), make("t", " An Ant\r\n", "X.", name="2"), make("t", "An Ant", "y", "x")]
    found = split([*rows, make("u", "an ant", "z")])
    assert [(row.task, row.input, row.outputs, bool(row.id)) for row in found.examples()] == [
        ("t", "An Ant", ("x", "y"), True),
        ("u", "an ant", ("z",), True),
    ]
    dropped = list(found.dropped())
    assert [(row.reason, row.id) for row in dropped] == [("merged_duplicate", "2"), ("merged_duplicate", "")]
    assert [row.detail for row in dropped] == [
        "same input as file, An Ant, same references",
        "same input as file, An Ant, other references",
    ]


def test_rows_whose_hashes_clash_are_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "equal_places", lambda keys: [list(range(len(keys)))])
    rows = [make("t", "ant", "x"), make("t", "bee", "y"), make("u", "ant", "z"), make("t", "ant ", "w")]
    assert [row.outputs for row in split(rows).examples()] == [("x", "w"), ("y",), ("z",)]


def test_ids_are_unique_and_do_not_depend_on_row_order() -> None:
    rows = [make("t", f"text {i}", "x") for i in range(20)]
    first, second = ({row.input: row.id for row in split(order).examples()} for order in (rows, rows[::-1]))
    assert first == second
    assert len(set(first.values())) == 20
    clash = make("u", "other", "x", name=first["text 0"])
    found = split([clash, *rows])
    assert len({row.id for row in found.examples()}) == 21
    assert list(found.examples()) == list(found.examples())


def deal_plainly(
    rows: list[Instance], table: DataTable, unseen: set[str]
) -> tuple[list[Example], list[DroppedInstance]]:
    """Return examples and sorted dropped rows, everything held in memory: the slow twin of split_instances."""
    first: dict[tuple[str, str], Instance] = {}
    answers: dict[tuple[str, str], dict[str, str]] = {}
    dropped = []
    for row in rows:
        key = (row.task, normalise_input(row.input))
        found: dict[str, str] = {}
        for output in row.outputs:
            found.setdefault(normalise_answer(output), output)
        if first.setdefault(key, row) is not row:
            kind = "same" if set(found) == set(map(normalise_answer, first[key].outputs)) else "other"
            detail = f"same input as {first[key].place}, {kind} references"
            dropped.append(DroppedInstance("merged_duplicate", row.place, row.id, detail))
        for answer, output in found.items():
            answers.setdefault(key, {}).setdefault(answer, output)
    ids = {key: row.id for key, row in first.items()}
    taken = {name for name in ids.values() if name}
    near = Counter((task, loose_key(text)) for task, text in first)
    for key in first:
        if not ids[key]:
            text = key[1] if near[key[0], loose_key(key[1])] > 1 else loose_key(key[1])
            made = f"{key[0]}-{sha256(text.encode()).hexdigest()[:16]}"
            ids[key] = f"{made}#2" if made in taken else made
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key, row in first.items():
        split_name = choose_split(row.input if row.input.strip() else row.instruction, table)
        if key[0] in unseen and split_name != "test":
            dropped.append(DroppedInstance("unseen_task_not_test", row.place, ids[key]))
        else:
            groups.setdefault((key[0], split_name), []).append(key)
    side: dict[tuple[str, str], Any] = {}
    for (_, split_name), keys in groups.items():
        limit = getattr(table, f"max_{split_name}_inputs") or len(keys)
        keys.sort(key=lambda key: unit_hash("inputs", loose_key(key[1])))
        side.update(dict.fromkeys(keys[:limit], split_name))
        dropped += [DroppedInstance("over_limit", first[key].place, ids[key]) for key in keys[limit:]]
    examples = [
        Example(ids[key], row.task, row.input, tuple(answers[key].values()), side[key])
        for key, row in first.items()
        if key in side
    ]
    return examples, sorted(dropped)


@pytest.mark.parametrize("seed", range(6))
def test_split_of_mixed_rows_equals_the_plain_way(seed: int) -> None:
    source = random.Random(seed)
    rows = []
    for index in range(600):
        number = source.randrange(250)
        text = source.choice(["", " "]) if source.random() < 0.05 else f"Input {number}"
        task = source.choice("abc")
        name = f"id {index}" if source.random() < 0.5 else ""
        if source.random() < 0.02:  # the id that would be made for another row
            name = f"{task}-{sha256(f'Input {number + 1}'.encode()).hexdigest()[:16]}"
        if any(row.id == name for row in rows):
            name = ""
        text = source.choice([text, text.upper(), f" {text}  "])
        outputs = source.sample(["yes", "No", "Yes.", "maybe", "no"], k=source.randint(1, 3))
        rows.append(Instance(f"row {index}", task, f"Do {task}.", text, distinct_references(outputs), name))
    limits = {"max_sft_inputs": 30, "max_test_inputs": 7} if seed % 2 else {}
    found = split(rows, unseen=("b",), **limits)
    examples, dropped = deal_plainly(rows, DataTable(**limits), {"b"})
    assert list(found.examples()) == examples
    assert sorted(found.dropped()) == dropped
    assert len(examples) + len(dropped) == 600
    assert summarise(found)["inputs"] == {name: sum(e.split == name for e in examples) for name in SPLITS}


def test_an_id_of_a_merged_row_renames_nothing() -> None:
    made = next(split([make("t", "ant", "x")]).examples()).id
    found = split([make("t", "ant", "x"), make("t", "ant", "y", name=made)])
    assert [(row.id, row.outputs) for row in found.examples()] == [(made, ("x", "y"))]


@pytest.mark.parametrize("kind", ["plain", "ids", "repeats", "limits", "max_rows"])
def test_memory_hardly_grows_with_the_rows(kind: str, tmp_path: Path) -> None:
    """A million rows must fit into some hundred megabytes: texts stay on disk."""
    peaks = []
    for count in (1000, 9000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for i in range(count):
                row = {"task": "t", "instruction": "Do.", "output": f"{i % 7}" * 200}
                row["input"] = f"{i // 2 if kind == 'repeats' else i} " * 100
                stream.write(json.dumps(row | ({"id": f"{i}"} if kind == "ids" else {})) + "\n")
        limits = {"max_sft_inputs": 5, "max_test_inputs": 5} if kind == "limits" else {}
        sources = [SourceTable(path=str(path), max_rows=count // 2 if kind == "max_rows" else 0)]
        table = DataTable(sources=sources, **limits)
        tracemalloc.start()
        try:
            read = read_sources(table, tmp_path)
            found = split_instances(read.tasks, read.instances, table)
            num_rows = sum(1 for _ in found.examples()) + sum(1 for _ in found.dropped())
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert num_rows + len(read.dropped) == count
    a_row = (peaks[1] - peaks[0]) / 8000
    assert a_row < (700 if kind == "repeats" else 150), a_row  # its texts alone have some 800 bytes


def test_limits_apply_after_the_split_and_keep_what_a_larger_limit_keeps() -> None:
    instances = [make("t", f"text {i}", "x") for i in range(300)]
    limits: dict[str, Any] = dict(max_align_inputs=3, max_dev_inputs=2, max_test_inputs=1)
    whole, small, smaller = (
        split(instances, **more) for more in ({}, {"max_sft_inputs": 9, **limits}, {"max_sft_inputs": 4, **limits})
    )
    assert summarise(small)["inputs"] == {"sft": 9, "align": 3, "dev": 2, "test": 1}
    assert summarise(small)["dropped"] == {"over_limit": 285}
    sets = [{(e.id, e.split) for e in found.examples()} for found in (smaller, small, whole)]
    assert sets[0] < sets[1] < sets[2]


def test_max_tasks_takes_tasks_in_hash_order() -> None:
    instances = [make(f"t{i}", f"text {i} {j}", "x") for i in range(10) for j in range(10)]
    three, five = (split(instances, max_tasks=n) for n in (3, 5))
    assert len(three.tasks) == 3
    assert {task.id for task in three.tasks} < {task.id for task in five.tasks}
    assert {example.task for example in three.examples()} == {task.id for task in three.tasks}
    assert summarise(three)["dropped"] == {"over_limit": 70}


def test_unseen_task_without_test_inputs_is_left_out() -> None:
    text = next(text for text in map(str, range(99)) if choose_split(text, DataTable()) == "sft")
    found = split([make("a", text, "x"), make("b", text, "x")], unseen=("b",))
    assert [task.id for task in found.tasks] == ["a"]
    assert [row.reason for row in found.dropped()] == ["unseen_task_not_test", "task_without_inputs"]


# ---- labels, histograms, names


@pytest.mark.parametrize(
    ("answers", "max_labels", "labels"),
    [
        (["Yes", "yes.", "Yes", "No"] * 2, 20, ("No", "Yes")),
        (["Yes", "No"] * 3, 20, ()),  # 3 instances a label
        (["Yes", "No"] * 8, 1, ()),
        (["Yes", "No"] * 8, 0, ()),
        (["one two three four five six"] * 8, 20, ()),
        (["one two three four five"] * 8, 20, ("one two three four five",)),
        (["非常不同意这个观点"] * 8, 20, ("非常不同意这个观点",)),
        (["ไม่เห็นด้วยอย่างยิ่ง"] * 8, 20, ("ไม่เห็นด้วยอย่างยิ่ง",)),
        (["天气很好，所以我们决定一起去公园散步。"] * 8, 20, ()),
    ],
)
def test_label_tasks(answers: list[str], max_labels: int, labels: tuple[str, ...]) -> None:
    rows = [("t", (answer,)) for answer in answers]
    assert find_labels({"t": Task("t", "Do.")}, rows, max_labels)["t"].labels == labels


def test_word_histogram_has_fixed_buckets() -> None:
    counts = count_words(["", "a", "a b c d", "a b c d e", "x " * 1025])
    assert list(counts.items())[:4] == [("0", 1), ("1-4", 2), ("5-8", 1), ("9-16", 0)]
    assert counts["1025+"] == 1
    assert count_words([]) == {}
    assert count_words(["天气很好，我们去公园。"])["9-16"] == 1, "a character of an unspaced script is a word"


def test_tokenizer_texts_hold_nothing_held_out() -> None:
    instances = [make(task, f"text {task} {i}", f"answer {i}") for task in "ab" for i in range(100)]
    found = split(instances, unseen=("b",))
    texts = set(tokenizer_texts(found.tasks, found.examples()))
    held_out = {example.input for example in found.examples() if example.split != "sft"}
    assert held_out and not texts & held_out
    assert {example.input for example in found.examples() if example.split == "sft"} < texts


def test_free_names_and_distinct_answers() -> None:
    names = FreeNames(["a", "a#2"])
    assert [names.take(name) for name in ("a", "b", "a", "b")] == ["a#3", "b", "a#4", "b#2"]
    assert distinct_references(["a", "B", "", '"a"', "b", "A."]) == ("a", "B", "b", "A.")
    assert distinct_answers(("a", "B", "b", "A."), ()) == ("a", "B")


def test_real_tasks_split_as_their_lists_say() -> None:
    if not SNI_MINI.is_dir():
        pytest.skip("the shared data are not here")
    table = DataTable(path=str(SNI_MINI))
    found = read_sources(table)
    prepared = split_instances(found.tasks, found.instances, table)
    counts = summarise(prepared)
    assert (counts["tasks"]["seen"], counts["tasks"]["unseen"]) == (40, 11)
    assert sum(counts["inputs"].values()) + len(list(prepared.dropped())) == len(found.instances)
    labels = {task.id: task.labels for task in prepared.tasks}
    assert labels["task833_poem_sentiment_classification"] == ("negative", "positive")
    assert not labels["task1147_country_currency"]
