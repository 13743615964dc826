"""From responses to metrics.json: what is counted, compared and dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coalign.config import RunTable
from coalign.errors import UserError
from coalign.evaluation import models_under_test, summary
from coalign.evaluation import requests as evaluation
from coalign.evaluation.requests import ModelOutput
from coalign.report import terminal
from coalign.runs import costs
from coalign.steps import STEP_TABLES
from unit.worlds import by_rule, example, finish_metrics, half_right, response, results, table, wordings, world


def test_numbers_by_hand() -> None:
    content = results()
    base, align = content["models"]["base"], content["models"]["align"]
    assert base["cr"]["mean"] == pytest.approx(2 / 6)
    assert base["mcr"]["mean"] == pytest.approx(1 / 2)
    assert base["accuracy"]["mean"] == pytest.approx(1 / 2)
    assert base["worst_wording"]["mean"] == 0.0
    assert base["spread"]["mean"] == 1.0
    assert base["expected_cr"]["mean"] == pytest.approx(1 / 2)
    assert base["corrected_cr"]["mean"] == pytest.approx((1 / 3 - 1 / 2) / (1 / 2))
    assert base["inconsistent"]["mean"] == 1.0
    assert align["cr"]["mean"] == align["accuracy"]["mean"] == align["always_right"]["mean"] == 1.0
    assert align["corrected_cr"]["mean"] == 0.0  # one answer to everything
    assert align["seen"]["cr"]["num_tasks"] == align["unseen"]["cr"]["num_tasks"] == 4
    assert align["cr"]["num_tasks"] == 8
    assert base["noise"]["neighbours"] == {"cr": 1.0, "mcr": 1.0, "num_inputs": 1, "num_repeats": 3, "num_tasks": 1}
    assert base["modes_agree"] == {"share": 1.0, "num_answers": 4}
    rows = {(row["a"], row["b"], row["metric"]): row for row in content["differences"]}
    assert rows["base", "align", "cr"]["mean"] == pytest.approx(4 / 6)
    assert rows["base", "align", "cr"]["method"] == "t"
    assert {metric for _, _, metric in rows} == set(summary.COMPARED)
    assert content["differences_seen"][0]["low"] is None


def test_a_constant_answer_is_the_most_frequent_gold_of_each_task() -> None:
    """Golds yes, yes, no of one task and yes three times of another: 2/3 and 1, whatever the models said."""
    tasks, _ = world(2)
    examples = [example("t0", "e0"), example("t0", "e1"), example("t0", "e2", gold="no")]
    examples += [example("t1", f"e{i}", gold="Yes.") for i in range(3)]
    pairs, _ = evaluation.plan_pairs(tasks, examples, [w for task in tasks for w in wordings(task.id)], table())
    outputs = {"gold": by_rule(pairs, lambda pair: pair.example.outputs[0]), "wrong": by_rule(pairs, lambda _: "maybe")}
    content, _ = summary.summarise(tasks, pairs, outputs, table(), seed=0)
    found = content["constant_answer"]
    assert found["accuracy"]["mean"] == pytest.approx(5 / 6)
    assert found["differences"]["gold"]["mean"] == pytest.approx(1 / 6)
    assert found["differences"]["wrong"]["mean"] == pytest.approx(-5 / 6)


def test_shares_of_outcomes_sum_to_one() -> None:
    for model in results()["models"].values():
        shares = [model[key]["mean"] for key in ("always_right", "always_wrong_alike", "inconsistent", "mixed")]
        assert sum(shares) == pytest.approx(1.0)


def test_many_tasks_are_bootstrapped() -> None:
    tasks, pairs = world(22)
    outputs = {
        "a": by_rule(pairs, lambda p: "yes" if int(p.example.task[1:]) % 3 else "no"),
        "b": by_rule(pairs, half_right),
    }
    content, _ = summary.summarise(tasks, pairs, outputs, table(), seed=0)
    accuracy = content["models"]["a"]["accuracy"]
    assert accuracy["method"] == "bootstrap"
    worst = content["models"]["b"]["worst_wording"]
    assert worst["method"] == "t", "a minimum is lower in a resample of few inputs than in all of them"
    assert worst["low"] <= worst["mean"] <= worst["high"]
    assert accuracy["low"] < accuracy["mean"] < accuracy["high"]
    assert content == summary.summarise(tasks, pairs, outputs, table(), seed=0)[0]


def test_intervals_of_shares_end_at_0_and_1() -> None:
    """Where Student's t would go beyond; those of differences, and of corrected CR below 0, are as they are."""
    tasks, pairs = world(8)
    outputs = {
        "most": by_rule(pairs, lambda p: "no" if p.example.task == "t0" else "yes"),
        "few": by_rule(pairs, lambda p: "yes" if p.example.task == "t0" else "no"),
        "half": by_rule(pairs, lambda p: half_right(p) if p.example.task != "t0" else p.wording.id),
    }
    content, _ = summary.summarise(tasks, pairs, outputs, table(), seed=0)
    most, few, half = content["models"].values()
    assert (most["accuracy"]["mean"], most["accuracy"]["high"]) == (pytest.approx(7 / 8), 1.0)
    assert (few["worst_wording"]["mean"], few["worst_wording"]["low"]) == (pytest.approx(1 / 8), 0.0)
    assert half["corrected_cr"]["low"] < -0.3
    moved = next(row for row in content["differences"] if row["metric"] == "accuracy")
    assert moved["mean"] == pytest.approx(-6 / 8) and moved["low"] < -1.0


