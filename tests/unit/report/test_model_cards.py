"""Model cards: what the Hub's own library reads from them, what stands in them, and what must never."""

from __future__ import annotations

import importlib.util
import itertools
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from coalign.config import Config, EvalTable, RunTable
from coalign.config_values import table_values
from coalign.evaluation.metrics_file import write_metrics
from coalign.evaluation.metrics_schema import Difference, Estimate, Metrics
from coalign.experiment import ladder
from coalign.report import model_card_results, model_cards
from coalign.runs.atomic_files import write_json
from coalign.runs.digests import CARD, digest_folder, digest_weights
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import StepFolder
from unit.worlds import results

ARGUMENTS = ["/srv/me/my.toml", "run.folder=/srv/me/runs", 'run.inputs={judge = "/srv/you/runs/a"}', "sft.epochs=2"]


def estimate(mean: float) -> Estimate:
    return Estimate(mean=mean, low=mean - 0.1, high=mean + 0.1, num_tasks=8, method="t")


def metrics_of(models: dict[str, str], seen: int = 8, settings: dict[str, Any] | None = None) -> Metrics:
    """Return metrics in which each model is 0.1 better than the one before, in everything that a card shows."""
    whole = results()
    number = {name: place for place, name in enumerate(models)}
    found = {}
    for name, place in number.items():
        one = replace(
            whole.models["base"].all, **dict.fromkeys(model_card_results.COLUMNS, estimate(0.3 + 0.1 * place))
        )
        found[name] = replace(whole.models["base"], all=one, seen=one, unseen=one)
    differences = tuple(
        Difference(a=a, b=b, metric=metric, estimate=estimate(0.1))
        for a, b in itertools.combinations(models, 2)
        for metric in model_card_results.COLUMNS
    )
    return replace(
        whole,
        models=found,
        differences=differences,
        differences_seen=differences,
        differences_unseen=differences,
        run="mine",
        labels={name: model_cards.stage_label(value, {}) for name, value in models.items()},
        num_tasks=8,
        num_seen_tasks=seen,
        num_tasks_in_cr=7,
        num_inputs=80,
        settings=settings or {},
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return a run whose steps before align are complete, as far as a card reads them."""
    table = RunTable(folder=str(tmp_path), name="mine")
    config = Config.model_validate(
        {
            "run": table.model_dump(),
            "model": {"path": "some-org/base-7b"},
            "data": {"sources": [{"path": "some-org/tasks", "format": "hf"}, {"path": "/srv/me/data/own.jsonl"}]},
            "paraphrase": {"files": ["/srv/me/wordings.jsonl"]},
        }
    )
    counts: dict[str, dict[str, Any]] = {
        "prepare": {"tasks": {"seen": 7, "unseen": 1}, "inputs": {"sft": 40, "test": 20}},
        "paraphrase": {"splits": {"train": 70, "test": 48}, "sources": {"original": 8, "file": 110}},
    }
    folder = RunFolder(table, ARGUMENTS)
    for name in model_cards.STEPS_TO["align"]:
        path = folder.step(name)
        path.mkdir(parents=True)
        values = table_values(config, (name if name != "prepare" else "data", "model"), with_neutral=False)
        content: dict[str, Any] = {
            "config": values,
            "inputs": {"data": "d" * 64},
            "outputs": {},
            "counts": counts.get(name, {}),
        }
        content["digest"] = "0" * 64
        write_json(path / "manifest.json", content)
    return folder


def exported(run: RunFolder, stage: str) -> Path:
    """Write the card of a stage as its recipe does, and return its path."""
    manifest = model_cards.read_manifest(run.step(stage))
    assert manifest is not None
    step = StepFolder(run.step(stage), manifest["config"], {})
    (step.path / "model").mkdir(exist_ok=True)
    model_cards.write_card(step, run, {"updates": 30, "tokens": 900}, "</s>")
    return step.path / "model" / CARD


def metadata(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard.load(path).data.to_dict()
    return found


@pytest.mark.parametrize("stage", ["sft", "align"])
def test_a_fresh_card_is_what_the_hub_reads(run: RunFolder, stage: str) -> None:
    path = exported(run, stage)
    found = metadata(path)
    assert found["base_model"] == "some-org/base-7b"
    assert found["datasets"] == ["some-org/tasks"]
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-generation"
    assert "consistency-alignment" in found["tags"] and ("self-reward" in found["tags"]) == (stage == "align")
    assert "license" not in found and "model-index" not in found
    text = path.read_text("utf-8")
    assert "Not yet evaluated" in text and "2403.14221" in text
    assert ("Stage 2" in text) == (stage == "align")
    for title in ("How it was made", "Data", "Use", "Results", "Limits", "Reproduce"):
        assert f"\n## {title}\n" in text


def test_the_data_are_named_with_counts_and_digests(run: RunFolder) -> None:
    text = exported(run, "align").read_text("utf-8")
    assert "7 tasks seen in training and 1 kept out" in text and "40 sft, 20 test" in text
    assert "8 original, 110 file" in text
    assert text.count("`" + "0" * 64 + "`") == 6 and "d" * 64 in text


def test_no_path_of_this_machine_stands_in_a_card(run: RunFolder, tmp_path: Path) -> None:
    path = exported(run, "align")
    model_card_results.add_results(run, EvalTable(), metrics_of({"/srv/you/model": "/srv/you/model", "align": "align"}))
    text = path.read_text("utf-8")
    assert "/srv" not in text and str(tmp_path) not in text and "/me" not in text and "you" not in text
    assert "bash launch/local.sh my.toml" in text and "`own.jsonl`" in text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/b/c.toml", "c.toml"),
        ("run.folder=/a/b/", "run.folder="),
        ('{sft = "/a/b"}', '{sft = "b"}'),
        ("~/x/y", "y"),
        ("configs/a.toml", "configs/a.toml"),
        ("some-org/name", "some-org/name"),
        ("https://host/a/b", "https://host/a/b"),
    ],
)
def test_placeless_keeps_the_last_part_of_absolute_paths(given: str, expected: str) -> None:
    assert model_cards.placeless(given) == expected


def test_results_come_in_and_can_be_replaced(run: RunFolder) -> None:
    """The Hub reads this model's numbers; the text has every model with intervals; a second eval leaves one set."""
    paths = {stage: exported(run, stage) for stage in ("sft", "align")}
    models = {"base": "base", "sft": "sft", "align": "align"}
    model_card_results.add_results(run, EvalTable(), metrics_of(models))
    first = paths["align"].read_text("utf-8")
    model_card_results.add_results(run, EvalTable(), metrics_of(models))
    assert paths["align"].read_text("utf-8") == first
    for stage, value in (("sft", 0.4), ("align", 0.5)):
        card = ModelCard.load(paths[stage])
        results = {result.metric_type: result for result in card.data.eval_results}
        assert results.keys() == model_card_results.COLUMNS.keys()
        assert results["cr"].metric_value == pytest.approx(value)
        expected = {"low": value - 0.1, "high": value + 0.1, "num_tasks": 8}
        assert results["cr"].metric_args == pytest.approx(expected)
        assert results["cr"].dataset_split == "test" and results["cr"].dataset_type == "some-org/tasks"
        assert card.data.base_model == "some-org/base-7b"
    assert "Not yet evaluated" not in first
    assert re.search(r"\| base \| 0\.300 \[0\.200, 0\.400\] \|", first)
    assert "| **SFT (IA) + CAT** (this model) | 0.500 [0.400, 0.600] |" in first
    assert "| SFT (IA) + CAT minus SFT (IA) | +0.100 [+0.000, +0.200] |" in first
    assert "## Limits" in first and "unseen tasks |" not in first
    model_card_results.add_results(run, EvalTable(), metrics_of(models, seen=6))
    assert "| unseen tasks |" in paths["align"].read_text("utf-8")


def test_a_card_that_somebody_rewrote_keeps_its_text(run: RunFolder) -> None:
    path = exported(run, "sft")
    path.write_text("---\nlicense: mit\n---\n\n# Mine\n\nMy words.\n", "utf-8")
    model_card_results.add_results(run, EvalTable(), metrics_of({"sft": "sft"}))
    assert path.read_text("utf-8").endswith("# Mine\n\nMy words.\n")
    assert metadata(path)["license"] == "mit" and metadata(path)["model-index"][0]["name"] == "Mine"


@pytest.mark.parametrize(
    "content",
    [
        b"---\nlicense: [mit\n---\n# Mine\n",
        b"---\nmodel-index: foo\n---\n# Mine\n",
        b"# Caf\xe9\n",
        b"---\n- a\n---\n# Mine\n",
    ],
)
def test_a_card_that_cannot_be_read_is_left_alone(
    content: bytes, run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """A mistake in a card is no reason for eval to fail: one line of warning names it."""
    path = exported(run, "sft")
    path.write_bytes(content)
    model_card_results.add_results(run, EvalTable(), metrics_of({"sft": "sft"}))
    assert path.read_bytes() == content
    (warning,) = caplog.messages
    assert f"could not be written into {path}: " in warning and "\n" not in warning


def test_results_under_a_file_of_wordings_say_so(run: RunFolder) -> None:
    path = exported(run, "sft")
    model_card_results.add_results(run, EvalTable(), metrics_of({"sft": "sft"}))
    text = path.read_text("utf-8")
    assert "under wordings that no training step has seen" in text
    assert "held-out inputs and wordings of some-org/tasks" in text
    settings = {"eval.wordings_file": "/srv/me/mine.jsonl"}
    model_card_results.add_results(run, EvalTable(), metrics_of({"sft": "sft"}, settings=settings))
    text = path.read_text("utf-8")
    assert "in CR) under the wordings of mine.jsonl. Means over" in text and "no training step has seen" not in text
    assert "held-out inputs of some-org/tasks under the wordings of mine.jsonl" in text and "/srv" not in text


def test_the_settings_of_a_card_are_toml(run: RunFolder) -> None:
    text = exported(run, "align").read_text("utf-8")
    block = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])
    assert block["data"]["sources"][0]["path"] == "some-org/tasks" and block["model"]["path"] == "some-org/base-7b"


