"""The plan of an experiment: every arm's settings, what is shared, that controls differ from CAT in one thing alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coalign.commandline import ROOT, parse_command_line
from coalign.config import Config
from coalign.config_values import table_values
from coalign.errors import UserError
from coalign.experiment.arms import ARMS
from coalign.experiment.ladder import (
    PIPELINE,
    UPDATES,
    Ladder,
    StepRun,
    is_current,
    make_ladder,
    remaining_seconds,
)
from coalign.experiment.ladder_options import LadderOptions, read_ladder_options
from coalign.runs.atomic_files import write_json
from coalign.runs.run_folder import RunFolder
from coalign.steps import STEP_TABLES

PLACES = {"run.folder", "run.name", "run.seed", "run.inputs"}
CONTROLS = [name for name, arm in ARMS.items() if arm.result == "align" and name not in ("cat", "cat_round2")]
CONFIG = str(ROOT / "configs" / "quickstart.toml")


def ladder(*words: str, **options: Any) -> Ladder:
    config = parse_command_line("ladder", [CONFIG, *words])
    return make_ladder(table_values(config, tuple(Config.model_fields)), LadderOptions(**options))


def steps_of(plan: Ladder, arm: str, seed: int = 0) -> dict[str, StepRun]:
    return {run.step: run for run in plan.steps() if run.arm == arm and run.seed == seed}


def complete(folder: Path, **counts: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"config": {}, "inputs": {}, "outputs": {"model": "m"}, "counts": counts, "digest": str(folder)}
    write_json(folder / "manifest.json", content)


@pytest.mark.parametrize(
    ("arm", "expected"),
    {
        "sft": {"sft.wordings": "original"},
        "sft_ia": {},
        "sft_gold": {"rank.rewards": "gold"},
        "cat": {},
        "cat_no_gold": {"judge.gold": False, "judge.allow_weak": True},
        "cat_lambda0": {"align.rank_weight": 0.0},
        "cat_permuted": {"rank.rewards": "permuted"},
        "cat_exact": {"rank.rewards": "exact"},
        "cat_no_type": {"judge.type_question": False},
        "cat_own": {"rank.pool": "own"},
        "cat_round2": {"run.round": 2},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_arm_sets_exactly_what_its_name_says(arm: str, expected: dict[str, Any]) -> None:
    for run in steps_of(ladder(), arm).values():
        assert {key: value for key, value in run.settings.items() if key not in PLACES} == expected
        assert run.settings["run.seed"] == 0


def test_more_updates_start_from_stage_1_and_are_those_of_stage_2() -> None:
    config = parse_command_line("ladder", [CONFIG])
    plan = ladder(seeds=(3,))
    found = steps_of(plan, "sft_ia_more", 3)["sft"].settings
    stage_1 = steps_of(plan, "sft_ia", 3)["sft"].folder
    assert {key: value for key, value in found.items() if key not in PLACES - {"run.seed"}} == {
        "run.seed": 1003,
        "model.init": "pretrained",
        "model.path": str(stage_1 / "model"),
        "sft.batch_rows": config.align.batch_groups,
        "sft.epochs": 0.0,
        "sft.max_steps": config.align.max_steps,
    }


@pytest.mark.parametrize("arm", CONTROLS)
def test_a_control_has_the_inputs_wordings_and_start_of_cat(arm: str) -> None:
    """It differs from CAT in one setting and in the steps from which on that setting counts."""
    plan = ladder()
    mine, theirs = plan.made_from(arm), plan.made_from("cat")
    assert [step for _, step in mine] == [step for _, step in theirs] == list(PIPELINE)
    shared = [place for place in mine if place in theirs]
    assert ("cat", "sample") in shared and ("sft_ia", "sft") in shared and ("sft_ia", "paraphrase") in shared
    assert {step for name, step in mine if name == arm} == set(ARMS[arm].own)
    assert [key for key, _ in ARMS[arm].settings if key != "judge.allow_weak"] == [ARMS[arm].settings[0][0]]
    assert ARMS[arm].settings[0][0].partition(".")[0] == ARMS[arm].own[0] or arm == "sft_gold"


@pytest.mark.parametrize("arm", [*CONTROLS, "cat_round2", "sft_ia_more"])
def test_where_epochs_count_every_arm_takes_over_cats_updates(arm: str, tmp_path: Path) -> None:
    plan = ladder(f"run.folder={tmp_path}", "align.epochs=2.0", "align.max_steps=0", arms=(arm,))
    last = list(steps_of(plan, arm).values())[-1]
    key = "sft.max_steps" if arm == "sft_ia_more" else "align.max_steps"
    assert last.settings[key] == UPDATES and f'{key}="{UPDATES}"' in last.words()
    cat = plan.folder(("cat", "align"), 0)
    order = [run.folder for run in plan.steps()]
    assert order.index(cat) < order.index(last.folder), "cat must be there before its updates are counted"
    complete(cat, updates=37)
    config = parse_command_line(last.step, last.words([CONFIG, "align.epochs=2.0", "align.max_steps=0"]))
    assert (config.sft if arm == "sft_ia_more" else config.align).max_steps == 37


def test_every_step_is_planned_once_and_after_what_it_reads() -> None:
    plan = ladder(seeds=(0, 1, 2))
    steps = plan.steps()
    folders = [run.folder for run in steps]
    assert len(set(folders)) == len(folders) == 1 + 3 * (1 + 3 + 1 + 3 + 9 + 9 + 1 + 1)
    assert sum(run.step == "prepare" for run in steps) == 1 and sum(run.step == "eval" for run in steps) == 3
    words = [CONFIG]
    done: set[Path] = set()
    for run in steps:
        config = parse_command_line(run.step, run.words(words))
        place = RunFolder(config.run, [])
        chain = [*PIPELINE, "eval"]
        needs = [place.step(s) for s in config.run.inputs]
        if run.step != "eval":
            needs += [place.step(s) for s in chain[: chain.index(run.step)]]
            assert place.step(run.step) == run.folder
        if run.step in ("sample", "align"):
            needs.append(place.policy())
        needs += [Path(value) for value in config.eval.models.values() if run.step == "eval" and value != "base"]
        if run.arm == "sft_ia_more":
            needs.append(Path(config.model.path).parent)
        assert not [path for path in needs if path not in done], run
        done.add(run.folder)


def test_seeds_share_the_split_and_nothing_else() -> None:
    """The split goes by the text; prepare's seed (of random weights) is the config's, whichever seeds are asked for."""
    plan = ladder("run.seed=4", seeds=(7, 9))
    assert [run.settings["run.seed"] for run in plan.steps() if run.seed is None] == [4]
    assert {run.settings["run.seed"] for run in plan.steps() if run.seed == 9} == {9, 1009}
    assert ladder("run.seed=4").seeds == (4, 5, 6)


def test_all_arms_of_a_seed_are_evaluated_together_on_the_same_wordings() -> None:
    plan = ladder(seeds=(0, 1))
    evals = [run for run in plan.steps() if run.step == "eval"]
    assert [list(run.settings["eval.models"]) for run in evals] == [list(ARMS)] * 2
    assert evals[0].settings["eval.models"]["base"] == "base"
    assert evals[1].settings["eval.models"]["cat_round2"].endswith("seed1/cat/round2/align")
    assert evals[1].settings["run.inputs"]["paraphrase"].endswith("seed1/sft_ia")


def test_a_choice_of_arms_runs_what_they_need_and_is_evaluated_apart() -> None:
    plan = ladder(arms=("sft_ia", "cat_lambda0"), seeds=(0,))
    assert [(run.arm, run.step) for run in plan.steps()] == [
        ("", "prepare"),
        ("sft_ia", "paraphrase"),
        ("sft_ia", "sft"),
        ("cat", "sample"),
        ("cat", "judge"),
        ("cat", "rank"),
        ("cat_lambda0", "align"),
        ("", "eval"),
    ]
    assert plan.eval_folder(0).name == "eval_sft_ia-cat_lambda0" != ladder().eval_folder(0).name == "eval"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arms", "cat,dog"], "'dog' is no arm"),
        (["--arms"], "takes a list"),
        (["--arms="], "is no arm; choose among base"),
        (["--seeds", "0,x"], "whole numbers"),
        (["--seeds=-1"], "whole numbers"),
    ],
)
def test_mistaken_options(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_ladder_options(words)


def test_options_are_taken_out_of_the_words() -> None:
    options, words = read_ladder_options(
        ["a.toml", "--arms", "cat,sft", "--seeds=2,0", "x.y=1=2", "--dry-run", "--odd"]
    )
    assert options == LadderOptions(("sft", "cat"), (2, 0), True)
    assert words == ["a.toml", "x.y=1=2", "--odd"]


@pytest.mark.parametrize(
    "word", ["rank.rewards=exact", "judge.gold=false", "run.round=2", "align.rank_weight=0", 'run.inputs={sft="a"}']
)
def test_a_setting_that_makes_an_arm_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=word.partition("=")[0]):
        ladder(word)


def test_words_survive_the_command_line() -> None:
    run = StepRun("", 0, "eval", Path("x"), {"run.name": 'a "b" é', "eval.models": {"a b": "x/y"}}, ())
    config = parse_command_line("eval", run.words([CONFIG, "run.name=other"]))
    assert config.run.name == 'a "b" é' and config.eval.models == {"a b": "x/y"}


def test_a_step_is_passed_over_only_with_the_same_settings_and_inputs(tmp_path: Path) -> None:
    words = [CONFIG, f"run.folder={tmp_path}", "run.name=r"]
    config = parse_command_line("rank", words)
    settings = table_values(config, STEP_TABLES["rank"], with_neutral=False)
    run = RunFolder(config.run, words)

    def current(values: dict[str, Any] = settings) -> bool:
        return is_current(run.step("rank"), values, run, {"sft.replay": "as it is now"}, {})

    assert not current()
    complete(run.step("judge"))
    complete(run.step("rank"))
    path = run.step("rank") / "manifest.json"
    manifest = json.loads(path.read_text("utf-8")) | {"config": settings}
    write_json(path, manifest | {"inputs": {"judge": str(run.step("judge"))}})
    assert current()
    assert not current(settings | {"rank.pool": "own"})
    for inputs in ({"judge": "of another judge step"}, {"sft.replay": "as it was"}, {"something": "unknown here"}):
        write_json(path, manifest | {"inputs": inputs})
        assert not current()
    write_json(path, manifest | {"inputs": {"sft.replay": "as it is now"}})
    assert current()


def test_the_time_left_goes_by_steps_of_the_same_name() -> None:
    assert remaining_seconds([], ["sft"]) is None
    assert remaining_seconds([("sft", 10.0), ("sft", 20.0), ("rank", 3.0)], ["sft", "rank", "eval"]) == 15 + 3 + 11