def test_three_wordings_give_no_cr() -> None:
    tasks, pairs = world(2, num_wordings=3)
    content, _ = summary.summarise(tasks, pairs, {"m": by_rule(pairs, half_right)}, table(), seed=0)
    assert content["models"]["m"]["cr"]["mean"] is None
    assert content["models"]["m"]["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert content["num_tasks_in_cr"] == 0
    left_out = "CR leaves out tasks with fewer than 4 wordings for an input: 2 of 2 (paraphrase.num_test)."
    assert left_out in terminal.headline_lines(content)
    tasks, pairs = world(2, num_wordings=4)
    whole, _ = summary.summarise(tasks, pairs, {"m": by_rule(pairs, half_right)}, table(), seed=0)
    assert not any("CR leaves out" in line for line in terminal.headline_lines(whole))
    tasks, pairs = world(2, num_wordings=3)
    dev, _ = summary.summarise(tasks, pairs, {"m": by_rule(pairs, half_right)}, table(split="dev"), seed=0)
    assert dev["models"]["m"]["cr"]["mean"] == pytest.approx(1 / 3)


def test_silent_answers_agree_with_nothing_and_are_wrong() -> None:
    tasks, pairs = world(1, num_inputs=3)
    answers = [response(pair, "", canonical="") for pair in pairs[:4]]
    answers += [response(pair, "yes", finish="length") for pair in pairs[4:8]]
    answers += [response(pair, "maybe", canonical=None) for pair in pairs[8:]]
    content, _ = summary.summarise(tasks, pairs, {"m": ModelOutput(answers)}, table(), seed=0)
    model = content["models"]["m"]
    assert model["cr"]["mean"] == model["mcr"]["mean"] == model["accuracy"]["mean"] == 0.0
    assert model["counts"] == {"answers": 12, "tokens": 12, "empty": 4, "cut_off": 4, "foreign_vocabulary": 4}
    assert model["noise"]["temperature"]["cr"] is None


def test_pairs_that_one_model_lacks_are_left_out_for_all() -> None:
    tasks, pairs = world(1, num_wordings=5)
    outputs = {"a": by_rule(pairs, half_right), "b": by_rule(pairs[1:], half_right)}
    content, dropped = summary.summarise(tasks, pairs, outputs, table(), seed=0)
    assert [row["reason"] for row in dropped] == ["not_every_model"]
    assert content["num_pairs"] == len(pairs) - 1
    assert content["models"]["a"]["cr"] == content["models"]["b"]["cr"]


def test_every_distinct_pair_is_decided_once() -> None:
    tasks, pairs = world(2)
    asked: list[tuple[str, str]] = []

    def decide(found: list[tuple[str, str]]) -> list[bool]:
        asked.extend(found)
        return [True] * len(found)

    content, _ = summary.summarise(tasks, pairs, {"m": by_rule(pairs, half_right)}, table(), 0, decide)
    assert [set(pair) for pair in asked] == [{"yes", "no"}]
    model = content["models"]["m"]
    assert model["cr"]["mean"] == model["expected_cr"]["mean"] == model["mixed"]["mean"] == 1.0


def model_folder(path: Path, text: str = "{}") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)
    return path


