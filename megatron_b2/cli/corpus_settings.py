"""`b2 corpus settings` and `rules`: what a pipeline's file may set, from the schema itself."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Annotated

import tyro

from megatron_b2.errors import InputError

WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Settings:
    """List the settings of a pipeline's file, which `b2 corpus run` also takes as flags.

    Example: b2 corpus settings minhash cluster
    """

    tables: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TABLE...")] = ()
    """Stages or other tables, such as minhash, input or execution; none takes all."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """List the rules of the stage heuristics: what holds for a good document, and the source of the rule.

    A file sets other thresholds, or true or false, by name: [heuristics.rules] gopher_words_min = 20
    """


def main(command: Settings | Rules) -> int:
    """Run a parsed command."""
    return _settings(command.tables) if isinstance(command, Settings) else _rules()


def _settings(tables: tuple[str, ...]) -> int:
    from megatron_b2.cli.config_arguments import shown
    from megatron_b2.config.fields import Setting, settings, type_name
    from megatron_b2.config.keys import dotted
    from megatron_b2.corpus.pipeline.config import ALL_STAGES, PipelineConfig

    groups: dict[str, list[Setting]] = {}
    for setting in settings(PipelineConfig):
        groups.setdefault(dotted(setting.key[:-1]), []).append(setting)
    for stage in ALL_STAGES:
        groups.setdefault(stage, [])
    unknown = sorted(set(tables) - {name.partition(".")[0] for name in groups})
    if unknown:
        known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in groups if name))
        raise InputError(f"there is no table {', '.join(unknown)}; tables are {known}")
    for name, members in groups.items():
        if tables and name.partition(".")[0] not in tables:
            continue
        print(f"\n[{name}]" if name else "At the top of the file")
        if not members:
            print("  no settings")
        for item in members:
            default = "required" if item.required else f"default {shown(item.default)}"
            print(f"  {item.key[-1]}: {type_name(item.annotation)}, {default}")
            print(textwrap.indent(textwrap.fill(item.doc, WIDTH), " " * 6))
    return 0


def _rules() -> int:
    from megatron_b2.corpus.signals.rules import RULES

    for rule in RULES:
        note = "" if rule.is_on else "; off unless it is set"
        if rule.languages:
            note += f"; only {', '.join(rule.languages)}"
        if rule.but_not:
            note += f"; not {', '.join(rule.but_not)}"
        print(f"{rule}  ({rule.source}{note})")
    return 0
