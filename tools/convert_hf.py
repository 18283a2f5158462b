"""Import from and export to Hugging Face folders from a checkout: the same as `b2 convert`."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
runpy.run_module("megatron_b2.cli.convert", run_name="__main__", alter_sys=True)
