"""`b2 layout`: what a parallel layout means, for any number of ranks and without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from rich.console import Console

from megatron_b2.cli.config_arguments import Flag, parse
from megatron_b2.cli.main import run
from megatron_b2.errors import ConfigError

if TYPE_CHECKING:  # it imports torch: only once the command line is understood
    from megatron_b2.layouts.report import LayoutReport

HELP: Final = "check a parallel layout, and what it costs, before it runs"

USAGE: Final = (
    "b2 layout check CONFIG --world N [--ranks-per-node 8] [--timetable FILE] [--json] [--table.key VALUE]"
)
DESCRIPTION: Final = """Check that CONFIG is legal on N ranks and print what each rank holds, keeps and sends.

Prints every broken rule with its fix and exits with status 2; or the rank table, bytes and collectives of
each pipeline position, FLOPs per token, what parallel.auto chose and why, and the DeepSpeed JSON. With
pipeline stages the simulated timetable is drawn into a PNG.
Example: b2 layout check preset:baichuan2-13b --world 1024 --parallel.tensor 8"""

FLAGS: Final[Mapping[str, Flag]] = MappingProxyType(
    {
        "world": Flag("number of ranks", "N"),
        "ranks-per-node": Flag("ranks on one node (default 8)", "N"),
        "timetable": Flag("PNG of the pipeline timetable (default <name>-timetable.png)", "FILE"),
        "json": Flag("print everything as JSON, with every rank"),
    }
)

WIDTH: Final = 140
"""Columns of the tables, also where the terminal is narrower."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `b2 layout check ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{DESCRIPTION}\n\nAll settings: b2 layout check CONFIG --help")
        return 0
    if arguments[0] != "check":
        raise ConfigError(f"`b2 layout` has no action {arguments[0]!r}; the action is check")
    return check_action(arguments[1:])


def check_action(argv: Sequence[str]) -> int:
    """Print the report of a layout."""
    parsed = parse(argv, usage=USAGE, description=DESCRIPTION, flags=FLAGS)
    if parsed is None:
        return 0
    if "world" not in parsed.flags:
        raise ConfigError("--world N is missing: give the number of ranks, as in --world 1024")
    world = _positive("world", parsed.flags["world"])
    ranks_per_node = _positive("ranks-per-node", parsed.flags.get("ranks-per-node", "8"))
    config = parsed.load(world_size=world).config

    from megatron_b2.layouts.report import layout_report, report_json

    report = layout_report(config, world_size=world, ranks_per_node=ranks_per_node)
    picture = _draw(report, parsed.flags.get("timetable"))
    if "json" in parsed.flags:
        print(json.dumps({**report_json(report), "timetable": picture}, indent=2))
        return 0
    from megatron_b2.cli.layout_tables import print_report

    console = Console(highlight=False, width=max(Console().width, WIDTH))
    print_report(report, console=console, picture=picture)
    return 0


def _positive(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--{name} must be a whole number, 1 or more, got {text!r}")
    return int(text)


def _draw(report: LayoutReport, path: str | None) -> str | None:
    """Draw the timetable; the path, or none without pipeline stages."""
    from megatron_b2.layouts.stages import run_schedule, stage_durations
    from megatron_b2.pipeline.timetable import draw_timetable

    config, layout = report.config, report.layout
    if layout.pipeline == 1:
        return None
    title = (
        f"{config.name}: {config.parallel.schedule}, {layout.pipeline} pipeline ranks x "
        f"{config.parallel.virtual_stages}, {report.num_micro} micro-batches"
    )
    file = Path(path or f"{config.name}-timetable.png")
    draw_timetable(run_schedule(config, layout), file, title=title, durations=stage_durations(config))
    return str(file)


if __name__ == "__main__":
    sys.exit(run(main))
