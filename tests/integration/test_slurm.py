"""The job scripts on a real Slurm cluster of two nodes with two (made-up) GPUs each: results, faults, what is left.

Two fixtures cost most: the cluster, and one pipeline of eight jobs on it. Where Slurm isn't installed all of this is
skipped; with REQUIRE_SLURM=1 it fails there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from commands import ROOT, STEPS, Run, assert_same_curve, assert_same_files, assert_same_weights
from slurm_cluster import NODES, SlurmCluster, missing, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.timeout(1800)]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
JOB_SECONDS = 300.0
PLACE = ["slurm.nodes=2", "slurm.gpus_per_node=2", "slurm.cpus_per_rank=1", "slurm.time=00:30:00", "slurm.free_gib=1"]


@dataclasses.dataclass
class Pipeline:
    """A folder to submit from, and what slurm/pipeline.sh does for one run."""

    cluster: SlurmCluster
    folder: Path
    run: Run

    def submit(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Call slurm/pipeline.sh."""
        return self.call("bash", str(ROOT / "slurm" / "pipeline.sh"), *self.words, *words, code=code)

    @property
    def words(self) -> list[str]:
        """Return the config and the settings."""
        return ["tests/integration/tiny.toml", *PLACE, *self.run.place]

    def call(self, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command where the user works, with an active environment."""
        own = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{self.cluster.env['PATH']}"}
        done = self.cluster.run(*command, cwd=self.folder, env=own)
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
        return done

    def jobs(self, *words: str) -> dict[str, str]:
        """Submit and return {step: job} of what was submitted."""
        return dict(re.findall(r"^(\w+) +job (\d+), submitted", self.submit(*words).stdout, re.MULTILINE))

    def printed(self, step: str, job: str) -> str:
        """Return what a job has printed."""
        path = self.folder / "logs" / f"coalign-{self.run.path.name}-{step}-{job}.out"
        return path.read_text("utf-8", "replace") if path.exists() else "nothing"

    def wait(self, step: str, job: str, seconds: float = JOB_SECONDS) -> None:
        """Wait until a job has ended; fail when it has not succeeded."""
        found = self.cluster.wait_for_job(job, *ENDED, seconds=seconds)
        assert found["JobState"] == "COMPLETED", f"{found}\n{self.printed(step, job)[-4000:]}"


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that both nodes see."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Start the cluster once."""
    reason = missing()
    if reason and os.environ.get("REQUIRE_SLURM") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    python = [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), [tmp_path_factory.getbasetemp(), ROOT, *python])
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def pipeline(slurm: SlurmCluster, shared_folder: Path, tmp_path: Path) -> Iterator[Callable[[Run], Pipeline]]:
    """Return a function that makes a pipeline of a run; afterwards both nodes are up and no job is left."""

    def make(run: Run) -> Pipeline:
        return Pipeline(slurm, work_folder(tmp_path / "work"), run)

    yield make
    for node in NODES:
        slurm.start_node(node)
    slurm.run("scancel", "--user", "root")
    wait_until(lambda: not slurm.run("squeue", "-h").stdout, "the queue is empty")
    slurm.wait_for_nodes(*NODES)


