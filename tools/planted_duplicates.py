#!/usr/bin/env python3
"""Duplicates planted into a real corpus, and what each level of the pipeline finds of them.

    b2 corpus fetch --out corpus-demo/raw --set zhen
    python tools/planted_duplicates.py

Documents of the corpus that no stage touches are the base. Copies are planted behind them and each stage runs
alone (after `normalize`) over base and copies. Found is what went of the planted text; false is what went of
the base, which has no duplicates. A moved paragraph counts as found if nine tenths of it were cut.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from opencc import OpenCC

from megatron_b2.corpus.neighbours.minhash import words
from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.report import State
from megatron_b2.documents import read_documents

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.corpus.semantic.paraphrases import paraphrased_documents  # noqa: E402

LANGUAGES = ("en", "zh-Hans")
SIMILARITIES = (0.6, 0.7, 0.82, 0.85, 0.9, 0.95)
SIZES = range(600, 12_000)
"""Characters of a document of the base."""
NGRAM = 5
THRESHOLD = 0.8
"""Similarity from which on `minhash` calls documents duplicates."""
BOILERPLATE = {
    "en": "This page was made from the sources of the manual by the documentation team, all rights reserved.",
    "zh-Hans": "本页由文档小组根据手册的源文件生成，未经许可不得以任何形式复制或者转载本页的任何内容。",
}
STAGES = ("exact", "paragraph", "sentence", "minhash")


@dataclass(frozen=True)
class Options:
    """What is planted."""

    corpus: Path = Path("corpus-demo/raw")
    """Output folder of `b2 corpus fetch --set zhen`."""
    base: int = 3_000
    """Documents of each language that are drawn for the base."""
    planted: int = 200
    """Documents of each kind and language."""
    out: Path = Path("runs/bench/planted.json")
    """All numbers as JSON."""


@dataclass(frozen=True)
class Planted:
    """Documents of one kind."""

    kind: str
    language: str
    stage: str
    """The level that should find it."""
    texts: Sequence[str]
    spans: Sequence[str] = ()
    """What was planted into each text; empty: the whole text."""
    wanted: bool = True
    """False: similar documents that must stay."""


def run(stages: Sequence[str], texts: Sequence[str], settings: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Columns of all stages, by text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "input.jsonl").open("w", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                file.write(json.dumps({"id": str(number), "text": text}) + "\n")
        config = folder / "pipeline.toml"
        config.write_text(f'work = "{folder}/work"\n[input]\npaths = ["{folder}/input.jsonl"]\n')
        chosen = ["--stages", "normalize", *stages, *settings]
        command = [sys.executable, "-m", "megatron_b2", "corpus", "run", str(config), *chosen]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        state = State.of(folder / "work")
        rows: list[dict[str, Any]] = []
        for unit in state.units:
            part: list[dict[str, Any]] = [{} for _ in read_table(state.unit_path(unit)).to_pylist()]
            for path in state.attribute_paths(unit).values():
                for row, more in zip(part, read_table(path).to_pylist(), strict=True):
                    row |= more
            rows += part
    return rows


def is_whole(row: Mapping[str, Any], stages: Sequence[str]) -> bool:
    """Whether no stage has removed or cut the document."""
    return all(row.get(f"{stage}.keep") is not False and not row.get(f"{stage}.cuts") for stage in stages)


def make_base(options: Options) -> dict[str, list[str]]:
    """Documents by language that no level has anything against."""
    drawn, languages = [], []
    for language in LANGUAGES:
        pool = [
            document.text
            for document in read_documents([options.corpus / f"{language}.jsonl"])
            if len(document.text) in SIZES
        ]
        texts = random.Random(0).sample(pool, min(options.base, len(pool)))
        drawn += texts
        languages += [language] * len(texts)
    whole = [True] * len(drawn)
    for stage in STAGES:
        whole = [w and is_whole(row, [stage]) for w, row in zip(whole, run([stage], drawn), strict=True)]
    kept = [item for item, good in zip(zip(drawn, languages, strict=True), whole, strict=True) if good]
    return {name: [text for text, language in kept if language == name] for name in LANGUAGES}


def near(text: str, similarity: float, pool: Sequence[str]) -> str:
    """A document that shares its first words with `text`, so that the Jaccard similarity is the given one."""
    own = words(text)
    shingles = len(own) - NGRAM + 1
    shared = round(2 * similarity * shingles / (1 + similarity)) + NGRAM - 1
    return " ".join([*own[:shared], *random.Random(text).choices(pool, k=len(own) - shared)])


def jaccard(a: str, b: str) -> float:
    """Of the sets of word 5-grams, exact."""
    sets = []
    for text in (a, b):
        found = words(text)
        sets.append({tuple(found[i : i + NGRAM]) for i in range(len(found) - NGRAM + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def with_paragraph(text: str, paragraph: str) -> str:
    """`text` with a paragraph behind its first one."""
    first, _, rest = text.partition("\n\n")
    return f"{first}\n\n{paragraph}\n\n{rest}"


def plant(base: Mapping[str, list[str]], options: Options) -> list[Planted]:
    """Everything that is planted."""
    made: list[Planted] = []
    for language in LANGUAGES:
        chance = random.Random(language)
        texts = chance.sample(base[language], options.planted)
        copies = ["  " + text.replace("\n", "\n ").upper() + "\n" for text in texts]
        made.append(Planted("copy, case and space changed", language, "exact", copies))
        paragraphs = [
            paragraph.strip()
            for text in base[language]
            for paragraph in text.split("\n\n")[1:]
            if 250 < len(paragraph.encode()) < 2_000
        ]
        moved = chance.sample(paragraphs, options.planted)
        hosts = [near(text, 0.0, words(" ".join(texts))) for text in texts]
        targets = [with_paragraph(host, p) for host, p in zip(hosts, moved, strict=True)]
        made.append(Planted("paragraph of another document", language, "paragraph", targets, moved))
        made.append(Planted("paragraph of another document", language, "sentence", targets, moved))
        line = BOILERPLATE[language]
        pages = [f"{host}\n\n{line}" for host in hosts]
        made.append(Planted("boilerplate sentence", language, "sentence", pages, [line] * len(pages)))
        long = chance.sample([text for text in base[language] if len(words(text)) > 150], options.planted)
        pool = words(" ".join(chance.sample(base[language], 100)))
        for similarity in SIMILARITIES:
            wanted = similarity >= THRESHOLD
            pairs = [(text, near(text, similarity, pool)) for text in long]
            # Repeated shingles move the similarity; those that it moved across the threshold are left out.
            documents = [copy for text, copy in pairs if (jaccard(text, copy) >= THRESHOLD) == wanted]
            kind = f"near copy, similarity about {similarity}"
            made.append(Planted(kind, language, "minhash", documents, wanted=wanted))
    convert: Callable[[str], str] = OpenCC("s2t").convert
    chinese = random.Random(1).sample(base["zh-Hans"], options.planted)
    made.append(Planted("in traditional characters", "zh-Hans", "minhash", [convert(x) for x in chinese]))
    return made


def found_of(planted: Planted, rows: Sequence[Mapping[str, Any]]) -> int:
    """Planted documents that went, or whose planted text was cut."""
    if not planted.spans:
        return sum(row[f"{planted.stage}.keep"] is False for row in rows)
    found = 0
    for text, span, row in zip(planted.texts, planted.spans, rows, strict=True):
        start = text.encode().index(span.encode())
        end = start + len(span.encode())
        cuts = row[f"{planted.stage}.cuts"] or []
        covered = sum(max(0, min(end, b) - max(start, a)) for a, b in zip(cuts[::2], cuts[1::2], strict=True))
        found += covered >= 0.9 * (end - start)
    return found


def measure(base: Mapping[str, list[str]], planted: Planted) -> dict[str, Any]:
    """One line of the table."""
    every = [text for texts in base.values() for text in texts]
    rows = run([planted.stage], [*every, *planted.texts])
    false = sum(not is_whole(row, [planted.stage]) for row in rows[: len(every)])
    return {
        "kind": planted.kind,
        "language": planted.language,
        "stage": planted.stage,
        "planted": len(planted.texts),
        "wanted": planted.wanted,
        "found": found_of(planted, rows[len(every) :]),
        "base": len(every),
        "false": false,
    }


def measure_paraphrases(base: Mapping[str, list[str]], options: Options) -> list[dict[str, Any]]:
    """Documents that say the same in other words: by meaning, and by MinHash."""
    originals, others = paraphrased_documents(options.planted)
    before = base["en"][:1_000]
    every = [*before, *originals]
    lines = []
    for threshold in (None, 0.85, 0.95):
        stages = ["minhash"] if threshold is None else ["embed", "cluster"]
        settings = [] if threshold is None else ["--cluster.threshold", str(threshold)]
        rows = run(stages, [*every, *others], settings)
        gone = [row[f"{stages[-1]}.keep"] is False for row in rows]
        lines.append(
            {
                "kind": "paraphrase",
                "language": "en",
                "stage": stages[-1] + (f", threshold {threshold}" if threshold else ""),
                "planted": len(others),
                "wanted": True,
                "found": sum(gone[len(every) :]),
                "base": len(every),
                "false": sum(gone[: len(every)]),
            }
        )
    return lines


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    lines = [
        "| planted | language | stage | found of planted | recall | of the base removed or cut |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        recall = f"{row['found'] / row['planted']:.3f}" if row["wanted"] else "must stay"
        lines.append(
            f"| {row['kind']} | {row['language']} | {row['stage']} | {row['found']} of {row['planted']} "
            f"| {recall} | {row['false']} of {row['base']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Plant, run, print the table, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    if not (options.corpus / "zh-Hans.jsonl").is_file():
        sys.exit(f"error: there is no {options.corpus}/zh-Hans.jsonl: run `b2 corpus fetch --set zhen` first")
    base = make_base(options)
    print({name: len(texts) for name, texts in base.items()}, file=sys.stderr)
    rows = []
    for planted in plant(base, options):
        rows.append(measure(base, planted))
        print(rows[-1], file=sys.stderr)
    rows += measure_paraphrases(base, options)
    print(markdown(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
