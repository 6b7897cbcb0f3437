"""The roofline of a results file: rates over operations per byte, under the roofs that the same run measured.

One self-contained HTML page with an SVG chart, no script; the roofs are a device copy and a bf16 matrix product.
"""

import math
from collections.abc import Sequence
from html import escape

from benchmarks.kernel_rows import EQUAL_FLOPS, Row
from wizard_engine.html import charts, page

WIDTH, HEIGHT = 1040.0, 560.0
LEFT, RIGHT, TOP, BOTTOM = 74.0, 1010.0, 20.0, 510.0
HUES = {
    "attention": charts.BLUE,
    "rms_norm": charts.ORANGE,
    "rope": charts.GREEN,
    "swiglu": charts.VIOLET,
    "adamw": charts.TEAL,
}


class Axes:
    """Logarithmic axes: operations per byte across, TFLOP/s up."""

    def __init__(self, points: Sequence[tuple[float, float]], copy_gbps: float, matrix_tflops: float) -> None:
        ridge = 1e3 * matrix_tflops / copy_gbps
        across = [x for x, _ in points] + [ridge / 4, ridge * 8]
        up = [y for _, y in points] + [matrix_tflops * 1.3]
        self.low_x, self.high_x = decades(min(across), max(across))
        self.low_y, self.high_y = decades(min(up), max(up))

    def x(self, intensity: float) -> float:
        """Place of a number of operations per byte, pixels."""
        return LEFT + (RIGHT - LEFT) * (math.log10(intensity) - self.low_x) / (self.high_x - self.low_x)

    def y(self, tflops: float) -> float:
        """Place of a rate, pixels."""
        return BOTTOM - (BOTTOM - TOP) * (math.log10(tflops) - self.low_y) / (self.high_y - self.low_y)


def decades(low: float, high: float) -> tuple[int, int]:
    """Powers of ten that enclose two positive numbers."""
    first = math.floor(math.log10(low))
    return first, max(first + 1, math.ceil(math.log10(high)))


def point_of(row: Row) -> tuple[float, float] | None:
    """Operations per byte and TFLOP/s of a right, timed row; None for others."""
    if "us" not in row or row["status"] == "wrong" or not row["bytes"] or not row["flops"]:
        return None
    return row["flops"] / row["bytes"], row["tflops"]


def chart(rows: Sequence[Row]) -> str:
    """The chart as SVG: this project's rows are dots, peers' are rings, each with a tooltip.

    Raises:
        ValueError: no row was timed.
    """
    drawn = [(row, point) for row in rows if row["variant"] != EQUAL_FLOPS and (point := point_of(row))]
    if not drawn:
        raise ValueError("roofline: expected at least one timed row, got none")
    ceilings = drawn[0][0]["ceilings"]
    copy, matrix = ceilings["copy_gbps"], ceilings["matrix_tflops"]
    axes = Axes([point for _, point in drawn], copy, matrix)
    body = _grid(axes) + _roofs(axes, copy, matrix)
    for row, (intensity, tflops) in sorted(drawn, key=lambda pair: pair[0]["is_ours"]):
        hue = HUES.get(row["op"], charts.GREY)
        mark = (
            charts.dot(axes.x(intensity), axes.y(tflops), 5, fill=hue)
            if row["is_ours"]
            else charts.dot(axes.x(intensity), axes.y(tflops), 3.5, fill="#fff", stroke=hue)
        )
        body.append(f"<g><title>{escape(_tip(row))}</title>{mark}</g>")
    return charts.frame(WIDTH, HEIGHT, body, "roofline: TFLOP/s over operations per byte")


def _tip(row: Row) -> str:
    return (
        f"{row['op']} {row['phase']} {row['label']} {row['variant']}: {row['us']:.1f} us, {row['tflops']:.1f} TFLOP/s"
    )


