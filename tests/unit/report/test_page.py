"""The report's page: what it shows of which data, what it leaves out, its size, and that no text becomes markup."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coalign.errors import UserError
from coalign.evaluation import cases, metrics_file, summary
from coalign.evaluation.metrics_rows import KindCounts, TaskRow, WordingMetrics
from coalign.evaluation.metrics_schema import EvalCounts, Metrics, NoiseFloors
from coalign.experiment.arms import ARMS
from coalign.records import Example, Response, Task
from coalign.report import (
    case_tables,
    charts,
    comparison,
    data_stories,
    figures,
    page,
    run_history,
    sentences,
    terminal,
)
from integration.bad_inputs import run_recipe
from unit.worlds import (
    by_rule,
    finish_metrics,
    half_right,
    make_run,
    make_step,
    results,
    summarised,
    table,
    world,
    write_rows,
)

ROOT = Path(__file__).parents[3]
EVIL = "<script>alert('&')</script><img src=x onerror=alert(1)> $x_1$ 中文 عربي \u0007"


class Tags(html.parser.HTMLParser):
    """Collects what a page would load, its headings and its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts = 0
        self.handlers: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.unnamed: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.scripts += tag == "script"
        self.handlers += [name for name in values if name.startswith("on")]
        self.loaded += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "svg" and not values.get("aria-label"):
            self.unnamed.append(tag)


def parse(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    return tags


def check_page(text: str) -> Tags:
    """Fail unless a page loads nothing, has one script, named pictures, unique ids and headings in order."""
    tags = parse(text)
    assert [one for one in tags.loaded if not one.startswith("#") and one != "data:,"] == []
    assert tags.scripts == 1 and not tags.handlers and not tags.unnamed
    assert len(set(tags.ids)) == len(tags.ids)
    assert {one[1:] for one in tags.loaded if one.startswith("#")} <= set(tags.ids)
    assert tags.headings[0] == 1 and tags.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(tags.headings, tags.headings[1:], strict=False))
    assert "://" not in re.sub(r">[^<]*<", "><", text)
    assert len(text.encode()) <= page.MAX_BYTES
    assert "None" not in re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL).replace("<p>None", "")
    return tags


def test_a_whole_run_is_shown(tmp_path: Path) -> None:
    """Every section is there, with what the steps have left on disk."""
    folder = make_run(tmp_path / "run", results())
    text = page.write_page(*metrics_file.read_metrics(folder)).read_text("utf-8")
    check_page(text)
    for name in ("result", "tasks", "wordings", "inputs", "failures", "data", "training", "record"):
        assert f'<h2 id="{name}"' in text, name
    assert "From base to SFT (IA) + CAT, consistency (CR) rose from 0.333 [0.333, 0.333] to 1.000 [1.000" in text
    assert "short &lt;i&gt;paraphrase&lt;/i&gt; 0" in text and "short &lt;i&gt;paraphrase&lt;/i&gt; 3" not in text
    assert "Kept &amp; well" in text
    assert "judge.allow_weak" in text and "1 (33%)" in text  # gold joined
    assert text.count("p of best and worst responses") == 2  # the title and the picture's text
    assert "Not everything is shown" not in text
    assert "2026-01-02 03:04:05" in text and "d" * 64 in text
    assert "gold answers of other inputs or tasks: easy ones" in text
    assert "0 of 5 (0.0%) got reward 2 though they equal no gold answer" in text


def test_eval_standing_alone_leaves_sections_out(tmp_path: Path) -> None:
    text = page.render_page(results())
    check_page(text)
    for name in ("data", "training"):
        assert f'id="{name}"' not in text
    folder = make_run(tmp_path / "run", results())
    (tmp_path / "run" / "sft" / "manifest.json").unlink()
    (tmp_path / "run" / "judge").rename(tmp_path / "gone")
    make_step(tmp_path / "other", "align")
    stale = tmp_path / "run" / "align" / "manifest.json"
    stale.write_text(stale.read_text().replace("digest of align", "another"))
    text = page.write_page(*metrics_file.read_metrics(folder)).read_text("utf-8")
    check_page(text)
    assert "judge: its folder is not here" in text
    assert "Stage 1: fine-tuning" not in text and "Stage 2: consistency" not in text
    assert text.count("is not what these results were made from") == 2


def test_steps_are_found_where_eval_has_seen_them(tmp_path: Path) -> None:
    """A borrowed step lies elsewhere; a step of a later round beside eval's folder or under the run."""
    make_run(tmp_path / "run", results())
    digest = make_step(tmp_path / "other", "sft")
    lineage, steps = {"sft": digest, "round2/align": "r"}, {"sft": str(tmp_path / "other" / "sft")}
    metrics = replace(results(), lineage=lineage, steps=steps)
    make_step(tmp_path / "new" / "round2", "align")
    manifest = tmp_path / "new" / "round2" / "align" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("digest of align", "r"))
    found, missing = run_history.find_steps(tmp_path / "new" / "round2" / "eval", metrics)
    assert [(step.label, step.folder.parent.name) for step in found] == [("sft", "other"), ("round2/align", "round2")]
    assert not missing
    assert data_stories.step_title(found[1]) == "Stage 2: consistency alignment, round 2"


