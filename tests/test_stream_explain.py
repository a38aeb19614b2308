"""`driftline explain` and `driftline user`: an alert in words, with plots, on every log."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
from pipelines import START_MS, make, run, stream

from stream.assembly import make_decoder, topic_specs
from stream.config import Config, topic_names
from stream.errors import ConfigError
from stream.explain import Explanation, explanation, in_lines, write_page
from stream.loading import load
from stream.records import ShiftAlert, encode
from stream.transport import Transport

EVIL = "</script><script>document.title='broken'</script>"
Told = tuple[Transport, Config, list[ShiftAlert]]


@pytest.fixture(scope="module")
def outputs() -> list[tuple[str, Any]]:
    """What a worker says to a stream in which u0 changes all interests."""
    return run(make(), stream(900), 512)[1]


@pytest.fixture
def told(transport: Transport, outputs: list[tuple[str, Any]]) -> Told:
    """The stream, its alerts and verdicts, and a surge's alert, in topics of their own; and the settings."""
    tag = uuid.uuid4().hex[:8]
    config = load(
        None,
        ("topics.partitions=1", f"topics.prefix={tag}-", f'topics.events=["{tag}-events"]', "topics.retention_h=-1"),
    ).config
    admin = transport.admin()
    admin.create(topic_specs(config))
    admin.close()
    events = f"{tag}-events"
    transport.append(events, 0, iter([(r.key, r.value, r.timestamp) for r in stream(900)]))
    alerts = []
    for name, record in outputs:
        text = orjson.dumps(record).replace(b'"events/0/', f'"{events}/0/'.encode())
        if name == "alerts":
            alerts.append(msgspec.json.decode(text, type=ShiftAlert))
        if name in ("alerts", "verdicts"):
            transport.append(topic_names(config)[name], 0, iter([(record["user"].encode(), text, START_MS)]))
    surge = msgspec.structs.replace(
        alerts[0],
        id=f"{events}/0/7/all",
        alert_id=f"{events}/0/7/all",
        user="",
        scope="all",
        sentence="All turn to it.",
    )
    transport.append(topic_names(config)["alerts"], 0, iter([(None, encode(surge), START_MS)]))
    return transport, config, alerts


def of(told: Told, alert: ShiftAlert) -> Explanation:
    transport, config, _ = told
    return explanation(transport, config, make_decoder(config), alert.alert_id)


def test_an_alert_is_explained_with_plots(told: Told, tmp_path: Path) -> None:
    """Reason, contributions that add up, a sentence, the events with onset and alert; as lines and as a page."""
    alert = next(a for a in told[2] if a.user == "u0" and a.source.offset > 450)
    one = of(told, alert)
    assert one.alert == alert and one.events[0].place < 0 < one.events[-1].place
    assert sum(c.contribution for c in [*alert.gained, *alert.lost]) == pytest.approx(alert.severity, abs=1e-4)
    text = "\n".join(in_lines(one))
    assert alert.sentence in text and "█" in text and "░" in text and "rank score" in text
    assert "(not here)" not in text and "│" in text and "┃" in text
    marks = [line for line in in_lines(one) if line.endswith(("·", "●", "┃")) and "●" in line]
    assert sum(line.count("●") for line in marks) == len(one.events)
    page = tmp_path / "alert.html"
    write_page(page, [one], "One alert")
    written = page.read_text()
    assert alert.sentence in written.replace("&#x27;", "'") and "src=" not in written.partition("Plotly")[0]


def test_verdicts_are_told(told: Told) -> None:
    """An alert with thirty more events says whether it held; one without says that it is not known."""
    texts = ["\n".join(in_lines(of(told, alert))) for alert in told[2]]
    assert any("It held" in t or "It did not hold" in t for t in texts)
    assert all("held" in t or "did not hold" in t or "is not known" in t for t in texts)


def test_a_surge_is_explained_too(told: Told) -> None:
    """An alert on all users has no events of a user, and no verdict."""
    transport, config, _ = told
    one = explanation(transport, config, make_decoder(config), f"{config.topics.events[0]}/0/7/all")
    assert one.events == [] and one.verdict is None and "all users" in in_lines(one)[0]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("nonsense", "is no alert_id"),
        ("TOPIC/0/x", "is no alert_id"),
        ("TOPIC/0/1/you", "is no alert_id"),
        ("other/0/1", "none of this application's"),
        ("TOPIC/9/1", "none of this application's"),
        ("TOPIC/0/123456", "there is no alert"),
    ],
)
def test_an_unknown_id_is_said_so(told: Told, asked: str, said: str) -> None:
    """What is no id, of another application, or not there, is an error that says what to do."""
    transport, config, _ = told
    with pytest.raises(ConfigError, match=said):
        explanation(transport, config, make_decoder(config), asked.replace("TOPIC", config.topics.events[0]))


def test_names_cannot_break_the_page_or_the_terminal(told: Told, tmp_path: Path) -> None:
    """Markup and control characters that users wrote stay text."""
    one = of(told, told[2][0])
    evil = msgspec.structs.replace(one.alert.gained[0], interest=EVIL + "\x1b[2J")
    events = [msgspec.structs.replace(e, interest=EVIL) for e in one.events]
    alert = msgspec.structs.replace(one.alert, gained=[evil], sentence=EVIL)
    broken = Explanation(alert=alert, verdict=one.verdict, events=events)
    assert not any("\x1b" in line for line in in_lines(broken) if "█" in line)
    write_page(tmp_path / "p.html", [broken], "t")
    assert "<script>document" not in (tmp_path / "p.html").read_text()
    with pytest.raises(ConfigError, match="--html"):
        write_page(tmp_path / "nowhere" / "p.html", [broken], "t")
