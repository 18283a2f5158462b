"""`b2 tokenizer`: train, measure, use and export a SentencePiece tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if TYPE_CHECKING:
    from megatron_b2.tokenizer.compression import CompressionReport

HELP = "train, measure and export a SentencePiece tokenizer"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train SentencePiece BPE with the options of the Baichuan 2 report.

    OUT gets tokenizer.model, tokenizer.vocab and tokenizer_report.json. Newline is id 5, tab 6, the chat
    roles are 195 and 196 at every vocabulary size.

    Example: b2 tokenizer train --input corpus --out tokenizer --vocab-size 8192 --language-weight zh=0.4
    en=0.4
    """

    input: tuple[str, ...]
    """Documents: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt files or folders."""
    out: Path
    """Folder to make."""
    vocab_size: int = 125_696
    """All pieces: control, symbols, bytes and trained ones."""
    language_weight: tuple[str, ...] = ()
    """Shares of the sample, LANGUAGE=SHARE; zh means zh and all zh-*. Other languages share the rest."""
    temperature: float = 1.0
    """Above 1, languages without a weight get size^(1/temperature): small ones count more."""
    max_bytes: float | None = None
    """Size of the sample in bytes, such as 2e9; none takes all (training needs 6 bytes of memory a byte)."""
    num_reserved: int | None = None
    """<reserved_N> symbols, 108 to 1000; none means 1000 as shipped, or 108 for vocabularies under 4096."""
    character_coverage: float = 0.9999
    """Share of the text's characters that get a piece; less if that fills half of a small vocabulary."""
    seed: int = 0
    """Seed of the sample."""
    threads: int = 1
    """Threads of SentencePiece."""
    text_key: str = "text"
    """Key or column that holds the text."""
    on_error: Literal["skip", "stop"] = "stop"
    """What a malformed record does."""
    overwrite: bool = False
    """Replace OUT if it exists."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tokens a character, tokens a byte and bytes a token by language, for any number of tokenizers.

    Example: b2 tokenizer report --tokenizer tokenizer other/tokenizer.json --input corpus --json r.json
    --png r.png
    """

    tokenizer: tuple[Path, ...]
    """SentencePiece models, tokenizer.json files or folders with one of them."""
    input: tuple[str, ...]
    """Documents, as for train."""
    max_bytes: float | None = 2e6
    """Text measured of each language; none takes all."""
    json: Path | None = None
    """Write the numbers to this file."""
    png: Path | None = None
    """Draw bytes a token by language into this file."""
    threads: int = 1
    """Threads of SentencePiece."""
    text_key: str = "text"
    """Key or column that holds the text."""
    on_error: Literal["skip", "stop"] = "stop"
    """What a malformed record does."""


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Print the ids of a text.

    Example: b2 tokenizer encode --tokenizer tokenizer --text "你好 world" --pieces
    """

    tokenizer: Path
    """SentencePiece model or the folder that holds tokenizer.model."""
    text: str | None = None
    """Text; none reads standard input, exactly as it comes."""
    pieces: bool = False
    """Print the pieces too, one a line."""
    bos: bool = False
    """Put <s> in front."""
    eos: bool = False
    """Put </s> behind."""


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Print the text of ids, without a newline of our own.

    Example: b2 tokenizer encode --tokenizer t --text hello | xargs b2 tokenizer decode --tokenizer t --ids
    """

    tokenizer: Path
    """SentencePiece model or the folder that holds tokenizer.model."""
    ids: tuple[int, ...]
    """Ids from 0 to the vocabulary size - 1."""


@dataclass(frozen=True, kw_only=True)
class ExportHf:
    """Write tokenizer.model, a fast tokenizer.json with identical ids, and tokenizer_config.json.

    Example: b2 tokenizer export-hf --tokenizer tokenizer --out hf
    """

    tokenizer: Path
    """SentencePiece model or the folder that holds tokenizer.model."""
    out: Path
    """Folder to write into; its other files stay."""
    max_length: int = 4_096
    """model_max_length of the config."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; see `b2 tokenizer --help`."""
    import tyro

    from megatron_b2.cli.repeated import gather_repeated

    commands = (
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Encode, tyro.conf.subcommand("encode")]
        | Annotated[Decode, tyro.conf.subcommand("decode")]
        | Annotated[ExportHf, tyro.conf.subcommand("export-hf")]
    )
    command: Train | Report | Encode | Decode | ExportHf = tyro.cli(
        commands,
        args=gather_repeated(argv, ("--input", "--language-weight", "--tokenizer")),
        prog="b2 tokenizer",
        description=f"b2 tokenizer: {HELP}.",
    )
    match command:
        case Train():
            return _train(command)
        case Report():
            return _report(command)
        case Encode():
            return _encode(command)
        case Decode():
            return _decode(command)
        case ExportHf():
            return _export(command)


