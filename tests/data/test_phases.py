"""Data that changes during a run: what is consumed stays, each sample once an epoch, any resume, any layout."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.config.schema import DataConfig, PhaseConfig, SourceConfig
from megatron_b2.data.blended import BlendedDataset
from megatron_b2.data.indexed import IndexedDatasetBuilder
from megatron_b2.data.loader import TrainLoader
from megatron_b2.data.order import Blend, derive_key, permute
from megatron_b2.data.phases import Phase, PhasedOrder, PhaseSource
from megatron_b2.errors import CheckpointError, DataError

EVERYTHING = np.arange(1_500)


@st.composite
def schedules(draw: st.DrawFn) -> list[Phase]:
    """1 to 6 phases over up to 4 sources that come, go, grow and change their weight."""
    sizes: dict[int, int] = {}
    phases, start = [], 0
    for _ in range(draw(st.integers(1, 6))):
        sources = []
        for number in sorted(draw(st.sets(st.integers(0, 3), min_size=1))):
            sizes[number] = sizes.get(number, draw(st.integers(1, 60))) + draw(st.sampled_from([0, 0, 1, 25]))
            weight = draw(st.floats(0.05, 5))
            sources.append(PhaseSource(number=number, weight=weight, num_samples=sizes[number]))
        phases.append(Phase(start=start, sources=tuple(sources)))
        start += draw(st.integers(1, 350))
    return phases


def triples(order: PhasedOrder, positions: np.ndarray) -> list[tuple[int, int, int]]:
    return list(zip(*(part.tolist() for part in order.locate(positions)), strict=True))


@settings(max_examples=60, deadline=None)
@given(phases=schedules(), seed=st.integers(0, 3))
def test_each_sample_is_drawn_once_an_epoch(phases: list[Phase], seed: int) -> None:
    """Also by epochs during which samples joined: a finished one has every sample there was at its end."""
    order = PhasedOrder(phases, seed=seed, split=0)
    drawn = triples(order, EVERYTHING)
    assert len(set(drawn)) == len(drawn), "no sample twice in an epoch"
    sizes: dict[int, int] = {}
    starts = {phase.start: phase for phase in phases}
    running: dict[int, int] = {}
    counts: Counter[tuple[int, int]] = Counter()
    ends: dict[tuple[int, int], int] = {}
    for position, (source, epoch, sample) in enumerate(drawn):
        for listed in starts[position].sources if position in starts else ():
            sizes[listed.number] = listed.num_samples
        assert 0 <= sample < sizes[source]
        before = running.get(source, 0)
        assert epoch in (before, before + 1), "epochs follow each other"
        if epoch > before:
            assert counts[source, before] == ends[source, before], "an epoch ends when all was drawn"
        running[source] = epoch
        counts[source, epoch] += 1
        ends[source, epoch] = sizes[source]
    assert all(counts[key] <= ends[key] for key in counts)


@settings(max_examples=60, deadline=None)
@given(phases=schedules(), kept=st.integers(1, 6))
def test_a_phase_does_not_touch_what_was_consumed(phases: list[Phase], kept: int) -> None:
    whole, begun = PhasedOrder(phases, seed=1, split=0), PhasedOrder(phases[:kept], seed=1, split=0)
    end = phases[kept].start if kept < len(phases) else EVERYTHING.size
    assert triples(whole, EVERYTHING[:end]) == triples(begun, EVERYTHING[:end])


@settings(max_examples=40, deadline=None)
@given(phases=schedules(), positions=st.lists(st.integers(0, EVERYTHING.size - 1), max_size=50))
def test_any_access_gives_the_same(phases: list[Phase], positions: list[int]) -> None:
    """One by one, in any order: nothing but the position counts. `drawn` is a running count."""
    order = PhasedOrder(phases, seed=2, split=1)
    drawn = triples(order, EVERYTHING)
    assert triples(order, np.array(positions, dtype=np.int64)) == [drawn[position] for position in positions]
    for position in positions:
        counts = Counter(source for source, _, _ in drawn[:position])
        assert {n: c for n, c in order.drawn(position).items() if c} == dict(counts)


@settings(max_examples=40, deadline=None)
@given(phases=schedules())
def test_every_phase_deals_by_its_weights(phases: list[Phase]) -> None:
    order = PhasedOrder(phases, seed=0, split=0)
    sources = order.locate(EVERYTHING)[0]
    ends = [*(phase.start for phase in phases[1:]), EVERYTHING.size]
    for index, (phase, end) in enumerate(zip(phases, ends, strict=True)):
        part = sources[phase.start : end]
        total = sum(source.weight for source in phase.sources)
        assert set(part.tolist()) <= {source.number for source in phase.sources}
        for source, weight in zip(phase.sources, order.weights(index), strict=True):
            assert weight == pytest.approx(source.weight / total, abs=1e-8)
            assert abs((part == source.number).sum() - part.size * weight) < Blend.BOUND


def test_one_phase_is_the_order_without_phases() -> None:
    """Blend and permutation, written out."""
    sizes = [40, 7]
    sources = tuple(
        PhaseSource(n, weight, size) for n, (weight, size) in enumerate(zip([3, 1], sizes, strict=True))
    )
    order = PhasedOrder([Phase(0, sources)], seed=9, split=2)
    numbers, drawn = Blend([3, 1]).locate(EVERYTHING)
    for position, (source, epoch, sample) in enumerate(triples(order, EVERYTHING)):
        assert source == numbers[position]
        assert epoch == drawn[position] // sizes[source]
        index = np.array([drawn[position] % sizes[source]])
        assert sample == permute(index, size=sizes[source], key=derive_key(9, 2, source, epoch))[0]


def test_a_new_phase_with_the_same_source_changes_nothing() -> None:
    source = PhaseSource(0, 1.0, 50)
    plain = PhasedOrder([Phase(0, (source,))], seed=1, split=0)
    split = PhasedOrder([Phase(0, (source,)), Phase(77, (replace(source, weight=3.0),))], seed=1, split=0)
    assert triples(plain, EVERYTHING) == triples(split, EVERYTHING)


def test_samples_that_join_before_an_epoch_begins_are_as_if_always_there() -> None:
    small, big = PhaseSource(0, 1.0, 50), PhaseSource(0, 1.0, 80)
    grown = triples(PhasedOrder([Phase(0, (small,)), Phase(100, (big,))], seed=1, split=0), EVERYTHING)
    always = triples(PhasedOrder([Phase(0, (big,))], seed=1, split=0), EVERYTHING)
    third = [(number, epoch, sample) for number, epoch, sample in always if epoch == 2]
    assert grown[100:180] == third


def test_joined_samples_are_spread_over_the_rest_of_the_epoch() -> None:
    """400 of 1,000 drawn, 600 join: each of the 1,200 left comes anywhere (means within 5 sigma), every epoch."""
    phases = [Phase(0, (PhaseSource(0, 1.0, 1_000),)), Phase(400, (PhaseSource(0, 1.0, 1_600),))]
    _, epochs, samples = PhasedOrder(phases, seed=3, split=0).locate(np.arange(4_800))
    rest = samples[400:1_600]
    assert (epochs[:1_600] == 0).all()
    assert (epochs[1_600:] == 1 + np.arange(3_200) // 1_600).all()
    sigma = 1_200 / 12**0.5
    for chosen in (rest >= 1_000, rest < 1_000):
        assert chosen.sum() == 600
        assert abs(np.flatnonzero(chosen).mean() - 600) < 5 * sigma / 600**0.5
    assert abs(np.corrcoef(np.arange(1_200), rest)[0, 1]) < 5 / 1_200**0.5


@pytest.mark.parametrize("starts", [[], [1], [0, 5, 5], [0, 7, 3]])
def test_phases_begin_one_after_the_other(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="phases start at"):
        PhasedOrder([Phase(start, (PhaseSource(0, 1.0, 5),)) for start in starts], seed=0, split=0)
    shrunk = [Phase(0, (PhaseSource(0, 1.0, 5),)), Phase(1, (PhaseSource(0, 1.0, 4),))]
    with pytest.raises(ValueError, match="4 samples, fewer than before"):
        PhasedOrder(shrunk, seed=0, split=0)


def test_many_appends_far_into_a_run() -> None:
    """A trillion tokens in, twenty appends, some in one epoch: exact and fast enough to ask anywhere."""
    size, phases = 10**8, []
    for number in range(21):
        start = number * 3 * 10**7
        phases.append(Phase(start, (PhaseSource(0, 2.0, size + number * 10**6), PhaseSource(1, 1.0, size))))
    order = PhasedOrder(phases, seed=0, split=0)
    positions = np.random.default_rng(0).integers(0, 7 * 10**8, 20_000)
    assert len(set(triples(order, np.unique(positions)))) == np.unique(positions).size
    assert sum(order.drawn(6 * 10**8).values()) == 6 * 10**8


GLOBAL_BATCH = 8


def write(prefix: Path, *, start: int, documents: int = 60) -> str:
    """Documents of 1 to 7 tokens that count up from `start`."""
    lengths = np.array([1 + i * 5 % 7 for i in range(documents)])
    with IndexedDatasetBuilder(prefix, dtype="int32") as builder:
        builder.add_documents(np.arange(start, start + lengths.sum()), lengths)
    return str(prefix)


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    names = ("zh", "en", "code", "zh2", "zh3")
    return {name: write(tmp_path / name, start=1_000 * i) for i, name in enumerate(names)}


def before(paths: dict[str, str]) -> DataConfig:
    sources = (SourceConfig(prefix=paths["zh"], weight=0.6), SourceConfig(prefix=paths["en"], weight=0.4))
    return DataConfig(sources=sources, seq_len=5, split=(0.9, 0.1, 0.0))


def changing(paths: dict[str, str]) -> DataConfig:
    """New weights from step 3, appended documents and a new source from 9, more documents without en from 14."""
    zh, en, code = (SourceConfig(prefix=paths[name]) for name in ("zh", "en", "code"))
    phases = (
        PhaseConfig(from_step=3, sources=(zh, replace(en, weight=3.0))),
        PhaseConfig(from_step=9, sources=(code, replace(zh, append=(paths["zh2"],)), en)),
        PhaseConfig(from_step=14, sources=(replace(zh, append=(paths["zh2"], paths["zh3"])), code)),
    )
    return replace(before(paths), phases=phases)


def open_train(data: DataConfig) -> BlendedDataset:
    return BlendedDataset.build(data, split="train", seed=4, vocab_size=5_000, global_batch_size=GLOBAL_BATCH)


def test_files_follow_the_phases(paths: dict[str, str]) -> None:
    """Tokens of the right files at the right steps, and none before."""
    dataset = open_train(changing(paths))
    tokens = dataset.sample_batch(np.arange(30 * GLOBAL_BATCH)).input_ids[:, 0].numpy()
    steps = np.arange(tokens.size) // GLOBAL_BATCH
    names = tokens // 1_000
    for span, expected in (
        ((0, 3), {0, 1}),
        ((3, 9), {0, 1}),
        ((9, 14), {0, 1, 2, 3}),
        ((14, 30), {0, 2, 3, 4}),
    ):
        assert set(names[(steps >= span[0]) & (steps < span[1])].tolist()) == expected
    assert abs(np.isin(names[: 3 * GLOBAL_BATCH], [0]).sum() - 0.6 * 3 * GLOBAL_BATCH) < 2
    assert abs((names[3 * GLOBAL_BATCH : 9 * GLOBAL_BATCH] == 1).sum() - 0.75 * 6 * GLOBAL_BATCH) < 2
    plain = open_train(before(paths)).sample_batch(np.arange(3 * GLOBAL_BATCH)).input_ids
    assert torch.equal(plain, dataset.sample_batch(np.arange(3 * GLOBAL_BATCH)).input_ids)


def test_a_sample_stands_in_the_file_that_locate_names(paths: dict[str, str]) -> None:
    dataset = open_train(changing(paths))
    positions = np.arange(40 * GLOBAL_BATCH)
    sources, epochs, samples = dataset.locate(positions)
    first = dataset.sample_batch(positions).input_ids[:, 0].numpy()
    for position in positions:
        source = dataset.sources[sources[position]]
        assert 0 <= samples[position] < source.num_samples
        assert first[position] == source.dataset.tokens[samples[position] * 5]
    drawn = set(zip(sources.tolist(), epochs.tolist(), samples.tolist(), strict=True))
    assert len(drawn) == positions.size


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_any_resume_and_any_layout_equals_the_whole_run(paths: dict[str, str], dp_size: int) -> None:
    """Phases are added when their time has come, as a user does; ranks change at every resume."""
    data = changing(paths)
    expected = open_train(data).sample_batch(np.arange(20 * GLOBAL_BATCH)).input_ids
    stops, merged = [0, 2, 3, 8, 9, 13, 14, 20], []
    for turn, (start, stop) in enumerate(pairwise(stops)):
        known = tuple(phase for phase in data.phases if phase.from_step < stop)
        dataset = open_train(replace(data, phases=known))
        ranks = dp_size if turn % 2 == 0 else 8 // dp_size
        steps: list[list[torch.Tensor]] = [[] for _ in range(start, stop)]
        for rank in range(ranks):
            with TrainLoader(
                dataset,
                global_batch_size=GLOBAL_BATCH,
                micro_batch_size=1,
                dp_rank=rank,
                dp_size=ranks,
                start_step=start,
            ) as loader:
                for step in steps:
                    step += [batch.input_ids for batch in next(loader)]
        merged += [batch for step in steps for batch in step]
    assert torch.equal(torch.cat(merged), expected)


def test_the_state_is_small_and_needed_only_with_phases(paths: dict[str, str]) -> None:
    assert open_train(before(paths)).state(5) is None
    dataset = open_train(changing(paths))
    assert dataset.fingerprint == open_train(before(paths)).fingerprint
    state = dataset.state(12)
    assert state is not None
    assert len(json.dumps(state)) < 1_000
    assert json.loads(json.dumps(state)) == state
    assert sum(state["drawn"]) == 12 * GLOBAL_BATCH
    assert [phase["from_step"] for phase in state["phases"]] == [3, 9, 14]
    valid = BlendedDataset.build(changing(paths), split="valid", seed=4)
    same = BlendedDataset.build(before(paths), split="valid", seed=4)
    assert valid.fingerprint == same.fingerprint, "validations of a run can be compared"
    assert valid.state(12) is None


def resume(data: DataConfig, state: object, *, step: int) -> None:
    open_train(data).require_consumed(
        json.loads(json.dumps(state)), step=step, checkpoint=Path("run/step_12")
    )


def test_future_phases_may_change(paths: dict[str, str]) -> None:
    data = changing(paths)
    state = open_train(data).state(9)
    first = data.phases[0]
    resume(data, state, step=9)
    resume(replace(data, phases=(first,)), state, step=9)
    resume(replace(data, phases=(first, replace(data.phases[2], from_step=10))), state, step=9)
    resume(before(paths), open_train(before(paths)).state(3), step=3)
    resume(data, open_train(before(paths)).state(3), step=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weight", r"data\.phases\[0\], which began at step 3, has changed, but .* up to step 12"),
        ("step", r"data\.phases\[1\], which began at step 9, has changed and begins at step 8 now"),
        ("removed", r"data\.phases\[1\], which began at step 9, is gone"),
        ("late", r"data\.phases\[1\], which began at step 9, is gone"),
        ("inserted", r"data\.phases\[2\], which begins at step 11, is new"),
        ("append", r"data\.phases\[1\], which began at step 9, has changed"),
        ("files", r"data\.phases\[1\], which began at step 9, has changed"),
    ],
)
def test_a_consumed_phase_may_not(paths: dict[str, str], change: str, message: str) -> None:
    data = changing(paths)
    state = open_train(data).state(12)
    one, two, three = data.phases
    if change == "files":
        write(Path(paths["code"]), start=2_500)
    changed = {
        "weight": (replace(one, sources=(one.sources[0], replace(one.sources[1], weight=2.9))), two, three),
        "step": (one, replace(two, from_step=8), three),
        "removed": (one, three),
        "late": (one, replace(two, from_step=12), three),
        "inserted": (one, two, replace(two, from_step=11), three),
        "append": (one, replace(two, sources=(two.sources[0], one.sources[0], two.sources[2]))),
        "files": data.phases,
    }
    with pytest.raises(CheckpointError, match=rf"^run/step_12: {message}"):
        resume(replace(data, phases=changed[change]), state, step=12)
    with pytest.raises(CheckpointError, match=r"a new phase may begin at step 12 or later"):
        resume(replace(data, phases=changed[change]), state, step=12)


def test_phases_of_a_run_that_had_none_begin_later(paths: dict[str, str]) -> None:
    """A checkpoint without a state, as of a run before it had phases."""
    with pytest.raises(CheckpointError, match=r"data\.phases\[0\], which begins at step 3, is new, but"):
        resume(changing(paths), None, step=4)


def test_another_count_of_draws_is_an_error(paths: dict[str, str]) -> None:
    state = {**open_train(changing(paths)).state(12), "drawn": [1, 2, 3]}
    with pytest.raises(
        CheckpointError, match=r"at step 12 the sources had given \[1, 2, 3\] samples, by these"
    ):
        resume(changing(paths), state, step=12)


def test_what_phases_add_must_be_there(paths: dict[str, str], tmp_path: Path) -> None:
    data = changing(paths)
    with pytest.raises(ValueError, match="global_batch_size is needed"):
        BlendedDataset.build(data, split="train", seed=4)
    Path(f"{paths['zh3']}.bin").unlink()
    with pytest.raises(DataError, match=r"zh3\.bin: no such file"):
        open_train(data)
    write(Path(paths["zh3"]), start=0, documents=1)
    with pytest.raises(
        DataError, match=r"no sample of 6 tokens in the train split .*zh3: 1 documents, 1 tokens"
    ):
        open_train(data)