@pytest.mark.parametrize("names", [("one",), ("a", "b", "c", "d", "e", 'f"{}<x>')])
def test_one_model_and_many(names: tuple[str, ...]) -> None:
    tasks, pairs = world(8)
    outputs = {name: by_rule(pairs, half_right if i % 2 else lambda pair: "yes") for i, name in enumerate(names)}
    metrics = summarised(outputs, tasks, pairs, {"sources": dict.fromkeys(names, "some/where")})
    text = page.render_page(metrics)
    check_page(text)
    if len(names) == 1:
        assert "one has a CR of 1.000 [1.000, 1.000] and an accuracy of" in text
        assert "→" not in text.partition("</style>")[2].partition("<script")[0].replace("→</", "")
    else:
        assert text.count("Of 8 tasks") == 2 * 4  # the first against four others, in caption and alternative text


def arms_of_a_ladder(*names: str) -> Metrics:
    """Return the metrics of these arms as a ladder evaluates them together: every model a path, titles as labels."""
    tasks, pairs = world(8)
    rules = {"base": half_right, "sft": half_right, "sft_ia": half_right}
    outputs = {name: by_rule(pairs, rules.get(name, lambda pair: "yes")) for name in names}
    sources = {name: f"runs/x/seed0/{name}/{ARMS[name].result}" if ARMS[name].result else "base" for name in names}
    labels = {name: ARMS[name].title for name in names}
    return summarised(outputs, tasks, pairs, {"sources": sources, "labels": labels})


def test_arms_are_compared_as_the_ladder_compares_them() -> None:
    """Each with the arm that it differs from, stage 2 as the main pair; not the first model with four others."""
    metrics = arms_of_a_ladder("base", "sft", "sft_ia", "sft_ia_more", "sft_gold", "cat", "cat_no_gold")
    pairs = [("sft", "sft_ia"), ("sft_ia", "cat"), ("sft_ia_more", "cat"), ("sft_gold", "cat")]
    assert figures.model_pairs(metrics) == pairs
    assert figures.main_pair(metrics) == ("sft_ia", "cat")
    assert [figure.title for figure in figures.task_figures(metrics)][:2] == [
        "SFT, original wordings → SFT (IA)",
        "SFT (IA) → + CAT (self-reward)",
    ]
    assert [figure.title.partition(", ")[2] for figure in figures.wording_figures(metrics)] == [
        "SFT (IA)",
        "+ CAT (self-reward)",
    ]
    sentence = sentences.last_stage_sentence(metrics)
    assert sentence.startswith(
        "From SFT (IA) to + CAT (self-reward), consistency (CR) rose from 0.333 [0.333, 0.333] to 1.000 [1.000, 1.000],"
        " by +0.667 [+0.667, +0.667], and accuracy"
    )
    backwards = arms_of_a_ladder("cat", "sft_ia", "base")
    assert sentences.last_stage_sentence(backwards) == sentence
    text = page.render_page(metrics)
    check_page(text)
    assert "are in their own folders: SFT, original wordings in <code>runs/x/seed0/sft/sft</code>; SFT (IA) in" in text
    assert "in their own folders" not in page.render_page(results())


def test_models_that_are_neither_stages_nor_arms_are_compared_with_the_first() -> None:
    names = list("abcdef")
    whole = results()
    model = whole.models["base"]
    metrics = replace(whole, models=dict.fromkeys(names, model), sources=dict.fromkeys(names, "some/where"))
    assert figures.model_pairs(metrics) == [("a", "b"), ("a", "c"), ("a", "d"), ("a", "f")]
    assert figures.main_pair(metrics) == ("a", "f")
    stages = {name: name for name in ("base", "sft", "align")}
    stages = replace(whole, models=dict.fromkeys(stages, model), sources=stages)
    assert figures.model_pairs(stages) == [("base", "sft"), ("sft", "align")]
    assert figures.main_pair(stages) == ("sft", "align")
    sources = {"base": "base", "sft_ia": "x/sft_ia/sft"}
    alone = replace(whole, models=dict.fromkeys(sources, model), sources=sources)
    assert figures.model_pairs(alone) == [("base", "sft_ia")] == [figures.main_pair(alone)]


def test_few_tasks_and_few_wordings() -> None:
    """No interval under six tasks, no CR under four wordings: said, not shown as numbers."""
    tasks, pairs = world(3)
    few = summarised({"base": by_rule(pairs, half_right), "align": by_rule(pairs, half_right)}, tasks, pairs)
    text = page.render_page(few)
    check_page(text)
    assert "too few tasks for an interval" in text
    tasks, pairs = world(3, num_wordings=2)
    none = summarised({"base": by_rule(pairs, half_right), "align": by_rule(pairs, half_right)}, tasks, pairs)
    text = page.render_page(none)
    check_page(text)
    assert "consistency (CR) is not known" in text and "No task has the 4 wordings" in text
    assert 'data-outcomes="nn"' in text


