"""lm-evaluation-harness, in an environment of its own (environments.py), measures what coalign's eval measures."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.commands import ROOT, Run, start, started
from peers.environments import python_of

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3600)]

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
MAX_NEW_TOKENS = 2  # enough for yes and for a number, too few for the task that repeats a word
TASKS = ("has_animal", "has_food", "count_words", "letter_count", "double_first")  # yes and no, numbers, two words
SWAPPED = {"yes": "no", "no": "yes"}  # answer maps that turn what the model says into another answer
SHIFTED = {"3": "4", "4": "5", "5": "6", "6": "3"}
MANY_WORDS = r"(?P<first>\w+) (?P<rest>\w+ \w+ \w+.*)"  # fits inputs of four words and more


@pytest.fixture(scope="module")
def lm_eval() -> str:
    """Return the command of lm-evaluation-harness."""
    return str(Path(python_of("lm-eval")).with_name("lm_eval"))


@pytest.fixture(autouse=True, scope="module")
def _leave_nothing_running() -> Iterator[None]:
    """End what a failed test has left running."""
    yield
    while started:
        started.pop().end()


def read_phrasebook(task: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a task of the phrasebook and its held-out wordings."""
    folder = ROOT / "examples" / "phrasebook"
    rows = map(json.loads, (folder / "wordings.jsonl").read_text("utf-8").splitlines())
    wordings = [row for row in rows if row["task"] == task and row["split"] == "test"]
    return json.loads((folder / "tasks" / f"{task}.json").read_text("utf-8")), wordings


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_data() -> list[dict[str, Any]]:
    """Return the rows of a few tasks that a tiny model learns in part."""
    rows = []
    for name in TASKS:
        task, _ = read_phrasebook(name)
        for instance in task["Instances"]:
            answers = {"input": instance["input"], "outputs": instance["output"]}
            rows.append({"task": name, "instruction": task["Definition"][0], **answers})
    return rows


def make_wordings() -> list[dict[str, Any]]:
    """Return plain wordings, answer maps, templates that some inputs don't fit, and a task with too few."""
    held_out = {name: read_phrasebook(name)[1] for name in TASKS}
    chosen = [*held_out["has_animal"][:3], held_out["has_animal"][3] | {"answers": SWAPPED}]
    chosen += held_out["has_food"][:3]
    chosen += [*held_out["count_words"][:3], held_out["count_words"][3] | {"answers": SHIFTED}]
    template = {"id": "template", "kind": "template", "fields_regex": MANY_WORDS, "split": "test"}
    chosen.append({"task": "count_words", "text": "{first} {rest}\n\nHow many?", "answers": SHIFTED, **template})
    chosen += [*held_out["letter_count"][:3], {"task": "letter_count", "text": "Letters: {first} {rest}", **template}]
    # One wording twice: two answers that are cut off alike.
    return [*chosen, *held_out["double_first"][:3], held_out["double_first"][0] | {"id": "again"}]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Return a run whose eval has measured stage 1 under the wordings of a file, and that file."""
    folder = tmp_path_factory.mktemp("peers")
    data = write_rows(folder / "data.jsonl", make_data())
    wordings = write_rows(folder / "wordings.jsonl", make_wordings())
    run = Run(folder / "tiny")
    same = ["generation.workers=0", f"data.path={data}", "data.format=jsonl", "data.unseen_tasks=[]"]
    same.append("sft.max_steps=240")
    for step in ("prepare", "paraphrase", "sft"):
        run.step(step, *same)
    run.step(
        "eval",
        *same,
        'eval.models=["sft"]',
        f"eval.wordings_file={wordings}",
        "eval.max_wordings=0",
        f"eval.max_new_tokens={MAX_NEW_TOKENS}",
        "eval.noise_inputs=0",
    )
    return run, wordings


def evaluate(lm_eval: str, run: Run, wordings: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Export the task, move it, let lm_eval measure the run's stage-1 model with it; return its results by task."""
    script = [sys.executable, "examples/lm_eval/make_task.py", str(run.path), str(folder / "made"), "--name", "peer"]
    options = ["--wordings", str(wordings), "--max-new-tokens", str(MAX_NEW_TOKENS)]
    made = start([*script, *options], folder / "printed").wait()
    assert made.returncode == 0, made.stderr
    task = (folder / "made").rename(folder / "moved")
    command = [lm_eval, "--model", "hf", "--model_args", f"pretrained={run.path / 'sft' / 'model'}", "--device", "cpu"]
    command += ["--tasks", "coalign_peer", "--include_path", str(task), "--apply_chat_template"]
    done = start([*command, "--output_path", str(folder / "results")], folder / "printed", OFFLINE).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (folder / "results").rglob("results*.json")
    results: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8"))["results"]
    return results


def test_lm_eval_measures_the_same_accuracy_and_cr(lm_eval: str, measured: tuple[Run, Path], tmp_path: Path) -> None:
    """The exported task gives a task's accuracy and CR, and their means over tasks, as metrics.json has them."""
    run, wordings = measured
    metrics = json.loads((run.path / "eval" / "metrics.json").read_text("utf-8"))
    results = evaluate(lm_eval, run, wordings, tmp_path)

    rows = {f"coalign_peer_{row['task']}": row["models"]["sft"] for row in metrics["per_task"]}
    assert results.keys() == {"coalign_peer", *rows}
    for name, row in rows.items():
        assert results[name]["accuracy,none"] == pytest.approx(row["accuracy"], abs=1e-9), name
        assert results[name].get("cr,none") == pytest.approx(row["cr"], abs=1e-9), name
    means = metrics["models"]["sft"]
    for metric in ("accuracy", "cr"):
        assert results["coalign_peer"][f"{metric},none"] == pytest.approx(means[metric]["mean"], abs=1e-9)

    # What makes the comparison worth something: the model is right at times, and every rule had work to do.
    assert any(0 < row["accuracy"] < 1 for row in rows.values())
    assert any(row["cr"] is not None and 0 < row["cr"] < 1 for row in rows.values())
    assert rows["coalign_peer_has_food"]["cr"] is None
    answers = map(json.loads, (run.path / "eval" / "answers.jsonl").read_text("utf-8").splitlines())
    cut_off = Counter((a["example"], a["text"]) for a in answers if a["finish"] == "length" and a["task"] == TASKS[-1])
    assert max(cut_off.values()) > 1, "no two cut-off answers that would agree if they counted"
    sizes = {row["task"]: (row["num_inputs_in_cr"], row["num_inputs"]) for row in metrics["per_task"]}
    assert 0 < sizes["letter_count"][0] < sizes["letter_count"][1]
