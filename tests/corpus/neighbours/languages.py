"""Texts in many scripts, and what their words are according to the `regex` library."""

from __future__ import annotations

import random

import regex

# Thai, Lao, Tibetan, Yi have no stacking sign; of the others the alphabets leave it out, so that \X cuts alike.
ALPHABETS = {
    "en": "abcdefghijklmnopqrstuvwxyz",
    "zh": "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生",
    "ja": "あいうえおかきくけこさしすせそたちつてとアイウエオカキクケコ日本語東京学校",
    "ko": "가나다라마바사아자차카타파하거너더러머버서어저처커터퍼허고노도로모보소오조초코토포호",
    "th": "กขคงจฉชซญดตถทธนบปผฝพฟภมยรลวศสหอฮ",
}
SINGLE = r"[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}ー][\p{M}ﾞﾟ]*"
CLUSTER = r"[\p{Script=Thai}\p{Script=Lao}\p{Script=Tibetan}\p{Script=Yi}--\p{Nd}--\p{P}--\p{S}]"
WORD = regex.compile(
    rf"(?V1){SINGLE}|(?=[{CLUSTER}&&\p{{L}}])\X|"
    rf"[\p{{L}}\p{{Nd}}\p{{No}}\p{{Nl}}--\p{{Han}}--\p{{Hiragana}}--\p{{Katakana}}--\p{{Hangul}}--{CLUSTER}--[ーﾞﾟ]]"
    rf"[\p{{L}}\p{{N}}\p{{M}}ﾞﾟ--\p{{Han}}--\p{{Hiragana}}--\p{{Katakana}}--\p{{Hangul}}--{CLUSTER}--ー]*"
)


def reference_words(text: str) -> list[str]:
    """The words of a text without format characters, by another library."""
    return [match.group() for match in WORD.finditer(text)]


def random_words(language: str, count: int, chance: random.Random) -> list[str]:
    """Random words of a language; "mixed" alternates zh and en."""
    if language == "mixed":
        return [random_words("zh" if i // 7 % 2 else "en", 1, chance)[0] for i in range(count)]
    letters = ALPHABETS[language]
    if language == "en":
        return ["".join(chance.choices(letters, k=chance.randint(3, 9))) for _ in range(count)]
    return chance.choices(letters, k=count)


def written(words: list[str]) -> str:
    """The words as a text: spaces only where both neighbours are Latin."""
    text = ""
    for word in words:
        text += " " + word if text and word.isascii() and text[-1].isascii() else word
    return text
