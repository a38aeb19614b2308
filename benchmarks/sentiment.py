"""Whether the sentiment of review texts agrees with the stars, beside two trivial scores.

    python benchmarks/sentiment.py Musical_Instruments.zip --text reviewText --stars overall [--limit N]

The file holds JSON lines (also in a zip or gzip). Printed is the area under the curve of each score for four or more
stars: the sentiment as the decoder makes it (stream/sentiment.py), the length of the text (shorter is better), and ten
good words less ten bad ones. Needs driftline[sentiment].
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.evaluate import area_under_curve  # noqa: E402
from stream.sentiment import TextSentiment  # noqa: E402

GOOD = {"good", "great", "love", "best", "perfect", "nice", "excellent", "happy", "easy", "recommend"}
BAD = {"bad", "poor", "broke", "worst", "return", "returned", "cheap", "waste", "disappointed", "useless"}


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, of a gzip, or of all files of a zip."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    yield from file
    else:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file


def counted(text: str) -> float:
    words = [word.strip(".,!?;:()\"'") for word in text.lower().split()]
    return float(sum(word in GOOD for word in words) - sum(word in BAD for word in words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", required=True, help="column of the text")
    parser.add_argument("--stars", required=True, help="column of the stars, 1 to 5")
    parser.add_argument("--language", default="en")
    parser.add_argument("--chars", type=int, default=500, help="characters of a text that are read")
    parser.add_argument("--limit", type=int, default=None)
    given = parser.parse_args()
    rows = [json.loads(line) for line in lines_of(given.file) if line.strip()][: given.limit]
    good_E = np.array([float(row[given.stars]) >= 4 for row in rows])
    texts = [str(row.get(given.text) or "") for row in rows]
    sentiment = TextSentiment(given.language, given.chars)
    scores: dict[str, Callable[[str], float]] = {
        "sentiment": lambda text: sentiment.of(text) or 0.0,
        "shorter is better": lambda text: -float(len(text)),
        "twenty words counted": lambda text: counted(text[: given.chars]),
    }
    print(f"{len(rows)} texts, {good_E.mean():.0%} with four or more stars")
    for name, score in scores.items():
        start_s = time.process_time()
        value_E = np.array([score(text) for text in texts])
        spent_ms = (time.process_time() - start_s) / len(texts) * 1e3
        print(f"{name:22s} area under the curve {area_under_curve(value_E, good_E):.3f}   {spent_ms:.3f} ms a text")


if __name__ == "__main__":
    main()
