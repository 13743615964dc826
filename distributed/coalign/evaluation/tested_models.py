"""Which models are evaluated: names, folders and hub names resolved, the judge of agreement checked.

Knows folders and manifests, no answers.
"""

from __future__ import annotations

from pathlib import Path

from coalign.config import ModelTable, table_for_other_model
from coalign.errors import UserError
from coalign.files import read_json
from coalign.runs.digests import digest_folder
from coalign.runs.manifest import MANIFEST
from coalign.runs.outputs import MODEL, step_model
from coalign.runs.run_folder import base_model_folder
from coalign.runs.step_folder import read_manifest
from coalign.steps import TRAINING_STEPS

NAMED_MODELS = ("base", *TRAINING_STEPS)  # what eval.models can name beside folders and the hub


def resolve_model(value: str, steps: dict[str, Path], base: str) -> str:
    """Return the model folder (or hub name) that a value of eval.models stands for.

    `base`, a step of this run, `FOLDER/STEP`, a model folder, or the name of a model on the hub. Raises UserError.
    """
    if value == "base":
        return base
    if value in steps:
        return step_model(steps[value])
    folder = Path(value)
    if (folder / "model" / "config.json").is_file():
        if (folder / "config.json").is_file() and read_manifest(folder) is None:
            raise UserError(f"eval.models: the step in {value} is not complete; run it to its end first")
        return step_model(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file() or _is_step(folder):
            raise UserError(
                f"eval.models: {value} holds no model (no config.json of one); name a model folder, a training step's"
                f" folder such as {folder / 'align'}, or one of {', '.join(NAMED_MODELS)}"
            )
        return step_model(folder.parent) if folder.name == MODEL else value
    if value.count("/") == 1 and not value.startswith((".", "/", "~")) and not value.endswith("/"):
        return value
    raise UserError(
        f"eval.models: {value!r} is neither one of {', '.join(NAMED_MODELS)} nor a folder that exists; check the path"
    )


def find_models(model: ModelTable, models: dict[str, str], trained: dict[str, Path], prepare: Path) -> dict[str, str]:
    """Return the model folder or hub name of every name in eval.models; `trained` are the run's training steps."""
    base = base_model_folder(model, prepare) if "base" in models.values() else ""
    return {name: resolve_model(value, trained, base) for name, value in models.items()}


def model_table(value: str, model: ModelTable) -> ModelTable:
    """Return the [model] to use for a value of eval.models: the run's own, that of a trained step, or a foreign one's.

    A training step of another run (an arm) keeps the context and the tokens that it was trained with; its chat
    template is beside its weights.
    """
    if value in NAMED_MODELS:
        return model
    manifest = read_manifest(Path(value))
    kept = ("too_long", "max_tokens", "end_of_turn", "pad_token", "attention")
    settings = manifest["config"] if manifest else {}
    if not all(f"model.{key}" in settings for key in kept):
        return table_for_other_model(model)
    own = {key: settings[f"model.{key}"] for key in kept}
    later = {key: settings[f"model.{key}"] for key in ("thinking", "thought_tokens") if f"model.{key}" in settings}
    return table_for_other_model(model).model_copy(update=own | later)


def _is_step(folder: Path) -> bool:
    if (folder / MANIFEST).exists():
        return True
    try:
        config = read_json(folder / "config.json")
    except UserError:
        return False
    return isinstance(config, dict) and set(config) == {"config", "inputs"}


def digest_model(folder: str) -> str:
    """Return the digest of a model folder; a model on the hub has its name as digest."""
    return digest_folder(Path(folder)) if Path(folder).is_dir() else folder


def check_models(folders: dict[str, str], own: set[str], judge: str) -> tuple[str, dict[str, str]]:
    """Return the judge's model folder ("" without one) and the digests of the models that no step of ours digests.

    `own` are the names of models that come from steps of the run. Raises UserError, see `resolve_judge`.
    """
    digests = {f"model {name}": digest_model(folder) for name, folder in folders.items() if name not in own}
    if judge:
        judge = resolve_judge(judge, {name: digest_model(folder) for name, folder in folders.items()})
        digests["judge of agreement"] = digest_model(judge)
    return judge, digests


def resolve_judge(folder: str, digests: dict[str, str]) -> str:
    """Return the folder of the model that decides on agreement.

    Raises UserError when there is none or when it is one of the models under test (same digest).
    """
    path = Path(folder)
    inner = path / "model"
    chosen = inner if (inner / "config.json").is_file() else path
    if not (chosen / "config.json").is_file():
        raise UserError(
            f"eval.agreement={folder!r} is neither exact, rouge_l>=X (such as rouge_l>=0.7) nor a model folder"
        )
    digest = digest_folder(chosen)
    same = [name for name, other in digests.items() if other == digest]
    if same:
        raise UserError(
            f"eval.agreement={folder!r} is the same model as {same[0]!r} under test; a model can't judge its own"
            " agreement, use another one or exact"
        )
    return str(chosen)