def test_a_ladder_fills_the_cards_of_trained_models_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that lies by chance where the name of the base model would lead to."""
    spec = importlib.util.spec_from_file_location("ladder", Path(__file__).parents[3] / "launch" / "ladder.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    planned = ladder.Ladder(tmp_path, ("base", "sft_ia", "cat"), (3,), 3, 0, 2)
    planned.eval_folder(3).mkdir(parents=True)
    write_metrics(planned.eval_folder(3), results())
    filled: list[Path] = []
    monkeypatch.setattr(recipe, "fill_card", lambda card, metrics, name: filled.append(card))
    monkeypatch.setattr(recipe.results, "make_result", lambda *_: None)
    monkeypatch.setattr(recipe.ladder_result, "write_result", lambda *_: None)
    monkeypatch.setattr(recipe, "experiment_table", SimpleNamespace(table_lines=lambda _: [], draw=lambda *_: []))
    recipe.show(planned, [], Config())
    assert filled == [tmp_path / "seed3" / arm / "model" / CARD for arm in ("sft_ia/sft", "cat/align")]


def test_only_models_of_the_run_get_results(run: RunFolder, tmp_path: Path) -> None:
    """Not those borrowed, behind a link or given as folders; and nothing from a measurement that is kept elsewhere."""
    outside = tmp_path / "outside"
    paths = [exported(run, "sft"), exported(run, "align")]
    before = [path.read_text("utf-8") for path in paths]
    model_card_results.add_results(run, EvalTable(folder="side"), metrics_of({"sft": "sft", "align": "align"}))
    folder = {"mine": str(paths[0].parent)}
    model_card_results.add_results(run, EvalTable(models=folder), metrics_of(folder))
    borrowing = RunFolder(run.run.model_copy(update={"inputs": {"sft": str(run.path)}}), [])
    model_card_results.add_results(borrowing, EvalTable(models={"sft": "sft"}), metrics_of({"sft": "sft"}))
    run.step("align").rename(outside)
    run.step("align").symlink_to(outside)
    model_card_results.add_results(run, EvalTable(models={"align": "align"}), metrics_of({"align": "align"}))
    assert [path.read_text("utf-8") for path in paths] == before


def test_the_licence_of_a_base_model_in_a_folder_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("---\nlicense: apache-2.0\n---\n\n# Base\n", "utf-8")
    assert model_cards._license(str(tmp_path)) == "apache-2.0"
    assert model_cards._license("some-org/base-7b") is None and model_cards._license("") is None


def test_a_card_is_no_part_of_a_models_digest(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = digest_folder(tmp_path), digest_weights(str(tmp_path))
    (tmp_path / CARD).write_text("words", "utf-8")
    assert (digest_folder(tmp_path), digest_weights(str(tmp_path))) == before


def test_models_are_called_by_the_papers_names(run: RunFolder) -> None:
    """A stage of the run by what it is, with its round; a name of the user's own stays before it."""
    models = {"base": "base", "sft": "sft", "align": "align", "mine": "align", "other": "some/folder"}
    labels = {"base": "base", "sft": "SFT (IA)", "align": "SFT (IA) + CAT", "mine": "mine: SFT (IA) + CAT"}
    assert model_cards.model_labels(run, models) == labels | {"other": "other"}
    second = RunFolder(run.run.model_copy(update={"round": 2}), [])
    assert model_cards.model_labels(second, {"align": "align"}) == {"align": "SFT (IA) + CAT, round 2"}


