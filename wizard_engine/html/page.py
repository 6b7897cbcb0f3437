"""Self-contained HTML pages: one style sheet, sections, cards, tables and tiles; no script, no outside resource."""

from collections.abc import Sequence
from html import escape

STYLE = """
:root { --ink:#1f2933; --soft:#5f6c7b; --faint:#98a3b0; --rule:#e4e8ee; --panel:#f6f8fa; --blue:#3a72c4; --good:#2f9467;
        --bad:#cf4a4a; --warm:#e2762f }
* { box-sizing:border-box }
html { -webkit-text-size-adjust:100% }
body { margin:0; background:#fff; color:var(--ink);
       font:16px/1.55 -apple-system,BlinkMacSystemFont,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Noto Sans",sans-serif }
svg { display:block; width:100%; height:auto; font-family:inherit; overflow:visible }
header { background:linear-gradient(180deg,#f2f6fc,#fff); border-bottom:1px solid var(--rule) }
.wrap { max-width:1120px; margin:0 auto; padding:0 28px }
header .wrap { padding-top:44px; padding-bottom:30px }
.eyebrow { color:var(--blue); font-size:13px; font-weight:600; letter-spacing:.08em; text-transform:uppercase }
h1 { font-size:34px; line-height:1.2; letter-spacing:-.015em; margin:8px 0 12px; font-weight:700; max-width:26em }
h2 { font-size:22px; letter-spacing:-.01em; margin:0 0 6px; font-weight:650 }
h3 { font-size:15px; margin:0 0 10px; font-weight:650 }
h3 small { font-weight:400; color:var(--soft); font-size:13px; margin-left:6px }
p { margin:0 0 12px } a { color:var(--blue) }
.lead { color:var(--soft); max-width:48em; margin-bottom:18px }
.headline { font-size:18px; color:#3b4754; max-width:46em; margin-bottom:24px }
section { padding:38px 0 6px }
section + section { border-top:1px solid var(--rule); margin-top:30px }
header .tiles { margin-top:22px }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:14px }
.tile { background:#fff; border:1px solid var(--rule); border-radius:12px; padding:16px 18px }
.tile b { display:block; font-size:27px; line-height:1.2; letter-spacing:-.02em; font-weight:680; white-space:nowrap }
.tile span { color:var(--soft); font-size:13.5px; display:block; line-height:1.4; margin-top:4px }
.grid { display:grid; gap:18px; grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr)) }
.grid.two { grid-template-columns:repeat(auto-fill,minmax(min(100%,470px),1fr)) }
.card { border:1px solid var(--rule); border-radius:12px; padding:18px 20px; background:#fff; min-width:0 }
.stack > * + * { margin-top:18px }
.scroll { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-size:14px }
th { text-align:left; color:var(--soft); font-weight:600; font-size:12.5px; border-bottom:1px solid #cfd6de;
     padding:6px 12px 6px 0; vertical-align:bottom; white-space:nowrap }
td { border-bottom:1px solid var(--rule); padding:7px 12px 7px 0; vertical-align:top }
tr:last-child td { border-bottom:0 }
td:first-child { min-width:4em }
th.num,td.num { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
th:last-child,td:last-child { padding-right:0 }
pre,code { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace; font-size:13px }
pre { background:var(--panel); border:1px solid var(--rule); border-radius:8px; padding:10px 12px; margin:0;
      white-space:pre-wrap; overflow-wrap:anywhere; line-height:1.5 }
.chip { display:inline-block; border-radius:99px; padding:1px 10px; font-size:12.5px; font-weight:600;
        background:#e9f0fb; color:#2a59a3; white-space:nowrap }
.chip.good { background:#e3f4ec; color:#1f7350 } .chip.bad { background:#fbe9e9; color:#ad3535 }
.chip.plain { background:#eef1f4; color:#52606d }
.legend { display:flex; flex-wrap:wrap; gap:4px 18px; font-size:13px; color:var(--soft); margin:0 0 10px }
.legend i { display:inline-block; width:10px; height:10px; border-radius:3px; margin-right:6px }
.legend i.ring { border-radius:50%; background:#fff !important; border:2px solid var(--soft) }
.note { background:#fff8ec; border:1px solid #f1dfbd; border-radius:12px; padding:14px 18px; color:#5d4717;
        font-size:14.5px }
.note p:last-child { margin:0 }
.quiet { color:var(--soft); font-size:13.5px }
footer { color:var(--soft); font-size:13px; padding:26px 0 46px; border-top:1px solid var(--rule); margin-top:40px }
.narrow { display:none }
@media (max-width:760px) {
  .wrap { padding:0 18px } header .wrap { padding-top:28px; padding-bottom:22px }
  h1 { font-size:25px } .headline { font-size:16.5px } section { padding-top:28px }
  .tiles { grid-template-columns:repeat(2,minmax(0,1fr)); gap:10px } .tile { padding:12px 13px }
  .tile b { font-size:20px } .card { padding:14px } .wide { display:none } .narrow { display:block }
}
@media print { section { break-inside:avoid } header { background:none } }
"""


