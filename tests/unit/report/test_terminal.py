"""What eval prints: the headline, tasks left out of CR, noise, costs, inconsistent inputs."""

from __future__ import annotations

import dataclasses

from coalign.report import terminal
from coalign.runs.costs import StepCost
from unit.worlds import by_rule, half_right, results, summarised, world


def test_the_terminal_shows_the_metrics() -> None:
    metrics = results()
    assert not metrics.most_inconsistent  # the last model is consistent
    text = "\n".join(terminal.text_report(metrics))
    assert "\nSFT (IA) + CAT  " in text
    assert "SFT (IA) + CAT - base" in text
    assert "seen tasks" in text and "unseen tasks" in text
    assert "0.333 [0.333, 0.333]" in text
    assert "dropped: 2 too_long" in text
    assert "an accuracy of 1.000; minus that, accuracy: base -0.500 [-0.500, -0.500]; SFT (IA) + CAT +0.000" in text


def test_tasks_with_too_few_wordings_are_said_to_be_left_out_of_cr() -> None:
    tasks, pairs = world(2, num_wordings=3)
    left_out = "CR leaves out tasks with fewer than 4 wordings for an input: 2 of 2 (paraphrase.num_test)."
    assert left_out in terminal.headline_lines(summarised({"m": by_rule(pairs, half_right)}, tasks, pairs))
    tasks, pairs = world(2, num_wordings=4)
    whole = summarised({"m": by_rule(pairs, half_right)}, tasks, pairs)
    assert not any("CR leaves out" in line for line in terminal.headline_lines(whole))


def test_costs_have_a_dash_where_nothing_is_known() -> None:
    cost = StepCost(
        step="sft", updates=30, tokens_trained=12000, tokens_generated=None, wall_seconds=1800.0, core_hours=1.0
    )
    lines = terminal.cost_lines(dataclasses.replace(results(), cost=(cost,)))
    assert lines[-1].split() == ["sft", "30", "12,000", "–", "1,800.0", "1.000"]
    assert terminal.cost_lines(results()) == []


def test_inconsistent_inputs_have_their_distinct_answers_counted() -> None:
    tasks, pairs = world(3)
    output = by_rule(pairs, lambda pair: "aabb"[int(pair.wording.id[1])])
    lines = terminal.inconsistent_lines(summarised({"m": output}, tasks, pairs))
    assert any("a x2 | b x2" in line for line in lines)


def test_no_line_has_what_a_terminal_obeys() -> None:
    tasks, pairs = world(3)
    output = by_rule(pairs, lambda pair: ("\x1b]0;x\x07", "b\u202e")[int(pair.wording.id[1]) % 2])
    lines = terminal.text_report(summarised({"m": output}, tasks, pairs))
    assert all(line.isprintable() for line in lines)
    assert any(r"\x1b]0;x\x07 x2 | b\u202e x2" in line for line in lines)
    runs = {"a\nb\x1b": results()}
    assert r"a\nb\x1b" in "".join(terminal.compare_lines(runs))
