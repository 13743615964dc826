"""What is decided around a Slurm job, without Slurm: what is submitted, which flags, what a node checks, requeues."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from coalign.clusters import slurm_flags, slurm_jobs, slurm_node
from coalign.clusters.slurm_flags import check_time, parse_seconds
from coalign.clusters.slurm_jobs import JobStep, QueuedJob, list_jobs, read_words
from coalign.clusters.slurm_node import count_start, job_port
from coalign.errors import UserError
from coalign.tables import SlurmTable

STEPS = ("prepare", "paraphrase", "sft", "sample")


def table(**values: Any) -> SlurmTable:
    return SlurmTable.model_validate(values)


def steps(folder: Path) -> list[JobStep]:
    return [JobStep(name, folder / name, slurm_jobs.script_of(name, 2)) for name in STEPS]


def job(folder: Path, name: str, state: str = "PENDING", reason: str = "Dependency") -> QueuedJob:
    return QueuedJob("7", state, reason, str((folder / name).resolve()))


def flags_of(step: str, **values: Any) -> list[str]:
    return slurm_flags.resource_flags(table(**values), step, slurm_jobs.script_of(step, 2))


def test_each_kind_of_step_asks_for_what_it_uses() -> None:
    asked: dict[str, Any] = {"nodes": 2, "gpus_per_node": 4, "cpus_per_rank": 6}
    training, generating = flags_of("sft", **asked), flags_of("judge", **asked)
    assert {"--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=4", "--cpus-per-task=6"} <= {*training}
    assert {"--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=1", "--cpus-per-task=24"} <= {*generating}
    assert not any("gpus" in flag or "nodes" in flag for flag in flags_of("rank", **asked))
    assert "--gpus-per-node=0" in slurm_flags.last_flags("rank") and not slurm_flags.last_flags("sft")
    assert "--signal=B:USR1@90" in flags_of("rank", warn_seconds=90)
    assert not any(flag.startswith(("--partition", "--account", "--mem")) for flag in training)
    assert {"--partition=p", "--constraint=a"} <= {*flags_of("sft", partition="p", options=["--constraint=a"])}
    assert slurm_jobs.script_of("sample", 0) == slurm_jobs.script_of("rank", 2) == "single.sbatch"


def test_a_job_waits_for_the_one_before_it_and_the_users_flags_come_last(tmp_path: Path) -> None:
    sft = steps(tmp_path)[2]
    command = slurm_jobs.make_command(tmp_path, "a/b c", sft, ["--time=1", "--time=2"], ["c.toml"], "41")
    assert {"--dependency=afterok:41", "--kill-on-invalid-dep=yes", "--job-name=coalign-a-b-c-sft"} <= {*command}
    assert command[-5:] == ["--time=1", "--time=2", str(tmp_path / "slurm/deepspeed.sbatch"), "sft", "c.toml"]
    assert not any("dependency" in word for word in slurm_jobs.make_command(tmp_path, "a", sft, [], [], ""))
    for after, begin in (("41", "afterok:41,"), ("", "")):
        command = slurm_jobs.make_command(tmp_path, "a", sft, ["--dependency=afterany:7", "--time=1"], [], after)
        assert [word for word in command if "--dependency" in word] == [f"--dependency={begin}afterany:7"]


def test_only_missing_steps_are_submitted(tmp_path: Path) -> None:
    missing, kept, orphans = list_jobs(steps(tmp_path), ["prepare"], [job(tmp_path, "paraphrase", "RUNNING")])
    assert [step.name for step in missing] == ["sft", "sample"]
    assert [*kept] == ["paraphrase"] and not orphans


def test_a_job_that_waits_for_what_is_gone_is_replaced(tmp_path: Path) -> None:
    waiting = job(tmp_path, "sample")
    missing, kept, orphans = list_jobs(steps(tmp_path), ["prepare", "paraphrase"], [waiting])
    assert [step.name for step in missing] == ["sft", "sample"]
    assert orphans == [waiting] and not kept
    dead = job(tmp_path, "sft", reason=slurm_jobs.GONE)
    assert list_jobs(steps(tmp_path), ["prepare", "paraphrase"], [dead])[2] == [dead]
    running = job(tmp_path, "sample", "RUNNING")
    assert list_jobs(steps(tmp_path), ["prepare", "paraphrase"], [running])[1] == {"sample": running}
    elsewhere = job(tmp_path / "other", "sft", reason=slurm_jobs.GONE)
    assert list_jobs(steps(tmp_path), [], [elsewhere])[2] == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("5:30", 330),
        ("1:00:00", 3600),
        ("2-0", 172800),
        ("1-12:30", 131400),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("values", "flags", "found"),
    [
        ({"time": "00:03:00"}, [], "00:03:00 is too short"),
        ({}, ["--time=3"], "3 is too short"),
        ({"time": "soon"}, [], "slurm.time='soon'"),
        ({"warn_seconds": 3600, "time": "1:30:00"}, [], "3600 s before"),
    ],
)
def test_a_time_limit_that_leaves_no_time_is_refused(values: dict[str, Any], flags: list[str], found: str) -> None:
    with pytest.raises(UserError, match=found):
        check_time(table(**values), flags)
    check_time(table(time="00:03:00"), ["--time=10"])


@pytest.mark.parametrize(
    ("values", "workers", "gpus", "found"),
    [
        ({"gpus_per_node": 2, "ranks_per_node": 4}, 1, -1.0, "ranks_per_node=4 with slurm.gpus_per_node=2"),
        ({"cpus_per_rank": 1}, 3, -1.0, "generation.workers=3, but 1 nodes"),
        ({"gpus_per_node": 2}, 4, 1.0, "workers=4 x gpus_per_worker=1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    values: dict[str, Any], workers: int, gpus: float, found: str
) -> None:
    with pytest.raises(UserError, match=found):
        slurm_flags.check_resources(table(**values), workers, gpus)
    slurm_flags.check_resources(table(nodes=2, gpus_per_node=2), 4, 1.0)


def test_the_words_are_sorted() -> None:
    request = read_words(["c.toml", "a=b", "--only", "sft", "--partition=x", "--dry-run", "--exclusive"], STEPS)
    assert request == slurm_jobs.SubmitRequest("sft", True, False, ("--partition=x", "--exclusive"), ("c.toml", "a=b"))
    for words, found in ((["--only", "sfx"], "sfx"), (["--time", "3"], "--time"), (["-p", "x"], "-p")):
        with pytest.raises(UserError, match=found):
            read_words(words, STEPS)


def test_half_a_chain_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When sbatch refuses a later job, those before it do not stay in the queue."""
    called: list[list[str]] = []

    def call(command: list[str], env: dict[str, str] | None = None) -> str:
        called.append(command)
        if command[:2] == ["sbatch", "sft"]:
            raise UserError("refused")
        return str(10 + len(called))

    monkeypatch.setattr(slurm_jobs, "call", call)
    with pytest.raises(UserError, match="refused"):
        slurm_jobs.submit(steps(tmp_path), {}, lambda step, after: ["sbatch", step.name, after], {})
    assert called[:3] == [["sbatch", "prepare", ""], ["sbatch", "paraphrase", "11"], ["sbatch", "sft", "12"]]
    assert called[3:] == [["scancel", "11", "12"]]