def page(title: str, *, header: str, body: str, footer: str = "", style: str = "") -> str:
    """A whole HTML page; `title` is plain text, the other parts are HTML and already escaped."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body>\n"
        f'<header><div class="wrap">{header}</div></header>\n<main class="wrap">\n{body}\n</main>\n'
        f'<footer><div class="wrap">{footer}</div></footer>\n</body></html>\n'
    )


def section(title: str, *parts: str, lead: str = "") -> str:
    """A section with a heading and an optional introduction (both plain text) before its HTML parts."""
    intro = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{''.join(parts)}</section>\n"


def card(*parts: str, title: str = "", note: str = "") -> str:
    """A framed box of HTML parts; title and note are plain text."""
    small = f"<small>{escape(note)}</small>" if note else ""
    heading = f"<h3>{escape(title)}{small}</h3>" if title else ""
    return f'<div class="card">{heading}{"".join(parts)}</div>'


def grid(cards: Sequence[str], *, wide: bool = False) -> str:
    """Cards side by side, as many in a row as fit; `wide` ones are two in a row."""
    return f'<div class="grid{" two" if wide else ""}">{"".join(cards)}</div>'


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Large figures with their captions, given as (figure, caption) in plain text."""
    cells = (
        f'<div class="tile"><b>{escape(figure)}</b><span>{escape(caption)}</span></div>' for figure, caption in items
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, numeric: Sequence[int] = ()) -> str:
    """A table of plain-text cells, scrolled sideways where it is too wide; `numeric` columns stand at the right.

    A header without text is skipped.
    """

    def cells(values: Sequence[object], tag: str) -> str:
        marks = (' class="num"' if place in numeric else "" for place in range(len(values)))
        return "".join(f"<{tag}{mark}>{_cell(value)}</{tag}>" for value, mark in zip(values, marks))

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>" if any(header) else ""
    return f'<div class="scroll"><table>{head}<tbody>{lines}</tbody></table></div>'


class Html(str):
    """Text that is HTML already; `table` writes it as it is."""


def _cell(value: object) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def chip(label: str, kind: str = "") -> Html:
    """A small rounded label; kind is "", "good", "bad" or "plain"."""
    return Html(f'<span class="chip {kind}">{escape(label)}</span>')


def legend(items: Sequence[tuple[str, str]], *, rings: Sequence[str] = ()) -> str:
    """Colour keys, given as (label, CSS colour); labels of `rings` are drawn as rings."""
    marks = ((label, colour, ' class="ring"' if label in rings else "") for label, colour in items)
    spans = (f'<span><i{ring} style="background:{colour}"></i>{escape(label)}</span>' for label, colour, ring in marks)
    return f'<div class="legend">{"".join(spans)}</div>'


def pre(text: str) -> str:
    """Preformatted plain text that wraps."""
    return f"<pre>{escape(text)}</pre>"
