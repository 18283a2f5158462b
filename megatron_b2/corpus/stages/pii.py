"""`pii`: personal data becomes placeholders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_b2.corpus.pii import Kind, find_pii, replace_pii
from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import only_changed, read_view


@dataclass(frozen=True)
class Pii:
    """E-mail and public IP addresses, telephone, identity, card and account numbers become <EMAIL>, <IP> and
    so on; no document goes."""

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """One phase."""
        yield context.for_each_unit(_pii, self)


def _pii(task: Task, _: Limits) -> Result:
    view = read_view(task.inputs)
    texts = view.texts
    spans = find_pii(texts)
    counts = spans.counts()
    after = replace_pii(texts, spans).to_arrow()
    columns = {kind.name.lower(): np.ascontiguousarray(counts[:, kind]) for kind in Kind}
    changed = only_changed(after, counts.sum(axis=1) > 0)
    keep = np.ones(len(view), bool)
    return Result([view.write("pii", keep=keep, reason=[""] * len(view), text=changed, **columns)])
