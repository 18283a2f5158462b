"""Megatron-LM's order against Megatron-LM itself (recorded), against numpy, and against its formulas, slowly."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_b2._cpu import MersenneTwister, megatron_sample_index
from megatron_b2.config.schema import DataConfig, MegatronOrderConfig, SourceConfig
from megatron_b2.data import megatron_order
from megatron_b2.data.blended import BlendedDataset
from megatron_b2.data.indexed import IndexedDatasetBuilder, bin_path
from megatron_b2.data.loader import TrainLoader
from megatron_b2.data.megatron_index import build_blend, build_index, legacy_generator, plan_index
from megatron_b2.data.megatron_order import document_range, planned_samples
from megatron_b2.data.splits import SPLITS, Split
from megatron_b2.errors import ConfigError, DataError
from tests.training.runs import run_config

FACTS = json.loads((Path(__file__).parents[1] / "golden" / "megatron_order.json").read_text())
"""What Megatron-LM 0.16.1 does; made by make_megatron_order.py beside the file."""


def write(prefix: Path, lengths: Sequence[int], *, start: int = 0, dtype: str = "int32") -> SourceConfig:
    """Documents of these lengths; the tokens count up from `start`."""
    with IndexedDatasetBuilder(prefix, dtype=dtype) as builder:
        builder.add_documents(np.arange(start, start + sum(lengths)), np.array(lengths, dtype=np.int64))
    return SourceConfig(prefix=str(prefix))


def digest(array: Any) -> dict[str, Any]:
    content = np.ascontiguousarray(array)
    sha256 = hashlib.sha256(content.tobytes()).hexdigest()
    return {"dtype": content.dtype.name, "shape": list(content.shape), "sha256": sha256}


@pytest.mark.parametrize("case", FACTS["cases"], ids=range(len(FACTS["cases"])))
def test_equals_megatron_lm(case: Mapping[str, Any], tmp_path: Path) -> None:
    """Every array and every token of 24 data sets, single and blended, train and validation."""
    sources, start = [], 0
    for number, source in enumerate(case["sources"]):
        lengths = source["lengths"]
        sources.append(replace(write(tmp_path / f"s{number}", lengths, start=start), weight=source["weight"]))
        start += sum(lengths)
    data = DataConfig(
        sources=tuple(sources),
        order="megatron",
        megatron=MegatronOrderConfig(drop_last=case["drop_last"]),
        seq_len=case["seq_len"],
        split=tuple(case["split"]),
        document_masking=False,
    )
    for split, expected in case["expected"].items():
        planned = case["sizes"][SPLITS.index(split)]
        dataset = BlendedDataset.build(data, split=split, seed=case["seed"], planned_samples=planned)
        for source, arrays in zip(dataset.sources, expected["sources"], strict=True):
            assert digest(source.arrays.documents) == arrays["documents"]
            assert digest(source.arrays.samples) == arrays["samples"]
            assert digest(source.arrays.shuffle) == arrays["shuffle"]
        if "blend" in expected:
            assert digest(dataset.order._blend[0]) == expected["blend"]["sources"]
            assert digest(dataset.order._blend[1]) == expected["blend"]["drawn"]
        assert dataset.num_samples == expected["num_samples"] >= planned
        batch = dataset.sample_batch(np.arange(dataset.num_samples))
        assert batch.input_ids[:8, 0].tolist() == expected["first_tokens"]
        assert digest(batch.input_ids.numpy()) == expected["tokens"]
        assert digest(batch.labels.numpy()) == expected["labels"]


@pytest.mark.parametrize("row", FACTS["partial"], ids=range(len(FACTS["partial"])))
def test_partial_samples_are_counted_as_megatron_lm_does_or_exactly(row: Mapping[str, Any]) -> None:
    """Token counts that float32 cannot hold: Megatron-LM is off by one in 27 of these 40, both ways."""
    lengths, seq_len = np.array(row["lengths"], np.int32), row["seq_len"]
    documents, tokens = np.array(row["documents"], np.int32), sum(row["lengths"])

    def sample_index(*, exact: bool) -> np.ndarray:
        plan = plan_index(tokens, seq_len=seq_len, requested=1, drop_last=False, exact=exact)
        rows = np.empty((plan.num_samples + 1, 2), np.int32)
        megatron_sample_index(lengths=lengths, documents=documents, seq_len=seq_len, rows=rows)
        return rows

    compatible = sample_index(exact=False)
    assert digest(compatible) == row["samples"]
    assert compatible[-3:].tolist() == row["last"]
    exact = sample_index(exact=True)
    starts = np.concatenate([[0], lengths[documents].cumsum(dtype=np.int64)])[exact[:, 0]] + exact[:, 1]
    assert starts.tolist() == [*range(0, tokens - 1, seq_len), tokens - 1], "the whole stream, each part once"


def test_some_recorded_counts_are_wrong() -> None:
    wrong = [
        row["samples"]["shape"][0] - 1 - -(-(sum(row["lengths"]) - 1) // row["seq_len"])
        for row in FACTS["partial"]
    ]
    assert {-1, 0, 1} <= set(wrong)


@pytest.mark.parametrize("row", FACTS["splits"], ids=range(len(FACTS["splits"])))
def test_splits_are_those_of_megatron_lm(row: Mapping[str, Any]) -> None:
    for split, expected in zip(SPLITS, row["ranges"], strict=True):
        first, last = document_range(row["documents"], row["shares"], split)
        assert [first, last] == expected if expected is not None else first == last


def slow_index(lengths: Sequence[int], *, seq_len: int, requested: int, seed: int) -> list[np.ndarray]:
    """The published formulas, token by token: all epochs' documents, every token's place, every seq_len-th."""
    tokens, count = sum(lengths), len(lengths)
    epochs = next(n for n in range(1, 10**6) if n * tokens >= requested * seq_len + 1)
    before, per_epoch = ((epochs - 1) * tokens - 1) // seq_len, (tokens - 1) // seq_len
    separate = epochs > 1 and requested - before < int(0.80 * per_epoch)
    state = np.random.RandomState(seed)
    groups = (
        [list(range(count)) * (epochs - 1), list(range(count))] if separate else [[*range(count)] * epochs]
    )
    documents: list[int] = []
    for group in groups:
        shuffled = np.array(group, dtype=np.int32)
        state.shuffle(shuffled)
        documents += shuffled.tolist()
    places = [(entry, token) for entry, number in enumerate(documents) for token in range(lengths[number])]
    starts = [(0, 0), *places[seq_len : len(places) : seq_len]]
    num_samples = (len(places) - 1) // seq_len
    shuffle: list[int] = []
    for first, last in ((0, before), (before, num_samples)) if separate else ((0, num_samples),):
        part = np.arange(first, last, dtype=np.uint32)
        state.shuffle(part)
        shuffle += part.tolist()
    return [np.array(documents), np.array(starts[: num_samples + 1]), np.array(shuffle)]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 1),
    seq_len=st.integers(1, 16),
    requested=st.integers(1, 400),
    seed=st.integers(0, 2**32 - 1),
)
@example(lengths=[10] * 20, seq_len=4, requested=49, seed=1)  # exactly the samples of an epoch
@example(lengths=[10] * 20, seq_len=4, requested=50, seed=1)  # one sample of a second epoch
@example(lengths=[40] * 50, seq_len=4, requested=897, seed=1)  # 398 of 499, less than int(0.80 * 499)
@example(lengths=[40] * 50, seq_len=4, requested=898, seed=1)  # 399
def test_equals_the_formulas(lengths: list[int], seq_len: int, requested: int, seed: int) -> None:
    plan = plan_index(sum(lengths), seq_len=seq_len, requested=requested)
    done: list[int] = []
    arrays = build_index(
        np.array(lengths, np.int32),
        0,
        len(lengths),
        plan=plan,
        seq_len=seq_len,
        seed=seed,
        progress=done.append,
    )
    documents, samples, shuffle = slow_index(lengths, seq_len=seq_len, requested=requested, seed=seed)
    assert arrays.documents.tolist() == documents.tolist()
    assert arrays.samples.tolist() == samples.tolist()
    assert arrays.shuffle.tolist() == shuffle.tolist()
    assert sum(done) == documents.size + 2 * plan.num_samples
    assert plan.num_samples >= requested
    assert sorted(shuffle.tolist()) == list(range(plan.num_samples)), "each sample once"


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_shuffles_are_those_of_numpy(dtype: type) -> None:
    for seed in (0, 1, 2**32 - 1):
        ours, theirs = legacy_generator(seed), np.random.RandomState(seed)
        for size in (0, 1, 2, 3, 127, 128, 129, 130, 1_000, 70_001):
            mine, expected = np.arange(size, dtype=dtype), np.arange(size, dtype=dtype)
            ours.shuffle(mine)
            theirs.shuffle(expected)
            assert (mine == expected).all()


@pytest.mark.parametrize("limit", [1, 2, 6, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 1])
def test_bounded_numbers_beyond_32_bits(limit: int) -> None:
    """What a shuffle of more than 2^32 entries draws; RandomState.randint rejects in the same way."""
    state = np.random.RandomState(7)
    _, words, position, *_ = state.get_state()
    twister = MersenneTwister(state=words.astype(np.uint32), position=position)
    expected = [int(state.randint(0, limit + 1, dtype=np.uint64)) for _ in range(50)]
    assert [twister.draw(limit) for _ in range(50)] == expected


def test_wide_documents_give_the_same_index() -> None:
    """int64, for files of more sequences than Megatron-LM can address."""
    lengths, documents = np.array([3, 0, 9, 4], np.int32), np.array([2, 1, 0, 3, 3], np.int32)
    narrow, wide = np.empty((5, 2), np.int32), np.empty((5, 2), np.int64)
    megatron_sample_index(lengths=lengths, documents=documents, seq_len=4, rows=narrow)
    megatron_sample_index(lengths=lengths, documents=documents.astype(np.int64), seq_len=4, rows=wide)
    assert narrow.tolist() == wide.tolist() == [[0, 0], [0, 4], [0, 8], [3, 0], [4, 0]]


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=12), size=st.integers(0, 400))
def test_blend_takes_the_source_furthest_behind(weights: list[float], size: int) -> None:
    shares = np.array(weights) / np.sum(weights)
    taken = np.zeros(len(weights))
    sources, drawn = build_blend(shares, size)
    for position in range(size):
        source = int(np.argmax(shares * max(position, 1.0) - taken))
        assert (sources[position], drawn[position]) == (source, taken[source])
        taken[source] += 1
    assert (sources.dtype, drawn.dtype) == (np.int16, np.int64)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1),
    seq_len=st.integers(1, 20),
    requested=st.integers(1, 40),
    drop_last=st.booleans(),
)
def test_masked_samples_are_cut_at_documents(
    lengths: list[int],
    seq_len: int,
    requested: int,
    drop_last: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Segments, positions and labels token by token, also of the padding of a partial sample."""
    if not drop_last:
        lengths = [max(1, length) for length in lengths]  # what an empty last document does: below
    source = write(tmp_path_factory.mktemp("data") / "s", lengths)
    data = DataConfig(
        sources=(source,),
        order="megatron",
        megatron=MegatronOrderConfig(drop_last=drop_last),
        seq_len=seq_len,
        split=(0, 1, 0),
    )
    dataset = BlendedDataset.build(data, split="valid", seed=3, planned_samples=requested)
    arrays = dataset.sources[0].arrays
    begins = np.concatenate([[0], np.cumsum(lengths)])
    stream = [
        (entry, token, int(begins[number]) + token)
        for entry, number in enumerate(arrays.documents.tolist())
        for token in range(lengths[number])
    ]
    batch = dataset.sample_batch(np.arange(dataset.num_samples))
    for row, sample in enumerate(arrays.shuffle.tolist()):
        window = stream[sample * seq_len : (sample + 1) * seq_len + 1]
        previous, segment, position = None, -1, 0
        for column in range(seq_len):
            here = window[column] if column < len(window) else ("padding", 0, 0)
            after = window[column + 1] if column + 1 < len(window) else ("padding", 0, 0)
            is_new = here[0] != previous
            segment, position, previous = segment + is_new, 0 if is_new else position + 1, here[0]
            assert batch.input_ids[row, column] == here[2]
            is_followed = here[0] == after[0] != "padding"
            assert batch.labels[row, column] == (after[2] if is_followed else -100)
            assert batch.segment_ids[row, column] == segment
            assert batch.position_ids[row, column] == position


