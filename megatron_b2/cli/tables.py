"""Tables of the commands' reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table
from rich.text import Text


def titled_table(title: str, columns: Sequence[str], *, left: Collection[str] = ()) -> Table:
    """A table with headings; numbers are right-aligned, columns named in `left` are text."""
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in columns:
        is_text = name in left
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


def plain_table(title: str = "") -> Table:
    """Two columns without headings: what, and its value."""
    table = Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
