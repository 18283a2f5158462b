"""Text for the tests of trained models: English prose that Python ships, Chinese from a small grammar."""

from __future__ import annotations

import random
from pydoc_data.topics import topics


def english_documents() -> list[str]:
    """The language reference of Python (pydoc's topics) in documents of some paragraphs, without its rules and
    titles."""
    documents = []
    for _, topic in sorted(topics.items()):
        paragraphs = [" ".join(paragraph.split()) for paragraph in topic.split("\n\n")]
        prose = [paragraph for paragraph in paragraphs if len(paragraph) > 80 and paragraph[-1] in ".:"]
        documents += ["\n".join(prose[i : i + 4]) for i in range(0, len(prose), 4)]
    return documents


_WHO = ["我们", "他们", "工程师", "研究人员", "用户", "学生", "这家公司", "编辑部", "图书馆", "老师"]
_WHEN = [
    "昨天",
    "上个月",
    "在会议之后",
    "每年春天",
    "有时候",
    "为了提高效率，",
    "经过讨论，",
    "虽然时间很紧，",
]
_HOW = ["认真地", "很快", "重新", "一起", "仔细地", "逐步", "已经"]
_DO = ["整理了", "检查了", "发布了", "阅读了", "修改了", "讨论了", "翻译了", "保存了", "比较了"]
_WHICH = ["新的", "重要的", "去年的", "关于语言的", "两份", "有趣的", "完整的"]
_WHAT = ["文件", "数据", "报告", "软件包", "手册", "历史资料", "训练文本", "诗歌", "实验结果", "系统设置"]
_THEN = [
    "，因此大家都很满意",
    "，并且写下了结论",
    "，但是还有一些问题",
    "，然后把它放回原处",
    "，结果比预期的好",
]


def chinese_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of some sentences each."""
    rng = random.Random(seed)

    def sentence() -> str:
        parts = (_WHEN, _WHO, _HOW, _DO, _WHICH, _WHAT)
        return (
            "".join(rng.choice(part) for part in parts)
            + (rng.choice(_THEN) if rng.random() < 0.6 else "")
            + "。"
        )

    def paragraph() -> str:
        return "".join(sentence() for _ in range(rng.randint(2, 5)))

    return ["\n".join(paragraph() for _ in range(rng.randint(2, 5))) for _ in range(count)]
