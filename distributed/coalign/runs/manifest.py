"""What a step's manifest must hold to be believed. step_folder writes and reads it.

Knows no step. Manifests of older versions have no seal; of them the form alone is checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coalign.errors import UserError
from coalign.files import read_json
from coalign.runs.digests import digest_value

MANIFEST = "manifest.json"
SEAL = "seal"
_REQUIRED: dict[str, Any] = {"config": dict, "inputs": dict, "outputs": dict, "counts": dict, "digest": str}
_OPTIONAL: dict[str, Any] = {"lineage": dict, "versions": dict, "stamps": dict, "date": str, "finished": str}
_OPTIONAL |= {"wall_seconds": (int, float), SEAL: str}
_OF_TEXTS = ("inputs", "outputs", "lineage", "versions")


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with the digest of all that it holds."""
    return {**manifest, SEAL: _seal_of(manifest)}


def _seal_of(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return digest_value(json.loads(json.dumps(rest)))  # as it is read again: keys are texts


def read_checked(path: Path, step: str) -> dict[str, Any]:
    """Return the manifest in a file. Raises UserError, which names the step to run again, when it is damaged."""
    try:
        content = read_json(path)
    except UserError as error:
        raise UserError(f"{_damaged(path, step)}: {error}") from error
    complaint = _complaint_of(content)
    if complaint:
        raise UserError(f"{_damaged(path, step)}: {complaint}")
    manifest: dict[str, Any] = content
    return manifest


def _damaged(path: Path, step: str) -> str:
    return f"{path} is damaged; remove {path.parent} and run {step} again"


def _complaint_of(content: Any) -> str:
    """Return what is wrong with the content of a manifest, "" for a whole one."""
    if not isinstance(content, dict):
        return f"an object was expected, not {type(content).__name__}"
    for key, kind in {**_REQUIRED, **_OPTIONAL}.items():
        if key in content and (not isinstance(content[key], kind) or isinstance(content[key], bool)):
            return f"{key!r} has the wrong type"
        if key in _REQUIRED and key not in content:
            return f"{key!r} is missing"
    for key in _OF_TEXTS:
        if not all(isinstance(value, str) for value in content.get(key, {}).values()):
            return f"{key!r} holds something that is no text"
    if SEAL in content and content[SEAL] != _seal_of(content):
        return "it was changed after the step wrote it"
    return ""
