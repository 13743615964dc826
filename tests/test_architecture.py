"""The shape of the tree, read from its syntax: layers, engine imports, names, budgets, forbidden calls.

The rules and their reasons are in docs/design.md; a new module needs a row here and a line there.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "distributed" / "coalign"
LAUNCH = ROOT / "launch"

# From the top: a module imports only from rows below its own. Recipes stand above all of them.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("development", "ahead", "exporting"),
    ("training", "engine", "pool", "ranks", "ray_node"),
    ("rank_host",),
    ("postmortem",),
    ("items", "cluster", "workers", "layouts"),
    ("generation", "vllm", "objectives", "tokens", "forking", "private_cluster"),
    ("likelihoods",),
    ("batching", "decoding", "inventory"),
    ("fixed_steps",),
    ("stepping",),
    ("encoding", "logprobs", "models", "random_model", "slots", "losses", "data", "splits"),
    ("training_log", "meeting", "drawing"),
    ("cascade", "fused_head"),
    ("attention",),
    ("comparison",),
    ("page",),
    ("figures", "inputs", "sizing", "card_results"),
    ("cards", "exhibits", "experiment", "report", "planning", "charts", "history"),
    ("summary",),
    ("result_rows",),
    ("cases", "baselines"),
    ("scoring", "machine", "placement", "allocation", "submission"),
    ("filtering", "judging", "ranking", "evaluation", "evaluated", "metrics", "arms", "workload", "generation_memory"),
    ("rewrites", "agreement"),
    ("prompts", "electing", "instances", "intervals", "calibration", "memory", "counting", "spool", "prefixes"),
    ("wording_files",),
    ("wordings",),
    ("run_folder", "commandline", "shapes", "sbatch_flags"),
    ("artifacts",),
    ("digests", "whole_files", "repeats"),
    ("config", "records", "process"),
    ("text", "errors", "tables", "padding", "watcher"),
)
ENGINES = {
    "ray": "private_cluster",
    "deepspeed": "engine",
    "vllm": "vllm",
    "datasets": "data",
    "peft": "models",
    "safetensors": "models",
}
# Pure text and numbers: these modules answer at once, on a machine without any engine.
PURE = {name for row in LAYERS[LAYERS.index(("comparison",)) :] for name in row}
HEAVY = {"torch", "transformers", "tokenizers", "accelerate", "matplotlib", *ENGINES}
LAZY = {"process", "charts", "exhibits"}  # torch, matplotlib: imported within the function that needs them
MEANINGLESS_STEMS = {"utils", "util", "common", "helpers", "helper", "base", "misc", "core", "tools"}

# (what we aim at, what fails)
FILE_LINES = (300, 500)
FUNCTION_LINES = (50, 80)
PARAMETERS = (6, 8)
RECIPE_LINES = (80, 120)

modules = sorted(PACKAGE.glob("**/*.py"))
recipes = sorted(LAUNCH.glob("*.py"))
sources = [*modules, *recipes]
each_module = pytest.mark.parametrize("path", modules, ids=lambda path: path.stem)
each_source = pytest.mark.parametrize("path", sources, ids=lambda path: f"{path.parent.name}/{path.name}")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of every import in a file, wherever it stands."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: relative import; write the whole name"
            if node.module == "coalign":
                yield from ((f"coalign.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module or "", node.lineno


def own_imports(path: Path) -> dict[str, int]:
    """Return {module of ours: line} that a file imports."""
    return {name.split(".")[1]: line for name, line in imports_of(path) if name.startswith("coalign.")}


@each_module
def test_module_has_a_layer(path: Path) -> None:
    known = {name for row in LAYERS for name in row}
    assert path.stem in {*known, "__init__"}, (
        f"{path.name} stands in no row of LAYERS; add it there and to docs/design.md"
    )


@each_module
def test_module_imports_only_from_rows_below(path: Path) -> None:
    row_of = {name: index for index, row in enumerate(LAYERS) for name in row}
    above = [
        f"line {line}: {name}"
        for name, line in own_imports(path).items()
        if path.stem in row_of and row_of.get(name, -1) <= row_of[path.stem]
    ]
    assert not above, f"{path.name} may not import {above}"


def test_imports_have_no_cycle() -> None:
    needs = {path.stem: set(own_imports(path)) for path in modules}
    done: set[str] = set()
    while ready := {name for name, others in needs.items() if name not in done and others & needs.keys() <= done}:
        done |= ready
    assert done == needs.keys(), f"these modules import each other in a circle: {sorted(needs.keys() - done)}"


@each_source
def test_engine_is_imported_through_its_own_module(path: Path) -> None:
    for name, line in imports_of(path):
        top = name.partition(".")[0]
        if top in ENGINES:
            allowed = path.parent == PACKAGE and path.stem == ENGINES[top]
            assert allowed, f"{path.name}, line {line}: {top} is imported in coalign/{ENGINES[top]}.py only"


@functools.cache
def loaded_with(path: Path) -> frozenset[str]:
    """Return every name that importing a file imports at once, through our own modules too."""
    names: set[str] = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            ours = node.module == "coalign"
            names |= {f"coalign.{alias.name}" for alias in node.names} if ours else {str(node.module)}
    below = [PACKAGE / f"{name.split('.')[1]}.py" for name in names if name.startswith("coalign.")]
    return frozenset(names).union(*(loaded_with(module) for module in below))


@pytest.mark.parametrize("path", [path for path in modules if path.stem in PURE], ids=lambda path: path.stem)
def test_pure_module_imports_nothing_heavy(path: Path) -> None:
    anywhere = {name for name, _ in imports_of(path)} if path.stem not in LAZY else set()
    heavy = {name for name in anywhere | loaded_with(path) if name.partition(".")[0] in HEAVY}
    assert not heavy


@pytest.mark.parametrize("path", recipes, ids=lambda path: path.stem)
def test_recipe_imports_nothing_heavy_at_the_top(path: Path) -> None:
    """--help and every config error answer before torch is imported."""
    heavy = {name for name in loaded_with(path) if name.partition(".")[0] in HEAVY}
    assert not heavy, f"{path.name}: importing it imports {sorted(heavy)}; import what needs them inside main"


@each_module
def test_root_config_stays_in_the_recipes(path: Path) -> None:
    if path.stem in ("config", "commandline"):
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "coalign.config":
            names = {alias.name for alias in node.names}
            assert "Config" not in names, f"{path.name}, line {node.lineno}: take the values or the table that you need"


def test_source_root_is_no_package() -> None:
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "distributed").glob("__init__.py*")]
    assert not found, "with an __init__.py, distributed/ would hide Dask's package of that name"


@each_source
def test_name_says_what_is_inside(path: Path) -> None:
    assert path.stem not in MEANINGLESS_STEMS, f"{path.name}: name the module after what it holds"


@pytest.mark.parametrize("path", recipes, ids=lambda path: path.stem)
def test_recipe_hides_no_other_module(path: Path) -> None:
    """A script's folder stands first on sys.path of every rank and worker."""
    taken = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    assert path.stem not in taken, f"{path.name} would hide the installed module {path.stem!r} on every rank"


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def sizes_of(path: Path) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """Yield (what, size, (aim, limit)) of everything in a file that has a budget."""
    where = path.relative_to(ROOT)
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    yield f"{where}: lines", num_lines, RECIPE_LINES if path.parent == LAUNCH else FILE_LINES
    for function in functions_of(path):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        yield f"{where}: {function.name}, lines", length, FUNCTION_LINES
        yield f"{where}: {function.name}, parameters", num_parameters(function), PARAMETERS


