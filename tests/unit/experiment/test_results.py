"""Seeds to one result: means, paired differences and intervals against numbers by hand and against eval's own."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coalign.config import ModelTable
from coalign.errors import UserError
from coalign.evaluation import summary, tested_models
from coalign.evaluation.intervals import t_quantile
from coalign.evaluation.scores import read_scores
from coalign.experiment import arms, ladder, ladder_result, results
from coalign.experiment.ladder_result import ArmDifference, ArmSets, SeedMean, SetDifferences
from coalign.report import experiment_table
from coalign.runs.atomic_files import write_json, write_rows
from unit.worlds import by_rule, half_right, table, world

Row = dict[str, Any]


def scores(right: list[int], cr: float | None = None, rouge_l: float = 0.5) -> Row:
    """Return what a model's answers to one input are worth."""
    return {"cr": cr, "corrected_cr": cr, "mcr": cr, "rouge_l": rouge_l, "right": right}


def row(task: str, example: str, seen: bool = True, **models: Row) -> Row:
    return {"task": task, "seen": seen, "example": example, "wordings": ["w0", "w1"], "models": models}


def write(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "scores.jsonl", rows)
    return folder


def aggregate(
    folders: list[Path], names: tuple[str, ...] = ("a", "b")
) -> tuple[dict[str, ArmSets], SetDifferences, list[str]]:
    tasks, left_out = read_scores(folders, [names] * len(folders))
    return *results.aggregate(tasks, names, [("b", "a", "why")], 300, 0), left_out


def find(rows: tuple[ArmDifference, ...], metric: str) -> ArmDifference:
    return next(row for row in rows if row.metric == metric)


def test_two_seeds_and_two_tasks_by_hand(tmp_path: Path) -> None:
    """Task t: seed 0 accuracy (1 + 1/2) / 2, worst wording 1/2; seed 1 1/4 and 0. Task u: 0 in both."""
    nothing = {"a": scores([0, 0])}
    first = [
        row("t", "x", a=scores([1, 1], 1.0)),
        row("t", "y", a=scores([1, 0], 0.0)),
        row("u", "z", False, **nothing),
    ]
    second = [
        row("t", "x", a=scores([0, 0], 1.0)),
        row("t", "y", a=scores([1, 0], 0.5)),
        row("u", "z", False, **nothing),
    ]
    folders = [write(tmp_path / "0", first), write(tmp_path / "1", second[::-1])]
    found = aggregate(folders, ("a",))[0]["a"]
    accuracy, cr = found.all.accuracy, found.all.cr
    assert (accuracy.mean, accuracy.seeds) == (pytest.approx(0.25), pytest.approx((0.375, 0.125)))
    assert (cr.mean, cr.seeds) == (pytest.approx(0.625), pytest.approx((0.5, 0.75)))
    assert (accuracy.num_tasks, cr.num_tasks) == (2, 1)
    assert found.seen.accuracy.mean == pytest.approx(0.5)
    assert found.seen.worst_wording.seeds == pytest.approx((0.5, 0.0))
    assert found.unseen.cr == SeedMean(mean=None, seeds=(), num_tasks=0)


def differing(num_tasks: int, seed: int) -> list[Row]:
    """In task i the models differ by i * (1 + seed) hundredths of CR."""
    return [
        row(f"t{i}", "x", a=scores([1, 0], 0.1), b=scores([1, 1], 0.1 + 0.01 * i * (1 + seed)))
        for i in range(num_tasks)
    ]


def test_seven_tasks_have_a_t_interval_of_the_seeds_mean(tmp_path: Path) -> None:
    """A task's difference is 0.015 i, the mean of its seeds; seeds don't make the interval narrower."""
    folders = [write(tmp_path / str(seed), differing(7, seed)) for seed in range(2)]
    row = find(aggregate(folders)[1].all, "cr")
    found = row.estimate
    of_tasks = 0.015 * np.arange(7)
    half = t_quantile(0.975, 6) * of_tasks.std(ddof=1) / np.sqrt(7)
    assert found.method == "t" and found.num_tasks == 7
    assert found.mean == pytest.approx(of_tasks.mean())
    assert (found.low, found.high) == pytest.approx((of_tasks.mean() - half, of_tasks.mean() + half))
    assert row.seeds == pytest.approx((0.03, 0.06))
    assert find(aggregate(folders)[1].all, "accuracy").estimate.mean == pytest.approx(0.5)


