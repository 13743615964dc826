"""What a Ray job sends to the cluster: all of the package, and none of the large folders of a working folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = yaml.safe_load((ROOT / "configs" / "ray_job.yaml").read_text("utf-8"))
# In a process of its own: one that has imported Ray reaches no private cluster any more.
LEFT_OUT = """
import json, sys
from pathlib import Path
from ray._private.runtime_env.packaging import _get_excludes

folder, excludes, names = json.load(sys.stdin)
excluded = _get_excludes(Path(folder), excludes)
print(json.dumps([name for name in names if excluded(Path(folder, name))]))
"""


def left_out(folder: Path, names: list[str]) -> list[str]:
    """Return which files Ray leaves out of what it sends of a folder."""
    asked = json.dumps([str(folder), SETTINGS["excludes"], names])
    found = subprocess.run([sys.executable, "-c", LEFT_OUT], input=asked, capture_output=True, text=True, check=True)
    names_left_out: list[str] = json.loads(found.stdout)
    return names_left_out


def test_every_module_of_the_package_is_sent() -> None:
    (name,) = SETTINGS["py_modules"]
    package = ROOT / name
    files = [
        p.relative_to(package).as_posix() for p in package.rglob("*") if p.suffix in (".py", ".j2", ".js", ".typed")
    ]
    assert "runs/step_folder.py" in files and "report/templates/page.js" in files
    assert left_out(package, files) == []


def test_large_folders_stay_behind() -> None:
    """Ray enters no folder that is left out."""
    for name in (
        "runs/my-7b/sft/model/model.safetensors",
        "data/rows.jsonl",
        "data/tasks/a.json",
        "models/m/model.safetensors",
    ):
        assert left_out(ROOT, [str(path) for path in [Path(name), *Path(name).parents][:-1]]), name


def test_the_recipes_and_configs_are_sent() -> None:
    names = ["launch/ray_job.py", "configs/tiny.toml", "examples/phrasebook/base/model.safetensors"]
    assert left_out(ROOT, names) == []
