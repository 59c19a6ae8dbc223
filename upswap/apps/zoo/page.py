"""A run as one HTML page that needs nothing else: a table to sort and filter, and the sites of each model to unfold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ...shown import Html, tag
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
    heads = (tag("th", tag("button", name), class_=css, scope="col") for name, css in _HEADS)
    lines = (part for row in rows for part in ("\n", _row(row)))
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(_STYLE)),
    ]
    body = [
        tag("h1", title),
        tag("p", about),
        tag("div", *(tag("div", tag("b", value), name, class_="tile") for name, value in tiles), class_="tiles"),
        Html('<label>Filter <input id="filter" type="search" placeholder="unet resnet failed"></label> '),
        tag("span", f"{len(rows)} of {len(rows)}", id="count", class_="dim"),
        tag(
            "div",
            tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines), id="models"),
            class_="wide",
        ),
        tag("script", Html(_SCRIPT)),
    ]
    return "<!doctype html>\n" + tag("html", tag("head", *head), "\n", tag("body", *body), lang="en")


def _settings(header: dict[str, Any]) -> list[tuple[str, Any]]:
    found = dict(header.get("settings", {}))
    options = found.pop("options", {})
    return [(key, value) for key, value in {**options, **found}.items() if value not in (None, False, [], ())]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _row(row: Row) -> Html:
    good = row.status in STATUSES[:2]
    broken = [f"{name}: {message}" for name, message in row.checks.items() if message]
    problem = "\n".join(filter(None, [row.error, *broken]))
    error = [tag("div", problem, class_="error")] if problem else []
    source = tag("details", tag("summary", row.source), _sites(row)) if row.details else row.source
    added = row.parameters_after - row.parameters
    more_flops = None if row.flops is None or row.flops_after is None else row.flops_after - row.flops
    cells = [
        _td("source", row.source, source, *error),
        _td("c good" if good and not broken else "c bad", row.status, row.status),
        _td("n", row.swapped, str(row.swapped) if row.sites else ""),
        _td("n", row.sites, str(row.sites) if row.sites else ""),
        _td("dim", sum(row.kept.values()), _pairs(row.kept)),
        _td("c dim", _pairs(row.routes), _pairs(row.routes)),
        _td("n", row.parameters, f"{row.parameters:,}" if row.parameters else ""),
        _td("n", added, f"{added:+,}" if added else ""),
        _td("n", row.flops, "" if row.flops is None else f"{row.flops / 1e9:.3g}"),
        _td("n", more_flops, f"{more_flops / row.flops:+.1%}" if more_flops and row.flops else ""),
        _td("n", row.max_rel_diff, "" if row.max_rel_diff is None else f"{row.max_rel_diff:.1e}"),
        _td("n", row.total_seconds, f"{row.total_seconds:.2f}"),
        _td("n", row.peak_memory, f"{row.peak_memory / 1e6:,.0f}" if row.peak_memory else ""),
    ]
    return tag("tr", *cells)


def _td(css: str, value: Any, *parts: object) -> Html:
    return tag("td", *parts, class_=css, data_v="" if value is None else value)


def _sites(row: Row) -> Html:
    names = ("site", "kind", "mode", "ratio", "channels", "shape", "swap", "route", "reason")
    lines = (
        (tag("td", "swap" if v is True else "keep" if v is False else v) for v in values)
        for values in ([site.get(name, "") for name in names] for site in row.details)
    )
    return tag("table", tag("tr", *(tag("th", name) for name in names)), *(tag("tr", *line) for line in lines))


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
