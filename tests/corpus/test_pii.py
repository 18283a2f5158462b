"""Personal data: published examples of each kind, what only looks like it, places and placeholders."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.corpus.pii import (
    PLACEHOLDERS,
    Kind,
    find_pii,
    is_cn_id,
    is_iban,
    is_luhn,
    is_public_ip,
    replace_pii,
)
from megatron_b2.documents.texts import Texts

# Numbers that card networks and payment services publish for tests.
CARDS = (
    "4111111111111111", "4012888888881881", "4222222222222", "5555555555554444", "5105105105105100", "2223003122003222",
    "378282246310005", "371449635398431", "6011111111111117", "30569309025904", "3530111333300000", "6200000000000005",
    "4111 1111 1111 1111", "5555-5555-5555-4444", "3782 822463 10005",
)  # fmt: skip
# Examples of the IBAN registry and of central banks.
IBANS = (
    "GB82WEST12345698765432", "DE89370400440532013000", "FR1420041010050500013M02606", "NL91ABNA0417164300",
    "CH9300762011623852957", "ES9121000418450200051332", "NO9386011117947", "GB29 NWBK 6016 1331 9268 19",
    "MT84MALT011000012345MTLCAST001S",
)  # fmt: skip
# The first two are the examples of the standard GB 11643.
CN_IDS = ("11010519491231002X", "440524188001010014", "34052419800101001X")
PHONES = (
    "13800138000", "138 0013 8000", "139-1234-5678", "8613912345678", "+8613912345678", "+86 139 1234 5678",
    "+1 415 555 2671", "+14155552671", "+442071838750", "+44 (0)20 7183 8750", "+49-30-901820", "+1-800-555-0199",
)  # fmt: skip
IPS = ("8.8.8.8", "114.114.114.114", "151.101.1.69", "2606:4700:4700::1111", "2001:4860:4860:0:0:0:0:8888")
EMAILS = ("user@example.org", "first.last+tag@sub.domain.co.uk", "zhang_san@163.com", "a-b@x-y.io", "A@B.CN")


def marked(text: str) -> str:
    column = Texts.of([text])
    (left,) = replace_pii(column, find_pii(column))
    return left.decode()


def cases() -> list[tuple[Kind, str]]:
    by_kind = {
        Kind.CARD: CARDS, Kind.IBAN: IBANS, Kind.CN_ID: CN_IDS, Kind.PHONE: PHONES, Kind.IP: IPS, Kind.EMAIL: EMAILS,
    }  # fmt: skip
    return [(kind, text) for kind, texts in by_kind.items() for text in texts]


@pytest.mark.parametrize(("kind", "text"), cases())
@pytest.mark.parametrize(
    "around", ["{}", "call {} now.", "请联系{}，谢谢。", "({})", "a: {}\nb", "“{}”", "{}; {}"]
)
def test_known_examples(kind: Kind, text: str, around: str) -> None:
    assert marked(around.replace("{}", text)) == around.replace("{}", PLACEHOLDERS[kind])


@pytest.mark.parametrize(
    "text",
    [
        "4111111111111112", "1234567812345678", "0000000000000000", "4111 1111 1111", "x4111111111111111",
        "41111111111111111111", "4111.1111.1111.1111", "9999999999999995",
        "GB82WEST12345698765433", "ZZ82WEST12345698765432", "GB82WEST1234569876543", "SHA256ABCDEF1234567890",
        "110105194912310021", "110105194913310026", "990105194912310020",
        "12800138000", "1380013800", "138001380001", "v13800138000", "0.13800138000", "1-13800138000-2-1",
        "+86", "+12 34", "+012345678901", "a+12125552671", "1+1=2, 2+12125552671",
        "10.0.0.1", "192.168.1.1", "127.0.0.1", "172.16.0.9", "224.0.0.1", "0.0.0.0", "255.255.255.255", "192.0.2.7",
        "203.0.113.5", "1.2.3.4.5", "256.1.1.1", "v1.2.3.4", "version 1.2.3.4", "foo-1.2.3.4", "1.2.3.4-rc1", "section 4.8.3.2",
        "第11.1.7.3节", "\n4.8.3.2. Positions", "\n7.16.1.1 The va_list", "\n6.2.4.4.\u00a0基础", "+2147483647",
        "2001:db8::1", "fe80::1", "::1", "12:30:45", "std::vector", "2001:zz::1", "00:1a:2b:3c:4d:5e",
        "user@localhost", "@example.org", "user@", "icon@2x.png", "a@b", "user@@example.org", "x @ y.z",
        "1546300800123", "2024-01-02 03:04:05.123456", "978-3-16-148410-0", "3.14159265358979",
    ],
)  # fmt: skip
def test_what_only_looks_like_it(text: str) -> None:
    assert marked(text) == text
    assert marked(f"see {text} here") == f"see {text} here"


def test_a_text_with_all_kinds() -> None:
    text = "张三（11010519491231002X），电话：13800138000，邮箱zhang@163.com，卡号4111 1111 1111 1111，IP 8.8.8.8。"
    column = Texts.of(["nothing", text, ""])
    spans = find_pii(column)
    assert spans.firsts.tolist() == [0, 0, 5, 5]
    data = text.encode()
    found = [data[begin:end].decode() for begin, end in spans.ranges.tolist()]
    expected = ["11010519491231002X", "13800138000", "zhang@163.com", "4111 1111 1111 1111", "8.8.8.8"]
    assert found == expected
    assert spans.kinds.tolist() == [Kind.CN_ID, Kind.PHONE, Kind.EMAIL, Kind.CARD, Kind.IP]
    assert spans.counts().tolist() == [[0] * 6, [1, 1, 1, 1, 1, 0], [0] * 6]


def test_other_placeholders() -> None:
    column = Texts.of(["mail user@example.org"])
    words = dict.fromkeys(Kind, "") | {Kind.EMAIL: "[邮箱]"}
    assert list(replace_pii(column, find_pii(column), words)) == ["mail [邮箱]".encode()]


def test_no_span_crosses_texts() -> None:
    """Halves of an address at the ends of neighbours stay two halves."""
    for kind, text in cases():
        for cut in range(1, len(text)):
            column = Texts.of([text[:cut], text[cut:]])
            spans = find_pii(column)
            for row in range(2):
                alone = find_pii(Texts.of([(text[:cut], text[cut:])[row]]))
                first, last = spans.firsts[row : row + 2]
                assert spans.ranges[first:last].tolist() == alone.ranges.tolist(), (kind, text, cut)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    texts = [
        " ".join(generator.choices([t for _, t in cases()] + ["word", "1.2", "@"], k=30)) for _ in range(40)
    ]
    whole = find_pii(Texts.of(texts))
    monkeypatch.setattr("megatron_b2.corpus.pii._BLOCK_BYTES", 1_000)
    parts = find_pii(Texts.of(texts))
    for name in ("ranges", "firsts", "kinds"):
        assert (getattr(whole, name) == getattr(parts, name)).all()
    column = Texts.of(texts)
    sliced = Texts(column.data, column.offsets[5:21])
    first, last = int(whole.firsts[5]), int(whole.firsts[20])
    assert (find_pii(sliced).ranges == whole.ranges[first:last]).all()


@settings(max_examples=300)
@given(texts=st.lists(st.text(alphabet="0123456789.:@+- aGBX（中\n", max_size=60), max_size=4))
def test_spans_are_in_order_and_replacement_leaves_the_rest(texts: list[str]) -> None:
    column = Texts.of(texts)
    spans = find_pii(column)
    for row, text in enumerate(texts):
        first, last = spans.firsts[row : row + 2]
        flat = spans.ranges[first:last].reshape(-1).tolist()
        assert flat == sorted(flat)
        assert not flat or (flat[0] >= 0 and flat[-1] <= len(text.encode()))
    nothing = dict.fromkeys(Kind, "")
    left = b"".join(replace_pii(column, spans, nothing))
    assert len(left) == column.num_bytes - int((spans.ranges[:, 1] - spans.ranges[:, 0]).sum())


@given(st.text("0123456789", min_size=1, max_size=20))
def test_luhn_has_one_check_digit(digits: str) -> None:
    good = [digit for digit in "0123456789" if is_luhn(digits + digit)]
    assert len(good) == 1
    for i, digit in enumerate(digits):  # one wrong digit is always noticed
        wrong = digits[:i] + str((int(digit) + 3) % 10) + digits[i + 1 :]
        assert not is_luhn(wrong + good[0])


def test_checks_of_single_numbers() -> None:
    assert is_luhn("79927398713")  # the example of the algorithm's description
    assert not is_luhn("79927398710")
    assert all(is_iban(text.replace(" ", "")) for text in IBANS)
    assert not is_iban("GB82 WEST 1234 5698 7654 32")
    assert all(map(is_cn_id, CN_IDS))
    assert is_cn_id(CN_IDS[0].lower())
    assert not is_cn_id("11010519490231002X")  # 31 February
    assert is_public_ip("8.8.8.8")
    assert not is_public_ip("008.8.8.8")


def test_a_long_number_takes_linear_time() -> None:
    """None of the patterns has many ways to match one text."""
    for unit in ("1", "+1 ", "1-", "+86 (1) ", "1.", "2001:", "a@b.", "GB82 WEST ", "4111 "):
        text = unit * 50_000
        assert len(marked(text)) > 0


def test_bytes_that_are_no_utf8() -> None:
    data = np.frombuffer(b"\xff\xfeuser@example.org\xe4\xb8", np.uint8)
    column = Texts(data, np.array([0, len(data)], np.int64))
    assert list(replace_pii(column, find_pii(column))) == [b"\xff\xfe<EMAIL>\xe4\xb8"]


def test_no_texts() -> None:
    column = Texts.of([])
    assert len(replace_pii(column, find_pii(column))) == 0
