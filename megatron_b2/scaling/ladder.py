"""Writes a ladder: a configuration for each size and token budget, a SLURM array script, a manifest."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron_b2.config.checks import check
from megatron_b2.config.encode import toml_value
from megatron_b2.config.loader import load_config
from megatron_b2.config.presets import PREFIX
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import InputError, OutputError
from megatron_b2.files.atomic import atomic_files
from megatron_b2.scaling.budgets import Budget, number
from megatron_b2.scaling.compute import CONVENTIONS, run_flops
from megatron_b2.scaling.rungs import Rung
from megatron_b2.scaling.slurm import array_script

MANIFEST: Final = "ladder.json"
SCRIPT: Final = "ladder.sbatch"
FORMAT: Final = "megatron_b2 ladder 1"
MANY_STEPS: Final = 10**9
"""Steps of a configuration of which only the tokens of one step are wanted."""


@dataclass(frozen=True, kw_only=True)
class LadderRun:
    """One run of a ladder."""

    name: str
    rung: Rung
    budget: Budget
    config: RunConfig
    """What the written file loads to."""

    @property
    def tokens(self) -> int:
        """Tokens that the run sees: whole steps."""
        return self.config.tokens_per_step * self.config.train.steps


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the array script asks SLURM for, for each run."""

    nodes: int = 1
    """Nodes of a run."""
    gpus_per_node: int = 8
    """GPUs of a node, and ranks on it."""
    time: str = "24:00:00"
    """Limit of one job; a run that is longer saves, requeues itself and goes on."""


def plan_ladder(
    rungs: Sequence[Rung], budgets: Sequence[Budget], *, out: Path, base: str, world_size: int | None = None
) -> list[LadderRun]:
    """Every size with every budget, smallest first, over the shared settings of `base` (a file or preset).

    Raises ConfigError when one of them cannot run, on `world_size` ranks if given.
    """
    runs: list[LadderRun] = []
    for rung in rungs:
        for budget in budgets:
            name = f"h{rung.hidden}-l{rung.layers}-d{budget}"
            settings = _settings(rung, name=name, out=out)
            probe = load_config(base, _flags({**settings, "train.steps": MANY_STEPS})).config
            steps = math.ceil(budget.tokens(rung.num_parameters) / probe.tokens_per_step)
            resolved = load_config(base, _flags({**settings, "train.steps": steps}))
            check(resolved.config, world_size=world_size, provenance=resolved.provenance)
            runs.append(LadderRun(name=name, rung=rung, budget=budget, config=resolved.config))
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"two runs of the ladder are called {twice[0]}: their sizes and budgets are the same"
        )
    return runs


def write_ladder(runs: Sequence[LadderRun], *, out: Path, base: str, cluster: Cluster) -> dict[str, Any]:
    """Write configs/<run>.toml, ladder.sbatch and, last, ladder.json into `out`; returns the manifest.

    Raises OutputError when `out` holds another ladder: its runs may lie there.
    """
    manifest = manifest_of(runs, base=base, cluster=cluster)
    path = out / MANIFEST
    if path.is_file() and json.loads(path.read_bytes()) != manifest:
        raise OutputError(f"{path} is another ladder, whose runs may lie beside it: give another --out")
    files = [out / item["config"] for item in manifest["runs"]]
    texts = [_toml(run, base=_extended(base, files[0].parent)) for run in runs]
    script = array_script(
        [str(file) for file in files],
        out=str(out),
        script=str(out / SCRIPT),
        nodes=cluster.nodes,
        gpus_per_node=cluster.gpus_per_node,
        time=cluster.time,
    )
    texts += [script, json.dumps(manifest, indent=2) + "\n"]
    with atomic_files(*files, out / SCRIPT, path) as streams:
        for stream, text in zip(streams, texts, strict=True):
            stream.write(text.encode())
    return manifest


def manifest_of(runs: Sequence[LadderRun], *, base: str, cluster: Cluster) -> dict[str, Any]:
    """What ladder.json holds; paths are relative to its folder."""
    return {
        "format": FORMAT,
        "base": base,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "runs": [_entry(index, run) for index, run in enumerate(runs)],
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """A ladder.json. Raises InputError when it is none."""
    try:
        manifest: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a ladder: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not a manifest of `b2 scaling ladder` ({FORMAT})")
    return manifest


def _entry(index: int, run: LadderRun) -> dict[str, Any]:
    model, seq_len = run.config.model, run.config.data.seq_len
    return {
        "index": index,
        "name": run.name,
        "config": f"configs/{run.name}.toml",
        "output_dir": f"runs/{run.name}",
        "hidden": run.rung.hidden,
        "ffn": run.rung.ffn,
        "layers": run.rung.layers,
        "heads": run.rung.heads,
        "num_parameters": model.num_block_parameters,
        "total_parameters": model.num_parameters,
        "max_lr": run.config.optim.max_lr,
        "steps": run.config.train.steps,
        "tokens": run.tokens,
        "flops": {
            name: run_flops(model, seq_len=seq_len, tokens=run.tokens, convention=name)
            for name in CONVENTIONS
        },
    }


def _settings(rung: Rung, *, name: str, out: Path) -> dict[str, Any]:
    """Dotted key -> value of all that the base does not say."""
    return {
        "name": name,
        "output_dir": str(out / "runs" / name),
        "model.hidden_size": rung.hidden,
        "model.ffn_hidden_size": rung.ffn,
        "model.num_layers": rung.layers,
        "model.num_heads": rung.heads,
        **({} if rung.max_lr is None else {"optim.max_lr": rung.max_lr}),
    }


def _flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


def _toml(run: LadderRun, *, base: str) -> str:
    rung, config = run.rung, run.config
    lines = [
        f"# {rung.num_parameters / 1e6:,.2f} M parameters without embedding and head, {run.tokens:,} tokens;",
        "# written by `b2 scaling ladder`.",
        f"extends = [{toml_value(base)}]",
        f"name = {toml_value(run.name)}",
        f"output_dir = {toml_value(config.output_dir)}",
        "",
        "[model]",
        f"hidden_size = {rung.hidden:_}",
        f"ffn_hidden_size = {rung.ffn:_}",
        f"num_layers = {rung.layers}",
        f"num_heads = {rung.heads}",
    ]
    if rung.max_lr is not None:
        lines += ["", "[optim]", f"max_lr = {rung.max_lr!r}"]
    tokens = number(run.budget.tokens(rung.num_parameters))
    lines += [
        "",
        "[train]",
        f"steps = {config.train.steps:_}  # {tokens} tokens / {config.tokens_per_step:_}, rounded up",
    ]
    return "\n".join(lines) + "\n"


def _extended(base: str, folder: Path) -> str:
    """`base` as a file in `folder` names it."""
    return base if base.startswith(PREFIX) else os.path.relpath(base, folder)
