"""What a complete step wrote, compared with its manifest before another step reads it.

Rows are compared by their whole digest. A model folder is believed while each of its files has the stamp (size, times
and inode) that it had when it was digested; otherwise it is digested again. Manifests without digests are believed.
"""

from __future__ import annotations

from pathlib import Path

from coalign.errors import UserError
from coalign.process import rank
from coalign.runs.digests import digest_file, digest_folder, stamps_of
from coalign.runs.step_folder import label_of, read_manifest

MODEL = "model"
_ADVICE = {
    "prepare": "; to change the data, edit what data.path names",
    "paraphrase": "; to change wordings, give your own in paraphrase.files",
}
_compared: dict[Path, tuple[object, ...]] = {}  # files found whole in this process, with their stamps


def step_output(folder: Path, name: str) -> Path:
    """Return the path of a file of rows that a complete step wrote.

    Raises UserError, which names the step to run again, when the file is not what the step wrote.
    """
    if complaint := complaint_of_output(folder, name):
        raise UserError(complaint)
    return folder / name


def step_model(folder: Path) -> str:
    """Return the model folder that a complete step wrote. Raises UserError as `step_output` does.

    Only rank 0 compares, since the launcher ends the others when it fails.
    """
    if rank() == 0 and (complaint := complaint_of_output(folder, MODEL)):
        raise UserError(complaint)
    return str(folder / MODEL)


def require_outputs(folder: Path) -> None:
    """Raise UserError unless all that a complete step wrote is as its manifest says; does nothing for other folders."""
    for name in (read_manifest(folder) or {}).get("outputs", {}):
        step_output(folder, name)


def complaint_of_output(folder: Path, name: str) -> str:
    """Return what is wrong with one output of a complete step and what to do, "" when it is what the step wrote."""
    manifest = read_manifest(folder)
    known = (manifest or {}).get("outputs", {}).get(name)
    path = folder / name
    if manifest is None or known is None or _is_same(path, known, manifest.get("stamps")):
        return ""
    step = label_of(folder)
    return f"{path} is not what the step wrote; run {step} again (remove {folder} first){_ADVICE.get(step, '')}"


def _is_same(path: Path, digest: str, stamps: object) -> bool:
    try:
        if path.name == MODEL:
            return path.is_dir() and (stamps_of(path) == stamps or digest_folder(path) == digest)
        status = path.stat()
        now = (digest, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        if _compared.get(path) != now:
            if digest_file(path) != digest:
                return False
            _compared[path] = now
    except (OSError, UserError):
        return False
    return True
