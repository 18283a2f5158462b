"""The `b2` command: a table of sub-commands, each imported only when it is called."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Final

from megatron_b2 import __version__
from megatron_b2.errors import B2Error

COMMANDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "corpus": "fetch real text; clean, de-duplicate and weigh a corpus",
        "tokenizer": "train, measure and export a SentencePiece tokenizer",
        "preprocess": "tokenize text into the .bin/.idx pair that training reads",
        "data": "look at a tokenized data set: sizes, samples, order",
        "pretrain": "pre-train a model from one TOML file",
        "checkpoint": "list, inspect and verify checkpoints",
        "convert": "import from and export to Hugging Face folders",
        "generate": "write text with a checkpoint or a Hugging Face folder",
        "config": "show, check and list configurations",
        "layout": "check a parallel layout, and what it costs, before it runs",
        "plan": "time, memory, days and failures of a run, before it is paid for",
        "scaling": "fit a scaling law to a ladder of small runs, and predict a large one",
        "ops": "which kernels this machine can run, and proof that they are right",
        "selftest": "prove on this machine that every parallel layout equals one process",
    }
)
"""Command -> one line; the command lives in megatron_b2/cli/<command>.py."""

EXIT_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `b2 <command> ...` and return its exit status (2 for an error in the input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        print(f"megatron_b2 {__version__}")
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean `b2 {close[0]}`?" if close else f"commands are {', '.join(COMMANDS)}"
        print(f"error: there is no command {command!r}; {hint}", file=sys.stderr)
        return EXIT_ERROR
    return run(import_module(f"megatron_b2.cli.{command}").main, rest)


def overview() -> str:
    """The text of `b2 --help`."""
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"megatron_b2 {__version__}: the training system of the Baichuan 2 report",
            "",
            "usage: b2 COMMAND [arguments]      b2 COMMAND --help explains a command",
            "",
            "commands, in the order of a training run:",
            *lines,
            "",
            "first steps:",
            "  b2 config show preset:toy                          what a run is made of",
            "  b2 pretrain examples/configs/toy.toml --train.steps 100",
        ]
    )


def run(function: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Call a command; an error made for users becomes one message on stderr and exit status 2."""
    try:
        return function(argv)
    except B2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
