"""Which models are evaluated: by step, folder or name; and the judge of agreement, which is none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from coalign.errors import UserError
from coalign.evaluation import tested_models


def model_folder(path: Path, text: str = "{}") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)
    return path


def test_models_are_found_by_step_folder_and_name(tmp_path: Path) -> None:
    steps = {"sft": tmp_path / "run" / "sft", "align": tmp_path / "run" / "align"}
    plain = model_folder(tmp_path / "plain")
    other = tmp_path / "other" / "align"
    model_folder(other / "model")
    (other / "manifest.json").write_text('{"config": {}, "inputs": {}, "outputs": {}, "counts": {}, "digest": "d"}')
    half = tmp_path / "half" / "align"
    model_folder(half / "model")
    (half / "config.json").write_text('{"config": {}, "inputs": {}}')
    found = {value: tested_models.resolve_model(value, steps, "B") for value in ("base", "sft", str(plain), str(other))}
    assert found == {
        "base": "B",
        "sft": str(steps["sft"] / "model"),
        str(plain): str(plain),
        str(other): str(other / "model"),
    }
    assert tested_models.resolve_model("some-lab/some-model", steps, "B") == "some-lab/some-model"
    for bad, message in ((str(half), "not complete"), (str(tmp_path), "holds no model"), ("nowhere", "check the path")):
        with pytest.raises(UserError, match=message):
            tested_models.resolve_model(bad, steps, "B")


def test_a_model_does_not_judge_itself(tmp_path: Path) -> None:
    tested = model_folder(tmp_path / "tested", '{"a": 1}')
    copy = model_folder(tmp_path / "copy" / "model", '{"a": 1}').parent
    judge = model_folder(tmp_path / "judge", '{"a": 2}')
    folders = {"base": str(tested)}
    chosen, digests = tested_models.check_models(folders, set(), str(judge))
    assert chosen == str(judge)
    assert set(digests) == {"model base", "judge of agreement"}
    with pytest.raises(UserError, match="same model as 'base'"):
        tested_models.check_models(folders, {"base"}, str(copy))
    with pytest.raises(UserError, match="neither exact"):
        tested_models.check_models(folders, set(), str(tmp_path))
