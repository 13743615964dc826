"""The shape of the tree, read from its syntax: packages, engine imports, names, budgets, forbidden calls.

The packages and their reasons are in docs/architecture.md. A new module goes into the package whose docstring says so.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "distributed" / "coalign"
LAUNCH = ROOT / "launch"

# Which packages each package may import, from the bottom up: a package names only packages above its own row, so there
# is no circle. All may import the ground floor, the files directly in coalign/, which import no package. Recipes in
# launch/ may import everything.
ALLOWED: dict[str, tuple[str, ...]] = {
    "runs": (),
    "wordings": (),
    "data": ("runs",),
    "models": ("runs",),
    "clusters": ("runs",),
    "judging": ("wordings",),
    "evaluation": ("runs", "wordings", "judging"),
    "planning": ("runs", "models"),
    "generation": ("models",),
    "training": ("runs", "data", "wordings", "models", "evaluation"),
    "experiment": ("runs", "evaluation"),
    "report": ("runs", "evaluation", "experiment"),
}
# The one module that imports each engine.
ENGINES = {
    "ray": "clusters/private_ray.py",
    "deepspeed": "training/deepspeed_engine.py",
    "vllm": "generation/vllm_worker.py",
    "datasets": "data/hugging_face.py",
    "peft": "models/lora.py",
    "safetensors": "models/loaded_weights.py",
}
HEAVY = {"torch", "transformers", "tokenizers", "accelerate", "matplotlib", "pandas", "scipy", "jax", *ENGINES}
# Only these load anything of HEAVY when they are imported; of models/, four modules answer without it.
HEAVY_PACKAGES = {"models", "generation", "training"}
LIGHT_MODULES = {"models/sizes.py", "models/shape.py", "models/known_shapes.py", "models/worker_memory.py"}
# Outside these packages nothing of HEAVY is imported within a function either, but here.
LAZY = {"recipe.py": "torch", "report/svg.py": "matplotlib", "report/experiment_table.py": "matplotlib"}
MAX_FILES = 20  # in a folder of the package
MEANINGLESS_STEMS = {"utils", "util", "common", "helpers", "helper", "base", "misc", "core", "tools"}

# (what we aim at, what fails)
FILE_LINES = (300, 500)
FUNCTION_LINES = (50, 80)
PARAMETERS = (6, 8)
RECIPE_LINES = (80, 120)


def place_of(path: Path) -> str:
    """Return a module as its path within the package: runs/digests.py."""
    return path.relative_to(PACKAGE).as_posix()


modules = sorted(PACKAGE.glob("**/*.py"))
folders = sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
recipes = sorted(LAUNCH.glob("*.py"))
sources = [*modules, *recipes]
each_module = pytest.mark.parametrize("path", modules, ids=lambda path: place_of(path))
each_source = pytest.mark.parametrize("path", sources, ids=lambda path: f"{path.parent.name}/{path.name}")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_in(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of every import among nodes; of `from a import b` it is a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the whole name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "coalign":
            yield f"coalign.{node.attr}", node.lineno


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of every import in a file, wherever it stands."""
    yield from imports_in(ast.walk(tree_of(path)))


