"""A real Ray cluster of two nodes: the pipeline as one job, jobs stopped, nodes lost, what can't be met refused."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray_nodes
from commands import assert_same_files, until
from ray_nodes import ADDRESSES, DASHBOARD, GCS, NAMES, ROOT, Nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = ("prepare", "paraphrase", "sft", "sample", "judge", "rank", "align", "eval")
MARK = secrets.token_hex(8)  # in the package of the checkout alone, so that nothing else can be taken for it
# Small training; sampling long enough to be disturbed. Two CPUs a rank: then a node has room for one.
SETTINGS = [
    "sft.max_steps=4", "sft.batch_rows=16", "align.max_steps=4", "train.eval_every=0", "train.checkpoint_every=2",
    "data.max_sft_inputs=20", "data.max_align_inputs=8", "data.max_dev_inputs=4", "data.max_test_inputs=4",
    "sample.samples=24", "sample.max_new_tokens=48", "generation.shard_size=2", 'eval.models={align="align"}',
    "eval.noise_inputs=0", "train.ray_ranks=2", "train.ray_cpus_per_rank=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Start the cluster once: two CPUs and two pretended GPUs per node. Commands run in a fresh checkout."""
    if reason := ray_nodes.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    checkout = folder / "checkout"
    for part in ("configs", "distributed", "launch", "examples/phrasebook"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("tiny.toml"), checkout / "configs" / "tiny.toml")
    with (checkout / "distributed" / "coalign" / "__init__.py").open("a") as package:
        package.write(f'MARK = "{MARK}"\n')
    for big in (
        "runs",
        ".venv",
        ".git",
        "logs",
        "data",
        "models",
    ):  # more than Ray takes, so that one which is not left out is noticed
        (checkout / big).mkdir()
        with (checkout / big / "big").open("wb") as file:
            file.truncate(2**30)
    (folder / "private").mkdir()
    made = Nodes(folder, folder / "private", checkout)
    try:
        made.start(cpus=2, gpus=2)
        yield made
    finally:
        made.end()


def submit(nodes: Nodes, name: str, words: list[str], token: str | None = None) -> tuple[subprocess.Popen[bytes], Path]:
    """Submit a job as docs/running.md says; return the command, which prints the job's log, and where it prints."""
    log = nodes.folder / f"{name}.log"
    command = ["ray", "job", "submit", "--address", f"http://{ADDRESSES[0]}:{DASHBOARD}", "--submission-id", name]
    command += ["--runtime-env", "configs/ray_job.yaml", "--", *words]
    return nodes.popen(0, command, log, token), log


def step_words(nodes: Nodes, script: str, name: str, *settings: str) -> list[str]:
    place = [f"run.folder={nodes.folder / 'shared'}", f"run.name={name}"]
    return ["python", f"launch/{script}.py", "configs/tiny.toml", *SETTINGS, *place, *settings]


def on_cluster(words: list[str]) -> list[str]:
    """Return a command that runs on a node and is pointed at the cluster, without a job."""
    return ["env", f"RAY_ADDRESS={ADDRESSES[0]}:{GCS}", *words]


@pytest.fixture(scope="module")
def finished(nodes: Nodes) -> tuple[Path, str]:
    """Run all steps as one job; return the run's folder and what was printed."""
    look = "ls -A; python -c 'import coalign; print(coalign.MARK, coalign.__file__)'"
    job = " ".join(f"'{word}'" for word in step_words(nodes, "ray_job", "whole", "generation.gpus_per_worker=2"))
    process, log = submit(nodes, "whole", ["bash", "-c", f"{look}; exec {job}"])
    seen_early = False
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:
        seen_early = seen_early or "== sample" in log.read_text("utf-8", "replace")
        time.sleep(0.5)
    printed = log.read_text("utf-8", "replace")
    assert process.poll() == 0, printed[-6000:]
    assert seen_early, "the log came only at the end"
    return nodes.folder / "shared" / "whole", printed


def copy_without(finished: tuple[Path, str], name: str, *steps: str) -> Path:
    target = finished[0].parent / name
    shutil.copytree(finished[0], target, ignore=lambda folder, _: steps if Path(folder) == finished[0] else ())
    return target


