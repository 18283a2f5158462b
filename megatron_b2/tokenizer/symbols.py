"""The fixed head of the vocabulary: control pieces, user-defined symbols, bytes.

Layout of the shipped Baichuan 2 tokenizer: `<unk>` 0, `<s>` 1, `</s>` 2, then 1,086 user-defined symbols
with `\\n` at 5, `\\t` at 6 and `<reserved_N>` at 89 + N (N < 1,000; the chat roles are 195 and 196), then
256 byte pieces from 1,089. The report does not name the other 84 symbols; ours are CJK and typographic
punctuation (our choice), so that no merge ever glues a mark to a word.
"""

from __future__ import annotations

from typing import Final

from megatron_b2.errors import TokenizerError

UNK_ID: Final = 0
BOS_ID: Final = 1
EOS_ID: Final = 2
NUM_CONTROL: Final = 3
NUM_BYTES: Final = 256
FULL_VOCAB_SIZE: Final = 125_696
FULL_RESERVED: Final = 1_000
SMALL_RESERVED: Final = 108
"""Fewest reserved symbols: with them the chat roles still sit at 195 and 196."""
FULL_RESERVED_FROM: Final = 4_096
"""Vocabularies smaller than this get SMALL_RESERVED symbols unless told otherwise (our choice)."""
USER_PIECE: Final = "<reserved_106>"
ASSISTANT_PIECE: Final = "<reserved_107>"

_PUNCTUATION: Final = (
    "，。"  # 3, 4; then newline and tab
    "、；：？！…—·“”（）《》〈〉「」『』【】〔〕〖〗〝〞～￥％＃＆＊＋－／＜＝＞＠［＼］＾＿｀｛｜｝"
    "•‰′″※←→↑↓■□●○◆◇★☆▲△▼▽①②③④⑤«»¿¡°×"
)


def user_defined_symbols(num_reserved: int = FULL_RESERVED) -> list[str]:
    """The symbols at ids 3, 4, ...: 86 marks, then `<reserved_0>` to `<reserved_{num_reserved - 1}>`."""
    if not SMALL_RESERVED <= num_reserved <= FULL_RESERVED:
        raise TokenizerError(
            f"{num_reserved} reserved symbols: give {SMALL_RESERVED} (the chat roles are {USER_PIECE} and "
            f"{ASSISTANT_PIECE}) to {FULL_RESERVED}"
        )
    marks = [*_PUNCTUATION[:2], "\n", "\t", *_PUNCTUATION[2:]]
    return marks + [f"<reserved_{n}>" for n in range(num_reserved)]


def default_num_reserved(vocab_size: int) -> int:
    """1,000 (1,086 symbols) as shipped, 108 (194 symbols) for vocabularies under 4,096."""
    return FULL_RESERVED if vocab_size >= FULL_RESERVED_FROM else SMALL_RESERVED