def test_models_are_found_by_step_folder_and_name(tmp_path: Path) -> None:
    steps = {"sft": tmp_path / "run" / "sft", "align": tmp_path / "run" / "align"}
    plain = model_folder(tmp_path / "plain")
    other = tmp_path / "other" / "align"
    model_folder(other / "model")
    (other / "manifest.json").write_text("{}")
    half = tmp_path / "half" / "align"
    model_folder(half / "model")
    (half / "config.json").write_text('{"config": {}, "inputs": {}}')
    found = {
        value: models_under_test.resolve_model(value, steps, "B") for value in ("base", "sft", str(plain), str(other))
    }
    assert found == {
        "base": "B",
        "sft": str(steps["sft"] / "model"),
        str(plain): str(plain),
        str(other): str(other / "model"),
    }
    assert models_under_test.resolve_model("some-lab/some-model", steps, "B") == "some-lab/some-model"
    for bad, message in ((str(half), "not complete"), (str(tmp_path), "holds no model"), ("nowhere", "check the path")):
        with pytest.raises(UserError, match=message):
            models_under_test.resolve_model(bad, steps, "B")


def test_a_model_does_not_judge_itself(tmp_path: Path) -> None:
    tested = model_folder(tmp_path / "tested", '{"a": 1}')
    copy = model_folder(tmp_path / "copy" / "model", '{"a": 1}').parent
    judge = model_folder(tmp_path / "judge", '{"a": 2}')
    folders = {"base": str(tested)}
    chosen, digests = models_under_test.check_models(folders, set(), str(judge))
    assert chosen == str(judge)
    assert set(digests) == {"model base", "judge of agreement"}
    with pytest.raises(UserError, match="same model as 'base'"):
        models_under_test.check_models(folders, {"base"}, str(copy))
    with pytest.raises(UserError, match="neither exact"):
        models_under_test.check_models(folders, set(), str(tmp_path))


def test_metrics_are_json_and_the_terminal_shows_them() -> None:
    metrics = json.loads(json.dumps(results(), allow_nan=False))
    assert len(metrics["most_inconsistent"]) == 0  # the last model is consistent
    text = "\n".join(terminal.text_report(metrics))
    assert "\nSFT (IA) + CAT  " in text
    assert "SFT (IA) + CAT - base" in text
    assert "seen tasks" in text and "unseen tasks" in text
    assert "0.333 [0.333, 0.333]" in text
    assert "dropped: 2 too_long" in text
    assert "an accuracy of 1.000; minus that, accuracy: base -0.500 [-0.500, -0.500]; SFT (IA) + CAT +0.000" in text


def test_cost_is_read_from_the_manifests(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    manifest = {"counts": {"updates": 30, "tokens_trained": 12000, "cores": 2}, "wall_seconds": 1800.0}
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps(manifest))
    rows = costs.cost_rows({"sft": tmp_path / "sft", "align": tmp_path / "align"})
    assert [(row["step"], row["updates"], row["core_hours"]) for row in rows] == [("sft", 30, 1.0)]
    lines = terminal.cost_lines(results() | {"cost": rows})
    assert lines[-1].split() == ["sft", "30", "12,000", "–", "1,800.0", "1.000"]


def test_a_later_round_lists_the_steps_of_earlier_rounds() -> None:
    """The cost of a second round holds what the first one has used."""
    first = costs.steps_so_far(RunTable(folder="runs", name="r"), [])
    assert first == {name: Path("runs/r") / name for name in STEP_TABLES if name != "eval"}
    later = costs.steps_so_far(RunTable(folder="runs", name="r", round=2), [])
    assert later["sft"] == Path("runs/r/sft")
    assert later["align, round 1"] == Path("runs/r/align")
    assert later["align, round 2"] == Path("runs/r/round2/align")
    assert len(later) == 3 + 2 * 4


def test_most_inconsistent_inputs_come_first() -> None:
    tasks, pairs = world(3)
    words = {"e0": "aaaa", "e1": "aabb", "e2": "abcd"}
    output = by_rule(pairs, lambda pair: words[pair.example.id][int(pair.wording.id[1])])
    content, _ = summary.summarise(tasks, pairs, {"m": output}, table(), seed=0)
    rows = content["most_inconsistent"]
    assert [row["example"] for row in rows] == ["e2"] * 3 + ["e1"] * 3
    assert [answer["text"] for answer in rows[0]["answers"]] == list("abcd")
    lines = terminal.inconsistent_lines(finish_metrics(content))
    assert any("a x2 | b x2" in line for line in lines)
