"""PDF files made by matplotlib and by hand: text in several scripts, damage, bombs."""

from __future__ import annotations

import io
import zlib

import pytest
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from megatron_b2.corpus.formats.pdf import PdfReader
from megatron_b2.corpus.formats.text import UnreadableError


def pdf(*lines: str) -> bytes:
    figure = Figure()
    FigureCanvasPdf(figure)
    for number, line in enumerate(lines):
        figure.text(0.1, 0.9 - 0.1 * number, line)
    stream = io.BytesIO()
    figure.savefig(stream, format="pdf")
    return stream.getvalue()


def by_hand(content: bytes, *, filters: str = "", trailer: str = "") -> bytes:
    """One page with a content stream, after ISO 32000-1."""
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>",
        f"<< /Length {len(content)} {filters} >>\nstream\n".encode() + content + b"\nendstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n".encode() + part + b"\nendobj\n"
    table = b"".join(f"{place:010} 00000 n \n".encode() for place in places)
    end = f"trailer\n<< /Size {len(parts) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + f"xref\n0 {len(parts) + 1}\n0000000000 65535 f \n".encode() + table + end.encode()


SHOW = b"BT /F 12 Tf 50 700 Td (By hand) Tj ET\n"


def test_text() -> None:
    lines = ["A line of text", "Δεύτερη γραμμή", "третья строка"]
    with PdfReader(max_bytes=1 << 20, memory_bytes=1 << 30) as reader:
        assert [line.strip() for line in reader.text(pdf(*lines)).splitlines()] == lines
        assert reader.text(by_hand(SHOW)).strip() == "By hand"
        assert reader.text(by_hand(zlib.compress(SHOW), filters="/Filter /FlateDecode")).strip() == "By hand"
        assert reader.text(pdf()).strip() == ""


def test_unreadable_files_are_named_and_the_next_one_read() -> None:
    encrypted = "/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O ({}) /U ({}) >> /ID [(a) (b)]".format(
        "o" * 32, "u" * 32
    )
    bomb = zlib.compress(zlib.compress(bytes(1 << 28), 9), 9)
    with PdfReader(max_bytes=1 << 16, memory_bytes=128 << 20) as reader:
        for data, reason in (
            (by_hand(SHOW, trailer=encrypted), "encrypted"),
            (b"%PDF-1.4 no", "not a readable PDF file"),
            (b"", "not a readable PDF file"),
            (pdf("x")[:300], "not a readable PDF file"),
            (by_hand(bomb, filters="/Filter [/FlateDecode /FlateDecode]"), "PDFium takes more than"),
        ):
            with pytest.raises(UnreadableError, match=reason):
                reader.text(data)
            assert reader.text(by_hand(SHOW)).strip() == "By hand"
    with (
        PdfReader(max_bytes=4, memory_bytes=1 << 30) as reader,
        pytest.raises(UnreadableError, match="the text has more than 4 bytes"),
    ):
        reader.text(by_hand(SHOW))
