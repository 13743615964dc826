"""The documentation as text: links, anchors and named paths exist, the README stays short, every page is in the nav.

Anchors are those of GitHub; `mkdocs build --strict` checks its own. Opens nothing on the network.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest

import coalign

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README_LINES = 150

pages = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / "examples").glob("**/*.md")),
]
each_page = pytest.mark.parametrize("path", pages, ids=lambda path: path.relative_to(ROOT).as_posix())

_CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.I)
_PATH = re.compile(r"(?<![\w./~$-])(?:configs|launch|docs|examples|slurm|tests)/[\w./*<>{}-]*")
_PLACEHOLDER = re.compile(r"[*<>{}]|(?:^|[/_.-])[A-Z]{2,}(?=$|[/_.-])")  # configs/*.toml, launch/STEP.py, FOLDER/NAME
_NOT_PLACEHOLDERS = ("README", "CONTRIBUTING", "CHANGELOG", "LICENSE")


def split_page(text: str) -> tuple[str, str]:
    """Return a page's prose, with its line breaks, and its code: fenced and indented blocks."""
    prose, code, fence, before = [], [], "", ""
    for line in text.splitlines():
        opened = re.match(r"\s*(`{3,}|~{3,})", line)
        if fence:
            code.append(line)
            fence = "" if line.strip() == fence else fence
        elif opened:
            fence = opened[1]
        elif line.startswith("    ") and not before.strip() and not re.match(r"\s*([-*+]|\d+\.)\s", line):
            code.append(line)
            continue  # the next line of the block follows a blank one too
        else:
            prose.append(line)
        before = line
    return "\n".join(prose), "\n".join(code)


def anchor_of(heading: str) -> str:
    """Return the anchor of a heading's text: lower case, punctuation gone, blanks to hyphens."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().rstrip("#").strip())
    return re.sub(r"[^\w\- ]", "", text.replace("`", "").replace("*", "").lower()).replace(" ", "-")


@functools.cache
def anchors_of(path: Path) -> frozenset[str]:
    """Return the anchors of a page's headings; a heading that comes again gets a number."""
    prose, _ = split_page(path.read_text(encoding="utf-8"))
    found = Counter[str]()
    anchors = set(re.findall(r'<a (?:id|name)="([^"]+)"', prose))
    for heading in re.findall(r"^#{1,6}\s+(.+)$", prose, re.M):
        anchor = anchor_of(heading)
        anchors.add(f"{anchor}-{found[anchor]}" if found[anchor] else anchor)
        found[anchor] += 1
    return frozenset(anchors)


def links_of(path: Path) -> list[str]:
    """Return the targets of a page's links that are not on the network."""
    prose, _ = split_page(path.read_text(encoding="utf-8"))
    return [link for link in _LINK.findall(_CODE.sub("", prose)) if not _SCHEME.match(link)]


def paths_in_code(text: str) -> list[str]:
    """Return the repository's paths that a page names in code, placeholders left out."""
    prose, block = split_page(text)
    code = [block, *(inline for _, inline in _CODE.findall(prose))]
    named = [path.rstrip(".-") for part in code for path in _PATH.findall(part)]
    return [path for path in named if not is_placeholder(path)]


def is_placeholder(path: str) -> bool:
    """Return whether a path stands for several: launch/STEP.py, configs/*.toml."""
    return bool(_PLACEHOLDER.search(path)) and Path(path).stem not in _NOT_PLACEHOLDERS


@each_page
def test_links_lead_somewhere(path: Path) -> None:
    lost = []
    for link in links_of(path):
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            lost.append(link)
        elif anchor and (target.suffix != ".md" or anchor not in anchors_of(target)):
            lost.append(f"{link}: no such heading")
    assert not lost


@each_page
def test_pages_of_the_site_link_within_it(path: Path) -> None:
    if path.parent != DOCS:
        return
    outside = [link for link in links_of(path) if "/" in link.partition("#")[0]]
    assert not outside, "name files outside docs/ as code"


@each_page
def test_paths_named_in_code_exist(path: Path) -> None:
    if path.name == "CHANGELOG.md":  # history names what is gone
        return
    lost = [name for name in paths_in_code(path.read_text(encoding="utf-8")) if not (ROOT / name).exists()]
    assert not lost


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_every_page_is_in_the_nav() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"[\w-]+\.md", nav)
    assert sorted(named) == sorted(page.name for page in DOCS.glob("**/*.md"))


def test_what_the_checks_read() -> None:
    prose = "see `configs/a.toml`, [b](c.md#d) and `[x](no.md)`"
    text = f"{prose}\n\n    launch/STEP.py docs/e.md.\n\n```\nslurm/*.sh tests/f\n```\n"
    assert paths_in_code(text) == ["docs/e.md", "tests/f", "configs/a.toml"]
    assert anchor_of("Rows, `and` more (2026-11-26)") == "rows-and-more-2026-11-26"
    assert _LINK.findall(_CODE.sub("", split_page(text)[0])) == ["c.md#d"]


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == coalign.__version__