def test_the_whole_pipeline_is_one_job(finished: tuple[Path, str]) -> None:
    """Every step is complete; ranks were on both nodes, workers as well, each of these with both GPUs of its node."""
    folder, printed = finished
    manifests = {step: json.loads((folder / step / "manifest.json").read_text("utf-8")) for step in STEPS}
    assert manifests["align"]["counts"]["ranks"] == manifests["sft"]["counts"]["ranks"] == 2
    for name in NAMES:
        assert sum(f"on {name}" in line and ": ranks " in line for line in printed.splitlines()) == 2
        workers = [line for line in printed.splitlines() if "a worker has started" in line and f"on {name}" in line]
        assert workers and all(line.endswith("GPU 0,1") for line in workers)
    assert (folder / "eval" / "report.html").exists()


def test_the_job_brings_its_package_and_leaves_big_folders_behind(finished: tuple[Path, str]) -> None:
    """The code that runs is the checkout's; runs, .venv, .git and logs are not sent."""
    head = finished[1].partition("== prepare")[0].splitlines()
    assert any(line.startswith(f"{MARK} ") for line in head)
    assert "launch" in head and "configs" in head
    assert not {"runs", ".venv", ".git", "logs"} & set(head)


def test_a_wrong_token_is_refused(nodes: Nodes) -> None:
    """Neither a job nor a step gets in with another token, and the step says so in one line."""
    process, log = submit(nodes, "intruder", ["true"], token="0" * 64)
    assert process.wait(120) != 0
    assert "token" in log.read_text().lower()
    code, printed = nodes.inside(0, on_cluster(step_words(nodes, "ray_job", "intruder")), token="0" * 64)
    assert code == 2, printed
    assert "refuse this token" in printed


def test_nothing_answers_without_a_token(nodes: Nodes) -> None:
    """Of all ports that the other node can reach, none but those of the metrics answers without the token."""
    code, printed = nodes.inside(0, ["python", "-c", LISTENING])
    assert code == 0, printed
    ports = sorted({int(word) for word in printed.split()})
    assert GCS in ports and DASHBOARD in ports
    code, printed = nodes.inside(1, ["python", "-c", KNOCKING, ADDRESSES[0], *map(str, ports)], token="")
    assert code == 0, printed
    answers = json.loads(printed.splitlines()[-1])
    assert answers[str(DASHBOARD)] == 401
    open_ones = {port: answer for port, answer in answers.items() if answer in (200, "served")}
    assert not open_ones, printed


LISTENING = """
for name in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{name}").read().splitlines()[1:]:
        words = line.split()
        address, port = words[1].split(":")
        if words[3] == "0A" and address not in ("0100007F", "00000000000000000000000001000000"):
            print(int(port, 16))
"""
# Every port is asked for the jobs over HTTP, which runs code on a cluster, and for a gRPC method that any GCS serves.
KNOCKING = """
import http.client, json, sys
import grpc
answers = {}
for port in sys.argv[2:]:
    place = f"{sys.argv[1]}:{port}"
    try:
        connection = http.client.HTTPConnection(place, timeout=10)
        connection.request("GET", "/api/jobs/")
        answer = connection.getresponse()
        # Ray's metrics have no token: gauges for Prometheus, whatever is asked, and nothing that can be run.
        answers[port] = "metrics" if answer.read(6) in (b"# HELP", b"") and answer.status == 200 else answer.status
    except (OSError, http.client.HTTPException):
        with grpc.insecure_channel(place) as channel:
            call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
            try:
                call(b"", timeout=10)
                answers[port] = "served"
            except grpc.RpcError as error:
                answers[port] = error.code().name
print(json.dumps(answers))
"""


def test_what_cannot_be_met_is_refused_with_a_table(nodes: Nodes, finished: tuple[Path, str]) -> None:
    """More GPUs per worker than any node has: nothing is placed, the table says what each node has."""
    copy_without(finished, "greedy", "sample", "judge", "rank", "align", "eval")
    words = step_words(nodes, "sample", "greedy", "generation.workers=1", "generation.gpus_per_worker=3")
    code, printed = nodes.inside(0, on_cluster(words))
    assert code == 2, printed
    assert (
        "asks for 1 x 3 GPUs, each on one node, the cluster has 4 on 2 nodes with at most 2; use fewer GPUs each"
        in printed
    )
    for name in NAMES:
        assert any(name in line and "2 of 2" in line for line in printed.splitlines()), printed


