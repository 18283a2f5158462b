"""What a fit says of a run that was not made: its loss, and the best size for a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np

from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import InputError
from megatron_b2.scaling.compute import run_flops
from megatron_b2.scaling.fit import LawFit
from megatron_b2.scaling.fit_file import law_of
from megatron_b2.scaling.laws import LAWS, ComputeLaw, Floats, SizeLaw, as_array

FAR: Final = 10.0
"""Extrapolation in compute beyond which a prediction is warned of (our choice). The report itself went
about 10 times beyond its largest ladder run, from 3B on 1T tokens to 13B on 2.6T."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The loss of one run by one law, in nats a token."""

    law: str
    form: str
    loss: float
    low: float
    high: float
    """Of the band that the run falls into with the fit's confidence."""


def predict_run(fit: Mapping[str, Any], config: RunConfig, *, tokens: float) -> dict[str, Any]:
    """The loss of `config`'s model after `tokens` tokens, by every law of fit.json, with warnings.

    The model's sequence length counts in C. Raises InputError for tokens that are not positive.
    """
    if not 0 < tokens < float("inf"):
        raise InputError(f"--tokens {tokens:g}: must be positive")
    model = config.model
    flops = run_flops(model, seq_len=config.data.seq_len, tokens=tokens, convention=fit["compute"])
    inputs = {
        ComputeLaw.name: (flops,),
        SizeLaw.name: (float(model.num_block_parameters), float(tokens)),
    }
    laws = {kind: law for kind in LAWS if (law := law_of(fit, kind)) is not None}
    predictions = []
    for kind, law in laws.items():
        loss, low, high = (float(value[0]) for value in law.predict(as_array([inputs[kind]])))
        predictions.append(Predicted(law=kind, form=law.law.form, loss=loss, low=low, high=high))
    reached = max(sample.flops for law in laws.values() for sample in law.samples)
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "run": config.name,
        "num_parameters": model.num_block_parameters,
        "total_parameters": model.num_parameters,
        "tokens": tokens,
        "flops": flops,
        "compute": fit["compute"],
        "loss": fit["loss"],
        "confidence": next(iter(laws.values())).confidence,
        "extrapolation": flops / reached,
        "predictions": [vars(item) for item in predictions],
        "warnings": _warnings(fit, config, tokens=tokens, extrapolation=flops / reached),
    }


def _warnings(fit: Mapping[str, Any], config: RunConfig, *, tokens: float, extrapolation: float) -> list[str]:
    found = []
    if extrapolation > FAR:
        found.append(
            f"{extrapolation:,.0f} times the compute of the largest run that was fitted: the band knows the "
            "noise of the runs, not whether the law still holds there"
        )
    fitted = {run["run"] for run in fit["laws"][ComputeLaw.name]["runs"]}
    runs = [curve for curve in fit["curves"] if curve["run"] in fitted]
    budgets = [curve["tokens"] for curve in runs]
    ratios = [curve["tokens"] / curve["num_parameters"] for curve in runs]
    ratio = tokens / config.model.num_block_parameters
    if not _near(tokens, budgets) and not _near(ratio, ratios):
        found.append(
            f"{tokens:.3g} tokens, {ratio:.3g} for each parameter, are neither as many as in the fitted runs "
            f"({min(budgets):.3g} to {max(budgets):.3g}) nor as many for each parameter "
            f"({min(ratios):.3g} to {max(ratios):.3g}): {ComputeLaw.form} assumes one of them"
        )
    for report in fit["laws"].values():
        for reason in report.get("irreducible_loss", {}).get("reasons", ()):
            found.append(f"{report['form']}: {reason}")
    return found


def _near(value: float, values: list[int] | list[float]) -> bool:
    return 0.99 * min(values) <= value <= 1.01 * max(values)


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Size and tokens of the lowest loss under a budget."""

    num_parameters: Floats
    """N, without embedding and head."""
    tokens: Floats
    """D."""


def optimum(constants: Floats, flops: float) -> Optimum:
    """N and D that minimise E + A/N^alpha + B/D^beta where 6 N D = `flops`, in closed form.

    N = G (C/6)^(beta/(alpha+beta)), D = (C/6)/N with G = (alpha A / (beta B))^(1/(alpha+beta)) (Hoffmann et
    al. 2022, equation 4). `constants` [..., 5] are E, A, alpha, B, beta; the results have the leading shape.
    """
    _, a, alpha, b, beta = np.moveaxis(constants, -1, 0)
    product = flops / 6
    factor = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    size = factor * product ** (beta / (alpha + beta))
    return Optimum(num_parameters=size, tokens=product / size)


def best_size(fit: Mapping[str, Any], *, flops: float) -> dict[str, Any]:
    """N, D and loss at the optimum of a budget of 6 N D = `flops`, with bands.

    Raises InputError when the fit has no size law, or the budget is not positive.
    """
    if not 0 < flops < float("inf"):
        raise InputError(f"--flops {flops:g}: must be positive")
    law = law_of(fit, SizeLaw.name)
    if law is None:
        reason = fit["laws"].get(SizeLaw.name, {}).get("left_out", "it is not there")
        raise InputError(f"the fit has no law of size and tokens: {reason}")
    best = optimum(law.law.constants(law.theta), flops)
    drawn = optimum(law.law.constants(law.draws), flops)
    loss, low, high = law.predict(as_array([[float(best.num_parameters), float(best.tokens)]]))
    reached = max(6 * sample.inputs[0] * sample.inputs[1] for sample in law.samples)
    return {
        "flops": flops,
        "num_parameters": float(best.num_parameters),
        "num_parameters_band": _band(drawn.num_parameters, law),
        "tokens": float(best.tokens),
        "tokens_band": _band(drawn.tokens, law),
        "tokens_per_parameter": float(best.tokens / best.num_parameters),
        "loss": float(loss[0]),
        "loss_band": [float(low[0]), float(high[0])],
        "confidence": law.confidence,
        "extrapolation": flops / reached,
    }


def _band(values: Floats, law: LawFit) -> list[float]:
    tail = 100 * (1 - law.confidence) / 2
    return [float(value) for value in np.percentile(values, [tail, 100 - tail])]
