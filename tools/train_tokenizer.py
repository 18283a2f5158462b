"""`b2 tokenizer train` for sites that run from a checkout: python tools/train_tokenizer.py --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_b2.cli.main import run
from megatron_b2.cli.tokenizer import main

if __name__ == "__main__":
    sys.exit(run(main, ["train", *sys.argv[1:]]))
