"""Rows, task files, tables, wordings and configs that nobody thought of: see `fuzzing.assert_property`."""

from __future__ import annotations

import csv
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalign.config import Config
from coalign.config_values import known_keys, table_values
from coalign.records import Example, Wording, read_records
from coalign.wordings.wordings import render_prompt
from integration.bad_inputs import TASKS, World
from integration.fuzzing import PRETRAINED, a_world, assert_complete, examples, limits, replace, run
from integration.odd_values import (
    PLACEHOLDERS,
    changed_json,
    damaged_bytes,
    good_texts,
    texts,
    to_bytes,
    to_json,
    values,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def base(finished_here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder of which only prepare is complete; nobody changes it."""
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    shutil.copytree(finished_here.parent, folder, ignore=shutil.ignore_patterns("runs"))
    shutil.copytree(finished_here / "r" / "prepare", folder / "runs" / "r" / "prepare")
    shutil.copytree(finished_here / "r" / "prepare" / "model", folder / "my-model")
    return folder


# Rows

ROW_KEYS = ("instruction", "input", "output", "outputs", "task", "id", "messages", "Input", "extra", "")
message = st.fixed_dictionaries({"role": st.sampled_from(("system", "user", "assistant")), "content": good_texts})
columns = st.fixed_dictionaries(
    {"instruction": good_texts, "output": st.one_of(good_texts, st.lists(good_texts, max_size=3))},
    optional={
        "input": texts,
        "task": st.sampled_from(("t", "u/v", "../x", "a b", "日本")),
        "id": st.one_of(st.integers(0, 5), texts),
        "note": values,
    },
)
chats = st.fixed_dictionaries(
    {
        "messages": st.one_of(
            st.tuples(good_texts, texts, good_texts).map(
                lambda turns: [
                    {"role": role, "content": text}
                    for role, text in zip(("system", "user", "assistant"), turns, strict=True)
                ]
            ),
            st.lists(message, max_size=5),
        )
    }
)
odd_rows = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(ROW_KEYS), texts), values, max_size=4),
    columns.flatmap(changed_json),
    chats.flatmap(changed_json),
    values,
)
TINY = ("data.sft_share=0.25", "data.align_share=0.25", "data.dev_share=0.25")


def prepare(world: World, *words: str) -> None:
    """Run prepare anew; what it accepts must be complete, with at least one answer for every input."""
    world.remove("prepare")
    if run(world, "prepare", "config.toml", *PRETRAINED, *TINY, *words).code == 0:
        step = world.run_folder / "prepare"
        assert_complete(step)
        for example in read_records(Example, step / "examples.jsonl"):
            assert example.outputs and all(example.outputs) and example.id and example.task


@given(data=st.data())
@examples(0.22)
def test_rows(base: Path, data: st.DataObject) -> None:
    good = data.draw(st.lists(data.draw(st.sampled_from((columns, chats))), min_size=0, max_size=6))
    lines = [to_json(row, ascii_only=data.draw(st.booleans())) for row in good]
    if data.draw(st.booleans()):
        lines.insert(data.draw(st.integers(0, len(lines))), to_json(data.draw(odd_rows)))
    content = to_bytes("\n".join(lines))
    if data.draw(st.integers(0, 4)) == 0:
        content = data.draw(damaged_bytes(content))
    kind = data.draw(st.sampled_from(("auto", "auto", "jsonl", "messages")))
    with a_world(base) as world:
        replace(world.folder / "d.jsonl", content)
        prepare(world, "data.path=d.jsonl", f"data.format={kind}", *data.draw(data_words))


data_words = st.lists(
    st.sampled_from(
        (
            *("data.max_labels=0", "data.max_labels=1", "data.max_tasks=1", "data.max_test_inputs=1"),
            *(
                "data.sft_share=0",
                'data.unseen_tasks=["t"]',
                'data.only_tasks=["t"]',
                "run.seed=-1",
                "data.dev_share=0",
            ),
        )
    ),
    max_size=2,
)
task_files = st.fixed_dictionaries(
    {
        "Definition": st.one_of(good_texts, st.lists(good_texts, min_size=1, max_size=3)),
        "Instances": st.lists(
            st.fixed_dictionaries(
                {"input": texts, "output": st.lists(good_texts, min_size=1, max_size=2)},
                optional={"id": st.one_of(st.integers(0, 9), texts)},
            ),
            min_size=1,
            max_size=6,
        ),
    },
    optional={"Categories": values, "Positive Examples": values},
)


@given(data=st.data())
@examples(0.12)
def test_task_files(base: Path, data: st.DataObject) -> None:
    task = data.draw(task_files)
    if data.draw(st.booleans()):
        task = data.draw(changed_json(task))
    content = to_bytes(to_json(task))
    if data.draw(st.integers(0, 4)) == 0:
        content = data.draw(damaged_bytes(content))
    lists = data.draw(st.one_of(st.none(), st.sampled_from(("animal\n", "", "nosuch\n", "x\n", "../x\n", "\x00\n"))))
    with a_world(base) as world:
        replace(world.folder / "data/tasks/x.json", content)
        if lists is not None:
            replace(world.folder / "data/splits/default/train_tasks.txt", lists.encode())
            replace(world.folder / "data/splits/default/test_tasks.txt", data.draw(damaged_bytes(b"colour\nx\n")))
        prepare(world, *data.draw(data_words))


@given(data=st.data())
@examples(0.03)
def test_tables(base: Path, data: st.DataObject, monkeypatch_session: pytest.MonkeyPatch) -> None:
    """CSV, TSV and JSON, which Hugging Face's library reads."""
    suffix = data.draw(st.sampled_from(("csv", "tsv", "json")))
    rows = data.draw(st.lists(st.tuples(good_texts, texts, good_texts), max_size=5))
    header = data.draw(
        st.sampled_from(
            (
                ("instruction", "input", "output"),
                ("instruction", "output", "output"),
                ("", "instruction", "output"),
                ("\x00", "b", "c"),
            )
        )
    )
    if suffix == "json":
        content = to_bytes(to_json([dict(zip(header, row, strict=True)) for row in rows]))
    else:
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter="," if suffix == "csv" else "\t", escapechar="\\")
        writer.writerows([header, *rows])
        content = to_bytes(stream.getvalue())
    if data.draw(st.booleans()):
        content = data.draw(damaged_bytes(content))
    with a_world(base) as world:
        monkeypatch_session.setattr("datasets.config.HF_DATASETS_CACHE", world.folder / "cache")
        replace(world.folder / f"d.{suffix}", content)
        prepare(world, f"data.path=d.{suffix}")


@pytest.fixture(scope="session")
def monkeypatch_session() -> Any:
    """Changes that last as long as the session."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


# Wordings

REGEXES = (
    *("(?P<a>.*)", r"(?P<a>\w+) (?P<b>.*)", "(", "x{99999999999}", "(?P<a>(\\w+\\s?)+)!$", "(a|aa)+$", "(?P<1>x)"),
    *("(" * 3000 + ")" * 3000, "(?P<a>)", "[", "(?<=x*)a", "(?i)x", "\\", "(?P<a>x)(?P=b)", "(.*)*(.*)*(.*)*(.*)*!$"),
)
templates = st.lists(
    st.sampled_from(("{a}", "{b}", "{", "}", "{{", "}}", "{options_}", "{a.b}", "{0}", "w ", "?"))
).map("".join)
flat_wordings = st.fixed_dictionaries(
    {"task": st.sampled_from((*TASKS, "nosuch")), "id": texts, "text": st.one_of(texts, templates)},
    optional={
        "kind": st.sampled_from(("prefix", "template", "", "other")),
        "fields_regex": st.one_of(st.sampled_from(REGEXES), texts),
        "answers": st.dictionaries(st.one_of(texts, st.sampled_from(("shark", "red"))), st.one_of(texts, templates)),
        "source": texts,
        "split": st.sampled_from(("train", "dev", "test", "", "sft")),
    },
)
items = st.lists(st.fixed_dictionaries({"id": texts, "text": st.one_of(good_texts, templates)}), max_size=3)
nested_wordings = st.fixed_dictionaries(
    {"task": st.sampled_from((*TASKS, "nosuch"))},
    optional={
        "instructions": items,
        "templates": items,
        "fields_regex": st.sampled_from(REGEXES),
        "options": st.one_of(st.lists(texts, max_size=3), values),
    },
)


@given(data=st.data())
@examples(0.18)
def test_wordings(base: Path, data: st.DataObject) -> None:
    """Accepted wordings can be put before, or around, every input of their task."""
    rows = data.draw(st.lists(st.one_of(flat_wordings, nested_wordings), max_size=3))
    if rows and data.draw(st.booleans()):
        rows[0] = data.draw(changed_json(rows[0]))
    content = to_bytes("\n".join(map(to_json, rows)))
    if data.draw(st.integers(0, 4)) == 0:
        content = data.draw(damaged_bytes(content))
    words = ('paraphrase.files=["w.jsonl", "wordings.jsonl"]', *data.draw(wordings_words))
    with a_world(base) as world:
        replace(world.folder / "w.jsonl", content)
        if run(world, "paraphrase", "config.toml", *words).code == 0:
            read = read_records(Wording, world.run_folder / "paraphrase/wordings.jsonl")
            inputs = read_records(Example, world.run_folder / "prepare/examples.jsonl")
            with limits():
                for wording in read:
                    for example in inputs:
                        if example.task == wording.task:
                            render_prompt(wording, example.input)


wordings_words = st.lists(
    st.sampled_from(
        (
            *("paraphrase.num_test=0", "paraphrase.num_dev=0", "paraphrase.max_similarity=0", "run.seed=7"),
            *("paraphrase.min_length_ratio=1", "paraphrase.max_length_ratio=1", "paraphrase.num_test=99"),
        )
    ),
    max_size=2,
)

# Configs

KEYS = [key for key in known_keys() if key not in ("slurm", "log.wandb")]
DEFAULTS = table_values(Config(), tuple(Config.model_fields))
PATHS = (
    *("", ".", "..", "../x", "~/x", "$HOME/x", "nowhere", "nowhere/x", "config.toml", "config.toml/x", "data", "loop"),
    *("loop/x", "dangling", "pipe", "/dev/null", "/dev/null/x", "/proc", "/proc/x", "x\x00y", "x\ny", "a" * 300),
    *("\udcff", "x" * 5000, " ", "-x", "--help", "a=b", "日本", "x/../y", "./", "runs/r", "runs/r/prepare", "my-model"),
)
NUMBERS = (0, 1, -1, 2, 0.0, 0.5, 1.0, -0.5, 1e-300, 1e300, 1.5, 10**14, 2**31, 2**63, 2**64, 10**26, -(10**26))
config_values = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(PATHS),
    st.booleans(),
    st.lists(st.sampled_from(PATHS), max_size=2),
    values,
)
COMMANDS = (
    ("prepare", ()),
    ("prepare", ()),
    ("paraphrase", ()),
    ("remaining", ("local",)),
    ("plan", ()),
    ("plan", ("--gpus", "1")),
    ("submit", ("--dry-run",)),
    ("submit", ("--settings",)),
    ("ladder", ("--dry-run",)),
    ("remaining", ("ladder",)),
)
# Of what a config asks for and only memory or time limits, a test can't say what is too much.
UNTRIED = {"model.random.hidden_size", "model.random.num_layers", "model.random.intermediate_size", "run.threads"}


def odd_world(world: World) -> None:
    """Put links, a pipe and a home into the working folder."""
    (world.folder / "home").mkdir()
    (world.folder / "loop").symlink_to("loop")
    (world.folder / "dangling").symlink_to("nothing")
    os.mkfifo(world.folder / "pipe")


def as_word(value: Any) -> str:
    """Return a value as a person would write it on a command line: a text as it is."""
    return value if isinstance(value, str) and value not in PLACEHOLDERS else as_toml(value)


def as_toml(value: Any) -> str:
    """Return a value as TOML or JSON writes it: what TOML has no form for is malformed, as a person's file may be."""
    return to_json(value).replace("NaN", "nan").replace("Infinity", "inf")


@st.composite
def settings(draw: st.DrawFn) -> tuple[str, Any]:
    """Draw a key, mostly known, and a value, mostly of its type."""
    key = draw(st.sampled_from(KEYS))
    default = DEFAULTS.get(key)
    if isinstance(default, bool) or default is None:
        value = draw(config_values)
    elif isinstance(default, int | float):
        value = draw(st.one_of(st.sampled_from(NUMBERS), config_values))
    elif isinstance(default, str):
        value = draw(st.one_of(st.sampled_from(PATHS), texts, config_values))
    else:
        value = draw(st.one_of(st.lists(st.sampled_from(PATHS), max_size=2), config_values))
    if draw(st.integers(0, 9)) == 0:
        key = draw(st.sampled_from((f"{key}x", f"{key}.x", key.upper(), "x.y", ".", "", "a.b.c", "run..name", "\x00")))
    return key, value


@given(data=st.data())
@examples(0.25)
def test_words_of_a_command(base: Path, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(settings(), min_size=1, max_size=2))
    words = [f"{key}={as_word(value)}".replace("\x00", "") for key, value in pairs]  # a word can't hold a NUL
    if data.draw(st.integers(0, 9)) == 0:
        words.append(data.draw(st.sampled_from(("--x", "x", "=", "", "--local_rank=0", "\udcff", "-h", "a=b=c"))))
    step, more = data.draw(st.sampled_from(COMMANDS))
    assert_command(base, step, [*more, "config.toml", *words], {key for key, _ in pairs})


@given(data=st.data())
@examples(0.1)
def test_config_files(base: Path, data: st.DataObject) -> None:
    text = (base / "config.toml").read_text()
    touched = set()
    if data.draw(st.booleans()):
        key, value = data.draw(settings())
        table, _, name = key.rpartition(".")
        text += (
            f"\n[{table}]\n{name} = {as_toml(value)}\n" if data.draw(st.booleans()) else f"\n{key} = {as_toml(value)}"
        )
        text = text.replace(f"[{table}]\n", "", 1) if text.count(f"[{table}]\n") > 1 else text
        touched.add(key)
    content = to_bytes(text)
    if data.draw(st.booleans()):
        content = data.draw(damaged_bytes(content))
    step, more = data.draw(st.sampled_from(COMMANDS))
    assert_command(base, step, [*more, "c.toml"], touched, {"c.toml": content})


def assert_command(
    base: Path, step: str, words: list[str], keys: set[str], files: dict[str, bytes] | None = None
) -> None:
    """Run a command in a folder that has what PATHS name; `keys` are those that it sets."""
    with a_world(base) as world:
        odd_world(world)
        for name, content in (files or {}).items():
            replace(world.folder / name, content)
        if step == "prepare":
            world.remove("prepare")
            if keys & UNTRIED:
                words += PRETRAINED
        run(world, step, *words)
