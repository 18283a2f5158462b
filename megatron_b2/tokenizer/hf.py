"""Export to Hugging Face: the SentencePiece model and a fast tokenizer.json with identical ids.

The fast tokenizer is a byte-fallback BPE over the same pieces, spaces written as spaces: without
SentencePiece's U+2581 in its vocabulary it needs no normaliser, and a U+2581 in a text is spelled in bytes
exactly as our wrapper does. Merges are all splits of each piece into two pieces, in the order of the
piece's score (what SentencePiece does at run time). User-defined symbols are non-special added tokens
matched before BPE; control pieces are no added tokens at all, so text cannot call them:
tokenizer_config.json names them and keeps them out of text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models

from megatron_b2.errors import TokenizerError
from megatron_b2.files.atomic import atomic_file, write_json
from megatron_b2.tokenizer.symbols import ASSISTANT_PIECE, BOS_ID, EOS_ID, UNK_ID, USER_PIECE
from megatron_b2.tokenizer.wrapper import MODEL_NAME, SPACE_MARK, Tokenizer

FAST_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
NUM_PROBES = 2_000
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '" + USER_PIECE + "' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '" + ASSISTANT_PIECE + "' }}"
    "{%- elif message['role'] != 'system' -%}{{ raise_exception('unknown role ' + message['role']) }}"
    "{%- endif -%}"
    "{{ message['content'] }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '" + ASSISTANT_PIECE + "' }}{%- endif -%}"
)
"""Baichuan chat layout: a role symbol before each turn, no end symbol between turns, system text in front."""

_Type = sentencepiece_model_pb2.ModelProto.SentencePiece.Type


def export_hf(tokenizer: Tokenizer, folder: Path, *, max_length: int = 4_096) -> list[Path]:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json into `folder` (made if missing).

    max_length: the `model_max_length` of the config. Returns the files. Before anything is written the fast
    tokenizer is compared with ours on 2,000 strings made of the vocabulary; raises TokenizerError when an
    id differs, or for a model that is no byte-fallback BPE.
    """
    fast = fast_tokenizer(tokenizer)
    for text in probe_texts(tokenizer):
        ours, theirs = tokenizer.encode(text), fast.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise TokenizerError(
                f"{tokenizer.name}: the fast tokenizer would differ on {text!r}: {theirs} instead of "
                f"{ours}; nothing was "
                "written. Use tokenizer.model with SentencePiece"
            )
    paths = [folder / name for name in (MODEL_NAME, FAST_NAME, CONFIG_NAME)]
    with atomic_file(paths[0]) as stream:
        stream.write(tokenizer.model_bytes)
    with atomic_file(paths[1]) as stream:
        stream.write(fast.to_str(pretty=True).encode())
    write_json(paths[2], tokenizer_config(tokenizer, max_length=max_length))
    return paths


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same as a `tokenizers.Tokenizer`; raises TokenizerError for a model of another kind."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes)
    pieces = list(proto.pieces)
    _check_exportable(proto, tokenizer.name)
    vocab = {_surface(piece): index for index, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise TokenizerError(
            f"{tokenizer.name}: two pieces have the same text, which tokenizer.json cannot hold"
        )
    unknown = pieces[UNK_ID].piece
    model = models.BPE(
        vocab=vocab, merges=list(_merges(pieces)), unk_token=unknown, byte_fallback=True, fuse_unk=False
    )
    fast = tokenizers.Tokenizer(model)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    symbols = [_surface(piece) for piece in pieces if piece.type == _Type.USER_DEFINED]
    fast.add_tokens([tokenizers.AddedToken(symbol, normalized=False) for symbol in symbols])
    return fast


def tokenizer_config(tokenizer: Tokenizer, *, max_length: int) -> dict[str, Any]:
    """Content of tokenizer_config.json: control pieces by name, no added begin or end, the chat layout."""
    unk, bos, eos = tokenizer.pieces((UNK_ID, BOS_ID, EOS_ID))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "pad_token": unk,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": max_length,
    }
    if tokenizer.user_id is not None and tokenizer.assistant_id is not None:
        config["chat_template"] = CHAT_TEMPLATE
    return config


def probe_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Strings that try what could differ: random runs of pieces, of characters, of one repeated piece."""
    source = random.Random(0)
    surfaces = [piece.replace(SPACE_MARK, " ") for piece in tokenizer.pieces(range(tokenizer.vocab_size))]
    characters = [surface for surface in surfaces if len(surface) == 1] + list(
        "<>s/\x00\r\u2581\U0001f600e\u0301"
    )
    for number in range(NUM_PROBES):
        if number % 4 == 0:
            yield "".join(source.choices(characters, k=source.randint(0, 60)))
        elif number % 4 == 1:
            yield source.choice(surfaces) * source.randint(1, 9)
        else:
            yield source.choice(("", " ")).join(source.choices(surfaces, k=source.randint(1, 30)))


def _check_exportable(proto: Any, name: str) -> None:
    if (
        proto.trainer_spec.model_type != sentencepiece_model_pb2.TrainerSpec.BPE
        or not proto.trainer_spec.byte_fallback
    ):
        raise TokenizerError(f"{name}: only byte-fallback BPE models have an exact fast tokenizer")
    for index, piece in enumerate(proto.pieces):
        if " " in piece.piece and piece.type != _Type.USER_DEFINED:
            raise TokenizerError(
                f"{name}: piece {index} {piece.piece!r} holds a space; SentencePiece writes U+2581"
            )


def _surface(piece: Any) -> str:
    return str(piece.piece).replace(SPACE_MARK, " ")


def _merges(pieces: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """All splits of each normal piece into two normal pieces: best score first, then by ids of the halves."""
    normal = {_surface(piece): index for index, piece in enumerate(pieces) if piece.type == _Type.NORMAL}
    order = sorted(normal.items(), key=lambda item: (-pieces[item[1]].score, item[1]))
    for text, _ in order:
        halves = ((text[:i], text[i:]) for i in range(1, len(text)))
        found = [(left, right) for left, right in halves if left in normal and right in normal]
        yield from sorted(found, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
