"""Language of a text by script, then by stop words: no model, no download, the same answer everywhere."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

SAMPLE_CHARACTERS = 20_000
MIN_LETTERS = 20
MIN_STOP_WORDS = 3
UNDETERMINED = "und"

_SCRIPTS = MappingProxyType(
    {
        "kana": re.compile("[\u3041-\u30fa\uff66-\uff9d]"),
        "han": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"),
        "hangul": re.compile("[\uac00-\ud7a3\u1100-\u11ff]"),
        "cyrillic": re.compile("[\u0400-\u04ff]"),
        "arabic": re.compile("[\u0620-\u06ff]"),
        "greek": re.compile("[\u0370-\u03ff]"),
        "hebrew": re.compile("[\u05d0-\u05ea]"),
        "thai": re.compile("[\u0e01-\u0e4e]"),
        "devanagari": re.compile("[\u0900-\u097f]"),
        "latin": re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"),
    }
)
_ONE_LANGUAGE_SCRIPTS = (("greek", "el"), ("hebrew", "he"), ("thai", "th"), ("devanagari", "hi"))
# Scripts of one large language each, looked for only where the ones above say nothing.
_RARER_SCRIPTS = MappingProxyType(
    {
        "hy": re.compile("[\u0531-\u0587]"),
        "bn": re.compile("[\u0980-\u09fe]"),
        "pa": re.compile("[\u0a01-\u0a76]"),
        "gu": re.compile("[\u0a81-\u0aff]"),
        "or": re.compile("[\u0b01-\u0b77]"),
        "ta": re.compile("[\u0b82-\u0bfa]"),
        "te": re.compile("[\u0c00-\u0c7f]"),
        "kn": re.compile("[\u0c80-\u0cf3]"),
        "ml": re.compile("[\u0d00-\u0d7f]"),
        "si": re.compile("[\u0d81-\u0df4]"),
        "lo": re.compile("[\u0e81-\u0edf]"),
        "bo": re.compile("[\u0f00-\u0fda]"),
        "my": re.compile("[\u1000-\u109f]"),
        "ka": re.compile("[\u10a0-\u10ff]"),
        "am": re.compile("[\u1200-\u137c]"),
        "km": re.compile("[\u1780-\u17f9]"),
    }
)

# Characters that differ between the two written forms, in the same order: simplified, then traditional.
_SIMPLIFIED = (
    "这个们来时会说国对于开关与设档为无应该将过还进选单点击发现长门问间东车马鸟鱼龙风飞饭馆书画电话语读写"
    "学习园图团圆块坏场声处备复头夹夺奖妇孙宁实宝审宽宾导层岁岛币师帮广庆库张弹强归当录径从忆态怀总恋恶"
    "惊惯愿战户扩扫报护拥择据换损携摄断术机权条极构枪标样树桥检楼欢毕汉汤沟没测济浏润涨渐湾满滚灭灯灵"
    "热爱牵状独环产疗盖盘监码确礼离种积稳穷笔签简类粮级纪纯纳纸线练组细终经结给络统继绩续维缓编缩网罗职"
    "联脑脚脸节艺药莲萧蓝虽视觉观规触计订认让议记许论证评识词译试诗诚详请调谈谢质费资赛赶跃转轮软轻载较"
    "输达迁运连适递逻遗邮释钟钢铁银链销锁错键镇闭闻阅队阳阴阵阶际陆陈险随隐难页项顺须预领频题颜额颠类"
)
_TRADITIONAL = (
    "這個們來時會說國對於開關與設檔為無應該將過還進選單點擊發現長門問間東車馬鳥魚龍風飛飯館書畫電話語讀寫"
    "學習園圖團圓塊壞場聲處備復頭夾奪獎婦孫寧實寶審寬賓導層歲島幣師幫廣慶庫張彈強歸當錄徑從憶態懷總戀惡"
    "驚慣願戰戶擴掃報護擁擇據換損攜攝斷術機權條極構槍標樣樹橋檢樓歡畢漢湯溝沒測濟瀏潤漲漸灣滿滾滅燈靈"
    "熱愛牽狀獨環產療蓋盤監碼確禮離種積穩窮筆簽簡類糧級紀純納紙線練組細終經結給絡統繼績續維緩編縮網羅職"
    "聯腦腳臉節藝藥蓮蕭藍雖視覺觀規觸計訂認讓議記許論證評識詞譯試詩誠詳請調談謝質費資賽趕躍轉輪軟輕載較"
    "輸達遷運連適遞邏遺郵釋鐘鋼鐵銀鏈銷鎖錯鍵鎮閉聞閱隊陽陰陣階際陸陳險隨隱難頁項順須預領頻題顏額顛類"
)
_SIMPLIFIED_ONLY = frozenset(_SIMPLIFIED) - frozenset(_TRADITIONAL)
_TRADITIONAL_ONLY = frozenset(_TRADITIONAL) - frozenset(_SIMPLIFIED)

_STOP_WORDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        language: frozenset(words.split())
        for language, words in {
            "en": "the of and to is in for that this with be are it as on by or an from can not which you",
            "es": "el los las que para una por con del este como se al es en lo más esta son ser su no de",
            "fr": "le les des une pour est dans que vous pas sur du la et en par qui ce être avec au ou de",
            "de": "der die das und ist nicht wird ein eine für mit den von zu auf im dem sie werden des oder",
            "pt": "não uma para os são você em como do da dos das ao que pode ou na no se por com mais de",
            "it": "il di che per una della sono gli non è del la le nel con dei alla delle si può questo un",
            "ca": "els amb per una les això és del que dels aquest la no es en ser si el com de o",
            "nl": "het een van niet voor dat de en is in op te zijn met wordt worden die als aan",
            "pl": "nie jest się dla który na do lub jak to przez może że od oraz tego jeśli",
            "sv": "och att för inte som ett är på med av till den det kan om eller från",
            "da": "og at for ikke som et er på med af til den det kan hvis eller fra",
            "cs": "není nebo pro které jako se na je že by při od byl lze",
            "hu": "az és nem hogy egy is meg vagy ha mint kell ez csak lehet",
            "ro": "și nu este care pentru la de cu din sau un pe în să mai",
            "tr": "bir için veya ile ve bu olarak da gibi olan değil",
            "vi": "của và là các có được cho không trong một với này khi để",
            "id": "yang dan untuk dengan tidak dari ini atau pada dalam akan adalah",
            "fi": "ja ei että tai se jos kun voi ovat myös joka sen",
        }.items()
    }
)
_WORD = re.compile(r"[^\W\d_]+")


def detect_language(text: str) -> str:
    """BCP 47 tag of `text`: zh-Hans, zh-Hant, ja, ko, en, es, ...; "und" when it cannot be told.

    Chinese, Japanese and Korean win over Latin letters at a small share already, because one of their
    characters says as much as several letters, and technical text is full of Latin names. Looks at the
    first 20,000 characters only.
    """
    sample = text[:SAMPLE_CHARACTERS]
    counts = {name: len(pattern.findall(sample)) for name, pattern in _SCRIPTS.items()}
    total = sum(counts.values())
    found = UNDETERMINED
    if counts["han"] + counts["kana"] + counts["hangul"] >= 8 or total >= MIN_LETTERS:
        found = _by_script(sample, counts, total)
    return _rarer(sample, total) if found == UNDETERMINED else found


def _by_script(sample: str, counts: Mapping[str, int], total: int) -> str:
    han, kana = counts["han"], counts["kana"]
    if kana > 0.05 * total and kana + han > 0.15 * total:
        return "ja"
    if counts["hangul"] > 0.1 * total:
        return "ko"
    if han > 0.15 * total:
        return _chinese(sample)
    if counts["cyrillic"] > 0.15 * total:
        return _cyrillic(sample)
    if counts["arabic"] > 0.15 * total:
        return "fa" if any(c in sample for c in "پچژگ") else "ar"
    for script, language in _ONE_LANGUAGE_SCRIPTS:
        if counts[script] > 0.15 * total:
            return language
    return _latin(sample) if counts["latin"] > 0.5 * total else UNDETERMINED


def _rarer(sample: str, others: int) -> str:
    """By the scripts that are not among the `others` letters that were counted."""
    if sample.isascii():
        return UNDETERMINED
    counts = {language: len(pattern.findall(sample)) for language, pattern in _RARER_SCRIPTS.items()}
    best = max(counts, key=lambda language: counts[language])
    total = others + sum(counts.values())
    return best if total >= MIN_LETTERS and counts[best] > 0.15 * total else UNDETERMINED


def _chinese(sample: str) -> str:
    traditional = sum(c in _TRADITIONAL_ONLY for c in sample)
    simplified = sum(c in _SIMPLIFIED_ONLY for c in sample)
    return "zh-Hant" if traditional > simplified else "zh-Hans"


def _cyrillic(sample: str) -> str:
    counts = Counter(sample.lower())
    marks = {"uk": "їєґі", "sr": "ђјљњћџ", "ru": "ыэё"}
    scores = {language: sum(counts[c] for c in letters) for language, letters in marks.items()}
    best = max(scores, key=lambda language: scores[language])
    return best if scores[best] else "bg"


def _latin(sample: str) -> str:
    """The language with the most stop words; one that k languages share counts 1/k for each."""
    words = Counter(_WORD.findall(sample.lower()))
    hits = {language: [word for word in stop if words[word]] for language, stop in _STOP_WORDS.items()}
    shared = Counter(word for stop in _STOP_WORDS.values() for word in stop)
    # fsum: a plain sum depends on the order of a set, which is another one in every process.
    scores = {
        language: math.fsum(words[word] / shared[word] for word in found) for language, found in hits.items()
    }
    best = max(scores, key=lambda language: scores[language])
    enough = len(hits[best]) >= MIN_STOP_WORDS and scores[best] >= 0.04 * words.total()
    return best if enough else UNDETERMINED
