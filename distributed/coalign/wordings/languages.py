"""Whether two texts are in the same script and language: by the letters, and by frequent words where they are plain.

Pure functions of texts. Knows no wordings.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter, defaultdict

# Frequent words of instructions, few of which two of these languages share. Short texts have one or two of them.
_FREQUENT = {
    "en": "the of and is to in that it for with you are this or which what as from by given whether be your below"
    " following write give name answer say find choose tell pick return its how both one word sentence a an no on all"
    " per at not if only any do does can we its",
    "de": "der die das und ist den dem des ein eine einen einer nicht mit für auf wie oder zu von sie wird ob welche"
    " welches welcher dir nenne nennen gib geben schreibe schreiben antworte finde wähle sage im aus folgenden an",
    "fr": "le la les de du un une et est que qui dans pour sur avec ce cette au aux ou pas des donne donnez écris"
    " écrivez réponds répondez nomme nommez trouve choisis choisissez quel quelle indiquez suivant vous",
    "es": "el la los las de del un una y es que en para con por o si se da di escribe responde nombra encuentra elige"
    " indica cuál qué siguiente dada dado como lo su",
    "it": "il lo la gli le di del della un una e è che in per con o se dai scrivi rispondi nomina trova scegli indica"
    " quale nel nella dato seguente i",
    "pt": "o a os as de do da um uma e é que em para com por ou se dê escreva responda nomeie encontre escolha indique"
    " qual no na dado seguinte seu",
    "nl": "de het een en is van in dat op te met voor of zijn niet geef schrijf antwoord noem vind kies welk welke wat"
    " uit wordt aan",
    "sv": "och att det en ett är som på med för av den till inte ge skriv svara välj vilken vilket nämn eller i",
    "pl": "jaka jaki jakie i w z na do się nie jest to że lub czy podaj napisz odpowiedz wybierz który która dla",
    "tr": "ve bir bu için ile mi ne olarak veya yaz ver seç cevapla hangi nedir verilen",
    "vi": "và là của một trong cho với hãy hoặc không được câu từ nào trả lời",
    "id": "yang dan di dari ini untuk dengan atau adalah apakah tulis berikan sebutkan jawab pilih kata berikut",
}
_OF_WORD: dict[str, list[str]] = {}
for _language, _words in _FREQUENT.items():
    for _word in _words.split():
        _OF_WORD.setdefault(_word, []).append(_language)
_LETTERS = re.compile(r"[^\W\d_]+")
# What a text may quote or name in another language says nothing about the text's own.
_QUOTED = re.compile(
    r"\"[^\"\n]*\"|“[^”\n]*”|«[^»\n]*»|「[^」\n]*」|(?<!\w)['‘][^'’\n]*['’](?!\w)|[<{\[][^<>{}\[\]\n]*[>}\]]"
)


@functools.cache
def _script(letter: str) -> str:
    """Return the script of a letter, the first word of its Unicode name; both kinds of kana are one."""
    name = unicodedata.name(unicodedata.normalize("NFKC", letter)[:1], "").partition(" ")[0]
    return "KANA" if name in ("HIRAGANA", "KATAKANA") else name


def _script_shares(text: str) -> dict[str, float]:
    counts = Counter(_script(letter) for letter in text if letter.isalpha())
    return {script: number / counts.total() for script, number in counts.items()}


def in_other_script(text: str, other: str) -> bool:
    """Return whether most letters of the two texts are of unlike scripts, or one alone is written with kana.

    A text without letters is in no script, and differs from none.
    """
    one, two = _script_shares(text), _script_shares(other)
    if not one or not two:
        return False
    kana = [shares.get("KANA", 0.0) for shares in (one, two)]
    apart = sum(abs(one.get(script, 0.0) - two.get(script, 0.0)) for script in one.keys() | two.keys()) / 2
    return apart > 0.5 or (min(kana) == 0.0 and max(kana) > 0.15)


def _language_scores(text: str) -> dict[str, float]:
    """Return the number of frequent words of each language; a word of several counts as a part for each."""
    found = Counter(_LETTERS.findall(_QUOTED.sub(" ", text).casefold()))
    scores: dict[str, float] = defaultdict(float)
    for word, number in found.items():
        for language in _OF_WORD.get(word, ()):
            scores[language] += number / len(_OF_WORD[word])
    return scores


def in_other_language(text: str, other: str) -> bool:
    """Return whether frequent words say that two texts are in different languages; False where they do not say it.

    Each text needs two such words of its own language, and at most half as many of the other's. Beside English, a
    text without any English word and with two words that have letters such as é or ü is in another language as well.
    """
    one, two = _language_scores(text), _language_scores(other)
    if not two:
        return False
    second = max(two, key=two.__getitem__)
    if two[second] < 2:
        return False
    if second == "en" and not one.get("en") and _num_accented(text) > _num_accented(other) + 1:
        return True
    first = max(one, key=one.__getitem__, default=second)
    if first == second or one[first] < 2:
        return False
    return one.get(second, 0.0) * 2 <= one[first] and two.get(first, 0.0) * 2 <= two[second]


def _num_accented(text: str) -> int:
    return sum(not word.isascii() for word in _LETTERS.findall(_QUOTED.sub(" ", text)))