def work_folder(folder: Path) -> Path:
    """Make a folder to submit from, in which the config's relative paths mean what they mean in the repository."""
    folder.mkdir()
    for name in ("examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="session")
def whole(slurm: SlurmCluster, shared_folder: Path) -> tuple[Pipeline, dict[str, str]]:
    """Run all eight steps on two nodes of two GPUs, with as many ranks as the local run has, and return the jobs."""
    pipeline = Pipeline(slurm, work_folder(shared_folder / "work"), Run(shared_folder / "whole"))
    jobs = pipeline.jobs("slurm.ranks_per_node=1", "slurm.cpus_per_rank=2")
    assert list(jobs) == list(STEPS)
    for step, job in jobs.items():
        pipeline.wait(step, job)
    return pipeline, jobs


def test_the_pipeline_gives_the_local_result(whole: tuple[Pipeline, dict[str, str]], finished: Run) -> None:
    """With as many ranks the losses, the texts and the metrics are those of the local run."""
    run = whole[0].run
    assert run.manifest("sft")["counts"]["ranks"] == run.manifest("align")["counts"]["ranks"] == 2
    for step, files in (("paraphrase", "wordings"), ("sample", "responses"), ("rank", "groups"), ("eval", "answers")):
        assert_same_files(run.path / step, finished.path / step, [f"{files}.jsonl"])
    for step in ("sft", "align"):
        assert_same_curve(run.curve(step), finished.curve(step), 1e-6)
    assert_same_metrics(run, finished)


def assert_same_metrics(found: Run, expected: Run) -> None:
    """Fail unless every model has the same metrics within 0.02."""
    mine, theirs = (json.loads((r.path / "eval/metrics.json").read_text("utf-8"))["models"] for r in (found, expected))
    for model, values in mine.items():
        for metric in ("cr", "mcr", "accuracy", "rouge_l"):
            assert values[metric]["mean"] == pytest.approx(theirs[model][metric]["mean"], abs=0.02), (model, metric)


def test_the_jobs_used_both_nodes_and_left_nothing(whole: tuple[Pipeline, dict[str, str]]) -> None:
    """Ranks met over both nodes, Ray had a node on each, and no temporary folder or process stays."""
    pipeline, jobs = whole
    assert "2 ranks on n1, n2" in pipeline.printed("sft", jobs["sft"])
    for node in NODES:
        log = pipeline.folder / "logs" / f"ray-{jobs['sample']}-{node}.log"
        assert log.exists()
    assert_nothing_left(pipeline.cluster)


def test_a_second_call_submits_nothing(whole: tuple[Pipeline, dict[str, str]]) -> None:
    """All steps are complete: it says so and queues nothing."""
    printed = whole[0].submit().stdout
    assert re.findall(r"^(\w+) +complete$", printed, re.MULTILINE) == list(STEPS)
    assert not whole[0].cluster.run("squeue", "-h").stdout


def left_on_nodes(cluster: SlurmCluster) -> list[str]:
    """Return temporary folders and processes of jobs that are still on the nodes."""
    names = ("coalign-*", "torch*", "triton*", "ray*", "tmp*")
    found = [str(path) for node in NODES for name in names for path in (cluster.root / "tmp" / node).glob(name)]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if process.environ().get("COALIGN_TMP") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200])
    return found


def heads_of_ray() -> list[psutil.Process]:
    """Return the head processes of jobs' clusters."""
    heads = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            if process.name() == "gcs_server" and process.environ().get("COALIGN_TMP"):
                heads.append(process)
    return heads


def open_sockets(process: psutil.Process) -> list[str]:
    """Return what a job listens on in a process's network: "ADDRESS:PORT NAME", without Slurm's own."""
    command = ["nsenter", "--target", str(process.pid), "--net", "ss", "-ltnpH"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"(\S+) +\S+ +users:\(\(\"([^\"]+)", shown)
    return [f"{address} {name}" for address, name in found if not name.startswith(("srun", "slurm"))]


def assert_nothing_left(cluster: SlurmCluster) -> None:
    """Wait a little for the last processes to go; fail when some stay."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not left_on_nodes(cluster), "nothing is left", 30)
    assert left_on_nodes(cluster) == []


def test_a_failed_step_cancels_the_rest(pipeline: Callable[[Run], Pipeline], tmp_path: Path) -> None:
    """The error is in the failed job's log, and no later job waits for ever."""
    mine = pipeline(Run(tmp_path / "broken"))
    jobs = mine.jobs("data.path=nowhere")
    assert mine.cluster.wait_for_job(jobs["prepare"], *ENDED)["ExitCode"] == "2:0"
    assert "nowhere" in mine.printed("prepare", jobs["prepare"])
    for step in STEPS[1:]:
        assert mine.cluster.wait_for_job(jobs[step], *ENDED)["JobState"] == "CANCELLED", step


