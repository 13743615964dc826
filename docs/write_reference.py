"""Write the reference pages of the documentation from the code: python docs/write_reference.py

A page is a function that returns its text; PAGES maps file names to these functions. `make docs` runs this script, and
tests/unit/test_reference_docs.py compares its output with the pages in docs/.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

DOCS = Path(__file__).resolve().parent
MARK = "<!-- Written by docs/write_reference.py from docstrings in the code; run `make docs` after a change there. -->"

_INTRODUCTION = """\
What the steps of a run leave on disk, field by field. The tables are generated from the docstrings of the classes that
write and read these files.

Files ending in `.json` hold one JSON object, files ending in `.jsonl` one JSON object per line; both are UTF-8. A
share is a number from 0 to 1. `null` stands for a value that is not known or not defined. A type "by name: X" is a JSON
object whose keys are names and whose values are X.
"""
_METRICS = """\
`eval/metrics.json` holds everything that eval reports. `coalign.evaluation.metrics_file` is the one place that writes
and reads it: `read_metrics(folder)` returns a `Metrics`, whose attributes are the fields below.

`version`, the first key, is the version of this form, now {version}. A file without a version was written before
version 1 and is read as version 0. Fields marked *optional* may be missing in an older file. A file with a newer
version is refused with a message that names both versions; upgrade coalign to read it.
"""
_LADDER = """\
`ladder/metrics.json` in the folder of an experiment (`launch/ladder.sh`) holds its result over all arms and seeds. Its
first key is `version`, now {version}. `coalign.experiment.ladder_result` writes it.
"""
_RECORDS = """\
The steps hand these records to each other, one per line. `coalign.records` declares them.
"""
# (file, what it holds), of files whose rows have no class of their own
_OTHER_FILES = (
    (
        "STEP/manifest.json",
        "Settings, digests of inputs and outputs, counts, time; written last, so its step is complete.",
    ),
    ("STEP/config.json", "Settings and digests of the inputs of a step that has begun."),
    ("STEP/dropped.jsonl", "What the step left out: `reason`, and what it was."),
    ("sft/metrics.jsonl, align/metrics.jsonl", "A line per update and per measurement on dev inputs."),
    ("sft/model, align/model", "The trained model as a Hugging Face folder, with its model card."),
    ("eval/answers.jsonl", "Every answer: `model` and the fields of a Response."),
    (
        "eval/scores.jsonl",
        "A row per input: `task`, `seen`, `example`, its `wordings`, and in `models` by name `cr`, `corrected_cr` and"
        " `mcr` (null outside CR), `rouge_l`, and `right`: 1 or 0 per wording. Intervals can be made again from it.",
    ),
    ("eval/report.html", "The report as one page; `python launch/report.py RUN` writes it anew."),
    ("ladder/table.md, ladder/figure.svg, ladder/figure.png", "The result of an experiment for people."),
)


def results_format() -> str:
    """Return docs/results-format.md."""
    from coalign.evaluation import metrics_file
    from coalign.evaluation.metrics_schema import Metrics
    from coalign.experiment import ladder_result
    from coalign.runs.open_step import FILES

    eval_classes = list(classes_of(Metrics))
    ladder_classes = [one for one in classes_of(ladder_result.LadderResult) if one not in eval_classes]
    record_classes: list[type] = []
    for kind in FILES:
        record_classes += [one for one in classes_of(kind) if one not in record_classes]
    where = {kind: f"{step}/{name}" for kind, (step, name) in FILES.items()}
    known = {kind.__name__ for kind in (*eval_classes, *ladder_classes, *record_classes)}
    parts = [MARK, "# Results format", _INTRODUCTION.strip(), "## metrics.json of eval"]
    parts.append(_METRICS.format(version=metrics_file.VERSION).strip())
    parts += [class_section(kind, known) for kind in eval_classes]
    parts += ["## metrics.json of a ladder", _LADDER.format(version=ladder_result.VERSION).strip()]
    parts += [class_section(kind, known) for kind in ladder_classes]
    parts += ["## Records", _RECORDS.strip()]
    parts += [class_section(kind, known, where.get(kind, "")) for kind in record_classes]
    parts += ["## Other files", table(("file", "what it holds"), [(f"`{name}`", text) for name, text in _OTHER_FILES])]
    return "\n\n".join(parts) + "\n"


_CONFIG = """\
A config is a TOML file. It holds what differs from the built-in defaults below; an unknown key is an error. Any key can
also be set on the command line, where it overrides the file: `sft.epochs=1`. A value is written as in TOML, and a text
needs no quotes: `run.name=demo`. `python launch/STEP.py --help` prints the keys of a step.

Relative paths are relative to the working directory. In every path `~` is the home folder, and `$NAME` is the value of an
environment variable. Counts are at most 2147483647, and other numbers at most 1e9, unless a key says otherwise.

