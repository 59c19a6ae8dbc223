"""Push mutated files through `upswap.load`: `python -m tests.fuzz --files 12000 --seed 0 --jobs 2`, from the repository."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from .guard import Watch, watched
from .runner import keep, report, run


def main() -> int:
    """Exit code 1 where something was wrong with a load."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=12_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where failing files are put")
    parser.add_argument("--replay", type=Path, help="load one failing file again, and show all of what happens")
    options = parser.parse_args()
    console = Console(width=200)
    if options.replay is not None:
        return _replay(options.replay, console)
    start, results = time.monotonic(), []
    for result in run(list(range(options.first, options.first + options.files)), options.seed, options.jobs):
        results.append(result)
        if result.outcome.wrong:
            place = keep(result, options.seed, options.keep)
            console.print(f"[red]wrong[/red] {place}: {result.outcome.wrong}", soft_wrap=True, highlight=False)
        if len(results) % 1000 == 0:
            console.print(f"{len(results)} files, {time.monotonic() - start:.0f} s", highlight=False)
    report(results, time.monotonic() - start, console)
    return 1 if any(result.outcome.wrong for result in results) else 0


def _replay(place: Path, console: Console) -> int:
    import upswap

    about = json.loads((place / "about.json").read_text())
    console.print_json(json.dumps(about))
    path = place / "files" / about["load"]
    try:
        upswap.load(path)
    except Exception:  # noqa: BLE001 - shown, whatever it is
        console.print_exception()
    outcome = watched(upswap.load, path, Watch())
    console.print(outcome)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