def test_older_metrics_have_no_inputs_and_no_failures() -> None:
    metrics = replace(results(), cases=(), failures=None)
    text = page.render_page(metrics)
    check_page(text)
    assert 'id="inputs"' not in text and 'id="failures"' not in text


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    """Answers, inputs, wordings, task names, model names, settings and dropped rows are text, in pictures too."""
    tasks, pairs = world(8)
    swap = {task.id: f"{task.id} {EVIL}" for task in tasks}
    pairs = [
        type(pair)(
            Example(pair.example.id, swap[pair.example.task], EVIL, (EVIL, "no"), "test"),
            type(pair.wording)(pair.wording.id, swap[pair.wording.task], EVIL + pair.wording.id, split="test"),
            EVIL,
        )
        for pair in pairs
    ]
    tasks = [Task(swap[task.id], EVIL, ("no", "yes")) for task in tasks]
    name = f"model {EVIL}"
    outputs = {
        "base": by_rule(pairs, lambda pair: EVIL if pair.wording.id == "w0" else "no " + EVIL),
        name: by_rule(pairs, lambda pair: "no" if pair.wording.id == "w0" else EVIL),
    }
    metrics = summarised(outputs, tasks, pairs, {"run": EVIL, "sources": {}, "dropped": {EVIL: 2}})
    folder = make_run(tmp_path / "run", metrics)
    dropped = tmp_path / "run" / "paraphrase" / "dropped.jsonl"
    dropped.write_text(json.dumps({"reason": EVIL, "text": EVIL}) + "\n")
    astray = [{"reason": "astray_wording", "task": EVIL, "text": EVIL, "agreement": 0.0}] * 4
    write_rows(tmp_path / "run" / "rank" / "dropped.jsonl", [*astray, {"reason": "too_little_agreement"}])
    _, metrics = metrics_file.read_metrics(folder)
    text = page.write_page(folder, metrics).read_text("utf-8")
    tags = parse(text)
    assert tags.scripts == 1 and not tags.handlers and "x" not in tags.loaded
    assert "4 generated wordings were left out" in text
    assert "中文" in text and "عربي" in text and "&lt;script&gt;alert(" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "<script" not in style and "onerror" in style and "alert(1)>" not in style
    runs = [comparison.Run(EVIL, folder, metrics), comparison.Run("b", folder, metrics)]
    tags = parse(comparison.render_comparison(runs))
    assert tags.scripts == 1 and not tags.handlers and "x" not in tags.loaded


def test_a_large_run_stays_under_the_limit() -> None:
    """Fewer inputs, tasks and wordings are shown, and the page says how many of how many."""
    tasks, pairs = world(420, num_inputs=4, num_wordings=6)

    def long(pair: Any) -> str:
        return f"{pair.wording.id} of {pair.example.id} " * 30

    outputs = {name: by_rule(pairs, long) for name in ("base", "sft", "align")}
    metrics = summarised(outputs, tasks, pairs)
    assert len(metrics.cases) == cases.NUM_CASES
    text = page.render_page(metrics)
    check_page(text)
    shown = text.count('<details class="case"')
    assert 20 <= shown < cases.NUM_CASES
    assert f"{shown} of 1680 inputs" in text
    assert re.search(r"the first \d+ of 420", text) and re.search(r"The first \d+ of 2520 wordings", text)


def test_no_run_is_too_large_for_the_limit() -> None:
    """What doesn't shrink with the number of rows is left out, and the page says so; one sentence is always there."""
    metrics = results()
    long = replace(metrics.per_wording[0], task="long " * 500_000)
    metrics = replace(metrics, per_wording=(long, *metrics.per_wording))
    text = page.render_page(metrics)
    check_page(text)
    assert "tasks, wordings, inputs, failures, data and training are left out here" in text
    assert "All tasks" in text and 'id="record"' in text and 'href="#tasks"' not in text
    metrics = replace(metrics, settings={"run.name": "x" * page.MAX_BYTES})
    text = page.render_page(metrics)
    check_page(text)
    assert "everything else is left out here" in text and "answers by each of 2 models" in text
    assert "consistency (CR) rose from" in text and 'id="record"' not in text


