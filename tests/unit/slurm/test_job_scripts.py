"""What slurm/job.sh does around a step, with stand-ins for Slurm's commands and for a container.

The job scripts on a real Slurm cluster: tests/integration/test_slurm.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coalign.steps import GENERATING_STEPS, STEPS, TRAINING_STEPS

ROOT = Path(__file__).resolve().parents[3]
JOB = str(10**8 + os.getpid())
# Their words go to the file `called`; srun runs what it is given here, and the container stands for all of Python.
PROGRAMS = {
    "scontrol": """\
case "$1 $2" in
"show hostnames") echo here ;;
"show job")
    echo "JobState=RUNNING Requeue=${REQUEUE:-1} Restarts=${RESTARTS:-0}"
    echo "PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=${PREEMPTED:-None}"
    ;;
esac""",
    "squeue": 'echo "${STATE:-RUNNING None}"',
    "srun": """\
[ -z "${LOST:-}" ] || [[ "$*" != *--overlap* ]] || exit 1
while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"
""",
    "box": """\
case "$*" in
*--count*) exit "${COUNTED:-0}" ;;
*preflight.py*) echo "${FOUND:-20001 127.0.0.1 $PWD}"; exit "${CHECKED:-0}" ;;
*) trap '' TERM USR1; if [ -n "${SIGNAL:-}" ]; then kill "-$SIGNAL" "$PPID"; sleep 0.3; fi; exit "${CODE:-0}" ;;
esac""",
}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs slurm/single.sbatch for the step rank as a job does, with more environment."""
    for name, text in PROGRAMS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"$CALLED"\n{text}\n')
        path.chmod(0o755)

    def run(
        *words: str, script: str = "single.sbatch", step: str = "rank", **more: str
    ) -> subprocess.CompletedProcess[str]:
        env = {
            "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT / "distributed"),
            "CALLED": str(tmp_path / "called"),
            "COALIGN_ROOT": str(ROOT),
            "COALIGN_CONTAINER": "box --nv image.sif",
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "here",
            "SLURM_TASKS_PER_NODE": "1",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURMD_NODENAME": "here",
        }
        command = ["env", "--default-signal=INT"]  # which a shell lets its background ignore
        command += ["bash", str(ROOT / "slurm" / script), step, *words]
        env = {name: value for name, value in (env | more).items() if value}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120)

    return run


