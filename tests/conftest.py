"""Settings of the whole test suite."""

from __future__ import annotations

from hypothesis import settings

# Machines that share their cores make single examples slow: time limits belong to whole tests.
settings.register_profile("shared", deadline=None, print_blob=True)
settings.load_profile("shared")
