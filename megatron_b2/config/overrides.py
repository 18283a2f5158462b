"""Settings on the command line: --optim.max-lr 1e-3 --train.steps=100 --data.sources data/zh:0.6 data/en:0.4.

A flag is the key of the setting, with "-" or "_". Switches may also be written --train.deterministic and
--train.no-deterministic; `none` unsets a setting that may be unset; a list takes its values one after the
other; a source of the blend is PREFIX or PREFIX:WEIGHT; keys of [deepspeed] are free, as in
--deepspeed.wall-clock-breakdown true. The last of several equal flags wins.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any, Final, Literal, get_args, get_origin

from megatron_b2.config.fields import optional_inner, settings
from megatron_b2.config.keys import Key, leaves, nearest
from megatron_b2.config.layers import Layer, merge
from megatron_b2.config.schema import RunConfig, SourceConfig
from megatron_b2.errors import ConfigError

ORIGIN: Final = "command line"
BOOLEANS: Final = ("true", "false")


def flag_of(key: Key) -> str:
    """The command-line flag of a setting."""
    return "--" + ".".join(map(str, key)).replace("_", "-")


def read_overrides(arguments: Sequence[str], problems: list[str], schema: type = RunConfig) -> Layer:
    """The settings of `schema` on a command line as a layer; unknown flags and stray values are appended to
    `problems`.

    Values of a wrong type are kept as they are: decoding reports them together with all other problems.
    """
    layer = Layer()
    for flag, values in _split(arguments, problems):
        try:
            key, value = _read_flag(flag, values, schema)
        except ConfigError as error:
            problems.append(f"{ORIGIN}: {error}")
            continue
        nested = value
        for name in reversed(key):
            nested = {name: nested}
        layer = merge(layer, Layer(nested, {leaf: ORIGIN for leaf, _ in leaves(value, key)}))
    return layer


def _split(arguments: Sequence[str], problems: list[str]) -> list[tuple[str, list[str]]]:
    """Flags with the values that follow them."""
    groups: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(argument)
        else:
            problems.append(f"{ORIGIN}: {argument!r} is not a flag; settings are written --table.key VALUE")
    return groups


def _read_flag(flag: str, values: list[str], schema: type) -> tuple[Key, Any]:
    """The key that a flag names, and its plain value. Raises ConfigError for unknown flags, stray values."""
    names = tuple(flag.removeprefix("--").replace("-", "_").split("."))
    known = {setting.key: setting.annotation for setting in settings(schema)}
    if names[0] == "deepspeed" and len(names) > 1:
        return names, _only(flag, [_toml_value(value) for value in values])
    if names in known:
        return names, _value(known[names], flag, values)
    positive = (*names[:-1], names[-1].removeprefix("no_"))
    if not values and known.get(positive) is bool:
        return positive, False
    flags = [flag_of(key) for key in known]
    close = next((item for item in flags if item.endswith(f".{flag[2:]}")), None) or nearest(flag, flags)
    hint = f"did you mean {close}?" if close else f"known are {', '.join(flags)}"
    raise ConfigError(f"unknown flag {flag}; {hint}")


def _value(annotation: Any, flag: str, values: list[str]) -> Any:
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        return [_source(value) if item is SourceConfig else _scalar(item, value) for value in values]
    if annotation is bool and not values:
        return True
    return _only(flag, [_scalar(annotation, value) for value in values])


def _only(flag: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise ConfigError(f"{flag} takes one value, got {len(values)}: {values}")
    return values[0]


def _scalar(annotation: Any, text: str) -> Any:
    """`text` as the annotated type where it reads as one, else unchanged."""
    inner = optional_inner(annotation)
    if inner is not None:
        return None if text == "none" else _scalar(inner, text)
    if get_origin(annotation) is Literal:
        return next((choice for choice in get_args(annotation) if str(choice) == text), text)
    if annotation is bool:
        return text == "true" if text in BOOLEANS else text
    if annotation in (int, float):
        return _number(annotation, text)
    return text


def _number(number: type, text: str) -> Any:
    for candidate in (int, number):
        try:
            return candidate(text)
        except ValueError:
            continue
    return text


def _source(text: str) -> dict[str, Any]:
    """PREFIX or PREFIX:WEIGHT as a [[data.sources]] table."""
    prefix, colon, weight = text.rpartition(":")
    number = _number(float, weight)
    return {"prefix": prefix, "weight": number} if colon and not isinstance(number, str) else {"prefix": text}


def _toml_value(text: str) -> Any:
    """`text` as TOML reads it, or as a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
