"""What the commands of docs/planning.md print now, written into the document with the picture of the search.

    python tools/planning_outputs.py    writes docs/planning.md and docs/planning_search.png

A command stands at the beginning of a code block, as "$ b2 plan ..."; the rest of the block is what it
prints, or its first table where the block ends with "...". Figures in the text around the blocks are not
touched: tests/planner/test_planning_document.py names those that are no longer printed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from megatron_b2.files.atomic import atomic_file

ROOT: Final = Path(__file__).resolve().parents[1]
DOCUMENT: Final = ROOT / "docs" / "planning.md"
PICTURE: Final = ROOT / "docs" / "planning_search.png"
BLOCK: Final = re.compile(
    r"(?<=^```\n)\$ b2 (?P<command>plan .*)\n(?P<output>(?:(?!```).*\n)*)", re.MULTILINE
)
MORE: Final = "...\n"


def outputs(text: str) -> dict[str, str]:
    """By command of a document, what it says that the command prints."""
    return {found["command"]: found["output"] for found in BLOCK.finditer(text)}


def printed(command: str, folder: Path, *, first: bool = False) -> str:
    """What `b2 COMMAND` prints in `folder`, without blanks at the ends of lines; its `first` table alone."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_b2", *shlex.split(command)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    text = "".join(f"{line.rstrip()}\n" for line in done.stdout.rstrip().splitlines())
    return text.partition("\n\n")[0] + f"\n{MORE}" if first else text


def main() -> None:
    """Run every command once."""
    text = DOCUMENT.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for command, old in outputs(text).items():
            text = text.replace(old, printed(command, Path(folder), first=old.endswith(MORE)))
        (picture,) = Path(folder).rglob("search.png")
        values = {DOCUMENT: text.encode("utf-8"), PICTURE: picture.read_bytes()}
    for path, value in values.items():
        with atomic_file(path) as stream:
            stream.write(value)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
