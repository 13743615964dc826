"""Strategies of values that people and accidents put into files: JSON values, texts, damaged bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

DEEP, HUGE, FAR = "\ue000deep", "\ue000huge", "\ue000far"  # what json.dumps can't write; `to_json` puts it in
PLACEHOLDERS = {DEEP: "[" * 50_000 + "]" * 50_000, HUGE: "9" * 5000, FAR: "1e999"}
SCRIPTS = (
    *("café", "Grüße", "Straße", "привет", "Ελλάδα", "שלום", "مرحبا بكم", "नमस्ते", "สวัสดีครับ", "ສະບາຍດີ", "ជំរាបសួរ"),
    *(
        "你好世界",
        "こんにちは",
        "カタカナ",
        "안녕하세요",
        "ⵣⴰⵣⴰ",
        "𓀀𓀁",
        "👩‍👩‍👧",
        "🇩🇪",
        "e\u0301",
        "\u202eabc",
        "ﬁ",
        "Ａ１",
        "٣٤",
        "²",
    ),
)
MARKS = (
    *("\x00", "\x1b]0;x\x07", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u2029", "\r", "\r\n", "\t", "\ufeff", "\u00a0"),
    *("\u200b", "\u200d", "\ufffe", "\uffff", "\U0010ffff", "\ud800", "\udfff", "{", "}", "{{ x }}", "{options_}", "|"),
    *("<|im_end|>", "<s>", "</s>", "<think>", "</think>", "<b>", "&amp;", "%s", "`", "$(x)", "\\", '"', "'", ",", ";"),
)
PLAIN = ("a", "yes", "no", "42", "-1", "red green", "Name the colour.", "x y z", "<42", ">42", "5!", "3.14", "1,000")
texts = st.one_of(
    st.sampled_from(PLAIN),
    st.sampled_from(SCRIPTS),
    st.sampled_from(MARKS),
    st.sampled_from(("", " ", "\n", "null", "NaN")),
    st.lists(st.sampled_from((*PLAIN, *SCRIPTS, *MARKS, " ", "\n")), max_size=6).map("".join),
    st.text(max_size=12),
    st.sampled_from(("word " * 3000, "x" * 20_000, "\n" * 500)),
)
good_texts = st.one_of(st.sampled_from(PLAIN), st.sampled_from(SCRIPTS))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324)),
    st.sampled_from((HUGE, FAR, float("nan"), float("inf"))),
    texts,
)
values: st.SearchStrategy[Any] = st.one_of(
    scalars,
    st.just(DEEP),
    st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.one_of(texts, st.sampled_from("ab")), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)


def to_json(value: Any, *, ascii_only: bool = True) -> str:
    """Return a value as JSON text, placeholders replaced."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    for placeholder, content in PLACEHOLDERS.items():
        text = text.replace(json.dumps(placeholder, ensure_ascii=ascii_only), content)
    return text


def to_bytes(text: str) -> bytes:
    """Return a text in UTF-8; half a surrogate pair becomes its three bytes, which are not UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a JSON value, the whole one first."""
    found = [prefix]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*prefix, key))
    return found


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """Draw a JSON value in which one place is replaced, removed, renamed, retyped or doubled."""
    value = copy.deepcopy(value)
    *path, last = (None, *draw(st.sampled_from(places(value))))
    if last is None:
        return draw(values)
    holder = value
    for key in path[1:]:
        holder = holder[key]
    change = draw(st.sampled_from(("replace", "replace", "remove", "rename", "add", "wrap", "text")))
    if change == "remove":
        del holder[last]
    elif change == "rename" and isinstance(holder, dict):
        holder[draw(texts)] = holder.pop(last)
    elif change == "add":
        new = draw(values)
        holder.append(new) if isinstance(holder, list) else holder.__setitem__(draw(texts), new)
    elif change == "wrap":
        holder[last] = [holder[last]]
    elif change == "text":
        holder[last] = json.dumps(holder[last])
    else:
        holder[last] = draw(values)
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw the content of a file after an accident: cut, a byte flipped, bytes put in or taken out, or nothing left."""
    place = draw(st.integers(0, max(0, len(content) - 1)))
    change = draw(st.sampled_from(("cut", "flip", "insert", "remove", "empty", "twice", "front")))
    if change == "cut":
        return content[:place]
    if change == "flip" and content:
        return content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
    if change == "insert":
        inserted = draw(
            st.sampled_from((b"\x00", b"\xff", b"\n", b'"', b"}", b"[", b"\\", b"\xef\xbb\xbf", b"0" * 5000))
        )
        return content[:place] + inserted + content[place:]
    if change == "remove":
        return content[:place] + content[place + draw(st.integers(1, 40)) :]
    if change == "twice":
        return content + content
    if change == "front":
        return draw(st.sampled_from((b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08", b"PK\x03\x04", b"\n\n"))) + content
    return b""


@st.composite
def changed_file(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """Draw the content of a JSON or JSONL file, or of any other, after a change of one place or an accident."""
    kind = draw(st.sampled_from(("bytes", "value", "value", "rows")))
    lines = content.splitlines(keepends=True)
    if name.endswith(".jsonl") and lines and kind != "bytes":
        index = draw(st.integers(0, len(lines) - 1))
        if kind == "value":
            lines[index] = to_bytes(to_json(draw(changed_json(json.loads(lines[index]))))) + b"\n"
        else:
            other = draw(st.integers(0, len(lines) - 1))
            change = draw(st.sampled_from(("drop", "double", "swap", "blank")))
            if change == "drop":
                del lines[index]
            elif change == "double":
                lines.insert(other, lines[index])
            elif change == "swap":
                lines[index], lines[other] = lines[other], lines[index]
            else:
                lines.insert(index, b" \n")
        return b"".join(lines)
    if name.endswith(".json") and kind != "bytes":
        return to_bytes(to_json(draw(changed_json(json.loads(content)))))
    return draw(damaged_bytes(content))