def _train(command: Train) -> int:
    from megatron_b2.tokenizer.sampling import parse_weights
    from megatron_b2.tokenizer.training import TrainOptions, train_tokenizer

    options = TrainOptions(
        vocab_size=command.vocab_size,
        num_reserved=command.num_reserved,
        character_coverage=command.character_coverage,
        language_weights=parse_weights(command.language_weight),
        temperature=command.temperature,
        max_bytes=None if command.max_bytes is None else int(command.max_bytes),
        seed=command.seed,
        threads=command.threads,
        text_key=command.text_key,
        on_error=command.on_error,
    )
    report = train_tokenizer(command.input, command.out, options=options, overwrite=command.overwrite)
    size = sum(entry["bytes"] for entry in report["sample"].values())
    documents = sum(entry["documents"] for entry in report["sample"].values())
    seconds, chat = report["seconds"], report["chat_ids"]
    print(
        f"{report['vocab_size']:,} pieces from {documents:,} documents, {size / 1e6:,.1f} MB "
        f"(sample {seconds['sample']} s, training {seconds['train']} s)"
    )
    print(f"  symbols {report['num_symbols']:,}, chat ids {chat['user']} and {chat['assistant']}")
    alphabet = report["alphabet"]
    if alphabet["limited"]:
        print(
            f"  {alphabet['characters']:,} characters have a piece, {alphabet['coverage']:.2%} of the text: "
            "in a small vocabulary they may take half of the trained pieces"
        )
    if report["reading"]["malformed"]:
        print(f"  {report['reading']['malformed']:,} malformed records skipped:", file=sys.stderr)
        print("\n".join(f"    {message}" for message in report["reading"]["messages"]), file=sys.stderr)
    print(f"  sha256 {report['model_sha256']}\n{command.out}")
    return 0


def _report(command: Report) -> int:
    from megatron_b2.documents import ReadReport
    from megatron_b2.files.atomic import write_json
    from megatron_b2.tokenizer.compression import measure, plot

    reading = ReadReport()
    report = measure(
        command.tokenizer,
        command.input,
        max_bytes=None if command.max_bytes is None else int(command.max_bytes),
        threads=command.threads,
        text_key=command.text_key,
        on_error=command.on_error,
        reading=reading,
    )
    _print_report(report)
    if reading.malformed:
        print(f"{reading.malformed:,} malformed records skipped", file=sys.stderr)
    if command.json:
        write_json(command.json, report.to_dict())
        print(f"numbers: {command.json}")
    if command.png:
        plot(report, command.png)
        print(f"picture: {command.png}")
    return 0


def _print_report(report: CompressionReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from megatron_b2.tokenizer.compression import sort_languages

    for name, rows in report.tokenizers.items():
        title = f"{name} ({report.vocab_sizes[name]:,} pieces)"
        table = Table("language", title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for header in ("MB", "tokens", "tokens/character", "tokens/byte", "bytes/token"):
            table.add_column(header, justify="right")
        for language in sort_languages(report):
            row = rows[language].to_dict()
            ratios = (row["tokens_per_character"], row["tokens_per_byte"], row["bytes_per_token"])
            table.add_row(
                language,
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['tokens']:,}",
                *(f"{ratio:.4f}" for ratio in ratios),
            )
        Console().print(table)


def _encode(command: Encode) -> int:
    from megatron_b2.errors import InputError
    from megatron_b2.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(command.tokenizer)
    text = command.text
    if text is None:
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not valid UTF-8 at byte {error.start}") from None
    ids = tokenizer.encode(text, bos=command.bos, eos=command.eos)
    if command.pieces:
        for index, piece in zip(ids, tokenizer.pieces(ids), strict=True):
            print(f"{index}\t{piece!r}")
    else:
        print(" ".join(map(str, ids)))
    return 0


def _decode(command: Decode) -> int:
    from megatron_b2.tokenizer import load_tokenizer

    text = load_tokenizer(command.tokenizer).decode(command.ids)
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0


def _export(command: ExportHf) -> int:
    from megatron_b2.tokenizer import load_tokenizer
    from megatron_b2.tokenizer.hf import export_hf

    for path in export_hf(load_tokenizer(command.tokenizer), command.out, max_length=command.max_length):
        print(path)
    return 0


if __name__ == "__main__":
    from megatron_b2.cli.main import run

    sys.exit(run(main))
