"""metrics.json: what was written is read back, older files too, and everything else is one clear message."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from coalign.errors import UserError
from coalign.evaluation import metrics_file, typed_json
from coalign.evaluation.metrics_schema import Metrics
from unit.worlds import by_rule, half_right, make_run, results, summarised, world

Keys = tuple[str | int, ...]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the content of a metrics.json with rows in every list, as eval writes it."""
    tasks, pairs = world(8)
    outputs = {"base": by_rule(pairs, lambda pair: "yes"), "align": by_rule(pairs, half_right)}
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", summarised(outputs, tasks, pairs))
    content: dict[str, Any] = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert content["most_inconsistent"] and content["cases"] and content["cost"]
    return content


def changed(content: dict[str, Any], path: Keys, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a path; without the key for `...`."""
    copied = copy.deepcopy(content)
    inner: Any = copied
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copied


def test_what_was_written_is_read_back(written: dict[str, Any], tmp_path: Path) -> None:
    """The same object, and the same text on disk, numbers as they were: 1 stays 1 and 1.0 stays 1.0."""
    assert next(iter(written)) == "version" and written["version"] == metrics_file.VERSION
    metrics = metrics_file.from_json(written)
    assert json.dumps(metrics_file.to_json(metrics)) == json.dumps(written)
    metrics_file.write_metrics(tmp_path, metrics)
    assert metrics_file.read_metrics(tmp_path) == (tmp_path, metrics)


def test_metrics_of_a_model_stand_directly_in_its_object(written: dict[str, Any]) -> None:
    model, row = written["models"]["base"], written["differences"][0]
    assert list(model)[:2] == ["cr", "mcr"]
    assert list(model)[-5:] == ["seen", "unseen", "noise", "modes_agree", "counts"]
    assert list(row) == ["a", "b", "metric", "mean", "low", "high", "num_tasks", "method"]


def test_a_file_without_a_version_may_lack_what_eval_did_not_write_then(written: dict[str, Any]) -> None:
    defaults = {"constant_answer": None, "failures": None, "cases": (), "labels": {}, "dropped": {}, "lineage": None}
    defaults["agreement_judge"] = None
    older = {key: value for key, value in copy.deepcopy(written).items() if key not in ("version", *defaults)}
    for row in older["per_task"]:
        row.pop("items")
    metrics = metrics_file.from_json(older)
    assert {key: getattr(metrics, key) for key in defaults} == defaults
    assert metrics.per_task[0].items is None and metrics.label("base") == "base"
    with pytest.raises(UserError, match=r"metrics\.json: num_tasks: missing field"):
        metrics_file.from_json(changed(older, ("num_tasks",), ...))
    with pytest.raises(UserError, match=r"missing field"):
        metrics_file.from_json(older | {"version": metrics_file.VERSION})


def test_a_file_of_version_1_has_no_judge_of_agreement(written: dict[str, Any]) -> None:
    older = changed(written, ("agreement_judge",), ...) | {"version": 1}
    assert metrics_file.from_json(older).agreement_judge is None


def test_a_newer_version_names_both_and_what_to_do(written: dict[str, Any], tmp_path: Path) -> None:
    newer = metrics_file.VERSION + 1
    (tmp_path / "metrics.json").write_text(json.dumps(written | {"version": newer, "new": 1}), "utf-8")
    said = rf"metrics\.json has version {newer} .* versions up to {metrics_file.VERSION}; upgrade coalign"
    with pytest.raises(UserError, match=said):
        metrics_file.read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("models", "base", "cr", "mean"), "0.5", "models.base.cr.mean: a number was expected, not '0.5'"),
        (("models", "base", "cr", "mean"), True, "models.base.cr.mean: a number was expected, not True"),
        (("models", "base", "seen"), ..., "models.base.seen: missing field"),
        (("models", "base", "mcr"), ..., "models.base.mcr: missing field"),
        (("models", "base", "extra"), 1, "models.base.extra: unknown field"),
        (
            ("models", "align", "counts", "empty"),
            1.5,
            "models.align.counts.empty: a whole number was expected",
        ),
        (("models",), [], "models: an object was expected, not []"),
        (("differences", 0, "low"), ..., "differences[0].low: missing field"),
        (("differences", 0, "method"), "z", "differences[0].method: one of 'bootstrap', 't', 'none' was expected"),
        (("cases", 1, "golds"), "yes", "cases[1].golds: a list was expected, not 'yes'"),
        (("cases", 0, "models", "base", "answers", 0, "kind"), "x", "cases[0].models.base.answers[0].kind: one of"),
        (("per_task", 0, "seen"), 1, "per_task[0].seen: true or false was expected, not 1"),
        (("run",), None, "run: a text was expected, not None"),
        (("version",), "1", "version: a whole number was expected, not '1'"),
        (("version",), -1, "version: a whole number was expected, not -1"),
        (("num_task",), 3, "num_task: unknown field"),
    ],
)
def test_a_malformed_field_is_named(written: dict[str, Any], path: Keys, value: Any, says: str) -> None:
    with pytest.raises(UserError) as caught:
        metrics_file.from_json(changed(written, path, value), "runs/a/eval/metrics.json")
    assert str(caught.value).startswith(f"runs/a/eval/metrics.json: {says}")
    assert "run the step again" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("models", "base"), ..., "per_task of"),
        (("per_task", 0, "models", "align"), ..., "per_task of"),
        (("per_task", 1, "task"), "nosuch", "cases: "),
        (("per_wording", 0, "models"), {}, "per_wording of"),
        (("cases", 0, "models"), {}, "cases of"),
        (("cases", 0, "task"), "nosuch", "has a task or wording that is unknown"),
        (("cases", 0, "wordings", 0), "nosuch", "has a task or wording that is unknown"),
        (("cases", 0, "models", "base", "answers"), [], "has not one answer per wording"),
        (("failures", "models", "base"), ..., "failures has the models"),
        (("constant_answer", "differences", "base"), ..., "constant_answer has the models"),
        (("differences", 0, "a"), "nosuch", "a difference names nosuch"),
        (("differences_seen", 0, "metric"), "of", "and of, one of which is unknown"),
        (("most_inconsistent", 0, "model"), "nosuch", "has a model or task that is unknown"),
        (("num_tasks",), 10**400, "num_tasks: a whole number of at most 19 digits was expected"),
        (("run",), "\ud800", "run: half a surrogate pair"),
        (("labels",), {"\udc00": "x"}, "labels: half a surrogate pair"),
    ],
)
def test_parts_that_contradict_one_another_are_named(
    written: dict[str, Any], path: Keys, value: Any, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        metrics_file.from_json(changed(written, path, value), "m.json")
    assert says in str(caught.value) and str(caught.value).startswith("m.json: ")


def declared_keys(kind: Any) -> set[str]:
    """Return the keys that a class declares for disk."""
    keys: set[str] = set()
    for field in dataclasses.fields(kind):
        hint = get_type_hints(kind)[field.name]
        keys |= declared_keys(hint) if field.metadata == typed_json.FLAT else {field.name}
    return keys


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"models": {}}', "[" * 20_000])
def test_what_eval_did_not_write_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.json(: malformed JSON| was not written by eval)"):
        metrics_file.read_metrics(tmp_path)


def test_every_declared_field_is_on_disk(written: dict[str, Any]) -> None:
    assert declared_keys(Metrics) == written.keys() - {"version"}
    metrics = metrics_file.from_json(written)
    model = metrics.models["base"]
    for value, there in (
        (model, written["models"]["base"]),
        (metrics.differences[0], written["differences"][0]),
        (metrics.cases[0], written["cases"][0]),
        (metrics.per_task[0], written["per_task"][0]),
        (metrics.cost[0], written["cost"][0]),
    ):
        assert declared_keys(type(value)) == there.keys()


def test_settings_may_be_anything() -> None:
    metrics = dataclasses.replace(results(), settings={"eval.models": {"a b": "base"}, "run.seed": 1, "x": [None]})
    assert metrics_file.from_json(json.loads(json.dumps(metrics_file.to_json(metrics)))) == metrics


@dataclasses.dataclass(frozen=True)
class Form:
    """A form whose second version has a new field."""

    a: float
    new: str = ""


def test_every_older_version_may_lack_a_new_field() -> None:
    for version in (0, 1):
        assert typed_json.read_version(Form, {"version": version, "a": 1.0}, 2, "f") == Form(1.0)
    with pytest.raises(UserError, match="f: new: "):
        typed_json.read_version(Form, {"version": 2, "a": 1.0}, 2, "f")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="f: a: a finite number was expected"):
        typed_json.read_version(Form, {"version": 2, "a": value, "new": ""}, 2, "f")


def test_a_neighbour_without_models_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text('{"models": null}')
    with pytest.raises(UserError, match="holds neither"):
        metrics_file.read_metrics(tmp_path / "x")