A key marked * is neutral: it changes no result, so you may change it while a step is begun or complete. When another
key changes, the steps that read its table refuse to continue, and say what differs and what to do.
"""


def config_reference() -> str:
    """Return docs/config.md: every key with its type, built-in default and meaning."""
    from coalign.commandline import summary_of
    from coalign.config import Config
    from coalign.steps import STEP_TABLES

    parts = [MARK, "# Configuration", _CONFIG.strip()]
    for name, field in Config.model_fields.items():
        readers = [step for step, tables in STEP_TABLES.items() if name in tables]
        text = summary_of(field.annotation)
        said = {"run": "all steps", "log": "all steps", "slurm": "`slurm/pipeline.sh`"}
        where = said.get(name) or ", ".join(f"`{step}`" for step in readers)
        parts += [f"## [{name}]", f"{text[0].upper()}{text[1:]} Read by {where}.", *key_tables(field.annotation, name)]
    return "\n\n".join(parts) + "\n"


def key_tables(model: Any, prefix: str) -> Iterator[str]:
    """Yield the table of a TOML table's keys, then those of the tables inside it, each under a heading."""
    from coalign.commandline import summary_of, toml_value, type_name
    from coalign.tables import Table

    rows, inner = [], []
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Table):
            inner.append((f"{prefix}.{key}", field.annotation))
            continue
        neutral = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("neutral")
        default = "required" if field.is_required() else f"`{toml_value(field.get_default(call_default_factory=True))}`"
        rows.append((f"`{key}`{' *' if neutral else ''}", type_name(field), default, field.description or ""))
    yield table(("key", "type", "default", "meaning"), rows)
    for name, inside in inner:
        text = summary_of(inside)
        yield f"### [{name}]"
        yield f"{text[0].upper()}{text[1:]}"
        yield from key_tables(inside, name)
    if prefix == "data":
        from coalign.config import AnswerFormTable, SourceTable

        text = summary_of(AnswerFormTable)
        yield "### [data.answer_form.TASK]"
        yield f"{text[0].upper()}{text[1:]}"
        yield from key_tables(AnswerFormTable, "data.answer_form")
        yield "### [[data.sources]]"
        yield "One source of a mixture; repeat the table for each."
        yield from key_tables(SourceTable, "data.sources")


PAGES: dict[str, Callable[[], str]] = {"config.md": config_reference, "results-format.md": results_format}


def main() -> None:
    """Write every page."""
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def class_section(kind: type, known: set[str], file: str = "") -> str:
    """Return a heading, the docstring and a table of the fields of a dataclass; types among `known` are links."""
    documented = field_docs(kind)
    hints = get_type_hints(kind)
    rows: list[tuple[str, ...]] = []
    for field in dataclasses.fields(kind):
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        words = type_words(hints[field.name], known)
        name = f"`{field.name}`"
        if field.metadata.get("flat"):
            name, words = f"*(fields of {words})*", "directly in this object"
        rows.append((name, words, documented.get(field.name, ""), "optional" if optional else ""))
    head: tuple[str, ...] = ("field", "type", "meaning", "")
    if not any(row[2] for row in rows):  # the docstring of the class says it all
        head, rows = ("field", "type", ""), [(row[0], row[1], row[3]) for row in rows]
    if not any(row[-1] for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    text = textwrap.dedent(inspect.getdoc(kind) or "").strip()
    title = f"### {kind.__name__}" + (f": {file}" if file else "")
    return "\n\n".join([title, text, table(head, rows)])


def classes_of(kind: type) -> Iterator[type]:
    """Yield a dataclass and those that its fields hold, each once, in the order of the fields."""
    seen: dict[type, None] = {}

    def visit(one: Any) -> None:
        if isinstance(one, type) and dataclasses.is_dataclass(one):
            if one not in seen:
                seen[one] = None
                for hint in get_type_hints(one).values():
                    visit(hint)
        else:
            for inner in get_args(one):
                visit(inner)

    visit(kind)
    yield from seen


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass: the string literal below it, bases included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, str):
                found[field.target.id] = " ".join(text.split())
    return found


def type_words(hint: Any, known: set[str]) -> str:
    """Return a type as a reader of JSON calls it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return "any value"
    if isinstance(hint, types.UnionType) or (arguments and types.NoneType in arguments):
        inner = [type_words(one, known) for one in arguments if one is not types.NoneType]
        return f"{' or '.join(inner)}, or null"
    if origin is tuple:
        return f"list of {type_words(arguments[0], known)}"
    if origin is dict:
        return f"by name: {type_words(arguments[1], known)}"
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    name = {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(hint, hint.__name__)
    return f"[{name}](#{re.sub(r'[^a-z]', '', name.lower())})" if name in known else name


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent / "distributed"))
    main()
