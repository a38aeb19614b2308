"""Sentiment of texts: given numbers go first, what is missing is masked, and each text costs a bounded time."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import orjson
import pytest

from models.inputs import Normaliser, event_numbers
from models.profile import AGGREGATE_COUNT
from stream.errors import ConfigError
from stream.events import EventDecoder, EventSettings
from stream.sentiment import TextSentiment, language_of
from stream.transport import LogRecord

Read = list[str]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Read:
    """Both libraries replaced by ones that count words, and remember what they were given."""
    read: Read = []

    class Analyzer:
        def polarity_scores(self, text: str) -> dict[str, float]:
            read.append(text)
            return {"compound": 0.5 * (text.count("good") - text.count("bad"))}

    class Chinese:
        def __init__(self, text: str) -> None:
            read.append(text)
            if text == "的的":
                raise ZeroDivisionError
            self.sentiments = 0.9 if "好" in text else 0.2

    english, chinese = ModuleType("vaderSentiment.vaderSentiment"), ModuleType("snownlp")
    english.SentimentIntensityAnalyzer = Analyzer  # type: ignore[attr-defined]
    chinese.SnowNLP = Chinese  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vaderSentiment", ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", english)
    monkeypatch.setitem(sys.modules, "snownlp", chinese)
    return read


def decoded(events: list[dict[str, Any]], **settings: Any) -> Any:
    records = [
        LogRecord("events", 0, n, 10**12, b"u", orjson.dumps({"user": "u", "interest": "i", "time": n, **event}))
        for n, event in enumerate(events)
    ]
    return EventDecoder(EventSettings(**settings), b"k").decode(records)


def test_a_text_has_a_sentiment_where_none_is_given(libraries: Read) -> None:
    """A given number stays; a text has one by its language; neither is missing, and the network sees a mask."""
    events: list[dict[str, Any]] = [
        {"text": "good"}, {"text": "bad bad bad"}, {"text": "good", "sentiment": -0.25}, {"text": "很好"},
        {"text": " "}, {}, {"text": "的的"},
    ]  # fmt: skip
    columns = decoded(events, text_sentiment="auto").columns
    assert columns.sentiment == pytest.approx([0.5, -1.0, -0.25, 0.8, np.nan, np.nan, np.nan], nan_ok=True)
    assert "good" in libraries and libraries.count("good") == 1, "a text beside a number is not read"
    aggregates = np.full((len(columns), AGGREGATE_COUNT), np.nan, np.float32)
    seen = event_numbers(columns, np.full(len(columns), np.nan, np.float32), aggregates, Normaliser.initial())
    assert seen[:, 14] == pytest.approx([0.5, -1.0, -0.25, 0.8, 0, 0, 0])
    assert seen[:, 15].tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_it_is_off_unless_asked_for(libraries: Read) -> None:
    """By default a text is carried and not read."""
    assert np.isnan(decoded([{"text": "good"}]).columns.sentiment).all() and not libraries


def test_no_more_than_so_many_characters_are_read(libraries: Read) -> None:
    """However long a text is."""
    decoded([{"text": "good " * 10_000}], text_sentiment="en", text_chars_max=64)
    assert [len(text) for text in libraries] == [64]


def test_a_missing_package_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the setting, the package and the way out; English alone does not ask for Chinese."""
    for name in ("vaderSentiment", "vaderSentiment.vaderSentiment", "snownlp"):
        monkeypatch.setitem(sys.modules, name, None)
    for language, package in (("en", "vaderSentiment"), ("zh", "snownlp"), ("auto", "vaderSentiment")):
        with pytest.raises(ConfigError, match=rf"events\.text_sentiment.*{package}.*driftline\[sentiment\]"):
            EventDecoder(EventSettings(text_sentiment=language), b"k")


def test_languages_are_told_apart() -> None:
    """By the share of Han characters; a Chinese word in an English text changes nothing."""
    assert [language_of(t) for t in ("fine", "质量很好 ok", "iPhone 15 Pro 好")] == ["en", "zh", "en"]


@pytest.mark.parametrize(
    ("language", "good", "bad"),
    [
        ("en", "I love it, it works great", "terrible, it broke and I hate it"),
        ("zh", "很好用，非常满意", "质量太差了，很失望"),
    ],
)
def test_the_libraries_themselves(language: str, good: str, bad: str) -> None:
    """Where they are installed: praise is above 0, a complaint below."""
    pytest.importorskip({"en": "vaderSentiment", "zh": "snownlp"}[language])
    of = TextSentiment(language, 400).of
    praise, complaint = of(good), of(bad)
    assert praise is not None and complaint is not None and complaint < -0.3 < 0.3 < praise