def test_a_partial_sample_in_an_empty_document_is_an_error(tmp_path: Path) -> None:
    """Megatron-LM's index has the token -1 there and its assertion fails."""
    data = DataConfig(
        sources=(write(tmp_path / "s", [0, 0, 5]),),
        order="megatron",
        megatron=MegatronOrderConfig(drop_last=False),
        seq_len=3,
        split=(0, 1, 0),
    )
    refused = []
    for seed in range(12):
        last = np.arange(3, dtype=np.int32)
        np.random.RandomState(seed).shuffle(last)
        build = partial(BlendedDataset.build, data, split="valid", seed=seed, planned_samples=1)
        if last[-1] == 2:
            assert build().num_samples == 2
            continue
        with pytest.raises(DataError, match="begins in an empty document"):
            build()
        refused.append(seed)
    assert 0 < len(refused) < 12


def megatron_blend(tmp_path: Path, **settings: Any) -> DataConfig:
    sources = tuple(
        replace(write(tmp_path / name, [7, 12, 3, 30] * 30, start=start, dtype=dtype), weight=weight)
        for name, start, weight, dtype in (("a", 0, 0.7, "int32"), ("b", 5_000, 0.3, "uint16"))
    )
    return DataConfig(
        sources=sources,
        order="megatron",
        seq_len=8,
        split=(969, 30, 1),
        megatron=MegatronOrderConfig(**settings),
    )