def test_pictures_of_many_tasks_and_wordings_show_some() -> None:
    """The longest moves, quantiles of the wordings; the counts are of all."""
    metrics = results()
    row, wording = metrics.per_task[0], metrics.per_wording[0]
    start = replace(row.models["base"], accuracy=0.0, cr=0.0)
    rows = [
        replace(row, task=f"t{number}", models={"base": start, "align": replace(start, cr=number / 800)})
        for number in range(400)
    ]
    accuracies = [WordingMetrics(accuracy=i / 99, rouge_l=0.0) for i in range(100)]
    wordings = [replace(wording, task="t", models=dict.fromkeys(("base", "align"), one)) for one in accuracies]
    metrics = replace(metrics, per_task=tuple(rows), per_wording=tuple(wordings))
    (figure,) = figures.task_figures(metrics)
    assert "Of 400 tasks 399 became more consistent" in figure.caption
    assert "300 of 400 tasks are drawn, those that moved furthest" in figure.caption
    assert re.search(r">t39\d<", figure.svg) and len(figure.svg) < 200_000
    shown = figures.wording_figures(metrics)[0]
    assert "Where a task has more than 40 wordings, 40 quantiles are drawn" in shown.caption
    assert shown.svg.count("fill-opacity") == charts.MAX_DOTS
    dots = charts.quantiles([i / 99 for i in range(100)][::-1])
    assert (len(dots), dots[0], dots[-1]) == (charts.MAX_DOTS, 0.0, 1.0) and dots == sorted(dots)
    assert charts.quantiles([0.5, 0.1]) == [0.1, 0.5]


def test_an_input_with_many_wordings_shows_the_unusual_answers() -> None:
    tasks, pairs = world(1, num_inputs=1, num_wordings=100)
    odd = by_rule(pairs, lambda pair: "no" if pair.wording.id in ("w70", "w80") else "yes")
    metrics = summarised({"base": by_rule(pairs, lambda pair: "yes"), "align": odd}, tasks, pairs)
    (case,) = case_tables.scaled_cases(case_tables.case_values(metrics), 1.0)
    assert [row.text for row in case.rows[:3]] == ["Ask 70 <t0>", "Ask 80 <t0>", "Ask 0 <t0>"]
    text = page.render_page(metrics)
    check_page(text)
    assert "60 of 100 wordings, those with unusual answers first; 40 more are in" in text
    assert "100 → 98 of 100 right" in text
    assert len(case_tables.scaled_cases(case_tables.case_values(metrics), 0.1)[0].rows) == case_tables.MIN_ROWS
    assert "unusual answers first" not in page.render_page(results())


def test_a_smaller_page_keeps_some_of_every_kind_of_input() -> None:
    kinds = ["change"] * 80 + ["inconsistent"] * 80 + ["sample"] * 5
    case = results().cases[0]
    found = [
        case_tables.ShownCase(replace(case, chosen=kind, example=str(place)), [], "")
        for place, kind in enumerate(kinds)
    ]
    assert case_tables.scaled_cases(found, 1.0) == found
    shown = case_tables.scaled_cases(found, 0.1)
    assert [int(one.case.example) for one in shown] == [*range(8), *range(80, 88), 160]
    assert len(case_tables.scaled_cases(found, 0.001)) == 3 and case_tables.scaled_cases([], 0.5) == []
    words = case_tables.chosen_words([one.case for one in found[:81]], "base", "SFT (IA)")
    assert words == ("those that changed most from base to SFT (IA), then those on which SFT (IA) is least consistent")
    assert case_tables.chosen_words([found[-1].case], "a", "b").startswith("others in hash order")


def test_models_are_called_by_their_labels_everywhere() -> None:
    """In titles of pictures, above the inputs, beside the answers on a phone; and metrics by readable names."""
    text = page.render_page(results())
    assert "base → SFT (IA) + CAT</b>" in text and "changed most from base to SFT (IA) + CAT" in text
    assert '.answers td[data-m="1"]::before { content: "SFT (IA) \\2b  CAT"; }' in text
    assert "<b>constant answer</b>" in text and "constant_answer" not in text
    assert "The worst wording and the comparison with a constant answer always have t intervals" in text


def test_older_metrics_know_no_constant_answer() -> None:
    metrics = results()
    assert "One constant answer per task" in page.render_page(metrics)
    metrics = replace(metrics, constant_answer=None)
    text = page.render_page(metrics)
    check_page(text)
    assert "One constant answer per task" not in text
    assert sentences.constant_sentence(metrics) == "" and terminal.headline_lines(metrics)[-1] != ""


def answer(text: str, finish: Any = "stop", canonical: str | None = "same") -> Response:
    return Response("e", "t", "w", 0, text, text if canonical == "same" else canonical, finish, 1)


@pytest.mark.parametrize(
    ("given", "correct", "labels", "kind"),
    [
        (answer("Yes."), True, ("no", "yes"), "right"),
        (answer("no"), False, ("no", "yes"), "another"),
        (answer("perhaps"), False, ("no", "yes"), "wrong_type"),
        (answer("perhaps"), False, (), "another"),
        (answer("good", canonical=None), False, (), "wrong_type"),
        (answer(" \n"), False, ("no",), "empty"),
        (answer("no no no", finish="length"), False, ("no",), "cut_off"),
        (answer("", finish="length"), False, (), "cut_off"),
        (answer("maybe"), False, ("no", "maybe"), "another"),
    ],
)
def test_failures_are_told_apart(given: Response, correct: bool, labels: tuple[str, ...], kind: str) -> None:
    found = cases.label_set(Task("t", "Ask", labels), Example("e", "t", "x", ("Yes",), "test"))
    assert cases.answer_kind(given, correct, found) == kind


