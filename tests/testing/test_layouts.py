"""What the layout matrix makes of bad numbers, and its cases."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_b2.testing import layouts

NAN, INF = float("nan"), float("inf")
CASE = layouts.Case("7b", 1, 1, 2, 1, False, 1, False, "1f1b")
FIELDS = ("losses", "grad_norm", "gradients", "parameters")


def trace(steps: float = 1.0, gradient: float = 1.0, parameter: float = 1.0) -> layouts.Trace:
    """A run of one parameter of two elements; the second of each is given."""

    def pieces(value: float) -> dict[str, Any]:
        return {"a": [((0,), torch.tensor([1.0, value]))], "b": [((0,), torch.ones(2))]}

    rows = torch.ones(layouts.STEPS, 4, dtype=torch.float64)
    rows[1, 1] = rows[2, 3] = steps
    return layouts.Trace(rows, pieces(gradient), pieces(parameter))


@pytest.mark.parametrize("field", FIELDS)
def test_nan_does_not_pass(field: str) -> None:
    good = layouts.Comparison(CASE, 0.0, 0.0, 0.0, 0.0)
    assert good.passed
    assert not replace(good, **{field: NAN}).passed
    assert not replace(good, **{field: 2 * layouts.TOLERANCE}).passed


@pytest.mark.parametrize(
    ("bad", "fields"),
    [
        (trace(steps=NAN), ("losses", "grad_norm")),
        (trace(gradient=NAN), ("gradients",)),
        (trace(parameter=NAN), ("parameters",)),
        (trace(parameter=INF), ("parameters",)),
    ],
    ids=["steps", "gradients", "parameters", "infinite"],
)
def test_a_nan_of_any_rank_is_an_infinite_difference(bad: layouts.Trace, fields: tuple[str, ...]) -> None:
    empty = layouts.Trace(bad.steps, {"a": [], "b": []}, {"a": [], "b": []})
    references = {(CASE.style, CASE.global_batch): trace()}
    with patch.object(layouts, "run_ranks", lambda *_args, **_options: [bad, empty]):
        found = layouts.compare(CASE, references, seed=0)
    assert not found.passed
    assert {name for name in FIELDS if getattr(found, name) == INF} == set(fields)
    if "losses" not in fields:
        assert found.worst_parameter == "a"


def test_rounding_alone_takes_a_tenth_of_the_tolerance() -> None:
    """One process with other micro-batches adds up in another order: no layout can be nearer than that."""
    config = layouts.reference_config("13b", seed=0)
    one = layouts.trace_run(config)
    other = layouts.trace_run(replace(config, train=replace(config.train, micro_batch_size=8)))
    for kind in ("gradients", "parameters"):
        differences = layouts._differences([getattr(other, kind)], getattr(one, kind))
        assert max(differences.values()) < layouts.TOLERANCE / 10, kind


def test_every_case_has_its_own_name() -> None:
    names = Counter(case.name for case in (*layouts.cases(), *layouts.EXTRA_CASES))
    twice = {name for name, count in names.items() if count > 1}
    assert twice <= {case.name for case in layouts.EXTRA_CASES}  # an extra case may be in the product too
    assert len({case.name for case in layouts.legal_cases()}) == len(layouts.legal_cases())


def test_names_of_cases_with_default_settings_stay() -> None:
    case = layouts.Case("13b", 2, 2, 1, 2, True, 1, False, "zero_bubble")
    assert case.name == "13b tp2 pp2 dp1 cp2 sp zero_bubble zero1"
    more = replace(case, context_method="ring", recompute="full", micro_batch=2)
    assert more.name == "13b tp2 pp2 dp1 cp2 sp zero_bubble zero1 ring recompute-full mb2"


def test_every_pipeline_has_a_steady_state() -> None:
    for case in layouts.legal_cases():
        micro_batches = case.global_batch // (case.micro_batch * case.data)
        assert case.pipeline == 1 or micro_batches > case.pipeline, case.name


def test_the_extra_cases_run_what_the_product_does_not() -> None:
    extra = layouts.EXTRA_CASES
    assert {case.context_method for case in extra} >= {"ring"}
    assert {case.recompute for case in extra} == {"none", "selective", "full"}
    assert {case.micro_batch for case in extra} == {1, 2}
    assert {case.context for case in extra if case.context_method == "ring"} == {2, 4}
    for case in extra:
        train, parallel = case.config(seed=0).train, case.config(seed=0).parallel
        assert (train.recompute, train.micro_batch_size) == (case.recompute, case.micro_batch)
        assert parallel.context_method == case.context_method
