"""Samples, batches and loaders against a slow reference that reads the files with its own code."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.config.schema import DataConfig, SourceConfig
from megatron_b2.data.batch import Batch
from megatron_b2.data.blended import BlendedDataset
from megatron_b2.data.indexed import HEADER, MAGIC, IndexedDatasetBuilder, bin_path, idx_path
from megatron_b2.data.loader import TrainLoader, eval_batches
from megatron_b2.data.manifest import Manifest, Tally, write_manifest
from megatron_b2.data.splits import Split, split_bounds
from megatron_b2.errors import ConfigError, DataError


def write(prefix: Path, documents: list[list[int]], dtype: str = "int32") -> SourceConfig:
    with IndexedDatasetBuilder(prefix, dtype=dtype) as builder:
        for document in documents:
            builder.add_document(document)
    return SourceConfig(prefix=str(prefix))


def numbered(num: int, *, start: int = 0) -> list[list[int]]:
    """Documents of 1 to 7 tokens, every token different."""
    tokens, documents = iter(range(start, start + 10**6)), []
    for i in range(num):
        documents.append([next(tokens) for _ in range(1 + i * 5 % 7)])
    return documents


def slow_sample(documents: list[list[int]], start: int, seq_len: int, masking: bool) -> list[list[int]]:
    """input, label, segment, position of one sample, token by token."""
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    inputs, labels, segments, positions = [], [], [], []
    last = -1
    for (token, number), (following, next_number) in pairwise(stream[start : start + seq_len + 1]):
        new = not inputs or (masking and number != last)
        positions.append(0 if new else positions[-1] + 1)
        segments.append(0 if not inputs else segments[-1] + new)
        inputs.append(token)
        labels.append(-100 if masking and next_number != number else following)
        last = number
    return [inputs, labels, segments, positions]


def rows(batch: Batch) -> list[list[list[int]]]:
    fields = (batch.input_ids, batch.labels, batch.segment_ids, batch.position_ids)
    return [[field[i].tolist() for field in fields] for i in range(batch.input_ids.shape[0])]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 4), st.integers(0, 40)), min_size=1, max_size=20),
    seq_len=st.integers(1, 12),
    dtype=st.sampled_from(["uint8", "int16", "uint16", "int32", "int64"]),
    masking=st.booleans(),
    seed=st.integers(0, 5),
)
def test_assembly_matches_a_slow_reference(
    lengths: list[int],
    seq_len: int,
    dtype: str,
    masking: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Also for documents longer than a sample, of one token and of none."""
    tokens = iter(range(10**6))
    documents = [[next(tokens) % 101 for _ in range(length)] for length in lengths]
    source = write(tmp_path_factory.mktemp("data") / "s", documents, dtype)
    num_samples = max(0, sum(lengths) - 1) // seq_len
    data = DataConfig(sources=(source,), seq_len=seq_len, split=(1, 0, 0), document_masking=masking)
    if num_samples == 0:
        with pytest.raises(DataError, match="no sample of"):
            BlendedDataset.build(data, split="train", seed=seed)
        return
    dataset = BlendedDataset.build(data, split="train", seed=seed, vocab_size=101)
    assert dataset.num_samples == num_samples
    batch = dataset.sample_batch(np.arange(num_samples))
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.segment_ids.dtype == batch.position_ids.dtype == torch.int32
    expected = [slow_sample(documents, i * seq_len, seq_len, masking) for i in range(num_samples)]
    assert sorted(rows(batch)) == sorted(expected)
    _, epochs, samples = dataset.locate(np.arange(num_samples))
    assert not epochs.any()
    assert [expected[i] for i in samples] == rows(batch)


def test_document_ends_carry_no_label(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [[5, 6, 2], [7, 2], [2], [8, 9, 2]])
    data = DataConfig(sources=(source,), seq_len=8, split=(1, 0, 0))
    [row] = rows(BlendedDataset.build(data, split="train", seed=0).sample_batch(np.array([0])))
    assert row == [
        [5, 6, 2, 7, 2, 2, 8, 9],
        [6, 2, -100, 2, -100, -100, 9, 2],
        [0, 0, 0, 1, 1, 2, 3, 3],
        [0, 1, 2, 0, 1, 0, 0, 1],
    ]
    open_data = replace(data, document_masking=False)
    [row] = rows(BlendedDataset.build(open_data, split="train", seed=0).sample_batch(np.array([0])))
    assert row[1:] == [[6, 2, 7, 2, 2, 8, 9, 2], [0] * 8, list(range(8))]


