"""Every signal again: slow, in plain Python, from the definitions in signals.py and the papers."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

from megatron_b2.corpus.spans import split_sentences
from megatron_b2.documents.texts import Texts

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
STOP_WORDS_ZH = ("的", "了", "是", "在", "和", "有", "不", "这這")
POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
ENDS = re.compile("\r\n|[\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029]")
BULLETS = "•‣⁃◦▪▫●○■□◆►➢★·・"
TERMINALS = '.!?"\u201d。！？｡．」』؟۔।॥։።፧။។៕༎།'
CP1252 = "".join(bytes([b]).decode("cp1252", "ignore") for b in range(0x80, 0xA0))

# Characters of every kind that the tests use, by kind.
HAN = "的了是在和有不这這世界好中文语料锟斤拷"
KANA = "あいうカナ"
HANGUL = "한국어말"
THAI = "กขค"
THAI_MARKS = "ิั่"
FORMATS = "\u200c\u200d\xad"
SPACES = " \t\x1f\xa0\u3000\u200b"
CONTROLS = "\x00\x07\x7f\x80\x9f"
NEWLINES = "\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"
PUNCTUATION = ".,;:!?#-*/'\"()[]{}_…。，！？「」『』・•‘’“”–—、؟।។"
SYMBOLS = "$+=<>|~\ufffd€™©→😀"
LETTERS = "abcABCxyzÄéßÃÂâåæåŒЖжΩω"
DIGITS = "0123456789²٣７"
MARKS = "\u0301\u0308"


def kind(c: str) -> str:
    """Kind of one of the characters above."""
    for name, members in (
        ("han", HAN), ("kana", KANA), ("hangul", HANGUL), ("cluster", THAI), ("format", FORMATS),
        ("newline", NEWLINES), ("space", SPACES), ("mark", MARKS + THAI_MARKS),
    ):  # fmt: skip
        if c in members:
            return name
    category = unicodedata.category(c)
    return {"P": "punctuation", "S": "symbol", "N": "digit", "L": "letter"}.get(category[0], "other")


@lru_cache(maxsize=1000)
def words_of(line: str) -> list[str]:
    words: list[str] = []
    open_kind = ""
    for c in line:
        k = kind(c)
        if k in ("letter", "digit"):
            if open_kind == "word":
                words[-1] += c.lower()
            else:
                words.append(c.lower())
            open_kind = "word"
        elif k in ("han", "kana", "hangul", "cluster"):
            words.append(c)
            open_kind = "single"
        elif k == "mark":
            if open_kind:
                words[-1] += c
        elif k != "format":
            open_kind = ""
    return words


def lines_of(text: str) -> list[str]:
    """Lines without the white space around them; blank ones are empty."""
    lines = ENDS.split(text)
    return [line.strip(SPACES) for line in lines]


def paragraphs_of(lines: list[str]) -> list[tuple[str, ...]]:
    blocks = [tuple(block.split("\n")) for block in re.split("\n{2,}", "\n".join(lines).strip("\n")) if block]
    return [(line,) for line in blocks[0]] if len(blocks) == 1 else blocks


def duplicates(parts: list[str]) -> tuple[float, float]:
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return share(count, len(parts)), share(characters, sum(map(len, parts)))


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def covered(words: list[str], n: int, starts: list[int]) -> int:
    """Characters of the words in n-grams that start at `starts`, each once."""
    inside = {i for start in starts for i in range(start, start + n)}
    return sum(len(words[i]) for i in inside)


def top_ngram(words: list[str], n: int) -> float:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)  # in the order of first occurrence
    best = max(counts, key=lambda g: (counts[g], len("".join(g))), default=None)
    if best is None or counts[best] < 2:
        return 0.0
    return share(covered(words, n, [i for i, g in enumerate(grams) if g == best]), len("".join(words)))


def duplicate_ngrams(words: list[str], n: int) -> float:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    starts = [i for i, g in enumerate(grams) if g in set(grams[:i])]
    return share(covered(words, n, starts), len("".join(words)))


def has_phrase(line: str, phrase: str) -> int:
    words = words_of(line)
    wanted = phrase.split()
    return sum(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def is_wide(c: str) -> bool:
    return kind(c) in ("han", "kana", "hangul") or "\u3000" <= c < "\u3040" or "\uff01" <= c < "\uff61"


def is_ellipsis(line: str) -> bool:
    return line.endswith(("...", "…"))


def is_terminal(line: str) -> bool:
    return line.endswith(tuple(TERMINALS)) and not is_ellipsis(line)


def is_bullet(line: str) -> bool:
    return line[0] in BULLETS or (line[0] in "-*–—" and len(line) > 1 and line[1] in SPACES)


def longest_token(line: str) -> int:
    return max(len(token) for token in re.split(f"[{SPACES}]", line))


def is_c4(line: str) -> bool:
    return (
        is_terminal(line)
        and len(words_of(line)) >= 5
        and longest_token(line) <= 1000
        and not has_phrase(line, "javascript")
        and not any(has_phrase(line, policy) for policy in POLICIES)
    )


def sentences_by_line(text: str) -> list[int]:
    """Sentences of each line that is not blank."""
    sentences, _ = split_sentences(Texts.of([text]))
    counts = [0]
    for sentence in sentences:
        whole = sentence.decode()
        counts[-1] += bool(whole.strip(SPACES + NEWLINES))
        if ENDS.search(whole.rstrip(SPACES)[-1:]) or ENDS.search(whole.lstrip(SPACES + NEWLINES)):
            counts.append(0)
    return [count for count in counts if count]


def is_misread(c: str) -> bool:
    return ("\x80" <= c < "\xc0" and c != "\xa0") or c in CP1252


def mojibake(text: str) -> int:
    found = 0
    for i in range(1, len(text)):
        last, c = text[i - 1], text[i]
        before = text[i - 2] if i > 1 and not last.isascii() else ""
        third = "\xe2" <= before <= "\xef" and is_misread(last)
        found += (last + c == "锟斤") or (is_misread(c) and (last in "\xc2\xc3" or third))
    return found


def signals(text: str) -> dict[str, float]:
    lines = [line for line in lines_of(text) if line]
    blocks = paragraphs_of(lines_of(text))
    words = [word for line in lines for word in words_of(line)]
    spaced = [word for word in words if kind(word[0]) in ("letter", "digit")]
    tokens = [token for line in lines for token in re.split(f"[{SPACES}]", line) if token]
    symbols = [
        t for t in tokens if all(kind(c) in ("punctuation", "symbol", "other", "mark", "format") for c in t)
    ]
    kinds = Counter(map(kind, text))
    spaces = kinds["space"] + kinds["newline"]
    visible = len(text) - spaces
    other_letters = sum(c in "ЖжΩω" for c in text)
    by_line = sentences_by_line(text)
    replaced = text.count("\ufffd")
    controls = sum(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in text)
    words_by_line = [len(words_of(line)) for line in lines]
    has_letter = [any(kind(c) not in ("digit", "mark") for c in word) for word in words]
    values: dict[str, float] = {
        "bytes": len(text.encode()),
        "characters": len(text),
        "lines": len(lines),
        "paragraphs": len(blocks),
        "sentences": sum(by_line),
        "words": len(words),
        "cjk_characters": kinds["han"] + kinds["kana"] + kinds["hangul"],
        "stop_words": sum(word in words for word in STOP_WORDS),
        "stop_words_zh": sum(any(word[0] in stop for word in words) for stop in STOP_WORDS_ZH),
        "c4_sentences": sum(n for n, line in zip(by_line, lines, strict=True) if is_c4(line)),
        "javascript_lines": sum(has_phrase(line, "javascript") > 0 for line in lines),
        "policy_lines": sum(any(has_phrase(line, policy) for policy in POLICIES) for line in lines),
        "long_word_lines": sum(longest_token(line) > 1000 for line in lines),
        "curly_brackets": text.count("{") + text.count("}"),
        "lorem_ipsum": sum(has_phrase(line, "lorem ipsum") for line in lines),
        "urls": len(re.findall(r"[hH][tT][tT][pP][sS]?://|(?<![a-zA-Z0-9_/])[wW]{3}\.", text)),
        "replacement_characters": replaced,
        "mojibake": mojibake(text),
        "control_characters": controls,
        "mean_word_length": share(sum(map(len, spaced)), len(spaced)),
        "hashes_per_word": share(text.count("#"), len(words)),
        "ellipses_per_word": share(text.count("...") + text.count("…"), len(words)),
        "bullet_lines": share(sum(map(is_bullet, lines)), len(lines)),
        "ellipsis_lines": share(sum(map(is_ellipsis, lines)), len(lines)),
        "alphabetic_words": share(sum(has_letter), len(words) + len(symbols)),
        "terminal_lines": share(sum(map(is_terminal, lines)), len(lines)),
        "few_word_lines": share(sum(n < 5 for n in words_by_line), len(lines)),
        "c4_characters": share(sum(len(line) for line in lines if is_c4(line)), sum(map(len, lines))),
        "punctuated_lines": share(
            sum(is_terminal(x) or is_ellipsis(x) or x.endswith(("'", "’")) for x in lines), len(lines)
        ),
        "short_lines": share(sum(sum(1 + is_wide(c) for c in line) <= 30 for line in lines), len(lines)),
        "newlines_per_word": share(len(ENDS.findall(text)), len(words)),
        "latin": share(kinds["letter"] - other_letters, visible),
        "other_letters": share(other_letters, visible),
        "han": share(kinds["han"], visible),
        "kana": share(kinds["kana"], visible),
        "hangul": share(kinds["hangul"], visible),
        "unspaced_letters": share(kinds["cluster"], visible),
        "digits": share(kinds["digit"], visible),
        "punctuation": share(kinds["punctuation"] + kinds["symbol"], visible),
        "white_space": share(spaces, len(text)),
        "broken": share(replaced + mojibake(text) + controls, len(text)),
    }  # fmt: skip
    values["duplicate_lines"], values["duplicate_line_characters"] = duplicates(lines)
    parts = [" ".join(block) for block in blocks]
    values["duplicate_paragraphs"] = duplicates(parts)[0]
    joined = ["".join(block) for block in blocks]
    seen = [part in parts[:i] for i, part in enumerate(parts)]
    values["duplicate_paragraph_characters"] = share(
        sum(len(j) for j, s in zip(joined, seen, strict=True) if s), sum(map(len, joined))
    )
    values |= {f"top_{n}_gram": top_ngram(words, n) for n in (2, 3, 4)}
    values |= {f"duplicate_{n}_grams": duplicate_ngrams(words, n) for n in range(5, 11)}
    return values
