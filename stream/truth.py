"""What was planted in a generated stream: the truth that a demo run is scored against, as JSON lines.

Beside the way of an event: written by simulate.py, read by demo.py. No part of the pipeline sees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from stream.errors import ConfigError


class StreamTruth(msgspec.Struct, frozen=True, kw_only=True, tag_field="truth", tag="stream"):
    """The stream as a whole. `bad` counts the bad records by the reason that their dead letter should give."""

    seed: int
    users: int
    events: int
    first_ms: int
    last_ms: int
    bad: dict[str, int]


class PlantedShift(msgspec.Struct, frozen=True, kw_only=True, tag_field="truth", tag="shift"):
    """One change of one user's interests. A user who comes back to the old ones has two: abrupt, then returning.

    Attributes:
        time_ms: of the first event of the changed behaviour.
        until_ms: when a gradual change is complete; `time_ms` for the others.
        kind: abrupt, gradual or returning.
        events_before, events_after: the user's events before `time_ms`, and from it until the user's next planted
            shift or the end.
        before, after: the interests, the strongest first.
    """

    user: str
    time_ms: int
    until_ms: int
    kind: str
    events_before: int
    events_after: int
    before: list[str]
    after: list[str]


class Season(msgspec.Struct, frozen=True, kw_only=True, tag_field="truth", tag="season"):
    """An interest that surges for everybody: no user's interests shift by it."""

    interest: str
    from_ms: int
    until_ms: int


class NewInterest(msgspec.Struct, frozen=True, kw_only=True, tag_field="truth", tag="new_interest"):
    """An interest that nobody could have before `time_ms`."""

    interest: str
    time_ms: int


Line = StreamTruth | PlantedShift | Season | NewInterest


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """All that was planted."""

    stream: StreamTruth
    shifts: list[PlantedShift]
    seasons: list[Season]
    new_interests: list[NewInterest]


def write_truth(path: Path, truth: Truth) -> None:
    """One JSON object a line; what it is stands in its field `truth`."""
    lines: list[Line] = [truth.stream, *truth.seasons, *truth.new_interests, *truth.shifts]
    path.write_bytes(msgspec.json.Encoder().encode_lines(lines))


def read_truth(path: Path) -> Truth:
    """What `write_truth` wrote; ConfigError when it is not that."""
    try:
        return _gather(msgspec.json.Decoder(Line).decode_lines(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"{path}: the truth cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"{path}: not the truth of a generated stream: {error}") from None


def _gather(lines: Iterable[Line]) -> Truth:
    lines = list(lines)
    streams = [line for line in lines if isinstance(line, StreamTruth)]
    if len(streams) != 1:
        raise ValueError(f"it has {len(streams)} lines about the stream, not one")
    return Truth(
        stream=streams[0],
        shifts=[line for line in lines if isinstance(line, PlantedShift)],
        seasons=[line for line in lines if isinstance(line, Season)],
        new_interests=[line for line in lines if isinstance(line, NewInterest)],
    )