def test_failures_are_counted_once_each() -> None:
    failures = results().failures
    assert failures is not None
    assert failures.models["base"] == KindCounts(right=48, another=48, wrong_type=0, cut_off=0, empty=0)
    assert sum(row.models["base"].right for row in failures.per_task) == 48


def test_inputs_are_chosen_and_lettered() -> None:
    """Changed ones first, each answer with the letter of those it agrees with, the same letter before and after."""
    tasks, pairs = world(3)
    before = {"e0": "aabb", "e1": "aaaa", "e2": "abcd"}
    after = {"e0": "bbbb", "e1": "aaaa", "e2": "abcx"}
    outputs = {
        name: by_rule(pairs, lambda pair, words=words: words[pair.example.id][int(pair.wording.id[1])])
        for name, words in (("base", before), ("align", after))
    }
    metrics = summarised(outputs, tasks, pairs)
    found = metrics.cases
    assert [(one.example, one.chosen) for one in found[:6]] == [("e0", "change")] * 3 + [("e2", "inconsistent")] * 3
    assert [[a.cluster for a in found[0].models[name].answers] for name in outputs] == [[0, 0, 1, 1], [1] * 4]
    shown = case_tables.case_values(metrics)
    assert [cell.letter for cell in shown[0].rows[0].cells] == ["A", "B"]
    assert [row.cells[1].changed for row in shown[0].rows] == [True, True, False, False]
    assert [row.cells[1].changed for row in shown[3].rows] == [False, False, False, True]
    assert shown[0].outcomes == "iw"


def test_agreement_that_is_wider_than_equal_keeps_one_letter() -> None:
    import numpy as np

    from coalign.evaluation.metrics import SILENT, pair_keys

    codes = np.array([3, 4, SILENT, 5, 3])
    agreeing = pair_keys(np.array([3]), np.array([4]))
    known: dict[int, int] = {}
    assert cases.cluster_numbers(codes, agreeing, known) == [0, 0, None, 1, 0]
    assert cases.cluster_numbers(np.array([5, 4, 9, 9, SILENT]), agreeing, known) == [1, 0, 2, 2, None]


def test_differences_are_marked_by_word() -> None:
    usual = (0, "the red house")
    assert case_tables.differences("the red house", usual, False) == [("the red house", False)]
    assert case_tables.differences("the blue house", usual, False) == [
        ("the ", False),
        ("blue ", True),
        ("house", False),
    ]
    assert case_tables.differences("the house", usual, False) == [("the ", False), ("", True), ("house", False)]
    assert case_tables.differences("the red", usual, False) == [("the red", False), ("", True)]
    assert case_tables.differences("no", usual, False) == [("no", True)]
    assert case_tables.differences("cut off", usual, True) == [("cut off", False)]
    assert case_tables.differences("", usual, False) == [("", False)]
    assert case_tables.differences("the red  house", usual, False) == [("the red  house", False)]
    assert case_tables.letter_of(None) == "–" and case_tables.letter_of(27) == "B1"


def test_settings_can_be_run_again(tmp_path: Path) -> None:
    """What differs from the defaults, as a TOML file and commands; a step with another value gets it in its command."""
    config = {"sft": {"sft.epochs": 7.0, "run.seed": 3}, "align": {"align.margin": 0.25}}
    metrics = replace(results(), settings={"run.name": "it's", "run.folder": "x", "eval.models": {"a b": "base"}})
    folder = make_run(tmp_path / "run", metrics, config)
    steps, _ = run_history.find_steps(*metrics_file.read_metrics(folder))
    settings = run_history.changed_settings(steps, metrics)
    parsed = tomllib.loads(run_history.config_file(settings))
    assert parsed["run"] == {"folder": "x", "name": "it's", "seed": 0}
    assert parsed["sft"] == {"epochs": 7.0} and parsed["align"] == {"margin": 0.25}
    assert parsed["eval"]["models"] == {"a b": "base"} and parsed["judge"]["allow_weak"] is True
    lines = run_history.commands(steps, settings, metrics)
    assert lines[0] == "python launch/prepare.py run.toml"
    assert lines[2] == "deepspeed launch/sft.py run.toml run.seed=3"
    assert lines[-1] == "python launch/eval.py run.toml"
    steps[2].counts["ranks"] = 4
    assert (
        run_history.commands(steps, settings, metrics)[2] == "deepspeed --num_gpus 4 launch/sft.py run.toml run.seed=3"
    )
    borrowed = replace(metrics, settings={"run.inputs": {"sft": "runs/A"}, "run.round": 2})
    lines = run_history.commands(steps, settings, borrowed)
    assert lines[2] == "# sft was taken from the run runs/A" and lines[-1].endswith("run.toml run.round=2")