def test_every_epoch_is_a_new_permutation_of_the_same_samples(tmp_path: Path) -> None:
    data = DataConfig(sources=(write(tmp_path / "s", numbered(100)),), seq_len=4, split=(1, 0, 0))
    dataset = BlendedDataset.build(data, split="train", seed=3)
    epochs = [
        dataset.sample_batch(np.arange(start, start + dataset.num_samples)).input_ids[:, 0].tolist()
        for start in (0, dataset.num_samples)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 4 * dataset.num_samples, 4))
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    other = BlendedDataset.build(data, split="train", seed=4)
    assert other.sample_batch(np.arange(dataset.num_samples)).input_ids[:, 0].tolist() != epochs[0]


def test_splits_are_disjoint_ranges_of_documents(tmp_path: Path) -> None:
    documents = numbered(200)
    data = DataConfig(sources=(write(tmp_path / "s", documents),), seq_len=3, split=(0.8, 0.15, 0.05))
    seen: list[set[int]] = []
    for split, part in (("train", documents[:160]), ("valid", documents[160:190]), ("test", documents[190:])):
        dataset = BlendedDataset.build(data, split=split, seed=0)  # type: ignore[arg-type]
        batch = dataset.sample_batch(np.arange(dataset.num_samples))
        seen.append(set(batch.input_ids.flatten().tolist()))
        assert seen[-1] <= set(chain.from_iterable(part))
        assert dataset.num_samples == (sum(map(len, part)) - 1) // 3
    assert not seen[0] & seen[1]
    assert not seen[1] & seen[2]


@given(num=st.integers(0, 10**9), shares=st.tuples(*[st.floats(0, 1)] * 3))
def test_split_bounds_cover_everything(num: int, shares: tuple[float, float, float]) -> None:
    if sum(shares) == 0:
        with pytest.raises(ConfigError, match="not all 0"):
            split_bounds(num, shares)
        return
    bounds = split_bounds(num, shares)
    assert bounds[0] == 0
    assert bounds[-1] == num
    assert list(bounds) == sorted(bounds)


def blend_config(tmp_path: Path, split: tuple[float, float, float] = (1, 0, 0)) -> DataConfig:
    sources = (
        replace(write(tmp_path / "a", numbered(90)), weight=0.7),
        replace(write(tmp_path / "b", numbered(70, start=5_000), "uint16"), weight=0.2),
        replace(write(tmp_path / "c", numbered(50, start=9_000)), weight=0.1),
    )
    return DataConfig(sources=sources, seq_len=8, split=split)


def blend(tmp_path: Path) -> BlendedDataset:
    return BlendedDataset.build(blend_config(tmp_path), split="train", seed=11, vocab_size=20_000)


@pytest.mark.parametrize(
    ("split", "fingerprint", "order"),
    [
        ("train", "6f6aaa7227920984", "005bdd52d58d7c96"),
        ("valid", "92f996f6a1005779", "4fe6809ab6f2ebc8"),
    ],
)
def test_runs_begun_before_there_were_phases_go_on(
    tmp_path: Path, split: Split, fingerprint: str, order: str
) -> None:
    """Fingerprint and order as they were recorded with commit 5ab6563."""
    dataset = BlendedDataset.build(blend_config(tmp_path, (0.8, 0.2, 0)), split=split, seed=11)
    digest = hashlib.sha256()
    for part in dataset.locate(np.arange(5_000)):
        digest.update(part.astype("<i8").tobytes())
    assert dataset.fingerprint.startswith(fingerprint)
    assert digest.hexdigest().startswith(order)


