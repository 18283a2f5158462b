"""`language`: which language a document is in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_b2.corpus.language import UNDETERMINED, detect_language
from megatron_b2.corpus.models.classifier import TextClassifier
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
    model: str = ""
    """A classifier made by `b2 corpus train-language`. None: by script, then by stop words."""

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """One phase."""
        sha256 = TextClassifier(self.model).sha256 if self.model else ""
        yield context.for_each_unit(_language, _Model(self, sha256), version=2)


@dataclass(frozen=True)
class _Model:
    settings: Language
    sha256: str


def _language(task: Task, _: Limits) -> Result:
    view = read_view(task.inputs)
    settings: Language = task.settings.settings
    given = view.documents.column("language").to_pylist()
    if settings.model:
        found = [tag or UNDETERMINED for tag in TextClassifier(settings.model, verify=False).best(view.texts)]
    else:
        found = [detect_language(text) for text in view.text.to_pylist()]
    tags = [
        before if settings.trust_input and before != UNDETERMINED else tag
        for before, tag in zip(given, found, strict=True)
    ]
    keep = np.array([not settings.keep or tag in settings.keep for tag in tags], dtype=bool)
    reason = ["" if kept else f"language {tag}" for kept, tag in zip(keep, tags, strict=True)]
    return Result([view.write("language", keep=keep, reason=reason, tag=tags)])
