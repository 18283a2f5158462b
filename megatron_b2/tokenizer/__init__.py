"""SentencePiece tokenizer of the report: train, encode, measure, export."""

from megatron_b2.tokenizer.wrapper import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
