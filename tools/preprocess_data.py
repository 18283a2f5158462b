"""Tokenize text from a checkout, with the flags of Megatron-LM's tool of this name: runs `b2 preprocess`.

Like there, the output is named <output-prefix>_<json-key>_document.bin/.idx and documents end in the
end-of-document token only with --append-eod.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def to_b2_arguments(argv: Sequence[str] | None = None) -> list[str]:
    """The same request in the words of `b2 preprocess`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files or folders of documents")
    parser.add_argument("--json-keys", nargs=1, default=["text"], metavar="KEY", help="key of the text")
    parser.add_argument("--output-prefix", required=True, help="path of the output without suffix")
    parser.add_argument("--tokenizer-model", required=True, help="SentencePiece model or its folder")
    parser.add_argument(
        "--tokenizer-type",
        choices=("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"),
        default="SentencePieceTokenizer",
        help="accepted for compatibility: every tokenizer here is SentencePiece",
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with </s>")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args(argv)
    key = args.json_keys[0]
    return [
        *args.input,
        *("--tokenizer", args.tokenizer_model),
        *("--output", f"{args.output_prefix}_{key}_document"),
        *("--text-key", key),
        *("--workers", str(args.workers)),
        "--eod" if args.append_eod else "--no-eod",
    ]


if __name__ == "__main__":
    from megatron_b2.cli.main import run
    from megatron_b2.cli.preprocess import main

    sys.exit(run(main, to_b2_arguments()))