def test_only_what_is_missing_is_submitted(pipeline: Callable[[Run], Pipeline], copy_of: Callable[..., Run]) -> None:
    """Complete steps and queued ones are passed over; after one is cancelled it is queued again with what follows."""
    mine = pipeline(copy_of("rank", "align", "eval"))
    first = mine.jobs("--hold")
    assert list(first) == ["rank", "align", "eval"]
    assert mine.jobs("--hold") == {}
    mine.cluster.run("scancel", first["align"])
    second = mine.jobs("--hold")
    assert list(second) == ["align", "eval"]
    waiting = mine.cluster.run("squeue", "-h", "-o", "%A").stdout.split()
    assert sorted(waiting) == sorted([first["rank"], *second.values()])
    assert f"afterok:{first['rank']}" in mine.cluster.job(second["align"])["Dependency"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--partition=nope"], ("invalid partition specified: nope", "slurm.partition", "sinfo")),
        (["slurm.gpus_per_node=3"], ("Requested node configuration is not available", "slurm.gpus_per_node")),
        (["slurm.nodes=3"], ("Node count specification invalid", "slurm.nodes")),
        (["slurm.time=00:03:00"], ("00:03:00 is too short", "120 s before its end")),
        (["--time=24:00:00"], ("time limit is invalid", "slurm.time")),
        (["generation.workers=9"], ("generation.workers=9", "2 nodes with 2 x 1 cores have 4")),
        (["slurm.ranks_per_node=4"], ("slurm.ranks_per_node=4 with slurm.gpus_per_node=2",)),
        (["--partition", "main"], ("--partition=long",)),
    ],
)
def test_a_mistake_is_told_and_nothing_is_queued(
    words: list[str], expected: tuple[str, ...], pipeline: Callable[[Run], Pipeline], tmp_path: Path
) -> None:
    """Slurm's own words with the key to change; also of a chain of which only a later job is refused."""
    mine = pipeline(Run(tmp_path / "mistake"))
    error = mine.submit(*words, code=2).stderr
    assert all(part in error for part in expected), error
    assert not mine.cluster.run("squeue", "-h", "-t", "PENDING,RUNNING").stdout


def test_four_ranks_give_the_local_result_of_two(
    pipeline: Callable[[Run], Pipeline], copy_of: Callable[..., Run], finished: Run
) -> None:
    """A rank for each GPU of both nodes: every loss of either stage differs in rounding alone, the metrics hardly.

    Stage 2 starts from what the local run has sampled: a model that differs in its last digits may draw one text of a
    thousand otherwise, and the updates that see it are others then.
    """
    first = pipeline(copy_of(*STEPS[2:], name="four_sft"))
    first.wait("sft", first.jobs("--only", "sft")["sft"])
    second = dataclasses.replace(first, run=copy_of("align", "eval", name="four_align"))
    for step, job in second.jobs().items():
        second.wait(step, job)
    for step, run in (("sft", first.run), ("align", second.run)):
        assert run.manifest(step)["counts"]["ranks"] == 4
        assert_same_curve(run.curve(step), finished.curve(step), 1e-4)
    assert_same_metrics(second.run, finished)


def newest_update(run: Run, step: str) -> int:
    """Return the update of a training step's newest checkpoint."""
    return max((int(p.name[5:]) for p in (run.path / step / "checkpoints").glob("step_*")), default=0)


def test_training_goes_on_after_a_signal_and_a_lost_node(
    pipeline: Callable[[Run], Pipeline], copy_of: Callable[..., Run], finished: Run
) -> None:
    """USR1 costs no update, a node that dies the updates since the last checkpoint; the result is identical."""
    mine = pipeline(copy_of("sft", "sample", "judge", "rank", "align", "eval"))
    cluster, run = mine.cluster, mine.run
    job = mine.jobs("--only", "sft", "slurm.gpus_per_node=1")["sft"]

    def trained(updates: int) -> None:
        wait_until(lambda: newest_update(run, "sft") >= updates, f"{updates} updates:\n{mine.printed('sft', job)}", 240)

    trained(15)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.start_now(job, 1)
    stopped = newest_update(run, "sft")
    assert stopped % 15, f"a checkpoint after the update at work ({stopped}), not only those that were due"
    assert f"stopped by a signal after update {stopped}" in mine.printed("sft", job)
    trained(stopped + 15)
    cluster.kill_node("n2")
    cluster.wait_until_queued_again(job, 2)
    assert not run.complete("sft"), "the node must die while there is work left"
    cluster.start_node("n2")
    cluster.wait_for_nodes("n1", "n2")  # the end of the attempt before reaches n2 with it
    cluster.start_now(job, 2)
    mine.wait("sft", job)
    printed = mine.printed("sft", job)
    assert f"resuming after update {stopped} from" in printed
    assert printed.count("resuming after update") == 2 and "requeued 3 times" not in printed
    assert_same_curve(run.curve("sft"), finished.curve("sft"), 1e-6)
    assert_same_weights(run.path / "sft" / "model", finished.path / "sft" / "model", 1e-6)
    assert_nothing_left(cluster)