def test_long_curves_are_averaged() -> None:
    points = [(float(x), float(x % 2)) for x in range(1000)]
    found = run_history.thinned(points)
    assert len(found) <= run_history.MAX_POINTS
    assert found[0] == (3.0, pytest.approx(3 / 7)) and run_history.thinned([]) == []


def test_pictures_follow_the_theme_and_keep_their_text() -> None:
    svg = charts.interval_dots([charts.Dot("a $x$ <b> 中文", 0.5, 0.4, 0.6), charts.Dot("none", None)], 'say "it"')
    assert "var(--grey)" in svg and not re.search(r"#0000(0[1-5]|a[1-7])\b", svg)
    assert "a $x$ &lt;b&gt; 中文" in svg and 'aria-label="say &quot;it&quot;"' in svg
    assert "font-family" not in svg and "xmlns" not in svg and "<style" not in svg
    nothing_moves = charts.arrows([charts.Arrow("t", (0.5, 0.5), (0.5, 0.5))], ("x", "y"), "alt")
    assert nothing_moves.startswith("<svg viewBox")
    assert charts.interval_dots([], "empty").startswith("<svg")


def test_labels_that_are_cut_alike_are_told_apart() -> None:
    """Cut in the middle where the ends differ, numbered where they don't; others, and equal ones, stay as they are."""
    long = "a very long name of a model "
    labels = charts.told_apart([f"{long}{end}" for end in ("one", "two", "two")] + ["short"], 20)
    assert list(labels.values()) == ["a very lon…model one", "a very lon…model two", "short"]
    middle = charts.told_apart([f"{long}{part}{long}" for part in "xy"] + [f"b{long}"], 20)
    assert list(middle.values()) == ["a very long nam… 1", "a very long nam… 2", "ba very long name o…"]
    svg = charts.interval_dots([charts.Dot(f"{long}{end}", 0.5) for end in ("one", "two")], "alt")
    assert "model one" in svg and "model two" in svg


def test_the_headline_says_what_a_noise_floor_is_of() -> None:
    metrics = results()
    sentence = sentences.headline_sentence(metrics)
    assert sentence.endswith(
        ", and accuracy rose from 0.500 [0.500, 0.500] to 1.000 [1.000, 1.000], by +0.500 [+0.500, +0.500]; the noise"
        " floor of CR (one wording, 1 input × 3 answers) is 1.000 for base and 1.000 for SFT (IA) + CAT asked again,"
        " 1.000 and 1.000 sampled at temperature 0.7."
    )
    align = metrics.models["align"]
    silent = replace(align.noise.temperature, cr=None)
    noise = NoiseFloors(neighbours=align.noise.neighbours, temperature=silent)
    metrics = replace(metrics, models=metrics.models | {"align": replace(align, noise=noise)})
    assert sentences.headline_sentence(metrics).endswith("asked again, 1.000 for base sampled at temperature 0.7.")
    never = NoiseFloors(neighbours=silent, temperature=silent)
    metrics = replace(metrics, models={name: replace(model, noise=never) for name, model in metrics.models.items()})
    assert "noise floor" not in sentences.headline_sentence(metrics)


def test_a_file_of_wordings_is_named_in_the_place_of_held_out_ones() -> None:
    assert "each asked under held-out wordings: 96 answers" in page.render_page(results())
    given = replace(results(), settings={"eval.wordings_file": "my <own>.jsonl"})
    assert "each asked under the wordings of my &lt;own&gt;.jsonl: 96 answers" in page.render_page(given)


def test_own_answers_are_those_that_equal_no_gold_answer(tmp_path: Path) -> None:
    """Of 20 distinct answers 7 equal a gold answer, 3 needed no judge; the other ones with reward 2 are counted."""
    counts = {"rules": {"correct": 6, "type": 3, "item_count": 1, "exact_match": 7, "empty": 3}}
    counts["rewards"] = {"0": 6, "1": 3, "2": 11}
    for gold, expected in ((True, {"judged": 10, "correct": 4}), (False, None)):
        manifest = {"config": {"judge.gold": gold}, "counts": counts}
        assert run_history.own_answers(run_history.StepRecord("judge", tmp_path, manifest)) == expected


def test_wordings_that_were_kept_are_of_several_tasks(tmp_path: Path) -> None:
    """In hash order, so not the first rows; of fewer tasks than examples one each."""
    make_step(tmp_path, "paraphrase")
    rows = [{"source": "model", "text": f"{task} {i}", "task": task} for task in "abcde" for i in range(9)]
    write_rows(tmp_path / "paraphrase" / "wordings.jsonl", [{"source": "original", "text": "x", "task": "z"}, *rows])
    step = run_history.StepRecord("paraphrase", tmp_path / "paraphrase", {})
    kept = run_history.kept_wordings(step)
    assert len({row["task"] for row in kept}) == run_history.NUM_EXAMPLES == len(kept)
    assert kept == run_history.kept_wordings(step) and [row["text"] for row in kept] != ["a 0", "b 0", "c 0"]


