"""From nothing to a trained model on two CPU processes: text, tokenizer, data, training, export, generation.

Every step is an ordinary command and is printed before it runs; copy any of them. A step whose result is
already there is skipped, so an interrupted quickstart goes on. Everything lies under ./quickstart.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_b2.config import load_config
from megatron_b2.config.schema import SourceConfig

ROOT = Path("quickstart")
CONFIG = Path("examples/configs/toy.toml")
BIN = Path(sys.executable).parent
# On the CPU everywhere: two processes would share a single GPU. The deepspeed launcher overwrites
# CUDA_VISIBLE_DEVICES for the processes that it starts; DS_ACCELERATOR reaches them.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PATH": f"{BIN}:{os.environ['PATH']}",
}
PROMPTS = ("The file", "如果您")
TOLERANCE = 1e-4
"""Largest allowed difference of logits in fp32, ours against transformers on the export."""


def run(title: str, *command: str | Path, result: Path | None = None) -> None:
    """Print and run one command; a step whose result exists is skipped."""
    words = [str(word) for word in command]
    print(f"\n== {title}\n$ {' '.join(words)}", flush=True)
    if result is not None and result.exists():
        print(f"   {result} is there already")
        return
    start = time.monotonic()
    status = subprocess.run(words, env=ENVIRONMENT, check=False).returncode
    if status != 0:
        sys.exit(f"error: {title} failed with status {status}; what was finished before is kept")
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


def unigram_loss(sources: Sequence[SourceConfig], *, vocab_size: int) -> float:
    """Entropy in nats of the token frequencies of the blend: what a model without context reaches."""
    blend = np.zeros(vocab_size)
    weights = [source.weight for source in sources]
    for source, weight in zip(sources, weights, strict=True):
        counts = np.bincount(np.fromfile(f"{source.prefix}.bin", dtype=np.uint16), minlength=vocab_size)
        blend += weight / sum(weights) * counts / counts.sum()
    seen = blend[blend > 0]
    return float(-(seen * np.log(seen)).sum())


def export_difference(run_folder: Path, export: Path) -> float:
    """Largest difference of our logits and those of transformers on the export."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    import megatron_b2

    logging.disable_progress_bar()
    ids = torch.arange(100, 164).unsqueeze(0)
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(export)(ids).logits
        return float((megatron_b2.load(run_folder).logits(ids) - theirs).abs().max())


def main() -> None:
    """Run all steps."""
    start = time.monotonic()
    config = load_config(CONFIG).config
    vocab_size = config.model.vocab_size
    corpus, tokenizer, export = ROOT / "corpus", ROOT / "tokenizer", ROOT / "export"
    run_folder, sources = Path(config.output_dir), config.data.sources
    run(
        "real text from Debian packages",
        "b2",
        "corpus",
        "fetch",
        "--out",
        corpus,
        result=corpus / "manifest.json",
    )
    run(
        "tokenizer",
        *("b2", "tokenizer", "train", "--input", corpus, "--out", tokenizer),
        *("--vocab-size", str(vocab_size)),
        *("--language-weight", "zh=0.45", "en=0.35"),
        result=tokenizer,
    )
    for source in sources:
        prefix = Path(source.prefix)
        text = corpus / f"{prefix.name}.jsonl"
        run(
            f"tokenize {prefix.name}",
            *("b2", "preprocess", text, "--tokenizer", tokenizer, "--output", prefix),
            result=prefix.with_suffix(".idx"),
        )
    run(
        "pre-train on two processes",
        *("deepspeed", "--num_gpus", "2", "--module", "megatron_b2.cli.pretrain", CONFIG),
        *("--parallel.engine", "deepspeed"),
    )
    shutil.rmtree(export, ignore_errors=True)  # of an earlier checkpoint
    run(
        "export for transformers",
        *("b2", "convert", "hf-export", run_folder, export, "--format", "llama"),
    )
    for prompt in PROMPTS:
        run(
            "generate",
            *("b2", "generate", run_folder, "--prompt", prompt, "--max-new-tokens", "48"),
            *("--temperature", "0.7", "--top-p", "0.9", "--seed", "1"),
        )
    summary = json.loads((run_folder / "summary.json").read_text())
    loss, unigram = summary["validation"]["ce"], unigram_loss(sources, vocab_size=vocab_size)
    difference = export_difference(run_folder, export)
    print(
        f"\n== done in {(time.monotonic() - start) / 60:.1f} minutes\n"
        f"validation cross-entropy  {loss:.3f} nats (perplexity {math.exp(loss):,.0f})\n"
        f"unigram entropy           {unigram:.3f} nats (perplexity {math.exp(unigram):,.0f}): no context\n"
        f"transformers on export    logits differ by at most {difference:.1e}\n"
        f"picture                   {summary['picture']}\n"
        f"checkpoint                {summary['checkpoint']}\n"
        f"export                    {export}"
    )
    if loss >= unigram:
        sys.exit("error: the model did not learn more than token frequencies")
    if difference > TOLERANCE:
        sys.exit(f"error: transformers' logits on the export differ by more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
