"""The texts of a finished run as a Bloom filter, by which later corpora leave them out (`exact.seen`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_b2.corpus.pipeline.checked import read_manifest, read_parts
from megatron_b2.corpus.pipeline.report import State
from megatron_b2.corpus.pipeline.run import made_again_by_the_next_run
from megatron_b2.corpus.spans import BloomFilter
from megatron_b2.errors import InputError


def remember(work: Path, out: Path, *, false_positive_rate: float) -> BloomFilter:
    """Write the filter of all different texts that the stage `exact` of the run saw.

    Args:
        work: folder of a finished run.
        out: file to write.
        false_positive_rate: chance that a text that was not there is taken for one that was.

    Raises:
        InputError: the run had no stage `exact`. ConfigError: the rate is not between 0 and 1.
        DamagedFileError: a file is damaged; the next run makes it again.
    """
    state = State.of(work)
    if "exact" not in state.stages:
        raise InputError(f"{work}: the run had no stage exact, whose hashes are kept; add it and run again")
    paths = [work / "between" / "exact" / f"records-texts-{unit}.parts" for unit in state.units]
    with made_again_by_the_next_run(work):
        keys = sum(table.num_rows for path in paths for table in read_parts(path))
        seen = BloomFilter.for_keys(max(1, keys), false_positive_rate=false_positive_rate)
        for path in paths:
            for table in read_parts(path):
                seen.add(np.column_stack([table.column(name).to_numpy() for name in ("high", "low")]))
            if (manifest := read_manifest(path)) is not None:
                seen.facts |= manifest.facts
    seen.save(out)
    return seen
