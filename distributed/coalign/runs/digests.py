"""SHA-256 of what a step reads and writes: files, values, model folders, the files that settings name.

Used by artifacts and every module that says what something was made from. Knows no step.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from coalign.config import JudgeTable, ModelTable, SftTable
from coalign.errors import UserError

CARD = "README.md"  # of a model folder: words about the model, which change without changing it
_BLOCK, _MAX_BLOCKS = 1 << 16, 256  # bytes, blocks a file that a quick digest reads


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_outputs(folder: Path) -> dict[str, str]:
    """Return the digests of the rows that a step has written, by file; a log of metrics is no output."""
    paths = sorted(folder.glob("*.jsonl"))
    return {path.name: digest_file(path) for path in paths if not path.name.startswith((".", "metrics"))}


def digest_value(value: Any) -> str:
    """Return the SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_folder(folder: Path) -> str:
    """Return one SHA-256 over the names and contents of the files directly in a model folder, but for its card."""
    return digest_value({path.name: digest_file(path) for path in _model_files(folder)})


def _model_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (CARD, f".{CARD}.tmp"))


def digest_weights(folder: str) -> str:
    """Return a digest of a model folder that is quick for large files: their size and blocks spread over them.

    The name of a model on the hub stands for itself.
    """
    if not Path(folder).is_dir():
        return folder
    digest = hashlib.sha256()
    for path in _model_files(Path(folder)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as stream:
            for place in range(0, size, max(_BLOCK, size // _MAX_BLOCKS)):
                stream.seek(place)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def digest_model_files(model: ModelTable) -> dict[str, str]:
    """Return digests of the files that [model] names: weights put in their place later make a step stale."""
    files = {}
    if model.init == "pretrained" and Path(model.path).is_dir():
        files["model.path"] = digest_weights(model.path)
    if Path(model.chat_template).is_file():
        files["model.chat_template"] = digest_file(Path(model.chat_template))
    return files


def digest_replay(table: SftTable) -> dict[str, str]:
    """Return the digest of the file that sft.replay names; UserError when it is not there."""
    if not table.replay:
        return {}
    if not Path(table.replay).is_file():
        raise UserError(f"sft.replay={table.replay!r}: no such file")
    return {"sft.replay": digest_file(Path(table.replay))}


def digest_judge(table: JudgeTable, model: ModelTable) -> dict[str, str]:
    """Return the digest of a judge that comes from no step of the run; UserError when it is no folder."""
    if table.model in ("sft", "base"):
        return digest_model_files(model) if table.model == "base" else {}
    if not (Path(table.model) / "config.json").is_file():
        raise UserError(f'judge.model={table.model!r} is not "sft", not "base" and no model folder with a config.json')
    return {"judge model": digest_weights(table.model)}
