"""Sampling filters against the logits processors of transformers, and draws against their distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_b2.errors import InputError
from megatron_b2.model.sampling import filter_logits, sample


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([1, 5, 50, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999]),
    penalty=st.sampled_from([1.0, 1.1, 2.0, 0.8]),
)
def test_filters_equal_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 64, generator=generator) * 4
    previous = torch.randint(0, 64, (3, 20), generator=generator)
    reference = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
        ]
    )(previous, logits.clone())
    ours = filter_logits(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        previous_ids=previous,
    )
    assert torch.equal(ours, reference)
    row = filter_logits(
        logits[1],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        previous_ids=previous[1],
    )
    assert torch.equal(row, reference[1])


def test_defaults_change_nothing_and_inputs_stay_untouched() -> None:
    logits = torch.randn(50, dtype=torch.bfloat16)
    before = logits.clone()
    assert torch.equal(filter_logits(logits), logits.float())
    filter_logits(logits, repetition_penalty=2.0, previous_ids=torch.arange(50), top_p=0.5)
    assert torch.equal(logits, before)


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]])
    assert sample(logits, temperature=0.0, top_k=1, top_p=0.1).tolist() == [1, 0]


def test_draws_follow_the_distribution_and_the_seed() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).expand(20_000, 3)
    ids = sample(logits, generator=torch.Generator().manual_seed(1))
    share = torch.bincount(ids, minlength=3) / len(ids)
    assert share.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    assert torch.equal(ids, sample(logits, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(ids, sample(logits, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}]
)
def test_settings_out_of_range_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match=str(next(iter(bad.values())))):
        filter_logits(torch.zeros(4), **bad)  # type: ignore[arg-type]
