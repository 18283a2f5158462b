"""From texts to texts without repeats: by hand, and against a slow de-duplication with Python dictionaries."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.corpus.spans import (
    SpanLimits,
    apply_cuts,
    find_cuts,
    find_repeats,
    fold_text,
    place_of,
    record_spans,
    split_paragraphs,
    split_sentences,
)
from megatron_b2.documents.texts import Texts

LOW = SpanLimits(paragraph_bytes=3, run_length=2, run_bytes=3, sentence_bytes=3, sentence_count=4)


def deduplicate(texts: list[str], limits: SpanLimits, bounds: tuple[int, ...] = ()) -> list[str]:
    """The whole way, with the corpus cut into units at `bounds`."""
    edges = [0, *bounds, len(texts)]
    units = [(Texts.of(texts[a:b]), np.arange(a, b)) for a, b in pairwise(edges)]
    records = [record_spans(unit, documents, limits) for unit, documents in units]
    paragraphs = find_repeats([r.paragraphs for r in records])["place"]
    runs = find_repeats([r.runs for r in records])["place"]
    sentences = find_repeats([r.sentences for r in records], more_than=limits.sentence_count)["place"]
    kept: list[str] = []
    for unit, documents in units:
        cuts = find_cuts(
            unit,
            documents,
            paragraphs=paragraphs,
            runs=runs,
            sentences=sentences,
            run_length=limits.run_length,
        )
        kept += [text.decode() for text in apply_cuts(unit, cuts.ranges, cuts.firsts)]
    return kept


def parts_of(text: str) -> tuple[list[str], list[range]]:
    """Sentences, and which of them each paragraph has."""
    sentences = [s.decode() for s in split_sentences(Texts.of([text]))[0]]
    paragraphs = [p.decode() for p in split_paragraphs(Texts.of([text]))[0]]
    ends = list(accumulate(map(len, sentences)))
    ranges, first = [], 0
    for end in accumulate(map(len, paragraphs)):
        last = ends.index(end) + 1
        ranges.append(range(first, last))
        first = last
    return sentences, ranges


def slowly_cut(texts: list[str], limits: SpanLimits) -> list[list[bool]]:
    """Which sentences of each text go."""
    split = [parts_of(text) for text in texts]
    count = Counter(fold_text(s) for sentences, _ in split for s in sentences)
    seen_paragraphs, seen_runs, seen_sentences = set(), set(), set()
    cut = []
    for sentences, paragraphs in split:
        folded = [fold_text(s) for s in sentences]
        size = [len(f.encode()) for f in folded]
        goes = [False] * len(sentences)
        for paragraph in paragraphs:
            whole = "".join(folded[i] for i in paragraph)
            if len(whole.encode()) >= limits.paragraph_bytes:
                for i in paragraph if whole in seen_paragraphs else ():
                    goes[i] = True
                seen_paragraphs.add(whole)
        for i in range(len(sentences) - limits.run_length + 1):
            run = tuple(folded[i : i + limits.run_length])
            if sum(size[i : i + limits.run_length]) >= limits.run_bytes:
                for j in range(i, i + limits.run_length) if run in seen_runs else ():
                    goes[j] = True
                seen_runs.add(run)
        for i, sentence in enumerate(folded):
            if size[i] >= limits.sentence_bytes and count[sentence] > limits.sentence_count:
                goes[i] = goes[i] or sentence in seen_sentences
                seen_sentences.add(sentence)
        cut.append(goes)
    return cut


def without(text: str, goes: list[bool]) -> str:
    """The text without these sentences; a cut inside of a line leaves the end of the line."""
    sentences, _ = parts_of(text)
    kept = ""
    for i, sentence in enumerate(sentences):
        if not goes[i]:
            kept += sentence
            continue
        last_of_cut = i + 1 == len(sentences) or not goes[i + 1]
        inside = kept != "" and not _ends_line(sentences[_first_of_cut(goes, i) - 1])
        if last_of_cut and inside and _ends_line(sentence):
            kept = kept.rstrip() + sentence[len(sentence.rstrip()) :]
        elif inside and i + 1 == len(sentences):
            kept = kept.rstrip()
    return kept


def _first_of_cut(goes: list[bool], i: int) -> int:
    while i > 0 and goes[i - 1]:
        i -= 1
    return i


def _ends_line(sentence: str) -> bool:
    return len((sentence + "x").splitlines()) > 1


SENTENCES = (
    "Alpha one. ",
    "Beta two! ",
    "Gamma 三。",
    "Delta four.\n",
    "Epsilon five.\n\n",
    "Zeta\n",
    "Q! ",
    "Alpha ONE. ",
)
corpora = st.lists(st.lists(st.sampled_from(SENTENCES), max_size=8).map("".join), max_size=8)


@settings(max_examples=400)
@given(texts=corpora)
def test_the_whole_way_is_the_slow_one(texts: list[str]) -> None:
    goes = slowly_cut(texts, LOW)
    assert deduplicate(texts, LOW) == [without(text, g) for text, g in zip(texts, goes, strict=True)]


@settings(max_examples=100)
@given(texts=corpora, data=st.data())
def test_units_do_not_matter(texts: list[str], data: st.DataObject) -> None:
    bounds = data.draw(st.lists(st.integers(0, len(texts)), max_size=4).map(sorted))
    assert deduplicate(texts, LOW, tuple(bounds)) == deduplicate(texts, LOW)


@settings(max_examples=200)
@given(texts=corpora)
def test_of_every_sentence_the_first_stays(texts: list[str]) -> None:
    kept = {fold_text(s) for text in deduplicate(texts, LOW) for s in parts_of(text)[0]}
    assert kept - {""} == {fold_text(s) for text in texts for s in parts_of(text)[0]} - {""}


def test_a_paragraph_moved_to_another_document() -> None:
    moved = "This paragraph was copied from one document\nto another, and re-wrapped on the way there.\n"
    texts = [
        f"First document.\n\n{moved}\nIts end.\n",
        f"Second document.\n\n{moved.upper().replace(' ', '  ')}\nOther end.\n",
    ]
    assert deduplicate(texts, SpanLimits()) == [texts[0], "Second document.\n\nOther end.\n"]


def test_a_run_of_three_sentences() -> None:
    run = "The quick brown fox jumps. The lazy dog sleeps on. Nobody saw what they did then."
    texts = [
        f"Start here. {run} End here.",
        f"Another start. {run} Another end.",
        f"{run}\nA new line.",
        f"Mine. {run}",
    ]
    assert deduplicate(texts, SpanLimits()) == [
        texts[0],
        "Another start. Another end.",
        "A new line.",
        "Mine.",
    ]
    two_of_them = run[: run.index(" Nobody")]
    assert deduplicate([texts[0], f"See: {two_of_them} Yes."], SpanLimits())[1] == f"See: {two_of_them} Yes."


def test_a_cut_inside_of_a_line_leaves_its_end() -> None:
    boilerplate = "Click here to read more of our stories."
    texts = [f"Text {i}. {boilerplate}\n\nNext paragraph {i}.\n" for i in range(4)]
    limits = SpanLimits(sentence_count=3)
    assert deduplicate(texts, limits)[1:] == [f"Text {i}.\n\nNext paragraph {i}.\n" for i in range(1, 4)]
    assert deduplicate(texts, SpanLimits(sentence_count=4)) == texts
    chinese = [f"正文{i}。点击这里阅读更多精彩的内容吧。后文{i}。" for i in range(4)]
    assert deduplicate(chinese, limits)[3] == "正文3。后文3。"


def test_code_is_no_boilerplate() -> None:
    """Short lines repeat in every program; they are below the limits."""
    code = "for (i = 0; i < n; i++) {\n    x[i] = y;\n  }\n}\n}\n\nreturn 0;\n}\n"
    texts = [code.replace("x", name) for name in ("left", "right", "middle")]
    assert deduplicate(texts, SpanLimits()) == texts


def test_positions_of_other_texts_are_an_error() -> None:
    texts, documents = Texts.of(["One. Two.", "Three."]), np.array([4, 9])
    with pytest.raises(
        ValueError, match="sentence 2 of a document of 2: these places are not of these texts"
    ):
        find_cuts(texts, documents, runs=place_of([4], [1]), run_length=2)
    with pytest.raises(ValueError, match="paragraph 1 of a document of 1"):
        find_cuts(texts, documents, paragraphs=place_of([9], [1]))
    with pytest.raises(ValueError, match="in the order of the corpus"):
        find_cuts(texts, documents, sentences=place_of([9, 4], [0, 0]))
    cuts = find_cuts(texts, documents, sentences=place_of([3, 4, 5, 10], [7, 1, 7, 7]))
    assert cuts.ranges.tolist() == [[4, 9]]
    assert cuts.firsts.tolist() == [0, 1, 1]


@given(data=st.data())
def test_apply_cuts_is_slicing(data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.binary(max_size=12), max_size=5))
    ranges, firsts, expected = [], [0], []
    for text in texts:
        edges = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
        pairs = list(zip(edges[0::2], edges[1::2], strict=False))
        ranges += pairs
        firsts.append(len(ranges))
        gone = {i for begin, end in pairs for i in range(begin, end)}
        expected.append(bytes(b for i, b in enumerate(text) if i not in gone))
    column = Texts(np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)]))
    left = apply_cuts(column, np.array(ranges, np.int64).reshape(-1, 2), np.array(firsts))
    assert list(left) == expected


@pytest.mark.parametrize(
    ("ranges", "firsts", "message"),
    [
        ([[2, 4], [3, 5]], [0, 2], r"cut \[3, 5\) of text 0 is out of order or outside of its 6 bytes"),
        ([[2, 9]], [0, 1], r"cut \[2, 9\)"),
        ([[4, 2]], [0, 1], r"cut \[4, 2\)"),
        ([[-1, 2]], [0, 1], r"cut \[-1, 2\)"),
        ([[0, 1]], [0, 2], "from 0 to M"),
        ([[0, 1]], [0, 1, 1], "from 0 to M"),
        ([[0, 1, 2]], [0, 1], "from 0 to M"),
    ],
)
def test_bad_cuts_are_an_error(ranges: list[list[int]], firsts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_cuts(Texts.of(["abcdef"]), np.array(ranges), np.array(firsts))
