#!/usr/bin/env python3
"""The whole corpus pipeline on real Chinese and English text: fetch, train the models, run, report, mix.

    make corpus-demo

Everything goes to corpus-demo/. Run again, it does only what is missing.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("corpus-demo")
PIPELINE = ROOT / "examples" / "corpus" / "zhen.toml"
FILES = {"en": ("en.jsonl",), "zh": ("zh-Hans.jsonl", "zh-Hant.jsonl")}
"""Clean text by language: all of the corpus is manuals, which were written with care."""


def b2(*arguments: object) -> None:
    """Run a b2 command and show it."""
    command = ["b2", *map(str, arguments)]
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "megatron_b2", *command[1:]], check=True)


def main() -> None:
    started = time.monotonic()
    raw = OUT / "raw"
    if not (raw / "manifest.json").is_file():
        b2("corpus", "fetch", "--out", raw, "--set", "zhen")
    fetched = time.monotonic()
    for language, names in FILES.items():
        folder = OUT / "models" / language
        if not folder.is_dir():
            files = [raw / name for name in names]
            options = ("--language", language, "--most", 2_000, "--out", folder)
            b2("corpus", "train-quality", "--clean", *files, *options)
    b2("corpus", "run", PIPELINE)
    b2("corpus", "report", OUT / "work", "--out", OUT / "report")
    b2("corpus", "mix", OUT / "work", "--out", OUT / "mixed", "--overwrite")
    ended = time.monotonic()
    print(f"\nfetched in {fetched - started:.0f} s, then {ended - fetched:.0f} s; look at {OUT / 'report'}")


if __name__ == "__main__":
    main()
