"""A real scaling law on the CPU: train a ladder, fit it, predict the largest size, only then train that one.

    make scaling-demo

Every step is an ordinary command and is printed before it runs. What is finished is not done again. The text
is that of the quickstart (./quickstart/corpus); everything else lies under ./scaling-demo.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from megatron_b2.config import load_config
from megatron_b2.files.atomic import atomic_file
from megatron_b2.scaling.collect import collect
from megatron_b2.scaling.fit_file import read_fit
from megatron_b2.scaling.plot import plot_fit
from quickstart import BIN, ENVIRONMENT, run

ROOT = Path("scaling-demo")
CORPUS = Path("quickstart/corpus")
TABLE = Path("examples/scaling/demo.csv")
BASE = Path("examples/scaling/demo.toml")
TOKENS = 1_331_200
"""Of each run."""
SHORTER = (0.5, 0.707)
"""Shares of them that the smallest sizes are also trained on, for the law of size and tokens."""
NUM_SHORTER = 3
"""Sizes that are."""
SEED = 1234
"""Of the order of the documents."""
TARGET = 0.03
"""Largest relative error of the prediction."""
CORES = len(os.sched_getaffinity(0))


def split_table() -> tuple[Path, Path, Path]:
    """Tables of all sizes but the last, of the smallest ones, and of the largest alone."""
    with TABLE.open(encoding="utf-8", newline="") as stream:
        header, *rows = csv.reader(line for line in stream if not line.startswith("#"))
    paths = ROOT / "small.csv", ROOT / "smallest.csv", ROOT / "largest.csv"
    for path, part in zip(paths, (rows[:-1], rows[:NUM_SHORTER], rows[-1:]), strict=True):
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([header, *part])
    return paths


def write_ladder(out: Path, table: Path, budgets: Sequence[float]) -> list[Path]:
    """Make a ladder; its configurations, largest runs first."""
    run(
        f"ladder {out}",
        *("b2", "scaling", "ladder", "--out", out, "--table", table, "--base", BASE),
        *("--budget", *(f"{budget:.0f}" for budget in budgets)),
        *("--gpus-per-node", "1"),
        result=out / "ladder.json",
    )
    runs = json.loads((out / "ladder.json").read_text())["runs"]
    return [out / item["config"] for item in sorted(runs, key=lambda item: -item["flops"]["training"])]


def train(configs: Sequence[Path], *, threads: int) -> None:
    """Train, as many runs at a time as the cores allow with so many threads each."""

    def one(config: Path) -> None:
        log = ROOT / "logs" / f"{config.stem}.txt"
        command = [str(BIN / "b2"), "pretrain", str(config)]
        start = time.monotonic()
        with log.open("w") as stream:
            environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}: see {log}")
        print(f"   {config.stem:<24} {time.monotonic() - start:4.0f} s   {log}", flush=True)

    print(
        f"\n== train {len(configs)} runs, {threads} threads each\n$ b2 pretrain {configs[0]} ...", flush=True
    )
    (ROOT / "logs").mkdir(exist_ok=True)
    with ThreadPoolExecutor(max(1, CORES // threads)) as pool:
        try:
            list(pool.map(one, configs))
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"error: {error}")


def prepare() -> None:
    """Text in random order, tokenizer, token file."""
    base = load_config(BASE).config
    run("real text", "b2", "corpus", "fetch", "--out", CORPUS, result=CORPUS / "manifest.json")
    tokenizer, prefix = Path(base.tokenizer.path), Path(base.data.sources[0].prefix)
    text = ROOT / f"{prefix.name}.jsonl"
    if not text.exists():
        # Documents lie package by package: the last ones, which validation takes, would be of another kind.
        documents = (CORPUS / text.name).read_bytes().splitlines(keepends=True)
        random.Random(SEED).shuffle(documents)
        with atomic_file(text) as stream:
            stream.writelines(documents)
    run(
        "tokenizer",
        *("b2", "tokenizer", "train", "--input", text, "--out", tokenizer),
        *("--vocab-size", str(base.model.vocab_size), "--num-reserved", "108"),
        result=tokenizer,
    )
    run(
        "tokenize",
        *("b2", "preprocess", text, "--tokenizer", tokenizer, "--output", prefix),
        result=prefix.with_suffix(".idx"),
    )


def predict(largest: Path, ladders: Sequence[Path]) -> Path:
    """Fit the small runs and write the prediction of the largest, which must not exist yet."""
    points, fit, prediction = (ROOT / name for name in ("points.json", "fit.json", "prediction.json"))
    output = Path(load_config(largest).config.output_dir)
    if not prediction.exists() and output.exists():
        sys.exit(f"error: {output} was trained before its prediction: remove {ROOT} and start anew")
    run("collect", "b2", "scaling", "collect", *ladders, "--out", points, result=prediction)
    run("fit", "b2", "scaling", "fit", points, "--out", fit, result=prediction)
    run(
        "predict the largest size, which was not trained yet",
        *("b2", "scaling", "predict", fit, "--model", largest, "--out", prediction),
        result=prediction,
    )
    return prediction


def report(prediction_file: Path, largest: Path, *, start: float) -> float:
    """Compare with what was measured; the relative error of the compute law."""
    prediction = json.loads(prediction_file.read_text())
    fit = read_fit(ROOT / "fit.json")
    output = Path(load_config(largest).config.output_dir)
    point = collect([output]).table.final[0]
    loss = point.loss(fit["loss"])
    assert loss is not None, "the base configuration validates"
    trained = datetime.fromtimestamp((output / "summary.json").stat().st_mtime, UTC).isoformat(
        timespec="seconds"
    )
    rows = [{**item, "error": item["loss"] / loss - 1} for item in prediction["predictions"]]
    flops = point.flops(fit["compute"])
    picture = plot_fit(
        fit, ROOT / "result.png", predictions=[prediction], measured=[(point.run, flops, loss)]
    )
    result = {
        "run": point.run,
        "predicted_at": prediction["made_at"],
        "trained_at": trained,
        "measured": loss,
        "predictions": rows,
    }
    (ROOT / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n== done in {(time.monotonic() - start) / 60:.1f} minutes")
    print(f"predicted at {prediction['made_at']}, trained until {trained}\nmeasured {loss:.4f}")
    for row in rows:
        print(
            f"{row['form']:<32} {row['loss']:.4f} ({row['low']:.4f} to {row['high']:.4f})  "
            f"error {100 * row['error']:+.2f} %"
        )
    print(f"picture {picture}")
    return abs(rows[0]["error"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=float, default=TOKENS, help="of each run (default %(default)s)")
    tokens = parser.parse_args().tokens
    start = time.monotonic()
    ROOT.mkdir(exist_ok=True)
    prepare()
    small, smallest, large = split_table()
    ladders = [ROOT / "ladder", ROOT / "shorter"]
    configs = write_ladder(ladders[0], small, [tokens])
    configs += write_ladder(ladders[1], smallest, [share * tokens for share in SHORTER])
    largest = write_ladder(ROOT / "largest", large, [tokens])[0]
    train(configs, threads=1)
    prediction = predict(largest, ladders)
    train([largest], threads=CORES)
    if report(prediction, largest, start=start) > TARGET:
        sys.exit(f"error: the prediction is more than {100 * TARGET:g} % off")


if __name__ == "__main__":
    main()