def test_a_preempted_job_saves_its_work(pipeline: Callable[[Run], Pipeline], copy_of: Callable[..., Run]) -> None:
    """In the grace time that Slurm gives it training writes a checkpoint, makes room, and goes on there afterwards."""
    mine = pipeline(copy_of("sft", "sample", "judge", "rank", "align", "eval"))
    job = mine.jobs("--only", "sft", "slurm.gpus_per_node=1")["sft"]
    wait_until(lambda: newest_update(mine.run, "sft") >= 15, f"15 updates:\n{mine.printed('sft', job)}", JOB_SECONDS)
    urgent = mine.call("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    mine.cluster.wait_for_job(urgent.stdout.strip(), "COMPLETED")
    stopped = newest_update(mine.run, "sft")
    assert f"stopped by a signal after update {stopped}" in mine.printed("sft", job)
    assert "is requeued: told to stop by TERM" in mine.printed("sft", job)
    mine.cluster.start_now(job, 1)
    wait_until(lambda: f"resuming after update {stopped} from" in mine.printed("sft", job), "it resumes", JOB_SECONDS)
    mine.cluster.run("scancel", job)
    assert_nothing_left(mine.cluster)


def test_a_preempted_step_that_generates_is_queued_again(
    pipeline: Callable[[Run], Pipeline], copy_of: Callable[..., Run]
) -> None:
    """Its Ray nodes are told to stop, its driver is not."""
    mine = pipeline(copy_of("sample", "judge", "rank", "align", "eval"))
    job = mine.jobs("--only", "sample")["sample"]
    shards = mine.run.path / "sample" / "shards"
    wait_until(lambda: any(shards.glob("*.jsonl")), f"shards:\n{mine.printed('sample', job)}", JOB_SECONDS)
    held = drivers("sample")
    for driver in held:  # so small a step would be done at once
        driver.suspend()
    urgent = mine.call("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    wait_until(lambda: mine.cluster.job(job)["PreemptTime"] != "None", "Slurm preempts the job")
    for driver in held:
        driver.resume()
    mine.cluster.wait_for_job(urgent.stdout.strip(), "COMPLETED")
    assert "is requeued: told to stop by TERM" in mine.printed("sample", job)
    assert int(mine.cluster.job(job)["Restarts"]) == 1
    mine.cluster.run("scancel", job)
    assert_nothing_left(mine.cluster)


def test_three_requeues_without_progress_are_enough(pipeline: Callable[[Run], Pipeline], tmp_path: Path) -> None:
    """A job that is told to stop before it has done anything, again and again, fails and says why."""
    mine = pipeline(Run(tmp_path / "stuck"))
    job = mine.jobs("--only", "prepare")["prepare"]
    for starts in range(1, 4):
        begun = rf"== prepare, job {job} on n\d"
        wait_until(lambda: len(re.findall(begun, mine.printed("prepare", job))) == starts, f"start {starts}")  # noqa: B023
        mine.cluster.run("scancel", "--signal=USR1", "--batch", job)
        mine.cluster.start_now(job, starts)
    assert mine.cluster.wait_for_job(job, *ENDED)["ExitCode"] == "2:0"
    printed = mine.printed("prepare", job)
    assert f"job {job} was requeued 3 times without progress" in printed
    assert printed.count("is requeued: told to stop by USR1") == 3
    assert not mine.run.complete("prepare")
    assert_nothing_left(mine.cluster)


def test_steps_run_in_an_allocation_of_salloc(pipeline: Callable[[Run], Pipeline], copy_of: Callable[..., Run]) -> None:
    """From the login node's shell the scripts go to the first node, and use all nodes of the allocation."""
    mine = pipeline(copy_of(*STEPS[1:]))
    allocation = ["salloc", "--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=2", "bash"]
    words = [*mine.words, "slurm.gpus_per_node=1", "sft.max_steps=5", "train.eval_every=0"]
    mine.call(*allocation, str(ROOT / "slurm" / "ray.sbatch"), "paraphrase", *words)
    assert mine.run.complete("paraphrase")
    printed = mine.call(*allocation, str(ROOT / "slurm" / "deepspeed.sbatch"), "sft", *words).stdout
    assert "2 ranks on n1, n2" in printed and mine.run.complete("sft")
    assert_nothing_left(mine.cluster)


def tokens_of_ray() -> set[str]:
    """Return the tokens of all Ray clusters that jobs run now."""
    return {head.environ()["RAY_AUTH_TOKEN"] for head in heads_of_ray()}


def drivers(step: str) -> list[psutil.Process]:
    """Return the processes that run a step's script now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.name().startswith("python") and str(ROOT / "launch" / f"{step}.py") in process.cmdline():
                found.append(process)
    return found


def test_generation_survives_scancel_and_a_lost_node(
    pipeline: Callable[[Run], Pipeline], copy_of: Callable[..., Run], finished: Run
) -> None:
    """scancel leaves nothing behind; a lost node costs no finished shard, and one node alone completes the step."""
    mine = pipeline(copy_of("sample", "judge", "rank", "align", "eval"))
    cluster, shards = mine.cluster, mine.run.path / "sample" / "shards"

    def sampled(job: str, more: int) -> set[str]:
        """Wait for finished shards, then hold the driver still: the workers would complete so small a step at once."""
        before = len(list(shards.glob("*.jsonl")))
        wait_until(
            lambda: len(list(shards.glob("*.jsonl"))) >= before + more, f"shards:\n{mine.printed('sample', job)}", 240
        )
        for driver in drivers("sample"):
            driver.suspend()
        assert not mine.run.complete("sample"), "there must be work left"
        return {path.name for path in shards.glob("*.jsonl")}

    first = mine.jobs("--only", "sample")["sample"]
    sampled(first, 1)
    tokens = tokens_of_ray()
    folders = [cluster.root / "tmp" / node / f"coalign-job{first}.0.ray" for node in NODES]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 2
    cluster.run("scancel", first)
    cluster.wait_for_nodes(*NODES)
    assert_nothing_left(cluster)

    second = mine.jobs("--only", "sample")["sample"]
    done = sampled(second, 2)
    tokens |= tokens_of_ray()
    cluster.kill_node("n2")
    wait_until(lambda: int(cluster.job(second)["Restarts"]) >= 1, f"requeued: {mine.printed('sample', second)}", 120)
    cluster.run("scancel", second)
    wait_until(lambda: not cluster.run("squeue", "-h").stdout, "the queue is empty")
    assert done <= {path.name for path in shards.glob("*.jsonl")}

    third = mine.jobs("--only", "sample", "slurm.nodes=1", "generation.workers=1")["sample"]
    heard: set[str] = set()
    wait_until(lambda: heard.update(*map(open_sockets, heads_of_ray())) or mine.run.complete("sample"), "sampled", 240)
    outside = [line for line in heard if not re.match(r"(127\.0\.0\.1|\[::ffff:127\.0\.0\.1\]|\[::1\]):", line)]
    assert heard and not outside, outside
    mine.wait("sample", third)
    assert "shards are done already" in mine.printed("sample", third)
    assert_same_files(mine.run.path / "sample", finished.path / "sample", ["responses.jsonl", "dropped.jsonl"])
    assert len(tokens) == 2, "each job has a token of its own"
    texts = [path.read_bytes() for place in (mine.folder / "logs", mine.run.path) for path in place.rglob("*.*")]
    assert len(texts) > 3
    assert not any(token.encode() in text for token in tokens for text in texts)


def test_the_cluster_ends_with_a_killed_session(slurm: SlurmCluster, tmp_path: Path) -> None:
    """After SIGKILL of whoever asked for a cluster, its daemons end and its namespaces go."""
    code = (
        "import sys, time; from pathlib import Path; from slurm_cluster import SlurmCluster;"
        " print(SlurmCluster(Path(sys.argv[1]), []).namespace, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    session = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    assert session.stdout is not None
    namespace = session.stdout.readline().strip()
    assert namespace and Path("/run/netns", namespace).exists()
    daemons = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    session.send_signal(signal.SIGKILL)
    session.wait()
    wait_until(lambda: not Path("/run/netns", namespace).exists(), "the namespaces are gone", 60)
    assert daemons
    wait_until(lambda: not any(p.is_running() and p.status() != "zombie" for p in daemons), "the daemons are gone", 60)
