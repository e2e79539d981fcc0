"""The plot of a run: horizontal bars of throughput and latency over bare commands, as an SVG written by hand."""

from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from benchmarks.figures import BARE, OURS, TIMES, Spread
from benchmarks.report import Run, number

SIDES: Final = (BARE, OURS, "idemkit", "idempotency-kit", "exactly-once", "pyidempotent", "powertools (synchronous)")
"""Whom the plot shows, from top to bottom; our other levels are in the table."""

WIDTH: Final = 760
LEFT: Final = 178
"""Where bars begin."""
RIGHT: Final = 64
"""Room for a figure behind the longest bar."""
FIGURE: Final = 50
"""How wide a figure is."""
BAR: Final = 16
STEP: Final = 24

STYLE: Final = """
text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.note, .hint { fill: #59636e; font-size: 12px }
.value { font-variant-numeric: tabular-nums }
.ours { fill: #1a7f5a } .bare { fill: #6e7781 } .peer { fill: #9fb3c8 }
.one, .spread { stroke: #59636e } .one { stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .note, .hint { fill: #9198a1 }
.ours { fill: #3fb98a } .bare { fill: #8b949e } .peer { fill: #4d6580 }
.one, .spread { stroke: #9198a1 }
}
"""
"""Colours for light and dark; there is no background, so that the page's own shows."""


class Panel(NamedTuple):
    """One group of bars."""

    key: str
    title: str
    hint: str


PANELS: Final = (
    Panel("throughput_64", "Throughput of first calls, 64 tasks", f"{TIMES} bare commands, more is better"),
    Panel("first_p50", "Latency of a first call, p50", f"{TIMES} its two bare commands, less is better"),
    Panel("replay_p50", "Latency of a replay, p50", f"{TIMES} one bare command, less is better"),
    Panel("large_first", "Latency of a first call with a 100 KB result, p50", f"{TIMES} bare commands, less is better"),
)


def as_svg(run: Run) -> str:
    """Return the plot; the same run gives the same text."""
    body: list[str] = []
    y = 24
    body.append(_text(0, y, "asyncidem beside bare redis.asyncio commands and its peers", "title"))
    y += 20
    body.append(_text(0, y, run.environment.sentence, "note"))
    y += 30
    for panel in PANELS:
        ratios = _ratios(run, panel.key)
        if not ratios:
            continue
        body.append(_text(0, y, panel.title, "title"))
        body.append(_text(WIDTH, y, panel.hint, "hint", anchor="end"))
        y += 12
        body += _bars(ratios, y)
        y += STEP * len(ratios) + 30
    height = y - 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="Throughput and latency over bare redis.asyncio commands">'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *body, "</svg>"]) + "\n"


def _ratios(run: Run, key: str) -> list[tuple[str, Spread | None]]:
    """Return the sides with their ratios; None for a side that failed."""
    measured = run.rows.get(key)
    if measured is None:
        return []
    sides = [(name, measured.sides[name]) for name in SIDES if name in measured.sides]
    return [(name, side.ratio) for name, side in sides]


def _bars(ratios: list[tuple[str, Spread | None]], top: int) -> list[str]:
    longest = max((spread.high for _, spread in ratios if spread is not None), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / max(longest, 1.0)
    one = LEFT + scale
    parts = [f'<line class="one" x1="{one:.1f}" y1="{top}" x2="{one:.1f}" y2="{top + STEP * len(ratios)}"/>']
    for row, (name, spread) in enumerate(ratios):
        y = top + row * STEP + (STEP - BAR) // 2
        middle = y + BAR / 2
        parts.append(_text(LEFT - 10, middle + 4.5, name, "name", anchor="end"))
        if spread is None:
            parts.append(_text(LEFT + 4, middle + 4.5, "failed, see the table", "note"))
            continue
        kind = {BARE: "bare", OURS: "ours"}.get(name, "peer")
        width = max(spread.median * scale, 1.0)
        parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2"/>')
        low, high = LEFT + spread.low * scale, LEFT + spread.high * scale
        parts.append(f'<line class="spread" x1="{low:.1f}" y1="{middle:.1f}" x2="{high:.1f}" y2="{middle:.1f}"/>')
        end = max(LEFT + width, high) + 8
        if end < one < end + FIGURE:
            end = one + 8  # not across the line
        parts.append(_text(end, middle + 4.5, f"{number(spread.median)} {TIMES}", "value"))
    return parts


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{place}>{escape(text)}</text>'