def open_train(data: DataConfig, *, planned: int = 480, seed: int = 5) -> BlendedDataset:
    return BlendedDataset.build(data, split="train", seed=seed, planned_samples=planned, vocab_size=20_000)


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 4), (2, 2), (4, 2)])
def test_any_layout_and_any_resume_sees_the_same_batches(tmp_path: Path, dp_size: int, micro: int) -> None:
    dataset = open_train(megatron_blend(tmp_path))
    expected = dataset.sample_batch(np.arange(48)).input_ids
    ranks = []
    for rank in range(dp_size):
        steps = []
        for start, stop in ((0, 2), (2, 6)):
            with TrainLoader(
                dataset,
                global_batch_size=8,
                micro_batch_size=micro,
                dp_rank=rank,
                dp_size=dp_size,
                start_step=start,
                prefetch=1,
            ) as loader:
                steps += [next(loader) for _ in range(start, stop)]
        ranks.append(steps)
    merged = [batch.input_ids for step in zip(*ranks, strict=True) for rank in step for batch in rank]
    assert torch.equal(torch.cat(merged), expected)


def test_the_index_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one of several processes (threads here: the lock is of the file); then it is only mapped."""
    data, built = megatron_blend(tmp_path, cache=str(tmp_path / "cache")), []

    def counting(*arguments: Any, **named: Any) -> Any:
        built.append(arguments[2])
        return build_index(*arguments, **named)

    monkeypatch.setattr(megatron_order, "build_index", counting)
    threads = [threading.Thread(target=open_train, args=(data,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 2, "one for each source"
    assert not list(tmp_path.glob("*.order"))
    first = open_train(data)
    assert isinstance(first.sources[0].arrays.samples, np.memmap)
    open_train(data, seed=6)
    open_train(data, planned=2_000)
    open_train(replace(data, seq_len=9))
    assert len(built) == 8


def test_a_damaged_or_unwritable_index_is_an_error(tmp_path: Path) -> None:
    data = megatron_blend(tmp_path)
    open_train(data)
    samples = next((tmp_path / "a.order").glob("*/samples.npy"))
    content = samples.read_bytes()
    samples.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.order/.*: damaged index .*delete it to build it again"):
        open_train(data)
    for entry, token in ((10**6, 0), (-5, 0), (2, 40), (2, -40)):
        row = np.array([entry, token], dtype="<i4").tobytes()
        samples.write_bytes(content[: 128 + 8 * 3] + row + content[128 + 8 * 4 :])
        dataset = open_train(data)
        with pytest.raises(DataError, match="does not fit the documents"):
            dataset.sample_batch(np.arange(dataset.num_samples))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    with pytest.raises(DataError, match=r"cannot be written: .* set data\.megatron\.cache"):
        open_train(megatron_blend(tmp_path, cache=str(blocked)))


def test_what_the_order_cannot_serve_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = megatron_blend(tmp_path)
    dataset = open_train(data)
    with pytest.raises(DataError, match=r"sample 481 of a Megatron-LM order of 480 samples, planned for 480"):
        dataset.sample_batch(np.array([481]))
    with pytest.raises(
        DataError, match=r"token id \d+ at token \d+ of document \d+ is outside the vocabulary"
    ):
        BlendedDataset.build(data, split="train", seed=5, planned_samples=480, vocab_size=500).sample_batch(
            np.arange(480)
        )
    with pytest.raises(ConfigError, match="needs a seed in 0"):
        open_train(data, seed=2**32)
    with pytest.raises(DataError, match=r"no sample of 9 tokens in the test split .*0 documents, 0 tokens"):
        BlendedDataset.build(data, split="test", seed=5, planned_samples=4)
    monkeypatch.setattr(
        megatron_order, "build_blend", lambda weights, size: build_blend(weights[::-1].copy(), size)
    )
    with pytest.raises(DataError, match=r"takes 336 samples of .*b, which was planned for 188: .*surplus"):
        open_train(replace(data, megatron=MegatronOrderConfig(cache=str(tmp_path / "other"))))


def test_fingerprint_follows_what_decides_the_order(tmp_path: Path) -> None:
    data = megatron_blend(tmp_path)
    prints = {
        open_train(data).fingerprint,
        open_train(data, planned=481).fingerprint,
        open_train(data, seed=6).fingerprint,
        open_train(replace(data, sources=data.sources[::-1])).fingerprint,
        open_train(replace(data, split=(900, 99, 1))).fingerprint,
        open_train(replace(data, sources=data.sources[:1])).fingerprint,
        open_train(
            replace(data, sources=data.sources[:1], megatron=MegatronOrderConfig(blend_single=True))
        ).fingerprint,
    }
    assert len(prints) == 7
    dataset = open_train(data)
    assert dataset.state(3) is None
    dataset.require_consumed(None, step=3, checkpoint=tmp_path)


def test_damaged_bin_is_an_error(tmp_path: Path) -> None:
    data = megatron_blend(tmp_path)
    path = bin_path(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="truncated"):
        open_train(data)


@pytest.mark.parametrize(("split", "expected"), [("train", 800), ("valid", 4 * 8 * 3), ("test", 8 * 3)])
def test_planned_samples(split: Split, expected: int) -> None:
    """Megatron-LM: iterations * batch; (iterations // eval_interval + 1) * eval_iters * batch."""
    config = run_config(Path("x"), Path("y"), train={"steps": 100, "global_batch_size": 8})
    config = replace(config, train=replace(config.train, eval_interval=30, eval_batches=3))
    assert planned_samples(config, split) == expected
    pinned = replace(config, data=replace(config.data, megatron=MegatronOrderConfig(train_samples=1_600)))
    assert planned_samples(pinned, split) == {"train": 1_600, "valid": 7 * 8 * 3, "test": 8 * 3}[split]
