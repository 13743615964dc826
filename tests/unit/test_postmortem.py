"""What a user is told of a death, in place of Ray's paragraph."""

from __future__ import annotations

from pathlib import Path

import pytest

from coalign.postmortem import exit_words, read_end, reason_of

# As Ray 2.60 words it, for os._exit and SIGKILL alike.
DEAD = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: _Actor\n\tactor_id: c46a98\n\tpid: 25381"
    "\n\tnamespace: e4256e6e\n\tip: 127.0.0.1\nThe actor is dead because its worker process has died. Worker exit type:"
    " SYSTEM_ERROR Worker exit detail: {} Some common causes include: (1) the process was killed by the OOM killer"
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            DEAD.format("Worker unexpectedly exits with a connection error code 2. End of file."),
            "it was killed or crashed; Ray does not see its exit code",
        ),
        (DEAD.format("Worker exits with an exit code 1."), "exit code 1"),
        (DEAD.format("Worker was preempted."), "Worker was preempted."),
        ("Task was killed due to the node running low on memory.", "out of memory: Ray's memory monitor killed it"),
    ],
)
def test_rays_paragraph_becomes_one_reason(text: str, says: str) -> None:
    assert reason_of(RuntimeError(text)).startswith(says)


def test_exit_codes_in_words() -> None:
    assert exit_words(3) == "exit code 3"
    assert exit_words(-11) == "killed by SIGSEGV"
    assert exit_words(-9) == "killed by SIGKILL, which out of memory often means"


def test_the_end_of_a_log_without_rays_marks(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    log.write_text(":job_id:01\n" + "".join(f"line {i}\n\n" for i in range(20)))
    lines, _ = read_end(str(log))
    assert lines == [f"line {i}" for i in range(12, 20)]
    assert read_end(str(tmp_path / "none"))[0] == []
