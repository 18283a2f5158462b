"""`b2 config`: what a run is made of, without starting it."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from megatron_b2.cli.config_arguments import ConfigArguments, Flag, parse, shown
from megatron_b2.cli.main import run
from megatron_b2.config import (
    ResolvedConfig,
    RunConfig,
    SourceConfig,
    check,
    check_for_training,
    load_config,
    preset_names,
    to_dict,
    to_toml,
)
from megatron_b2.config.fields import Setting, settings, type_name
from megatron_b2.config.keys import dotted
from megatron_b2.config.schema import PhaseConfig
from megatron_b2.engine.deepspeed_config import deepspeed_json
from megatron_b2.errors import ConfigError

HELP: Final = "show, check and list configurations"

USAGE: Final = """usage: b2 config ACTION ...

  b2 config show CONFIG [--table.name VALUE ...]    the whole configuration, where each value came from,
                                                    and the DeepSpeed JSON made from it
  b2 config check CONFIG [--table.name VALUE ...]   every problem at once
  b2 config presets                                 the built-in configurations
  b2 config settings                                every setting, as the Markdown of docs/config.md

CONFIG is a TOML file or preset:<name>. Add --help to an action for its flags and all settings.
Example: b2 config show preset:baichuan2-13b --world-size 64 --train.micro-batch-size 2"""

WORLD_SIZE: Final = Flag("number of data-parallel ranks the run will have (default 1)", "N")
PRESETS_WIDTH: Final = 110
"""Columns that the table of presets needs, also where the terminal is narrower."""

JSON: Final = Flag("print JSON")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `b2 config <action> ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    action, rest = arguments[0], arguments[1:]
    if action not in ACTIONS:
        close = difflib.get_close_matches(action, ACTIONS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"actions are {', '.join(ACTIONS)}"
        raise ConfigError(f"`b2 config` has no action {action!r}; {hint}")
    return ACTIONS[action](rest)


def show(argv: Sequence[str]) -> int:
    """Print the resolved configuration with the origin of every value, and the DeepSpeed JSON."""
    parsed = parse(
        argv,
        usage="b2 config show CONFIG [--world-size N] [--json] [--table.name VALUE ...]",
        description="Show what a configuration file and the command line make together.",
        flags={"world-size": WORLD_SIZE, "json": JSON},
    )
    if parsed is None:
        return 0
    resolved = parsed.load()
    world_size = _world_size(parsed, resolved.config)
    config = resolved.config
    check(config, world_size=world_size, provenance=resolved.provenance)
    uses_deepspeed = config.parallel.engine == "deepspeed"
    generated = deepspeed_json(config, world_size=world_size) if uses_deepspeed else None
    if "json" in parsed.flags:
        print(json.dumps(_as_json(resolved, world_size, generated), indent=2, ensure_ascii=False))
        return 0
    print(to_toml(config, provenance=resolved.provenance))
    print("\n".join(f"# {line}" for line in _summary(resolved, world_size)))
    if generated is None:
        print('\n# parallel.engine = "single": no DeepSpeed JSON')
    else:
        print(f"\n# DeepSpeed JSON on {world_size} ranks")
        print(json.dumps(generated, indent=2))
    return 0


def check_action(argv: Sequence[str]) -> int:
    """Report every problem of a configuration, or say that there is none."""
    parsed = parse(
        argv,
        usage="b2 config check CONFIG [--world-size N] [--training] [--table.name VALUE ...]",
        description="Report every problem of a configuration at once; exit status 2 when there is one.",
        flags={
            "world-size": WORLD_SIZE,
            "training": Flag("also require what `b2 pretrain` needs, such as data sources"),
        },
    )
    if parsed is None:
        return 0
    resolved = parsed.load()
    world_size = _world_size(parsed, resolved.config)
    rules = check_for_training if "training" in parsed.flags else check
    rules(resolved.config, world_size=world_size, provenance=resolved.provenance)
    if resolved.config.parallel.engine == "deepspeed":
        deepspeed_json(resolved.config, world_size=world_size)
    print("\n".join([f"{parsed.path}: no problems", *_summary(resolved, world_size)]))
    return 0


def presets(argv: Sequence[str]) -> int:
    """List the built-in configurations."""
    if unknown := [item for item in argv if item not in ("--json", "-h", "--help")]:
        raise ConfigError(f"`b2 config presets` takes only --json, got {' '.join(unknown)}")
    rows = [_preset_row(name) for name in preset_names()]
    if "--json" in argv:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column, value in rows[0].items():
        table.add_column(column, justify="right" if isinstance(value, int) else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console(highlight=False, width=max(Console().width, PRESETS_WIDTH)).print(table)
    print('\nStart a file with one:  extends = ["preset:toy"]')
    return 0


def settings_action(argv: Sequence[str]) -> int:
    """Print the reference of all settings as Markdown."""
    if argv:
        raise ConfigError(f"`b2 config settings` takes no arguments, got {' '.join(argv)}")
    print(settings_markdown())
    return 0


def settings_markdown() -> str:
    """One Markdown table for each part of the configuration, from the schema itself."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings(RunConfig):
        table = dotted(setting.key[:-1])
        groups.setdefault(f"`[{table}]`" if table else "The run", []).append(setting)
    groups["`[[data.sources]]`"] = list(settings(SourceConfig))
    groups["`[[data.phases]]`"] = list(settings(PhaseConfig))
    lines: list[str] = []
    for title, members in groups.items():
        lines += ["", f"### {title}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        for item in members:
            default = "required" if item.required else f"`{shown(item.default)}`"
            lines.append(f"| `{item.key[-1]}` | {type_name(item.annotation)} | {default} | {item.doc} |")
    return "\n".join(lines).strip()


ACTIONS: Final[Mapping[str, Callable[[Sequence[str]], int]]] = MappingProxyType(
    {"show": show, "check": check_action, "presets": presets, "settings": settings_action}
)


def _preset_row(name: str) -> dict[str, Any]:
    config = load_config(f"preset:{name}").config
    model = config.model
    return {
        "preset": f"preset:{name}",
        "parameters": model.num_parameters,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "layers": model.num_layers,
        "heads": model.num_heads,
        "position": model.position,
        "tokens": config.tokens_per_step * config.train.steps,
    }


def _world_size(parsed: ConfigArguments, config: RunConfig) -> int:
    """As given; else the fewest ranks that the layout runs on."""
    text = parsed.flags.get("world-size", str(config.parallel.model_ranks))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--world-size must be a whole number of ranks, 1 or more, got {text!r}")
    return int(text)


def _as_json(
    resolved: ResolvedConfig, world_size: int, generated: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "config": to_dict(resolved.config),
        "provenance": dict(resolved.provenance),
        "world_size": world_size,
        "num_parameters": resolved.config.model.num_parameters,
        "tokens_per_step": resolved.config.tokens_per_step,
        "deepspeed": generated,
    }


def _summary(resolved: ResolvedConfig, world_size: int) -> list[str]:
    config = resolved.config
    train = config.train
    data = config.parallel.data_size(world_size)
    accumulation = train.accumulation_steps(data)
    return [
        f"{config.model.num_parameters:,} parameters",
        f"{config.tokens_per_step:,} tokens a step x {train.steps:,} steps = "
        f"{config.tokens_per_step * train.steps:,} tokens",
        f"{train.global_batch_size} sequences a step = {data} data-parallel ranks x {accumulation} "
        f"micro-batches x {train.micro_batch_size}",
    ]


if __name__ == "__main__":
    sys.exit(run(main))