def test_evals_own_cost_and_digests_are_shown(tmp_path: Path) -> None:
    """Before it is complete from what it has written so far, afterwards from its manifest; of older ones as known."""
    folder = make_run(tmp_path / "run", results())
    _, metrics = metrics_file.read_metrics(folder)
    assert run_history.own_step(folder) is None
    assert '<th scope="row">eval</th><td>77.5</td><td>–</td>' in page.write_page(folder, metrics).read_text("utf-8")
    (folder / "config.json").write_text(json.dumps({"config": {}, "inputs": {"wordings_file": "f" * 64, "sft": "x"}}))
    write_rows(folder / "answers.jsonl", [{"text": "yes"}])
    metrics = replace(metrics, eval_counts=EvalCounts(tokens_generated=12345, cores=8))
    text = page.write_page(folder, metrics).read_text("utf-8")
    own = run_history.own_step(folder)
    assert own is not None and list(own.manifest["outputs"]) == ["answers.jsonl"]
    row = "<td>77.5</td><td>–</td><td>–</td><td>12,345</td><td>0.172</td><td>–</td>"
    assert f'<th scope="row">eval</th>{row}' in text
    for words, digest in (("reads wordings_file", "f" * 64), ("writes answers.jsonl", own.manifest["outputs"])):
        digest = digest if isinstance(digest, str) else digest["answers.jsonl"]
        assert re.search(f'<th scope="row">eval</th><td [^>]*>{words}</td><td [^>]*><code>{digest}</code>', text)
    metrics = replace(metrics, eval_counts=None)
    counts = {"tokens_generated": 999, "cores": 8}
    manifest = {"config": {}, "inputs": {}, "outputs": {}, "counts": counts, "digest": "e"}
    manifest["finished"] = "2026-02-03T04:05:06Z"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text = page.write_page(folder, metrics).read_text("utf-8")
    assert "<td>999</td><td>0.172</td><td>2026-02-03 04:05:06</td>" in text


