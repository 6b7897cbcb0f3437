"""The graph of a run as a picture: a box for each stage, coloured by its state, and an arrow for each that it reads."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import NotRequired, TypedDict

from .charts import BLUE, FAINT, GOLD, GREEN, GREY, INK, ORANGE, SOFT, frame, shorten, text
from .flow import wrapped

# State of a stage -> colour of its edge, and of its ground.
STATES = {
    "done": (GREEN, "#eef8f3"),
    "running": (BLUE, "#e9f0fb"),
    "partly done": (ORANGE, "#fdf1e8"),
    "stale": (GOLD, "#fbf4e0"),
    "left out": (GREY, "#ffffff"),
    "to run": (GREY, "#f6f8fa"),
}
SIDE, HEIGHT, GAP, ROW, LABEL = 98.0, 50.0, 20.0, 64.0, 26.0
# Stages side by side at most; a longer chain goes on below.
MOST_COLUMNS = 10


class GraphNode(TypedDict):
    """A stage: its name, what it reads, its state, the lane that it is drawn in, and a remark, such as its time.

    reads: names of stages before it.   why: of the state; shown where the pointer rests on the box.
    """

    name: str
    reads: Sequence[str]
    state: str
    lane: NotRequired[str]
    note: NotRequired[str]
    why: NotRequired[str]


def direct_reads(nodes: Sequence[GraphNode]) -> dict[str, list[str]]:
    """Of each stage the stages it reads, without those that it reaches over another one: fewer arrows say the same."""
    reads = {node["name"]: [name for name in node["reads"] if name != node["name"]] for node in nodes}
    above: dict[str, set[str]] = {}
    for node in nodes:
        own = reads[node["name"]]
        above[node["name"]] = {*own, *(far for name in own for far in above.get(name, ()))}
    return {
        name: [parent for parent in own if not any(parent in above.get(other, ()) for other in own if other != parent)]
        for name, own in reads.items()
    }


def graph(nodes: Sequence[GraphNode]) -> str:
    """An <svg> of the stages in their order: lanes below each other, and in a lane what reads further to the right."""
    arrows = direct_reads(nodes)
    places: dict[str, tuple[float, float]] = {}
    body: list[str] = []
    y = right = 0.0
    for lane, members in groupby(nodes, key=lambda node: node.get("lane", "")):
        y += LABEL
        if lane:
            body.append(text(0, y - 9, lane, size=13, weight=600, fill=SOFT))
        cells = _cells(list(members), arrows)
        for name, (column, row) in cells.items():
            places[name] = (column * (SIDE + GAP), y + row * ROW)
        y += ROW * (1 + max(row for _, row in cells.values()))
        right = max(right, *(places[name][0] + SIDE for name in cells))
    lines = [_arrow(places[a], places[b]) for b, reads in arrows.items() for a in reads if a in places]
    boxes = [_box(node, *places[node["name"]]) for node in nodes]
    return frame(max(right, 10), max(y, 10), [*lines, *body, *boxes], "graph of the stages")


def _cells(members: Sequence[GraphNode], arrows: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, int]]:
    """(column, row) of each stage of a lane: right of what it reads in the lane, in the first free row."""
    cells: dict[str, tuple[int, int]] = {}
    for node in members:
        before = [cells[name][0] for name in arrows[node["name"]] if name in cells]
        # A long chain goes on in a row further down, from the left.
        row, column = divmod(max(before, default=-1) + 1, MOST_COLUMNS)
        taken = set(cells.values())
        while (column, row) in taken:
            row += 1
        cells[node["name"]] = (column, row)
    return cells


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A curve from box to box: to the right, or down into the box's upper edge."""
    (x1, y1), (x2, y2) = start, end
    if x2 > x1:
        a, b = (x1 + SIDE, y1 + HEIGHT / 2), (x2 - 2, y2 + HEIGHT / 2)
        bend = max((b[0] - a[0]) / 2, 12)
        curve = f"C{a[0] + bend:.1f},{a[1]:.1f} {b[0] - bend:.1f},{b[1]:.1f} {b[0]:.1f},{b[1]:.1f}"
        tip = f"M{b[0] - 5:.1f},{b[1] - 3.5:.1f} L{b[0]:.1f},{b[1]:.1f} L{b[0] - 5:.1f},{b[1] + 3.5:.1f}"
    else:
        a, b = (x1 + SIDE / 2, y1 + HEIGHT), (x2 + SIDE / 2, y2 - 2)
        bend = max((b[1] - a[1]) / 2, 12)
        curve = f"C{a[0]:.1f},{a[1] + bend:.1f} {b[0]:.1f},{b[1] - bend:.1f} {b[0]:.1f},{b[1]:.1f}"
        tip = f"M{b[0] - 3.5:.1f},{b[1] - 5:.1f} L{b[0]:.1f},{b[1]:.1f} L{b[0] + 3.5:.1f},{b[1] - 5:.1f}"
    return f'<path d="M{a[0]:.1f},{a[1]:.1f} {curve} {tip}" fill="none" stroke="{FAINT}" stroke-width="1.2"/>'


def _box(node: GraphNode, x: float, y: float) -> str:
    """A box: the stage's name in two lines, its state and a remark."""
    edge, ground = STATES.get(node["state"], STATES["to run"])
    dashes = ' stroke-dasharray="4 3"' if node["state"] == "left out" else ""
    lines = wrapped(node["name"].rpartition("/")[2].replace("_", " "), SIDE - 14, 11.5, 2)
    said = ", ".join(filter(None, (node["state"], node.get("note", ""))))
    title = ": ".join(filter(None, (node["name"], node["state"], node.get("why", ""))))
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{SIDE}" height="{HEIGHT}" rx="7" fill="{ground}" stroke="{edge}"'
    parts = [f"<g><title>{escape(title)}</title>{shape}{dashes}/>"]
    for number, line in enumerate(lines):
        parts.append(text(x + 8, y + 15 + 13 * number, line, size=11.5, weight=600, fill=INK))
    parts.append(text(x + 8, y + HEIGHT - 7, shorten(said, SIDE - 14, 10.5), size=10.5, fill=SOFT))
    return "".join([*parts, "</g>"])
