"""`b2 generate`: streamed text, chat layout, options, with a scripted model and a byte tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2.cli.generate import Generate, StreamDecoder, Writer, check_sizes, main, read_prompt, report
from megatron_b2.errors import CheckpointError, InputError

USER, ASSISTANT, EOS = 300, 301, 2


class ByteTokenizer:
    """Id = byte + 3, so that most characters need several tokens."""

    eos_id = EOS
    user_id: int | None = USER
    assistant_id: int | None = ASSISTANT

    def encode(self, text: str, *, parse_reserved: bool = True) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - 3 for i in ids if i >= 3).decode(errors="replace")


class ScriptedModel:
    """Writes the given texts one after the other and remembers what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.calls: list[tuple[list[int], dict[str, Any]]] = []

    def stream(self, input_ids: Sequence[int], **settings: Any) -> Iterator[int]:
        self.calls.append((list(input_ids), settings))
        yield from [*ByteTokenizer().encode(self.texts.pop(0)), EOS][: settings["max_new_tokens"]]


def _writer(model: ScriptedModel, printed: list[str], **options: Any) -> Writer:
    return Writer(
        Generate(path=Path("model"), **options), model=model, tokenizer=ByteTokenizer(), out=printed.append
    )


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_streamed_pieces_add_up_and_never_break_a_character(text: str) -> None:
    tokenizer = ByteTokenizer()
    decoder = StreamDecoder(tokenizer.decode)
    pieces = [decoder.push(token) for token in tokenizer.encode(text)] + [decoder.finish()]
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(3, 258)))
def test_broken_bytes_stream_to_what_decoding_all_gives(ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    decoder = StreamDecoder(tokenizer.decode)
    pieces = [decoder.push(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


def test_streaming_prints_character_by_character() -> None:
    printed: list[str] = []
    _writer(ScriptedModel("北京"), printed).samples("中国首都")
    assert [part for part in printed if part] == ["中国首都", "北", "京", "\n"]


def test_without_streaming_a_text_is_printed_at_once() -> None:
    printed: list[str] = []
    writer = _writer(ScriptedModel("one", "two"), printed, stream=False, num_samples=2, seed=5)
    writer.samples("x ")
    assert [part for part in printed if part] == [
        *("--- sample 1 of 2\n", "x ", "one\n"),
        *("--- sample 2 of 2\n", "x ", "two\n"),
    ]
    assert [completion.seed for completion in writer.completions] == [5, 6]
    assert [completion.finish_reason for completion in writer.completions] == ["stop", "stop"]


def test_settings_reach_the_model_and_the_report() -> None:
    model = ScriptedModel("abcdef")
    options = {
        "max_new_tokens": 3,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "seed": 4,
    }
    writer = _writer(model, [], **options)
    writer.samples("p")
    assert model.calls == [(ByteTokenizer().encode("p"), {**options, "stop_ids": [EOS]})]
    written = report(writer.options, writer.completions)
    assert written["settings"]["path"] == "model"
    completion = written["completions"][0]
    assert (completion["text"], completion["finish_reason"]) == ("abc", "length")
    assert (completion["prompt_tokens"], len(completion["ids"])) == (1, 3)


def test_chat_layout_has_nothing_between_turns() -> None:
    encode = ByteTokenizer().encode
    model = ScriptedModel("hello", "fine")
    _writer(model, [], chat=True).converse(iter(["hi", "how are you?"]))
    first = [USER, *encode("hi"), ASSISTANT]
    second = [*first, *encode("hello"), USER, *encode("how are you?"), ASSISTANT]
    assert [call[0] for call in model.calls] == [first, second]
    assert model.calls[0][1]["stop_ids"] == [EOS, USER]


def test_chat_without_chat_pieces_is_refused() -> None:
    writer = _writer(ScriptedModel("x"), [], chat=True)
    writer.tokenizer.user_id = None
    with pytest.raises(InputError, match="reserved_106"):
        writer.converse(iter(["hi"]))


def test_prompt_sources(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("two\nlines\n", encoding="utf-8")
    base = Generate(path=Path("m"))
    assert read_prompt(dataclasses.replace(base, prompt_file=file)) == "two\nlines"
    assert read_prompt(dataclasses.replace(base, chat=True)) is None
    file.write_bytes(b"\xff\xfe")
    for wrong in ({}, {"prompt": "a", "prompt_file": file}, {"prompt_file": file}, {"prompt_file": tmp_path / "no"}):
        with pytest.raises(InputError):
            read_prompt(dataclasses.replace(base, **wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"num_samples": 0}, {"chat": True, "num_samples": 2}])
def test_counts_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        check_sizes(Generate(path=Path("m"), prompt="x", **wrong))


def test_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        _writer(ScriptedModel("x"), []).samples("")


def test_a_wrong_path_is_named_before_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        main([str(tmp_path / "nowhere"), "--prompt", "x"])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--repetition-penalty" in text
    assert "b2 generate runs/toy" in text