def test_a_folder_that_one_node_alone_sees_is_refused(nodes: Nodes) -> None:
    """The run folder lies on a node's own disk: the error names the other node, before anything is placed."""
    words = step_words(nodes, "ray_job", "x", f"run.folder={nodes.private / 'runs'}")
    code, printed = nodes.inside(0, on_cluster(words))
    assert code == 2, printed
    assert "is not the same disk on 1 of 2 nodes (on beta: No such file or directory)" in printed


def shards(run: Path) -> Callable[[], int]:
    return lambda: len(list((run / "sample" / "shards").glob("*.jsonl")))


def test_a_stopped_job_leaves_nothing_running_and_others_wait_meanwhile(
    nodes: Nodes, finished: tuple[Path, str]
) -> None:
    """While a job holds the GPUs another waits as long as it is told; then the first is stopped, and goes on later."""
    run = copy_without(finished, "stopped", "sample", "judge", "rank", "align", "eval")
    other = copy_without(finished, "other", "sample", "judge", "rank", "align", "eval")
    process, log = submit(nodes, "stopped", step_words(nodes, "sample", run.name, "generation.gpus_per_worker=2"))
    until(lambda: shards(run)() > 0 or process.poll() is not None, 240, lambda: log.read_text()[-4000:])
    nodes.pause("_Actor.run")  # else it could be done before the other has waited
    short = ["generation.gpus_per_worker=1", "generation.ray_wait_seconds=4"]
    code, printed = nodes.inside(0, on_cluster(step_words(nodes, "sample", other.name, *short)))
    assert code == 2, printed
    assert "no worker has started within generation.ray_wait_seconds=4" in printed
    assert "alpha 0 of 2 GPU" in printed and "beta 0 of 2 GPU" in printed
    stop = ["ray", "job", "stop", "--address", f"http://{ADDRESSES[0]}:{DASHBOARD}", "stopped"]
    code, printed = nodes.inside(0, stop)
    assert code == 0, printed
    process.wait(60)
    left = lambda: [line for node in (0, 1) for line in nodes.processes(node, "_Actor")]  # noqa: E731
    until(lambda: not left(), 60, lambda: f"left behind: {left()}")
    assert not (run / "sample" / "manifest.json").exists()
    code, printed = nodes.inside(0, on_cluster(step_words(nodes, "sample", run.name)))
    assert code == 0 and "shards are done already" in printed, printed


def test_a_killed_worker_and_a_lost_node_cost_their_shards_in_flight(nodes: Nodes, finished: tuple[Path, str]) -> None:
    """A worker is killed, then a node is cut off in mid-step: both are explained, and the result is the same.

    Comes last: the second node stays away.
    """
    run = copy_without(finished, "cut", "sample", "judge", "rank", "align", "eval")
    process, log = submit(nodes, "cut", step_words(nodes, "sample", run.name, "generation.gpus_per_worker=2"))
    printed = lambda: log.read_text("utf-8", "replace")  # noqa: E731
    until(lambda: shards(run)() > 0 or process.poll() is not None, 240, lambda: printed()[-4000:])
    nodes.kill(0, "_Actor.run")
    until(lambda: "another takes its place" in printed() or process.poll() is not None, 60, lambda: printed()[-4000:])
    nodes.pause("_Actor.run", only=1)  # it has work in hand
    nodes.cut(1)
    assert process.wait(300) == 0, printed()[-6000:]
    killed = printed().index("killed by SIGKILL (exit status -9)")
    assert "process " in printed()[:killed].splitlines()[-1]
    assert re.search(r"ended: its node beta (was lost|does not answer); another takes its place", printed())
    assert printed().count("is tried again") <= 4  # two in flight of each
    assert_same_files(run / "sample", finished[0] / "sample", ["responses.jsonl"])


MAKE_AND_WAIT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ray_nodes import Nodes
folder = Path(sys.argv[2])
nodes = Nodes(folder, folder / "private", folder)
nodes.popen(1, ["setsid", "sleep", "1234"], folder / "log")
print(*nodes.inner, flush=True)
time.sleep(600)
"""


def test_nodes_end_with_the_process_that_made_them(tmp_path: Path) -> None:
    """Killed by SIGKILL, it leaves no process of its nodes behind."""
    if reason := ray_nodes.missing():
        pytest.skip(reason)
    (tmp_path / "private").mkdir()
    words = [sys.executable, "-c", MAKE_AND_WAIT, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    inner = [int(word) for word in process.stdout.readline().split()]
    assert len(inner) == 2 and all(Path(f"/proc/{pid}").exists() for pid in inner)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inner), 20, lambda: f"{inner} are left")
