"""Show, check and list configurations from a checkout: the same as `b2 config`."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
runpy.run_module("megatron_b2.cli.config", run_name="__main__", alter_sys=True)