def called(folder: Path, program: str) -> list[str]:
    """Return the words that a program was called with."""
    lines = (folder / "called").read_text("utf-8").splitlines()
    return [line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")]


@pytest.mark.parametrize(("venv", "python"), [("", "python"), ("/inside", "/inside/bin/python")])
def test_every_python_runs_in_the_container(run: Run, tmp_path: Path, venv: str, python: str) -> None:
    """The command of slurm.container stands before it, and an environment that is named is one inside."""
    done = run("c.toml", "a=b", COALIGN_VENV=venv)
    assert done.returncode == 0, done.stderr
    begin = f"--nv image.sif {python} {ROOT}/launch"
    ran = [f"{begin}/preflight.py --count rank c.toml a=b", f"{begin}/preflight.py rank c.toml a=b"]
    assert called(tmp_path, "box") == [*ran, f"{begin}/rank.py c.toml a=b"]
    assert (tmp_path / "logs").is_dir()
    assert not [*Path("/tmp").glob(f"coalign-job{JOB}*")]


def test_a_job_without_pipeline_sh_asks_the_config(run: Run, tmp_path: Path) -> None:
    """sbatch and salloc pass on nothing of the table [slurm]."""
    config = tmp_path / "c.toml"
    config.write_text('[slurm]\ncontainer = "box from-config"\n')
    done = run(str(config), COALIGN_ROOT="", COALIGN_CONTAINER="")
    assert done.returncode == 0, done.stderr
    assert called(tmp_path, "box")[2] == f"from-config python {ROOT}/launch/rank.py {config}"
    bad = run(str(config), "slurm.nodse=2", COALIGN_ROOT="", COALIGN_CONTAINER="")
    assert bad.returncode == 2 and "slurm.nodse" in bad.stderr and len(bad.stderr.splitlines()) == 1


def test_modules_are_loaded_first(run: Run, tmp_path: Path) -> None:
    """By the submitting shell's function or by the system's; one that fails, or no function, ends the job."""
    function = '() { echo "module $*"; [ "$2" != gone ]; }'
    done = run("c.toml", COALIGN_MODULES="cuda/12.8 gcc", **{"BASH_FUNC_module%%": function})
    assert done.stdout.splitlines()[1:] == ["module load cuda/12.8", "module load gcc"]
    bad = run("c.toml", COALIGN_MODULES="gcc gone cuda", **{"BASH_FUNC_module%%": function})
    assert bad.returncode == 2 and "the module gone can't be loaded" in bad.stderr and "cuda" not in bad.stdout
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text('module() { echo "the system loads $2 $UNSET"; }\n')
    done = run("c.toml", COALIGN_MODULES="gcc", MODULESHOME=str(tmp_path))
    assert done.returncode == 0 and "the system loads gcc" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("more", "code", "said", "requeued"),
    [
        ({"CODE": "1"}, 1, "the step rank failed (exit status 1)", False),
        ({"CODE": "2"}, 2, "", False),
        ({"CODE": "1", "PREEMPTED": "2026-01-01T00:00:00"}, 0, "requeued: told to stop by TERM, since", True),
        ({"CODE": "1", "SIGNAL": "USR1"}, 0, "requeued: told to stop by USR1", True),
        ({"CODE": "1", "SIGNAL": "USR1", "RESTARTS": "1"}, 1, "", False),  # Slurm has started it anew meanwhile
        ({"CODE": "1", "SIGNAL": "USR1", "RESTARTS": "1", "SLURM_RESTART_COUNT": "1"}, 0, "requeued: told", True),
        ({"CODE": "1", "SIGNAL": "USR1", "REQUEUE": "0"}, 1, "may not be requeued (--no-requeue)", False),
        ({"CODE": "0", "SIGNAL": "USR1"}, 0, "", False),
        ({"CODE": "0", "COUNTED": "2"}, 2, "", False),
        ({"CODE": "0", "CHECKED": "143", "FOUND": "mistake"}, 2, "", False),  # another node was killed by srun
        ({"CODE": "0", "CHECKED": "143", "FOUND": "mistake", "LOST": "1"}, 0, "no answer from here", True),
        ({"CODE": "0", "CHECKED": "143"}, 143, "failed (exit status 143)", False),
        ({"CODE": "0", "CHECKED": "124"}, 124, "not checked within 300 s", False),
        ({"CODE": "1", "SIGNAL": "TERM", "STATE": "CANCELLED None"}, 1, "", False),
        ({"CODE": "1", "SIGNAL": "TERM", "STATE": "COMPLETING TimeLimit"}, 1, "raise slurm.warn_seconds", False),
        ({"CODE": "1", "SIGNAL": "INT"}, 130, "told to stop by INT", False),
    ],
)
def test_how_a_job_ends(run: Run, tmp_path: Path, more: dict[str, str], code: int, said: str, requeued: bool) -> None:
    """Failed, requeued or just ended, by the step's exit status and by what Slurm says of the job."""
    done = run("c.toml", **more)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert (f"requeue {JOB}" in called(tmp_path, "scontrol")) == requeued
    assert not [*Path("/tmp").glob(f"coalign-job{JOB}*")]


@pytest.mark.parametrize(
    ("script", "step"), [("single.sbatch", "sft"), ("ray.sbatch", "align"), ("deepspeed.sbatch", "sample")]
)
def test_a_script_runs_its_kind_of_step_alone(run: Run, script: str, step: str) -> None:
    """As ranks a step that generates would write the same files several times."""
    done = run("c.toml", script=script, step=step)
    assert done.returncode == 2 and f"pipeline.sh --only {step}" in done.stderr


@pytest.mark.parametrize(
    ("script", "steps"),
    [
        ("deepspeed.sbatch", TRAINING_STEPS),
        ("ray.sbatch", GENERATING_STEPS),
        ("single.sbatch", tuple(step for step in STEPS if step not in TRAINING_STEPS)),
    ],
)
def test_the_scripts_know_the_steps_of_the_package(run: Run, script: str, steps: tuple[str, ...]) -> None:
    """check_step in slurm/job.sh lists them once more, since it runs before any Python is there."""
    done = run("c.toml", script=script, step="nothing")
    named = re.search(r"one of: ([\w ]+);", done.stderr)
    assert named and {*named[1].split()} == {*steps}, done.stderr


def test_a_killed_scripts_folder_goes_with_the_next_job(run: Run) -> None:
    """That of a living one stays."""
    dead, alive = (Path(f"/tmp/coalign-job{JOB}{n}.0.batch") for n in (1, 2))
    ended = subprocess.Popen(["true"])
    ended.wait()
    try:
        for folder, holder in ((dead, ended.pid), (alive, os.getpid())):
            folder.mkdir()
            (folder / "holder").write_text(str(holder))
        assert run("c.toml").returncode == 0
        assert not dead.exists() and alive.exists()
    finally:
        for folder in (dead, alive):
            subprocess.run(["rm", "-rf", str(folder)], check=False)
