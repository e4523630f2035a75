"""A chart of curves as HTML: drawn in SVG, read off with mouse or finger, printed as it stands, and nothing to fetch.

    parts = [chart_html("Loss", [Series("loss", [(1, 4.2), (2, 3.9)])])]
    write_page(path, title, [*parts, f"<script>{SCRIPT}</script>"], STYLE)

Without the script the chart still shows its curves, their last values and the switch to a logarithmic axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from runtime.page import escape

Points = list[tuple[float, float]]
"""(step, value) in the order of steps."""

WIDTH, HEIGHT = 400, 200
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 8, 22
"""Units of the SVG: its size, and the margins around the plotted area, which hold the axes' labels."""
COLOURS = 8
"""Curves that have a colour of their own."""
SHOWN_POINTS = 300
"""A longer curve is thinned to about so many points."""
DOTTED = 20
"""A curve of at most so many points shows each of them as a dot."""

STYLE = """
:root { --c0: #2f66c9; --c1: #d2601a; --c2: #23874a; --c3: #a43fb5; --c4: #9a7b00; --c5: #0a8799; --c6: #cc2f57; --c7: #6b7280;
  --bad: #cc2222 }
@media screen and (prefers-color-scheme: dark) { :root { --c0: #7ba7f7; --c1: #f59a55; --c2: #5cc987; --c3: #d78be4;
  --c4: #dcc04a; --c5: #4cc4d6; --c6: #f57d9c; --c7: #a3abb8; --bad: #ff6b6b } }
.charts { --cell: 360px } .chart { padding: 10px 12px 8px; break-inside: avoid; min-width: 0 }
.chart figcaption { display: flex; justify-content: space-between; gap: 10px; font-size: 13px; font-weight: 600; margin-bottom: 4px }
.chart figcaption > * { min-width: 0; overflow-wrap: anywhere } .chart output { margin-left: auto }
.chart output, .chart label { font-weight: 400; color: var(--soft); font-variant-numeric: tabular-nums }
.chart label, .chart output { flex: none; white-space: nowrap } .chart input { margin: 0 2px 0 0; vertical-align: -2px }
.chart svg { display: block; width: 100%; height: auto; touch-action: pan-y; cursor: crosshair }
.chart text { fill: var(--soft); font: 11px system-ui, sans-serif } .chart .rule { stroke: var(--line) }
.chart polyline { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round } .chart .dashed { stroke-dasharray: 5 3 }
.chart circle { fill: var(--c) } .chart .mark { stroke: var(--bad); stroke-width: 2 }
.chart .cursor { stroke: var(--soft); stroke-dasharray: 2 2; visibility: hidden }
.chart:has(:checked) .linear, .chart:not(:has(:checked)) .logarithmic { display: none }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--soft); margin-top: 4px }
.keys span { overflow-wrap: anywhere } .keys i { display: inline-block; width: 16px; border-top: 3px solid var(--c);
  vertical-align: middle; margin-right: 5px } .keys i.dashed { border-top-style: dotted }
@media print { .charts { --cell: 300px } .chart label { display: none } } .keys b { color: var(--ink); font-weight: 500; font-variant-numeric: tabular-nums }
"""
"""CSS of the charts, for `runtime.page.write_page`. Dark colours are for the screen alone: paper is white."""

