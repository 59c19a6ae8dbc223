"""What a run came to: totals, and a row a model as CSV. `page.py` has the same to look at in a browser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ...shown import csv_text
from .rows import STATUSES, Row

#: The columns of the CSV, in order; `kept`, `routes` and `seconds` are written out as `name=value` pairs.
COLUMNS = (
    "source",
    "status",
    "error",
    "model",
    "output",
    "sites",
    "swapped",
    "kept",
    "routes",
    "parameters",
    "parameters_after",
    "flops",
    "flops_after",
    "flops_at",
    "max_rel_diff",
    "checks",
    "seconds",
    "peak_memory",
    "versions",
    "worker",
)


def totals(rows: Iterable[Row]) -> dict[str, Any]:
    """Counts over a run: models by status, sites, swapped, kept by kind, routes, failed checks, the largest difference."""
    rows = list(rows)
    statuses = Counter(row.status for row in rows)
    return {
        "models": len(rows),
        **{status: statuses[status] for status in STATUSES},
        "sites": sum(row.sites for row in rows),
        "swapped": sum(row.swapped for row in rows if row.status == "converted"),
        "kept": _sum(row.kept for row in rows),
        "routes": _sum(row.routes for row in rows if row.status == "converted"),
        "failed_checks": sum(bool(message) for row in rows for message in row.checks.values()),
        "max_rel_diff": max((row.max_rel_diff for row in rows if row.max_rel_diff is not None), default=None),
        "seconds": round(sum(row.total_seconds for row in rows), 1),
    }


def to_csv(rows: Iterable[Row]) -> str:
    """The rows as CSV, with a header."""
    return csv_text([COLUMNS, *([_cell(getattr(row, name)) for name in COLUMNS] for row in rows)])


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return " ".join(f"{name}={item}" for name, item in value.items())
    return value


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())
