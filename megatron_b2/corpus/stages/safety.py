"""`safety`: harmful text by rules and by a classifier, and sources that are trusted.

The report removes harmful documents by rules and models and samples a trusted Chinese and English set more
often (section 4.1); it gives neither. Word lists come by path, one word or phrase a line. A short list of
gambling and pornographic advertising, the commonest of it in crawled Chinese and English text, is built in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from megatron_b2.corpus.models.classifier import TextClassifier
from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import read_view
from megatron_b2.errors import ConfigError, InputError
from megatron_b2.files.hashing import hash_file

ADVERTISING = (
    *("博彩", "网上赌场", "澳门赌场", "真人娱乐", "六合彩", "时时彩", "百家乐", "赌球", "棋牌游戏平台"),
    *("成人视频", "成人电影", "裸聊", "一夜情", "援交", "色情", "情色", "无码", "黄色网站"),
    *("私服发布", "代开发票", "办证刻章"),
    *("online casino", "casino bonus", "sports betting", "free spins", "payday loan", "buy viagra"),
    *("porn", "xxx video", "sex chat", "escort service"),
)


@dataclass(frozen=True)
class Safety:
    """Remove harmful documents and mark trusted ones."""

    word_lists: tuple[str, ...] = ()
    """Text files of words and phrases, one a line; # starts a comment. Case does not matter."""
    advertising: bool = True
    """Also use the built-in list of gambling and pornographic advertising."""
    most_per_thousand: float = 5.0
    """Occurrences of listed words in 1,000 characters from which on a document goes ..."""
    least_words: int = 3
    """... if at least this many different ones occur: one word alone may be what a text is about."""
    classifier: str = ""
    """A classifier that knows a class "harmful", made by `b2 corpus train-quality`. None: rules only."""
    harmful_least: float = 0.9
    """Its probability from which on a document goes."""
    trusted_sources: tuple[str, ...] = ()
    """Regular expressions; a document whose source matches one is trusted: `weights` samples it more often,
    and the rules here do not remove it."""

    def __post_init__(self) -> None:
        problems = []
        for pattern in self.trusted_sources:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"safety.trusted_sources: {pattern!r} is no regular expression: {error}")
        if not 0 < self.harmful_least <= 1:
            problems.append(f"safety.harmful_least is {self.harmful_least}: must be above 0, at most 1")
        if problems:
            raise ConfigError(problems)

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """One phase."""
        problems, words = [], list(ADVERTISING) if self.advertising else []
        for path in self.word_lists:
            try:
                words += _read_words(Path(path))
            except OSError as error:
                problems.append(f"safety.word_lists: {path} cannot be read: {error.strerror}")
            except UnicodeDecodeError as error:
                where = f"{error.reason} at byte {error.start}"
                problems.append(f"safety.word_lists: {path} is not UTF-8: {where}")
        content = ""
        if self.classifier:
            try:
                model = TextClassifier(self.classifier)
                content = hash_file(Path(self.classifier)).sha256
                if "harmful" not in model.labels:
                    problems.append(
                        f"safety.classifier: {self.classifier} has no class 'harmful', only {model.labels}"
                    )
            except InputError as error:
                problems.append(f"safety.classifier: {error}")
        if problems:
            raise ConfigError(problems)
        yield context.for_each_unit(_safety, _Rules(self, tuple(sorted(set(words))), content))


@dataclass(frozen=True)
class _Rules:
    settings: Safety
    words: tuple[str, ...]
    classifier: str
    """SHA-256 of the classifier."""


def _read_words(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line.casefold() for line in lines if line]


@cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the words; Latin ones as whole words."""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    whole = [
        rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])" if word.isascii() else re.escape(word)
        for word in longest_first
    ]
    return re.compile("|".join(whole) or "(?!)")


def _safety(task: Task, _: Limits) -> Result:
    given: _Rules = task.settings
    settings: Safety = given.settings
    view = read_view(task.inputs)
    pattern = _pattern(given.words)
    different, rate = np.zeros(len(view), np.int64), np.zeros(len(view), np.float32)
    for row, text in enumerate(view.text.to_pylist()):
        found = pattern.findall(text.casefold())
        different[row], rate[row] = len(set(found)), 1_000 * len(found) / max(len(text), 1)
    harmful = np.zeros(len(view), np.float32)
    if settings.classifier:
        model = TextClassifier(settings.classifier, verify=False)
        column = model.labels.index("harmful")
        harmful = np.nan_to_num(model.probabilities(view.texts)[:, column])
    sources = view.documents.column("source").to_pylist()
    patterns = [re.compile(pattern) for pattern in settings.trusted_sources]
    trusted = np.array([any(p.search(source or "") for p in patterns) for source in sources], dtype=bool)
    by_words = (rate >= settings.most_per_thousand) & (different >= settings.least_words) & ~trusted
    by_model = (harmful >= settings.harmful_least) & ~trusted & bool(settings.classifier)
    reason = np.where(by_words, "listed words", np.where(by_model, "classifier", ""))
    columns = {"listed_words": different, "per_thousand": rate, "harmful": harmful, "trusted": trusted}
    return Result([view.write("safety", keep=reason == "", reason=reason, **columns)])
