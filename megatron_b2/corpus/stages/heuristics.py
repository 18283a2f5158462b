"""`heuristics`: the published rules on counts and shares of words, lines and characters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import languages_of, read_view
from megatron_b2.corpus.signals import configure, judge, measure_signals, to_arrow


@dataclass(frozen=True)
class Heuristics:
    """Rules of Gopher, C4 and FineWeb, and ours for Chinese, Japanese and Korean; all signals are kept."""

    rules: Mapping[str, float | bool] = field(default_factory=dict)
    """Other thresholds by name of a rule, or true or false; `b2 corpus rules` lists them."""

    def __post_init__(self) -> None:
        configure(self.rules)

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """One phase."""
        yield context.for_each_unit(_heuristics, self, version=2)


def _heuristics(task: Task, _: Limits) -> Result:
    view = read_view(task.inputs, wanted=["language.tag"])
    signals = measure_signals(view.texts)
    verdicts = judge(signals, languages_of(view), configure(task.settings.rules))
    reason = verdicts.to_arrow().cast("string").fill_null("")
    columns = dict(zip((table := to_arrow(signals)).column_names, table.columns, strict=True))
    columns["signal_bytes"] = columns.pop("bytes")
    return Result([view.write("heuristics", keep=np.asarray(verdicts.is_kept), reason=reason, **columns)])
