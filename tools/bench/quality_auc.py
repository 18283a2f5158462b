"""How well quality model and perplexity tell clean text from bad text: AUC by language, level and defect.

    b2 corpus fetch --out corpus-demo/raw --set zhen
    python tools/bench/quality_auc.py --languages zh-Hans en

Documents of 300 to 30,000 characters, at most --per-package of each Debian package (else one package of
generated reference pages is most of the corpus); one fifth is held out. Bad texts of the test are made from
held-out documents, with templates and wrong encodings that the training did not see ("truncated end": only
the end is cut). With --split package whole packages are held out: a much harder test, since every package
has a style of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_b2.corpus.models.corrupt import DEFECTS, Corruptor, truncate_end
from megatron_b2.corpus.models.logistic import roc_auc
from megatron_b2.corpus.models.quality import (
    LEVELS,
    Level,
    QualityModel,
    QualityOptions,
    QualityScores,
    split_level,
    train_quality,
)
from megatron_b2.documents import read_documents
from megatron_b2.documents.texts import Texts

SIGNALS: dict[str, Callable[[QualityScores], np.ndarray]] = {
    "quality": lambda scores: scores.quality,
    "classifier": lambda scores: scores.classes[:, 0],
    "perplexity": lambda scores: -np.nan_to_num(scores.perplexity, nan=np.inf),
    "line end": lambda scores: scores.line_end,
}
MIN_CHARACTERS, MAX_CHARACTERS = 300, 30_000


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each language."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, default=Path("corpus-demo/raw"), help="folder of <language>.jsonl"
    )
    parser.add_argument("--languages", nargs="+", default=["zh-Hans", "en"])
    parser.add_argument("--per-package", type=int, default=700)
    parser.add_argument("--split", choices=("document", "package"), default="document")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    found = {}
    for language in arguments.languages:
        train, test = split(arguments.corpus / f"{language}.jsonl", arguments.per_package, arguments.split)
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            train_quality(train, Path(folder) / "model", QualityOptions(language=language))
            seconds = time.process_time() - started
            size = sum(len(text.encode()) for text in train) / 1e6
            print(f"\n{language}: {len(train):,} documents ({size:.1f} MB) trained in {seconds:.0f} CPU-s, "
                  f"{len(test):,} held out, split by {arguments.split}")  # fmt: skip
            found[language] = table(QualityModel(Path(folder) / "model"), language, test)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def split(path: Path, per_package: int, how: str) -> tuple[list[str], list[str]]:
    """Texts to train on, and a fifth held out."""
    rng = random.Random(0)
    packages: dict[str, list[str]] = defaultdict(list)
    for document in read_documents([path]):
        if MIN_CHARACTERS <= len(document.text) <= MAX_CHARACTERS:
            packages[document.source].append(document.text)
    chosen = [rng.sample(texts, min(per_package, len(texts))) for _, texts in sorted(packages.items())]
    if how == "package":
        rng.shuffle(chosen)
        total, test = sum(map(len, chosen)), []
        while len(chosen) > 1 and sum(map(len, test)) < total / 5:
            test.append(chosen.pop())
        return [text for texts in chosen for text in texts], [text for texts in test for text in texts]
    every = [text for texts in chosen for text in texts]
    rng.shuffle(every)
    return every[len(every) // 5 :], every[: len(every) // 5]


def table(model: QualityModel, language: str, test: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """AUC by level, defect and signal; also printed."""
    seen, unseen = Corruptor(language), Corruptor(language, "test")
    makers: dict[str, Callable[[str, random.Random], str | None]] = {
        defect: lambda text, rng, defect=defect: unseen.corrupt(text, defect, rng) for defect in DEFECTS
    }
    makers["mojibake"] = lambda text, rng: seen.corrupt(text, "mojibake", rng)
    makers["mojibake, other encodings"] = lambda text, rng: unseen.corrupt(text, "mojibake", rng)
    makers["truncated end"] = truncate_end
    result: dict[str, dict[str, dict[str, float]]] = {}
    for level in LEVELS:
        rng = random.Random(1)
        clean = parts(test, level, rng)
        good = model.score(Texts.of(clean), level)
        print(f"{level + f' ({len(clean):,})':28}" + "".join(f"{name:>12}" for name in SIGNALS))
        for defect, make in makers.items():
            bad = [changed for text in clean if (changed := make(text, rng)) is not None]
            scores = model.score(Texts.of(bad), level)
            row = {name: roc_auc(of(good), of(scores)) for name, of in SIGNALS.items()}
            result.setdefault(level, {})[defect] = row
            print(
                f"  {defect + f' ({len(bad):,})':34}"[:28].ljust(28)
                + "".join(f"{v:12.3f}" for v in row.values())
            )
    return result


def parts(texts: Sequence[str], level: Level, rng: random.Random) -> list[str]:
    """The texts, or one paragraph or sentence of each that has one long enough."""
    return [rng.choice(pieces) for text in texts if (pieces := split_level(text, level))]


if __name__ == "__main__":
    sys.exit(main())
