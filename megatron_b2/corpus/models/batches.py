"""Documents as columns of texts of a bounded size, which the native code reads at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_b2.documents.texts import Texts

BATCH_BYTES = 8 << 20


def text_batches(texts: Iterable[str], *, batch_bytes: int = BATCH_BYTES) -> Iterator[Texts]:
    """`texts` in order, in columns of about `batch_bytes` characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= batch_bytes:
            yield Texts.of(batch)
            batch, size = [], 0
    if batch:
        yield Texts.of(batch)
