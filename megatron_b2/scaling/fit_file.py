"""fit.json: the laws of one point table, with all that predictions and pictures need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron_b2.errors import InputError
from megatron_b2.files.atomic import write_json
from megatron_b2.scaling.fit import (
    LawFit,
    Sample,
    fit_law,
    identify,
    leave_largest_out,
    report_of,
    require_usable,
)
from megatron_b2.scaling.laws import LAWS, ComputeLaw, SizeLaw, as_array
from megatron_b2.scaling.options import FitOptions
from megatron_b2.scaling.points import Point, PointTable, finals, read_document

FORMAT: Final = "megatron_b2 scaling fit 1"


def fit_table(table: PointTable, options: FitOptions) -> dict[str, Any]:
    """Fit both laws to the final points of `table`; the content of fit.json.

    The compute law takes the longest run of each size, the size law all runs. The size law is left out, with
    the reason, where the runs cannot tell its constants apart; the compute law must fit. Raises InputError.
    """
    options.check()
    points = finals(table, options.loss)
    longest = _longest(points)
    compute = [_sample(point, options, inputs=(point.flops(options.compute),)) for point in longest]
    size = [
        _sample(point, options, inputs=(float(point.num_parameters), float(point.tokens))) for point in points
    ]
    laws = {ComputeLaw.name: _report(ComputeLaw.name, compute, options)}
    try:
        require_usable(SizeLaw.name, size)
        laws[SizeLaw.name] = _report(SizeLaw.name, size, options)
    except InputError as error:
        laws[SizeLaw.name] = {"form": SizeLaw.form, "left_out": str(error)}
    return {
        "format": FORMAT,
        "loss": options.loss,
        "smoothing": table.smoothing if options.loss == "train_ce" else "none",
        "compute": options.compute,
        "huber": options.huber,
        "bootstrap": f"{options.draws} replicates by run, seed {options.seed}",
        "notes": _notes(longest, compute),
        "laws": laws,
        "curves": _curves(table, options),
    }


def write_fit(path: Path, fit: Mapping[str, Any]) -> None:
    """Write fit.json."""
    write_json(path, fit)


def read_fit(path: Path) -> dict[str, Any]:
    """A fit.json. Raises InputError when it is none."""
    return read_document(path, FORMAT, "b2 scaling fit")


def law_of(fit: Mapping[str, Any], kind: str) -> LawFit | None:
    """A law of a fit.json; none when it was left out. Raises InputError when the file is damaged."""
    report = fit["laws"].get(kind, {})
    if "theta" not in report:
        return None
    try:
        samples = [
            Sample(run=s["run"], inputs=tuple(s["inputs"]), flops=s["flops"], loss=s["loss"])
            for s in report["runs"]
        ]
        return LawFit(
            law=LAWS[kind](origin=tuple(report["origin"])),
            theta=as_array([report["theta"]])[0],
            draws=as_array(report["draws"]),
            noise=np.asarray(report["noise"], dtype=np.float64),
            samples=tuple(samples),
            confidence=report["confidence"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the fit of {kind} is damaged ({error!r}): make it again with `b2 scaling fit`"
        ) from error


def _longest(points: Sequence[Point]) -> list[Point]:
    """Of each size the run with the most tokens, smallest size first."""
    best: dict[int, Point] = {}
    for point in sorted(points, key=lambda point: point.tokens):
        best[point.num_parameters] = point
    return sorted(best.values(), key=lambda point: point.num_parameters)


def _sample(point: Point, options: FitOptions, *, inputs: tuple[float, ...]) -> Sample:
    loss = point.loss(options.loss)
    assert loss is not None, "finals() has looked"
    return Sample(run=point.run, inputs=inputs, flops=point.flops(options.compute), loss=loss)


def _report(kind: str, samples: Sequence[Sample], options: FitOptions) -> dict[str, Any]:
    fit = fit_law(kind, samples, options)
    return report_of(
        fit,
        left_out=leave_largest_out(kind, samples, options),
        identification=identify(fit, kind, options),
    )


def _notes(points: Sequence[Point], samples: Sequence[Sample]) -> list[str]:
    """What a reader should know of the runs of the compute law."""
    notes = []
    ranked = sorted(samples, key=lambda sample: sample.flops)
    for less, more in pairwise(ranked):
        if more.loss >= less.loss:
            notes.append(
                f"{more.run} has more compute than {less.run} and no lower loss ({more.loss:.4f}, "
                f"{less.loss:.4f})"
            )
    tokens = [point.tokens for point in points]
    ratios = [point.tokens / point.num_parameters for point in points]
    if max(tokens) > 1.01 * min(tokens) and max(ratios) > 1.01 * min(ratios):
        notes.append(
            f"the runs have neither the same tokens ({min(tokens):.3g} to {max(tokens):.3g}) nor the same "
            f"tokens for each parameter ({min(ratios):.3g} to {max(ratios):.3g}): the compute law holds "
            "for no one way of growing"
        )
    return notes


def _curves(table: PointTable, options: FitOptions) -> list[dict[str, Any]]:
    """Loss against compute along each run, for pictures."""
    curves: dict[str, dict[str, Any]] = {}
    for point in table.points:
        curve = curves.setdefault(
            point.run,
            {"run": point.run, "num_parameters": point.num_parameters, "tokens": 0, "flops": [], "loss": []},
        )
        if (loss := point.loss(options.loss)) is not None:
            curve["tokens"] = point.tokens
            curve["flops"].append(point.flops(options.compute))
            curve["loss"].append(loss)
    return list(curves.values())
