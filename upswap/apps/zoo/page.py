"""A run as one HTML page that needs nothing else: a table to sort and filter, and the sites of each model to unfold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any

from .report import totals
from .rows import STATUSES, Row

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a7d46; --bad: #c0392b; --dim: #777; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
p { margin: .2rem 0 1rem; color: var(--dim); }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; min-width: 6rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
input { font: inherit; padding: .35rem .6rem; width: 24rem; max-width: 100%; border: 1px solid var(--line);
        border-radius: 6px; background: transparent; color: inherit; }
.wide { overflow-x: auto; margin-top: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th button { all: unset; cursor: pointer; font-weight: 600; white-space: nowrap; }
th button:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.n, .c { white-space: nowrap; }
.n { text-align: right; }
.good { color: var(--good); } .bad { color: var(--bad); } .dim { color: var(--dim); }
.source { max-width: 34rem; overflow-wrap: anywhere; }
details summary { cursor: pointer; }
.source:has(details[open]) { max-width: none; }
details td, details th { white-space: nowrap; }
details td:last-child { white-space: normal; min-width: 14rem; }
details table { margin: .4rem 0 .6rem; background: var(--soft); font-size: .92em; }
.error { color: var(--bad); white-space: pre-wrap; max-width: 34rem; overflow-wrap: anywhere; }
"""

_SCRIPT = """
const table = document.querySelector("#models"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const key = (row, i) => { const v = row.cells[i].dataset.v; return v === "" ? null : isNaN(v) ? v : Number(v); };
heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a, i), y = key(b, i);
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return up ? order : -order;
  });
  body.append(...rows);
}));
const count = document.querySelector("#count");
document.querySelector("#filter").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const row of body.rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    shown += !row.hidden;
  }
  count.textContent = shown + " of " + body.rows.length;
});
"""

_HEADS = (
    ("model", ""),
    ("status", ""),
    ("swapped", "n"),
    ("sites", "n"),
    ("kept", ""),
    ("routes", ""),
    ("parameters", "n"),
    ("added", "n"),
    ("GFLOPs", "n"),
    ("added", "n"),
    ("step 0", "n"),
    ("seconds", "n"),
    ("peak MB", "n"),
)


def to_html(rows: Iterable[Row], title: str, header: dict[str, Any]) -> str:
    """The page; `header` is what the journal says of the run: when it began, with what settings."""
    rows = list(rows)
    counts = totals(rows)
    tiles = [
        ("models", counts["models"]),
        *((status, counts[status]) for status in STATUSES),
        ("sites swapped", f"{counts['swapped']} of {counts['sites']}"),
        ("failed checks", counts["failed_checks"]),
        ("largest step-0 difference", "none" if counts["max_rel_diff"] is None else f"{counts['max_rel_diff']:.1e}"),
    ]
    settings = ", ".join(f"{key} {_plain(value)}" for key, value in _settings(header))
    about = f"begun {header.get('started', '?')} with upswap {header.get('upswap', '?')}: {settings}"
    heads = "".join(f'<th class="{css}" scope="col"><button>{name}</button></th>' for name, css in _HEADS)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1><p>{escape(about)}</p>",
            '<div class="tiles">',
            *(f'<div class="tile"><b>{escape(str(value))}</b>{escape(name)}</div>' for name, value in tiles),
            "</div>",
            '<label>Filter <input id="filter" type="search" placeholder="unet resnet failed"></label> '
            f'<span id="count" class="dim">{len(rows)} of {len(rows)}</span>',
            f'<div class="wide"><table id="models"><thead><tr>{heads}</tr></thead><tbody>',
            *(_row(row) for row in rows),
            f"</tbody></table></div><script>{_SCRIPT}</script></body></html>",
        ]
    )


def _settings(header: dict[str, Any]) -> list[tuple[str, Any]]:
    found = dict(header.get("settings", {}))
    options = found.pop("options", {})
    return [(key, value) for key, value in {**options, **found}.items() if value not in (None, False, [], ())]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _row(row: Row) -> str:
    good = row.status in STATUSES[:2]
    broken = [f"{name}: {message}" for name, message in row.checks.items() if message]
    problem = "\n".join(filter(None, [row.error, *broken]))
    error = f'<div class="error">{escape(problem)}</div>' if problem else ""
    sites = _sites(row) if row.details else ""
    source = f"<details><summary>{escape(row.source)}</summary>{sites}</details>" if sites else escape(row.source)
    added = row.parameters_after - row.parameters
    more_flops = None if row.flops is None or row.flops_after is None else row.flops_after - row.flops
    cells = [
        ("source", row.source, source + error),
        ("c good" if good and not broken else "c bad", row.status, escape(row.status)),
        ("n", row.swapped, str(row.swapped) if row.sites else ""),
        ("n", row.sites, str(row.sites) if row.sites else ""),
        ("dim", sum(row.kept.values()), escape(_pairs(row.kept))),
        ("c dim", _pairs(row.routes), escape(_pairs(row.routes))),
        ("n", row.parameters, f"{row.parameters:,}" if row.parameters else ""),
        ("n", added, f"{added:+,}" if added else ""),
        ("n", row.flops, "" if row.flops is None else f"{row.flops / 1e9:.3g}"),
        ("n", more_flops, f"{more_flops / row.flops:+.1%}" if more_flops and row.flops else ""),
        ("n", row.max_rel_diff, "" if row.max_rel_diff is None else f"{row.max_rel_diff:.1e}"),
        ("n", row.total_seconds, f"{row.total_seconds:.2f}"),
        ("n", row.peak_memory, f"{row.peak_memory / 1e6:,.0f}" if row.peak_memory else ""),
    ]
    return "<tr>" + "".join(_td(css, value, text) for css, value, text in cells) + "</tr>"


def _td(css: str, value: Any, text: str) -> str:
    return f'<td class="{css}" data-v="{escape("" if value is None else str(value))}">{text}</td>'


def _sites(row: Row) -> str:
    names = ("site", "kind", "mode", "ratio", "channels", "shape", "swap", "route", "reason")
    heads = "".join(f"<th>{name}</th>" for name in names)
    lines = (
        "".join(f"<td>{escape('swap' if v is True else 'keep' if v is False else str(v))}</td>" for v in values)
        for values in ([site.get(name, "") for name in names] for site in row.details)
    )
    return f"<table><tr>{heads}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
