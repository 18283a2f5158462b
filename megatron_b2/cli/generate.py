"""`b2 generate`: write text with a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import tyro

from megatron_b2.cli.main import run
from megatron_b2.errors import InputError

HELP = "write text with a checkpoint or a Hugging Face folder"

REPLACEMENT = "\ufffd"
"""What decoding gives for the bytes of an unfinished character."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write text with a checkpoint, a run folder (newest checkpoint) or a Hugging Face folder.

    b2 generate runs/toy --prompt "The license"

    b2 generate runs/toy --prompt-file story.txt --temperature 0.8 --top-p 0.9 --num-samples 3 --json out.json

    b2 generate Baichuan2-7B-Chat --dtype bfloat16 --chat
    """

    path: tyro.conf.Positional[Path]
    """Checkpoint, run folder or Hugging Face folder."""
    prompt: str | None = None
    """Text to continue, or with --chat the message of the user."""
    prompt_file: Path | None = None
    """UTF-8 file with the prompt; one newline at its end is not part of it."""
    chat: bool = False
    """Use the Baichuan chat layout; without a prompt, one line of standard input is one message."""
    max_new_tokens: int = 128
    """Most tokens to write."""
    temperature: float = 1.0
    """0 always takes the most likely token; lower is safer, higher is wilder."""
    top_k: int = 0
    """Choose among the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together reach this probability; 1 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that are there already less likely."""
    seed: int = 0
    """Of the random choices; sample i uses seed + i."""
    num_samples: int = 1
    """Texts to write for the prompt."""
    stream: bool = True
    """Show text as it is made, or each text at once when it is complete."""
    json: Path | None = None
    """Also write prompts, texts, token ids and speed to this file."""
    tokenizer: Path | None = None
    """Tokenizer file or folder; by default the one beside the weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights."""


class TokenStreamer(Protocol):
    """The part of `megatron_b2.api.LoadedModel` that is needed here."""

    def stream(
        self,
        input_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        repetition_penalty: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> Iterator[int]:
        """New token ids; a stop id is the last of them."""
        ...


class TextTokenizer(Protocol):
    """The part of `Tokenizer` that is needed here."""

    eos_id: int
    user_id: int | None
    assistant_id: int | None

    def encode(self, text: str, *, parse_reserved: bool = True) -> list[int]:
        """Ids of `text`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One text that was written."""

    prompt: str
    text: str
    ids: list[int]
    """New tokens, the stop token not among them."""
    prompt_tokens: int
    seed: int
    finish_reason: Literal["stop", "length"]
    seconds: float
    tokens_per_second: float


class StreamDecoder:
    """Token ids to text, piece by piece: the pieces add up to the decoding of all ids at once.

    A character of several byte tokens is held back until it is whole. Only a short window is decoded again.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """Text that `token` has completed; empty inside a character."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What is left: bytes that never became a character."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        if text.endswith(REPLACEMENT) and not final:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]


class Writer:
    """Completes prompts with one model and prints what it writes."""

    def __init__(
        self,
        options: Generate,
        *,
        model: TokenStreamer,
        tokenizer: TextTokenizer,
        out: Callable[[str], object],
    ) -> None:
        self.options = options
        self.model = model
        self.tokenizer = tokenizer
        self.out = out
        self.completions: list[Completion] = []

    def complete(
        self, prompt: str, prompt_ids: Sequence[int], *, seed: int, stop_ids: Sequence[int]
    ) -> Completion:
        """Write one text after `prompt_ids` and print it."""
        options = self.options
        decoder = StreamDecoder(self.tokenizer.decode)
        show = self.out if options.stream else _nothing
        ids: list[int] = []
        parts: list[str] = []
        finish_reason: Literal["stop", "length"] = "length"
        start = time.perf_counter()
        for token in self.model.stream(
            prompt_ids,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            seed=seed,
            stop_ids=stop_ids,
        ):
            if token in stop_ids:
                finish_reason = "stop"
                break
            ids.append(token)
            parts.append(decoder.push(token))
            show(parts[-1])
        parts.append(decoder.finish())
        seconds = time.perf_counter() - start
        show(parts[-1])
        text = "".join(parts)
        self.out("\n" if options.stream else text + "\n")
        completion = Completion(
            prompt=prompt,
            text=text,
            ids=ids,
            prompt_tokens=len(prompt_ids),
            seed=seed,
            finish_reason=finish_reason,
            seconds=round(seconds, 4),
            tokens_per_second=round(len(ids) / max(seconds, 1e-9), 2),
        )
        self.completions.append(completion)
        return completion

    def samples(self, prompt: str) -> None:
        """Continue `prompt` `num_samples` times."""
        prompt_ids = self.tokenizer.encode(prompt)
        if not prompt_ids:
            raise InputError("the prompt is empty; give --prompt TEXT or --prompt-file FILE with some text")
        for index in range(self.options.num_samples):
            if self.options.num_samples > 1:
                self.out(f"--- sample {index + 1} of {self.options.num_samples}\n")
            self.out(prompt)
            seed = self.options.seed + index
            self.complete(prompt, prompt_ids, seed=seed, stop_ids=[self.tokenizer.eos_id])

    def converse(self, messages: Iterator[str]) -> None:
        """Answer messages in turn: user id, text, assistant id, reply, and nothing between turns."""
        user, assistant = self.tokenizer.user_id, self.tokenizer.assistant_id
        if user is None or assistant is None:
            raise InputError("--chat needs a tokenizer with the pieces <reserved_106> and <reserved_107>")
        history: list[int] = []
        for message in messages:
            history += [user, *self.tokenizer.encode(message, parse_reserved=False), assistant]
            stop_ids = [self.tokenizer.eos_id, user]
            history += self.complete(message, history, seed=self.options.seed, stop_ids=stop_ids).ids


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `b2 generate --help`."""
    arguments = None if argv is None else list(argv)
    options: Generate = tyro.cli(Generate, args=arguments, prog="b2 generate")
    prompt = read_prompt(options)
    check_sizes(options)
    # Slow imports, so that --help and mistakes answer at once.
    from megatron_b2.api import load
    from megatron_b2.checkpoint.catalog import resolve_checkpoint
    from megatron_b2.checkpoint.weights import open_weights
    from megatron_b2.files.atomic import write_json
    from megatron_b2.model.sampling import check_sampling
    from megatron_b2.tokenizer import load_tokenizer

    check_sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
    )
    open_weights(options.path, verify=False)  # a wrong path is told before a missing tokenizer in it
    tokenizer = load_tokenizer(options.tokenizer or resolve_checkpoint(options.path) or options.path)
    model = load(options.path, dtype=options.dtype)
    writer = Writer(options, model=model, tokenizer=tokenizer, out=_print)
    if options.chat:
        writer.converse(iter([prompt]) if prompt is not None else _lines())
    elif prompt is not None:
        writer.samples(prompt)
    if options.json is not None:
        write_json(options.json, report(options, writer.completions))
    return 0


