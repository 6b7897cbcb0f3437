"""Charts as inline SVG text: bars, histograms, lines, intervals, grouped points and heat maps, all escaped, no script.

Every function returns one <svg> that scales with its container. Labels are any text. Colours are CSS colours.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

INK, SOFT, FAINT, RULE, PANEL = "#1f2933", "#5f6c7b", "#98a3b0", "#e4e8ee", "#f6f8fa"
BLUE, VIOLET, ORANGE, GREEN, GREY, RED, GOLD, TEAL = (
    "#3a72c4",
    "#8059c0",
    "#e2762f",
    "#2f9467",
    "#9aa5b1",
    "#cf4a4a",
    "#d2a02a",
    "#2b9bab",
)
SERIES = (BLUE, ORANGE, GREEN, VIOLET, TEAL, GOLD, RED, GREY)


class Interval(NamedTuple):
    """A row of an interval chart: point, lower and upper end, and a note printed at the right."""

    label: str
    value: float
    low: float
    high: float
    note: str = ""
    colour: str = BLUE


class Point(NamedTuple):
    """A point of a grouped chart with its standard error; `hollow` draws a ring, for a second kind of measurement."""

    name: str
    value: float
    error: float = 0.0
    colour: str = BLUE
    hollow: bool = False


def text_width(text: str, size: float) -> float:
    """Approximate width of a text in pixels at a font size; wide characters count double."""
    return size * sum(1.0 if unicodedata.east_asian_width(character) in "WF" else 0.55 for character in text)


def shorten(text: str, width: float, size: float) -> str:
    """The text, cut with an ellipsis where it would be wider than `width` pixels."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def number(value: float) -> str:
    """A number for display: 12,345, 0.034, 1.5."""
    if value != value or math.isinf(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}"


def percent(share: float, digits: int = 1) -> str:
    """A share as per cent."""
    return f"{100 * share:.{digits}f} %"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them."""
    least, span = 1e-30, high - low
    if span <= max(least, 1e-9 * abs(low)):
        span = abs(high) if abs(high) > least else 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def frame(width: float, height: float, body: Sequence[str], label: str) -> str:
    """An <svg> of the given size in user units that shrinks with its container; `label` is for screen readers."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def text(
    x: float, y: float, content: str, *, size: float = 12, anchor: str = "start", fill: str = INK, weight: int = 400
) -> str:
    """A <text> element, escaped."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}" '
        f'font-weight="{weight}">{escape(content)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, *, colour: str = RULE, width: float = 1, dash: str = "") -> str:
    """A <line> element."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line {ends} stroke="{colour}" stroke-width="{width:g}"{dashes}/>'


def dot(x: float, y: float, radius: float, *, fill: str, stroke: str = "#fff", width: float = 1.5) -> str:
    """A <circle> element."""
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}" stroke="{stroke}" stroke-width="{width:g}"/>'
    )


def path(points: str, *, colour: str, width: float = 1, dash: str = "none", opacity: float = 1) -> str:
    """A <polyline> element through "x,y x,y ..."."""
    style = f'stroke-width="{width:g}" stroke-dasharray="{dash}" opacity="{opacity:g}" stroke-linejoin="round"'
    return f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>'


