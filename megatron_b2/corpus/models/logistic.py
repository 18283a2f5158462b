"""Logistic regression of a few features, and the AUC: float64, no library, the same answer everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_b2.errors import InputError

ITERATIONS = 100
TOLERANCE = 1e-9
RIDGE = 1e-4
"""L2 penalty on the weights of standardised features, when all examples together weigh 1."""
MIN_RIDGE = 1e-9
"""The same on the bias; keeps a class without examples from -infinity."""


@dataclass(frozen=True)
class Logistic:
    """Multinomial: class 0 against each of K others, log(p_k / p_0) = (features - mean) / scale @ weights_k
    + bias_k.

    p_0 is high only where no other class fits: each class k has a direction of its own.
    """

    mean: np.ndarray
    """float64 [F]."""
    scale: np.ndarray
    """float64 [F]."""
    weights: np.ndarray
    """float64 [F + 1, K]; the last row is the bias."""

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """float64 [N, K + 1] from features [N, F]; NaN where a feature is NaN."""
        return _softmax(_inputs(features, self.mean, self.scale) @ self.weights)

    def to_json(self) -> dict[str, Any]:
        """All numbers, exactly."""
        return {"mean": self.mean.tolist(), "scale": self.scale.tolist(), "weights": self.weights.tolist()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Logistic:
        """What `to_json` gave."""
        return cls(np.array(stored["mean"]), np.array(stored["scale"]), np.array(stored["weights"]))


def fit_logistic(features: np.ndarray, classes: np.ndarray, num_classes: int) -> Logistic:
    """Fit features float64 [N, F] to classes int [N] by Newton's method with an L2 penalty.

    Class 0 weighs as much as all others, which weigh the same; a class without examples is never predicted.
    Raises InputError when class 0, or every other class, has no example.
    """
    counts = np.bincount(classes, minlength=num_classes)
    others = int((counts[1:] > 0).sum())
    if not counts[0] or not others:
        raise InputError(f"{counts.tolist()} examples by class; the first and another need some")
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    inputs = _inputs(features, mean, scale)
    share = np.where(classes == 0, 0.5, 0.5 / others) / counts[classes]
    target = np.eye(num_classes)[classes][:, 1:]
    num_inputs, num_others = inputs.shape[1], num_classes - 1
    penalty = np.tile(np.where(np.arange(num_inputs) < num_inputs - 1, RIDGE, MIN_RIDGE), num_others)
    solution = np.zeros(num_inputs * num_others)
    for _ in range(ITERATIONS):
        weights = solution.reshape(num_others, num_inputs).T
        probability = _softmax(inputs @ weights)[:, 1:]
        gradient = (inputs.T @ (share[:, None] * (probability - target))).T.ravel() + penalty * solution
        curvature = np.diag(penalty)
        for j in range(num_others):
            for k in range(num_others):
                weight = share * probability[:, j] * ((j == k) - probability[:, k])
                block = (
                    slice(j * num_inputs, (j + 1) * num_inputs),
                    slice(k * num_inputs, (k + 1) * num_inputs),
                )
                curvature[block] += inputs.T @ (weight[:, None] * inputs)
        step = np.linalg.solve(curvature, gradient)
        solution -= step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < TOLERANCE:
            break
    return Logistic(mean, scale, solution.reshape(num_others, num_inputs).T)


def _inputs(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.column_stack([(features - mean) / scale, np.ones(len(features))])


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [N, K + 1] of logits [N, K] and a first one that is 0."""
    full = np.column_stack([np.zeros(len(logits)), logits])
    full = np.exp(full - full.max(axis=1, keepdims=True))
    return full / full.sum(axis=1, keepdims=True)


def roc_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve: how often a value of `positive` is above one of `negative`, ties counting
    half.

    NaN ranks lowest. Raises InputError when either has no values.
    """
    if not len(positive) or not len(negative):
        raise InputError(f"{len(positive)} positive and {len(negative)} negative values; both are needed")
    values = np.nan_to_num(np.concatenate([positive, negative]).astype(np.float64), nan=-np.inf)
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    above = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(above / len(positive) / len(negative))
