"""The tasks for lm-evaluation-harness: their scoring follows coalign's rules, their documents hold all they need.

tests/peers runs them inside lm-evaluation-harness itself.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from coalign import text
from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.records import Example, Wording, dump_line
from coalign.wordings import wordings
from coalign.wordings.asking import Pair

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "lm_eval"
ANSWERS = st.one_of(st.sampled_from(["yes", "Yes.", " NO", "good", "bad!", "", ".5", "5", ":)", "¼", "ﬁne"]), st.text())


def load(name: str, folder: Path = FOLDER) -> ModuleType:
    """Import a script of the example."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scoring, make_task = load("coalign_scoring"), load("make_task")
MAPPED = Wording("m", "t", "Is it?", fields_regex=r"(?P<a>\w+)", answers={"yes": "good {a}", "no": "bad", "No": "bad"})


def document(wording: Wording, golds: tuple[str, ...] = ("yes",), input_text: str = "robe") -> dict:
    """Return the document of one input, as it is read again from JSON."""
    pair = Pair(
        Example("e", "t", input_text, golds, "test"), wording, wordings.render_prompt(wording, input_text) or ""
    )
    row: dict = json.loads(dump_line(make_task.make_documents([pair], 1)[0]))
    return row


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the scoring file as make_task.py writes it, where coalign isn't installed."""
    folder = tmp_path_factory.mktemp("shipped")
    make_task.write_folder(folder / "new", "n", [document(Wording("p", "t", "Is it?"))], {})
    source = (folder / "new" / "coalign_scoring.py").read_text(encoding="utf-8")
    assert not re.search(r"^(from|import) coalign", source, re.MULTILINE)
    return load("coalign_scoring", folder / "new")


def test_the_shipped_file_compares_as_coalign_does(shipped: ModuleType) -> None:
    """On thousands of strings, with everything that may count."""
    rng = random.Random(0)
    pieces = [
        *"aB5 .,!?'\"*()[]<>-`\n",
        "**",
        "²",
        "１",
        "。",
        "“",
        "”",
        "−",
        "1,000",
        "是",
        "ा",
        "e\u0301",
        "\u200b",
        "yes",
    ]
    strings = ["".join(rng.choices(pieces, k=rng.randint(0, 7))) for _ in range(3000)]
    forms = [(), ("case",), ("space",), ("numbers",), ("case", "space", "numbers")]
    for form in forms:
        assert [shipped.normalise_answer(t, form) for t in strings] == [text.normalise_answer(t, form) for t in strings]
    row = document(MAPPED)
    for answer in strings:
        expected = metrics.answer_key(wordings.canonical_answer(MAPPED, "robe", answer), "stop", ("case",))
        assert shipped.answer_key(answer, row["answers"], ["case"]) == expected


def test_what_counts_in_a_task_is_in_its_documents() -> None:
    wording = Wording("p", "t", "Is it?")
    row = make_task.make_documents([Pair(Example("e", "t", "in", ("mW",), "test"), wording, "")], 1, {"t": ("case",)})[
        0
    ]
    found = [scoring.process_results(row, [said])["accuracy"][1] for said in ("mW.", "MW")]
    assert row["answer_form"] == ["case"] and found == [True, False]


@given(st.one_of(ANSWERS, st.sampled_from(["good robe", "Good robe.", "good {a}", "no", "No"])))
def test_answers_are_compared_as_coalign_does(answer: str) -> None:
    """With and without an answer map, the key of a finished answer is the one that eval compares."""
    for wording in (MAPPED, Wording("p", "t", "Is it?")):
        expected = metrics.answer_key(wordings.canonical_answer(wording, "robe", answer), "stop")
        if not answer.endswith(scoring.CUT_OFF_MARK):
            assert scoring.answer_key(answer, document(wording)["answers"]) == expected