def test_blend_draws_by_weight_and_each_sample_once_an_epoch(tmp_path: Path) -> None:
    dataset = blend(tmp_path)
    positions = np.arange(1000)
    sources, epochs, samples = dataset.locate(positions)
    assert np.abs(np.bincount(sources) - 1000 * np.array([0.7, 0.2, 0.1])).max() < 2
    assert len(set(zip(sources.tolist(), epochs.tolist(), samples.tolist(), strict=True))) == 1000
    first = dataset.sample_batch(positions).input_ids
    assert (first[:, 0] // 4_900 == torch.from_numpy(sources).clamp(max=1)).all()
    shuffled = np.random.default_rng(0).permutation(positions)
    assert torch.equal(dataset.sample_batch(shuffled).input_ids, first[torch.from_numpy(shuffled)])


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 8), (1, 2), (2, 2), (2, 1), (4, 2), (8, 1)])
def test_the_global_sequence_does_not_depend_on_the_layout(tmp_path: Path, dp_size: int, micro: int) -> None:
    dataset, steps = blend(tmp_path), 6
    expected = dataset.sample_batch(np.arange(steps * 8))
    ranks = []
    for rank in range(dp_size):
        with TrainLoader(
            dataset, global_batch_size=8, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size
        ) as loader:
            ranks.append([next(loader) for _ in range(steps)])
    merged = [batch for step in zip(*ranks, strict=True) for rank in step for batch in rank]
    for field in ("input_ids", "labels", "segment_ids", "position_ids"):
        assert torch.equal(torch.cat([getattr(batch, field) for batch in merged]), getattr(expected, field))


def test_a_resumed_loader_sees_each_sample_exactly_once(tmp_path: Path) -> None:
    dataset = blend(tmp_path)

    def run(start: int, stop: int, prefetch: int) -> list[torch.Tensor]:
        with TrainLoader(
            dataset, global_batch_size=4, micro_batch_size=2, start_step=start, prefetch=prefetch
        ) as loader:
            assert loader.next_step == start
            out = [torch.cat([batch.input_ids for batch in next(loader)]) for _ in range(start, stop)]
            assert loader.next_step == stop
        return out

    whole = run(0, 20, 3)
    parts = run(0, 7, 5) + run(7, 8, 1) + run(8, 20, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_eval_batches_are_fixed(tmp_path: Path) -> None:
    dataset = blend(tmp_path)
    layout = {"global_batch_size": 8, "micro_batch_size": 2}
    both = [
        batch.input_ids
        for rank in (0, 1)
        for batch in eval_batches(dataset, index=3, dp_rank=rank, dp_size=2, **layout)
    ]
    assert torch.equal(torch.cat(both), dataset.sample_batch(np.arange(24, 32)).input_ids)


def test_errors_of_the_thread_reach_next(tmp_path: Path) -> None:
    source = write(tmp_path / "bad", [[1, 2, 3], [4, 999, 5, 6], [7, 8]])
    data = DataConfig(sources=(source,), seq_len=4, split=(1, 0, 0))
    dataset = BlendedDataset.build(data, split="train", seed=0, vocab_size=100)
    before = threading.active_count()
    loader = TrainLoader(dataset, global_batch_size=2, micro_batch_size=1)
    with pytest.raises(
        DataError, match=r"bad: token id 999 at token 1 of document 1 is outside the vocabulary"
    ):
        list(loader)
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(loader)


def test_close_is_prompt_and_repeatable(tmp_path: Path) -> None:
    loader = TrainLoader(blend(tmp_path), global_batch_size=2, micro_batch_size=1, prefetch=1)
    time.sleep(0.02)
    start = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - start < 1


def test_a_layout_that_does_not_divide_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size = 6 must be .* = 2 \* 2"):
        TrainLoader(blend(tmp_path), global_batch_size=6, micro_batch_size=2, dp_rank=0, dp_size=2)


def test_wrong_tokenizer_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "s", numbered(20))
    manifest = Manifest(
        job="j",
        tokenizer="aa" * 32,
        vocab_size=7,
        dtype="int32",
        end_of_document=True,
        text_key="text",
        bin_bytes=bin_path(source.prefix).stat().st_size,
        idx_bytes=idx_path(source.prefix).stat().st_size,
        inputs=(),
        tally=Tally(),
    )
    data = DataConfig(sources=(source,), seq_len=4, split=(1, 0, 0))
    write_manifest(source.prefix, manifest)
    BlendedDataset.build(data, split="train", seed=0, expected_tokenizer="aa" * 32)
    with pytest.raises(DataError, match=r"with the tokenizer aaaaaaaaaaaa .* this run uses bbbbbbbbbbbb"):
        BlendedDataset.build(data, split="train", seed=0, expected_tokenizer="bb" * 32)
    write_manifest(source.prefix, replace(manifest, bin_bytes=3))
    with pytest.raises(DataError, match=r"describes a \.bin of 3 bytes"):
        BlendedDataset.build(data, split="train", seed=0)
    Path(f"{source.prefix}.json").write_text('{"format": "megatron_b2.tokens/1"}')
    with pytest.raises(DataError, match="damaged manifest"):
        BlendedDataset.build(data, split="train", seed=0)