def test_a_job_that_makes_no_progress_stops_after_three_requeues(tmp_path: Path) -> None:
    step = tmp_path / "sft"
    for restarts in range(3):
        count_start(step, 5, restarts)
    (step / "checkpoints" / "step_000030").mkdir(parents=True)
    for restarts in range(3, 6):  # three more starts with the same checkpoint
        count_start(step, 5, restarts)
    with pytest.raises(UserError, match=r"3 times without progress: .* after update 30 and 0 shards"):
        count_start(step, 5, 6)
    count_start(step, 6, 0)  # another job counts anew
    (step / "shards").mkdir()
    for restarts in range(1, 9):  # a shard each time is progress
        (step / "shards" / f"{restarts:05d}.jsonl").touch()
        count_start(step, 6, restarts)


@pytest.mark.parametrize("flag", ["--comment=x", "--array=1-2", "--test-only", "--output=x", "--job-name=x", "--wait"])
def test_flags_that_would_break_the_chain_are_refused(flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag} can't be given to a pipeline: "):
        slurm_flags.check_flags(["--partition=x", flag])


def test_a_folder_of_logs_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    slurm_jobs.make_logs()
    (tmp_path / "logs").rmdir()
    (tmp_path / "logs").touch()
    with pytest.raises(UserError, match="logs can't be made"):
        slurm_jobs.make_logs()


def test_a_port_that_is_taken_is_passed_over() -> None:
    port = job_port(123)
    assert job_port(123) == port and job_port(124) != port != job_port(123, 1)
    with socket.socket() as other:
        other.bind(("", port))
        assert job_port(123) != port
    assert slurm_node.FIRST_PORT <= port < slurm_node.FIRST_PORT + slurm_node.NUM_PORTS


def test_a_node_that_does_not_see_the_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COALIGN_NODES", "a b")
    monkeypatch.setenv("COALIGN_START_SECONDS", "0.3")
    slurm_node.check_shared("a", tmp_path / "here", "1-0", is_first=True)
    slurm_node.check_shared("b", tmp_path / "here", "1-0", is_first=False)
    with pytest.raises(UserError, match="not the same on b as on a"):
        slurm_node.check_shared("b", tmp_path / "there", "1-0", is_first=False)


def test_nodes_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COALIGN_START_SECONDS", "0.3")
    with pytest.raises(UserError, match="Ray: b, d did not come within 0 s"):
        slurm_node.wait_for(["a", "b", "c", "d"], lambda: {"a", "c"}, "Ray")


def test_gpus_and_disk_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert slurm_node.count_gpus() == 2
    slurm_node.check_gpus("n1", 2, 2, "sft")
    with pytest.raises(UserError, match="n1 has 2 GPUs for this job, sft needs 4"):
        slurm_node.check_gpus("n1", 2, 4, "sft")
    slurm_node.check_disk("n1", tmp_path, 0)
    with pytest.raises(UserError, match=r"on n1: .*slurm.free_gib"):
        slurm_node.check_disk("n1", tmp_path, 10**6)


def test_alone_a_node_listens_to_itself_only() -> None:
    assert slurm_node.own_address([socket.gethostname()]) == "127.0.0.1"


@pytest.mark.parametrize(
    "option", ["gpu", "-p gpu", "-pgpu", "-p", "--", "", "--partition", "--nodelist", " --x", "--comm=x", "--wra=x"]
)
def test_an_option_that_sbatch_would_take_for_the_script_is_refused(option: str) -> None:
    with pytest.raises(UserError, match=r"write sbatch's flags|can't be given to a pipeline"):
        slurm_flags.check_flags([option])


def test_options_of_the_table_that_are_flags_pass() -> None:
    slurm_flags.check_flags(["--constraint=a100", "--exclusive", "--wait-all-nodes=1", "--mem=0", "--mail-type=END"])