def test_a_cut_off_answer_agrees_with_nothing_and_is_wrong() -> None:
    """The mark behind an answer that didn't end makes it wrong, though its text is the gold answer's."""
    right, cut_off = (scoring.process_results(document(MAPPED), [said]) for said in ("good robe", "good robe\ufffd"))
    assert right == {"accuracy": ("e", True), "cr": ("e", 1, "yes")}
    assert cut_off == {"accuracy": ("e", False), "cr": ("e", 1, None)}


@given(st.lists(st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=1, max_size=6), min_size=1, max_size=5))
def test_cr_and_accuracy_are_means_over_inputs(keys: list[list[str | None]]) -> None:
    """Inputs with different numbers of wordings count alike, and those with too few don't enter CR, as in eval."""
    codes = np.full((len(keys), 6), metrics.ABSENT)
    for row, answers in enumerate(keys):
        codes[row, : len(answers)] = [metrics.SILENT if key is None else ord(key) for key in answers]
    present = codes != metrics.ABSENT
    rates = metrics.consistency_rate(metrics.agreement_matrix(codes), present)[present.sum(axis=1) >= 4]
    found = scoring.cr([(str(i), 4, key) for i, answers in enumerate(keys) for key in answers])
    assert found == pytest.approx(rates.mean() if len(rates) else np.nan, nan_ok=True)
    right = metrics.mean_over_wordings(codes == ord("a"), present).mean()
    found = scoring.accuracy([(str(i), key == "a") for i, answers in enumerate(keys) for key in answers])
    assert found == pytest.approx(right)


def test_document_holds_the_prompt_and_the_words_of_the_wording() -> None:
    """A document shows the prompt as coalign renders it and the gold answers in the words that are asked for."""
    row = document(MAPPED)
    assert row["prompt"] == "Is it?\n\nrobe"
    assert (row["golds"], row["targets"]) == (["yes"], ["good robe"])
    assert ["yes", "good robe"] in row["answers"]


def test_a_task_with_too_few_wordings_has_no_cr() -> None:
    """Without CR in the task's file and in its results, the mean over tasks is not spoiled."""
    pair = Pair(Example("e", "t", "robe", ("yes",), "test"), Wording("p", "t", "Is it?"), "Is it?\n\nrobe")
    (row,) = make_task.make_documents([pair], 4)
    assert "cr" not in scoring.process_results(row, ["yes"])


@pytest.mark.parametrize(
    "task", ["🎈 party", "中文", 'say "a\\b"', "line\u2028\x85separators", "a\x7f\tb", "\ufeffmark"]
)
def test_a_task_is_found_by_any_name(task: str, tmp_path: Path) -> None:
    """What YAML reads from the task's file is the name that its documents have."""
    row = document(Wording("p", "t", "Is it?")) | {"task": task}
    make_task.write_folder(tmp_path / "new", "run", [row], {})
    (path,) = [path for path in (tmp_path / "new").glob("coalign_run_*.yaml")]
    text = path.read_text("utf-8").replace("!function ", "")
    assert yaml.safe_load(text)["dataset_kwargs"] == {"task": task}
    assert json.loads((tmp_path / "new" / "documents.jsonl").read_text("utf-8"))["task"] == task
    group = yaml.safe_load((tmp_path / "new" / "coalign_run.yaml").read_text("utf-8"))
    assert group["task"] == [path.stem]


def test_folder_names_tasks_apart_and_is_not_written_twice(tmp_path: Path) -> None:
    """Tasks whose ids differ in special characters alone get files of their own; a folder with files is refused."""
    rows = [document(Wording("p", "t", "Is it?")) | {"task": task} for task in ("a/b", "a b", "a_b_2")]
    assert make_task.write_folder(tmp_path / "new", "my run", rows, {}) == "coalign_my_run"
    files = {path.name for path in (tmp_path / "new").glob("*.yaml")}
    assert len(files) == 4 and "coalign_my_run.yaml" in files
    with pytest.raises(UserError, match="not empty"):
        make_task.write_folder(tmp_path / "new", "my run", rows, {})
