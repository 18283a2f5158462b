"""Documents in and out: JSONL (plain, gzip, zstd), Parquet and text files, and files written atomically."""

from megatron_b2.documents.document import Document, ReadReport
from megatron_b2.documents.reader import OnError, read_documents, read_line_range
from megatron_b2.documents.storage import expand_inputs
from megatron_b2.documents.writer import JsonlWriter

__all__ = [
    "Document",
    "JsonlWriter",
    "OnError",
    "ReadReport",
    "expand_inputs",
    "read_documents",
    "read_line_range",
]
