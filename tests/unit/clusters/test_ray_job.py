"""What a Ray job sends to the cluster: all of the package, and none of the large folders of a working folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import _get_excludes

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = yaml.safe_load((ROOT / "configs" / "ray_job.yaml").read_text("utf-8"))


def left_out(folder: Path, name: str) -> bool:
    """Return whether Ray leaves a file out of what it sends of a folder."""
    is_left_out: bool = _get_excludes(folder, SETTINGS["excludes"])(folder / name)
    return is_left_out


def test_every_module_of_the_package_is_sent() -> None:
    (name,) = SETTINGS["py_modules"]
    package = ROOT / name
    files = [
        p.relative_to(package).as_posix() for p in package.rglob("*") if p.suffix in (".py", ".j2", ".js", ".typed")
    ]
    assert "runs/step_folder.py" in files and "report/templates/page.js" in files
    assert not [file for file in files if left_out(package, file)]


@pytest.mark.parametrize(
    "name",
    ["runs/my-7b/sft/model/model.safetensors", "data/rows.jsonl", "data/tasks/a.json", "models/m/model.safetensors"],
)
def test_large_folders_stay_behind(name: str) -> None:
    folders = [Path(name), *Path(name).parents][:-1]
    assert any(left_out(ROOT, str(path)) for path in folders), "Ray enters no folder that is left out"


def test_the_recipes_and_configs_are_sent() -> None:
    for name in ("launch/ray_job.py", "configs/tiny.toml", "examples/phrasebook/base/model.safetensors"):
        assert not left_out(ROOT, name)
