"""Speed and size of the n-gram model: training, scores of documents, and KenLM's Python query beside it.

    python tools/bench/perplexity.py --input corpus-demo/raw/en.jsonl --megabytes 40

Every tenth document is scored, the others are trained on. CPU time of one process with one thread; the text
is in memory. KenLM is measured where its module is installed: `full_scores` of the same lines with the
words already parted by spaces, on the ARPA file of our model, which it turns into its own probing tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_b2.corpus.models.batches import text_batches
from megatron_b2.corpus.models.perplexity import PerplexityModel, PerplexityOptions, train_perplexity
from megatron_b2.documents import read_documents
from megatron_b2.documents.texts import Texts
from megatron_b2.testing.measure import machine

REPEATS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, nargs="+", default=[Path("corpus-demo/raw/en.jsonl")])
    parser.add_argument("--megabytes", type=float, default=40)
    arguments = parser.parse_args(argv)
    texts = list(take(arguments.input, arguments.megabytes * 1e6))
    train = list(text_batches(text for i, text in enumerate(texts) if i % 10))
    test = list(text_batches(texts[::10]))
    print(machine())
    print(f"trained on {megabytes(train):.1f} MB, scored {megabytes(test):.1f} MB")
    with tempfile.TemporaryDirectory() as name:
        path, arpa = Path(name) / "model", Path(name) / "arpa"
        for kind, options in (("float", PerplexityOptions()), ("8-bit", PerplexityOptions(quantize=True))):
            seconds = cpu_seconds(partial(train_perplexity, train, path, options, arpa=arpa))
            size = path.stat().st_size / 1e6
            print(f"{kind}: training {megabytes(train) / seconds:.1f} MB/s (ARPA too), model {size:.1f} MB")
            report(f"{kind}: documents scored", test, PerplexityModel(path))
        if importlib.util.find_spec("kenlm"):
            report_kenlm(arpa, test)
        else:
            print("kenlm is not installed: not measured")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")
    return 0


def take(paths: Sequence[Path], limit: float) -> Iterator[str]:
    """The first documents, up to `limit` bytes."""
    size = 0
    for document in read_documents(paths):
        yield document.text
        size += len(document.text.encode())
        if size >= limit:
            return


def report(title: str, batches: Sequence[Texts], model: PerplexityModel) -> None:
    """The best of three, and the perplexity."""
    seconds = min(cpu_seconds(lambda: [model.score(batch) for batch in batches]) for _ in range(REPEATS))
    scores = [model.score(batch) for batch in batches]
    words = sum(int(score.words.sum()) for score in scores)
    perplexity = 10 ** (-sum(float(score.log10.sum()) for score in scores) / words)
    unknown = sum(int(score.unknown.sum()) for score in scores) / words
    print(
        f"{title}: {megabytes(batches) / seconds:.1f} MB/s, {words / seconds / 1e6:.2f} M words/s; "
        f"perplexity {perplexity:.2f}, unknown {unknown:.2%}"
    )


def report_kenlm(arpa: Path, batches: Sequence[Texts]) -> None:
    """KenLM on lines of words."""
    import kenlm

    from megatron_b2._cpu import join_words

    model = kenlm.Model(str(arpa))
    lines = [
        line.strip()
        for batch in batches
        for text in join_words(batch.data, batch.offsets, max_words=1 << 40)
        for line in text.split("¶")
        if line.strip()
    ]
    seconds = min(cpu_seconds(lambda: [model.score(line) for line in lines]) for _ in range(REPEATS))
    print(f"kenlm: {megabytes(batches) / seconds:.1f} MB/s of the same text, words parted before")


def cpu_seconds(work: Callable[[], object]) -> float:
    """User and system time of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def megabytes(batches: Sequence[Texts]) -> float:
    """UTF-8 of all texts."""
    return sum(batch.num_bytes for batch in batches) / 1e6


if __name__ == "__main__":
    sys.exit(main())