def test_fingerprint_follows_everything_that_decides_the_order(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", numbered(90)), write(tmp_path / "b", numbered(90, start=1))
    base = DataConfig(sources=(one, two), seq_len=4)
    moved = write(tmp_path / "moved", numbered(90))
    variants = [
        (base, 0),
        (base, 1),
        (replace(base, seq_len=5), 0),
        (replace(base, split=(0.9, 0.1, 0.0)), 0),
        (replace(base, sources=(two, one)), 0),
        (replace(base, sources=(replace(one, weight=2.0), two)), 0),
        (replace(base, sources=(one,)), 0),
    ]
    prints = [BlendedDataset.build(data, split="train", seed=seed).fingerprint for data, seed in variants]
    assert len(set(prints)) == len(prints)
    same = BlendedDataset.build(replace(base, sources=(moved, two)), split="train", seed=0)
    assert same.fingerprint == prints[0]


def test_small_sources_are_left_out_of_validation_only(tmp_path: Path) -> None:
    big, small = write(tmp_path / "big", numbered(100)), write(tmp_path / "small", [[1, 2]])
    data = DataConfig(sources=(small, big), seq_len=4, split=(0.5, 0.5, 0))
    valid = BlendedDataset.build(data, split="valid", seed=0)
    assert [source.name for source in valid.sources] == [str(tmp_path / "big")]
    with pytest.raises(DataError, match=r"no sample of 5 tokens in the train split .*small: "):
        BlendedDataset.build(data, split="train", seed=0)
    with pytest.raises(DataError, match="test split"):
        BlendedDataset.build(data, split="test", seed=0)
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        BlendedDataset.build(DataConfig(), split="train", seed=0)


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    """Sparse 12 GB file: tokens, pointers and documents past 2^32 bytes and 2^31 tokens."""
    lengths = np.array([1_500_000_000, 1_500_000_000, 6, 3], dtype="<i4")
    pointers = np.concatenate([[0], lengths.astype("<i8").cumsum()[:-1] * 4]).astype("<i8")
    with idx_path(tmp_path / "huge").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 4, 4, 5))
        file.write(lengths.tobytes() + pointers.tobytes() + np.arange(5, dtype="<i8").tobytes())
    tail = np.arange(1, 13, dtype="<i4")
    with bin_path(tmp_path / "huge").open("wb") as file:
        file.seek(int(pointers[2]) - 12)
        file.write(tail.tobytes())
    data = DataConfig(sources=(SourceConfig(prefix=str(tmp_path / "huge")),), seq_len=8, split=(1, 0, 0))
    dataset = BlendedDataset.build(data, split="train", seed=0, vocab_size=100)
    stream = dataset.sources[0].dataset.stream
    out = {name: np.zeros((1, 8), np.int64) for name in ("input_ids", "labels")}
    out |= {name: np.zeros((1, 8), np.int32) for name in ("segment_ids", "position_ids")}
    start = 3_000_000_000 - 2
    arguments = {"rows": np.array([0]), "vocab_size": 100, "document_masking": True, **out}
    stream.gather(starts=np.array([start]), **arguments)
    assert out["input_ids"].tolist() == [[2, 3, 4, 5, 6, 7, 8, 9]]
    assert out["labels"].tolist() == [[3, -100, 5, 6, 7, 8, 9, -100]]
    assert out["segment_ids"].tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
    for bad in (3_000_000_001, -1, 2**62):
        with pytest.raises(IndexError, match="leaves a stream of 3000000009"):
            stream.gather(starts=np.array([bad]), **arguments)
    with pytest.raises(IndexError, match="row 1 of a batch of 1"):
        stream.gather(starts=np.array([0]), **{**arguments, "rows": np.array([1])})


def test_damaged_pointers_are_found_before_they_are_followed(tmp_path: Path) -> None:
    source = write(tmp_path / "s", [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    content = bytearray(idx_path(source.prefix).read_bytes())
    content[34 + 12 + 8 : 34 + 12 + 16] = np.array([10**12], dtype="<i8").tobytes()
    idx_path(source.prefix).write_bytes(content)
    data = DataConfig(sources=(source,), seq_len=11, split=(1, 0, 0))
    dataset = BlendedDataset.build(data, split="train", seed=0)
    with pytest.raises(DataError, match=r"s: damaged \.idx: sequence 1 starts at byte 1000000000000 of 48"):
        dataset.sample_batch(np.array([0]))
