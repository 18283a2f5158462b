"""Scaling laws: a ladder of small runs, the law fitted to their losses, and what it says of a large one."""