@pytest.mark.parametrize(("num_tasks", "method"), [(5, "none"), (6, "t"), (19, "t"), (20, "bootstrap")])
def test_the_rule_for_intervals(num_tasks: int, method: str, tmp_path: Path) -> None:
    found = find(aggregate([write(tmp_path / "0", differing(num_tasks, 0))])[1].all, "cr").estimate
    assert found.method == method and (found.low is None) == (method == "none")
    assert method == "none" or found.low < found.mean < found.high


def test_an_equal_difference_everywhere_has_no_width(tmp_path: Path) -> None:
    """Whatever a resample draws, b is better by one half; what the seeds have in common cancels out."""
    rows = [row(f"t{i}", f"{j}", a=scores([1, 0], 0.2), b=scores([1, 1], 0.7)) for i in range(20) for j in range(3)]
    found = find(aggregate([write(tmp_path / "0", rows), write(tmp_path / "1", rows)])[1].all, "cr").estimate
    assert (found.low, found.mean, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_inputs_and_tasks_that_a_seed_lacks(tmp_path: Path) -> None:
    """A task that not every seed has is left out and named; an input counts in the seeds that have it."""
    first = [row("t", "x", a=scores([1, 1])), row("t", "y", a=scores([0, 0])), row("u", "z", a=scores([1, 1]))]
    second = [row("t", "x", a=scores([1, 1]))]
    found, _, left_out = aggregate([write(tmp_path / "0", first), write(tmp_path / "1", second)], ("a",))
    assert left_out == ["u"]
    assert found["a"].all.accuracy.seeds == pytest.approx((0.5, 1.0))
    assert found["a"].all.accuracy.mean == pytest.approx(0.75)


@pytest.mark.parametrize("num_tasks", [8, 21])
def test_one_seed_gives_evals_own_numbers(num_tasks: int, tmp_path: Path) -> None:
    tasks, pairs = world(num_tasks, num_inputs=4)
    outputs = {"a": by_rule(pairs, half_right), "b": by_rule(pairs, lambda p: "yes" if p.example.id == "e0" else "no")}
    evaluated = summary.summarise(tasks, pairs, outputs, table(num_bootstrap=300), seed=0)
    content, rows = evaluated.summary, json.loads(json.dumps(evaluated.scores))
    found, differences, _ = aggregate([write(tmp_path / "0", rows)])
    for name in outputs:
        for metric in results.DIFFERENCE_ORDER:
            assert found[name].all.of(metric).mean == pytest.approx(content.models[name].all.of(metric).mean), metric
            assert found[name].unseen.of(metric).seeds == pytest.approx((content.models[name].unseen.of(metric).mean,))
    for row in content.differences:
        theirs, mine = row.estimate, find(differences.all, row.metric).estimate
        assert mine.mean == pytest.approx(theirs.mean)
        if row.metric == "worst_wording" and theirs.method == "bootstrap":
            assert mine.method == "t"
            continue
        assert mine.method == theirs.method
        tolerance = 1e-9 if theirs.method == "t" else 0.02  # two draws of a bootstrap
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=tolerance)


def test_a_folder_from_before_scores_were_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no scores\.jsonl; remove it"):
        read_scores([tmp_path], [()])


def made_ladder(home: Path) -> ladder.Ladder:
    """Return a ladder of three arms and two seeds whose every step is complete; each costs 36 s on 2 cores."""
    plan = ladder.Ladder(home, ("base", "sft_ia", "cat"), (0, 1), 0, 40, 16)
    for run in plan.steps():
        run.folder.mkdir(parents=True)
        counts: Row = {"cores": 2}
        if run.step in ("sft", "align"):
            counts |= {"updates": 300 if run.step == "sft" else 40, "tokens": 1000 if run.step == "sft" else 500}
        if run.step in ("sample", "eval"):
            counts |= {"tokens_generated": 70}
        content = {"config": {}, "inputs": {}, "outputs": {}, "counts": counts, "digest": "", "wall_seconds": 36.0}
        write_json(run.folder / "manifest.json", content)
        if run.step == "eval":
            made = {name: scores([1, 0], 0.1 * len(name)) for name in plan.arms}
            write_rows(run.folder / "scores.jsonl", [row(f"t{i}", "x", i < 4, **made) for i in range(8)])
    return plan


