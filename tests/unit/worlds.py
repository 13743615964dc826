"""Small results and runs made up for tests of the metrics and the report; nothing is generated or trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from coalign.config import Config, EvalTable
from coalign.config_values import table_values
from coalign.evaluation import requests, summary
from coalign.evaluation.metrics_file import write_metrics
from coalign.evaluation.metrics_schema import Metrics, Summary, complete
from coalign.evaluation.requests import ModelOutput
from coalign.records import Example, Response, Task, Wording
from coalign.runs.costs import StepCost
from coalign.steps import STEP_TABLES
from coalign.wordings.asking import Pair


def table(**values: Any) -> EvalTable:
    return EvalTable.model_validate({"num_bootstrap": 200, **values})


def wordings(task: str, count: int = 4) -> list[Wording]:
    return [Wording(f"w{i}", task, f"Ask {i} <{task}>", split="test") for i in range(count)]


def example(task: str, name: str, gold: str = "yes", split: Any = "test") -> Example:
    return Example(name, task, f"input {name} of {task}", (gold,), split)


def response(pair: Pair, text: str, finish: Any = "stop", sample: int = 0, canonical: str | None = "same") -> Response:
    task, name, wording = pair.key
    return Response(name, task, wording, sample, text, text if canonical == "same" else canonical, finish, 1)


def world(num_tasks: int, num_inputs: int = 3, num_wordings: int = 4) -> tuple[list[Task], list[Pair]]:
    tasks = [Task(f"t{i}", "Ask", seen=i % 2 == 0) for i in range(num_tasks)]
    examples = [example(task.id, f"e{i}") for task in tasks for i in range(num_inputs)]
    pairs, dropped = requests.plan_pairs(
        tasks, examples, [w for task in tasks for w in wordings(task.id, num_wordings)], table()
    )
    assert not dropped
    return tasks, pairs


class WordCodec:
    """Encodes a prompt as one id per word."""

    max_tokens = 8

    def encode_prompt(self, user_text: str) -> list[int]:
        return list(range(len(user_text.split())))

    encode_request = encode_plain = encode_prompt


def by_rule(pairs: list[Pair], answer: Any) -> ModelOutput:
    answers = [response(pair, answer(pair)) for pair in pairs]
    repeats = [response(pair, answer(pair), sample=i) for pair in pairs[:1] for i in range(3)]
    return ModelOutput(answers, repeats, repeats, answers[:4])


def half_right(pair: Pair) -> str:
    return "Yes." if pair.wording.id in ("w0", "w1") else "no"


def finish_metrics(content: Summary, **fields: Any) -> Metrics:
    """Return a summary as the metrics of a made-up run; `fields` replace those of the run."""
    of_run: dict[str, Any] = {
        "cost": (),
        "run": "demo",
        "sources": {"base": "base", "align": "align"},
        "labels": {"base": "base", "sft": "SFT (IA)", "align": "SFT (IA) + CAT"},
        "dropped": {"too_long": 2},
        "settings": {"run.name": "<b>demo</b>"},
        "versions": {"coalign": "0"},
    }
    return complete(content, **of_run | fields)


def summarised(
    outputs: dict[str, ModelOutput], tasks: list[Task], pairs: list[Pair], fields: dict[str, Any] | None = None
) -> Metrics:
    """Return the metrics of these answers; `fields` as for finish_metrics."""
    return finish_metrics(summary.summarise(tasks, pairs, outputs, table(), seed=0).summary, **fields or {})


def results(num_tasks: int = 8) -> Metrics:
    """Return the metrics of two models on a made-up world, the second one right and consistent."""
    tasks, pairs = world(num_tasks)
    outputs = {"base": by_rule(pairs, half_right), "align": by_rule(pairs, lambda pair: "yes")}
    found = summary.summarise(tasks, pairs, outputs, table(), seed=0)
    assert not found.dropped
    return finish_metrics(found.summary)


QUALITY = {
    "num_yes": 4,
    "num_no": 3,
    "balanced_accuracy": 0.8,
    "auc": None,
    "false_correct": 0.1,
    "false_incorrect": 0.2,
}
CALIBRATION = {"threshold": 0.1, "fitted": True, "fit_rows": {"yes": 4, "no": 3}}
CALIBRATION |= {key: QUALITY for key in ("quality", "quality_dev", "quality_audit")}
COUNTS: dict[str, dict[str, Any]] = {
    "prepare": {"tasks": {"seen": 4, "unseen": 4, "with_labels": 8}, "inputs": {"sft": 9, "test": 24}},
    "paraphrase": {"wordings": 40, "sources": {"original": 8, "model": 32}},
    "sft": {"updates": 3},
    "sample": {"responses": 12},
    "judge": {
        "responses": 12,
        "distinct": 9,
        "rewards": {"0": 3, "1": 2, "2": 4},
        "rules": {"type": 3, "correct": 2, "exact_match": 4},
        "rewards_by_task": {"t0": {"0": 3, "1": 2, "2": 4}},
        "calibration": {"type": CALIBRATION, "correct": CALIBRATION},
        "weak": True,
    },
    "rank": {
        "groups": 6,
        "inputs_with_groups": 3,
        "sizes": {"2": 4, "10": 2},
        "ordered_pairs": 8,
        "tied_pairs": 2,
        "groups_with_ordered_pair": 5,
        "gold_joined": 1,
        "dropped": {},
    },
    "align": {"updates": 3},
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_step(run: Path, name: str, config: dict[str, Any] | None = None) -> str:
    """Write a complete step as the recipes leave it, and return its digest."""
    folder = run / name
    folder.mkdir(parents=True)
    settings = table_values(Config(), STEP_TABLES[name], with_neutral=False)
    manifest = {
        "config": settings | (config or {}),
        "inputs": {"data": "d" * 64} if name == "prepare" else {"prepare": "p" * 64},
        "outputs": {"dropped.jsonl": "e" * 64},
        "counts": COUNTS[name],
        "digest": f"digest of {name}",
        "finished": "2026-01-02T03:04:05Z",
        "wall_seconds": 1.5,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    write_rows(
        folder / "dropped.jsonl", [{"reason": "too_short", "text": f"short <i>{name}</i> {i}"} for i in range(5)]
    )
    if name == "paraphrase":
        write_rows(folder / "wordings.jsonl", [{"source": "model", "text": "Kept & well", "task": "t0"}])
    if name in ("sft", "align"):
        parts = {"loss_best": 1.0, "loss_ranking": 0.5, "active_pairs": 0.4, "p_best": -1.0, "p_others": -2.0}
        train = {"kind": "train", "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 3.0, "p_worst": -3.0, **parts}
        rows = [{**train, "step": step} for step in range(1, 4)]
        dev = {"kind": "dev", "dev_loss": 2.5, "cr": 0.5, "accuracy": 0.2, "end_of_turn": 1.0}
        write_rows(folder / "metrics.jsonl", [{**dev, "step": 0}, *rows, {**dev, "step": 3}])
    return f"digest of {name}"


def make_run(run: Path, metrics: Metrics, config: dict[str, Any] | None = None) -> Path:
    """Write a whole run with these metrics and return its eval folder."""
    names = [name for name in STEP_TABLES if name != "eval"]
    lineage = {name: make_step(run, name, (config or {}).get(name)) for name in names}
    used: dict[str, Any] = {"updates": None, "tokens_trained": 1000, "tokens_generated": None}
    cost = tuple(StepCost(step=name, **used, wall_seconds=1.5, core_hours=None) for name in names)
    steps = {name: str(run / name) for name in names}
    (run / "eval").mkdir()
    content = dataclasses.replace(metrics, lineage=lineage, steps=steps, cost=cost, eval_seconds=77.5)
    write_metrics(run / "eval", content)
    return run / "eval"
