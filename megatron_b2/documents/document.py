"""What a document is, and the account of a reading."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_MESSAGES = 20


@dataclass(frozen=True, slots=True)
class Document:
    """One document and where it came from."""

    text: str
    language: str = "und"
    """BCP 47 tag, such as zh-Hans or en; "und" when the input names none."""
    source: str = ""
    id: str = ""
    path: str = ""
    """File it was read from."""
    line: int = 0
    """1-based line of a JSONL file, row of a Parquet file or record of a WARC file; 1 for a file that is one
    document."""
    url: str = ""
    """Address it was fetched from, where the input names one."""


class MalformedError(Exception):
    """A record (or the rest of a file) cannot be read."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


@dataclass(slots=True)
class ReadReport:
    """Counts of one reading, filled while the documents are consumed."""

    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the text of all documents."""
    empty: int = 0
    """Records whose text is empty: neither an error nor a document."""
    malformed: int = 0
    messages: list[str] = field(default_factory=list)
    """The first 20 malformed records as "file:line: reason"."""

    def add_malformed(self, message: str) -> None:
        """Count one malformed record and keep its message if there is room."""
        self.malformed += 1
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)

    def summary(self) -> str:
        """One line for a person, e.g. "12 documents, 3.4 MB, 1 malformed record skipped"."""
        parts = [f"{self.documents:,} documents", f"{self.bytes / 1e6:,.1f} MB"]
        if self.empty:
            parts.append(f"{self.empty:,} empty")
        if self.malformed:
            parts.append(f"{self.malformed:,} malformed skipped")
        return ", ".join(parts)
