"""Line numbers of the keys of a TOML text, which tomllib does not give.

The text must already have passed tomllib, so this scanner only has to follow structure: tables, arrays of
tables, dotted and quoted keys, inline tables, arrays, strings of all four kinds, comments.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

from megatron_b2.config.keys import Key

BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
BLANK: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)+")
STRING: Final = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:[^"\\\n]|\\.)*"' r"|'[^'\n]*'",
    re.DOTALL,
)
SCALAR: Final = re.compile(r"[^,\]}\n#]+")


def key_lines(text: str) -> dict[Key, int]:
    """Line (from 1) at which each key, table and array element of a valid TOML text first appears."""
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[Key, int] = {}
        self.array_lengths: dict[Key, int] = {}

    def scan(self) -> dict[Key, int]:
        table: Key = ()
        self.skip_blank()
        while self.position < len(self.text):
            if self.peek("[["):
                table = self.table_header(closing="]]", is_array=True)
            elif self.peek("["):
                table = self.table_header(closing="]", is_array=False)
            else:
                self.assignment(table)
            self.skip_blank()
        return self.lines

    def peek(self, token: str) -> bool:
        return self.text.startswith(token, self.position)

    def skip(self, token: str) -> None:
        self.skip_blank()
        assert self.peek(token), f"expected {token!r} at character {self.position}"
        self.position += len(token)
        self.skip_blank()

    def skip_blank(self) -> None:
        if match := BLANK.match(self.text, self.position):
            self.position = match.end()

    def record(self, key: Key) -> None:
        line = self.text.count("\n", 0, self.position) + 1
        for length in range(1, len(key) + 1):
            self.lines.setdefault(key[:length], line)

    def table_header(self, *, closing: str, is_array: bool) -> Key:
        self.position += len(closing)
        self.skip_blank()
        start, names = self.position, self.key()
        table: Key = ()
        for name in names[:-1]:
            table = self.last_element((*table, name))
        table = (*table, names[-1])
        end, self.position = self.position, start
        if is_array:
            index = self.array_lengths.get(table, 0)
            self.record(table)
            self.array_lengths[table] = index + 1
            table = (*table, index)
        self.record(table)
        self.position = end
        self.skip(closing)
        return table

    def last_element(self, table: Key) -> Key:
        return (*table, self.array_lengths[table] - 1) if table in self.array_lengths else table

    def key(self) -> tuple[str, ...]:
        names = [self.name()]
        self.skip_blank()
        while self.peek("."):
            self.skip(".")
            names.append(self.name())
            self.skip_blank()
        return tuple(names)

    def name(self) -> str:
        if match := BARE_KEY.match(self.text, self.position):
            self.position = match.end()
            return match[0]
        start = self.position
        self.string()
        return str(tomllib.loads(f"v = {self.text[start : self.position]}")["v"])

    def string(self) -> None:
        match = STRING.match(self.text, self.position)
        assert match is not None, f"expected a string at character {self.position}"
        self.position = match.end()

    def assignment(self, table: Key) -> None:
        start, names = self.position, self.key()
        key = (*table, *names)
        end, self.position = self.position, start
        self.record(key)
        self.position = end
        self.skip("=")
        self.value(key)

    def value(self, key: Key) -> None:
        if self.peek("["):
            self.elements(key)
        elif self.peek("{"):
            self.skip("{")
            while not self.peek("}"):
                self.assignment(key)
                self.separator()
            self.position += 1
        elif self.text[self.position] in "\"'":
            self.string()
        else:
            match = SCALAR.match(self.text, self.position)
            assert match is not None, f"expected a value at character {self.position}"
            self.position = match.end()

    def elements(self, key: Key) -> None:
        self.skip("[")
        index = 0
        while not self.peek("]"):
            self.record((*key, index))
            self.value((*key, index))
            self.separator()
            index += 1
        self.position += 1

    def separator(self) -> None:
        self.skip_blank()
        if self.peek(","):
            self.skip(",")