def read_prompt(options: Generate) -> str | None:
    """The prompt; None for a conversation on standard input. Raises InputError when it is not clear."""
    if options.prompt is not None and options.prompt_file is not None:
        raise InputError("--prompt and --prompt-file are both given; choose one")
    if options.prompt_file is not None:
        try:
            return options.prompt_file.read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompt-file {options.prompt_file}: {error}") from error
    if options.prompt is None and not options.chat:
        raise InputError("nothing to continue: give --prompt TEXT, --prompt-file FILE, or --chat")
    return options.prompt


def check_sizes(options: Generate) -> None:
    """Raise InputError for counts that make no sense."""
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if options.num_samples < 1:
        raise InputError(f"--num-samples {options.num_samples} must be at least 1")
    if options.chat and options.num_samples > 1:
        raise InputError(f"--chat gives one reply a message, not --num-samples {options.num_samples}")


def report(options: Generate, completions: Sequence[Completion]) -> dict[str, Any]:
    """What --json writes: the settings and every completion."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    return {"settings": settings, "completions": [asdict(completion) for completion in completions]}


def _lines() -> Iterator[str]:
    """Messages typed one a line; a prompt sign when somebody types."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            _print("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _nothing(_text: str) -> None:
    """Show nothing while the text is made."""


if __name__ == "__main__":
    sys.exit(run(main))
