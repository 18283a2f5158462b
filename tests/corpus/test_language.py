"""Language detection on sentences we wrote, not on the text the rules were tuned on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_b2.corpus.language import detect_language

SENTENCES = {
    "zh-Hans": "这个项目从头训练一个大型语言模型，我们会说明数据的来源和处理的方法。",
    "zh-Hant": "這個專案從頭訓練一個大型語言模型，我們會說明資料的來源和處理的方法。",
    "ja": "このプロジェクトは大規模な言語モデルを最初から訓練します。データの処理も説明します。",
    "ko": "이 프로젝트는 대규모 언어 모델을 처음부터 학습하고 데이터의 출처를 설명합니다.",
    "en": "This project trains a large language model from the beginning and explains where the data is from.",
    "es": "Este proyecto entrena un gran modelo de lenguaje y explica de dónde vienen los datos que se usan.",
    "fr": "Ce projet entraîne un grand modèle de langage et explique d'où viennent les données dans le détail.",
    "de": "Dieses Projekt trainiert ein großes Sprachmodell und erklärt, woher die Daten kommen und wie es geht.",
    "pt": "Este projeto não usa uma máquina só: os dados são lidos em partes, como se explica para você.",
    "it": "Questo progetto non è piccolo: i dati sono presi dalla rete, e si spiega il metodo della raccolta.",
    "ru": "Этот проект обучает большую языковую модель с нуля и объясняет, откуда взяты данные.",
    "uk": "Цей проєкт навчає велику мовну модель з нуля і пояснює, звідки взято дані та її розмір.",
    "ar": "هذا المشروع يدرب نموذجا لغويا كبيرا من البداية ويشرح مصدر البيانات",
    "el": "Αυτό το έργο εκπαιδεύει ένα μεγάλο γλωσσικό μοντέλο",
    "hi": "यह परियोजना एक बड़े भाषा मॉडल को प्रशिक्षित करती है",
    "th": "โครงการนี้ฝึกแบบจำลองภาษาขนาดใหญ่ตั้งแต่ต้นและอธิบายที่มาของข้อมูล",
    "km": "គម្រោងនេះបង្វឹកគំរូភាសាធំមួយតាំងពីដំបូង ហើយពន្យល់ពីប្រភពនៃទិន្នន័យ។",
    "lo": "ໂຄງການນີ້ຝຶກແບບຈໍາລອງພາສາຂະຫນາດໃຫຍ່ຕັ້ງແຕ່ຕົ້ນ ແລະອະທິບາຍທີ່ມາຂອງຂໍ້ມູນ",
    "my": "ဤစီမံကိန်းသည် ဘာသာစကားပုံစံကြီးတစ်ခုကို အစမှ လေ့ကျင့်ပေးပြီး အချက်အလက်များ၏ ဇာစ်မြစ်ကို ရှင်းပြသည်။",
    "bo": "ལས་གཞི་འདིས་སྐད་ཡིག་གི་དཔེ་གཞི་ཆེན་པོ་ཞིག་སྦྱོང་བརྡར་བྱེད་ཀྱི་ཡོད།",
    "bn": "এই প্রকল্প শুরু থেকে একটি বড় ভাষা মডেল প্রশিক্ষণ দেয় এবং তথ্যের উৎস ব্যাখ্যা করে।",
    "ka": "ეს პროექტი თავიდან ასწავლის დიდ ენობრივ მოდელს და ხსნის, საიდან არის მონაცემები.",
    "pl": "Ten projekt nie jest mały, a dane są pobierane przez sieć, co się dla użytkownika opisuje.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_sentence(language: str) -> None:
    assert detect_language(SENTENCES[language]) == language


def test_chinese_with_many_latin_names() -> None:
    assert detect_language("在 Linux 上运行 apt-get update 之后，请安装 python3 软件包。") == "zh-Hans"


def test_khmer_with_latin_names() -> None:
    assert detect_language("សូមដំឡើងកញ្ចប់ python3 និង apt-get នៅលើ Linux មុនពេលចាប់ផ្តើម។") == "km"


@pytest.mark.parametrize(
    "text", ["", "12 34", "x = y[3] + foo(bar, baz); qux.quux(corge, grault)", "::: --- ###"]
)
def test_undetermined(text: str) -> None:
    assert detect_language(text) == "und"


def test_the_answer_does_not_depend_on_the_seed_of_hashes() -> None:
    """Languages that share words get sums of thirds and quarters, which must not depend on their order."""
    program = """
import random
from megatron_b2.corpus.language import _STOP_WORDS, detect_language
chance = random.Random(0)
words = sorted(_STOP_WORDS["ca"] | _STOP_WORDS["fr"] | _STOP_WORDS["es"])
print([detect_language(" ".join(chance.choices(words, k=40))) for _ in range(2000)])
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(found) == 1
