"""Arguments of the commands that take a configuration: CONFIG, settings over it, the command's own flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_origin

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_b2.config import ResolvedConfig, RunConfig, load_config
from megatron_b2.config.encode import plain, toml_value
from megatron_b2.config.fields import Setting, settings, type_name
from megatron_b2.config.keys import dotted
from megatron_b2.config.overrides import flag_of
from megatron_b2.errors import ConfigError

LAUNCHER_FLAGS: Final = ("--local_rank", "--local-rank")
"""Added by the deepspeed launcher; ranks are read from the environment instead."""


@dataclass(frozen=True)
class Flag:
    """A flag of the command itself, beside the settings."""

    doc: str
    value: str = ""
    """Name of its value in the help; a switch has none."""


@dataclass(frozen=True)
class ConfigArguments:
    """A parsed command line."""

    path: str
    overrides: tuple[str, ...]
    flags: Mapping[str, str]
    """The command's own flags that were given, without dashes; "" for a switch."""

    def load(self, *, world_size: int | None = None) -> ResolvedConfig:
        """The configuration under the settings of the command line, checked for so many ranks if given."""
        return load_config(self.path, self.overrides, world_size=world_size)


def parse(
    argv: Sequence[str], *, usage: str, description: str, flags: Mapping[str, Flag] | None = None
) -> ConfigArguments | None:
    """Split a command line into CONFIG, settings and own flags.

    Prints help and returns None for --help: every setting with its documentation, and its present value and
    origin when CONFIG is given. Raises ConfigError for a missing CONFIG or a flag without its value.
    """
    own = flags or {}
    arguments = [item for item in argv if item.partition("=")[0] not in LAUNCHER_FLAGS]
    wants_help = any(item in ("-h", "--help") for item in arguments)
    arguments = [item for item in arguments if item not in ("-h", "--help")]
    path = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    given, overrides = _own_flags(arguments, own)
    parsed = ConfigArguments(path, tuple(overrides), given)
    if wants_help:
        print_help(usage, description, own, parsed.load() if path else None)
        return None
    if not path:
        raise ConfigError(f"CONFIG is missing: give a TOML file or preset:<name>; usage: {usage}")
    return parsed


def _own_flags(arguments: Sequence[str], own: Mapping[str, Flag]) -> tuple[dict[str, str], list[str]]:
    given: dict[str, str] = {}
    overrides: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name not in own:
            overrides.append(argument)
        elif not own[name].value:
            given[name] = ""
        elif equals or (remaining and not remaining[0].startswith("--")):
            given[name] = value if equals else remaining.pop(0)
        else:
            raise ConfigError(f"{flag} needs a value: {flag} {own[name].value}")
    return given, overrides


def print_help(
    usage: str, description: str, own: Mapping[str, Flag], resolved: ResolvedConfig | None
) -> None:
    """Usage, the command's own flags, and one table of settings for each part of the configuration."""
    console = Console(highlight=False)
    console.print(Text(f"usage: {usage}\n\n{description}\n"))
    if own:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name, flag in own.items():
            table.add_row(f"--{name} {flag.value}".strip(), Text(flag.doc))
        console.print(table)
    console.print(Text("\nSettings, as in CONFIG: --table.name VALUE replaces what the file says.\n"))
    groups: dict[str, list[Setting]] = {}
    for setting in settings(RunConfig):
        groups.setdefault(dotted(setting.key[:-1]), []).append(setting)
    for group, members in groups.items():
        title = Text(f"[{group}]" if group else "the run", style="bold")
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("flag", "value", "from", "meaning"):
            table.add_column(column, overflow="fold")
        for setting in members:
            table.add_row(*(Text(cell) for cell in _row(setting, resolved)))
        console.print(table, "")


def _row(setting: Setting, resolved: ResolvedConfig | None) -> tuple[str, str, str, str]:
    flag = flag_of(setting.key) + (".KEY" if get_origin(setting.annotation) is Mapping else "")
    meaning = f"{setting.doc} ({type_name(setting.annotation)})"
    if resolved is None:
        return flag, "required" if setting.required else shown(setting.default), "", meaning
    value: Any = resolved.config
    for name in setting.key:
        value = getattr(value, str(name))
    return flag, shown(value), resolved.provenance.get(dotted(setting.key), ""), meaning


def shown(value: Any) -> str:
    """A value in one short piece of text."""
    if value is None:
        return "none"
    text = toml_value(plain(value))
    return text if len(text) <= 40 else f"{text[:37]}..."