SCRIPT = """
for (const chart of document.querySelectorAll('.chart')) {
  const svg = chart.querySelector('svg'), cursor = svg.querySelector('.cursor'), output = chart.querySelector('output')
  const values = [...chart.querySelectorAll('.keys b')], last = values.map(value => value.textContent)
  const numbers = text => text.split(' ').map(Number)
  const curves = [...chart.querySelectorAll('.linear .curve')].map(curve => ({
    key: +curve.dataset.key, steps: numbers(curve.dataset.steps), values: curve.dataset.values.split(' '),
    x: Array.from(curve.points, point => point.x) }))
  const nearest = (list, wanted) => list.reduce(
    (best, value, index) => Math.abs(value - wanted) < Math.abs(list[best] - wanted) ? index : best, 0)
  const read = event => {
    if (!curves.length) return
    const box = svg.getBoundingClientRect(), wanted = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width
    const at = curves.map(curve => curve.x[nearest(curve.x, wanted)]).sort((a, b) => Math.abs(a - wanted) - Math.abs(b - wanted))[0]
    values.forEach(value => value.textContent = '–')
    for (const { key, steps, values: of, x } of curves) {
      if (at < x[0] - 1 || at > x[x.length - 1] + 1) continue
      values[key].textContent = of[nearest(x, at)]
      if (x[nearest(x, at)] === at) output.textContent = 'step ' + steps[nearest(x, at)].toLocaleString('en')
    }
    cursor.setAttribute('x1', at); cursor.setAttribute('x2', at); cursor.style.visibility = 'visible'
  }
  const rest = () => {
    values.forEach((value, index) => value.textContent = last[index])
    cursor.style.visibility = 'hidden'; output.textContent = ''
  }
  svg.addEventListener('pointermove', read); svg.addEventListener('pointerdown', read)
  svg.addEventListener('pointerleave', rest)
}
"""
"""Reads the charts off under the pointer: the step above a chart, and in its legend each curve's value there, or nearest to it;
a curve that has not begun there or has ended has none."""


@dataclass
class Series:
    """One curve."""

    name: str
    points: Points
    """A value that is NaN interrupts the curve and is marked on the axis of steps."""
    colour: int = 0
    dashed: bool = False


@dataclass
class Scale:
    """Maps a value to its place in the SVG."""

    low: float
    high: float
    start: float
    """Place of `low`."""
    end: float
    """Place of `high`."""
    measure: Callable[[float], float] = float
    """Identity, or `math.log10` of a logarithmic axis."""

    def place(self, value: float) -> float:
        """Return the place of a value; the middle where the scale has one value alone."""
        low, high = self.measure(self.low), self.measure(self.high)
        share = (self.measure(value) - low) / (high - low) if high > low else 0.5
        return self.start + (self.end - self.start) * share


def chart_html(title: str, series: list[Series], logarithmic: bool = False, marks: dict[int, str] | None = None) -> str:
    """Return a chart as HTML.

    Args:
        title: plain text above the chart.
        series: the curves, each with a point or more.
        logarithmic: whether to show the logarithmic axis first, where all values are above 0. Other charts offer it where the
            values span a factor of 10 or more, too.
        marks: step -> a text, for steps to mark on their axis.
    """
    finite = [value for curve in series for _, value in curve.points if math.isfinite(value)]
    steps = [step for curve in series for step, _ in curve.points]
    marks = dict(marks or {})
    for curve in series:
        marks |= {
            int(step): f"step {step:,.0f}: {curve.name} is not finite"
            for step, v in curve.points
            if not math.isfinite(v)
        }
    across = Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    has_log = low > 0 and (high > low if logarithmic else high >= 10 * low)
    drawn = _draw(series, across, _padded_scale(low, high), "linear")
    if has_log:
        drawn += _draw(series, across, Scale(low, high, HEIGHT - BOTTOM, TOP, math.log10), "logarithmic")
    checked = " checked" if logarithmic else ""
    switch = f"<label><input type=checkbox{checked} autocomplete=off>log</label>" if has_log else ""
    return (
        f"<figure class=chart><figcaption><span>{escape(title)}</span><output></output>{switch}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{_step_axis(across)}{drawn}'
        f"{_marks_html(marks, across)}<line class=cursor y1={TOP} y2={HEIGHT - BOTTOM} /></svg>"
        f"<div class=keys>{''.join(map(_key_html, series))}</div></figure>"
    )


def _padded_scale(low: float, high: float) -> Scale:
    """Return the linear axis of values, with a little room above and below them."""
    room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    # Counts, losses and percents have no values below 0, so neither has their axis.
    return Scale(max(0.0, low - room) if low >= 0 else low - room, high + room, HEIGHT - BOTTOM, TOP)


def _key_html(curve: Series) -> str:
    """Return a curve's entry in the legend, with its last value."""
    dashed = " class=dashed" if curve.dashed else ""
    return (
        f"<span style='--c:var(--c{curve.colour % COLOURS})'><i{dashed}></i>{escape(curve.name)} "
        f"<b>{format_value(curve.points[-1][1])}</b></span>"
    )


