"""Sentiment of a text, for events that bring a text and no number: -1 (bad) .. 1 (good), by libraries that are extras.

On the way of an event: the decoder asks for it where `events.text_sentiment` is on. English by vaderSentiment (rules
and a lexicon), Chinese by snownlp (a naive Bayes of reviews, its probability stretched to -1..1). Each text costs what
its first `events.text_chars_max` characters cost, and no more.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from stream.errors import ConfigError

_CHINESE_SHARE = 0.2  # of a text's characters that are Han: from there on it is Chinese
_PACKAGES = {"en": "vaderSentiment", "zh": "snownlp"}


class TextSentiment:
    """Sentiments of texts.

    Args:
        language: en, zh, or auto: Chinese where enough of the characters are.
        chars_max: what lies behind so many characters is not read.

    Raises:
        ConfigError: a package that it takes is not installed.
    """

    def __init__(self, language: str, chars_max: int) -> None:
        self._chars_max = chars_max
        wanted = ("en", "zh") if language == "auto" else (language,)
        self._by_language: dict[str, Callable[[str], float]] = {name: _loaded(name) for name in wanted}
        self._only = None if language == "auto" else language

    def of(self, text: str | None) -> float | None:
        """The sentiment; None where there is no text, or nothing to go by."""
        text = "" if text is None else text[: self._chars_max].strip()
        if not text:
            return None
        try:
            value = self._by_language[self._only or language_of(text)](text)
        except (ValueError, ZeroDivisionError, IndexError, KeyError):  # a text of signs that the library cannot take
            return None
        return max(-1.0, min(1.0, value)) if math.isfinite(value) else None


def language_of(text: str) -> str:
    """zh where a fifth of the characters are Han, else en."""
    han = sum("\u4e00" <= c <= "\u9fff" for c in text)
    return "zh" if han >= _CHINESE_SHARE * len(text) else "en"


def _loaded(language: str) -> Callable[[str], float]:
    package = _PACKAGES[language]
    try:
        if language == "en":
            module: Any = importlib.import_module("vaderSentiment.vaderSentiment")
            scores = module.SentimentIntensityAnalyzer().polarity_scores
            return lambda text: float(scores(text)["compound"])
        module = importlib.import_module("snownlp")
    except ImportError:
        raise ConfigError(
            f"events.text_sentiment = {language!r} takes the package {package}, which is not installed; install "
            "driftline[sentiment], or give a number as sentiment or rating and leave events.text_sentiment empty"
        ) from None
    make = module.SnowNLP
    return lambda text: 2.0 * float(make(text).sentiments) - 1.0