def run_report(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT / "distributed"), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    command = [sys.executable, str(ROOT / "launch" / "report.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_report_rebuilds_one_run_and_compares_several(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / name, results(), {"align": {"align.margin": 0.5}} if name == "two" else None)
    single = run_report(str(tmp_path / "one"))
    assert single.returncode == 0, single.stderr
    check_page((tmp_path / "one" / "eval" / "report.html").read_text("utf-8"))
    both = run_recipe("report", str(tmp_path / "one"), str(tmp_path / "two" / "eval"))
    assert both.code == 0, both.stderr
    assert both.stdout.count("SFT (IA) + CAT") == 2
    text = (tmp_path / "one" / "eval" / "compare.html").read_text("utf-8")
    check_page(text)
    assert "8 of 8 and 8 tasks have the same items" in text and "align.margin" in text
    assert not (tmp_path / "two" / "eval" / "report.html").exists()
    out = run_recipe("report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "c.html"))
    assert out.code == 0 and (tmp_path / "c.html").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((".",), "eval/metrics.json"),
        ((), "no run was named"),
        (("one", "--out"), "names no file"),
        (("one", "--out", "x.html"), "is for several runs"),
        (("one", "two", "--out", "no/such/x.html"), "there is no folder no/such"),
        (("one", "two", "--out", "."), "is a folder"),
        (("one", "--new"), "unknown option '--new'"),
    ],
)
def test_mistakes_are_one_clear_line(words: tuple[str, ...], says: str) -> None:
    found = run_recipe("report", *words)
    assert found.code == 2 and says in found.stderr and found.stderr.count("\n") == 1


def test_help_says_how_it_is_used() -> None:
    found = run_recipe("report", "--help")
    assert found.code == 0 and found.stdout.startswith("usage: python launch/report.py RUN")


def test_an_arm_names_the_eval_that_it_is_part_of(tmp_path: Path) -> None:
    (tmp_path / "cat" / "align").mkdir(parents=True)
    for name, content in (("eval", "{"), ("eval_base-cat", json.dumps({"models": {"base": {}, "cat": {}}}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(content, "utf-8")
    command = f"evaluated together with the others: python launch/report.py {tmp_path / 'eval_base-cat'}"
    with pytest.raises(UserError, match=re.escape(command)):
        metrics_file.read_metrics(tmp_path / "cat")
    (tmp_path / "sft").mkdir()
    with pytest.raises(UserError, match="run its eval step first"):
        metrics_file.read_metrics(tmp_path / "sft")


def compare(a: Metrics, b: Metrics) -> comparison.RunPair:
    return comparison.compare_pair(comparison.Run("a", Path("a"), a), comparison.Run("b", Path("b"), b))


def with_tasks(metrics: Metrics, change: Callable[[TaskRow], TaskRow]) -> Metrics:
    return replace(metrics, per_task=tuple(map(change, metrics.per_task)))


def test_runs_are_paired_on_the_same_items_only() -> None:
    first, second = results(), results()
    pair = compare(first, second)
    assert not pair.why_not and len(pair.tasks) == 8
    assert pair.models[0].estimates["cr"].mean == 0.0
    assert compare(first, replace(second, agreement="rouge_l>=0.7")).why_not.startswith("they were evaluated with")
    older = with_tasks(second, lambda row: replace(row, items=None))
    assert "older version" in compare(first, older).why_not
    other = with_tasks(second, lambda row: replace(row, items="x"))
    assert "same inputs, gold answers" in compare(first, other).why_not
    apart = with_tasks(second, lambda row: replace(row, task="x" + row.task))
    assert "no task in common" in compare(first, apart).why_not
    renamed = with_tasks(second, lambda row: replace(row, models={"z": row.models["align"]}))
    renamed = replace(renamed, models={"z": second.models["align"]})
    assert compare(first, renamed).models[0].name == "z − SFT (IA) + CAT"
    tasks, pairs = world(8)
    alone = summarised({"m": by_rule(pairs, half_right)}, tasks, pairs)
    assert alone.per_task[0].items == first.per_task[0].items


def test_models_of_two_runs_are_called_by_their_labels() -> None:
    """One name that means the same in both runs by its label, one that doesn't by both."""
    first, second = results(), results()
    second = replace(second, labels=second.labels | {"align": "SFT + CAT"})
    pair = compare(first, second)
    assert [model.name for model in pair.models] == ["base", "SFT + CAT − SFT (IA) + CAT"]
    assert pair.last == "SFT + CAT − SFT (IA) + CAT"
    text = comparison.render_comparison([comparison.Run("a", Path("a"), first), comparison.Run("b", Path("b"), second)])
    assert "a · SFT (IA) + CAT" in text and "a · align" not in text
    assert "95 % intervals: t intervals on task means (none under 6 tasks); bold" in text


def test_differences_of_many_tasks_have_the_interval_that_one_eval_gives_them(tmp_path: Path) -> None:
    """The same bootstrap for models of two runs as for models of one; t without the scores of every input."""
    tasks, pairs = world(22)

    def varied(pair: Any) -> str:
        wrong = int(pair.example.task[1:]) % 3 == 0 or pair.key[1:] == ("e1", "w2")
        return "no" if wrong else "yes"

    a, b = by_rule(pairs, varied), by_rule(pairs, half_right)
    runs = []
    for name, output in (("one", a), ("two", b)):
        found = summary.summarise(tasks, pairs, {"m": output}, table(), seed=0)
        folder = make_run(tmp_path / name, finish_metrics(found.summary, run=name))
        write_rows(folder / "scores.jsonl", found.scores)
        runs.append(comparison.Run(name, *metrics_file.read_metrics(folder)))
    pair = comparison.compare_pair(*runs)
    together = summarised({"a": a, "b": b}, tasks, pairs).differences
    assert pair.method.startswith("a bootstrap over tasks, then inputs")
    for key, one in pair.models[0].estimates.items():
        expected = next(row.estimate for row in together if row.metric == key)
        assert one.method == expected.method == ("t" if key == "worst_wording" else "bootstrap")
        assert one.low is not None and one.high is not None and one.low < one.high
        assert (one.mean, one.low, one.high) == pytest.approx((expected.mean, expected.low, expected.high))
    (runs[1].folder / "scores.jsonl").unlink()
    pair = comparison.compare_pair(*runs)
    assert {one.method for one in pair.models[0].estimates.values()} == {"t"}
    assert "needs scores.jsonl" in pair.method


def test_settings_of_steps_that_are_gone_are_unknown(tmp_path: Path) -> None:
    """Not the default, and with the reason; what eval or another step has recorded is known."""
    runs = []
    for name, margin in (("one", 0.5), ("two", 0.25)):
        config = {"align": {"align.margin": margin}, "sft": {"sft.epochs": 7.0}, "sample": {"sample.samples": 3}}
        folder = make_run(tmp_path / name, replace(results(), run=name), config if name == "one" else None)
        runs.append(comparison.Run(name, *metrics_file.read_metrics(folder)))
    (tmp_path / "two" / "align").rename(tmp_path / "gone")
    rows = dict(comparison.setting_rows(runs))
    assert rows["align.margin"] == ["0.5", "unknown"]
    assert rows["sft.epochs"][0] == "7.0" and rows["sft.epochs"][1] not in ("unknown", "7.0")
    text = comparison.render_comparison(runs)
    check_page(text)
    assert "two: align: its folder is not here. A setting that no other step has recorded is unknown" in text
    assert '<td class="text" style="min-width:6rem">unknown</td>' in text


def test_runs_of_one_name_are_called_by_their_paths() -> None:
    runs = comparison.name_runs({name: (Path(name), results()) for name in ("x/a", "y/a")})
    assert [run.name for run in runs] == ["x/a", "y/a"]
