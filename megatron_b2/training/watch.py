"""The watchdog of a training run: one configuration on all ranks, breadcrumbs, group time-outs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_b2 import __version__
from megatron_b2.config.encode import to_dict
from megatron_b2.config.keys import dotted, leaves
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import ConfigError
from megatron_b2.parallel.comm import Comm
from megatron_b2.parallel.diagnosis import Limits, name_ranks
from megatron_b2.parallel.launch import LOOPBACK, LaunchEnvironment
from megatron_b2.parallel.watchdog import Watchdog
from megatron_b2.training.events import Callback, StepEvent, Validation

FOLDER = "watchdog"
"""Subfolder of output_dir for stacks and the report."""
GROUP_FACTOR = 2.0
"""An operation of a process group fails after this many limits of the watchdog, which so speaks first."""
MAX_DIFFERENCES = 5
COMPARED_PACKAGES = ("torch", "deepspeed", "triton")
"""Their installed versions are compared among ranks."""


class WatchCallback(Callback):
    """Leaves the breadcrumbs of the training loop and sets the limits; engines add finer ones."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self._is_patient = True
        self._set_limit(patient=True)

    def run_begin(self, event: StepEvent) -> None:
        """The first step may compile and connect."""
        self.watchdog.crumbs.mark("first batch", step=event.step + 1, patient=True)

    def step_begin(self, event: StepEvent) -> None:
        """Into the engine; the first step of this process is patient."""
        self.watchdog.crumbs.mark("training step", step=event.step + 1, patient=self._is_patient)

    def step_end(self, event: StepEvent) -> None:
        """From the first step on the short limits hold."""
        if self._is_patient:
            self._set_limit(patient=False)
        self.watchdog.crumbs.mark("stop signals and next batch", step=event.step + 1)

    def pause(self, event: StepEvent) -> None:
        """A validation or a checkpoint has the limit of the first step."""
        self._set_limit(patient=True)
        self.watchdog.crumbs.mark("validation or checkpoint", step=event.step, patient=True)

    def validated(self, event: StepEvent, validation: Validation) -> None:
        """Back to training."""
        self._resume(event)

    def saved(self, event: StepEvent, path: Path) -> None:
        """Back to training."""
        self._resume(event)

    def run_end(self, event: StepEvent) -> None:
        """Pictures and summary are made; after an error the position stays where it happened."""
        if sys.exception() is not None:
            return
        self.watchdog.crumbs.mark("end of the run", step=event.step, patient=True)

    def _resume(self, event: StepEvent) -> None:
        self._set_limit(patient=False)
        self.watchdog.crumbs.mark("stop signals and next batch", step=event.step + 1)

    def _set_limit(self, *, patient: bool) -> None:
        self._is_patient = patient
        if self.watchdog.is_on:
            limits = self.watchdog.limits
            longest = max(limits.seconds, limits.first_seconds)
            self.watchdog.set_timeouts(GROUP_FACTOR * (longest if patient else limits.seconds))


@contextmanager
def watch_run(config: RunConfig, *, comm: Comm) -> Iterator[WatchCallback]:
    """Check that all ranks have the same configuration, then watch them; add the callback to the trainer.

    Collective. Raises ConfigError on all ranks when they differ. `callback.watchdog.crumbs` takes finer
    breadcrumbs.
    """
    require_same_config(config, comm=comm)
    limits = Limits(config.parallel.watchdog_seconds, config.parallel.first_step_seconds)
    host = LaunchEnvironment.detect().master_addr if comm.size > 1 else LOOPBACK
    with Watchdog(comm, host=host, limits=limits, folder=Path(config.output_dir) / FOLDER) as watchdog:
        yield WatchCallback(watchdog)


def require_same_config(config: RunConfig, *, comm: Comm) -> None:
    """Raise ConfigError on all ranks, naming ranks and keys, unless all have one configuration."""
    mine = _settings(config)
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    digests: list[str] = comm.all_gather_object(digest)
    if len(set(digests)) == 1:
        return
    settings: list[Mapping[str, Any]] = comm.all_gather_object(mine)
    usual = max(set(digests), key=lambda value: (digests.count(value), -digests.index(value)))
    reference = digests.index(usual)
    problems = [
        f"another configuration on {_ranks_with(other, digests)} than on {_ranks_with(usual, digests)}: "
        f"{_differences(settings[digests.index(other)], settings[reference])}; "
        "start all ranks with the same file, arguments and software"
        for other in dict.fromkeys(digests)
        if other != usual
    ]
    raise ConfigError(problems)


def _ranks_with(digest: str, digests: Sequence[str]) -> str:
    return name_ranks([rank for rank, value in enumerate(digests) if value == digest])


def _settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted key, and the software."""
    settings: dict[str, Any] = {dotted(key): value for key, value in leaves(to_dict(config))}
    return settings | software()


def software() -> dict[str, str]:
    """Versions that all ranks must share, as they decide what is sent and computed."""
    found = {"version of megatron_b2": __version__}
    for name in COMPARED_PACKAGES:
        try:
            found[f"version of {name}"] = version(name)
        except PackageNotFoundError:
            found[f"version of {name}"] = "not installed"
    return found


def _differences(theirs: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    keys = [key for key in {**usual, **theirs} if theirs.get(key) != usual.get(key)]
    parts = [f"{key} = {theirs.get(key)!r}, not {usual.get(key)!r}" for key in keys[:MAX_DIFFERENCES]]
    more = len(keys) - MAX_DIFFERENCES
    return ", ".join(parts) + (f" and {more} more keys" if more > 0 else "")
