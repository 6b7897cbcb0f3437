"""The path of the data as a diagram: boxes with counts joined by arrows, a row of boxes per lane."""

from collections.abc import Sequence
from itertools import groupby
from typing import NotRequired, TypedDict

from .charts import BLUE, FAINT, INK, PANEL, SOFT, box, frame, number, shorten, text, text_width

ROW, GAP, LABEL = 116, 30, 26


class FlowNode(TypedDict):
    """A step in the path of the data: its name, its number of rows, a remark, and its lane (a slice, for example)."""

    name: str
    count: int | None
    note: NotRequired[str]
    lane: NotRequired[str]


def wrapped(content: str, width: float, size: float, lines: int) -> list[str]:
    """A text in at most `lines` lines of `width` pixels, the last one shortened where it is longer."""
    wrapped_lines: list[str] = []
    words = content.split()
    while words and len(wrapped_lines) < lines - 1:
        taken = 1
        while taken < len(words) and text_width(" ".join(words[: taken + 1]), size) <= width:
            taken += 1
        wrapped_lines.append(shorten(" ".join(words[:taken]), width, size))
        words = words[taken:]
    return [*wrapped_lines, shorten(" ".join(words), width, size)] if words else wrapped_lines


def flow(nodes: Sequence[FlowNode], *, width: float = 1060, columns: int = 5) -> str:
    """An <svg> of the nodes, `columns` in a row, each lane in a new row under its name."""
    side = (width - GAP * (columns - 1)) / columns
    most = max((node["count"] or 0 for node in nodes), default=0) or 1
    body: list[str] = []
    y, previous = 0.0, None
    for lane, members in groupby(nodes, key=lambda node: node.get("lane", "")):
        if lane:
            y += LABEL
            body.append(text(0, y - 8, lane, size=13, weight=600, fill=SOFT))
        chosen = list(members)
        for index, node in enumerate(chosen):
            column = index % columns
            if index and column == 0:
                y += ROW
            place = (column * (side + GAP), y)
            body += _node(node, *place, side, most)
            if index:
                body.append(_arrow(previous, place, side))
            previous = place
        y += ROW
    return frame(width, max(y - 18, 10), body, "path of the data")


def _node(node: FlowNode, x: float, y: float, side: float, most: int) -> list[str]:
    """A box: name, count, remark in two lines, and at the foot a bar as long as the count."""
    height, inner = ROW - 22, side - 24
    body = [box(x, y, side, height, fill="#fff", radius=9, stroke="#cfd8e3")]
    body.append(text(x + 12, y + 19, shorten(node["name"], inner, 12.5), size=12.5, weight=600, fill=INK))
    count = node["count"]
    if count is not None:
        body.append(text(x + 12, y + 42, number(count), size=20, weight=700, fill=BLUE))
        body.append(box(x + 12, y + height - 8, inner, 3, fill=PANEL, radius=1.5))
        body.append(box(x + 12, y + height - 8, max(inner * count / most, 2 if count else 0), 3, fill=BLUE, radius=1.5))
    start = y + 40 if count is None else y + 60
    remark = node.get("note", "")
    for line, content in enumerate(wrapped(remark, inner, 11.5, 2)):
        body.append(text(x + 12, start + 14 * line, content, size=11.5, fill=SOFT))
    return body


def _arrow(start: tuple[float, float], end: tuple[float, float], side: float) -> str:
    """From box to box: along the row, or from the end of a row round to the start of the next."""
    (x1, y1), (x2, y2) = start, end
    middle = (ROW - 22) / 2
    if y1 == y2:
        path = f"M{x1 + side + 4:.1f},{y1 + middle:.1f} L{x2 - 9:.1f},{y2 + middle:.1f}"
        tip = (x2 - 3, y2 + middle, "h")
    elif x1 == x2:
        path = f"M{x1 + 26:.1f},{y1 + ROW - 20:.1f} L{x2 + 26:.1f},{y2 - 8:.1f}"
        tip = (x2 + 26, y2 - 2, "v")
    else:
        turn = y2 - 11
        path = f"M{x1 + side / 2:.1f},{y1 + ROW - 20:.1f} V{turn:.1f} H{x2 + 26:.1f} V{y2 - 7:.1f}"
        tip = (x2 + 26, y2 - 2, "v")
    x, y, way = tip
    head = f"M{x - 7:.1f},{y - 4.5:.1f} L{x:.1f},{y:.1f} L{x - 7:.1f},{y + 4.5:.1f}" if way == "h" else ""
    head = head or f"M{x - 4.5:.1f},{y - 7:.1f} L{x:.1f},{y:.1f} L{x + 4.5:.1f},{y - 7:.1f}"
    return f'<path d="{path} {head}" fill="none" stroke="{FAINT}" stroke-width="1.5" stroke-linejoin="round"/>'