def test_arms_are_called_by_their_titles(run: RunFolder) -> None:
    """A path where a ladder puts an arm's model; not the same name for any other folder."""
    models = {
        "base": "base",
        "sft": "runs/x/seed0/sft/sft",
        "cat": "runs/x/seed0/cat/align",
        "cat_round2": "runs/x/seed0/cat/round2/align",
        "sft_ia": "runs/y/sft",
        "cat_own": "runs/x/seed0/cat_own/sft",
        "sft_gold": "some-org/sft_gold",
    }
    titles = {"sft": "SFT, original wordings", "cat": "+ CAT (self-reward)", "cat_round2": "+ CAT, second round"}
    assert model_cards.model_labels(run, models) == {name: titles.get(name, name) for name in models}


def test_names_are_no_markup_in_a_card(tmp_path: Path) -> None:
    """A run's, a model's and a source's name stay text: in headings, tables, code and commands."""
    name = "a|b <b>x *y* `z`"
    run = RunFolder(RunTable(folder=str(tmp_path), name=name), ["c.toml", 'judge.item_separator="\n```\n<i>"'])
    config = table_values(
        Config.model_validate({"model": {"path": f"{name}\u202e"}, "data": {"path": f"{name}|"}}),
        ("data", "model", "sft"),
        with_neutral=False,
    )
    for step in model_cards.STEPS_TO["sft"]:
        counts = {"sources": {"<u>file</u>\n# h": 3}}
        run.step(step).mkdir(parents=True)
        write_json(
            run.step(step) / "manifest.json",
            {"config": config, "inputs": {}, "outputs": {}, "digest": "0", "counts": counts},
        )
    path = exported(run, "sft")
    text = path.read_text("utf-8")
    assert r"# a\|b &lt;b&gt;x \*y\* \`z\`, stage 1" in text
    assert "\u202e" not in text, [line for line in text.splitlines() if "\u202e" in line]
    assert r"\u202e" in text and r"&lt;u&gt;file&lt;/u&gt;\\n" in text
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", re.sub(r"```.*?\n```\n", "", text, flags=re.S))
    assert not re.search(r"<(?!!--)", outside), outside
    rows_of_table = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in rows_of_table) and rows_of_table
    model_card_results.fill_card(path, replace(metrics_of({name: name}), labels={name: name}), name)
    assert r"| **a\|b &lt;b&gt;x \*y\* \`z\`** (this model) |" in path.read_text("utf-8")
    assert metadata(path)["model-index"][0]["name"] == f"{name}, stage 1"
