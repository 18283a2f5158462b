"""The SLURM array script of a ladder: one run an array task, each resumable on its own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final

SCRIPT: Final = """#!/bin/bash
# The scaling ladder {out}: {count} runs, one for each index of the array.
#
#   sbatch {script}                              all of them
#   sbatch --array=0,3 {script}                  some
#   sbatch --array={last}%2 {script}             two at a time
#
# Submit it from the folder that `b2 scaling ladder` was called in: paths are relative to it. Arguments after
# the script go to `b2 pretrain`. docs/slurm.md explains every choice. A task that is preempted or reaches its
# time limit saves and requeues itself; submitting again continues what is unfinished and leaves what is
# finished as it is.
#
#SBATCH --job-name=b2-ladder
#SBATCH --array={last}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={tasks}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time={time}
#SBATCH --distribution=block:block
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

set -euo pipefail

configs=(
{configs}
)
config=${{configs[$SLURM_ARRAY_TASK_ID]}}

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" --oneliner | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
export MASTER_ADDR
export OMP_NUM_THREADS=1

# One task a GPU; each takes its rank from SLURM_PROCID.
status=0
srun --kill-on-bad-exit=1 --wait=60 --distribution=block:block \\
    python -m megatron_b2.cli.pretrain "$config" "$@" || status=$?

# 75: stopped by a signal, everything saved. SLURM_JOB_ID is that of this array task alone.
if [[ $status -eq 75 ]]; then
    echo "$config saved after a stop signal (restart ${{SLURM_RESTART_COUNT:-0}}): requeue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def array_script(
    configs: Sequence[str], *, out: str, script: str, nodes: int, gpus_per_node: int, time: str
) -> str:
    """Text of the script; `configs` in the order of the array's indices, paths as seen from the caller's
    folder."""
    last = f"0-{len(configs) - 1}" if len(configs) > 1 else "0"
    return SCRIPT.format(
        out=out,
        script=shlex.quote(script),
        count=len(configs),
        last=last,
        nodes=nodes,
        tasks=gpus_per_node,
        time=time,
        configs="\n".join(f"    {shlex.quote(config)}" for config in configs),
    )
