"""`b2 scaling`: how low the loss will go, from a ladder of small runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import tyro
from tyro.conf import OmitArgPrefixes, Positional, subcommand

from megatron_b2.cli.main import run
from megatron_b2.cli.repeated import gather_repeated
from megatron_b2.config.loader import load_config
from megatron_b2.config.presets import PREFIX, preset_names
from megatron_b2.errors import InputError
from megatron_b2.files.atomic import write_json
from megatron_b2.scaling.budgets import Budget
from megatron_b2.scaling.compute import CONVENTIONS
from megatron_b2.scaling.ladder import SCRIPT, Cluster, plan_ladder, write_ladder
from megatron_b2.scaling.options import WINDOW, FitOptions
from megatron_b2.scaling.points import read_points
from megatron_b2.scaling.rungs import TABLE_10, read_rungs

HELP: Final = "fit a scaling law to a ladder of small runs, and predict a large one"


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Write the configurations of a ladder, a SLURM array script and a manifest.

    Without --table the sizes are the seven of the report (Table 10), with its hyper-parameters.

    Example: b2 scaling ladder --out runs/ladder --budget 1e12 --base ladder-data.toml
    """

    out: Path
    """Folder of the ladder; its runs go to OUT/runs."""
    budget: tuple[str, ...]
    """Tokens of every run, as 1e12; or tokens for each parameter (without embedding and head), as 20x.
    Several make a run of each size for each."""
    table: Path | None = None
    """CSV file of other sizes: columns hidden, layers, heads and, if wanted, max_lr."""
    base: str = "preset:_ladder"
    """What all runs share: a TOML file with data, tokenizer and hyper-parameters, or preset:<name>."""
    cluster: Annotated[Cluster, OmitArgPrefixes] = field(default_factory=Cluster)


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Read the metrics of finished runs into one table of losses and FLOPs, as JSON and CSV.

    Example: b2 scaling collect runs/ladder --out points.json
    """

    runs: Positional[tuple[Path, ...]]
    """Folders of runs (their output_dir), or of ladders."""
    out: Path
    """The table; the same table goes to a .csv beside it."""
    window: int = WINDOW
    """Steps that the training loss is averaged over."""
    skip: bool = False
    """Leave out runs that are missing, unfinished or diverged, and say so, instead of stopping."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Fit L = a*C^b + L_inf to the final losses, and L = E + A/N^alpha + B/D^beta to several budgets.

    Example: b2 scaling fit points.json --out fit.json
    """

    points: Positional[Path]
    """A table of `b2 scaling collect`."""
    out: Path = Path("fit.json")
    """The fit; a picture goes to a .png beside it."""
    options: Annotated[FitOptions, OmitArgPrefixes] = field(default_factory=FitOptions)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Predict the loss of a model after so many tokens, with its band.

    Example: b2 scaling predict fit.json --model baichuan2-13b --tokens 2.6e12
    """

    fit: Positional[Path]
    """A fit of `b2 scaling fit`."""
    model: str
    """TOML file, preset:<name> or a preset's name alone: its model and sequence length are predicted."""
    tokens: float | None = None
    """Training tokens (default: those of the configuration)."""
    out: Path | None = None
    """Also write the prediction as JSON, with the time it was made; a picture goes to a .png beside it."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """Choose the size and the tokens of the lowest loss under a budget of FLOPs (C = 6ND).

    Example: b2 scaling best fit.json --flops 1e21
    """

    fit: Positional[Path]
    """A fit of `b2 scaling fit` that has the law of size and tokens."""
    flops: float
    """The budget, 6 x parameters (without embedding and head) x tokens."""
    out: Path | None = None
    """Also write the answer as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; see `b2 scaling --help`."""
    command = tyro.cli(
        Annotated[Ladder, subcommand("ladder")]
        | Annotated[Collect, subcommand("collect")]
        | Annotated[Fit, subcommand("fit")]
        | Annotated[Predict, subcommand("predict")]
        | Annotated[Best, subcommand("best")],
        prog="b2 scaling",
        description=HELP,
        args=gather_repeated(argv, ("--budget",)),
    )
    match command:
        case Ladder():
            _ladder(command)
        case Collect():
            _collect(command)
        case Fit():
            _fit(command)
        case Predict():
            _predict(command)
        case Best():
            _best(command)
    return 0


def _ladder(command: Ladder) -> None:
    for name, value in (("nodes", command.cluster.nodes), ("gpus-per-node", command.cluster.gpus_per_node)):
        if value < 1:
            raise InputError(f"--{name} {value}: must be 1 or more")
    if not re.fullmatch(r"[\d:-]+", command.cluster.time):
        raise InputError(f"--time {command.cluster.time!r}: write it as SLURM does, hours:minutes:seconds")
    if not command.budget:
        raise InputError("--budget needs at least one value: tokens, as 1e12, or tokens a parameter, as 20x")
    rungs = TABLE_10 if command.table is None else read_rungs(command.table)
    budgets = [Budget.parse(text) for text in command.budget]
    ranks = command.cluster.nodes * command.cluster.gpus_per_node
    runs = plan_ladder(rungs, budgets, out=command.out, base=command.base, world_size=ranks)
    manifest = write_ladder(runs, out=command.out, base=command.base, cluster=command.cluster)
    print(f"{'run':<28}{'N (M)':>10}{'tokens':>18}{'steps':>11}" + "".join(f"{c:>14}" for c in CONVENTIONS))
    for item in manifest["runs"]:
        flops = "".join(f"{item['flops'][name]:>14.3g}" for name in CONVENTIONS)
        print(
            f"{item['name']:<28}{item['num_parameters'] / 1e6:>10,.2f}{item['tokens']:>18,}"
            f"{item['steps']:>11,}{flops}"
        )
    total = "".join(f"{sum(r['flops'][name] for r in manifest['runs']):>14.3g}" for name in CONVENTIONS)
    print(f"{'FLOPs of all':<67}{total}\n\nsbatch {command.out / SCRIPT}")


def _collect(command: Collect) -> None:
    from megatron_b2.scaling.collect import collect

    if command.window < 1:
        raise InputError(f"--window {command.window}: must be 1 or more")
    if not command.runs:
        raise InputError("give at least one folder of a run or ladder")
    collected = collect(command.runs, window=command.window, skip=command.skip)
    for problem in collected.left_out:
        print(f"left out: {problem}", file=sys.stderr)
    table = collected.table
    table.write(command.out)
    print(f"{'run':<28}{'N (M)':>10}{'D':>12}{'training':>12}{'6ND':>12}{'train':>9}{'valid':>9}")
    for point in table.final:
        losses = "".join(
            f"{'-' if ce is None else f'{ce:.4f}':>9}" for ce in (point.train_ce, point.valid_ce)
        )
        print(
            f"{point.run:<28}{point.num_parameters / 1e6:>10,.2f}{point.tokens:>12.4g}"
            f"{point.flops_training:>12.4g}{point.flops_6nd:>12.4g}{losses}"
        )
    print(
        f"{len(table.points)} points of {len(table.final)} runs in {command.out}; "
        f"training loss: {table.smoothing}"
    )


def _fit(command: Fit) -> None:
    from megatron_b2.scaling.fit_file import fit_table, write_fit
    from megatron_b2.scaling.plot import plot_fit

    fit = fit_table(read_points(command.points), command.options)
    write_fit(command.out, fit)
    picture = plot_fit(fit, command.out.with_suffix(".png"))
    for note in fit["notes"]:
        print(f"note: {note}")
    for report in fit["laws"].values():
        _print_law(report)
    print(f"\nloss: {fit['loss']}; FLOPs: {fit['compute']}; {fit['bootstrap']}\n{command.out}, {picture}")


def _print_law(report: Mapping[str, Any]) -> None:
    print(f"\n{report['form']}")
    if "left_out" in report:
        print(f"  not fitted: {report['left_out']}")
        return
    share = 100 * report["intervals_confidence"]
    print(f"  constants, and intervals that hold together with {share:g} %")
    for name, value in report["constants"].items():
        low, high = report["intervals"][name]
        print(f"    {name:<6} {value:>12.5g}   {low:.5g} to {high:.5g}")
    deviations = [abs(item["deviation"]) for item in report["runs"]]
    print(f"  {len(deviations)} runs, which deviate by at most {100 * max(deviations):.2f} %")
    if (left := report["largest_left_out"]) is not None:
        print(
            f"  without {left['run']}: predicted {left['predicted']:.4f} "
            f"({left['low']:.4f} to {left['high']:.4f}), measured {left['loss']:.4f}, "
            f"error {100 * left['error']:+.2f} %"
        )
    irreducible = report["irreducible_loss"]
    if irreducible["identified"]:
        low, high = irreducible["interval"]
        print(f"  irreducible loss between {low:.4g} and {high:.4g} (profile)")
    for reason in irreducible["reasons"]:
        print(f"  the irreducible loss is NOT identified: {reason}")


def _predict(command: Predict) -> None:
    from megatron_b2.scaling.fit_file import read_fit
    from megatron_b2.scaling.plot import plot_fit
    from megatron_b2.scaling.predict import predict_run

    fit, config = read_fit(command.fit), load_config(_config_source(command.model)).config
    tokens = config.tokens_per_step * config.train.steps if command.tokens is None else command.tokens
    result = predict_run(fit, config, tokens=tokens)
    print(
        f"{result['run']}: {result['num_parameters']:,} parameters without embedding and head, {tokens:.4g} "
        f"tokens, {result['flops']:.4g} FLOPs ({result['compute']})\n"
        f"{result['extrapolation']:.2f} times the largest fitted run"
    )
    for item in result["predictions"]:
        print(
            f"  {item['form']:<32} {item['loss']:.4f}   {100 * result['confidence']:g} % band "
            f"{item['low']:.4f} to {item['high']:.4f}"
        )
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    if command.out is not None:
        write_json(command.out, result)
        picture = plot_fit(fit, command.out.with_suffix(".png"), predictions=[result])
        print(f"made at {result['made_at']}; {command.out}, {picture}")


def _config_source(model: str) -> str:
    """What `load_config` reads: a preset also by its name alone, if no file has that name."""
    is_preset = model in preset_names() and not Path(model).exists()
    return f"{PREFIX}{model}" if is_preset else model


def _best(command: Best) -> None:
    from megatron_b2.scaling.fit_file import read_fit
    from megatron_b2.scaling.predict import best_size

    result = best_size(read_fit(command.fit), flops=command.flops)
    share = f"{100 * result['confidence']:g} %"
    for title, key in (("parameters", "num_parameters"), ("tokens", "tokens"), ("loss", "loss")):
        low, high = result[f"{key}_band"]
        print(f"{title:<24}{result[key]:>12.4g}   {share} band {low:.4g} to {high:.4g}")
    print(f"{'tokens for each parameter':<24}{result['tokens_per_parameter']:>11.4g}")
    print(f"{result['extrapolation']:.3g} times the largest fitted run")
    if command.out is not None:
        write_json(command.out, result)


if __name__ == "__main__":
    sys.exit(run(main))
