"""Every process group of a layout runs a collective of all its ranks before anything else.

NCCL makes the communicator of a group in its first operation, which all ranks must join. The ring of context
parallelism and the pipeline send messages between two ranks, so none of them may be the first.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from megatron_b2.parallel.groups import ParallelGroups
from megatron_b2.parallel.layout import Layout
from megatron_b2.testing.fork import run_ranks

KINDS = ("tp", "cp", "pp", "pp_gradients", "data_context", "model")
LAYOUTS = [
    (2, Layout(context=2)),
    (4, Layout(context=2, tensor=2)),
    (4, Layout(pipeline=2, data=2)),
    (8, Layout(tensor=2, context=2, pipeline=2)),
]


def issued(layout: Layout) -> dict[str, int]:
    """Collectives that each group of this rank has issued; gloo counts them."""
    groups = ParallelGroups.create(layout, timeout=timedelta(seconds=30))
    found = {kind: getattr(groups, kind) for kind in KINDS}
    return {
        kind: group._get_sequence_number_for_group() for kind, group in found.items() if group is not None
    }


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=str)
def test_every_group_has_run_a_collective_of_all_its_ranks(ranks: int, layout: Layout) -> None:
    expected = {"data_context": 1, "model": 1}
    expected |= {"tp": 1} if layout.tensor > 1 else {}
    expected |= {"cp": 1} if layout.context > 1 else {}
    expected |= {"pp": 1, "pp_gradients": 1} if layout.pipeline > 1 else {}
    assert run_ranks(ranks, issued, layout) == [expected] * ranks
