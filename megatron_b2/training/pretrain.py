"""A whole pre-training run: check everything, build, resume, train, sum up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megatron_b2.checkpoint.store import CheckpointReader
from megatron_b2.checkpoint.weights import WeightSource, load_weights, model_differences, open_weights
from megatron_b2.config.checks import check_for_training
from megatron_b2.config.encode import to_toml
from megatron_b2.config.schema import RunConfig
from megatron_b2.data.blended import BlendedDataset
from megatron_b2.data.loader import TrainLoader
from megatron_b2.data.megatron_order import planned_samples
from megatron_b2.data.splits import Split
from megatron_b2.engine.base import Engine
from megatron_b2.engine.build import build_engine, initialize_engine
from megatron_b2.errors import CheckpointError, TokenizerError
from megatron_b2.files.atomic import atomic_file, write_json
from megatron_b2.parallel.comm import Comm
from megatron_b2.tokenizer import load_tokenizer
from megatron_b2.training.checkpoints import CONFIG_FILE, RunCheckpoints
from megatron_b2.training.determinism import GarbageCollection, set_determinism
from megatron_b2.training.evaluate import Validator, count_batches
from megatron_b2.training.events import Callback, Outcome, RunState
from megatron_b2.training.metrics import JsonlSink, MetricsRecorder, read_metrics
from megatron_b2.training.plot import plot_metrics
from megatron_b2.training.progress import ProgressDisplay, terminal
from megatron_b2.training.signals import StopSignals
from megatron_b2.training.summary import print_summary, summarize
from megatron_b2.training.tensorboard import TensorBoardSink
from megatron_b2.training.trainer import Trainer
from megatron_b2.training.watch import WatchCallback, watch_run

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
PICTURE_FILE = "curves.png"
PREEMPTED_FILE = "PREEMPTED"
"""Present while a run waits to be continued: torchrun hides exit status 75, a batch script can look here."""


@dataclass(frozen=True)
class RunInputs:
    """What a run reads, opened and checked."""

    train: BlendedDataset
    valid: BlendedDataset | None
    checkpoints: RunCheckpoints
    resume: CheckpointReader | None


def pretrain(
    config: RunConfig,
    *,
    comm: Comm,
    device: torch.device,
    signals: StopSignals,
    provenance: Mapping[str, str] | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
) -> Outcome:
    """Run `config` on the ranks of `comm`, continuing where its output_dir stopped.

    `provenance` (key -> where it was set) makes messages point at the setting. `callbacks` are added to the
    built-in ones. Rank 0 writes metrics.jsonl, tensorboard/, curves.png, summary.json, config.toml and
    checkpoints/ into output_dir; nothing is written before every check has passed. When the outcome is
    PREEMPTED, all ranks have passed a barrier after the checkpoint was complete. A run that is complete
    already is left as it is. Raises a B2Error otherwise. Several ranks are watched from here to the last
    barrier: see `training/watch.py`.
    """
    with watch_run(config, comm=comm) as watch:
        return _pretrain(
            config,
            comm=comm,
            device=device,
            signals=signals,
            provenance=provenance,
            callbacks=callbacks,
            console=console or terminal(),
            watch=watch,
        )


def _pretrain(
    config: RunConfig,
    *,
    comm: Comm,
    device: torch.device,
    signals: StopSignals,
    provenance: Mapping[str, str] | None,
    callbacks: Sequence[Callback],
    console: Console,
    watch: WatchCallback,
) -> Outcome:
    set_determinism(seed=config.train.seed, deterministic=config.train.deterministic)
    inputs = open_inputs(config, comm=comm, provenance=provenance)
    if (summary := completed_summary(config, inputs=inputs, comm=comm)) is not None:
        if comm.rank == 0:
            console.print(f"{config.name} is complete; a larger train.steps continues it", soft_wrap=True)
            print_summary(summary, console=console)
        return Outcome.COMPLETED
    engine = build_engine(config, comm=comm, device=device, crumbs=watch.watchdog.crumbs)
    for group in engine.point_to_point_groups:
        watch.watchdog.ignore_group(group)
    inputs.checkpoints.attach(engine)
    state = start_state(config, engine=engine, inputs=inputs)
    output = Path(config.output_dir)
    reporting: list[Callback] = []
    if comm.rank == 0:
        with atomic_file(output / CONFIG_FILE) as file:
            file.write(to_toml(config, provenance=provenance).encode())
        (output / PREEMPTED_FILE).unlink(missing_ok=True)
        origin = f"resumed from {inputs.resume.path}" if inputs.resume is not None else "starting"
        console.print(f"{config.name}: {origin} at step {state.step} of {config.train.steps}", soft_wrap=True)
        used = ", ".join(f"{choice.op} {choice.backend}" for choice in engine.op_choices)
        console.print(f"operations: {used}", soft_wrap=True)
        reporting = rank_zero_callbacks(
            config, num_devices=comm.size, resume_step=state.step, console=console
        )
    with train_loader(config, inputs.train, engine=engine, start_step=state.step) as batches:
        trainer = Trainer(
            config,
            engine=engine,
            batches=batches,
            state=state,
            checkpoints=inputs.checkpoints,
            signals=signals,
            validator=None
            if inputs.valid is None
            else Validator.of_dataset(inputs.valid, config=config, engine=engine),
            callbacks=[watch, GarbageCollection(), *reporting, *callbacks],
        )
        outcome = trainer.fit()
    if comm.rank == 0:
        report(config, trainer=trainer, outcome=outcome, console=console)
    comm.barrier()  # a rank that exits with 75 early makes srun kill the others: none may still be writing
    return outcome


def open_inputs(
    config: RunConfig,
    *,
    comm: Comm,
    world_size: int | None = None,
    provenance: Mapping[str, str] | None = None,
) -> RunInputs:
    """Open and check all that the run reads: layout, tokenizer, data, checkpoint. Writes nothing. Collective.

    `world_size` is for a dry run, which checks for other ranks than its own.
    """
    check_for_training(config, world_size=world_size or comm.size, provenance=provenance)
    fingerprint: str | None = None
    model_file: bytes | None = None
    if config.tokenizer.path:
        tokenizer = load_tokenizer(config.tokenizer.path)
        if tokenizer.vocab_size != config.model.vocab_size:
            raise TokenizerError(
                f"{config.tokenizer.path} has {tokenizer.vocab_size} pieces but model.vocab_size = "
                f"{config.model.vocab_size}; set model.vocab_size = {tokenizer.vocab_size}"
            )
        fingerprint, model_file = tokenizer.fingerprint, tokenizer.model_bytes
    train = open_split(config, "train", expected_tokenizer=fingerprint)
    valid = open_split(config, "valid", expected_tokenizer=fingerprint) if config.data.split[1] > 0 else None
    if valid is not None:
        count_batches(valid, config=config)
    checkpoints = RunCheckpoints(
        config,
        comm=comm,
        data=train,
        tokenizer_fingerprint=fingerprint,
        tokenizer_model=model_file,
    )
    resume = checkpoints.find()
    if resume is None and config.checkpoint.init_from is not None:
        _require_same_model(open_weights(config.checkpoint.init_from, comm=comm), config)
    return RunInputs(train=train, valid=valid, checkpoints=checkpoints, resume=resume)


def open_split(config: RunConfig, split: Split, *, expected_tokenizer: str | None) -> BlendedDataset:
    """Open the data of one split."""
    return BlendedDataset.build(
        config.data,
        split=split,
        seed=config.train.seed,
        expected_tokenizer=expected_tokenizer,
        vocab_size=config.model.vocab_size,
        global_batch_size=config.train.global_batch_size,
        planned_samples=planned_samples(config, split),
    )


def completed_summary(config: RunConfig, *, inputs: RunInputs, comm: Comm) -> dict[str, Any] | None:
    """What summary.json says of a run that has nothing left to do; none for any other run. Collective."""
    path = Path(config.output_dir) / SUMMARY_FILE
    mine: dict[str, Any] = json.loads(path.read_bytes()) if comm.rank == 0 and path.is_file() else {}
    summary: dict[str, Any] = comm.all_gather_object(mine)[0]
    step = None if inputs.resume is None else inputs.resume.step
    done = (summary.get("outcome"), summary.get("step")) == (Outcome.COMPLETED.value, step)
    return summary if done and step is not None and step >= config.train.steps else None


def _require_same_model(source: WeightSource, config: RunConfig) -> None:
    """The weights of another model are refused, also where every shape fits."""
    if differences := model_differences(asdict(source.config), config.model):
        raise CheckpointError(
            f"checkpoint.init_from = {source.path} is of a model with {'; '.join(differences)}: set [model] "
            "to what those weights were trained with, or start from others"
        )


def start_state(config: RunConfig, *, engine: Engine, inputs: RunInputs) -> RunState:
    """Fill the engine: from the checkpoint, else from `checkpoint.init_from`, else with fresh weights."""
    if inputs.resume is not None:
        return inputs.checkpoints.restore(inputs.resume)
    if config.checkpoint.init_from is not None:
        load_weights(open_weights(config.checkpoint.init_from, verify=False), engine.logical_state())
        engine.state_loaded()
    else:
        initialize_engine(engine, seed=config.train.seed)
    return RunState()


def train_loader(
    config: RunConfig, dataset: BlendedDataset, *, engine: Engine, start_step: int
) -> TrainLoader:
    """Batches of this rank from `start_step` on."""
    return TrainLoader(
        dataset,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
        start_step=start_step,
        prefetch=config.data.prefetch,
    )


def rank_zero_callbacks(
    config: RunConfig, *, num_devices: int, resume_step: int, console: Console
) -> list[Callback]:
    """Display and metrics."""
    output = Path(config.output_dir)
    display = ProgressDisplay(total_steps=config.train.steps, console=console)
    recorder = MetricsRecorder(
        config,
        num_devices=num_devices,
        sinks=[
            JsonlSink(output / METRICS_FILE, resume_step=resume_step),
            TensorBoardSink(output / "tensorboard", resume_step=resume_step),
            display,
        ],
    )
    return [display, recorder]


def report(config: RunConfig, *, trainer: Trainer, outcome: Outcome, console: Console) -> None:
    """Picture, summary.json, table; the marker of a run that waits to be continued."""
    output = Path(config.output_dir)
    records = read_metrics(output / METRICS_FILE)
    picture = plot_metrics(records, output / PICTURE_FILE, title=f"{config.name}, step {trainer.state.step}")
    summary = summarize(
        config,
        outcome=outcome,
        state=trainer.state,
        validation=trainer.validation,
        records=records,
        checkpoint=trainer.checkpoints.saved_path,
        picture=picture,
    )
    write_json(output / SUMMARY_FILE, summary)
    if outcome is Outcome.PREEMPTED:
        with atomic_file(output / PREEMPTED_FILE) as file:
            file.write(f"{trainer.state.step}\n".encode())
    print_summary(summary, console=console)