def at_once(body: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Yield the statements that run when a file is imported: also those within if, try, with and class."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        for name in ("body", "orelse", "finalbody"):
            yield from at_once(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from at_once(handler.body)


def own_modules(names: Iterable[tuple[str, int]]) -> dict[Path, int]:
    """Return {module of ours: line} for dotted names, whose last parts may be something in a module or a package."""
    found: dict[Path, int] = {}
    for name, line in names:
        top, *parts = name.split(".")
        if top != "coalign":
            continue
        for depth in range(len(parts), 0, -1):
            place = PACKAGE.joinpath(*parts[:depth])
            existing = [path for path in (place.with_name(f"{place.name}.py"), place / "__init__.py") if path.is_file()]
            if existing:
                found[existing[0]] = line
                break
    return found


def package_of(path: Path) -> str:
    """Return the package that a module is in, "" for the ground floor."""
    return "" if path.parent == PACKAGE else path.relative_to(PACKAGE).parts[0]


def test_the_table_names_every_package_from_the_bottom_up() -> None:
    assert {package_of(path) for path in modules} - {""} == {folder.name for folder in folders} == set(ALLOWED)
    nested = [place_of(path) for path in modules if len(path.relative_to(PACKAGE).parts) > 2]
    assert not nested, "a package has no folders of modules inside"
    rows = list(ALLOWED)
    for package, below in ALLOWED.items():
        assert all(rows.index(other) < rows.index(package) for other in below), f"{package} names a row below its own"


@each_module
def test_module_imports_only_what_its_package_may(path: Path) -> None:
    own = package_of(path)
    may = {"", own, *ALLOWED.get(own, ())}
    bad = [
        f"line {line}: {place_of(m)}" for m, line in own_modules(imports_of(path)).items() if package_of(m) not in may
    ]
    assert not bad, f"{place_of(path)} may not import {bad}; see ALLOWED in tests/test_architecture.py"


def test_imports_have_no_cycle() -> None:
    needs = {path: set(own_modules(imports_of(path))) for path in modules}
    done: set[Path] = set()
    while ready := {path for path, others in needs.items() if path not in done and others <= done}:
        done |= ready
    circle = sorted(place_of(path) for path in needs.keys() - done)
    assert not circle, f"these modules import each other in a circle: {circle}"


@pytest.mark.parametrize("folder", folders, ids=lambda folder: folder.name)
def test_package_is_described_and_of_a_size_to_survey(folder: Path) -> None:
    """`__init__.py` is one docstring of 5 to 15 lines, which names every module of the package, and imports nothing."""
    tree = tree_of(folder / "__init__.py")
    text = ast.get_docstring(tree) or ""
    assert len(tree.body) == 1 and text, f"{folder.name}/__init__.py is a docstring and nothing else"
    assert 5 <= len(text.splitlines()) <= 15, f"{folder.name}/__init__.py has {len(text.splitlines())} lines"
    files = [path for path in folder.iterdir() if path.suffix == ".py"]
    assert len(files) <= MAX_FILES
    missing = [path.stem for path in files if path.stem != "__init__" and not re.search(rf"\b{path.stem}\b", text)]
    assert not missing, f"{folder.name}/__init__.py does not say what is in {missing}"


@each_source
def test_engine_is_imported_through_its_own_module(path: Path) -> None:
    for name, line in imports_of(path):
        top = name.partition(".")[0]
        if top in ENGINES:
            allowed = path.is_relative_to(PACKAGE) and place_of(path) == ENGINES[top]
            assert allowed, f"{path.name}, line {line}: {top} is imported in coalign/{ENGINES[top]} only"


@functools.cache
def loaded_with(path: Path) -> frozenset[str]:
    """Return every name that importing a file imports at once, through our own modules too."""
    names = {name for name, _ in imports_in(at_once(tree_of(path).body))}
    below = own_modules((name, 0) for name in names)
    return frozenset(names).union(*(loaded_with(module) for module in below if module != path))


def heavy_in(names: Iterable[str]) -> set[str]:
    """Return which of HEAVY is among dotted names."""
    return {name.partition(".")[0] for name in names} & HEAVY


@each_module
def test_module_outside_the_engines_loads_nothing_heavy(path: Path) -> None:
    """Pure text and numbers answer at once, on a machine without any engine."""
    place = place_of(path)
    if package_of(path) in HEAVY_PACKAGES and place not in LIGHT_MODULES:
        return
    heavy = heavy_in(loaded_with(path))
    assert heavy <= {"datasets"} and (not heavy or package_of(path) == "data"), f"importing {place} imports {heavy}"
    doors = {engine for engine, door in ENGINES.items() if door == place}
    anywhere = heavy_in(name for name, _ in imports_of(path)) - doors - {LAZY.get(place, "")}
    assert not anywhere, f"{place} imports {anywhere}; only models/, generation/ and training/ may"


@pytest.mark.parametrize("path", recipes, ids=lambda path: path.stem)
def test_recipe_imports_nothing_heavy_at_the_top(path: Path) -> None:
    """--help and every config error answer before torch is imported."""
    heavy = {name for name in loaded_with(path) if name.partition(".")[0] in HEAVY}
    assert not heavy, f"{path.name}: importing it imports {sorted(heavy)}; import what needs them inside main"


@each_module
def test_root_config_stays_in_the_recipes(path: Path) -> None:
    """Planning alone takes the whole of it: a plan is about every step of a run, so nearly every table decides it."""
    if place_of(path) in ("config.py", "config_values.py", "commandline.py", "runs/open_step.py"):
        return
    if package_of(path) == "planning":
        return
    whole = {"coalign.config", "coalign.config.Config", "coalign.config.*"}
    taken = [f"line {line}: {name}" for name, line in imports_of(path) if name in whole]
    assert not taken, f"{place_of(path)} takes the root Config ({taken}); take the values or the table that you need"


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


# What is above an aim, and why it stays so; everything else is at or below it.
ABOVE_THE_AIM = {
    "config.py: lines": "the tables of the steps, one after another, and the whole that they make",
    "generation/decoding.py: decode, parameters": "independent of one another, passed in order by its callers",
    "generation/decoding.py: __init__, parameters": "what decode was given, with the cache and the step that it chose",
    "models/model_folder.py: export_model, parameters": "what goes into a folder, from two callers",
    "models/fused_head.py: forward, parameters": "autograd.Function takes its tensors one by one",
    "training/deepspeed_engine.py: lines": "the one door to DeepSpeed: what its checkpoints may hold is said here too",
    "training/losses.py: ranking_loss, parameters": "one tensor for each symbol of the equation",
    "launch/eval.py: lines": "it asks several models and a judge, whose workers only a recipe may start",
    "launch/align.py: main, lines": "one story of a step, with a dozen imports that wait until --help has answered",
    "launch/sft.py: main, lines": "one story of a step, with a dozen imports that wait until --help has answered",
}


def test_budgets() -> None:
    sizes = [size for path in sources for size in sizes_of(path)]
    above_limit = [f"{what} {size} (limit {limit})" for what, size, (_, limit) in sizes if size > limit]
    assert not above_limit
    above_aim = {
        what.removeprefix("distributed/coalign/"): f"{size} (aim {aim})" for what, size, (aim, _) in sizes if size > aim
    }
    unexplained = {what: size for what, size in above_aim.items() if what not in ABOVE_THE_AIM}
    assert not unexplained, "bring it to the aim, or write the reason into ABOVE_THE_AIM"
    assert not ABOVE_THE_AIM.keys() - above_aim.keys(), "these are at the aim now; take them out of ABOVE_THE_AIM"


def is_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


@each_source
def test_imports_are_statements(path: Path) -> None:
    """The rules above read statements; an import by a call would pass them unseen."""
    hidden = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and re.fullmatch(r"__import__|exec|eval|(importlib\.)?import_module", ast.unparse(node.func))
    ]
    assert not hidden, f"{path.name}, lines {hidden}: write an import statement"


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
        if called == "torch.load" and path.stem != "deepspeed_engine":
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


# The rules read one form of import after another; each must be seen, wherever it stands.
@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("from coalign.training import loop", "training/loop.py"),
        ("from coalign.training import loop as other", "training/loop.py"),
        ("from coalign.training.loop import train", "training/loop.py"),
        ("from coalign.training.loop import *", "training/loop.py"),
        ("import coalign.training.loop", "training/loop.py"),
        ("import coalign.training.loop as other", "training/loop.py"),
        ("from coalign import training", "training/__init__.py"),
        ("from coalign.training import *", "training/__init__.py"),
        ("import coalign.training", "training/__init__.py"),
        ("import coalign\ncoalign.training.loop.train()", "training/__init__.py"),
        ("def f():\n    from coalign.training import loop", "training/loop.py"),
        ("if TYPE_CHECKING:\n    from coalign.training import loop", "training/loop.py"),
        ("from coalign import config", "config.py"),
        ("from coalign.config import Config", "config.py"),
    ],
)
def test_every_form_of_import_is_seen(text: str, module: str) -> None:
    found = own_modules(imports_in(ast.walk(ast.parse(text))))
    assert [place_of(path) for path in found] == [module]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("import torch", True),
        ("try:\n    import torch\nexcept ImportError:\n    pass", True),
        ("try:\n    pass\nexcept ImportError:\n    import torch", True),
        ("if True:\n    pass\nelse:\n    import torch", True),
        ("with suppress(ImportError):\n    import torch", True),
        ("class A:\n    import torch.nn", True),
        ("def f():\n    import torch", False),
    ],
)
def test_what_runs_on_import_is_seen(text: str, seen: bool) -> None:
    assert heavy_in(name for name, _ in imports_in(at_once(ast.parse(text).body))) == ({"torch"} if seen else set())
