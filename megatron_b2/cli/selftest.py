"""b2 selftest: prove on this machine that every parallel layout equals one process."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from megatron_b2.cli.main import run
from megatron_b2.errors import InputError
from megatron_b2.files.atomic import atomic_file, write_json

HELP = "prove on this machine that every parallel layout equals one process"


@dataclass(frozen=True)
class Layouts:
    """Train a tiny model in every legal layout on forked CPU processes and compare it with one process.

    Exit status 1 if any loss, gradient norm, gradient or parameter differs by more than 1e-5, or if a layout
    that should be refused is not (all combinations of settings are checked, whatever is chosen to run).

    Example: b2 selftest layouts --quick
    """

    quick: bool = False
    """A subset in which each pair of settings occurs at least once."""
    full: bool = False
    """Every legal layout (more than an hour on 2 cores)."""
    seed: int = 0
    """Of weights, data and the choice of the subset."""
    only: str = ""
    """Run only the cases whose name contains this text, such as "tp2" or "zero_bubble"."""
    json: Path | None = None
    """Also write the results to this file."""
    markdown: Path | None = None
    """Also write the table of docs/layouts.md to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options: Layouts = tyro.extras.subcommand_cli_from_dict(
        {"layouts": Layouts}, prog="b2 selftest", description=HELP, args=argv
    )
    return _layouts(options)


def _layouts(options: Layouts) -> int:
    from megatron_b2.testing import layouts

    if options.quick == options.full:
        raise InputError("b2 selftest layouts takes either --quick or --full")
    legal = layouts.legal_cases()
    chosen = legal if options.full else layouts.covering_cases(legal, seed=options.seed)
    if not (chosen := [case for case in chosen if options.only in case.name]):
        of = "legal" if options.full else "--quick"
        raise InputError(
            f"--only {options.only!r} is in the name of no {of} layout; names are like {legal[0].name!r}"
            + ("" if options.full else ", and --full has more of them")
        )
    illegal = sum(bool(layouts.broken_rules(case)) for case in layouts.cases())
    wrong = layouts.wrong_refusals()
    print("\n".join([*wrong, f"{illegal} illegal layouts: {len(wrong) or 'none'} treated wrongly"]))
    print(
        f"{len(legal)} legal layouts on up to {layouts.MAX_RANKS} processes; {len(chosen)} to run", flush=True
    )
    references = layouts.reference_traces(chosen, seed=options.seed)
    start, results = time.monotonic(), []
    for index, case in enumerate(chosen, 1):
        result = layouts.compare(case, references, seed=options.seed)
        results.append(result)
        left = (time.monotonic() - start) / index * (len(chosen) - index)
        progress = f"{index:4}/{len(chosen)}  left {left:4.0f} s"
        print(f"{progress}  {case.name:46}  {result.describe()}", flush=True)
    failed = [result for result in results if not result.passed]
    print(f"{len(results) - len(failed)} of {len(results)} equal one process to {layouts.TOLERANCE:.0e}")
    if options.json is not None:
        write_json(options.json, [asdict(result) | {"passed": result.passed} for result in results])
    if options.markdown is not None:
        with atomic_file(options.markdown) as file:
            file.write(layouts.markdown_table(results).encode())
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(run(main))
