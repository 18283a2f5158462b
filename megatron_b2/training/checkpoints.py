"""When a run saves, what goes into its checkpoints, and how it continues from one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_b2.checkpoint.catalog import RUN_SUBFOLDER, latest_checkpoint, prune_checkpoints
from megatron_b2.checkpoint.reading import load_into
from megatron_b2.checkpoint.store import CheckpointReader, save_checkpoint
from megatron_b2.checkpoint.weights import model_differences
from megatron_b2.config.encode import to_dict, to_toml
from megatron_b2.config.schema import RunConfig
from megatron_b2.data.blended import BlendedDataset
from megatron_b2.engine.base import Engine
from megatron_b2.errors import CheckpointError
from megatron_b2.files.atomic import sync_folder
from megatron_b2.parallel.comm import Comm
from megatron_b2.training.events import RunState

CONFIG_FILE = "config.toml"
TOKENIZER_FILE = "tokenizer.model"
DATA_STATE = "data_state"
"""Entry of a checkpoint's meta, of runs with data.phases."""
MILESTONES = "milestones"
"""Folder beside the checkpoints with a link to each token milestone."""


class RunCheckpoints:
    """The checkpoints of one run, in `output_dir/checkpoints`. All methods that do something are collective.

    `data`, by its fingerprint and the phases consumed, and `tokenizer_fingerprint` are stored and compared on
    resume; `tokenizer_model` is the SentencePiece file, copied beside the weights so that a checkpoint can
    write text on its own.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        comm: Comm,
        data: BlendedDataset,
        tokenizer_fingerprint: str | None,
        tokenizer_model: bytes | None,
    ) -> None:
        self._config = config
        self._comm = comm
        self._data = data
        self._fingerprints = {
            "data_fingerprint": data.fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint,
        }
        self._files = {CONFIG_FILE: to_toml(config).encode()}
        if tokenizer_model is not None:
            self._files[TOKENIZER_FILE] = tokenizer_model
        self._engine: Engine | None = None
        self.root = Path(config.output_dir) / RUN_SUBFOLDER
        self.saved_step: int | None = None
        """Step of the checkpoint saved or resumed from last."""
        self.saved_path: Path | None = None

    def find(self) -> CheckpointReader | None:
        """The checkpoint to resume from, none for a fresh run; nothing is written.

        Raises CheckpointError when the newest whole checkpoint is of another model, other data, another batch
        size or a phase of the data that has changed since, or when there is one and `checkpoint.resume` is
        "never".
        """
        if self._config.checkpoint.resume == "never":
            occupied: bool = self._comm.all_gather_object(self.root.is_dir() and any(self.root.iterdir()))[0]
            if occupied:
                raise CheckpointError(
                    f'{self.root} holds checkpoints of an earlier run but checkpoint.resume is "never"; '
                    'set it to "auto" to continue, or choose another output_dir'
                )
            return None
        path = latest_checkpoint(self.root, comm=self._comm)
        if path is None:
            return None
        reader = CheckpointReader(path)
        _require_same_run(reader, self._config, self._fingerprints)
        self._data.require_consumed(reader.meta.get(DATA_STATE), step=reader.step, checkpoint=path)
        return reader

    def attach(self, engine: Engine) -> None:
        """The engine whose state is saved and restored."""
        self._engine = engine

    def restore(self, reader: CheckpointReader) -> RunState:
        """Load everything into the engine; returns how far the run was.

        Random-number states are restored when the number of ranks is the same; else they stay fresh.
        """
        engine = self._attached()
        load_into(reader, engine.logical_state())
        engine.state_loaded()
        if reader.meta["world_size"] == self._comm.size:
            engine.load_rank_state(reader.rank_state(self._comm.rank))
        self.saved_step, self.saved_path = reader.step, reader.path
        return RunState(step=reader.step, tokens=reader.tokens, seconds=float(reader.meta["seconds"]))

    def due(self, state: RunState) -> bool:
        """Whether this step ends a save interval or has passed a token milestone."""
        settings = self._config.checkpoint
        by_steps = settings.interval > 0 and state.step % settings.interval == 0
        return by_steps or self._milestone(state) is not None

    def _milestone(self, state: RunState) -> int | None:
        """The multiple of `checkpoint.milestone_tokens` that the last step has reached, in tokens."""
        every = self._config.checkpoint.milestone_tokens
        if every == 0 or state.tokens % every >= self._config.tokens_per_step:
            return None
        return state.tokens // every * every or None

    def save(self, state: RunState) -> Path:
        """Write a checkpoint, then remove those that retention does not keep."""
        engine, settings = self._attached(), self._config.checkpoint
        path = save_checkpoint(
            self.root,
            step=state.step,
            tokens=state.tokens,
            state=engine.logical_state(),
            rank_state=engine.rank_state(),
            meta=self._meta(state),
            files=self._files,
            comm=self._comm,
        )
        if self._comm.rank == 0:
            if (tokens := self._milestone(state)) is not None:
                link_milestone(path, tokens)
            prune_checkpoints(
                self.root,
                keep_last=settings.keep_last,
                keep_every=settings.keep_every,
                milestone_tokens=settings.milestone_tokens,
            )
        self.saved_step, self.saved_path = state.step, path
        return path

    def _attached(self) -> Engine:
        assert self._engine is not None, "attach() an engine first"
        return self._engine

    def _meta(self, state: RunState) -> Mapping[str, Any]:
        data = self._data.state(state.step)
        return {
            **self._fingerprints,
            **({} if data is None else {DATA_STATE: data}),
            "world_size": self._comm.size,
            "seconds": state.seconds,
            "run": to_dict(self._config),
        }


def milestone_name(tokens: int) -> str:
    """`train_00220B` for 220e9 tokens as in the report (appendix C); other counts in their largest unit."""
    unit, size = next((u, s) for u, s in (("B", 10**9), ("M", 10**6), ("", 1)) if tokens % s == 0)
    return f"train_{tokens // size:05d}{unit}"


def link_milestone(checkpoint: Path, tokens: int) -> None:
    """Make or replace the link `milestones/<name>` to a checkpoint, in one step; a failure is only logged."""
    link = checkpoint.parent / MILESTONES / milestone_name(tokens)
    temporary = link.with_name(f".{link.name}.tmp")
    try:
        link.parent.mkdir(exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path("..") / checkpoint.name, target_is_directory=True)
        os.replace(temporary, link)
        sync_folder(link.parent)
    except OSError as error:
        logging.getLogger(__name__).warning("%s is saved, but not linked: %s", checkpoint, error)


def _require_same_run(
    reader: CheckpointReader, config: RunConfig, fingerprints: Mapping[str, str | None]
) -> None:
    """The model, the data and the batch size must be what they were: what changes no shape is compared here.

    The position in the data is step x global batch size.
    """
    for key, now in fingerprints.items():
        stored = reader.meta.get(key)
        if stored != now:
            what = key.removesuffix("_fingerprint")
            raise CheckpointError(
                f"{reader.path} was trained with other {what} (fingerprint {str(stored)[:12]}, now "
                f"{str(now)[:12]}): restore the {what} settings and files of its {CONFIG_FILE}, or start a "
                "new run in another output_dir with checkpoint.init_from set to this checkpoint"
            )
    stored_run = reader.meta["run"]
    differences = model_differences(stored_run["model"], config.model)
    differences += [
        f"{table}.{key} = {was!r}, now {now!r}"
        for table, key, now in (
            ("data", "document_masking", config.data.document_masking),
            ("train", "global_batch_size", config.train.global_batch_size),
        )
        if (was := stored_run[table].get(key)) != now
    ]
    if differences:
        raise CheckpointError(
            f"{reader.path} was trained with {'; '.join(differences)}: keep the settings of its "
            f"{CONFIG_FILE}, or start a new run in another output_dir"
        )
