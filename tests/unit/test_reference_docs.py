"""The generated pages of the documentation: as the code has them, with a docstring for every field."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from coalign.evaluation.metrics_schema import Metrics
from coalign.experiment.ladder_result import LadderResult

DOCS = Path(__file__).resolve().parents[2] / "docs"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_reference", DOCS / "write_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()


@pytest.mark.parametrize("name", generator.PAGES)
def test_page_is_what_the_code_gives(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == generator.PAGES[name](), "run `make docs`"


@pytest.mark.parametrize("kind", [Metrics, LadderResult])
def test_every_field_has_a_docstring(kind: type) -> None:
    for one in generator.classes_of(kind):
        documented = generator.field_docs(one)
        missing = [name for name in one.__dataclass_fields__ if not documented.get(name, "").endswith(".")]
        assert not missing, f"{one.__name__} has fields without a sentence below them: {missing}"


def test_types_are_words() -> None:
    words = generator.type_words
    assert words(float | None, set()) == "number, or null"
    assert words(dict[str, int], set()) == "by name: whole number"
    assert words(tuple[Metrics, ...], {"Metrics"}) == "list of [Metrics](#metrics)"
