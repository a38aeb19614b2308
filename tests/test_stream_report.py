"""The report: one file, no network, everything on it that it was given, nothing that a name could break."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from stream.findings import AlertMark, Bar, Outlook, QualityPoint, Report, SeenEvent, ShiftMark, Story, SummaryRow
from stream.report import render_html

HOUR_MS, START_MS = 3_600_000, 1_759_708_800_000
EVIL = "</script><script>document.title='broken'</script>&<b>tea"


def story(interest: str = "tea") -> Story:
    events = [
        SeenEvent(
            time_ms=START_MS + n * HOUR_MS, interest=interest if n < 30 else "tents", type="browse" if n % 3 else ""
        )
        for n in range(60)
    ]
    return Story(
        user="ada",
        kind="abrupt",
        delay_events=12,
        events=events,
        before=[interest, "coffee"],
        after=["tents"],
        shift_ms=[events[30].time_ms],
        alerts=[AlertMark(user="ada", time_ms=events[42].time_ms, kind="abrupt", sentence="Ada left for the hills.")],
        told_ms=events[42].time_ms,
        sentence="Ada left for the hills.",
        gained=[Bar(name="tents", value=0.3)],
        lost=[Bar(name=interest, value=-0.2)],
        outlooks=[Outlook(time_ms=e.time_ms, shares={interest: 0.5}, path=[interest, "coffee"]) for e in events[::5]],
    )


def report(interest: str = "tea") -> Report:
    return Report(
        title="A run",
        subtitle="of 60 events",
        summary=[
            SummaryRow(name="MRR, all", ours="0.512", rule="0.498", note="judged before learning"),
            SummaryRow(name="  abrupt", ours="3 of 4"),
        ],
        curve=[
            QualityPoint(
                time_ms=START_MS + n * HOUR_MS,
                events=10,
                mrr=0.5,
                recency_mrr=0.4,
                mrr_moves=float("nan") if n == 0 else 0.2,
                recency_mrr_moves=0.1,
                hits_10=0.8,
                recency_hits_10=0.7,
            )
            for n in range(20)
        ],
        shifts=[
            ShiftMark(user="ada", time_ms=START_MS, kind="abrupt", delay_events=12, sentence="Ada left for the hills."),
            ShiftMark(user="ben", time_ms=START_MS, kind="gradual", delay_events=None, sentence=""),
        ],
        false=[AlertMark(user="cleo", time_ms=START_MS, kind="abrupt", sentence="Cleo did not move.")],
        seasons=[("advent", START_MS, START_MS + 5 * HOUR_MS)],
        found_within_events=60,
        story=story(interest),
    )


def test_everything_given_is_on_the_page() -> None:
    """Title, table, every plot and the story's words are there."""
    page = render_html(report())
    for text in (
        "A run",
        "of 60 events",
        "0.512",
        "0.498",
        "judged before learning",
        "3 of 4",
        "until 60 events after",
    ):
        assert text in page, text
    for text in ("Cleo did not move.", "abrupt (1 of 1 found)", "gradual (0 of 1 found)", "season: advent"):
        assert text in page, text
    assert "<blockquote>Ada left for the hills.</blockquote>" in page
    assert "before the shift: tea → coffee" in page
    assert page.count("<div class=plot") == 4 == page.count('type="application/json"')


def test_the_page_needs_no_network_and_holds_plotly_once() -> None:
    """No link or script of the page's own points anywhere, and the plotting library is inlined one time."""
    page = render_html(report())
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    assert page.count("plotly.js v") == 1
    assert 3_000_000 < len(page) < 8_000_000


def test_names_cannot_break_the_page() -> None:
    """An interest that looks like a script is shown as text: in the HTML and in the plots' data alike."""
    page = render_html(report(EVIL))
    assert "<script>document.title" not in page
    assert "&lt;/script&gt;" in page


def test_a_run_without_shifts_quality_or_story_still_has_a_page() -> None:
    """Nothing found and nothing judged is said, not a crash."""
    empty = replace(report(), curve=[], shifts=[], false=[], seasons=[], story=None)
    assert "no story to tell" in render_html(empty)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
@pytest.mark.parametrize("interest", ["tea", EVIL])
def test_a_browser_draws_every_plot(tmp_path: Path, interest: str) -> None:
    """In a real browser all four plots are drawn, without an error, and no name has run as a script."""
    path = tmp_path / "report.html"
    path.write_text(render_html(report(interest)), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-drawn="yes"' in drawn
    assert drawn.count('class="main-svg"') >= 4
    assert "<title>A run</title>" in drawn