def test_budgets() -> None:
    sizes = [size for path in sources for size in sizes_of(path)]
    above_aim = [f"{what} {size} (aim {aim})" for what, size, (aim, _) in sizes if size > aim]
    if above_aim:
        warnings.warn("above the aim:\n  " + "\n  ".join(above_aim), stacklevel=1)
    above_limit = [f"{what} {size} (limit {limit})" for what, size, (_, limit) in sizes if size > limit]
    assert not above_limit


def is_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


@each_source
def test_nothing_runs_code_from_a_file(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        where = f"{path.name}, line {node.lineno}"
        remote = [k for k in node.keywords if k.arg == "trust_remote_code"]
        assert all(isinstance(k.value, ast.Constant) and k.value.value is False for k in remote), (
            f"{where}: remote code"
        )
        called = ast.unparse(node.func)
        assert not re.fullmatch(r"(\w*pickle|dill|joblib)\.(load|loads|Unpickler)", called), f"{where}: {called}"
        if called == "torch.load" and path.stem != "engine":
            assert is_true(node, "weights_only"), f"{where}: torch.load without weights_only=True"


@each_source
def test_no_bare_except(path: Path) -> None:
    bare = [n.lineno for n in ast.walk(tree_of(path)) if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert not bare


def text_files() -> list[Path]:
    folders = ("distributed", "launch", "configs", "docs", "examples", "slurm", "tests", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.suffix in (".md", ".toml", ".txt", "")]
    skipped = ("__pycache__", ".egg-info", ".git")
    return [path for path in files if not any(part.endswith(skipped) for part in path.relative_to(ROOT).parts)]


def test_no_path_of_one_machine() -> None:
    machine = re.compile(r"(?<![\w.*~}])/(?:root|home|Users|mnt|work)/\w")
    found = []
    for path in text_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}, line {i}" for i, line in enumerate(lines, 1) if machine.search(line)]
    assert not found
