"""JSON Schemas of the output topics, generated from the types in records.py. Run: python -m stream.schemas FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from stream.records import BatchMetrics, DeadLetter, Forecast, ShiftAlert, Verdict

RECORDS: dict[str, type[msgspec.Struct]] = {
    "forecasts": Forecast,
    "alerts": ShiftAlert,
    "verdicts": Verdict,
    "dead-letters": DeadLetter,
    "metrics": BatchMetrics,
}


def schema(topic: str) -> dict[str, Any]:
    """The schema of a topic's records (JSON Schema 2020-12). Unknown fields are allowed: versions may add some."""
    record = RECORDS[topic]
    generated = msgspec.json.schema(record)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{topic}, version 1",
        **generated,
    }


def write(folder: Path) -> list[Path]:
    """Write every schema into the folder; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for topic in RECORDS:
        path = folder / f"{topic}.json"
        path.write_text(json.dumps(schema(topic), indent=2) + "\n")
        paths.append(path)
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/schemas"))
