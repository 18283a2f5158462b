"""The rules against a loop over documents, their limits, and what is said of a wrong configuration."""

from __future__ import annotations

import operator
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2.corpus.signals import RULES, SIGNALS, configure, judge, measure_signals
from megatron_b2.corpus.signals.rules import Rule
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import ConfigError

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
GOOD = (
    "The weather of the north is cold, and people who live there have to be ready for long winters with little light.\n"
    "Houses are built from wood that grows in the large forests, because stone would be hard to warm in the dark time.\n"
    "Every autumn families gather mushrooms, berries and firewood, which they store in dry sheds behind the kitchen.\n"
)  # fmt: skip
GOOD_ZH = (
    "北方的冬天很冷，人们在秋天就开始准备木柴和食物。房子大多是用木头建的，因为石头在漫长的黑夜里不容易变暖。\n"
    "每年秋天，一家人会一起去森林里采蘑菇和浆果，然后把它们放在厨房后面干燥的小屋里。这样，整个冬天都有东西吃。\n"
)


GOOD_ELSEWHERE = {
    "hi": (
        "हिन्दी विश्व की एक प्रमुख भाषा है और भारत की एक राजभाषा है। केन्द्रीय स्तर पर भारत में सह आधिकारिक भाषा अंग्रेजी है। यह हिंदुस्तानी भाषा की एक मानकीकृत रूप है जिसमें संस्कृत के तत्सम तथा तद्भव शब्दों का प्रयोग अधिक है।\n"
        "दिल्ली भारत की राजधानी है और यहाँ बहुत से लोग रहते हैं। यह नगर यमुना नदी के किनारे पर बसा हुआ है और इसका इतिहास बहुत पुराना है।\n"
    ),
    "th": (
        "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอนหรือวรรณยุกต์เช่นเดียวกับภาษาจีน และออกเสียงแยกคำต่อคำ\n"
        "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย เป็นศูนย์กลางการปกครอง การศึกษา การคมนาคมขนส่ง\n"
        "แม่น้ำเจ้าพระยาเป็นแม่น้ำสายหลักของประเทศไทยไหลผ่านหลายจังหวัดก่อนลงสู่อ่าวไทย\n"
    ),
    "km": (
        "ភាសាខ្មែរគឺជាភាសាកំណើតរបស់ជនជាតិខ្មែរនិងជាភាសាផ្លូវការរបស់ប្រទេសកម្ពុជា។ ប្រាសាទអង្គរវត្តជាប្រាសាទធំជាងគេ។\n"
        "ភ្នំពេញគឺជារាជធានីនិងទីក្រុងធំបំផុតនៃប្រទេសកម្ពុជា មានទីតាំងនៅតាមដងទន្លេមេគង្គ។\n"
    ),
}  # fmt: skip


def broken_by(text: str, language: str, **overrides: object) -> str | None:
    verdicts = judge(measure_signals(Texts.of([text])), [language], configure(overrides))
    (name,) = verdicts.to_arrow().to_pylist()
    return name


def test_rules_name_signals_and_are_unique() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert {rule.signal for rule in RULES} <= {signal.name for signal in SIGNALS}


def test_good_documents_stay() -> None:
    assert broken_by(GOOD, "en") is None
    assert broken_by(GOOD_ZH, "zh-Hans") is None


@pytest.mark.parametrize("language", GOOD_ELSEWHERE)
def test_good_documents_of_other_scripts_stay(language: str) -> None:
    """Their lines end with another full stop, or with none."""
    assert broken_by(GOOD_ELSEWHERE[language], language) is None


@pytest.mark.parametrize(
    ("rule", "text", "language"),
    [
        ("gopher_words_min", "The cat and the dog.", "en"),
        ("gopher_word_length_min", "a b to c d of e f g h " * 10, "en"),
        ("gopher_word_length_max", "internationalization and interoperability of microarchitectures " * 20, "en"),
        ("gopher_hashes", GOOD + "# " * 30, "en"),
        ("gopher_ellipses", GOOD.replace(" the ", " ... "). replace(", ", "... ").replace(" and", "... and"), "en"),
        ("gopher_alphabetic_words", GOOD + "1234 5678 " * 10, "en"),
        ("gopher_stop_words", "Katzen schlafen " * 30, "en"),
        ("gopher_duplicate_lines", GOOD * 2, "en"),
        ("cjk_characters_min", "今天的天气是好的。", "zh-Hans"),
        ("zh_stop_words", "春眠觉晓处处闻啼鸟夜来风雨声花落知多少" * 5, "zh-Hant"),
        ("unspaced_duplicate_10_grams", GOOD_ZH.replace("\n", "") + GOOD_ZH[10:40] + "。", "zh"),
        ("gopher_duplicate_5_grams", GOOD.replace("\n", " ") + GOOD[:100], "en"),
        ("c4_lorem_ipsum", GOOD + "Lorem ipsum dolor sit amet, consetetur sadipscing elitr, sed diam nonumy eirmod.", "en"),
        ("fineweb_punctuated_lines", GOOD.replace(".\n", "\n"), "en"),
        ("fineweb_short_lines", re.sub(r"((\S+ ){4})", r"\1.\n", GOOD), "en"),
        ("broken_characters", GOOD + "\ufffd" * 9, "en"),
    ],
)  # fmt: skip
def test_first_rule_that_is_broken(rule: str, text: str, language: str) -> None:
    assert broken_by(text, language) == rule


