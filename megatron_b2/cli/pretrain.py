"""`b2 pretrain`: train a model from one TOML file, on one process or a thousand."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from megatron_b2.cli.config_arguments import ConfigArguments, Flag, parse
from megatron_b2.cli.main import run
from megatron_b2.config.loader import ResolvedConfig
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import InputError
from megatron_b2.training.signals import EXIT_REQUEUE, StopSignals

HELP = "pre-train a model from one TOML file"

USAGE = "b2 pretrain CONFIG [--dry-run] [--table.key VALUE ...]"
DESCRIPTION = """Pre-train a model. The same file runs under every launcher:

  b2 pretrain run.toml --train.steps 100                          one process
  deepspeed --module megatron_b2.cli.pretrain run.toml            all GPUs of this machine
  torchrun --nproc-per-node 8 -m megatron_b2.cli.pretrain run.toml
  srun python -m megatron_b2.cli.pretrain run.toml                see examples/slurm

Run it again to continue from the newest checkpoint. SIGTERM and SIGUSR1 save and exit with status 75."""

FLAGS: Mapping[str, Flag] = {
    "dry-run": Flag("print sizes, schedule and memory, check the inputs, and stop"),
    "world-size": Flag("processes that --dry-run plans for (default 1)", value="N"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 completed, 75 stopped by a signal after saving."""
    arguments = parse(
        sys.argv[1:] if argv is None else argv, usage=USAGE, description=DESCRIPTION, flags=FLAGS
    )
    if arguments is None:
        return 0
    if "dry-run" in arguments.flags:
        return _dry_run(arguments)
    if "world-size" in arguments.flags:
        raise InputError("--world-size only plans a --dry-run; the launcher decides how many processes run")
    with StopSignals() as signals:  # before the slow imports: a signal may come at once
        return _train(arguments, signals)


def _dry_run(arguments: ConfigArguments) -> int:
    from megatron_b2.parallel.comm import SingleComm
    from megatron_b2.training.plan import plan_run
    from megatron_b2.training.pretrain import open_inputs
    from megatron_b2.training.progress import terminal
    from megatron_b2.training.summary import print_plan

    size = arguments.flags.get("world-size", "1")
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"--world-size {size!r} is not a positive whole number")
    resolved = arguments.load()
    config = _chosen(resolved, world_size=int(size), is_first=True)
    console = terminal()
    print_plan(config, plan_run(config, world_size=int(size)), console=console)
    inputs = open_inputs(config, comm=SingleComm(), world_size=int(size), provenance=resolved.provenance)
    epochs = config.train.steps * config.train.global_batch_size / inputs.train.num_samples
    console.print(
        f"inputs are in order: {inputs.train.num_samples:,} training samples an epoch ({epochs:.2f} epochs), "
        f"{inputs.valid.num_samples if inputs.valid else 0:,} for validation; "
        + (f"would resume from {inputs.resume.path}" if inputs.resume else "would start anew"),
        soft_wrap=True,
    )
    return 0


def _chosen(resolved: ResolvedConfig, *, world_size: int, is_first: bool) -> RunConfig:
    """With parallel.auto, what fits the memory; the first rank says why."""
    if not resolved.config.parallel.auto:
        return resolved.config
    from megatron_b2.layouts.auto import resolve_auto

    choice = resolve_auto(resolved.config, world_size=world_size, provenance=resolved.provenance)
    if is_first:
        print("\n".join(choice.reasons()), flush=True)
    return choice.config


def _train(arguments: ConfigArguments, signals: StopSignals) -> int:
    from datetime import timedelta

    from megatron_b2.parallel.launch import LaunchEnvironment, initialize_distributed, shutdown_distributed
    from megatron_b2.training.events import Outcome
    from megatron_b2.training.pretrain import pretrain

    resolved = arguments.load()
    env = LaunchEnvironment.detect()
    config = _chosen(resolved, world_size=env.world_size, is_first=env.rank == 0)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    comm = initialize_distributed(env, timeout=timeout)
    outcome = pretrain(config, comm=comm, device=env.device, signals=signals, provenance=resolved.provenance)
    if outcome is Outcome.PREEMPTED:
        signals.ignore()
    shutdown_distributed()  # not after an error: it could wait for ranks that are stuck
    return 0 if outcome is Outcome.COMPLETED else EXIT_REQUEUE


if __name__ == "__main__":
    sys.exit(run(main))
