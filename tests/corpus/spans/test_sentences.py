"""Sentences and paragraphs: cut by hand, nothing lost, nothing learned from neighbours."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2 import _cpu
from megatron_b2.corpus.signals import measure_signals
from megatron_b2.corpus.spans import (
    SpanLimits,
    position_of,
    record_spans,
    split_paragraphs,
    split_sentences,
)
from megatron_b2.documents.texts import Texts

# Cuts are where a bar stands.
ENGLISH = (
    "The first one. |Is it the second? |Yes! |And the rest",
    "Dr. Smith met Mrs. Jones and Prof. Lee at St. Mary. |They left.",
    "J. R. R. Tolkien wrote it. |So did C. S. Lewis.",
    "See Fig. 3, Sec. 2.1, and Eq. 7 of vol. 2. |Nothing else.",
    "He said no. |Then he left. |No. 5 is alive.",
    "It costs $3.50 or 1,000.25 yen. |Version 2.0.1 is out at example.com. |Try it.",
    "Use e.g. this, i.e. that, or the U.S. Army, a Ph.D. student and so on. |Done.",
    "They met at 5 p.m. |Nobody came before 9 a.m. |Strange.",
    "“Stop!” he cried. |“Why?” |She ran. |(It was late.) |He slept.",
    'He said "Stop." |Then he left.',
    "Wait... what? |Well... |Then go. |And so… it ended… |Now.",
    "What?! |No way!!! |ok",
    "What? |no answer. |Hm! |indeed.",
    "1. Introduction and more. |Then 2. is a number",
    "a. First item. |Second sentence.",
    "2.1. Scope of this. |Text.",
    "Smith et al. 2020 showed it. |They did, cf. Jones, vs. Lee etc. |More.",
    "It ended in Jan. 2020 and began in Dec. |That was it.",
    "main.c includes foo.h. |It calls f(x). |The end.",
    "Really? — he asked. |Yes.",
    "One line\n|another line.\n|\tand an indented one\n\n\n|After blank lines.  \n|",
    "Windows.\r\n|Lines.\r\n\r\n|Mac.\r|End.\u2028|Last.\x85|X",
    "Trailing spaces.   |Then this.   ",
    "Он пришёл. |Она ушла... а потом? |Нет.",
    "Α. |Β",
)
CHINESE = (
    "今天天气很好。|我们去公园吧！|你觉得呢？|好",
    "他说：“我们走吧。”|然后就走了。",
    "“好！”，他说，“走吧。”|她笑了。",
    "“好！” ，他说。|完！— 真的？ |是。",
    "「真的嗎？」|他問。|『是的。』|（完。）|後記",
    "什么？！|真的！！！|嗯……|然后呢。",
    "等一下…马上来。|他...走了。|好……”|他说。",
    "圆周率是３．１４，约等于 3.14。|对．|是的",
    "你好!|世界?|再见.|完",
    '他说:"你好。"|然后走了。|"再见!"',
    "版本是 v1.2.3。|网址是 example.com。|请看图1. |说明文字。",
    "第一行\n|第二行。\n\n|　　第三段。|结束",
    "日本語です。|はい。|「そうですか。」|終わり",
    "한국어입니다. |네. |끝",
)


def pieces(text: str) -> list[str]:
    sentences, firsts = split_sentences(Texts.of([text]))
    assert firsts.tolist() == [0, len(sentences)]
    return [piece.decode() for piece in sentences]


@pytest.mark.parametrize("marked", ENGLISH + CHINESE)
def test_sentences_by_hand(marked: str) -> None:
    expected = [piece for piece in marked.split("|") if piece]
    assert pieces(marked.replace("|", "")) == expected


@pytest.mark.parametrize(
    "title",
    [
        "Mr",
        "Mrs",
        "Ms",
        "Dr",
        "Prof",
        "Gen",
        "Col",
        "Capt",
        "Lt",
        "Sgt",
        "St",
        "Rev",
        "Sen",
        "Rep",
        "Gov",
        "approx",
        "cf",
        "vs",
        "viz",
    ],
)
def test_titles_end_nothing(title: str) -> None:
    assert pieces(f"We know {title}. Smith. Next.") == [f"We know {title}. Smith. ", "Next."]


@pytest.mark.parametrize("word", ["No", "Fig", "Eq", "Sec", "vol", "pp", "ch", "Jan", "Sept", "al", "p", "c"])
def test_counted_words_end_nothing_before_a_number(word: str) -> None:
    assert pieces(f"It is in {word}. 7 of it. Next.") == [f"It is in {word}. 7 of it. ", "Next."]


WILD = st.text(alphabet="ab.A!?。！？…\"'”“」「() \n\r\t\u3000\x85中ア1é,、", max_size=80)


@settings(max_examples=500)
@given(texts=st.lists(WILD, max_size=5))
def test_nothing_is_lost_and_neighbours_do_not_matter(texts: list[str]) -> None:
    column = Texts.of(texts)
    for split in (split_sentences, split_paragraphs):
        parts, firsts = split(column)
        found = [part.decode() for part in parts]
        groups = [found[a:b] for a, b in itertools.pairwise(firsts)]
        assert ["".join(group) for group in groups] == texts
        assert all(part for part in found)
        assert groups == [[part.decode() for part in split(Texts.of([text]))[0]] for text in texts]


@settings(max_examples=300)
@given(text=WILD)
def test_no_sentence_crosses_the_end_of_a_line(text: str) -> None:
    for sentence in pieces(text):
        assert len(sentence.strip().splitlines()) <= 1


@settings(max_examples=300)
@given(text=st.text(alphabet="ab. \n\t\u3000中。", max_size=60))
def test_paragraphs_are_the_blocks_between_blank_lines(text: str) -> None:
    parts = [part.decode() for part in split_paragraphs(Texts.of([text]))[0]]
    blank = r"[ \t\u3000]*"
    blocks = [block for block in re.split(rf"\n{blank}(?:\n{blank})+", text.strip(" \t\n\u3000")) if block]
    if len(blocks) <= 1:
        blocks = [line for line in text.split("\n") if line.strip()]
    clean = [part.strip(" \t\n\u3000") for part in parts]
    assert clean == [block.strip(" \t\n\u3000") for block in blocks] or (clean == [""] and not blocks)


def test_a_column_that_does_not_start_at_its_first_byte() -> None:
    data = np.frombuffer(b"skip. One. Two. rest", np.uint8)
    sentences, firsts = split_sentences(Texts(data, np.array([6, 11, 16], np.int64)))
    assert [bytes(s) for s in sentences] == [b"One. ", b"Two. "]
    assert firsts.tolist() == [0, 1, 2]


def test_bytes_that_are_no_utf8_are_kept() -> None:
    data = np.frombuffer(b"A\xe3\x80. B\xff!\xe3\x80\x82\xe2", np.uint8)
    offsets, _ = _cpu.split_texts(data, np.array([0, len(data)], np.int64), paragraphs=False)
    assert offsets[0] == 0
    assert offsets[-1] == len(data)
    assert (np.diff(offsets) > 0).all()


def test_long_lines_take_linear_time() -> None:
    """Twenty times the text in about twenty times the steps: none of these looks back to the start of its line."""
    for unit in ('."a', "A. a ", " ", '"', "... ", "。", "(", "1. "):
        assert "".join(pieces(unit * 200_000)) == unit * 200_000


def test_a_text_of_stops_takes_bounded_memory() -> None:
    """The last of 2^24 sentences takes the rest, also for the signals and records."""
    text = "!\n" * ((1 << 24) + 9)
    column = Texts.of([text])
    sentences, firsts = split_sentences(column)
    assert firsts.tolist() == [0, 1 << 24]
    assert sentences.offsets[-2:].tolist() == [len(text) - 20, len(text)]
    assert measure_signals(column)["sentences"].tolist() == [1 << 24]
    limits = SpanLimits(run_length=0, sentence_bytes=2)
    assert position_of(record_spans(column, np.array([0]), limits).sentences["place"]).tolist() == [
        (1 << 24) - 1
    ]