def test_rules_for_spaced_languages_leave_chinese_alone() -> None:
    """Gopher's 50 words of at least 3 characters would remove this; so would its English stop words."""
    table = measure_signals(Texts.of([GOOD_ZH]))
    assert table["mean_word_length"][0] == 0
    assert broken_by(GOOD_ZH, "en") == "gopher_word_length_min"
    assert broken_by(GOOD_ZH, "zh") is None


def test_published_rules_that_are_off_can_be_switched_on() -> None:
    text = GOOD + "A line with {code} in it that is long enough for the others, and ends as it should.\n"
    assert broken_by(text, "en") is None
    assert broken_by(text, "en", c4_curly_brackets=True) == "c4_curly_brackets"
    assert broken_by(text, "en", c4_curly_brackets=2) is None
    assert broken_by(text, "en", c4_sentences=5) == "c4_sentences"
    short = GOOD.splitlines()[0]
    assert broken_by(short, "en") == "gopher_words_min"
    assert broken_by(short, "en", gopher_words_min=False) is None


def test_a_share_of_exactly_the_threshold_meets_it() -> None:
    """0.1 is no float32: ten words with one # have a share that is a little larger than 0.1 in float64."""
    table = measure_signals(Texts.of(["a b c d e f g h i j #"]))
    assert float(table["hashes_per_word"][0]) > 0.1
    for comparison, broken in ((">=", -1), ("<=", -1), (">", 0), ("<", 0)):
        rule = Rule("r", "hashes_per_word", comparison, 0.1, "test")
        assert judge(table, ["en"], [rule]).broken.tolist() == [broken]


def test_all_wrong_settings_are_named_at_once() -> None:
    overrides = {
        "gopher_word_min": 3,
        "c4_sentences": "many",
        "fineweb_newlines": float("nan"),
        "gopher_hashes": 0.2,
    }
    with pytest.raises(ConfigError) as caught:
        configure(overrides)
    first, second, third = caught.value.problems
    assert first == "there is no rule 'gopher_word_min'; did you mean gopher_words_min?"
    assert second == "rule c4_sentences: 'many' is neither a finite threshold nor true or false"
    assert third == "rule fineweb_newlines: nan is neither a finite threshold nor true or false"


def test_languages_must_be_as_many_as_documents() -> None:
    with pytest.raises(ValueError, match="2 documents need as many languages, not 1"):
        judge(measure_signals(Texts.of(["a", "b"])), ["en"], RULES)


def test_no_documents() -> None:
    verdicts = judge(measure_signals(Texts.of([])), [], configure({}))
    assert len(verdicts.broken) == 0
    assert verdicts.counts() == {}


@given(
    thresholds=st.lists(st.floats(0, 2, width=32), min_size=6, max_size=6),
    comparisons=st.lists(st.sampled_from(list(COMPARE)), min_size=6, max_size=6),
    languages=st.lists(st.sampled_from(["en", "zh-Hans", "ZH", "und", "ja"]), min_size=4, max_size=4),
)
def test_judge_is_the_loop(thresholds: list[float], comparisons: list[str], languages: list[str]) -> None:
    table = measure_signals(Texts.of([GOOD, GOOD_ZH, "a b c. " * 9, ""]))
    signals = ("words", "han", "short_lines", "stop_words", "duplicate_lines", "top_2_gram")
    scopes = [((), ()), (("zh",), ()), ((), ("zh", "ja")), (("en", "ja"), ()), ((), ("en",)), ((), ())]
    rules = [
        Rule(f"r{i}", signal, comparisons[i], thresholds[i], "test", *scopes[i])  # type: ignore[arg-type]
        for i, signal in enumerate(signals)
    ]
    verdicts = judge(table, languages, rules)
    expected = []
    for row, language in zip(table, languages, strict=True):
        primary = language.lower().split("-")[0]
        failed = [
            i
            for i, rule in enumerate(rules)
            if (not rule.languages or primary in rule.languages)
            and primary not in rule.but_not
            and not COMPARE[rule.comparison](float(row[rule.signal]), rule.threshold)
        ]
        expected.append(failed[0] if failed else -1)
    assert verdicts.broken.tolist() == expected
    assert verdicts.is_kept.tolist() == [index < 0 for index in expected]
    assert sum(verdicts.counts().values()) == int(np.sum(~verdicts.is_kept))
