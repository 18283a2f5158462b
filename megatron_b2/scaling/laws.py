"""The two forms of a scaling law, both a sum of powers, and the inputs that they read from points.

The logarithm of such a sum is a log-sum-exp of terms that are linear in the parameters theta
(Hoffmann et al. 2022, appendix D.3): log L = logsumexp_k(X_k . theta). One solver therefore serves both.
Inputs are centred at their geometric mean, the `origin`, so that the parameters are nearly independent.

Shapes: P points, K terms of the sum, M parameters, I inputs.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

SMALLEST_SHARE = 1e-3
"""L_inf and E are at least this share of the smallest loss: as good as 0, and its logarithm exists (our
choice)."""


@dataclass(frozen=True, kw_only=True)
class Law(ABC):
    """A sum of powers of its inputs."""

    origin: tuple[float, ...]
    """The value of each input at which the coefficients are the terms themselves: [I]."""

    name: ClassVar[str]
    form: ClassVar[str]
    source: ClassVar[str]
    constants_of: ClassVar[tuple[str, ...]]
    """Names of the constants, as the form writes them: [M]."""
    floor: ClassVar[int]
    """Index of the parameter that is the logarithm of the irreducible loss."""

    @abstractmethod
    def design(self, inputs: Floats) -> Floats:
        """Inputs [P, I] as X, float64 [P, K, M]."""

    @abstractmethod
    def bounds(self, losses: Floats) -> tuple[Floats, Floats]:
        """Lowest and highest theta, [M] each, for losses [P]."""

    @abstractmethod
    def starts(self, losses: Floats) -> Floats:
        """Where fits begin, [starts, M]."""

    @abstractmethod
    def constants(self, theta: Floats) -> Floats:
        """Constants of the form, [..., M], from theta [..., M]."""

    def log_loss(self, theta: Floats, inputs: Floats) -> Floats:
        """Natural logarithm of the loss, [..., P], for theta [..., M] and inputs [P, I]."""
        return log_sum(self.design(inputs), theta)[0]

    def named(self, theta: Floats) -> dict[str, float]:
        """The constants by name."""
        return dict(zip(self.constants_of, map(float, self.constants(theta)), strict=True))


@dataclass(frozen=True, kw_only=True)
class ComputeLaw(Law):
    """L = a C^b + L_inf. theta = (log of the first term at the origin, b, log L_inf)."""

    name = "compute"
    form = "L = a*C^b + L_inf"
    source = "Baichuan 2 report, section 2.6, after Henighan et al. 2020"
    constants_of = ("a", "b", "L_inf")
    floor = 2

    def design(self, inputs: Floats) -> Floats:
        """See Law; the input is C in FLOPs."""
        x = np.log(inputs[:, 0] / self.origin[0])
        one, zero = np.ones_like(x), np.zeros_like(x)
        return np.stack([np.stack([one, x, zero], -1), np.stack([zero, zero, one], -1)], axis=1)

    def bounds(self, losses: Floats) -> tuple[Floats, Floats]:
        """See Law: the loss falls, no faster than 1/C^2."""
        low, high = np.log(losses.min()), np.log(losses.max())
        return (
            np.array([low - 20, -2.0, low + np.log(SMALLEST_SHARE)]),
            np.array([high + 5, -1e-4, low]),
        )

    def starts(self, losses: Floats) -> Floats:
        """See Law: a grid of L_inf and b; the first term is what is left at the middle."""
        smallest, middle = losses.min(), np.exp(np.log(losses).mean())
        return np.array(
            [
                (np.log(middle - share * smallest + 1e-3 * smallest), b, np.log(share * smallest))
                for share in (0.01, 0.3, 0.6, 0.8, 0.9, 0.97)
                for b in (-0.02, -0.05, -0.1, -0.2, -0.5, -1.0)
            ]
        )

    def constants(self, theta: Floats) -> Floats:
        """See Law: a, b, L_inf for C in FLOPs and loss in nats."""
        a = np.exp(theta[..., 0] - theta[..., 1] * np.log(self.origin[0]))
        return np.stack([a, theta[..., 1], np.exp(theta[..., 2])], axis=-1)


@dataclass(frozen=True, kw_only=True)
class SizeLaw(Law):
    """L = E + A/N^alpha + B/D^beta. theta = (log E, log A', alpha, log B', beta), A' and B' at the origin."""

    name = "size_and_tokens"
    form = "L = E + A/N^alpha + B/D^beta"
    source = "Hoffmann et al. 2022, approach 3"
    constants_of = ("E", "A", "alpha", "B", "beta")
    floor = 0

    def design(self, inputs: Floats) -> Floats:
        """See Law; the inputs are N (parameters without embedding and head) and D (tokens)."""
        n, d = (np.log(inputs[:, i] / self.origin[i]) for i in (0, 1))
        one, zero = np.ones_like(n), np.zeros_like(n)
        return np.stack(
            [
                np.stack([one, zero, zero, zero, zero], -1),
                np.stack([zero, one, -n, zero, zero], -1),
                np.stack([zero, zero, zero, one, -d], -1),
            ],
            axis=1,
        )

    def bounds(self, losses: Floats) -> tuple[Floats, Floats]:
        """See Law: both powers are between 0 and 2, as in Hoffmann et al."""
        low, high = np.log(losses.min()), np.log(losses.max())
        return (
            np.array([low + np.log(SMALLEST_SHARE), low - 20, 1e-4, low - 20, 1e-4]),
            np.array([low, high + 5, 2.0, high + 5, 2.0]),
        )

    def starts(self, losses: Floats) -> Floats:
        """See Law: a grid over all five, as Hoffmann et al. do."""
        smallest, middle = losses.min(), np.exp(np.log(losses).mean())
        rows = []
        for share, part in itertools.product((0.01, 0.3, 0.6, 0.9), (0.1, 0.5, 0.9)):
            left = np.log(middle - share * smallest + 1e-3 * smallest)
            for alpha, beta in itertools.product((0.1, 0.3, 0.6, 1.2), repeat=2):
                rows.append(
                    (np.log(share * smallest), left + np.log(part), alpha, left + np.log(1 - part), beta)
                )
        return np.array(rows)

    def constants(self, theta: Floats) -> Floats:
        """See Law: E, A, alpha, B, beta for N in parameters, D in tokens, loss in nats."""
        a = np.exp(theta[..., 1] + theta[..., 2] * np.log(self.origin[0]))
        b = np.exp(theta[..., 3] + theta[..., 4] * np.log(self.origin[1]))
        return np.stack([np.exp(theta[..., 0]), a, theta[..., 2], b, theta[..., 4]], axis=-1)


LAWS: Mapping[str, type[ComputeLaw] | type[SizeLaw]] = {"compute": ComputeLaw, "size_and_tokens": SizeLaw}


def centre(inputs: Floats) -> tuple[float, ...]:
    """The geometric mean of each input."""
    return tuple(map(float, np.exp(np.log(inputs).mean(axis=0))))


def log_sum(design: Floats, theta: Floats) -> tuple[Floats, Floats]:
    """log L [..., P] and its gradient by theta [..., P, M], for X [P, K, M] and theta [..., M]."""
    terms = np.einsum("pkm,...m->...pk", design, theta)
    total = np.logaddexp.reduce(terms, axis=-1)
    shares = np.exp(terms - total[..., None])
    return total, np.einsum("...pk,pkm->...pm", shares, design)


def as_array(rows: Sequence[Sequence[Any]]) -> Floats:
    """Rows of numbers as float64."""
    return np.asarray(rows, dtype=np.float64)
