"""`normalize`: one way to write each text, so that equal texts are equal bytes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
from ftfy import fix_encoding
from ftfy.badness import is_bad

from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import read_view
from megatron_b2.errors import ConfigError


@dataclass(frozen=True)
class Normalize:
    """Unicode NFC, line feeds, no control characters, repaired mojibake, no spaces at line ends."""

    fix_mojibake: bool = True
    """Repair text that was decoded with the wrong encoding, where ftfy is sure."""
    max_blank_lines: int = 1
    """More blank lines in a row than this become this many."""

    def __post_init__(self) -> None:
        if self.max_blank_lines < 0:
            raise ConfigError(f"normalize.max_blank_lines is {self.max_blank_lines}: must be 0 or more")

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """One phase."""
        yield context.for_each_unit(_normalize, self)


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    return (
        re.compile(r"\r\n?|[\u0085\u2028\u2029]"),
        # Controls but tab and line feed, the byte order mark, and what is no character at all.
        re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]"),
        # Latin letters with marks, box drawing, a Greek and two Cyrillic capitals: what UTF-8 read as another
        # encoding has some of. The search for mojibake itself is slow.
        re.compile("[\u0080-\u024f\u0393\u0420\u0421\u2500-\u259f]"),
    )


def normalized(text: str, settings: Normalize) -> str:
    """One text in its normal form."""
    line_ends, controls, suspicious = _patterns()
    if settings.fix_mojibake and suspicious.search(text) and is_bad(text):
        text = fix_encoding(text)
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    text = controls.sub("", line_ends.sub("\n", text))
    text = "\n".join(map(str.rstrip, text.split("\n")))
    most = "\n" * (settings.max_blank_lines + 1)
    if most + "\n" in text:
        text = re.sub(f"{most}\n+", most, text)
    return text.strip("\n")


def _normalize(task: Task, _: Limits) -> Result:
    view = read_view(task.inputs)
    settings: Normalize = task.settings
    before = view.text.to_pylist()
    after = [normalized(text, settings) for text in before]
    changed = pa.array(
        [new if new != old else None for old, new in zip(before, after, strict=True)], pa.large_string()
    )
    keep = np.array([bool(text) for text in after], dtype=bool)
    reason = ["" if kept else "nothing is left" for kept in keep]
    return Result([view.write("normalize", keep=keep, reason=reason, text=changed)])
