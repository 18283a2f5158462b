"""`language`: which language a document is in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_b2.corpus.language import UNDETERMINED, detect_language
from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import read_view


@dataclass(frozen=True)
class Language:
    """Tag every document; those in other languages than the wanted ones go."""

    keep: tuple[str, ...] = ()
    """BCP 47 tags such as en, zh-Hans, zh-Hant; none keeps all."""
    trust_input: bool = False
    """Take the tag that the input gives, where it gives one."""

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """One phase."""
        yield context.for_each_unit(_language, self)


def _language(task: Task, _: Limits) -> Result:
    view = read_view(task.inputs)
    settings: Language = task.settings
    given = view.documents.column("language").to_pylist()
    tags = [
        tag if settings.trust_input and tag != UNDETERMINED else detect_language(text)
        for tag, text in zip(given, view.text.to_pylist(), strict=True)
    ]
    keep = np.array([not settings.keep or tag in settings.keep for tag in tags], dtype=bool)
    reason = ["" if kept else f"language {tag}" for kept, tag in zip(keep, tags, strict=True)]
    return Result([view.write("language", keep=keep, reason=reason, tag=tags)])
