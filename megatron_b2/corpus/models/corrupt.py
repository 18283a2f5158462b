"""Bad text made from good text: the negatives of the quality classifier.

Five defects that crawled text has: words out of order, text cut inside a sentence, bytes decoded with the
wrong encoding, page furniture (menus, notices, offers), and repetition. Which defects, and how each is
made, is our choice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_b2.errors import InputError

Defect = Literal["shuffled", "truncated", "mojibake", "template", "repeated"]
DEFECTS: tuple[Defect, ...] = get_args(Defect)
Half = Literal["train", "test"]

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\u3040-\u30ff"
_PIECE = re.compile(rf"[{_HAN}]{{1,2}}|[^\s{_HAN}]+")
_CUT_FREE = re.compile(r"[^\s.!?…。！？；;:：，,、)）\]」』”’\"'>|]")
"""A character that a sentence does not end with."""
_GAP = re.compile(r"\{[wn]\}")
MIN_CUT_PIECES = 6
"""Words on either side of a cut inside a sentence."""


@dataclass(frozen=True)
class Corruptor:
    """Makes bad texts of one language. `half` "test" takes other templates and encodings than "train"
    does."""

    language: str
    """BCP 47 tag; templates are Chinese for zh and English for all others."""
    half: Half = "train"

    def corrupt(self, text: str, defect: Defect, rng: random.Random) -> str | None:
        """`text` with a defect, decided by `rng` alone; None when the text cannot show it (too short, pure
        ASCII).

        Raises InputError for an unknown defect.
        """
        makers: Mapping[Defect, Callable[[str, random.Random], str | None]] = {
            "shuffled": shuffle_words,
            "truncated": truncate,
            "mojibake": self._mojibake,
            "template": self._template,
            "repeated": repeat,
        }
        if defect not in makers:
            raise InputError(f"defect {defect!r} is unknown; there are {', '.join(DEFECTS)}")
        changed = makers[defect](text, rng)
        return None if changed == text else changed

    def _mojibake(self, text: str, rng: random.Random) -> str | None:
        return misdecode(text, _WRONG_DECODINGS if self.half == "train" else _OTHER_DECODINGS, rng)

    def _template(self, text: str, rng: random.Random) -> str | None:
        lines = _CHINESE_LINES if self.language.split("-")[0] == "zh" else _ENGLISH_LINES
        return fill_templates(text, lines[0 if self.half == "train" else 1 :: 2], rng)


def shuffle_words(text: str, rng: random.Random) -> str | None:
    """The words of every line in random order (Han in pieces of one or two characters); the spaces stay."""
    lines = []
    for line in text.split("\n"):
        pieces = _PIECE.findall(line)
        rng.shuffle(pieces)
        rest = iter(pieces)
        lines.append(_PIECE.sub(lambda _, rest=rest: next(rest), line))  # type: ignore[misc]
    return "\n".join(lines)


def truncate(text: str, rng: random.Random) -> str | None:
    """A fragment that ends inside a sentence, and in two of three cases begins inside one; None when no
    line has enough words to cut it."""
    cuts = _cuts(text)
    late = [cut for cut in cuts if cut > len(text) // 4]
    if not late:
        return None
    end = rng.choice(late)
    early = [cut for cut in cuts if cut < end // 2]
    start = rng.choice(early) if early and rng.random() < 2 / 3 else 0
    return text[start:end].strip()


def truncate_end(text: str, rng: random.Random) -> str | None:
    """The first part of a text, cut inside a sentence; None when no line can be cut."""
    late = [cut for cut in _cuts(text) if cut > len(text) // 4]
    return text[: rng.choice(late)].rstrip() if late else None


def _cuts(text: str) -> list[int]:
    """Places between two words inside a sentence, with MIN_CUT_PIECES words of its line on either side."""
    cuts = []
    begin = 0
    for line in text.split("\n"):
        pieces = list(_PIECE.finditer(line))
        for i in range(MIN_CUT_PIECES, len(pieces) - MIN_CUT_PIECES + 1):
            if _CUT_FREE.match(line[pieces[i - 1].end() - 1]):
                cuts.append(begin + pieces[i].start())
        begin += len(line) + 1
    return cuts


def repeat(text: str, rng: random.Random) -> str | None:
    """One to three neighbouring lines of the text again and again, to about its length."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    count = rng.randint(1, 3)
    start = rng.randrange(max(1, len(lines) - count + 1))
    block = "\n".join(lines[start : start + count])
    return "\n".join([block] * max(3, len(text) // max(1, len(block))))


def misdecode(text: str, decodings: Sequence[tuple[str, str]], rng: random.Random) -> str | None:
    """Text written in one encoding and read in another, as each pair of `decodings` says; None when none of
    them changes it. ASCII quotation marks and dashes become typographic first, as in web pages."""
    typographic = re.sub(r"(?<=\w)'", "’", text.replace(" - ", " – ").replace("--", "—"))
    typographic = re.sub(r'"([^"\n]*)"', "“\\1”", typographic)
    order = list(decodings)
    rng.shuffle(order)
    for written, read in order:
        broken = typographic.encode(written, "ignore").decode(read, "replace")
        if broken != typographic and broken.strip():
            return broken
    return None


def fill_templates(text: str, templates: Sequence[str], rng: random.Random) -> str:
    """8 to 40 lines of page furniture, with words of `text` in their gaps."""
    words = [piece for piece in _PIECE.findall(text) if piece[0].isalpha()] or ["page"]

    def fill(gap: re.Match[str]) -> str:
        if gap[0] == "{n}":
            return str(rng.randint(1, 10 ** rng.randint(1, 4)))
        word = rng.choice(words)
        return word + rng.choice(words) if _is_han(word[0]) else word

    return "\n".join(_GAP.sub(fill, rng.choice(templates)) for _ in range(rng.randint(8, 40)))


def _is_han(character: str) -> bool:
    return "\u3040" <= character <= "\u9fff"


_WRONG_DECODINGS = (
    ("utf-8", "cp1252"),
    ("utf-8", "latin-1"),
    ("utf-8", "gb18030"),
    ("utf-8", "big5"),
    ("gb18030", "latin-1"),
    ("gb18030", "cp1252"),
    ("big5", "gb18030"),
    ("cp1252", "utf-8"),
    ("utf-16-le", "utf-16-be"),
    ("ascii", "utf-16-le"),
)
"""Written in the first encoding, read in the second."""

_OTHER_DECODINGS = (
    ("utf-8", "cp1251"),
    ("utf-8", "mac-roman"),
    ("utf-8", "shift-jis"),
    ("utf-8", "euc-kr"),
    ("gb18030", "shift-jis"),
    ("gb18030", "mac-roman"),
    ("big5", "cp1252"),
)
"""Those that the training does not see."""

_ENGLISH_LINES = (
    "Home | About | {w} | Contact | Sitemap",
    "Skip to main content",
    "We use cookies to improve your experience. By continuing you accept our {w} policy.",
    "This site uses cookies. Accept all | Manage preferences",
    "Copyright © {n} {w} Inc. All rights reserved.",
    "© {n}-{n} {w}. Terms of service | Privacy",
    "Sign in or register to post a comment",
    "Log in | Create an account | Forgot your password?",
    "{w} - ${n}.99 - Add to cart",
    "Buy {w} now! Only ${n} while stocks last!!!",
    "Share on Facebook | Tweet | Pin it | Email",
    "Like us, follow us, share this: {w}",
    "Posted by admin on {n}/{n}/{n} | {n} comments",
    "Filed under: {w}, {w}, {w} | Leave a reply",
    "Page 1 of {n} | Next » | Last",
    "« Previous 1 2 3 ... {n} Next »",
    "Click here to download {w} for free",
    "Free download: {w} full version crack {n}",
    "Related posts: {w} {w} | {w} | {w} {w}",
    "You may also like: {w}, {w} and {w}",
    "Subscribe to our newsletter and get {n}% off",
    "Enter your e-mail address to receive updates about {w}",
    "Tags: {w}, {w}, {w}, {w}, {w}",
    "Categories {w} ({n}) {w} ({n}) {w} ({n})",
    "Your browser does not support JavaScript. Please enable it.",
    "Please upgrade your browser to view this {w} page",
    "Rating: {n}/5 ({n} votes)",
    "{n} people found this review helpful. Report abuse",
    "Call us today on {n}-{n}-{n} for a free quote",
    "Best {w} in {w}, cheap {w}, {w} online, {w} near me",
    "Loading... please wait",
    "Error 404: {w} not found. Go back to the home page",
    "Advertisement",
    "Sponsored links: {w} {w} {w}",
    "Last updated: {n} days ago by {w}",
    "Views: {n} | Downloads: {n} | Size: {n} KB",
)

_CHINESE_LINES = (
    "首页 | 关于我们 | {w} | 联系我们 | 网站地图",
    "设为首页 加入收藏 手机版",
    "本站使用 Cookie，继续浏览即表示您同意{w}政策",
    "版权所有 © {n} {w}网 保留所有权利",
    "京ICP备{n}号 京公网安备{n}号",
    "增值电信业务经营许可证：{n}",
    "登录 | 注册 | 忘记密码？",
    "您尚未登录，请先登录后发表评论",
    "{w} 价格：¥{n}.00 加入购物车",
    "立即购买 {w}，限时优惠仅需{n}元！！！",
    "分享到：微信 微博 QQ空间 {w}",
    "扫描二维码关注{w}公众号",
    "发表于 {n}-{n}-{n} | 阅读({n}) | 评论({n})",
    "作者：{w} 浏览次数：{n} 更新时间：{n}-{n}",
    "上一页 1 2 3 … {n} 下一页 末页",
    "上一篇：{w} 下一篇：{w}",
    "点击下载{w}最新版 免费高速下载",
    "{w}破解版下载 绿色版 安卓版 {n}",
    "相关推荐：{w} {w} {w}",
    "猜你喜欢：{w} | {w} | {w}",
    "订阅我们的邮件，享受{n}折优惠",
    "输入您的邮箱即可获取{w}资讯",
    "标签：{w} {w} {w} {w}",
    "分类目录：{w}({n}) {w}({n})",
    "您的浏览器不支持 JavaScript，请开启后重试",
    "请升级您的浏览器以获得更好的{w}体验",
    "评分：{n}分 共{n}人评价",
    "{n}人觉得有用 举报",
    "咨询热线：400-{n}-{n} 在线客服QQ：{n}",
    "{w}哪家好，{w}多少钱，{w}厂家直销，{w}加盟",
    "加载中，请稍候……",
    "404 您访问的{w}页面不存在 返回首页",
    "广告",
    "友情链接：{w} {w} {w}网",
    "声明：本文由{w}转载，不代表本站立场",
    "下载次数：{n} 文件大小：{n}KB 所需积分：{n}",
)