def box(x: float, y: float, width: float, height: float, *, fill: str, radius: float = 2, stroke: str = "none") -> str:
    """A <rect> element; a width below zero is drawn as zero."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" rx="{radius:g}" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def bars(
    items: Sequence[tuple[str, float, str]], *, width: float = 320, colour: str = BLUE, label: str = "bars"
) -> str:
    """Horizontal bars: (name, value, note) each; the note is printed at the end of its bar."""
    size, step = 12.5, 23
    names = min(0.4 * width, max((text_width(name, size) for name, _, _ in items), default=0) + 10)
    notes = max((text_width(note, size) for _, _, note in items), default=0) + 8
    room, top = width - names - notes, max((value for _, value, _ in items), default=0) or 1
    body = []
    for index, (name, value, note) in enumerate(items):
        y = index * step
        body.append(text(names - 8, y + 15, shorten(name, names - 8, size), size=size, anchor="end"))
        body.append(box(names, y + 3.5, max(room * value / top, 1.5 if value else 0), step - 8, fill=colour))
        body.append(text(names + room * value / top + 6, y + 15, note, size=size, fill=SOFT))
    return frame(width, max(len(items) * step, 10), body, label)


def grouped_bars(
    names: Sequence[str],
    series: Mapping[str, tuple[Sequence[float], str]],
    *,
    width: float = 400,
    label: str = "grouped bars",
) -> str:
    """Horizontal bars of shares side by side: for each name one bar per series, given as (values, colour)."""
    size, thick, gap = 12.5, 9, 9
    step = thick * len(series) + gap
    margin = min(0.36 * width, max((text_width(name, size) for name in names), default=0) + 10)
    top = max((max(values, default=0) for values, _ in series.values()), default=0) or 1
    room, body = width - margin - 48, []
    for index, name in enumerate(names):
        y = index * step
        body.append(
            text(margin - 8, y + (step - gap) / 2 + 4, shorten(name, margin - 8, size), size=size, anchor="end")
        )
        for place, (values, colour) in enumerate(series.values()):
            length = room * values[index] / top
            body.append(box(margin, y + place * thick, max(length, 1.5), thick - 2, fill=colour, radius=1.5))
            body.append(
                text(margin + length + 5, y + place * thick + 7.5, percent(values[index], 0), size=9.5, fill=SOFT)
            )
    return frame(width, max(len(names) * step - gap + 2, 10), body, label)


def histogram(
    values: Sequence[float], *, width: float = 400, height: float = 150, bins: int = 28, label: str = "histogram"
) -> str:
    """Histogram of numbers up to their 99th percentile, what is above counted in the last bar."""
    ordered = sorted(values)
    if not ordered:
        return frame(width, 20, [text(0, 14, "no values", fill=SOFT)], label)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    high = high if high > low else low + 1
    whole = all(value == int(value) for value in ordered)
    bins = min(bins, int(high - low) + 1) if whole else bins
    counts = [0] * bins
    for value in ordered:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    base, step, top = height - 20, width / bins, max(counts)
    body = [line(0, base + 0.5, width, base + 0.5)]
    for index, count in enumerate(counts):
        tall = (base - 16) * count / top
        body.append(box(index * step + 0.75, base - tall, step - 1.5, tall, fill=BLUE, radius=1))
    middle = ordered[len(ordered) // 2]
    x = min(width * (middle - low) / (high - low), width)
    body += [line(x, 12, x, base, colour=INK, dash="3 3")]
    side = "start" if x < width / 2 else "end"
    body += [
        text(x + (5 if side == "start" else -5), 11, f"median {number(middle)}", size=11.5, fill=SOFT, anchor=side)
    ]
    body += [text(0, height - 4, number(low), size=11.5, fill=SOFT)]
    body += [
        text(
            width,
            height - 4,
            f"≥ {number(high)}" if high < ordered[-1] else number(high),
            size=11.5,
            fill=SOFT,
            anchor="end",
        )
    ]
    return frame(width, height, body, label)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean over `window` values, narrower at both ends."""
    half, total = window // 2, [0.0]
    for value in values:
        total.append(total[-1] + value)
    spans = ((max(0, index - half), min(len(values), index + half + 1)) for index in range(len(values)))
    return [(total[end] - total[start]) / (end - start) for start, end in spans]


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    width: float = 400,
    height: float = 190,
    colours: Mapping[str, str] | None = None,
    label: str = "curves",
) -> str:
    """Curves of (x, y) points over common axes: the moving mean strong, the raw values faint behind it.

    Values that are not finite are skipped; the y axis covers the 1st to the 99th percentile.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return frame(width, 20, [text(0, 14, "no values", fill=SOFT)], label)
    ys = sorted(y for points in finite.values() for _, y in points)
    cut = int(0.01 * len(ys))
    y_ticks = ticks(ys[cut], ys[-1 - cut])
    xs = [x for points in finite.values() for x, _ in points]
    left, right, top, bottom = 46.0, width - 6, 8.0, height - 22
    low_x, high_x = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    low_y, high_y = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> str:
        y = min(max(y, low_y), high_y)
        across = left + (right - left) * (x - low_x) / (high_x - low_x)
        return f"{across:.1f},{bottom - (bottom - top) * (y - low_y) / (high_y - low_y):.1f}"

    body = _y_axis(y_ticks, left, right, top, bottom)
    body += [text(left, height - 5, number(low_x), size=11.5, fill=SOFT)]
    body += [text(right, height - 5, f"step {number(high_x)}", size=11.5, fill=SOFT, anchor="end")]
    for index, (name, points) in enumerate(finite.items()):
        colour = (colours or {}).get(name, SERIES[index % len(SERIES)])
        thin = points[:: max(1, len(points) // 400)]
        smooth = smoothed([y for _, y in points], max(1, len(points) // 25))
        strong = [(x, y) for (x, _), y in zip(points, smooth)][:: max(1, len(points) // 200)]
        for chosen, thickness, opacity in ((thin, 1, 0.28), (strong, 2.2, 1)):
            body.append(path(" ".join(place(x, y) for x, y in chosen), colour=colour, width=thickness, opacity=opacity))
    return frame(width, height, body, label)


def _y_axis(values: Sequence[float], left: float, right: float, top: float, bottom: float, form=number) -> list[str]:
    """Horizontal rules with their numbers at the left."""
    body = []
    for value in values:
        y = bottom - (bottom - top) * (value - values[0]) / (values[-1] - values[0])
        body += [line(left, y, right, y), text(left - 7, y + 4, form(value), size=11.5, fill=SOFT, anchor="end")]
    return body


def intervals(
    rows: Sequence[Interval],
    *,
    reference: float | None = None,
    span: tuple[float, float] | None = None,
    width: float = 560,
    form=percent,
    label: str = "intervals",
) -> str:
    """Points with intervals, one row each, over a common axis; a dashed line at `reference`; notes at the right."""
    if not rows:
        return frame(width, 20, [text(0, 14, "no comparisons", fill=SOFT)], label)
    size, step = 12.5, 30
    names = min(0.36 * width, max(text_width(row.label, size) for row in rows) + 14)
    notes = min(0.3 * width, max(text_width(row.note, 11.5) for row in rows) + 12)
    ends = [end for row in rows for end in (row.low, row.high)] + ([reference] if reference is not None else [])
    axis = ticks(*span) if span else ticks(min(ends), max(ends))
    right = width - notes - 6

    def across(value: float) -> float:
        return names + (right - names) * (min(max(value, axis[0]), axis[-1]) - axis[0]) / (axis[-1] - axis[0])

    bottom, body = len(rows) * step + 6, []
    for value in axis:
        body.append(line(across(value), 4, across(value), bottom))
        body.append(
            text(across(value), bottom + 15, form(value).replace(".0 %", " %"), size=11, fill=SOFT, anchor="middle")
        )
    if reference is not None:
        body.append(line(across(reference), 2, across(reference), bottom, colour=SOFT, width=1.4, dash="4 3"))
    for index, row in enumerate(rows):
        y = index * step + step / 2 + 3
        body.append(text(names - 12, y + 4, shorten(row.label, names - 12, size), size=size, anchor="end"))
        body.append(line(across(row.low), y, across(row.high), y, colour=row.colour, width=3))
        body.append(dot(across(row.value), y, 5.5, fill=row.colour))
        body.append(text(width - notes + 4, y + 4, shorten(row.note, notes, 11.5), size=11.5, fill=SOFT))
    return frame(width, bottom + 20, body, label)


def grouped_points(
    groups: Sequence[tuple[str, Sequence[Point]]],
    *,
    top: float | None = None,
    width: float = 620,
    height: float = 300,
    label: str = "points",
) -> str:
    """Shares with error bars (two standard errors), grouped along x and joined by a line per kind within a group.

    The y axis reaches from 0 to `top`, by default the highest end of an error bar.
    """
    ends = [point.value + 2 * point.error for _, points in groups for point in points]
    axis = ticks(0, min(1.0, max(ends, default=1.0) if top is None else top), 5)
    left, right, head, bottom = 46.0, width - 6, 22.0, height - 26
    body = _y_axis(axis, left, right, head, bottom, lambda value: percent(value, 0))
    room = (right - left) / max(1, len(groups))

    def down(value: float) -> float:
        return bottom - (bottom - head) * min(max(value, 0), axis[-1]) / axis[-1]

    for place, (name, points) in enumerate(groups):
        start = left + place * room
        if place:
            body.append(line(start, head - 12, start, bottom + 20))
        body.append(text(start + room / 2, height - 6, name, size=12.5, anchor="middle", weight=600))
        order = list(dict.fromkeys(point.name for point in points))
        step = room / (len(order) + 0.6)
        for hollow in (True, False):
            chosen = [point for point in points if point.hollow == hollow]
            centres = [start + (order.index(point.name) + 0.8) * step for point in chosen]
            shift = 5 if hollow else -5
            trail = " ".join(f"{x + shift:.1f},{down(point.value):.1f}" for x, point in zip(centres, chosen))
            body.append(path(trail, colour=FAINT, width=1.2, dash="3 3" if hollow else "none"))
            for x, point in zip(centres, chosen):
                body += _marker(x + shift, point, down)
    return frame(width, height, body, label)


def _marker(x: float, point: Point, down) -> list[str]:
    """Error bar, dot or ring, and the value above a dot (below a ring)."""
    y, upper, lower = down(point.value), down(point.value + 2 * point.error), down(point.value - 2 * point.error)
    fill, stroke = ("#fff", point.colour) if point.hollow else (point.colour, "#fff")
    place = lower + 14 if point.hollow else upper - 6
    return [
        line(x, upper, x, lower, colour=point.colour, width=1.6),
        dot(x, y, 5, fill=fill, stroke=stroke, width=2),
        text(x, place, f"{100 * point.value:.0f}", size=11, anchor="middle", fill=point.colour, weight=600),
    ]


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    top: float | None = None,
    low: float = 0.0,
    width: float = 400,
    form=number,
    label: str = "heat map",
) -> str:
    """Table of shaded cells with their numbers; None is left blank.

    `low` and `top` are the values of the lightest and the darkest shade; top is the largest value by default.
    """
    known = [value for row in values for value in row if value is not None]
    top = top or max(known, default=0) or 1
    size = 11.5
    names = min(0.34 * width, max((text_width(row, size) for row in rows), default=0) + 10)
    cell = (width - names) / max(1, len(columns))
    slanted = any(text_width(column, size) > cell - 4 for column in columns)
    head = min(106, max((text_width(column, size) for column in columns), default=0) * 0.72 + 14) if slanted else 20
    tall, body = min(max(cell * 0.62, 20), 30), []
    for place, column in enumerate(columns):
        x = names + (place + 0.5) * cell
        name = escape(shorten(column, 130, size))
        turn = (
            f'text-anchor="start" transform="rotate(-45 {x:.1f} {head - 6:.1f})"' if slanted else 'text-anchor="middle"'
        )
        body.append(f'<text x="{x:.1f}" y="{head - 6:.1f}" font-size="{size}" fill="{SOFT}" {turn}>{name}</text>')
    for index, row in enumerate(rows):
        y = head + index * tall
        body.append(text(names - 8, y + tall / 2 + 4, shorten(row, names - 8, size), size=size, anchor="end"))
        for place, value in enumerate(values[index]):
            shade = None if value is None else min(max((value - low) / ((top - low) or 1), 0), 1)
            body += _cell(names + place * cell, y, cell, tall, shade, "" if value is None else form(value))
    extra = 60 if slanted else 0
    return frame(width + extra, head + len(rows) * tall + 2, body, label)


def _cell(x: float, y: float, width: float, height: float, share: float | None, written: str) -> list[str]:
    """A shaded box with its number; share 0 is the lightest shade, 1 the darkest, None an empty cell."""
    if share is None:
        return [box(x + 1, y + 1, width - 2, height - 2, fill=PANEL, radius=3)]
    red, green, blue = (round(a + (b - a) * share) for a, b in zip((240, 244, 250), (38, 84, 156)))
    ink = "#fff" if share > 0.55 else INK
    shade = box(x + 1, y + 1, width - 2, height - 2, fill=f"rgb({red},{green},{blue})", radius=3)
    size = 11 if text_width(written, 11) < width - 4 else 9
    return [shade, text(x + width / 2, y + height / 2 + 4, written, size=size, anchor="middle", fill=ink)]
