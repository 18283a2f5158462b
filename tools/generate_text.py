"""Write text with a model from a checkout: the same as `b2 generate`."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
runpy.run_module("megatron_b2.cli.generate", run_name="__main__", alter_sys=True)