def test_costs_count_an_arm_as_if_alone_and_everything_together_once(tmp_path: Path) -> None:
    plan = made_ladder(tmp_path / "demo")
    result = results.make_result(plan, plan.steps(), arms.COMPARISONS, table(num_bootstrap=100), 0)
    costs = {name: arm.cost for name, arm in result.arms.items()}
    assert [costs[name].updates for name in plan.arms] == [(), (300,), (300, 40)]
    assert [costs[name].tokens_trained for name in plan.arms] == [0, 1000, 1500]
    assert [costs[name].tokens_generated for name in plan.arms] == [0, 0, 70]
    assert [round(costs[name].core_hours, 6) for name in plan.arms] == [0.02, 0.06, 0.14]
    together = result.cost.together  # prepare, and for each seed paraphrase, sft, four of cat, eval
    assert together.core_hours == pytest.approx(0.02 * (1 + 2 * 7))
    assert together.tokens_trained == 2 * 1500 and together.tokens_generated == 2 * (70 + 70)
    assert result.cost.eval.tokens_generated == 140


def test_a_result_on_disk_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = made_ladder(tmp_path / "demo")
    result = results.make_result(plan, plan.steps(), arms.COMPARISONS, table(num_bootstrap=100), 0)
    ladder_result.write_result(tmp_path, result)
    content = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert next(iter(content.items())) == ("version", ladder_result.VERSION)
    assert ladder_result.from_json(content) == result
    del content["version"]
    assert ladder_result.from_json(content) == result
    row = content["differences"]["all"][0]
    assert list(row)[:5] == ["a", "b", "what", "metric", "mean"] and list(row)[-1] == "seeds"
    content["arms"]["cat"]["cost"]["updates"] = ["many"]
    with pytest.raises(UserError, match=r"arms\.cat\.cost\.updates\[0\]: a number was expected, not 'many'"):
        ladder_result.from_json(content)
    content["version"] = ladder_result.VERSION + 1
    with pytest.raises(UserError, match="upgrade coalign"):
        ladder_result.from_json(content)


def test_the_table_and_the_figure_show_every_arm(tmp_path: Path) -> None:
    plan = made_ladder(tmp_path / "demo")
    result = results.make_result(plan, plan.steps(), arms.COMPARISONS, table(num_bootstrap=100), 0)
    lines = experiment_table.table_lines(result)
    assert (
        "| cat: + CAT (self-reward) | 0.500 | 0.300 | 0.300 | 0.300 | 0.000 | 0.500 | 300 + 40 | 1,500 | 70 | 0.140 |"
        in lines
    )
    shown = [line for line in lines if line.startswith("| cat - sft_ia |")]
    assert len(shown) == 3, "all, seen and unseen tasks"
    assert "| -0.300 [-0.300, -0.300] |" in shown[0] and "| -0.300 |" in shown[1]
    assert sum(line.startswith("| cat | ") for line in lines) == 2, "a row a seed"
    widths = {len(line.split(" | ")) for line in lines if line.startswith("| base") or line.startswith("| cat:")}
    assert len(widths) == 2  # with the costs, and a seed's
    assert "- `sft_ia`, SFT (IA): nothing beyond the common settings" in lines
    svg, png = experiment_table.draw(result, tmp_path)
    text = svg.read_text("utf-8")
    xml.etree.ElementTree.fromstring(text)
    assert all(words in text for words in ("SFT (IA)", "+ CAT (self-reward)", "cat - sft_ia", "mean over seeds"))
    assert png.read_bytes().startswith(b"\x89PNG")
    experiment_table.draw(result, tmp_path)
    assert svg.read_text("utf-8") == text, "the same result gives the same file"


def test_a_trained_step_of_another_run_is_asked_within_its_own_context(tmp_path: Path) -> None:
    """A foreign model goes by its own tokens; an arm by those that it was trained with."""
    own = ModelTable(max_tokens=64, end_of_turn="<end>", chat_template="a.jinja")
    kept = {"model.too_long": "drop", "model.max_tokens": 64, "model.end_of_turn": "<end>", "model.pad_token": ""}
    content = {"config": kept | {"model.attention": "sdpa"}, "inputs": {}, "outputs": {}, "counts": {}, "digest": "d"}
    write_json(tmp_path / "manifest.json", content)
    assert tested_models.model_table("sft", own) is own
    assert tested_models.model_table("some/model", own) == ModelTable()
    found = tested_models.model_table(str(tmp_path), ModelTable())
    assert (found.max_tokens, found.end_of_turn, found.chat_template) == (64, "<end>", "")
