"""The .bin/.idx format against its published bytes, an independent reader and an independent writer."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import struct
import time
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.data.indexed import (
    IndexedDataset,
    IndexedDatasetBuilder,
    bin_path,
    idx_path,
    merge,
    token_dtype,
)
from megatron_b2.errors import DataError, OutputError
from megatron_b2.testing.fork import run_ranks

# Written by Megatron-LM's own IndexedDatasetBuilder: documents [1,2,3] | [4,5] | [6][7,8,9], int32.
GOLDEN_IDX = bytes.fromhex(
    "4d4d494449445800000100000000000000040400000000000000040000000000000003000000020000000100000003000000"
    "00000000000000000c0000000000000014000000000000001800000000000000"
    "0000000000000000010000000000000002000000000000000400000000000000"
)


def write_golden(prefix: Path, dtype: str) -> None:
    with IndexedDatasetBuilder(prefix, dtype=dtype) as builder:
        builder.add_document([1, 2, 3])
        builder.add_document([4, 5])
        builder.add_document([6], [7, 8, 9])


def independent_read(prefix: Path) -> list[list[list[int]]]:
    """Documents -> sequences -> tokens, from the layout table alone: no code of ours."""
    idx = Path(f"{prefix}.idx").read_bytes()
    raw = Path(f"{prefix}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00"
    version, code, num_sequences, num_indices = struct.unpack_from("<QBQQ", idx, 9)
    assert version == 1
    letter, width = {1: ("B", 1), 2: ("b", 1), 3: ("h", 2), 4: ("i", 4), 5: ("q", 8), 8: ("H", 2)}[code]
    lengths = struct.unpack_from(f"<{num_sequences}i", idx, 34)
    pointers = struct.unpack_from(f"<{num_sequences}q", idx, 34 + 4 * num_sequences)
    documents = struct.unpack_from(f"<{num_indices}q", idx, 34 + 12 * num_sequences)
    assert len(idx) == 34 + 12 * num_sequences + 8 * num_indices
    sequences = []
    for length, pointer in zip(lengths, pointers, strict=True):
        assert pointer + length * width <= len(raw)
        sequences.append(list(struct.unpack_from(f"<{length}{letter}", raw, pointer)))
    return [sequences[a:b] for a, b in pairwise(documents)]


def independent_write(
    prefix: Path, documents: list[list[list[int]]], *, code: int, modes: bool = False
) -> None:
    """A writer from the layout table alone."""
    letter = {1: "B", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    raw, lengths, pointers, indices = b"", [], [], [0]
    for document in documents:
        for sequence in document:
            pointers.append(len(raw))
            lengths.append(len(sequence))
            raw += struct.pack(f"<{len(sequence)}{letter}", *sequence)
        indices.append(len(lengths))
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(indices))
    idx += struct.pack(f"<{len(lengths)}i", *lengths)
    idx += struct.pack(f"<{len(pointers)}q", *pointers)
    idx += struct.pack(f"<{len(indices)}q", *indices)
    Path(f"{prefix}.idx").write_bytes(idx + bytes(len(lengths)) * modes)
    Path(f"{prefix}.bin").write_bytes(raw)


def test_golden_bytes(tmp_path: Path) -> None:
    write_golden(tmp_path / "i32", "int32")
    write_golden(tmp_path / "u16", "uint16")
    assert idx_path(tmp_path / "i32").read_bytes() == GOLDEN_IDX
    assert hashlib.sha256(GOLDEN_IDX).hexdigest().startswith("792dedeaf5da645b")
    digest = hashlib.sha256(idx_path(tmp_path / "u16").read_bytes()).hexdigest()
    assert digest.startswith("affed8728d1c2eea")
    assert bin_path(tmp_path / "u16").read_bytes() == struct.pack("<9H", *range(1, 10))
    assert bin_path(tmp_path / "i32").read_bytes() == struct.pack("<9i", *range(1, 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i32.bin", "i32.idx", "u16.bin", "u16.idx"]


def test_dtype_follows_the_vocabulary() -> None:
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32
    assert token_dtype(125_696) == np.int32


documents_strategy = st.lists(
    st.lists(st.lists(st.integers(0, 32_000), max_size=6), min_size=1, max_size=3), max_size=8
)


@settings(max_examples=40, deadline=None)
@given(documents=documents_strategy, dtype=st.sampled_from(["uint16", "int32", "int64"]))
def test_independent_reader_opens_ours(
    documents: list[list[list[int]]], dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("ours") / "data"
    with IndexedDatasetBuilder(prefix, dtype=dtype) as builder:
        for document in documents:
            builder.add_document(*document)
    assert independent_read(prefix) == documents


@settings(max_examples=40, deadline=None)
@given(documents=documents_strategy, code=st.sampled_from([3, 4, 5, 8]), modes=st.booleans())
def test_ours_opens_an_independent_writers(
    documents: list[list[list[int]]], code: int, modes: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("theirs") / "data"
    independent_write(prefix, documents, code=code, modes=modes)
    dataset = IndexedDataset(prefix)
    flat = [list(chain.from_iterable(document)) for document in documents]
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == flat
    assert dataset.num_tokens == sum(map(len, flat))
    starts = [dataset.stream.document_start(i) for i in range(len(flat) + 1)]
    assert starts == [dataset.document_start(i) for i in range(len(flat) + 1)]


def test_merge_equals_writing_at_once(tmp_path: Path) -> None:
    groups = [[[[1, 2], [3]], [[4]]], [], [[[]], [[5, 6, 7]]]]
    for number, group in enumerate(groups):
        independent_write(tmp_path / f"part{number}", group, code=8)
    independent_write(tmp_path / "whole", list(chain.from_iterable(groups)), code=8)
    merge([tmp_path / f"part{number}" for number in range(3)], tmp_path / "merged")
    assert idx_path(tmp_path / "merged").read_bytes() == idx_path(tmp_path / "whole").read_bytes()
    assert bin_path(tmp_path / "merged").read_bytes() == bin_path(tmp_path / "whole").read_bytes()
    independent_write(tmp_path / "other", [[[1]]], code=4)
    with pytest.raises(DataError, match=r"other: holds int32, but .*part0 holds uint16"):
        merge([tmp_path / "part0", tmp_path / "other"], tmp_path / "bad")
    assert not list(tmp_path.glob("*bad*"))


def test_add_documents_in_bulk(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "data", dtype="uint16") as builder:
        builder.add_documents(np.array([5, 6, 7], dtype=np.int32), np.array([2, 1]))
    assert independent_read(tmp_path / "data") == [[[5, 6]], [[7]]]


def test_builder_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="token ids 1 to 70000 do not fit uint16"),
        IndexedDatasetBuilder(tmp_path / "data", dtype="uint16") as builder,
    ):
        builder.add_document([1, 70_000])
    assert list(tmp_path.iterdir()) == []


def test_truncated_files_name_the_file_and_both_sizes(tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    write_golden(prefix, "int32")
    for path, message in (
        (bin_path(prefix), r"data\.bin: truncated: expected 36 bytes from data.idx, found 35"),
        (
            idx_path(prefix),
            r"data\.idx: truncated: expected 114 bytes for 4 sequences and 3 documents, found 113",
        ),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError, match=message):
            IndexedDataset(prefix)
        path.write_bytes(whole)
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"data\.bin: too long: expected 36 bytes from data.idx, found 37"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "not a Megatron-LM index"),
        (9, b"\x02", "index version 2; only version 1"),
        (17, b"\x09", "dtype code 9"),
        (18, b"\x05", "truncated: expected 126 bytes"),
        (26, bytes(8), "0 document indices"),
        (82, b"\x01", "documents cover the sequences 1 to 4"),
    ],
)
def test_damaged_header(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    write_golden(tmp_path / "data", "int32")
    damaged = bytearray(GOLDEN_IDX)
    damaged[offset : offset + len(value)] = value
    idx_path(tmp_path / "data").write_bytes(damaged)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "data")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.idx: no such file"):
        IndexedDataset(tmp_path / "none")
    idx_path(tmp_path / "short").write_bytes(b"MMID")
    bin_path(tmp_path / "short").write_bytes(b"")
    with pytest.raises(DataError, match="expected at least 34 bytes, found 4"):
        IndexedDataset(tmp_path / "short")


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    prints = set()
    for name, token in (("a", 1), ("b", 2), ("c", 1)):
        with IndexedDatasetBuilder(tmp_path / name, dtype="int32") as builder:
            builder.add_document([token, 7])
        prints.add(IndexedDataset(tmp_path / name).fingerprint)
    assert len(prints) == 2


def test_opening_a_large_index_reads_only_its_ends(tmp_path: Path) -> None:
    """200 M documents, 400 G tokens (sparse files): open and fingerprint in constant time."""
    num, length = 200_000_000, 2_000
    with idx_path(tmp_path / "huge").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, num, num + 1))
        for offset, value in (
            (34 + 4 * (num - 1), struct.pack("<i", length)),
            (34 + 4 * num + 8 * (num - 1), struct.pack("<q", (num - 1) * length * 4)),
            (34 + 12 * num + 8 * num, struct.pack("<q", num)),
        ):
            file.seek(offset)
            file.write(value)
    with bin_path(tmp_path / "huge").open("wb") as file:
        os.truncate(file.fileno(), num * length * 4)
    start = time.perf_counter()
    dataset = IndexedDataset(tmp_path / "huge")
    assert len(dataset.fingerprint) == 64
    assert time.perf_counter() - start < 1.0
    assert dataset.num_tokens == 400_000_000_000


SHORT = np.ones(100, dtype="<i8")
"""Lengths of documents so short that the .idx is larger than the .bin."""


def test_a_full_disk_leaves_neither_file(tmp_path: Path) -> None:
    """The .bin fits, the .idx does not: a .bin alone would look like data."""
    for part in ("part0", "part1"):
        with IndexedDatasetBuilder(tmp_path / part, dtype="uint16") as builder:
            builder.add_documents(SHORT, SHORT)
    before = sorted(tmp_path.iterdir())

    def write() -> None:
        with IndexedDatasetBuilder(tmp_path / "written", dtype="uint16") as builder:
            builder.add_documents(SHORT, SHORT)

    def child() -> list[str]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
        messages = []
        for body in (write, lambda: merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged")):
            with pytest.raises(OutputError) as caught:
                body()
            messages.append(str(caught.value))
        return messages

    [messages] = run_ranks(1, child)
    assert [
        f"{name}.idx: File too large" in text
        for name, text in zip(("written", "merged"), messages, strict=True)
    ]
    assert sorted(tmp_path.iterdir()) == before
