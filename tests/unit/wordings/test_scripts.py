"""Near repeats and lost labels in scripts without spaces, and in those with combining marks."""

from __future__ import annotations

import random
import unicodedata

import pytest

from coalign.config import ParaphraseTable
from coalign.records import Task, Wording
from coalign.wordings.filtering import drop_held_out
from coalign.wordings.near_repeats import NearRepeats, repeats, similarity
from coalign.wordings.rewrites import check_rewrite, labels_in
from coalign.wordings.wordings import GENERATED

CHINESE = ["请判断这条评论是正面还是负面", "把下面的句子翻译成法语", "请写出句子中的颜色，只写一个词", "天气很好"]
JAPANESE, THAI = "この文章の感情を一言で答えてください", "จงบอกว่ารีวิวนี้เป็นบวกหรือลบ"


@pytest.mark.parametrize("text", [*CHINESE[:3], JAPANESE, THAI])
def test_one_character_of_an_unspaced_text_is_no_difference(text: str) -> None:
    """As one word in a long English text; a change of several characters is one."""
    index = NearRepeats(0.9, ["Another wording.", text])
    for changed in (text[:4] + "再" + text[5:], text[:4] + text[5:], "再" + text, text + "吧。", text + "！"):
        assert similarity(text, changed) >= 0.9 and index.has_like(changed)
    for changed in (text[:6], text[3:] + text[:3], CHINESE[3], "Say yes."):
        assert similarity(text, changed) < 0.9 and not index.has_like(changed)


@pytest.mark.parametrize("max_similarity", [0.3, 0.7, 0.9, 0.95, 1.0])
def test_the_index_compares_unspaced_texts_as_one_by_one(max_similarity: float) -> None:
    rng = random.Random(1)
    letters = "请判断这条评论是正面还负天气很好不ไปกา日本の ab"

    def change(text: str) -> str:
        place = rng.randrange(len(text) + 1)
        return rng.choice(
            [text[:place] + rng.choice(letters) + text[place + rng.randint(0, 1) :], text[:place], text[1:]]
        )

    texts = ["".join(rng.choices(letters, k=rng.randint(1, 24))) for _ in range(60)] + CHINESE
    asked = [change(change(rng.choice(texts))) for _ in range(300)] + [change(rng.choice(texts)) for _ in range(300)]
    index = NearRepeats(max_similarity, texts)
    assert [index.has_like(text) for text in asked] == [repeats(text, texts, max_similarity) for text in asked]


def test_a_rewrite_like_a_held_out_chinese_wording_is_dropped() -> None:
    task = Task("t", "这条评论的情绪是什么？", labels=("正面", "负面"))
    held_out = Wording("test", "t", CHINESE[0] + "。", split="test", source="file:f")
    for text, kept in ((CHINESE[0].replace("条", "篇"), False), ("读完之后，说出作者喜不喜欢这部电影", True)):
        rewrite = Wording("new", "t", text, source=GENERATED)
        found, dropped, _ = drop_held_out({"t": [held_out, rewrite]}, [task], 0.9)
        assert (rewrite in found["t"]) == kept and [row["reason"] for row in dropped] == ["held_out"] * (not kept)


@pytest.mark.parametrize(
    ("labels", "original", "kept", "lost"),
    [
        (("正面", "负面"), "请判断评论是正面还是负面。", "这条影评属于正面或负面？", "这条影评属于正面吗？"),
        (("好", "不好"), "好还是不好？", "评价一下：不好或者好", "评价一下：是否不好"),
        (
            ("ポジティブ", "ネガティブ"),
            "ポジティブかネガティブか答えて。",
            "ネガティブなのかポジティブなのか",
            "ネガティブなのか",
        ),
        (("บวก", "ลบ"), "รีวิวนี้เป็นบวกหรือลบ", "บอกว่าลบหรือบวก", "บอกว่าบวก"),
        (("ใช่", "ไม่ใช่"), "ตอบว่าใช่หรือไม่ใช่", "ไม่ใช่หรือใช่ ตอบมา", "ตอบว่าไม่ใช่"),
        (("긍정", "부정"), "긍정인지 부정인지 말하세요.", "부정적인가요, 긍정적인가요?", "긍정적인가요?"),
        (("अच्छा", "बुरा"), "बताओ, अच्छा या बुरा?", "बुरा है या अच्छा, बताओ।", "बुरा है या अच्छाई, बताओ।"),
        (("إيجابي", "سلبي"), "هل هو إيجابي أم سلبي؟", "سلبي أم إيجابي؟", "هل هو إيجابي؟"),
        (
            ("tích cực", "tiêu cực"),
            "Đánh giá là tích cực hay tiêu cực?",
            "Tiêu cực, hay tích cực?",
            "Có tích cực không?",
        ),
        (("إيجابي", "سلبي"), "هل المراجعة إيجابية أو سلبية؟", "قل إن كانت من النوع السلبي والإيجابي", "هل هي سلبية؟"),
        (("부정", "부정확"), "부정인지 부정확인지 말하세요.", "부정확 또는 부정", "부정확한가요?"),
        (("good", "bad"), "Is it good or bad?", "Bad or good: which is it?", "Is it goodness or bad?"),
    ],
)
def test_labels_are_protected_in_every_script(labels: tuple[str, ...], original: str, kept: str, lost: str) -> None:
    def check(rewrite: str) -> str | None:
        table = ParaphraseTable(min_length_ratio=0.0, max_length_ratio=9.0, max_similarity=1.0)
        return check_rewrite(original, rewrite, labels, [], NearRepeats(1.0), table)

    assert labels_in(original, labels) == list(labels)
    assert check(kept) is None
    assert check(unicodedata.normalize("NFD", kept)) is None
    assert check(lost) == "lost_label"
