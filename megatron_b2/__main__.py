"""`python -m megatron_b2` is the `b2` command."""

from __future__ import annotations

import sys

from megatron_b2.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
