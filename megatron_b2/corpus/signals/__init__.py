"""Heuristic quality signals of documents, and the published rules that decide by them."""

from megatron_b2.corpus.signals.rules import RULES, Rule, Verdicts, configure, judge
from megatron_b2.corpus.signals.signals import SIGNALS, Signal, measure_signals, to_arrow

__all__ = [
    "RULES",
    "SIGNALS",
    "Rule",
    "Signal",
    "Verdicts",
    "configure",
    "judge",
    "measure_signals",
    "to_arrow",
]