def _marks_html(marks: dict[int, str], across: Scale) -> str:
    """Return a short red line on the axis for each marked step within it."""
    end = HEIGHT - BOTTOM
    return "".join(
        f"<line class=mark x1={across.place(step):.1f} x2={across.place(step):.1f} y1={end - 10} y2={end}>"
        f"<title>{escape(text)}</title></line>"
        for step, text in marks.items()
        if across.low <= step <= across.high
    )


def _step_axis(across: Scale) -> str:
    """Return the axis of steps."""
    ticks = [tick for tick in round_numbers(across.low, across.high, 5) if tick == round(tick)]
    texts = "".join(
        f"<text x={across.place(tick):.1f} y={HEIGHT - 6} text-anchor=middle>{format_tick(tick)}</text>"
        for tick in ticks
    )
    return f"<line class=rule x1={LEFT} x2={WIDTH - RIGHT} y1={HEIGHT - BOTTOM} y2={HEIGHT - BOTTOM} />{texts}"


def _draw(series: list[Series], across: Scale, up: Scale, kind: str) -> str:
    """Return the axis of values and all curves. `kind`: class of the group, `linear` or `logarithmic`."""
    ticks = round_numbers(up.low, up.high, 5) if kind == "linear" else round_powers(up.low, up.high)
    axis = "".join(
        f"<line class=rule x1={LEFT} x2={WIDTH - RIGHT} y1={up.place(tick):.1f} y2={up.place(tick):.1f} />"
        f"<text x={LEFT - 5} y={up.place(tick) + 4:.1f} text-anchor=end>{format_tick(tick)}</text>"
        for tick in ticks
    )
    curves = "".join(_curve(number, curve, across, up, kind == "linear") for number, curve in enumerate(series))
    return f"<g class={kind}>{axis}{curves}</g>"


def _curve(number: int, curve: Series, across: Scale, up: Scale, readable: bool) -> str:
    """Return the pieces of a curve. `readable`: whether they carry their steps and values for the script."""
    pieces = []
    for piece in split_at_gaps(thin(curve.points)):
        places = [(across.place(step), up.place(value)) for step, value in piece]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        data = ""
        if readable:
            data = (
                f" data-key={number} data-steps='{' '.join(f'{step:.0f}' for step, _ in piece)}' "
                f"data-values='{' '.join(format_value(value) for _, value in piece)}'"
            )
        dots = ""
        if len(curve.points) <= DOTTED or len(piece) == 1:
            dots = "".join(f"<circle cx={x:.1f} cy={y:.1f} r=2.4 />" for x, y in places)
        pieces.append(f"<polyline class='curve{' dashed' * curve.dashed}' points='{line}'{data} />{dots}")
    return f"<g style='--c:var(--c{curve.colour % COLOURS})'>{''.join(pieces)}</g>"


def split_at_gaps(points: Points) -> Iterator[Points]:
    """Yield the stretches of points whose values are finite."""
    piece: Points = []
    for step, value in points:
        if math.isfinite(value):
            piece.append((step, value))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def thin(points: Points) -> Points:
    """Return at most about SHOWN_POINTS points of a curve, its ends, its gaps and every stretch's least and greatest value among them."""
    if len(points) <= SHOWN_POINTS:
        return points
    length = -(-len(points) // (SHOWN_POINTS // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), length):
        stretch = range(start, min(start + length, len(points)))
        finite = [number for number in stretch if math.isfinite(points[number][1])]
        kept |= {number for number in stretch if not math.isfinite(points[number][1])}
        if finite:
            kept |= {
                min(finite, key=lambda number: points[number][1]),
                max(finite, key=lambda number: points[number][1]),
            }
    return [points[number] for number in sorted(kept)]


def round_numbers(low: float, high: float, count: int) -> list[float]:
    """Return at most about `count` multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def round_powers(low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis: powers of ten, with multiples of them where those alone would be few."""
    if high < 3 * low:
        return round_numbers(low, high, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        ticks = [factor * 10.0**power for power in powers[::every] for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 2:
            break
    return ticks


def format_tick(value: float) -> str:
    """Return a tick's label, short: 1,500, 20k, 0.25, 1e-5."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:.4g}{letter}"
    if value and abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:,.4g}"


def format_value(value: float) -> str:
    """Return a value to be read off, with at most five digits and no space in it."""
    if abs(value) >= 1e5:
        return f"{value:,.0f}" if math.isfinite(value) else str(value)
    return f"{value:.5g}"
