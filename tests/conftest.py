"""What holds for every test: no network, no stray settings, and no skip that nobody agreed to."""

from __future__ import annotations

import fcntl
import fnmatch
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A skip outside this list fails the session: (test id pattern, regular expression that its reason matches).
ALLOWED_SKIPS: list[tuple[str, str]] = [
    ("tests/*", r"the shared data are not here"),
    ("tests/*", r"needs a (GPU|CUDA device)"),
    ("tests/*", r"(sbatch|slurmctld|Slurm) is not installed"),
    ("tests/*", r"(sshd|pdsh) is not installed"),
    ("tests/*", r"network namespaces are not permitted here"),
    ("tests/*", r"(vLLM|vllm|wandb|a browser|chromium) is not installed"),
]
SETTINGS_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RAY_ADDRESS")

_skipped: list[tuple[str, str]] = []


def is_allowed(test_id: str, reason: str) -> bool:
    """Return whether a skip is on the list."""
    return any(fnmatch.fnmatch(test_id, name) and re.search(pattern, reason) for name, pattern in ALLOWED_SKIPS)


def _remember(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append((report.nodeid, reason.removeprefix("Skipped: ")))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember skipped tests."""
    _remember(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Remember skipped modules."""
    _remember(report)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a test module that imports Ray: the tests of that process could start no private cluster."""
    if "ray" in sys.modules:
        raise pytest.UsageError("a test module imports ray at its top; import it in a process of its own")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that passed but skipped something outside the list."""
    if session.exitstatus == pytest.ExitCode.OK and not all(is_allowed(*skip) for skip in _skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests were skipped, and which of them may not be."""
    terminalreporter.write_line(f"skipped tests: {len(_skipped)}")
    for test_id, reason in _skipped:
        if not is_allowed(test_id, reason):
            terminalreporter.write_line(
                f"skip outside ALLOWED_SKIPS of tests/conftest.py: {test_id}: {reason}", red=True
            )


@pytest.fixture(autouse=True)
def _logging_as_at_the_start() -> Iterator[None]:
    """Take away what an earlier test, or a recipe that ran in this process, has set on our logger."""
    logger = logging.getLogger("coalign")
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return a function that returns a folder of a name, filled by the first process of the tests that asks for it.

    The others wait meanwhile, and nobody changes it afterwards. What failed once is not tried again.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make_once(name: str, fill: Callable[[Path], None]) -> Path:
        folder, outcome = shared / name, shared / f"{name}.outcome"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if not outcome.exists():
                    folder.mkdir()
                    try:
                        fill(folder)
                    except BaseException:
                        outcome.write_text(traceback.format_exc(), "utf-8")
                        raise
                    outcome.write_text("", "utf-8")
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)
        if failure := outcome.read_text("utf-8"):
            pytest.fail(f"{name} could not be made:\n{failure[-3000:]}", pytrace=False)
        return folder

    return make_once


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take away what a launcher around the tests may have set, and keep the hub out of reach."""
    for name in SETTINGS_OF_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
