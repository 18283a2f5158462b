"""Line numbers, against texts whose lines are known."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2.config.encode import toml_value
from megatron_b2.config.keys import leaves
from megatron_b2.config.toml_lines import key_lines

TEXT = '''# comment with [brackets] and "quotes
title = "a # b"  # [not a table]
"quoted key" = 1

[model]
a.b = 3
text = """
[fake]
x = 1
"""
raw = \'\'\'
y = "
\'\'\'
list = [
  1,  # one
  "]",
  [2, 3],
]
inline = { p = 1, q.r = [ { s = 2 } ] }

[[data.sources]]
prefix = "a"

[[data.sources]]
weight = 1.0
[data.sources.extra]
k = 'v'
[ other . "x.y" ]
z = 1979-05-27 07:32:00
'''


def test_every_kind_of_toml_construct() -> None:
    lines = key_lines(TEXT)
    assert {
        ("title",): 2,
        ("quoted key",): 3,
        ("model",): 5,
        ("model", "a"): 6,
        ("model", "a", "b"): 6,
        ("model", "text"): 7,
        ("model", "raw"): 11,
        ("model", "list"): 14,
        ("model", "list", 0): 15,
        ("model", "list", 1): 16,
        ("model", "list", 2, 1): 17,
        ("model", "inline", "p"): 19,
        ("model", "inline", "q", "r", 0, "s"): 19,
        ("data", "sources"): 21,
        ("data", "sources", 0): 21,
        ("data", "sources", 0, "prefix"): 22,
        ("data", "sources", 1): 24,
        ("data", "sources", 1, "weight"): 25,
        ("data", "sources", 1, "extra"): 26,
        ("data", "sources", 1, "extra", "k"): 27,
        ("other", "x.y"): 28,
        ("other", "x.y", "z"): 29,
    }.items() <= lines.items()


def test_every_leaf_that_tomllib_sees_has_a_line() -> None:
    assert {key for key, _ in leaves(tomllib.loads(TEXT))} <= set(key_lines(TEXT))


def test_strings_that_end_in_quotes() -> None:
    text = 'a = """x"""""\nb = \'\'\'y\'\'\'\'\nc = "\\\\"\nd = 1\n'
    tomllib.loads(text)
    assert key_lines(text) == {("a",): 1, ("b",): 2, ("c",): 3, ("d",): 4}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_newlines(newline: str) -> None:
    assert key_lines(newline.join(["a = 1", "", "[b]", "c = 2"]))[("b", "c")] == 4


scalars = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8"))
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.tuples(values, st.integers(0, 3)), max_size=6))
def test_assignments_at_random_distances(assignments: list[tuple[object, int]]) -> None:
    text, expected = "", {}
    for index, (value, blank) in enumerate(assignments):
        text += "#\n" * blank + f"k{index} = {toml_value(value)}\n"
        expected[(f"k{index}",)] = text.count("\n")
    tomllib.loads(text)
    assert {key: line for key, line in key_lines(text).items() if len(key) == 1} == expected
