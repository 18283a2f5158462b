"""Logistic regression against its own optimality conditions and torch; AUC against all pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2.corpus.models.logistic import RIDGE, Logistic, fit_logistic, roc_auc
from megatron_b2.errors import InputError

VALUES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.0, float("nan")]), min_size=1, max_size=12)


@given(VALUES, VALUES)
def test_auc_is_the_share_of_pairs_in_order(positive: list[float], negative: list[float]) -> None:
    def rank(value: float) -> float:
        return -np.inf if np.isnan(value) else value

    wins = [0.5 if rank(p) == rank(n) else float(rank(p) > rank(n)) for p in positive for n in negative]
    assert roc_auc(np.array(positive), np.array(negative)) == pytest.approx(np.mean(wins))


def test_auc_needs_both() -> None:
    with pytest.raises(InputError, match="0 positive"):
        roc_auc(np.array([]), np.array([1.0]))


def data(classes: int, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    return rng.normal(size=(rows, 3)) * [1, 5, 0.1] + np.eye(classes, 3)[labels] * [2, 5, 0.2] + 3, labels


@pytest.mark.parametrize("classes", [2, 4])
def test_fit_minimises_the_weighted_loss(classes: int) -> None:
    """The gradient of the penalised, class-weighted cross-entropy, taken by torch, is zero at the solution."""
    features, labels = data(classes)
    model = fit_logistic(features, labels, classes)
    inputs = torch.tensor((features - features.mean(axis=0)) / features.std(axis=0))
    weights = torch.tensor(model.weights, requires_grad=True)
    logits = torch.cat(
        [torch.zeros(len(labels), 1, dtype=torch.float64), inputs @ weights[:-1] + weights[-1]], 1
    )
    share = torch.tensor([0.5, *[0.5 / (classes - 1)] * (classes - 1)]) / torch.tensor(np.bincount(labels))
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    loss = (share[labels] * losses).sum() + RIDGE / 2 * weights[:-1].square().sum()
    loss.backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() < 1e-7
    expected = torch.softmax(logits, 1).detach().numpy()
    np.testing.assert_allclose(model.probabilities(features), expected, atol=1e-12)
    again = Logistic.from_json(json.loads(json.dumps(model.to_json())))
    assert np.array_equal(again.probabilities(features), model.probabilities(features))


def test_separable_classes_and_a_class_without_examples() -> None:
    features = np.array([[0.0], [0.1], [5.0], [5.1]])
    model = fit_logistic(features, np.array([0, 0, 1, 1]), 3)
    probabilities = model.probabilities(np.array([[0.0], [5.0], [np.nan]]))
    assert probabilities[0, 0] > 0.9
    assert probabilities[1, 1] > 0.9
    assert probabilities[:2, 2].max() < 1e-3
    assert np.isnan(probabilities[2]).all()
    with pytest.raises(InputError, match="need some"):
        fit_logistic(features, np.zeros(4, int), 2)