def _grid(axes: Axes) -> list[str]:
    body = []
    for power in range(axes.low_x, axes.high_x + 1):
        x = axes.x(10.0**power)
        body += [charts.line(x, TOP, x, BOTTOM)]
        body += [charts.text(x, BOTTOM + 18, f"{10.0**power:g}", fill=charts.SOFT, anchor="middle")]
    for power in range(axes.low_y, axes.high_y + 1):
        y = axes.y(10.0**power)
        body += [charts.line(LEFT, y, RIGHT, y)]
        body += [charts.text(LEFT - 8, y + 4, f"{10.0**power:g}", fill=charts.SOFT, anchor="end")]
    middle = (LEFT + RIGHT) / 2
    body.append(charts.text(middle, BOTTOM + 40, "operations per byte of device memory", anchor="middle"))
    return body + [charts.text(LEFT, TOP - 6, "TFLOP/s", fill=charts.SOFT)]


def _roofs(axes: Axes, copy_gbps: float, matrix_tflops: float) -> list[str]:
    """The measured copy bandwidth as a slope, the matrix rate as a level, cut at the axes."""
    ridge = 1e3 * matrix_tflops / copy_gbps
    start = max(10.0**axes.low_x, 1e3 * 10.0**axes.low_y / copy_gbps)
    place = f"{axes.x(start):.1f},{axes.y(start * copy_gbps / 1e3):.1f} {axes.x(ridge):.1f},{axes.y(matrix_tflops):.1f}"
    level, middle = axes.y(matrix_tflops), math.sqrt(start * ridge)
    beside = axes.x(middle) - 12, axes.y(middle * copy_gbps / 1e3) - 4
    return [
        charts.path(f"{place} {RIGHT:.1f},{level:.1f}", colour=charts.INK, width=1.8),
        charts.text(RIGHT, level - 7, f"matrix product, {charts.number(matrix_tflops)} TFLOP/s", anchor="end"),
        charts.text(*beside, f"copy, {copy_gbps:,.0f} GB/s", anchor="end"),
    ]


def page_of(rows: Sequence[Row]) -> str:
    """The whole page: hardware and command, the chart, and every timed row as a table."""
    timed = [row for row in rows if "us" in row and row["status"] != "wrong"]
    if not timed:
        return page.page(
            "Kernels", header="<h1>Kernels: no row was timed</h1>", body=page.pre("\n".join(_untimed(rows)))
        )
    first = timed[0]
    hardware = first.get("gpu") or f"CPU: {first['hardware']}"
    versions = ", ".join(f"{name} {first[name]}" for name in ("driver", "torch", "triton", "ptxas") if first.get(name))
    header = (
        f'<div class="eyebrow">{escape(hardware)}</div><h1>Kernels under the roofs of the same run</h1>'
        f'<p class="lead">{escape(versions)}, commit {escape(first["commit"])}, {escape(first["date"])}. '
        f"Command: <code>{escape(first['command'])}</code></p>"
    )
    keys = page.legend([(op, hue) for op, hue in HUES.items() if any(row["op"] == op for row in timed)])
    lead = "Dots are this project's kernels, rings their peers. Point at one for its shape."
    body = page.section("Roofline", keys + page.card(chart(rows)), lead=lead) + page.section("Rows", _table(timed))
    untimed = _untimed(rows)
    if untimed:
        body += page.section("Wrong or not timed", page.pre("\n".join(untimed)))
    return page.page("Kernels", header=header, body=body)


def _untimed(rows: Sequence[Row]) -> list[str]:
    """One line for each row without a time, or with a wrong result, and why."""
    return [
        f"{row['op']} {row['phase']} {row['label']} {row['variant']}: {row['status']} {row.get('note', '')}"
        for row in rows
        if "us" not in row or row["status"] == "wrong"
    ]


def _table(rows: Sequence[Row]) -> str:
    title = ("op", "phase", "shape", "variant", "us", "TFLOP/s", "GB/s", "of copy", "of matrix rate")
    cells = [
        (
            row["op"],
            row["phase"],
            row["label"],
            row["variant"],
            f"{row['us']:,.1f}",
            f"{row['tflops']:,.1f}",
            f"{row['gbps']:,.0f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['share_of_matrix']:.0%}" if "share_of_matrix" in row else "",
        )
        for row in rows
    ]
    return page.card(page.table(title, cells, numeric=(4, 5, 6, 7, 8)))
