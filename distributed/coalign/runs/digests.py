"""SHA-256 of what a step reads and writes: files, values, model folders, the files that settings name.

Knows the tables whose keys name files or model folders, and nothing of what a step does.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from coalign.config import JudgeTable, ModelTable, SftTable
from coalign.errors import UserError
from coalign.files import open_file

CARD = "README.md"  # of a model folder: text about the model, which may change while the model stays the same
_BLOCK, _MAX_BLOCKS = 1 << 16, 256  # bytes per block, blocks per file that a quick digest reads


def digest_file(path: Path, key: str = "") -> str:
    """Return the SHA-256 of a file, which the setting `key` names. Raises UserError when it can't be read."""
    digest = hashlib.sha256()
    with open_file(path, key) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_outputs(folder: Path) -> dict[str, str]:
    """Return {file name: SHA-256} of the JSONL files in a step's folder; a log of metrics is no output."""
    paths = sorted(folder.glob("*.jsonl"))
    return {path.name: digest_file(path) for path in paths if not path.name.startswith((".", "metrics"))}


def digest_value(value: Any) -> str:
    """Return the SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_folder(folder: Path) -> str:
    """Return one SHA-256 over the names and contents of the files directly in a model folder, without its card."""
    return digest_value({path.name: digest_file(path) for path in _model_files(folder)})


def stamps_of(folder: Path) -> dict[str, list[int]]:
    """Return {file name: [size, mtime, ctime, inode]} of a model folder without its card, times in nanoseconds.

    No program can set the ctime of a file, so a file that has kept its stamp has kept its content.
    """
    found = {}
    for path in _model_files(folder):
        status = path.stat()
        found[path.name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return found


def _model_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (CARD, f".{CARD}.tmp"))


def digest_weights(folder: str) -> str:
    """Return a digest of a model folder that is quick for large files: over their sizes and blocks spread over them.

    Of a model on the hub it is the name.
    """
    if not Path(folder).is_dir():
        return folder
    digest = hashlib.sha256()
    for path in _model_files(Path(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open_file(path) as stream:
            for place in range(0, size, max(_BLOCK, size // _MAX_BLOCKS)):
                stream.seek(place)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def digest_model_files(model: ModelTable) -> dict[str, str]:
    """Return {key: digest} of the files that [model] names, so that replaced weights make a step stale."""
    files = {}
    if model.init == "pretrained" and Path(model.path).is_dir():
        files["model.path"] = digest_weights(model.path)
    if Path(model.chat_template).is_file():
        files["model.chat_template"] = digest_file(Path(model.chat_template))
    return files


def digest_replay(table: SftTable) -> dict[str, str]:
    """Return {"sft.replay": digest} of the file that it names, {} without one. Raises UserError for a missing file."""
    if not table.replay:
        return {}
    return {"sft.replay": digest_file(Path(table.replay), "sft.replay")}


def digest_judge(table: JudgeTable, model: ModelTable) -> dict[str, str]:
    """Return {name: digest} of a judge that no step of the run made, {} for "sft".

    Raises UserError when judge.model is neither "sft", "base" nor a model folder.
    """
    if table.model in ("sft", "base"):
        return digest_model_files(model) if table.model == "base" else {}
    if not (Path(table.model) / "config.json").is_file():
        raise UserError(f'judge.model={table.model!r} is not "sft", not "base" and no model folder with a config.json')
    return {"judge model": digest_weights(table.model)}
