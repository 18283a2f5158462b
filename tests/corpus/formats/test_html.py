"""Text of HTML pages in every charset, with and without main content, and of pages made to do harm."""

from __future__ import annotations

import pytest
from lxml import html as lxml_html

from megatron_b2.corpus.formats.html import html_text
from megatron_b2.corpus.formats.text import UnreadableError, language_tag, tidy

PAGE = """<html lang="en"><head><title>Title</title><style>p {}</style></head><body>
<header>menu</header><nav>more menu</nav>
<div id="DisplayArea"><h1>Heading</h1><p>First <b>bold</b>
 paragraph.</p><!-- a comment -->tail<ul><li>one<li>two</ul><pre>  code
    indented</pre><p>Last &amp; least \u00a0 \u4f60\u597d.</p><script>no()</script> after %s</div>
<footer>foot</footer></body></html>""" % ("x" * 200)

SENTENCES = {
    "gb18030": "这是一个关于编码的测试网页，我们来看一看是否能够正确地识别它的编码。",
    "big5": "這是一個關於編碼的測試網頁，我們來看一看是否能夠正確地識別它的編碼。",
    "shift_jis": "これは文字コードのテストページです。正しく認識できるでしょうか。",
    "euc-kr": "이것은 인코딩에 대한 테스트 페이지입니다. 올바르게 인식할 수 있을까요.",
    "windows-1251": "Это тестовая страница о кодировках, посмотрим, сможем ли мы её распознать.",
    "iso-8859-1": "Voilà une page de test à propos des encodages; nous verrons si ça marche.",
    "utf-8": "Ceci et 这是 и это.",
    "utf-16": "这是 utf-16 with its mark.",
}


def test_the_main_content_that_a_page_names_is_all_of_it() -> None:
    expected = [
        "Heading",
        "First bold paragraph.",
        "tail",
        "one",
        "two",
        "  code",
        "    indented",
        "Last & least 你好.",
    ]
    found = html_text(PAGE.encode())
    assert found.text.split("\n") == [*expected, f"after {'x' * 200}"]
    assert found.language == "en"


@pytest.mark.parametrize("clean", [True, False])
def test_html_without_main_content_in_another_encoding(clean: bool) -> None:
    page = '<html><head><meta charset="gb18030"></head><body><p>\u4f60\u597d</p><p>\u4e16\u754c</p></body></html>'
    assert html_text(page.encode("gb18030"), clean=clean).text == "你好\n世界"


def test_navigation_of_a_page_that_names_no_main_content_goes() -> None:
    menu = "".join(f'<li><a href="/{i}">栏目{i}</a></li>' for i in range(20))
    body = "".join(
        f"<p>第{i}段正文，说明了网页正文抽取的方法，并且足够长，不会被当作菜单。</p>" for i in range(5)
    )
    page = (
        f'<body><div class="navbar"><ul>{menu}</ul></div><div class="x">{body}</div>'
        '<div class="footer"><a href="/a">关于我们</a> <a href="/b">联系</a></div></body>'
    )
    assert html_text(page.encode()).text == "\n".join(
        f"第{i}段正文，说明了网页正文抽取的方法，并且足够长，不会被当作菜单。" for i in range(5)
    )
    assert "栏目3" in html_text(page.encode(), clean=False).text


@pytest.mark.parametrize("charset", SENTENCES)
@pytest.mark.parametrize("declared", ["right", "by the server", "wrong", "none"])
def test_charsets(charset: str, declared: str) -> None:
    sentence = SENTENCES[charset] * 3
    name = {"right": charset, "wrong": "utf-8"}.get(declared)
    meta = f'<meta http-equiv="Content-Type" content="text/html; charset={name}">' if name else ""
    page = f"<html><head>{meta}</head><body><p>{sentence}</p></body></html>"
    data = page.encode(charset)
    server = charset if declared == "by the server" else ""
    if charset == "euc-kr" and not (server or declared == "right"):
        with pytest.raises(UnreadableError, match="not text in UTF-8"):
            html_text(data, server)
        return
    assert html_text(data, server).text == sentence


def test_a_page_that_says_gbk_and_is_utf8() -> None:
    page = '<html><head><meta charset="gbk"></head><body><p>你好，世界</p></body></html>'
    assert html_text(page.encode(), "gb2312").text == "你好，世界"


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize(
    "page",
    [
        "<div>" * 100_000 + "deep",
        "<table>" * 5_000 + "deep",
        "<b><i><a>" * 3_000 + "deep",
        "<div>" * 2_000 + "<p>x</p>" * 50_000 + "deep",
        "<body " + "a=1 " * 50_000 + ">deep",
        "<o:p>office deep</o:p>",
    ],
    ids=["div", "table", "inline", "deep and wide", "attributes", "strange tags"],
)
def test_pages_made_to_do_harm(page: str, clean: bool) -> None:
    """They took minutes before there was a limit. libxml2 drops what is more than 2,046 elements deep."""
    assert "kept" in html_text(f"<p>kept</p>{page}".encode(), clean=clean).text


def test_no_text() -> None:
    for data in (b"", b"  \n", b"<!-- -->", b"<html></html>", b"\x00\x00"):
        assert tidy(html_text(data).text) == ""
    with pytest.raises(UnreadableError, match="not text"):
        html_text(b"<p>" + bytes(range(128, 256)) * 20 + b"\x81\x8d", "utf-8")


def test_every_character_of_the_body_is_there() -> None:
    """Without the heuristics the text is that of lxml's own text_content, white space apart."""
    page = "<body><h2>a &lt; b</h2><table><tr><td>1<td>2</table><p>x<br>y<sub>2</sub>&nbsp;z<hr>end</body>"
    expected = lxml_html.fromstring(page).text_content()
    assert "".join(html_text(page.encode(), clean=False).text.split()) == "".join(expected.split())


@pytest.mark.parametrize(
    ("given", "tag"),
    [
        ("en", "en"), ("en-US", "en"), ("EN_us", "en"), ("zh-CN", "zh-Hans"), ("zh-tw", "zh-Hant"),
        ("zh-Hant-HK", "zh-Hant"), ("zh-Hans", "zh-Hans"), ("zh", "und"), ("zho", "und"), ("fra", "fr"),
        ("zho,eng", "und"), ("", "und"), ("x" * 50, "und"), ("日本", "und"), ("jpn", "ja"), ("tlh", "und"),
    ],
)  # fmt: skip
def test_language_tag(given: str, tag: str) -> None:
    assert language_tag(given) == tag


def test_tidy() -> None:
    assert tidy("e\u0301\x00  \r\n\n\n\nb \n") == "é\n\nb"
