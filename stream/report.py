"""One page that shows what a run was worth: a single HTML file with its plots, readable without a network.

At the end of the way of an event: demo.py gathers what is shown here. Plain data in, a string out; nothing is computed
here. The page follows the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import orjson
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from stream.figures import alerts_figure, quality_figure, reason_rows, reasons_figure, story_figure
from stream.findings import Report, Story, SummaryRow


def render_html(report: Report) -> str:
    """The page."""
    sections = [section("Forecasts over time", _QUALITY_TEXT, quality_figure(report), 330)]
    text = _ALERTS_TEXT.format(within=report.found_within_events)
    sections.append(section("Alerts against the truth", text, alerts_figure(report), 470))
    if report.story is not None:
        sections.append(_story_section(report.story))
    else:
        sections.append(
            "<section><h2>One user</h2><p>No planted shift was found, so there is no story to tell.</p></section>"
        )
    sections.insert(0, f"<section>{_table(report.summary)}</section>")
    return page(report.title, report.subtitle, sections)


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """A page of sections that needs no network."""
    return _PAGE.format(
        title=escape(title),
        subtitle=escape(subtitle),
        style=_STYLE,
        sections="\n".join(sections),
        plotly=get_plotlyjs(),
        script=_SCRIPT,
    )


def _table(rows: Sequence[SummaryRow]) -> str:
    body = []
    for row in rows:
        indent = ' class="sub"' if row.name.startswith(" ") else ""
        body.append(
            f"<tr{indent}><th>{escape(row.name.strip())}</th><td class=num>{escape(row.ours)}</td>"
            f"<td class='num rule'>{escape(row.rule)}</td><td class=note>{escape(row.note)}</td></tr>"
        )
    head = "<tr><th></th><th class=num>Driftline</th><th class=num>recency rule</th><th></th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def section(title: str, text: str, figure: go.Figure, height: int) -> str:
    """A plot with its title and what it shows; the text is HTML."""
    return f"<section><h2>{escape(title)}</h2><p>{text}</p>{_plot(figure, height)}</section>"


def _plot(figure: go.Figure, height: int) -> str:
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "b": 8, "t": figure.layout.margin.t or 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12.5},
        legend={
            "orientation": "h",
            "x": 0,
            "y": figure.layout.legend.y or 1.02,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
        },
        hoverlabel={"align": "left"},
        template="none",
    )
    figure.update_xaxes(automargin=True, zeroline=False, showgrid=False, showline=True)
    figure.update_yaxes(automargin=True, zeroline=False, showgrid=True)
    # orjson writes NaN as null, which plotly shows as a gap; json would write what no browser can parse.
    data = orjson.dumps(figure.to_plotly_json(), option=orjson.OPT_SERIALIZE_NUMPY, default=list).decode()
    data = data.replace("</", "<\\/")
    return f'<div class=plot style="height:{height}px"></div><script type="application/json">{data}</script>'


def _story_section(story: Story) -> str:
    text = (
        f"User {escape(story.user)}: a planted <b>{escape(story.kind)}</b> shift, found after "
        f"{story.delay_events} events. Not the best one: of the readable stories the one with the middle delay. "
        "Each mark is an event. Below it: what our forecasts expected of the next event, before that event was seen."
    )
    sentence = f"<blockquote>{escape(story.sentence)}</blockquote>" if story.sentence else ""
    paths = "".join(f"<li>{line}</li>" for line in _expectations(story))
    return (
        f"<section><h2>One user's story</h2><p>{text}</p>{_plot(story_figure(story), 620)}"
        f"<h3>What the alert said</h3>{sentence}{_plot(reasons_figure(story), 70 + 26 * reason_rows(story))}"
        f"<ul>{paths}</ul></section>"
    )


def _expectations(story: Story) -> list[str]:
    """The next steps as expected before the shift, and after the alert."""
    shift_ms = max((ms for ms in story.shift_ms if ms <= story.told_ms), default=story.told_ms)
    before = [o for o in story.outlooks if o.time_ms < shift_ms]
    after = [o for o in story.outlooks if o.time_ms >= story.told_ms]
    lines = []
    for name, outlook in (("before the shift", before[-1:]), ("at the alert and after", after[:1])):
        if outlook:
            steps = " → ".join(escape(interest) for interest in outlook[0].path)
            lines.append(f"Expected next, {name}: {steps}")
    return lines


_QUALITY_TEXT = (
    "Every forecast is judged on the event that comes next, before anything is learned from that event. The recency "
    "rule ranks the user's own interests by how recently they were seen, then everybody's. A move is an event that "
    "does not repeat the user's last interest: there the rule cannot win by saying the same again. Shaded: the season."
)
_ALERTS_TEXT = (
    "Each dot is a planted shift that an alert found: when it began, and how many events of that user it took. Crosses "
    "are missed ones: no alert until {within} events after the shift was complete. Strokes at the bottom are alerts "
    "without a planted shift. Hover for the alert's own words."
)

_STYLE = """
:root { --bg:#fbfbfa; --card:#fff; --ink:#1d232b; --soft:#5d6773; --line:#e4e6ea; --grid:#eceef1; }
@media (prefers-color-scheme: dark) {
  :root { --bg:#14171b; --card:#1b1f25; --ink:#e6e9ed; --soft:#9aa5b1; --line:#2c323a; --grid:#272d35; }
}
* { box-sizing:border-box }
body { margin:0; background:var(--bg); color:var(--ink); font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1080px; margin:0 auto; padding:40px 20px 60px }
h1 { font-size:28px; line-height:1.2; margin:0 0 4px; letter-spacing:-.01em }
h2 { font-size:18px; margin:0 0 6px }
h3 { font-size:15px; margin:18px 0 4px }
p { margin:0 0 12px; color:var(--soft); max-width:82ch }
header p { font-size:16px }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:22px 24px; margin-top:18px;
  overflow-x:auto }
table { border-collapse:collapse; width:100% }
th,td { text-align:left; padding:6px 14px 6px 0; border-bottom:1px solid var(--line); vertical-align:baseline }
tbody tr:last-child>* { border-bottom:0 }
thead th { color:var(--soft); font-weight:500; font-size:13px }
tbody th { font-weight:500; white-space:nowrap }
.sub th { padding-left:18px; font-weight:400; color:var(--soft) }
.num { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
td.num { font-weight:600 } td.rule { font-weight:400; color:var(--soft) }
.note { min-width:260px; color:var(--soft); font-size:13.5px }
blockquote { margin:8px 0 4px; padding:10px 16px; border-left:3px solid #e07b29; border-radius:4px;
  background:var(--bg) }
ul { margin:10px 0 0; padding-left:18px; color:var(--soft) }
.plot { width:100%; min-width:760px }
"""

_SCRIPT = """
const plots = [...document.querySelectorAll('.plot')].map(
  el => [el, JSON.parse(el.nextElementSibling.textContent)]);
function tone() {
  const css = getComputedStyle(document.documentElement);
  const pick = name => css.getPropertyValue(name).trim();
  const change = {'font.color': pick('--ink'), 'hoverlabel.bgcolor': pick('--card'),
    'hoverlabel.font.color': pick('--ink'), 'hoverlabel.bordercolor': pick('--line')};
  return [change, {gridcolor: pick('--grid'), linecolor: pick('--line'), tickcolor: pick('--line'),
    tickfont: {color: pick('--soft')}}];
}
async function draw() {
  const [change, axis] = tone();
  for (const [el, figure] of plots) {
    if (!el.data) await Plotly.newPlot(el, figure.data, figure.layout, {displayModeBar: false, responsive: true});
    const all = {...change};
    for (const key of Object.keys(el.layout)) if (/^[xy]axis/.test(key))
      for (const [name, value] of Object.entries(axis)) all[key + '.' + name] = value;
    await Plotly.relayout(el, all);
  }
}
draw().then(() => document.body.dataset.drawn = 'yes');
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
<header><h1>{title}</h1><p>{subtitle}</p></header>
{sections}
</main><script>{plotly}</script><script>{script}</script></body></html>
"""
